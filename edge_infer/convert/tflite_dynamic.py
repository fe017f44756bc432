"""One ``.tflite`` for inputs of any size, from several conversions of the same model at fixed sizes.

Converters that need fixed shapes give graphs that differ only in sizes when an input grows. Comparing them tells
which dimensions of which tensors follow which input, and every shape that the converter wrote down as a constant
becomes -1 where the operator can infer it, or else operators that compute it from the shapes at hand. What cannot be
expressed so is refused: a graph that is another one at another size, or numbers that depend on the size.

The engine works out all other shapes itself once ``resize_tensor_input`` gave the new sizes.
https://ai.google.dev/edge/api/tflite/java/org/tensorflow/lite/InterpreterApi#resizeInput(int,int[])
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edge_infer.convert import tflite_files
from edge_infer.errors import ConversionError

Array = np.ndarray[Any, Any]
#: A size in each of the conversions: what tells one dimension from another.
Sizes = tuple[int, ...]

OPERATORS = schema.BuiltinOperator
#: Which input of an operator is a shape, or a position, written down as a constant.
SHAPE_ARGUMENTS = {
    OPERATORS.RESHAPE: (1,),
    OPERATORS.BROADCAST_TO: (1,),
    OPERATORS.SLICE: (1, 2),
    OPERATORS.TRANSPOSE_CONV: (0,),
    OPERATORS.FILL: (0,),
    OPERATORS.RESIZE_BILINEAR: (1,),
    OPERATORS.RESIZE_NEAREST_NEIGHBOR: (1,),
}
#: Operators whose constant operand may keep size 1 where the other operand has more.
BROADCASTING = frozenset(
    (OPERATORS.ADD, OPERATORS.SUB, OPERATORS.MUL, OPERATORS.DIV, OPERATORS.MAXIMUM, OPERATORS.MINIMUM)
)


def generalize(models: Sequence[Any], words: Sequence[str], bounded: Sequence[bool]) -> Any:
    """Make ``models[0]`` (a ``ModelT``) take any size, and give it.

    ``models[n + 1]`` is the conversion in which the ``n``-th dynamic size alone is another one. ``words[n]`` names
    that size in error messages; ``bounded[n]`` says that ``models[0]`` has the largest that there is. Raises
    ConversionError.
    """
    return _Generalizer(models, words, bounded).run()


def _number_by_use(model: Any) -> None:
    """Number tensors in the order in which operators use them, a constant anew each time.

    Converters make one tensor of equal constants, and shapes are equal by chance at one size and not at another.
    """
    graph, old = model.subgraphs[0], model.subgraphs[0].tensors
    new = [old[index] for index in graph.inputs]
    number = {int(index): place for place, index in enumerate(graph.inputs)}
    for operator in graph.operators:
        inputs = [int(index) for index in operator.inputs]
        for place, index in enumerate(inputs):
            if index >= 0 and index not in number:
                new.append(copy.copy(old[index]))
                inputs[place] = len(new) - 1
            elif index >= 0:
                inputs[place] = number[index]
        operator.inputs = inputs
        number.update({int(index): len(new) + place for place, index in enumerate(operator.outputs)})
        new += [old[index] for index in operator.outputs]
        operator.outputs = [number[int(index)] for index in operator.outputs]
    entries = [entry for signature in model.signatureDefs or [] for entry in (*signature.inputs, *signature.outputs)]
    loose = {int(index) for index in (*graph.outputs, *(entry.tensorIndex for entry in entries))} - set(number)
    for index in sorted(loose):
        number[index] = len(new)  # a constant that is an output, an input that nothing uses
        new.append(old[index])
    graph.inputs, graph.outputs = ([number[int(index)] for index in items] for items in (graph.inputs, graph.outputs))
    for entry in entries:
        entry.tensorIndex = number[int(entry.tensorIndex)]
    graph.tensors = new


@dataclass(frozen=True)
class _Term:
    """``factor * dimension * ... + offset`` for the dimensions ``axes`` of ``tensors``."""

    dimensions: tuple[tuple[int, int], ...]
    factor: int = 1
    offset: int = 0


class _Generalizer:
    def __init__(self, models: Sequence[Any], words: Sequence[str], bounded: Sequence[bool]) -> None:
        self.models, self.words, self.bounded = models, words, bounded
        self.model = models[0]
        if len({len(model.subgraphs[0].tensors) for model in models}) > 1:
            for model in models:
                _number_by_use(model)
        self._check_same_graphs()
        self.graph = self.model.subgraphs[0]
        self.tensors = [list(rows) for rows in zip(*(model.subgraphs[0].tensors for model in models), strict=True)]
        self.before: list[Any] = []  # operators to put before the one at hand
        self.cache: dict[Any, int] = {}

    def run(self) -> Any:
        operators, shapes = self.graph.operators, [tensor.shape for tensor in self.graph.tensors]
        constants = {index for index in range(len(shapes)) if self._data(0, index) is not None}
        changed = {index for index in constants if self._differs(index)}
        done: list[Any] = []
        known = [int(index) for index in self.graph.inputs]  # tensors that exist before the operator at hand
        for operator in operators:
            self.before = []
            self.begins = self._rows(int(operator.inputs[1])) if self._code(operator) == OPERATORS.SLICE else []
            operator.inputs = [int(index) for index in operator.inputs]
            for place, index in enumerate(operator.inputs):
                if index in changed:
                    operator.inputs[place] = self._replaced(operator, place, index, known)
            done += [*self.before, operator]
            known += [int(index) for index in operator.outputs]
        self.graph.operators = done
        for index in range(len(shapes)):
            self._mark_dynamic(index)
        for index in self.graph.outputs:
            if int(index) in changed:
                raise ConversionError(self._refusal(self._mover(int(index)), "an output is a constant for each size"))
        self._drop_unused()
        return self.model

    def _check_same_graphs(self) -> None:
        first = self.model.subgraphs
        for number, model in enumerate(self.models[1:]):
            if [len(graph.operators) for graph in model.subgraphs] != [len(graph.operators) for graph in first]:
                raise ConversionError(self._refusal(number, "the model is another graph for each size, as loops are"))
            if len(first) > 1:
                raise ConversionError(self._refusal(number, "the model has conditions or loops in graphs of their own"))
            for mine, other in zip(first[0].operators, model.subgraphs[0].operators, strict=True):
                if not self._same(model, mine, other):
                    name = self._name(mine)
                    raise ConversionError(self._refusal(number, f"the operator {name} is set up for one size"))

    def _same(self, model: Any, mine: Any, other: Any) -> bool:
        """The same operator on the same tensors; the shape among a RESHAPE's options is not looked at."""
        same = self._code(mine) == tflite_files.operator_code(model.operatorCodes[other.opcodeIndex])
        same = same and list(mine.inputs) == list(other.inputs) and list(mine.outputs) == list(other.outputs)
        if self._code(mine) == OPERATORS.RESHAPE:
            return same
        return same and _plain(mine.builtinOptions) == _plain(other.builtinOptions)

    def _refusal(self, number: int, reason: str) -> str:
        what = self.words[number]
        return f"TFLite cannot take {what} in any size: {reason}; give it one size with --input, or use --format onnx"

    def _mover(self, index: int) -> int:
        """The first size that a constant depends on."""
        return next(n for n in range(len(self.words)) if not _equal(self._data(n + 1, index), self._data(0, index)))

    def _code(self, operator: Any) -> int:
        return tflite_files.operator_code(self.model.operatorCodes[operator.opcodeIndex])

    def _name(self, operator: Any) -> str:
        return str(tflite_files.NAMES.get(self._code(operator), self._code(operator)))

    def _data(self, number: int, index: int) -> Array | None:
        """The contents of a constant in conversion ``number``, None for what is computed."""
        tensor = self.tensors[index][number]
        data = self.models[number].buffers[tensor.buffer].data
        if data is None or len(data) == 0 or tensor.type not in _NUMPY:
            return None
        return np.asarray(data, np.uint8).view(_NUMPY[tensor.type]).reshape([int(size) for size in tensor.shape])

    def _differs(self, index: int) -> bool:
        return any(not _equal(self._data(number, index), self._data(0, index)) for number in range(len(self.models)))

    def _sizes(self, index: int) -> list[Sizes]:
        """The dimensions of a tensor, each with its size in all conversions."""
        if index >= len(self.tensors):  # made here
            return []
        shapes = [[int(size) for size in tensor.shape] for tensor in self.tensors[index]]
        if len({len(shape) for shape in shapes}) != 1:
            raise ConversionError(f"a tensor has another rank for another size of {self.words[0]}; give it one size")
        return list(zip(*shapes, strict=True))

    def _mark_dynamic(self, index: int) -> None:
        if index >= len(self.tensors):
            return
        tensor, sizes = self.graph.tensors[index], self._sizes(index)
        dynamic = [len(set(size)) > 1 for size in sizes]
        if any(dynamic) and self._data(0, index) is None:
            tensor.shapeSignature = [-1 if moves else size[0] for moves, size in zip(dynamic, sizes, strict=True)]

    def _drop_unused(self) -> None:
        """Constants that were replaced go, with their contents."""
        graph, signatures = self.graph, self.model.signatureDefs or []
        maps = [entry for signature in signatures for entry in (*signature.inputs, *signature.outputs)]
        used = {int(index) for operator in graph.operators for index in (*operator.inputs, *operator.outputs)}
        used |= {int(index) for index in (*graph.inputs, *graph.outputs)} | {int(entry.tensorIndex) for entry in maps}
        kept = sorted(used - {-1})
        number = {-1: -1, **{old: new for new, old in enumerate(kept)}}
        graph.tensors = [graph.tensors[index] for index in kept]
        for operator in graph.operators:
            operator.inputs = [number[int(index)] for index in operator.inputs]
            operator.outputs = [number[int(index)] for index in operator.outputs]
        graph.inputs = [number[int(index)] for index in graph.inputs]
        graph.outputs = [number[int(index)] for index in graph.outputs]
        for entry in maps:
            entry.tensorIndex = number[int(entry.tensorIndex)]

    # Constants that differ.

    def _replaced(self, operator: Any, place: int, index: int, known: list[int]) -> int:
        """The tensor to use for a constant that is not the same in all conversions."""
        data = [self._data(number, index) for number in range(len(self.models))]
        code = self._code(operator)
        if place in SHAPE_ARGUMENTS.get(code, ()) and len({array.shape for array in data if array is not None}) == 1:
            rows: list[Sizes] = list(zip(*(np.asarray(array).reshape(-1).tolist() for array in data), strict=True))
            if code == OPERATORS.RESHAPE:
                operator.builtinOptions, operator.builtinOptionsType = None, 0
            return self._shape(operator, self._with_blanks(operator, place, rows), known)
        return self._values(operator, index, data, known)

    def _with_blanks(self, operator: Any, place: int, rows: list[Sizes]) -> list[Sizes]:
        """Sizes with -1 where the operator finds out itself: the one open size of a RESHAPE, the rest for a SLICE."""
        moving = [axis for axis, row in enumerate(rows) if len(set(row)) > 1]
        blank = (-1,) * len(self.models)
        if self._code(operator) == OPERATORS.RESHAPE and moving and not any(0 in row for row in rows):
            # One of several is left open too, so that the others need computing alone.
            open_axis = max(moving, key=lambda axis: (self._find(rows[axis], self._near(operator)) is None, -axis))
            return [blank if axis == open_axis else row for axis, row in enumerate(rows)]
        if self._code(operator) == OPERATORS.SLICE and place == 2:
            begins, whole = self.begins, self._sizes(int(operator.inputs[0]))
            return [
                blank
                if axis in moving and begins and all(b + n == w for b, n, w in zip(begins[axis], row, whole[axis]))
                else row
                for axis, row in enumerate(rows)
            ]
        return rows

    def _rows(self, index: int) -> list[Sizes]:
        if index >= len(self.tensors) or self._data(0, index) is None:
            return []
        data = [self._data(number, index) for number in range(len(self.models))]
        return list(zip(*(np.asarray(array).reshape(-1).tolist() for array in data), strict=True))

    def _near(self, operator: Any) -> list[int]:
        return [int(index) for index in operator.inputs if index >= 0]

    def _shape(self, operator: Any, rows: list[Sizes], known: list[int]) -> int:
        """A tensor that holds the sizes ``rows``: a constant if it can be one, else computed before ``operator``."""
        if all(len(set(row)) == 1 for row in rows):
            return self._constant([row[0] for row in rows])
        parts = [self._part(operator, row, known) for row in rows]
        if len(parts) == 1:
            return parts[0]
        options = schema.ConcatenationOptionsT()
        return self._emit(
            OPERATORS.CONCATENATION, options, schema.BuiltinOptions.ConcatenationOptions, parts, len(rows)
        )

    def _part(self, operator: Any, row: Sizes, known: list[int]) -> int:
        if len(set(row)) == 1:
            return self._constant([row[0]])
        computed = [index for index in known if self._sizes(index)]
        near = [index for index in self._near(operator) if index in computed]
        term = (
            self._find(row, near) or self._find(row, [int(i) for i in self.graph.inputs]) or self._exact(row, computed)
        )
        if term is None:
            number = next(number for number, size in enumerate(row[1:]) if size != row[0])
            raise ConversionError(
                self._refusal(number, f"a size in {self._name(operator)} follows from it in a way not understood")
            )
        return self._compute(term)

    def _find(self, row: Sizes, tensors: Sequence[int]) -> _Term | None:
        """How ``row`` follows from dimensions of ``tensors``, the plainest way first."""
        dimensions = [
            ((index, axis), sizes)
            for index in tensors
            if index < len(self.tensors) and self._data(0, index) is None
            for axis, sizes in enumerate(self._sizes(index))
            if len(set(sizes)) > 1
        ]
        return next(itertools.chain(_linear(row, dimensions), _products(row, dimensions)), None)

    def _exact(self, row: Sizes, tensors: Sequence[int]) -> _Term | None:
        """A dimension of anything computed so far that always has this size."""
        for index in reversed(tensors):
            for axis, sizes in enumerate(self._sizes(index)):
                if sizes == row:
                    return _Term(((index, axis),))
        return None

    def _values(self, operator: Any, index: int, data: list[Array | None], known: list[int]) -> int:
        """A constant of numbers of which there are more or fewer: repeated, or the beginning of a table."""
        arrays, sizes = [np.asarray(array) for array in data], self._sizes(index)
        for axis, row in enumerate(sizes):
            if len(set(row)) > 1 and all(_repeats(array, axis) for array in arrays):
                arrays = [array.take([0], axis) for array in arrays]
        table = len({array.shape for array in arrays}) > 1
        if not all(self._begins(number, array, arrays[0]) for number, array in enumerate(arrays[1:])):
            raise ConversionError(self._refusal(self._mover(index), f"numbers in {self._name(operator)} depend on it"))
        if table:
            return self._beginning(operator, index, arrays[0], sizes, known)
        constant = self._number_constant(index, arrays[0])
        if self._code(operator) in BROADCASTING and self._other_is_full(operator, index):
            return constant
        return self._repeated(constant, self._shape(operator, sizes, known), index)

    def _begins(self, number: int, part: Array, whole: Array) -> bool:
        """``part``, of the ``number``-th size, is the beginning of ``whole``, which holds all there is."""
        if part.shape == whole.shape:
            return np.array_equal(part, whole)
        if not self.bounded[number] or any(size > most for size, most in zip(part.shape, whole.shape)):
            return False
        return np.array_equal(part, whole[tuple(slice(size) for size in part.shape)])

    def _other_is_full(self, operator: Any, index: int) -> bool:
        outputs = self._sizes(int(operator.outputs[0]))
        others = [int(other) for other in operator.inputs if other != index and other < len(self.tensors)]
        return any(self._sizes(other) == outputs for other in others)

    def _beginning(self, operator: Any, index: int, whole: Array, sizes: list[Sizes], known: list[int]) -> int:
        rows = [row if whole.shape[axis] > 1 else (1,) * len(row) for axis, row in enumerate(sizes)]
        table = self._number_constant(index, whole)
        parts = [self._constant([0] * len(rows)), self._shape(operator, rows, known)]
        cut = self._like(index)
        self.before.append(
            self._operator(
                OPERATORS.SLICE, schema.SliceOptionsT(), schema.BuiltinOptions.SliceOptions, [table, *parts], [cut]
            )
        )
        if self._code(operator) in BROADCASTING or rows == sizes:
            return cut
        return self._repeated(cut, self._shape(operator, sizes, known), index)

    def _repeated(self, tensor: int, shape: int, like: int) -> int:
        out = self._like(like)
        options = schema.BroadcastToOptionsT()
        kind = schema.BuiltinOptions.BroadcastToOptions
        self.before.append(self._operator(OPERATORS.BROADCAST_TO, options, kind, [tensor, shape], [out]))
        return out

    # Building.

    def _compute(self, term: _Term) -> int:
        """One element: int32[1]."""
        key = ("term", term)
        if key in self.cache:
            return self.cache[key]
        parts = [self._dimension(index, axis) for index, axis in term.dimensions]
        value = parts[0]
        kinds = schema.BuiltinOptions
        for other in parts[1:] + ([self._constant([term.factor])] if term.factor != 1 else []):
            value = self._emit(OPERATORS.MUL, schema.MulOptionsT(), kinds.MulOptions, [value, other], 1)
        if term.offset:
            offset = self._constant([term.offset])
            value = self._emit(OPERATORS.ADD, schema.AddOptionsT(), kinds.AddOptions, [value, offset], 1)
        self.cache[key] = value
        return value

    def _dimension(self, index: int, axis: int) -> int:
        key = ("dimension", index, axis)
        if key not in self.cache:
            kinds = schema.BuiltinOptions
            options = schema.ShapeOptionsT()
            options.outType = schema.TensorType.INT32
            if ("shape", index) not in self.cache:
                rank = len(self._sizes(index))
                made = self._emit(OPERATORS.SHAPE, options, kinds.ShapeOptions, [index], rank)
                self.cache["shape", index] = made
            inputs = [self.cache["shape", index], self._constant([axis]), self._constant([1])]
            self.cache[key] = self._emit(OPERATORS.SLICE, schema.SliceOptionsT(), kinds.SliceOptions, inputs, 1)
        return self.cache[key]

    def _emit(self, code: int, options: Any, kind: int, inputs: list[int], length: int) -> int:
        """An operator before the one at hand that gives int32[length]."""
        out = self._tensor([length], schema.TensorType.INT32, 0)
        self.before.append(self._operator(code, options, kind, inputs, [out]))
        return out

    def _operator(self, code: int, options: Any, kind: int, inputs: list[int], outputs: list[int]) -> Any:
        operator = schema.OperatorT()
        operator.opcodeIndex = self._opcode(code)
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        operator.builtinOptions, operator.builtinOptionsType = options, kind
        return operator

    def _opcode(self, code: int) -> int:
        for index, row in enumerate(self.model.operatorCodes):
            if tflite_files.operator_code(row) == code:
                return index
        row = schema.OperatorCodeT()
        row.builtinCode, row.deprecatedBuiltinCode, row.version = code, min(code, 127), _VERSIONS.get(code, 1)
        self.model.operatorCodes.append(row)
        return len(self.model.operatorCodes) - 1

    def _constant(self, values: list[int]) -> int:
        key = ("constant", tuple(values))
        if key not in self.cache:
            data = np.array(values, np.int32)
            self.cache[key] = self._tensor([len(values)], schema.TensorType.INT32, self._buffer(data))
        return self.cache[key]

    def _number_constant(self, like: int, data: Array) -> int:
        key = ("number", like, data.shape)
        if key not in self.cache:
            made = self._tensor(list(data.shape), self.tensors[like][0].type, self._buffer(data))
            self.graph.tensors[made].name = self.tensors[like][0].name
            self.cache[key] = made
        return self.cache[key]

    def _buffer(self, data: Array) -> int:
        buffer = schema.BufferT()
        buffer.data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def _like(self, index: int) -> int:
        """A computed tensor in place of a constant."""
        sizes = self._sizes(index)
        made = self._tensor([row[0] for row in sizes], self.tensors[index][0].type, 0)
        self.graph.tensors[made].shapeSignature = [-1 if len(set(row)) > 1 else row[0] for row in sizes]
        return made

    def _tensor(self, shape: list[int], kind: int, buffer: int) -> int:
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = shape, kind, buffer
        tensor.name = b"size_%d" % len(self.graph.tensors)
        tensor.hasRank = True
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1


