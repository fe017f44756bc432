"""The small language of ``--postprocess``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from edge_infer.errors import BundleError, UsageError
from edge_infer.manifest import Boxes, Classes, Postprocessing, struct

KINDS = {"classes": Classes, "boxes": Boxes}
POSTPROCESS_FORM = "classes:activation=softmax,top=5,labels=labels.txt or boxes:form=cxcywh,threshold=0.25,iou=0.5,..."
#: What is no text in the manifest, and how its text is read.
FILES = ("labels", "anchors")
FLAGS = ("transposed", "objectness", "background")
NUMBERS = ("threshold", "iou")


def parse_postprocess(text: str) -> tuple[Postprocessing, tuple[Path, ...]]:
    """``KIND:KEY=VALUE,...``: what is made of the answers, and the files to attach to the bundle.

    The keys are the fields of ``edge_infer.manifest.Classes`` and ``Boxes``; flags such as ``transposed`` stand alone;
    ``variances`` have a colon between them. Raises UsageError.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UsageError(f"--postprocess {text!r}, expected {POSTPROCESS_FORM}")
    known = [item.name for item in fields(KINDS[kind]) if item.name != "extra"]
    row: dict[str, Any] = {}
    files = []
    for item in filter(None, (item.strip() for item in rest.split(","))):
        key, equals, value = item.partition("=")
        if key not in known or bool(equals) == (key in FLAGS):
            raise UsageError(f"--postprocess {text!r}: {item!r}, expected KEY=VALUE with {', '.join(known)}")
        if key in row:
            raise UsageError(f"--postprocess {text!r} gives {key} twice, expected it once")
        row[key] = _value(key, value, text)
        if key in FILES:
            files.append(Path(value))
    try:
        return struct(Postprocessing)({kind: row}, "postprocessing"), tuple(files)
    except BundleError as error:
        said = str(error).removeprefix("the manifest's postprocessing.")
        raise UsageError(f"--postprocess {text!r}: {said}") from None


def _value(key: str, value: str, text: str) -> Any:
    if key in FLAGS:
        return True
    if key in FILES:
        return Path(value).name
    try:
        if key == "top":
            return int(value)
        if key == "variances":
            return [float(item) for item in value.split(":")]
        return float(value) if key in NUMBERS else value
    except ValueError:
        raise UsageError(f"--postprocess {text!r}: {key} {value!r}, expected a number") from None
