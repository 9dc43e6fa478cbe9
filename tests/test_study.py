# SPDX-License-Identifier: BSD-3-Clause
"""The study's statistics, beds, runner and pictures, at sizes that say nothing about methods."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
if not (BENCH / "study").exists():
    pytest.skip("the study is not in the wheel", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from study import paired  # noqa: E402

# -- statistics ------------------------------------------------------------------------------------


def test_student_t_has_the_values_of_the_tables():
    for freedom, quantiles in {
        1: {0.975: 12.706205, 0.95: 6.313752, 0.6: 0.324920},
        4: {0.975: 2.776445, 0.995: 4.604095},
        15: {0.975: 2.131450, 0.9: 1.340606},
        19: {0.975: 2.093024},
        120: {0.975: 1.979930},
    }.items():
        for probability, quantile in quantiles.items():
            assert paired.t_quantile(probability, freedom) == pytest.approx(quantile, abs=2e-6)
            assert paired.t_upper(quantile, freedom) == pytest.approx(1 - probability, abs=1e-6)
            assert paired.t_quantile(1 - probability, freedom) == pytest.approx(-quantile, abs=2e-6)
    # Closed forms: a Cauchy distribution, and the sum for four degrees of freedom.
    for t in (-30.0, -1.7, 0.0, 1e-3, 0.4, 2.2, 1e4):
        assert paired.t_upper(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-14)
        angle = math.atan(t / 2)
        two_sided = 1 - math.sin(abs(angle)) * (1 + math.cos(angle) ** 2 / 2)
        assert 2 * paired.t_upper(abs(t), 4) == pytest.approx(two_sided, abs=1e-14)
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired.t_quantile(1.0, 3)


def test_sign_flips_are_all_tried():
    for values in (
        [1.0], [0.3, -0.2], [0.1, 0.2, 0.3, -0.6], [-5.1, 11.8, 8.0, 1.1, 10.7, 0.0, 2.5]
    ):  # fmt: skip
        patterns = list(itertools.product((1, -1), repeat=len(values)))
        sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in patterns]
        as_far = sum(x >= abs(sum(values)) - 1e-12 for x in sums)
        assert paired.sign_flip_p(values) == as_far / len(patterns)
    assert paired.sign_flip_p([0.1] * 16) == 2**-15
    # 0.1 + 0.2 - 0.3 is not 0 in floats, and still the pattern is as far as any other.
    assert paired.sign_flip_p([0.1, 0.2, -0.3]) == 1
    for count in (0, 21):
        with pytest.raises(ValueError, match="1 to 20"):
            paired.sign_flip_p([1.0] * count)


# Of the committed study: metric, ours, theirs, t, p, sign-flip p and the 95 % interval, worked out
# by other code when its results were published.
COMMITTED = (
    ("faa", "guidance_replay", "replay", 1.66, 0.173, 0.188, -3.6, 14.2),
    ("faa", "guidance_replay", "l2sp", 1.64, 0.176, 0.188, -3.3, 13.0),
    ("faa", "l2sp", "replay", 0.49, 0.649, 0.688, -2.2, 3.2),
    ("faa", "guidance", "sequential", 7.08, 0.002, 0.063, 22.0, 50.3),
    ("aia", "guidance_replay", "replay", 3.08, 0.037, 0.125, 0.7, 13.1),
    ("forgetting", "guidance_replay", "replay", -8.21, 0.001, 0.063, -12.4, -6.1),
    ("forgetting", "l2sp", "replay", -9.41, 0.001, 0.063, -15.6, -8.5),
)


@pytest.mark.parametrize("row", COMMITTED, ids=lambda row: f"{row[0]}: {row[1]} - {row[2]}")
def test_the_committed_study_again(row):
    metric, ours, theirs, t, p, flipped, low, high = row
    stored = BENCH / "results" / "continual-tiny-2026-11-21.json"
    found: dict[str, dict[int, float]] = {}
    for run in json.loads(stored.read_text(encoding="utf-8"))["results"]:
        found.setdefault(run["method"], {})[run["seed"]] = run[metric]
    result = paired.compare(paired.differences(found[ours], found[theirs]))
    assert (result.n, result.wins + result.ties + result.losses) == (5, 5)
    assert result.t == pytest.approx(t, abs=0.0051)
    assert result.p == pytest.approx(p, abs=0.00051)
    assert result.p_sign_flip == pytest.approx(flipped, abs=0.00051)
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.0501)
    assert result.d_z == pytest.approx(t / math.sqrt(5), abs=0.0051)


def test_few_or_equal_differences():
    one = paired.compare([2.0])
    assert (one.n, one.mean, one.t, one.p, one.p_sign_flip, one.wins) == (1, 2.0, None, None, 1, 1)
    assert one.as_dict()["low"] is None  # NaN is no JSON
    same = paired.compare([0.0, 0.0, 0.0])
    assert (same.p, same.p_sign_flip, same.ties, same.low, same.high) == (None, 1, 3, 0, 0)
    with pytest.raises(ValueError, match="finite"):
        paired.compare([1.0, math.nan])
    with pytest.raises(ValueError, match=r"\[2\] are missing"):
        paired.differences({1: 1.0, 2: 2.0}, {1: 0.5})
    assert paired.differences({1: 1.0, 2: 2.0}, {1: 0.5}, seeds=[1]) == [0.5]


def test_holm():
    # Holm 1979: step down, and never below the one before.
    adjusted = paired.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert paired.holm({"a": 0.4, "b": 0.6, "c": None}) == {"a": 1.0, "b": 1.0, "c": None}
    assert paired.holm({}) == {}


def test_non_inferiority():
    values = [0.2, -0.6, 0.1, -0.3, 0.5, -0.4]
    found = paired.non_inferior(values, 1.0)
    assert found.holds and found.low == paired.compare(values).low > -1
    # At its margin the test sits on its level: 2.5 % one-sided.
    edge = paired.non_inferior(values, -found.low)
    assert not edge.holds and edge.p == pytest.approx(0.025, abs=1e-9)
    assert paired.non_inferior(values, -found.low + 1e-9).holds
    assert not paired.non_inferior([-3.0, -1.0, 2.0], 1.0).holds
    with pytest.raises(ValueError, match="positive"):
        paired.non_inferior(values, 0.0)
    with pytest.raises(ValueError, match="two differences"):
        paired.non_inferior([1.0], 1.0)


def test_verdicts():
    up, down, none = [3.0, 2.0, 4.0, 3.5], [-3.0, -2.0, -4.0, -3.5], [1.0, -1.0, 2.0, -1.5]
    assert paired.verdict(paired.compare(up)) == "reproduced"
    assert paired.verdict(paired.compare(down)) == "not reproduced"
    assert paired.verdict(paired.compare(none)) == "undecided"
    assert paired.verdict(paired.compare(up), p=0.2) == "undecided"  # Holm's, for example
