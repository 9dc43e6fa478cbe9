# SPDX-License-Identifier: BSD-3-Clause
"""The study's statistics, beds, runner and pictures, at sizes that say nothing about methods."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dgg

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
if not (BENCH / "study").exists():
    pytest.skip("the study is not in the wheel", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from study import digits, paired, rules  # noqa: E402

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


# -- digits ----------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    images, labels = digits.load()
    assert images.shape == (1797, 64) and (images.min(), images.max()) == (0, 1)
    # What scikit-learn's description and tests say of them.
    assert [int((labels == k).sum()) for k in range(10)] == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    ]  # fmt: skip
    assert (16 * images).sum() == 561718
    assert digits.DATA_PATH.stat().st_size < 100_000


def test_rotations_turn():
    images, _ = digits.load()
    square = images[:20].reshape(-1, 8, 8)
    quarter = digits.rotated(images[:20], 90).reshape(-1, 8, 8)
    ways = [quarter - square[:, ::-1].swapaxes(1, 2), quarter - square.swapaxes(1, 2)[:, ::-1]]
    assert min(abs(way).max() for way in ways) < 1e-12
    assert abs(digits.rotated(images[:20], 36) - images[:20]).max() > 0.5


@pytest.mark.parametrize("bed", digits.BEDS)
def test_digit_streams(bed):
    setting = digits.Setting(bed, 6, 5)
    two = digits.stream(setting, (3, 4), torch.float64)
    one = digits.stream(setting, (4,), torch.float64)
    assert torch.equal(two.weights[1:], one.weights) and not torch.equal(*two.weights)
    images, labels = digits.load()
    of_task = []
    for t, (both, alone) in enumerate(zip(two.tasks, one.tasks, strict=True)):
        # A seed sees the same, whatever other seeds are trained beside it.
        assert torch.equal(both.images[1:], alone.images)
        assert torch.equal(both.labels[1:], alone.labels)
        assert both.images.shape == (2, 6, 32, 64)
        assert both.replayed == (8 if t else 0)
        new = alone.labels[0, :, : 32 - both.replayed]
        if bed == "classes":
            assert len(new.unique()) == 2
        of_task.append(
            {image.numpy().tobytes() for image in alone.images[0, :, : len(new[0])].flatten(0, 1)}
        )
        asked = alone_test = one.test_images[t][0][one.test_labels[t][0] >= 0]
        seen = {image.numpy().tobytes() for image in asked}
        assert not of_task[-1] & seen, "an item is trained and tested"
        assert len(alone_test) >= (60 if bed == "classes" else 497)
        old = {image.numpy().tobytes() for image in alone.images[0, :, len(new[0]) :].flatten(0, 1)}
        assert len(old) <= 5 * t and (not t or len(old) > t)
    if bed == "classes":
        tasks = [set(labels.flatten().tolist()) - {-1} for labels in one.test_labels]
        assert sorted(k for task in tasks for k in task) == list(range(10))
    longer = digits.stream(digits.Setting(bed, 6, 100), (4,), torch.float64)
    assert torch.equal(longer.test_images[2], one.test_images[2])
    validation = digits.stream(digits.Setting(bed, 6, 5, "validation"), (4,), torch.float64)
    assert torch.equal(validation.tasks[1].images, one.tasks[1].images)
    assert validation.test_images[0].shape != one.test_images[0].shape


def _network(flat):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    model.double()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    return model


def test_gradients_by_hand_are_those_of_autograd():
    stream = digits.stream(digits.Setting("permuted", 2, 5), (0, 1, 2), torch.float64)
    batch = stream.tasks[1]
    at = digits.Pass(stream.weights, batch.images[:, 0], batch.labels[:, 0])
    fisher = digits.exact_fisher(stream.weights, stream.fisher_images[0][:, :7])
    for k in range(3):
        model = _network(stream.weights[k])
        for begin, end in ((0, 32), (24, 32)):
            logits = model(batch.images[k, 0, begin:end])
            loss = F.cross_entropy(logits, batch.labels[k, 0, begin:end])
            expected = torch.autograd.grad(loss, list(model.parameters()))
            expected = torch.cat([g.flatten() for g in expected])
            torch.testing.assert_close(at.gradient(begin, end)[k], expected)
        total = torch.zeros_like(fisher[k])
        for image in stream.fisher_images[0][k, :7]:
            logs = model(image[None]).log_softmax(-1)[0]
            for log in logs:
                by = torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
                total += log.exp().detach() * torch.cat([g.flatten() for g in by]) ** 2
        torch.testing.assert_close(fisher[k], total / 7)


def _train_alone(stream, **options):
    """The same with autograd, `replay()` and `dgg.AdamW`, for the one seed of a stream."""
    model = _network(stream.weights[0])
    opt = dgg.AdamW(model.parameters(), weight_decay=0.0, seed=stream.seeds[0], **options)
    matrix = []
    for batches in stream.tasks:
        for state in opt.state.values():
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[name].zero_()
        for step in range(stream.setting.steps):
            rate = min(1, (step + 1) / 10) * (1 - step / stream.setting.steps)
            opt.param_groups[0]["lr"] = stream.lr * rate
            opt.zero_grad()
            logits = model(batches.images[0, step])
            losses = F.cross_entropy(logits, batches.labels[0, step], reduction="none") / 32
            new = 32 - batches.replayed
            if options.get("alpha") == "auto" and batches.replayed:
                losses[:new].sum().backward(retain_graph=True)
                with opt.replay():
                    losses[new:].sum().backward()
            else:
                losses.sum().backward()
            opt.step()
        matrix.append([])
        with torch.no_grad():
            for images, labels in zip(stream.test_images, stream.test_labels, strict=True):
                right = model(images[0]).argmax(-1) == labels[0]
                matrix[-1].append(100 * right.sum().item() / (labels[0] >= 0).sum().item())
        opt.set_anchor()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), matrix


def _has(**options):
    """Whether dgg.AdamW knows these options, which came later than the rest."""
    try:
        dgg.AdamW([torch.nn.Parameter(torch.ones(1))], **options)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(
    "rule, options",
    [
        (rules.Rule("replay"), {"alpha": 0.0}),
        (rules.Rule("dgg", alpha=0.3), {"alpha": 0.3}),
        (rules.Rule("dgg", alpha=1.0, strength=0.1), {"alpha": 1.0, "strength": 0.1}),
        (rules.Rule("dgg", alpha=0.3, scaling=False, strength=0.2),
         {"alpha": 0.3, "scaling": False, "strength": 0.2}),
        (rules.Rule("dgg", alpha=0.3, importance=0.5), {"alpha": 0.3, "importance": 0.5}),
        (rules.Rule("dgg", alpha=0.3, route="first_moment"),
         {"alpha": 0.3, "route": "first_moment"}),
        (rules.Rule("dgg", alpha=0.3, route="decoupled"), {"alpha": 0.3, "route": "decoupled"}),
        (rules.Rule("guard"), {"alpha": "auto"}),
        (rules.Rule("guard", importance=0.5), {"alpha": "auto", "importance": 0.5}),
        (rules.Rule("guard", importance=1.0), {"alpha": "auto", "importance": 1.0}),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)  # fmt: skip
def test_one_seed_goes_the_way_of_the_optimizer(rule, options):
    if not _has(**options):
        pytest.skip(f"dgg.AdamW does not know {options} yet")
    setting = digits.Setting("classes", 12, 5)
    together = rules.train(rule, digits.stream(setting, (1, 2), torch.float64))
    alone, matrix = _train_alone(digits.stream(setting, (2,), torch.float64), **options)
    torch.testing.assert_close(together["weights"][1], alone, rtol=1e-9, atol=1e-10)
    for i, row in enumerate(together["matrices"][1]):
        # The batched program reports accuracies of float32 division.
        assert row[: i + 1] == pytest.approx(matrix[i][: i + 1], abs=1e-5)
    start = digits.stream(setting, (2,), torch.float64).weights[0]
    assert (alone - start).abs().max() > 0.02
    if rule.kind != "replay":
        assert together["pull"][1] > 0.005


def test_guard_and_agem_meet_their_condition():
    generator = torch.Generator().manual_seed(0)
    h, r, flat, anchor = (torch.randn(50, 9, generator=generator).double() for _ in range(4))
    raw = torch.rand(50, 9, generator=generator).double()
    memory = rules.Memory(anchor, raw, raw)
    dot = lambda a, b: (a * b).sum(1)  # noqa: E731
    for w in (0.0, 0.5, 1.0):
        pull = rules._pull(rules.Rule("guard", importance=w), h, r, flat, memory, (), 0)
        u = ((1 - w) + w * raw / raw.mean(1, keepdim=True)) * (flat - anchor)
        x, y = dot(h, r), dot(u, r)
        length, limit = pull.norm(dim=1), h.norm(dim=1)
        active = (x < 0) & (y > 0)
        assert 5 < active.sum() < 45
        assert (pull[~active] == 0).all() and (length <= limit * (1 + 1e-12)).all()
        capped = active & (length > limit * (1 - 1e-9))
        free = active & ~capped
        assert free.any() and capped.any()
        torch.testing.assert_close(dot(h + pull, r)[free], torch.zeros(int(free.sum())).double())
        torch.testing.assert_close(pull, length[:, None] * u / u.norm(dim=1, keepdim=True))
    kept = rules._not_against(h, r)
    against = dot(h, r) < 0
    assert torch.equal(kept[~against], h[~against])
    torch.testing.assert_close(dot(kept, r)[against], torch.zeros(int(against.sum())).double())
    assert rules._pull(rules.Rule("guard"), h, None, flat, memory, (), 0) is None
