"""Fill a wheelhouse for the tests: environments for this machine, and one for a 64-bit Raspberry Pi OS.

    python scripts/fill_wheelhouse.py build/wheelhouse [--boards [--torch]]

``--boards``: and what the emulated boards are provisioned with, PyTorch apart, which is large.
Downloads what is not there yet, as pip is set up to; quick the second time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edge_infer.deploy import wheelhouse
from edge_infer.deploy.checkup import platform_facts
from edge_infer.deploy.platforms import Platform

PI = Path(__file__).parent.parent / "tests" / "data" / "platforms" / "raspberry_pi_os_bookworm.json"
#: The environments of the boards.
BOARDS = (["tflite"], ["tflite-runtime"], ["onnx", "tflite"])
TORCH = (["onnx", "tflite", "torch"],)


def main(folder: Path, more: list[str]) -> None:
    here = Platform.from_facts(platform_facts(sys.executable))
    pi = Platform.from_facts(json.loads(PI.read_text())["facts"])
    wanted = [(here, ["tflite"]), (here, ["onnx", "tflite"]), (pi, ["tflite-runtime"])]
    if "--boards" in more:
        wanted += [(pi, engines) for engines in (*BOARDS, *(TORCH if "--torch" in more else ()))]
    for platform, engines in wanted:
        wheelhouse.prepare(platform, engines, folder, progress=lambda step: print(f"  {step}", file=sys.stderr))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
