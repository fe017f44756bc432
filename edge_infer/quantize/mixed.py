"""Mixed precision: which layers stay float so that an int8 model keeps its accuracy, at the fewest bytes.

Every question is a real artifact, built and scored, so few are asked:

1. all layers in int8, and all in float;
2. the *frontier*, the sets that take away most error for their bytes, is bisected for the cheapest set that is good
   enough. It comes from the layers' own errors alone, as if these added up; a knapsack problem, solved as by
   Nemhauser and Ullmann 1969 (https://en.wikipedia.org/wiki/Knapsack_problem#Dominance_relations);
3. errors do not quite add up, so some of the layers kept are not needed: they are tried in int8 again, from the
   largest, several at a time, halved where that is too much;
4. and for the same reason a cheaper set may do: those from which most is to be expected are tried last.

For 1 and 2 that is at most 2 + log2(1024 + layers), for 3 up to twice the number of layers kept, for 4 ``CHANCES``
and one more for each set that does.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edge_infer.errors import ConversionError, UsageError

#: Sets on the frontier, at most.
FRONTIER = 1024
#: What keeping a layer costs beyond its bytes, as a share of all: its values are turned to float and back.
BORDER_SHARE = 0.001
#: Layers between two that stay float stay float as well, up to so many, if they cost no more than this share.
GAP_LAYERS, GAP_SHARE = 3, 0.001
#: Cheaper sets tried at the end that all fail before the search gives up.
CHANCES = 6


@dataclass(frozen=True)
class Layer:
    """``bytes`` of its float32 weights; ``error`` that int8 adds there (noise over signal, 0 or more)."""

    name: str
    kind: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Trial:
    """One artifact asked for: the layers kept in float, their share of the weight bytes, and how it did.

    ``score`` is ``None`` where it could not be built; ``failure`` says why.
    """

    keep_float: tuple[str, ...]
    bytes_share: float
    score: float | None
    met: bool
    failure: str | None = None


@dataclass(frozen=True)
class Mixed:
    """``keep_float`` in execution order; ``met`` whether that is good enough; ``trials`` in the order asked."""

    keep_float: tuple[str, ...]
    bytes_share: float
    score: float
    met: bool
    trials: tuple[Trial, ...]

    @property
    def evaluations(self) -> int:
        return len(self.trials)


def search(layers: Sequence[Layer], score: Callable[[frozenset[str]], float], wanted: float, budget: int) -> Mixed:
    """The layers to keep in float for a score of ``wanted`` or more, asking ``score(keep_float)`` ``budget`` times.

    ``layers`` are in execution order. The answer is the cheapest set that was seen to be good enough, or else the
    best one seen, with ``met`` false. A set for which ``score`` raises ConversionError counts as not good enough.
    The same answers of ``score`` lead to the same result.

    Raises UsageError for a budget below 1, ConversionError where no artifact could be built at all.
    """
    if budget < 1:
        raise UsageError(f"a search of {budget} trials cannot try anything, expected 1 or more")
    run = _Search(layers, score, wanted, budget)
    with contextlib.suppress(_Spent):
        _find(run)
    return run.result()


class _Spent(Exception):
    """The budget is."""


def _find(run: _Search) -> None:
    if run.passes(0):
        return
    high = _reach(run)
    if high is None:
        # Out of reach, as far as one can tell: see what the middle of the way gives, which may be by chance better.
        for mask in run.frontier[:: max(1, len(run.frontier) // 4)]:
            run.passes(mask)
        return
    _bisect(run, high)
    _prune(run)
    _take_chances(run)


def _reach(run: _Search) -> int | None:
    """Where on the frontier it is good enough: all layers in float, or nearly all where that cannot be built."""
    for place in range(len(run.frontier) - 1, max(0, len(run.frontier) - 4), -1):
        if run.passes(run.frontier[place]):
            return place
        if run.trials[run.frontier[place]].failure is None:
            return None
    return None


def _bisect(run: _Search, high: int) -> None:
    """The cheapest set on the frontier that passes, if each after it does."""
    low = 0  # fails, and high passes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if run.passes(run.frontier[middle]) else (middle, high)


def _prune(run: _Search) -> None:
    """Back to int8 what is float in vain."""
    best = run.best_mask()
    kept = sorted(run.members(best), key=lambda index: (-run.costs[index], run.errors[index], index))
    half = -(-len(kept) // 2)
    pieces = [kept[:half], kept[half:]]
    while pieces:
        piece = pieces.pop(0)
        trial = run.filled(run.best_mask() & ~run.mask(piece))
        if run.cost(trial) < run.cost(run.best_mask()) and not run.hopeless(trial) and run.passes(trial):
            continue
        if len(piece) > 1:
            half = -(-len(piece) // 2)
            pieces[:0] = [piece[:half], piece[half:]]


def _take_chances(run: _Search) -> None:
    """Cheaper sets, by the error they take away, until several in a row fail."""
    failed = 0
    while failed < CHANCES:
        limit = run.cost(run.best_mask())
        cheaper = (mask for mask in reversed(run.frontier) if run.cost(mask) < limit and not run.hopeless(mask))
        mask = next(cheaper, None)
        if mask is None:
            return
        failed = 0 if run.passes(mask) else failed + 1


class _Search:
    """Sets of layers as bit masks (bit i is layer i), what they cost, and what was asked so far."""

    def __init__(
        self, layers: Sequence[Layer], score: Callable[[frozenset[str]], float], wanted: float, budget: int
    ) -> None:
        self.layers, self._score, self._wanted, self._budget = tuple(layers), score, wanted, budget
        self._bytes = sum(layer.bytes for layer in layers)
        self.costs = [layer.bytes + max(1.0, BORDER_SHARE * self._bytes) for layer in layers]
        self.errors = _errors(layers)
        self.everything = (1 << len(layers)) - 1
        self.trials: dict[int, Trial] = {}
        self._frontier: list[int] = []

    @property
    def frontier(self) -> list[int]:
        """From nothing kept to all, by cost."""
        if not self._frontier:
            masks = {0, self.everything, *map(self.filled, _frontier(self.costs, self.errors))}
            self._frontier = sorted(masks, key=lambda mask: (self.cost(mask), mask))
        return self._frontier

    def members(self, mask: int) -> list[int]:
        return [index for index in range(len(self.layers)) if mask >> index & 1]

    def mask(self, members: Sequence[int]) -> int:
        return sum(1 << index for index in members)

    def cost(self, mask: int) -> float:
        return sum(self.costs[index] for index in self.members(mask))

    def share(self, mask: int) -> float:
        kept = sum(self.layers[index].bytes for index in self.members(mask))
        return kept / self._bytes if self._bytes else len(self.members(mask)) / max(1, len(self.layers))

    def filled(self, mask: int) -> int:
        """With the gaps closed that cost little: each island of float is entered and left again."""
        members = self.members(mask)
        for left, right in itertools.pairwise(members):
            gap = range(left + 1, right)
            if 0 < len(gap) <= GAP_LAYERS and sum(self.layers[i].bytes for i in gap) <= GAP_SHARE * self._bytes:
                mask |= self.mask(gap)
        return mask

    def passes(self, mask: int) -> bool:
        if mask not in self.trials:
            if len(self.trials) == self._budget:
                raise _Spent
            self.trials[mask] = self._ask(mask)
        return self.trials[mask].met

    def _ask(self, mask: int) -> Trial:
        names = tuple(self.layers[index].name for index in self.members(mask))
        try:
            score = float(self._score(frozenset(names)))
        except ConversionError as error:
            return Trial(names, self.share(mask), None, False, str(error))
        return Trial(names, self.share(mask), score, score >= self._wanted)

    def hopeless(self, mask: int) -> bool:
        """Whether a set with all of these layers and more was not good enough."""
        return any(not trial.met and mask & ~asked == 0 for asked, trial in self.trials.items())

    def best_mask(self) -> int:
        """The cheapest that is good enough, else the best, and of equals the cheapest."""
        met = [mask for mask, trial in self.trials.items() if trial.met]
        if met:
            return min(met, key=lambda mask: (self.cost(mask), mask))
        return min(self.trials, key=lambda mask: (-_value(self.trials[mask]), self.cost(mask), mask))

    def result(self) -> Mixed:
        best = self.trials[self.best_mask()]
        if best.score is None:
            raise ConversionError(f"none of {len(self.trials)} mixed artifacts could be built: {best.failure}")
        return Mixed(best.keep_float, best.bytes_share, best.score, best.met, tuple(self.trials.values()))


def _value(trial: Trial) -> float:
    return -math.inf if trial.score is None or math.isnan(trial.score) else trial.score


def _errors(layers: Sequence[Layer]) -> list[float]:
    """Errors that can be added and compared: never 0, so that the smallest layers come first where nothing is known.

    One that is no number comes from a layer that int8 breaks, and outweighs all others.
    """
    known = [max(0.0, layer.error) for layer in layers if math.isfinite(layer.error)]
    total = sum(known) or 1.0
    least = 1e-6 * total / max(1, len(layers))
    broken = 10 * total
    return [max(least, layer.error) if math.isfinite(layer.error) else broken for layer in layers]


@dataclass(frozen=True)
class _State:
    cost: float
    error: float
    mask: int


def _frontier(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Sets of which none cheaper takes away as much error; thinned, so that the work stays bounded."""
    states = [_State(0.0, 0.0, 0)]
    for index, (cost, error) in enumerate(zip(costs, errors, strict=True)):
        more = [_State(state.cost + cost, state.error + error, state.mask | 1 << index) for state in states]
        states = _thinned(list(_best([*states, *more])), FRONTIER)
    return [state.mask for state in _best([*states, *_greedy(costs, errors)])]


def _greedy(costs: Sequence[float], errors: Sequence[float]) -> Iterator[_State]:
    """Layers one after another by error for their cost: of many layers the thinning loses more than this does."""
    state = _State(0.0, 0.0, 0)
    for index in sorted(range(len(costs)), key=lambda index: (-errors[index] / costs[index], index)):
        state = _State(state.cost + costs[index], state.error + errors[index], state.mask | 1 << index)
        yield state


def _best(states: Sequence[_State]) -> Iterator[_State]:
    most = -1.0
    for state in sorted(states, key=lambda state: (state.cost, -state.error, state.mask)):
        if state.error > most:
            most = state.error
            yield state


def _thinned(states: list[_State], most: int) -> list[_State]:
    """At most ``most``, evenly by cost and by error: both the small sets and the nearly complete ones matter."""
    if len(states) <= most:
        return states
    costs, errors = [state.cost for state in states], [state.error for state in states]
    half = most // 2
    chosen = {0, len(states) - 1}
    for values in (costs, errors):
        for step in range(1, half):
            chosen.add(min(bisect.bisect_left(values, values[-1] * step / half), len(states) - 1))
    return [states[index] for index in sorted(chosen)]
