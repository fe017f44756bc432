"""Requests that are run as one: joined along their first dimension, and the answers taken apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_infer.errors import EdgeInferError, UsageError
from edge_infer.runtime.golden import Case, largest_difference, read_golden

if TYPE_CHECKING:
    from edge_infer.bundle import Bundle
    from edge_infer.runtime.session import Session

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Shape = tuple[tuple[int, ...], ...]

#: How much larger the values of a neighbour are that must not change an answer.
LOUD = 1e6


def shape_of(inputs: Arrays, session: Session) -> Shape | None:
    """What requests must have in common to be joined: all sizes but the first. None where one can only run alone,
    since it has no rows, or its inputs have different numbers of them. Raises InputError for what ``run`` refuses."""
    shapes = session.shapes(inputs)
    rows = {shape[0] for shape in shapes}
    return tuple(shape[1:] for shape in shapes) if len(rows) == 1 and 0 not in rows else None


def run_joined(session: Session, requests: Sequence[Arrays]) -> list[dict[str, Array]]:
    """The answers to requests of one shape, from one run. Raises what ``run`` raises, and UsageError where the answer
    does not have a row for each row asked."""
    first = session.inputs[0].name
    rows = [request[first].shape[0] for request in requests]
    joined = {spec.name: np.concatenate([request[spec.name] for request in requests]) for spec in session.inputs}
    answer = session.run(joined)
    for name, array in answer.items():
        if array.ndim == 0 or array.shape[0] != sum(rows):
            raise UsageError(
                f"output {name!r} has shape {list(array.shape)} for {sum(rows)} rows asked; requests to this model "
                "cannot be joined, leave batch at 1"
            )
    ends = np.cumsum(rows)
    parts = {name: np.split(array, ends[:-1]) for name, array in answer.items()}
    return [{name: part[number] for name, part in parts.items()} for number in range(len(requests))]


def check_joins(session: Session) -> None:
    """See that the model answers joined requests as it answers each alone: it might reduce over the first dimension,
    or that may be something else than a batch. Its golden questions tell. Raises UsageError."""
    problem = _fixed_size(session.bundle) or _untold(session) or _other_answers(session)
    if problem:
        raise UsageError(f"requests to {session.bundle.manifest.name} cannot be joined: {problem}; leave batch at 1")


def _fixed_size(bundle: Bundle) -> str:
    for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs):
        if not spec.shape or spec.shape[0] is not None:
            return f"the first size of {spec} is fixed"
    return ""


def _untold(session: Session) -> str:
    if session.bundle.manifest.golden.blind:
        return f"its golden questions prove nothing of {', '.join(session.bundle.manifest.golden.blind)}"
    if len(_alike(session)) < 2:
        return "no two golden questions have the same sizes, so nothing shows that it answers them alike"
    return ""


def _alike(session: Session) -> list[Case]:
    """Golden cases that can be joined with the first."""
    cases = read_golden(session.bundle)
    shapes = [shape_of(asked, session) for asked, _ in cases]
    return [case for case, shape in zip(cases, shapes) if shape is not None and shape == shapes[0]]


def _other_answers(session: Session) -> str:
    """What is wrong with the answers to the golden questions, asked as one, and asked together with a loud neighbour:
    a model whose activations are scaled by the largest of a whole batch answers such company badly."""
    cases = _alike(session)
    asked = [question for question, _ in cases]
    try:
        answers = run_joined(session, asked)
        beside = [run_joined(session, [question, _loud(question)])[0] for question in asked]
    except EdgeInferError as error:
        return str(error)
    for (_, expected), *answered in zip(cases, answers, beside):
        for name, allowed in session.bundle.manifest.golden.tolerance.items():
            difference = max(largest_difference(expected[name], answer[name]) for answer in answered)
            if not difference <= allowed:
                return (
                    f"in company its golden questions get other answers, output {name!r} differs by {difference:.3g} "
                    f"and {allowed:.3g} is allowed"
                )
    return ""


def _loud(question: Arrays) -> Arrays:
    with np.errstate(all="ignore"):  # float16 has no such numbers, and infinity is as loud
        return {
            name: array * array.dtype.type(LOUD) if array.dtype.kind == "f" else array
            for name, array in question.items()
        }