#: Operator versions that the operators put in need, where it is not the first (int32 operands).
#: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/tools/versioning/op_version.cc
_VERSIONS = {OPERATORS.BROADCAST_TO: 2}

_NUMPY = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.FLOAT16: np.float16,
    schema.TensorType.FLOAT64: np.float64,
    schema.TensorType.INT8: np.int8,
    schema.TensorType.INT16: np.int16,
    schema.TensorType.INT32: np.int32,
    schema.TensorType.INT64: np.int64,
    schema.TensorType.UINT8: np.uint8,
    schema.TensorType.BOOL: np.bool_,
}

_Dimensions = Sequence[tuple[tuple[int, int], Sizes]]


def _linear(row: Sizes, dimensions: _Dimensions) -> Iterator[_Term]:
    """``row`` as ``factor * dimension + offset``, the same in all conversions; without an offset first."""
    found = []
    for place, sizes in dimensions:
        other = next(number for number, size in enumerate(sizes) if size != sizes[0])
        factor, rest = divmod(row[other] - row[0], sizes[other] - sizes[0])
        offset = row[0] - factor * sizes[0]
        if not rest and factor > 0 and all(factor * size + offset == want for size, want in zip(sizes, row)):
            found.append(_Term((place,), factor, offset))
    yield from sorted(found, key=lambda term: (term.offset != 0, term.factor != 1))


def _products(row: Sizes, dimensions: _Dimensions) -> Iterator[_Term]:
    for count in (2, 3):
        for chosen in itertools.combinations(dimensions, count):
            product = [int(np.prod([sizes[number] for _, sizes in chosen])) for number in range(len(row))]
            factor, rest = divmod(row[0], product[0])
            if not rest and factor and all(factor * size == want for size, want in zip(product, row)):
                yield _Term(tuple(place for place, _ in chosen), factor)


def _repeats(array: Array, axis: int) -> bool:
    return np.array_equal(array, np.repeat(array.take([0], axis), array.shape[axis], axis))


def _equal(one: Array | None, other: Array | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def _plain(options: Any) -> Any:
    """An operator's options as data to compare."""
    if options is None:
        return None
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(options).items()}
