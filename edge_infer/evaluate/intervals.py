"""95 % intervals: how far a figure from this many samples can be trusted.

A *statistic* is a function of weights [n], how often each sample counts: a resample is the same samples under other
weights, so nothing is copied or sorted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Statistic = Callable[[Array], float]

#: Two-sided 95 % of the normal distribution.
Z = 1.959963984540054
SEED = 20
#: Resamples; fewer for large sets, whose intervals are narrow anyway, so that the work stays bounded.
MOST_RESAMPLES, FEWEST_RESAMPLES, DRAWS = 1000, 200, 20_000_000


def is_proportion(rows: Array) -> bool:
    """Whether each sample is one yes or no."""
    return rows.shape[1] == 1 and bool(np.isin(rows, (0.0, 1.0)).all())


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval for a proportion, good for few samples and near 0 and 1 as well.

    https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval#Wilson_score_interval
    """
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    middle, scale = share + Z * Z / (2 * count), 1 + Z * Z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(statistic: Statistic, count: int, resamples: int | None = None) -> tuple[float, float]:
    """Percentile bootstrap over ``count`` samples; ``statistic(weights)`` is asked once a resample.

    Resamples where the statistic has no value (NaN) are left out. The same seed each time, so that two models
    scored on the same samples are resampled alike. https://en.wikipedia.org/wiki/Bootstrapping_(statistics)
    """
    values = np.array([statistic(weights) for weights in _resamples(count, resamples)])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    # Without interpolation: between a finite and an infinite error there is nothing in the middle.
    low, high = np.quantile(values, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


def _resamples(count: int, resamples: int | None) -> Iterator[Array]:
    rng = np.random.default_rng(SEED)
    for _ in range(resamples or max(FEWEST_RESAMPLES, min(MOST_RESAMPLES, DRAWS // count))):
        yield np.bincount(rng.integers(0, count, count), minlength=count)


def paired_proportions(reference: Array, candidate: Array) -> tuple[float, float]:
    """Interval of (candidate - reference) for yes/no results [n] of both on the same samples.

    Wald's with half a sample added to each cell, which holds for few samples and where no answer changed; like
    McNemar's test it looks at the samples that changed. Agresti and Min 2005, https://doi.org/10.1002/sim.1781
    """
    count = len(reference) + 2.0
    lost = float(np.sum(reference > candidate)) + 0.5
    won = float(np.sum(candidate > reference)) + 0.5
    middle = (won - lost) / count
    spread = Z * math.sqrt((won + lost) - (won - lost) ** 2 / count) / count
    return max(-1.0, middle - spread), min(1.0, middle + spread)
