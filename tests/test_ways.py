"""The graph of conversions: which ways there are from each kind of source, and in which order they are tried."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from edge_infer import convert
from edge_infer.convert.source import FAMILIES, Source
from edge_infer.errors import ConversionError, ConverterMissing, NotApplicable
from edge_infer.manifest import FORMATS
from edge_infer.workshop import no_way


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_kind_of_source_has_a_way_to_every_format(kind: str) -> None:
    source = Source(Path("model"), kind, "0" * 64)
    assert sorted(convert.formats_for(source)) == sorted(FORMATS)


@pytest.mark.parametrize(
    ("form", "format", "expected"),
    [
        (
            "saved-model",
            "tflite",
            ["saved-model -> tflite", "saved-model -> onnx -> tflite", "saved-model -> onnx -> torchscript -> tflite"],
        ),
        ("saved-model", "onnx", ["saved-model -> onnx", "saved-model -> tflite -> onnx"]),
        (
            "saved-model",
            "torchscript",
            ["saved-model -> onnx -> torchscript", "saved-model -> tflite -> onnx -> torchscript"],
        ),
        ("onnx", "onnx", ["onnx"]),
        ("onnx", "tflite", ["onnx -> tflite", "onnx -> torchscript -> tflite"]),
        ("tflite", "torchscript", ["tflite -> onnx -> torchscript"]),
    ],
)
def test_the_shortest_way_comes_first(form: str, format: str, expected: list[str]) -> None:
    assert [str(way) for way in convert.ways(form, format)] == expected


def test_two_modules_between_the_same_forms_are_two_ways() -> None:
    modules = [way.modules for way in convert.ways("torch", "onnx")]
    assert modules[:2] == [("edge_infer.convert.torch_to_onnx",), ("edge_infer.convert.torch_to_onnx_legacy",)]


def test_what_no_way_says_is_why_each_way_failed_once() -> None:
    first, second, third = convert.ways("torch", "onnx")[:3]
    alone = no_way([(first, NotApplicable("not for this")), (second, ConversionError("a reason"))])
    assert str(alone) == "a reason"
    several = no_way(
        [
            (first, ConverterMissing("install it", "a log")),
            (second, ConversionError("a reason")),
            (third, ConversionError("a reason")),
        ]
    )
    assert str(several) == (
        "no way leads there: torch -> onnx (torch_to_onnx): install it; torch -> onnx (torch_to_onnx_legacy): a reason"
    )
    assert isinstance(several, ConverterMissing) and several.log == "a log"


def test_every_module_of_the_graph_is_a_file_named_after_its_forms() -> None:
    for (here, there), modules in convert.STEPS.items():
        for module in modules:
            assert importlib.util.find_spec(module) is not None
            assert module.rpartition(".")[2].startswith(f"{here}_to_{there}".replace("-", "_"))
    for module, _ in convert.READERS.values():
        assert importlib.util.find_spec(module) is not None
