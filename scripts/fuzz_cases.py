"""The bundles that scripts/fuzz_bundles.py damages for docs/mutations.md; made in build/mutations when missing.

digits   the trained digits network: pictures in, classes with labels out
boxes    a tiny random detector: pictures in, boxes with anchors and labels out
wide     the same with more channels, so that an engine cache is kept; ``wider`` is another one of the same shapes

python scripts/fuzz_cases.py --make wide FILE.pt2
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "mutations"
MODELS = ROOT / "build" / "models"
FORMATS = ("tflite", "onnx", "torchscript")
#: What is damaged in its files, and what in its engine cache: TorchScript keeps none.
FILE_CASES = [f"{net}-{format}-{precision}" for format in FORMATS for net, precision in
              (("digits", "int8"), ("boxes", "float32"))]  # fmt: skip
CACHE_CASES = ["wide-tflite-float32", "wide-onnx-float32"]
#: Whose entry's files are put into the engine cache of a case.
OTHERS = {"wide": "wider"}

SIDE, CLASSES, ANCHORS = 16, 3, 2
#: Network -> channels and seed.
CHANNELS = {"boxes": (12, 1), "wide": (128, 1), "wider": (128, 2)}
#: Centres of the detector's grid, and the two sizes of box at each.
GRID, BOX_SIDES = 4, (0.2, 0.5)


def bundle_of(case: str) -> Path:
    """The bundle of a case, packaged when it is not there."""
    path = FOLDER / f"{case}.edge"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        net, format, precision = case.split("-")
        source, options = _digits(format) if net == "digits" else _boxes(net)
        command = [sys.executable, "-m", "edge_infer.cli", "package", str(source), "--target", "cpu-x86_64"]
        command += ["--format", format, "--precision", precision, *options, "-o", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def other_of(case: str) -> str:
    """The case whose engine cache is mixed into that of ``case``."""
    net, rest = case.split("-", maxsplit=1)
    return f"{OTHERS[net]}-{rest}"


def _digits(format: str) -> tuple[Path, list[str]]:
    if not (MODELS / "accuracy.json").exists():
        subprocess.run([sys.executable, str(ROOT / "scripts/make_models.py"), "--out", str(MODELS)], check=True)
    source, samples, layout = {
        "tflite": ("keras.keras", "calibration.npz", "NHWC"),
        "onnx": ("torch.onnx", "calibration_nchw.npz", "NCHW"),
        "torchscript": ("torch_export.pt2", "calibration_nchw.npz", "NCHW"),
    }[format]
    steps = f"resize=8x8,color=L,scale=1/255,layout={layout}"
    answers = f"classes:top=3,labels={MODELS / 'labels.txt'}"
    return MODELS / source, ["--calibration", str(MODELS / samples), "--preprocess", steps, "--postprocess", answers]


def _boxes(net: str) -> tuple[Path, list[str]]:
    source, anchors, labels = FOLDER / f"{net}.pt2", FOLDER / "anchors.npz", FOLDER / "labels.txt"
    if not source.exists():
        subprocess.run([sys.executable, __file__, "--make", net, str(source)], check=True)
    np.savez(anchors, anchors=_anchors())
    labels.write_text("".join(f"{name}\n" for name in ("cat", "dog", "owl")))
    steps = f"resize={SIDE}x{SIDE},mode=letterbox,scale=1/255,mean=0.4:0.5:0.6,std=0.2:0.2:0.3,layout=NCHW"
    answers = "boxes:scores=scores,boxes=boxes,unit=share,activation=sigmoid,iou=0.5,threshold=0.5,top=20,"
    answers += f"variances=0.1:0.2,anchors={anchors},labels={labels}"
    return source, ["--preprocess", steps, "--postprocess", answers]


def _anchors() -> np.ndarray:
    """Centre and size of each candidate as a share of the picture, float32[32, 4]."""
    middle = (np.arange(GRID) + 0.5) / GRID
    rows = [(x, y, side, side) for y in middle for x in middle for side in BOX_SIDES]
    return np.array(rows, np.float32)


def make(net: str, path: Path) -> None:
    import torch

    channels, seed = CHANNELS[net]
    torch.manual_seed(seed)

    class Detector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (3, channels, channels, channels)
            self.body = torch.nn.Sequential(
                *(
                    layer
                    for before, width, stride in zip(widths, widths[1:], (2, 2, 1), strict=False)
                    for layer in (torch.nn.Conv2d(before, width, 3, stride, 1), torch.nn.ReLU())
                )
            )
            self.head = torch.nn.Conv2d(channels, ANCHORS * (CLASSES + 4), 1)

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            table = self.head(self.body(image)).permute(0, 2, 3, 1).reshape(1, -1, CLASSES + 4)
            return {"scores": table[:, :, :CLASSES], "boxes": table[:, :, CLASSES:]}

    net_ = Detector().eval()
    for layer in net_.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    exported = torch.export.export(net_, (), {"image": torch.zeros(1, 3, SIDE, SIDE)})
    torch.export.save(exported, path)


if __name__ == "__main__":
    _, word, net, file = sys.argv
    if word != "--make":
        raise SystemExit(__doc__)
    make(net, Path(file))
