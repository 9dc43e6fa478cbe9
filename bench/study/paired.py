# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of paired differences: t test, exact sign flips, Holm, intervals, non-inferiority.

Nothing but numpy is needed. Student's t comes from the incomplete beta function (its continued
fraction, after Lentz), because the study must not depend on scipy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Every sign pattern of so many differences is tried; 2 ** 20 sums are 8 MiB.
MOST_EXACT = 20


# -- Student's t -----------------------------------------------------------------------------------


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly, here fast
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1), tiny)
    total = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _not_zero(1 + term * d, tiny)
            c = _not_zero(1 + term / c, tiny)
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            return math.exp(log_front) * total / a
    raise ArithmeticError(f"I_{x}({a}, {b}) did not converge")


def _not_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def t_upper(t: float, freedom: float) -> float:
    """P(T > t) of Student's t with so many degrees of freedom."""
    square = t * t
    if square < freedom:  # 1 - x would lose what a small t has
        half = 0.5 - 0.5 * _incomplete_beta(0.5, freedom / 2, square / (freedom + square))
    else:
        half = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square))
    return half if t >= 0 else 1 - half


def t_quantile(probability: float, freedom: float) -> float:
    """The t that P(T ≤ t) = probability belongs to, by bisection."""
    if not 0 < probability < 1:
        raise ValueError(f"a probability lies between 0 and 1, got {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_upper(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_upper(middle, freedom) > 1 - probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


# -- tests -----------------------------------------------------------------------------------------


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p: the share of all 2ⁿ sign patterns whose mean is as far from 0.

    The smallest that n differences can give is 2 / 2ⁿ.

    Raises:
        ValueError: with no differences, or more than `MOST_EXACT`.
    """
    if not 1 <= len(differences) <= MOST_EXACT:
        raise ValueError(f"1 to {MOST_EXACT} differences, got {len(differences)}")
    values = np.asarray(differences, dtype=np.float64)
    # A pattern and its mirror image are equally far: the first sign stays.
    sums = values[:1]
    for value in values[1:]:
        sums = np.concatenate([sums + value, sums - value])
    # Equal sums may differ in their last bits, as they are added up in another order.
    slack = 1e-12 * float(np.abs(values).sum())
    return float(np.mean(np.abs(sums) >= abs(float(values.sum())) - slack))


@dataclass(frozen=True)
class Comparison:
    """What n paired differences say; all fields are in the units of the differences."""

    n: int
    mean: float
    deviation: float  # of the differences, sample
    error: float  # of the mean
    low: float  # 95 % interval of the mean, from Student's t
    high: float
    t: float | None  # None: no two differences, or all of them 0
    p: float | None  # paired t test, two-sided
    p_sign_flip: float | None
    d_z: float | None  # mean / deviation
    wins: int
    ties: int
    losses: int


def compare(differences: Sequence[float], confidence: float = 0.95) -> Comparison:
    """Everything that is reported of paired differences.

    Raises:
        ValueError: with no difference, or one that is not finite.
    """
    values = [float(x) for x in differences]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"finite differences are needed, got {differences}")
    n, mean = len(values), math.fsum(values) / len(values)
    deviation = error = low = high = math.nan
    t = p = d_z = None
    if n > 1:
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
        error = deviation / math.sqrt(n)
        reach = t_quantile((1 + confidence) / 2, n - 1) * error
        low, high = mean - reach, mean + reach
        if error > 0:
            t, d_z = mean / error, mean / deviation
            p = 2 * t_upper(abs(t), n - 1)
    return Comparison(
        n, mean, deviation, error, low, high, t, p,
        sign_flip_p(values) if n <= MOST_EXACT else None, d_z,
        sum(x > 0 for x in values), sum(x == 0 for x in values), sum(x < 0 for x in values),
    )  # fmt: skip


def differences(
    ours: Mapping[int, float], theirs: Mapping[int, float], seeds: Sequence[int] | None = None
) -> list[float]:
    """Ours minus theirs, seed by seed.

    Args:
        ours: value by seed.
        theirs: value by seed.
        seeds: those that count; by default all, and both must then have the same.

    Raises:
        ValueError: a seed is missing on one side. A pair is never left out silently.
    """
    wanted = sorted(ours.keys() | theirs.keys()) if seeds is None else seeds
    missing = [seed for seed in wanted if seed not in ours or seed not in theirs]
    if missing:
        raise ValueError(f"seeds {missing} are missing on one side")
    return [ours[seed] - theirs[seed] for seed in wanted]


def holm(p: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjusted p values of a family of tests; None stays None and counts as a test."""
    ordered = sorted(p, key=lambda name: math.inf if p[name] is None else p[name])
    adjusted: dict[str, float | None] = {}
    largest = 0.0
    for rank, name in enumerate(ordered):
        value = p[name]
        if value is not None:
            largest = max(largest, min(1.0, (len(ordered) - rank) * value))
            value = largest
        adjusted[name] = value
    return {name: adjusted[name] for name in p}


@dataclass(frozen=True)
class NonInferiority:
    """Whether something is not worse by more than a margin."""

    low: float  # of the two-sided 95 % interval
    p: float | None  # one-sided t test of mean = -margin
    holds: bool


def non_inferior(differences: Sequence[float], margin: float) -> NonInferiority:
    """Non-inferiority at a margin: the 95 % interval lies above −margin altogether.

    The two-sided interval is used, so the one-sided level is 2.5 %.

    Raises:
        ValueError: the margin is not positive, or there are fewer than two differences.
    """
    if margin <= 0:
        raise ValueError(f"a margin is positive, got {margin}")
    if len(differences) < 2:
        raise ValueError("at least two differences are needed")
    found = compare(differences)
    p = None
    if found.error > 0:
        p = t_upper((found.mean + margin) / found.error, found.n - 1)
    return NonInferiority(found.low, p, found.low > -margin)


def verdict(found: Comparison, p: float | None = None, level: float = 0.05) -> str:
    """“reproduced”, “not reproduced” or “undecided” for a claim that the mean is above 0.

    Args:
        found: the differences, first minus second of the claim.
        p: in place of the paired t test's, for example Holm's.
        level: below it the sign of the mean counts.
    """
    p = found.p if p is None else p
    if p is None or p >= level:
        return "undecided"
    return "reproduced" if found.mean > 0 else "not reproduced"
