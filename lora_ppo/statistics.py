"""Intervals and tests for shares, and for differences between two models that answered the same samples."""

import math
from collections.abc import Sequence

RESAMPLES = 10_000


def wilson_interval(right: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `count` (Wilson 1927); (0, 1) if nothing was counted."""
    from scipy.stats import binomtest

    if not count:
        return 0.0, 1.0
    interval = binomtest(int(right), int(count)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that one at least of k answers is right, estimated without bias from so many, `right` of them right.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021 (https://arxiv.org/abs/2107.03374), equation 1.
    """
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p that two models are equally often right, from the samples that one alone got right.

    McNemar 1947 in its exact form: under the null hypothesis either model is the right one with probability 1/2.
    """
    from scipy.stats import binomtest

    differing = only_first + only_second
    return float(binomtest(only_first, differing).pvalue) if differing else 1.0


def newcombe_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """The 95 % interval of (first accuracy - second accuracy) on the same samples, which scipy does not have.

    Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10: the distances of both Wilson intervals from their
    proportions, joined with the correlation phi (corrected for continuity) of the two models' results.
    """
    n = both + only_first + only_second + neither
    if n == 0:
        return -1.0, 1.0
    first, second = both + only_first, both + only_second
    (low_1, high_1), (low_2, high_2) = wilson_interval(first, n), wilson_interval(second, n)
    p_1, p_2 = first / n, second / n
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    spread = first * (n - first) * second * (n - second)
    phi = covariance / math.sqrt(spread) if spread else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return p_1 - p_2 - joined(p_1 - low_1, high_2 - p_2), p_1 - p_2 + joined(high_1 - p_1, p_2 - low_2)


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences: percentiles of the means of `RESAMPLES` resamples."""
    import numpy as np
    from scipy.stats import bootstrap

    if len(set(differences)) == 1:  # all resamples are equal, and scipy takes no single observation
        return float(differences[0]), float(differences[0])
    rng = np.random.default_rng(seed)
    found = bootstrap((differences,), np.mean, n_resamples=RESAMPLES, batch=500, method="percentile", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
