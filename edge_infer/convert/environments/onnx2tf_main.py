"""ONNX to TFLite with onnx2tf, inside its own environment: run by path, imports nothing of edge_infer.

    python onnx2tf_main.py FOLDER

Reads FOLDER/request.json {"model": path.onnx, "out": folder, "inputs": [names]} and leaves FOLDER/answer.json:
{"model": path.tflite, "tools": {package: version}}, or {"failed": words}. Inputs keep the layout they have.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES = -3, 2**20


def main(folder: Path) -> None:
    # Whoever waits for the answer may be killed; nobody would end this process then.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Copies of all weights are made and dropped one after the other; the C library would keep the memory.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
    request = json.loads((folder / "request.json").read_text())
    try:
        answer = convert(request)
    except BaseException as error:  # onnx2tf ends the process for some models
        traceback.print_exc()
        words = " ".join(str(error).split())
        answer = {"failed": f"{type(error).__name__}: {words[:2000]}"}
    (folder / "answer.json").write_text(json.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def convert(request: dict[str, Any]) -> dict[str, Any]:
    import onnx2tf

    out = Path(request["out"])
    onnx2tf.convert(
        input_onnx_file_path=request["model"],
        output_folder_path=str(out),
        # The way that writes the flatbuffer itself; the other one goes by TensorFlow, which is not here.
        tflite_backend="flatbuffer_direct",
        keep_shape_absolutely_input_names=request["inputs"],
        copy_onnx_input_output_names_to_tflite=True,
        # The model was simplified before; the program that would do it again is not here.
        not_use_onnxsim=True,
        # The recurrent operators of TFLite keep their state from one run to the next; what is unrolled does not.
        enable_rnn_unroll=True,
        verbosity="warn",
    )
    written = sorted(out.glob("*_float32.tflite"))
    if len(written) != 1:
        raise RuntimeError(f"onnx2tf wrote {len(written)} float models, expected one")
    packages = ("onnx2tf", "ai-edge-litert", "onnx", "numpy")
    return {"model": str(written[0]), "tools": {name: metadata.version(name) for name in packages}}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
