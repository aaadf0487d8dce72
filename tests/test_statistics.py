"""Intervals and tests against their definitions."""

import itertools
import math

import pytest

from lora_ppo.statistics import bootstrap_interval, mcnemar_exact, newcombe_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (1, 1, 0.206549, 1.0)],
)
def test_wilson_interval_by_hand(hits, n, low, high):
    # 8 of 10, z^2 = 3.841459: center (0.8 + 0.192073) / 1.384146, half 1.96 sqrt(0.016 + 0.009604) / 1.384146
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_interval_holds_the_proportions_that_the_score_test_does_not_reject():
    def distance(p: float, hits: int, n: int) -> float:
        return abs(hits / n - p) - 1.959963984540054 * math.sqrt(p * (1 - p) / n)

    def boundary(inside: float, outside: float, hits: int, n: int) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if distance(middle, hits, n) <= 0 else (inside, middle)
        return inside

    for n in (1, 2, 7, 30):
        for hits in range(n + 1):
            expected = (boundary(hits / n, 0.0, hits, n), boundary(hits / n, 1.0, hits, n))
            assert wilson_interval(hits, n) == pytest.approx(expected, abs=1e-9)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    """Counted out; and by hand: of 5 answers 2 right, 2 drawn: 1 - 3/10."""
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert (pass_at_k(4, 0, 3), pass_at_k(4, 4, 1), pass_at_k(4, 2, 3)) == (0.0, 1.0, 1.0)
    for n in range(1, 8):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([i < right for i in range(n)], k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_nothing_counted_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert newcombe_interval(0, 0, 0, 0) == (-1.0, 1.0)
    assert mcnemar_exact(0, 0) == 1.0


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(12, 2, 2 * (1 + 14 + 91) / 2**14), (2, 12, 2 * (1 + 14 + 91) / 2**14), (5, 5, 1.0), (0, 6, 2 / 64), (1, 0, 1.0)],
)
def test_mcnemar_by_hand(only_first, only_second, p):
    assert mcnemar_exact(only_first, only_second) == p


def test_mcnemar_is_the_share_of_coin_sequences_at_least_as_uneven():
    for n in range(1, 11):
        sequences = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        for only_first in range(n + 1):
            uneven = abs(2 * only_first - n)
            expected = sum(abs(2 * heads - n) >= uneven for heads in sequences) / 2**n
            assert mcnemar_exact(only_first, n - only_first) == pytest.approx(expected, rel=1e-12)


def test_newcombe_interval_by_hand():
    # 48 and 38 of 50, Wilson (0.8654, 0.9890) and (0.6259, 0.8571); phi = -24 / sqrt(48 * 2 * 38 * 12) = -0.11471:
    # 0.2 - sqrt(0.0946^2 + 0.0970^2 + 2 * 0.11471 * 0.0946 * 0.0970), 0.2 + sqrt(0.0290^2 + 0.1341^2 + ...)
    assert newcombe_interval(36, 12, 2, 0) == pytest.approx((0.05693, 0.34043), abs=5e-5)
    low, high = newcombe_interval(36, 2, 12, 0)
    assert (-high, -low) == pytest.approx(newcombe_interval(36, 12, 2, 0), abs=1e-12)
    low, high = newcombe_interval(40, 0, 0, 10)  # not one sample differs: still no certainty
    assert low < 0 < high


@pytest.mark.parametrize("cells", [(0.5, 0.3, 0.05, 0.15), (0.6, 0.1, 0.1, 0.2), (0.85, 0.1, 0.03, 0.02)])
def test_newcombe_interval_holds_the_true_difference_as_often_as_it_says(cells):
    """Every outcome of 30 samples, weighted by its exact probability."""
    n, difference, held = 30, cells[1] - cells[2], 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            for c in range(n + 1 - a - b):
                table = (a, b, c, n - a - b - c)
                low, high = newcombe_interval(*table)
                assert low <= (b - c) / n <= high
                ways = math.factorial(n) // math.prod(math.factorial(k) for k in table)
                held += ways * math.prod(p**k for p, k in zip(cells, table, strict=True)) * (low <= difference <= high)
    assert 0.935 <= held <= 0.985


def test_bootstrap_interval_against_every_resample():
    values = (-1.0, 0.0, 0.0, 1.0, 0.25)
    means = sorted(sum(resample) / 5 for resample in itertools.product(values, repeat=5))
    exact = means[round(0.025 * len(means))], means[round(0.975 * len(means))]
    assert bootstrap_interval(values) == pytest.approx(exact, abs=0.051)
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
