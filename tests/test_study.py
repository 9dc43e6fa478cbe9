# SPDX-License-Identifier: BSD-3-Clause
"""The study's statistics, beds, runner and pictures, at sizes that say nothing about methods."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
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

from study import digits, paired, protocol, rules, search  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """As in the study; two threads only wait for each other at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert math.isnan(one.low) and math.isnan(one.high) and math.isnan(one.error)
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


def test_digits_study_tunes_and_compares(monkeypatch):
    from study import digits_study

    wanted = ("replay", "guard50", "agem")
    monkeypatch.setattr(
        protocol, "FIXED_RULES", {name: protocol.FIXED_RULES[name] for name in wanted}
    )
    found = digits_study.run_setting("permuted", 40, 5, (20, 21, 22), (100, 101))
    assert set(found["results"]) == {*wanted, *protocol.DIGIT_FAMILIES}
    assert found["chosen"].keys() == protocol.DIGIT_FAMILIES.keys()
    for name, one in found["chosen"].items():
        assert one["tried"] == protocol.DIGIT_BUDGET, name
    for result in found["results"].values():
        assert [len(result[metric]) for metric in digits_study.METRICS] == [3] * 5
        assert result["mean_matrix"][4][4] > 0 and result["mean_matrix"][0][1] is None
    assert max(found["results"]["guard50"]["pull"]) > 0.001
    # Without a memory the guard has nothing to go by: it would be training without replay.
    none = digits_study.run_setting("permuted", 4, 0, (20,), (100,))
    assert set(none["results"]) == {"replay", *protocol.DIGIT_FAMILIES} - {"guard50_own_rate"}


def test_comparison_methods_on_digits_see_what_the_rules_see():
    import methods
    from study import digits_study

    setting = digits.Setting("classes", 8, 5)
    alone = digits_study.train_alone(methods.METHODS["l2sp"], {"strength": 0.3}, setting, 21)
    together = rules.train(rules.Rule("l2sp", knob=0.3), digits.stream(setting, (20, 21)))
    for i, row in enumerate(together["matrices"][1]):
        assert alone[i] == pytest.approx(row, abs=2.5)  # an item or two: float32, other sums
    assert digits_study.train_alone(methods.METHODS["agem"], {}, setting, 21) != alone


# -- the search ------------------------------------------------------------------------------------


def _searched(family, score, budget):
    scores, order = {}, []
    while points := search.next_points(family, scores, budget):
        order += points
        scores |= {point: score(family.values(point)) for point in points}
    assert len(order) == len(set(order))
    return search.choose(family, scores), order


def test_search_goes_to_the_best_and_uses_its_budget():
    family = search.Family(
        "x", {"lr": (1.0, 2.0, 4.0, 8.0, 16.0), "k": (0.0, 1.0, 2.0, 3.0)}, ((1, 1), (1, 2), (2, 1))
    )
    best = {"lr": 4.0, "k": 2.0}
    score = lambda v: -abs(v["lr"] - best["lr"]) - abs(v["k"] - best["k"])  # noqa: E731
    chosen, order = _searched(family, score, 8)
    assert order[:3] == list(family.start)
    assert (chosen.values, chosen.score, chosen.tried) == (best, 0, 8)
    # The budget is spent to the last point, whether or not the best was found early.
    for budget in range(1, 20):
        found, order = _searched(family, score, budget)
        assert len(order) == found.tried == budget
    assert _searched(family, score, 12)[0].interior
    # At the end of a ladder nothing is known of what lies beyond.
    ends = _searched(family, lambda v: v["lr"], 20)[0]
    assert ends.values["lr"] == 16 and not ends.interior
    assert not _searched(family, score, 3)[0].interior
    assert search.label({"lr": 0.0015, "alpha": 0.1}) == "lr0.0015-alpha0.1"
    with pytest.raises(ValueError, match="no point was tried"):
        search.choose(family, {})
    with pytest.raises(ValueError, match="no point"):
        search.Family("x", {"lr": (1.0,)}, ((0, 0),))


def test_families_have_room_around_their_start():
    import methods

    families = [*protocol.FAMILIES.values(), *protocol.DIGIT_FAMILIES.values()]
    families += [protocol.other_family(methods.METHODS[name].knobs) for name in methods.METHODS]
    for family in families:
        assert len(family.start) == 4, family.name
        for ladder in family.axes.values():
            assert list(ladder) == sorted(set(ladder))
    for family in protocol.FAMILIES.values():
        places = [set(place) for place in zip(*family.start, strict=True)]
        for ladder, used in zip(family.axes.values(), places, strict=True):
            assert 0 < min(used) and max(used) < len(ladder) - 1


# -- the LLaVA beds --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from study import arms, in_domain, shifted, training

    return arms, in_domain, shifted, training


TINY = {"steps": 6, "train_items": 24, "test_items": 10, "remembered": 4, "warmup": 2}


def _numbers(result):
    return {name: value for name, value in result.items() if name != "seconds"}


def test_every_word_and_picture_of_the_shifted_bed(llava):
    _, _, shifted, training = llava
    from minivqa import scenes
    from study import shifted_tasks as tasks

    assert list(shifted.WORD_ID)[: len(scenes.VOCABULARY)] == list(scenes.VOCABULARY)
    assert len(tasks.TASKS) >= 5
    answers = {}
    for name, make in tasks.TASKS.items():
        for test in (False, True):
            found = make(60, random.Random(5), torch.Generator().manual_seed(5), test)
            rows = 60 * (found.together if test else 1)
            assert len(found.questions) == len(found.answers) == len(found.pixels) == rows
            assert found.pixels.shape[1:] == (3, 36, 36) and found.pixels.isfinite().all()
            assert -1.6 < found.pixels.min() < -0.5 and 1 < found.pixels.max() < 2.5, name
            prompts, targets = shifted.encode(found)
            assert prompts.shape == (rows, 19) and len(targets) == rows
            again = make(60, random.Random(5), torch.Generator().manual_seed(5), test)
            assert torch.equal(again.pixels, found.pixels) and again.answers == found.answers
        answers[name] = set(found.answers)
    assert len(answers["emoji names"]) > 10 and len(answers["emoji categories"]) == 5
    assert answers["digits"] == set(tasks.DIGIT_WORDS[:5])
    # All of a caption's three rows show one picture; the words before are in the question.
    captions = tasks.TASKS["captions"](4, random.Random(1), torch.Generator().manual_seed(1), True)
    assert captions.together == 3 and len(captions.answers) == 12
    for k in range(0, 12, 3):
        assert torch.equal(captions.pixels[k], captions.pixels[k + 2])
        assert captions.questions[k + 2][3:] == tuple(captions.answers[k : k + 2])
    sums = tasks.TASKS["sums"](80, random.Random(2), torch.Generator().manual_seed(2), False)
    for pixels, question, answer in zip(sums.pixels, sums.questions, sums.answers, strict=True):
        image = 0.35 * pixels + 0.35
        lit = (image > 0.75) & (image.sum(0) < 1.6)
        # A bar's ticks are dark: a column's height is that of its highest lit pixel, in units of 9.
        heights = [
            max(math.ceil((36 - row) / 9) for row in range(36) if lit[channel, row].sum() >= 4)
            for channel in range(3)
        ]
        named = [heights[tasks.BARS.index(word)] for word in question if word in tasks.BARS]
        assert tasks.DIGIT_WORDS[sum(named)] == answer


def test_the_base_is_lengthened_not_changed(llava):
    _, _, shifted, _ = llava
    from minivqa import model as vqa

    base, longer = vqa.load_base(), shifted.base()
    words = base.lm_head.weight.shape[0]
    assert words < len(shifted.WORD_ID) == longer.lm_head.weight.shape[0]
    weights = longer.state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(weights[name][: len(value)] if value.dim() else weights[name], value)
    assert not any(p.requires_grad for p in longer.parameters())
    new = longer.lm_head.weight[words:]
    assert new.std().item() == pytest.approx(base.lm_head.weight.std().item(), rel=0.05)
    assert torch.equal(shifted.base().lm_head.weight, longer.lm_head.weight)


def test_atlases_are_small_and_licensed():
    from study import shifted_tasks as tasks

    folder = BENCH / "study"
    listing = tasks.listing()
    assert 200 <= sum(map(len, listing["rows"].values())) <= 400
    words = [word for word, _, _ in tasks.names()]
    assert len(words) == len(set(words)) == 20
    for style, path in tasks.ATLASES.items():
        assert path.stat().st_size < 400_000
        tiles = tasks.sprites(style)
        assert tiles.shape[:2] == (8, 28)
        # No cell is empty, and no two are the same.
        assert (tiles[:, :, 3].mean((2, 3)) > 0.1).all()
        assert len({tile.numpy().tobytes() for tile in tiles.flatten(0, 1)}) == 8 * 28
    text = (folder / "DATA.md").read_text(encoding="utf-8")
    for name in ("digits.npz", "emoji_google.png", "emoji_twitter.png", "emoji.json"):
        assert f"`{name}`" in text and (folder / name).exists()
    for licence in ("Apache-2.0", "CC-BY-4.0", "emoji-datasource-MIT"):
        assert f"licenses/{licence}.txt" in text
        assert (folder / "licenses" / f"{licence}.txt").stat().st_size > 1000


# What the study of 2026-11-21 drew for seed 3 at these sizes: prompts, then answers, as int64.
ITEMS = {
    "tasks": ("colour", "location", "recognition", "lookup", "majority", "judging"),
    "digest": "ae7c5f4b4aab16989a674d4563c1c76cac14abc66b67091e6a84ab67346b6d99",
}


def test_in_domain_items_are_those_of_the_study_before(llava):
    """So that this study and the one before it can be compared: what a seed draws stays."""
    _, in_domain, _, training = llava
    found = in_domain.load(training.Sizes(**TINY), 3)
    assert found.tasks == ITEMS["tasks"]
    text = hashlib.sha256()
    for part in (found.train, *(items.rows for items in found.test)):
        prompts, _, answers = part
        text.update(prompts.to(torch.int64).numpy().tobytes())
        text.update(answers.to(torch.int64).numpy().tobytes())
    assert text.hexdigest() == ITEMS["digest"]


def _arm(llava, name):
    arms = llava[0]
    kinds = {
        "replay": ("plain", {}),
        "guard": ("guard", {"importance": 0.5}),
        "dgg": ("dgg", {"alpha": 0.5}),
        "agem": ("agem", {}),
        "spd": ("spd", {"strength": 1.0}),
    }
    return arms.Arm(name, *(kinds[name][0],), lr=2e-2, options=kinds[name][1])


@pytest.mark.parametrize("name", ["guard", "agem"])
def test_resumed_ends_as_undisturbed(llava, name, tmp_path):
    _, in_domain, _, training = llava
    sizes, arm = training.Sizes(**TINY), _arm(llava, name)
    whole = training.run(in_domain.BED, arm, sizes, 0, trace_every=1)
    checkpoint = tmp_path / "x.pt"
    for finished, steps in ((1, 8), (4, 20)):  # sub-tasks; steps before each interruption
        left = itertools.count(steps, -1)
        with pytest.raises(training.Interrupted):
            training.run(
                in_domain.BED, arm, sizes, 0, checkpoint, trace_every=1,
                stop=lambda left=left: next(left) == 0,
            )  # fmt: skip
        assert torch.load(checkpoint, weights_only=True)["stage"] == finished
    resumed = training.run(in_domain.BED, arm, sizes, 0, checkpoint, trace_every=1)
    assert _numbers(resumed) == _numbers(whole)
    assert len(whole["means"]) == 6 and len(whole["trace"]) == 36
    if name == "guard":
        later = whole["means"][1:]
        assert any(stage["pull"] > 0.01 for stage in later)
        assert any(point.get("alignment", 0) < 0 for point in whole["trace"])
    with pytest.raises(ValueError, match="another experiment"):
        training.run(in_domain.BED, arm, sizes, 1, checkpoint)


def test_arms_differ_and_do_what_they_say(llava):
    _, _, shifted, training = llava
    sizes = training.Sizes(**TINY)
    found = {}
    for name in ("replay", "dgg", "spd"):
        found[name] = training.run(shifted.BED, _arm(llava, name), sizes, 0)
    assert len({json.dumps([r["matrix"], r["means"]]) for r in found.values()}) == 3
    assert "pull" not in found["replay"]["means"][3]
    assert found["dgg"]["means"][0]["pull"] == 0 and found["dgg"]["means"][3]["pull"] > 0.05
    one = training.run(
        shifted.BED, replace(_arm(llava, "replay"), joint=True, replay=False), sizes, 0
    )
    assert one["matrix"][5][0] is not None and one["matrix"][0][0] is None


def test_guarded_gradients_are_those_of_the_batch(llava):
    """New and old rows apart, each with its share: together the mean loss over the batch."""
    _, in_domain, _, training = llava
    sizes = training.Sizes(**TINY)
    new, old = [24, 25, 30, 31, 40, 41], [1, 2]
    moved = {}
    for name in ("guard", "replay"):
        run = training._Run(in_domain.BED, _arm(llava, name), sizes, 0)
        before = [p.detach().clone() for p in run.parameters]
        # Without an anchor the guard is replay alone.
        run.optimizer.param_groups[0]["lr"] = 1e-2
        run.step(new, old)
        moved[name] = [p.detach() - b for p, b in zip(run.parameters, before, strict=True)]
        found = [run.optimizer.state[p]["exp_avg"] for p in run.parameters]
        moved[name] = torch.cat([x.flatten() for x in found])
    torch.testing.assert_close(moved["guard"], moved["replay"], rtol=1e-4, atol=1e-7)
    assert moved["replay"].abs().max() > 1e-4


# -- the command -----------------------------------------------------------------------------------


def _command(out, *arguments):
    return [
        sys.executable, str(BENCH / "study" / "run.py"), "--smoke", "--out", str(out),
        "--workers", "1", *arguments,
    ]  # fmt: skip


def _finish(out, *arguments):
    done = subprocess.run(
        _command(out, *arguments), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _files(out):
    """The results of all runs, without what differs from run to run."""
    found = {}
    for path in sorted((out / "runs").rglob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert stored["origin"].keys() == {"commit", "uncommitted_changes", "cpu", "date"}
        stored["result"].pop("seconds", None)
        found[path.relative_to(out).as_posix()] = stored["result"]
    return found


ARMS = ("--part", "tuning", "in-domain", "--arms", "replay", "guard50")


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_interrupted_and_resumed(llava, tmp_path):
    out = tmp_path / "interrupted"
    process = subprocess.Popen(
        _command(out, *ARMS), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell's background commands, and what they start, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if list(out.rglob("tuning/*.json")):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, text + errors
    assert "goes on from there" in text and "Traceback" not in text + errors
    assert "together about" in text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("tuning/*.json")}
    assert 0 < len(before) < 8
    text = _finish(out, *ARMS)
    assert f"tuning: {len(before)} runs are finished already" in text and "s left" in text
    # What is left is what these arms need, and not those of the whole study.
    for last in (rf"{8 - len(before)}/{8 - len(before)}\] tuning", r"6/6\] in-domain"):
        assert re.search(rf"^\[ +{last}.* 0 s left$", text, re.M)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = _files(out)
    assert len(found) == 14  # 2 families, 2 points, 2 beds, 1 seed; then 2 arms, 3 seeds
    # What it left in pieces and took up again is what this process computes at a stretch.
    from study import jobs

    plan = replace(jobs.SMOKE, arms=("replay", "guard50"))
    for job in jobs.test_jobs(plan, jobs.Results(out), "in-domain")[-2:]:
        result = jobs.execute(job, tmp_path / "x.pt", lambda: False)
        (tmp_path / "x.pt").unlink()
        assert {**json.loads(json.dumps(result)), "seconds": 0} == {**found[job.path], "seconds": 0}
    # The report, and its pictures.
    assert "guard, w = ½ − replay only" in (out / "report.md").read_text(encoding="utf-8")
    stored = json.loads((out / "study.json").read_text(encoding="utf-8"))
    assert {"plan", "date", "commit", "versions", "cpu"} <= stored["config"].keys()
    (origin,) = stored["config"]["origins"]
    assert origin["runs"] == 14 and origin["first_date"] < origin["last_date"]
    assert set(stored["in-domain"]) == {"replay", "guard50"}
    for name in ("forest", "matrices-in-domain", "stability-plasticity-in-domain"):
        assert (out / f"{name}.png").stat().st_size > 5000
    # A file of another experiment is refused, and stays.
    path = next(out.rglob("in-domain/*.json"))
    path.write_text(path.read_text(encoding="utf-8").replace('seed\\": 0', 'seed\\": 9'))
    kept = path.read_bytes()
    again = subprocess.run(
        _command(out, *ARMS), capture_output=True, text=True, timeout=100, check=False
    )
    assert again.returncode != 0 and "another experiment" in again.stderr
    assert path.read_bytes() == kept


# -- report and pictures ---------------------------------------------------------------------------


def _result(rng, level, *, trace=False):
    """A run as the loop returns it, with made-up accuracies."""
    from dgg import metrics

    matrix = [
        [round(min(100, level + rng.gauss(0, 3) + 5 * j - 3 * i), 2) if j <= i else None
         for j in range(6)]
        for i in range(6)
    ]  # fmt: skip
    names = ("pull", "alignment", "distance", "loss")
    points = [{"step": k, **{n: rng.random() for n in names}} for k in range(0, 30, 10)]
    return {"matrix": matrix, **metrics.summary(matrix), "trace": points if trace else []}


@pytest.fixture
def made_up():
    """All parts, with a difference that is there and one that is not."""
    from study import digits_study

    rng = random.Random(0)
    gains = {"guard50": 6.0, "dgg": 5.5, "ewc": 6.0, "sequential": -30.0}
    names = (
        "replay", "replay_other_lr", "dgg", "guard0", "guard50", "guard100", "l2sp", "ewc", "other",
        "guidance", "sequential",
    )  # fmt: skip
    found = {"tuning": {}, "digits": {}}
    for bed in ("in-domain", "shifted"):
        found[bed] = {
            name: {
                str(seed): _result(rng, 60 + gains.get(name, 0), trace=seed == 0)
                for seed in range(4 if name in ("guidance", "sequential") else 20)
            }
            for name in names
        }
    rule_names = [*protocol.FIXED_RULES, *protocol.DIGIT_FAMILIES]
    for setting in ("permuted-60-5", "permuted-160-5", "permuted-160-100", "permuted-160-0"):
        results = {}
        for name in rule_names:
            level = {"guard100": -9.0, "guard50": 4.0, "alpha0.1": 3.0}.get(name, 0.0)
            if setting.endswith("-0") and name.startswith(("guard", "agem")):
                continue
            matrices = [_result(rng, 50 + level)["matrix"] for _ in range(20)]
            results[name] = {**digits_study.described(matrices), "pull": [0.1] * 20}
        rates = {name: {"values": {"rate": 2.0}} for name in protocol.OWN_RATES}
        found["digits"][setting] = {"chosen": rates, "results": results}
    found["tuning"]["in-domain"] = {
        "chosen": {
            "other": {"values": {"lr": 0.003}, "score": 61.0, "interior": False, "tried": 8}
        },
        "other": "spd",
    }
    return found


def test_report_says_what_the_numbers_say(made_up):
    from study import summary

    text = "\n\n".join(summary.sections(made_up))
    ours = [made_up["in-domain"]["guard50"][str(s)]["faa"] for s in range(20)]
    theirs = [made_up["in-domain"]["replay"][str(s)]["faa"] for s in range(20)]
    got = paired.compare([a - b for a, b in zip(ours, theirs, strict=True)])
    assert got.p < 1e-4
    (line,) = [
        x for x in text.splitlines() if x.startswith("| guard, w = ½ − replay only, in-domain")
    ]
    assert f"| 20 | +{got.mean:.1f} | +{got.low:.1f} to +{got.high:.1f} |" in line
    assert f"| {got.d_z:.2f} | {got.wins}/{got.ties}/{got.losses} |" in line
    # Holm over the eight secondary tests: the smallest p is multiplied by eight.
    pairs = {p: summary.comparison(made_up, "in-domain", *p) for p in protocol.SECONDARY}
    smallest = min(pairs, key=lambda p: pairs[p].p)
    (line,) = [
        x for x in summary._tests(made_up, "in-domain").splitlines()
        if x.startswith(f"| {summary.pair(*smallest)} |")
    ]  # fmt: skip
    assert line.endswith(f"| {summary.chance(min(1, 8 * pairs[smallest].p))} |")
    assert [summary.chance(p) for p in (None, 0.0004, 0.001, 0.25)] == [
        "–", "< 0.001", "0.001", "0.250"
    ]  # fmt: skip
    fresh = paired.compare([a - b for a, b in zip(ours[5:], theirs[5:], strict=True)])
    assert f"| primary, seeds never run before | 15 | +{fresh.mean:.1f} |" in text
    verdicts = [x.split("|")[-2].strip() for x in summary._orderings(made_up).splitlines()[2:]]
    assert verdicts[:2] == ["reproduced", "reproduced"] and "undecided" in verdicts
    assert "| permuted-160-100, guard, w = 1 |" in text and "| not shown |" in text
    assert summary.goals(made_up) == {
        "guard with w = 1 not significantly below replay": (0, 3),
        "guard with w = ½ within one standard error of the best α": (3, 3),
    }
    assert "| in-domain | spd | lr0.003 | 61.0 | 8 | no |" in text
    (line,) = [x for x in text.splitlines() if "| permuted-60-5 (" in x]
    assert "(2 × 0.01; 2 × 0.01) | 20 |" in line
    assert summary.flat(paired.compare([0.1, -0.2, 0.3, 0.0]), 1.0) == "reproduced"
    assert summary.flat(paired.compare([2.1, 2.2, 2.3, 2.0]), 1.0) == "not reproduced"
    assert summary.flat(paired.compare([4.1, -5.2, 3.3, 2.0]), 1.0) == "undecided"


def test_the_report_goes_into_a_page(made_up, tmp_path):
    from study import summary

    begin, end = summary.PAGE_MARKS
    page = summary.into_page(made_up, f"# A page\n\n{begin}\nold\n{end}\n\nrest\n")
    assert page.startswith(f"# A page\n\n{begin}\n\n### Primary tests\n")
    assert page.endswith(f"{end}\n\nrest\n") and "old" not in page and "\n## " not in page
    assert summary.into_page(made_up, page) == page
    with pytest.raises(SystemExit, match="each once"):
        summary.into_page(made_up, "nothing")


def test_pictures_are_drawn_of_what_there_is(made_up, tmp_path):
    from study import jobs, pictures

    plan = replace(jobs.FULL, digit_beds=("permuted",))
    made = {path.name for path in pictures.draw(plan, made_up, tmp_path)}
    assert made == {
        "forest.png", "alpha.png",
        *(f"{kind}-{bed}.png" for kind in ("matrices", "stability-plasticity", "traces")
          for bed in ("in-domain", "shifted")),
    }  # fmt: skip
    for name in made:
        assert (tmp_path / name).stat().st_size > 5000
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    nothing = {"digits": {}, "tuning": {}, "in-domain": {}, "shifted": {}}
    assert pictures.draw(plan, nothing, tmp_path / "none") == []


def test_traces_become_events(made_up, tmp_path, monkeypatch):
    import types

    from study import pictures

    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            return None

        def add_scalar(self, name, value, step):
            written.append((Path(self.folder).name, name, step))

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    assert pictures.write_events(made_up["shifted"], tmp_path)
    assert ("guard50", "alignment", 20) in written and ("guard50", "pull", 0) in written
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    assert not pictures.write_events(made_up["shifted"], tmp_path)


# -- the protocol ----------------------------------------------------------------------------------


def _protocol():
    page = (ROOT / "docs" / "forgetting.md").read_text(encoding="utf-8")
    begin = "## The protocol, written before its test seeds were run"
    assert page.count(begin) == 1
    return " ".join(page.split(begin)[1].split("\n## ")[0].split()), page


def test_the_protocol_has_the_numbers_of_the_code():
    from study import jobs

    text, page = _protocol()
    plan = jobs.FULL
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", page, re.M))
    for what, seeds in {
        "test, both LLaVA beds": plan.test_seeds,
        "bounds and ĝ alone": plan.bound_seeds,
        "test, digits": plan.digit_seeds,
        "tuning, all beds": plan.tuning_seeds,
    }.items():
        first, last = map(int, rows[what].split(" to "))
        assert seeds == tuple(range(first, last + 1)), what
    assert tuple(map(int, rows["choice of the other method"].split(" and "))) == (
        plan.screening_seeds
    )
    said = re.search(
        r"In-domain seeds (\d) to (\d) were run .* without them \((\d+) to (\d+)\)", text
    )
    first, last, fresh, end = map(int, said.groups())
    assert protocol.SEEN_SEEDS == tuple(range(first, last + 1))
    assert (fresh, end) == (last + 1, plan.test_seeds[-1])
    used = {*plan.test_seeds, *plan.tuning_seeds, *plan.digit_seeds}
    assert not used & set(range(200, 400)) and not set(plan.digit_seeds) & set(range(10))
    assert not {*plan.test_seeds, *plan.digit_seeds} & set(plan.tuning_seeds)
    assert f"gets {plan.budget} points on a LLaVA bed and {protocol.DIGIT_BUDGET} on digits" in text
    for sizes in plan.sizes.values():
        assert (
            f"memory ({sizes.remembered} examples of a sub-task, a quarter of a batch of " in text
        )
        assert (sizes.share, f"batch of {sizes.batch})" in text) == (0.25, True)
        assert f"steps ({sizes.steps})" in text
    assert "Memory of 0, 5 or 100 examples a task; 60, 160 or 300 steps" in text
    assert plan.digit_remembered == (0, 5, 100) and plan.digit_steps == (60, 160, 300)
    assert f"batches of {digits.BATCH}, of which {digits.REPLAYED} are replayed" in text
    assert "0.005 (classes) and 0.01" in text
    assert digits.LEARNING_RATES == {"classes": 0.005, "permuted": 0.01, "rotated": 0.01}
    assert (
        f"digits, {protocol.AMPLE} examples" in text and f"above −{protocol.MARGIN:g} point" in text
    )
    assert f"level {protocol.LEVEL}" in text and protocol.PRIMARY == ("guard50", "replay")
    assert "over the eight of a bed" in text and len(protocol.SECONDARY) == 8
    assert f"mean over {protocol.FISHER['samples']} items" in text
    assert f"hold {100 * protocol.FISHER['coverage']:.0f} %" in text
    assert f"bench/methods at {protocol.OTHER_STEPS} steps" in text
    assert "DGG at five α" in text and len(protocol.ALPHAS) == 5
    rates = protocol.DIGIT_FAMILIES["guard50_own_rate"]
    first, *_, last = rates.axes["rate"]
    starts = [rates.values(point)["rate"] for point in (rates.start[0], rates.start[-1])]
    assert (
        f"from {first:g} to {last:g} times the bed's, starting at {starts[0]:g} to {starts[1]:g}"
        in text
    )
    assert "ten of twelve settings (those of 60 and 160 steps" in text
    assert protocol.ORACLE_STEPS == (60, 160)
    assert {o.claim for o in protocol.ORDERINGS} == set(
        re.search(r"\*Orderings of the paper\* \((.*?)\):", text)[1].split("; ")
    )


def test_the_protocol_has_the_ladders_of_the_code():
    _, page = _protocol()
    number = r"\d[\d.e-]*"
    ladders = {}
    for line in page.splitlines():
        if line.startswith(("| replay, guard", "| DGG |", "| L2-SP |", "| EWC |")):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) != 3 or ":" in cells[1] or "±" in cells[1]:
                continue  # of another table
            name, rates, knob = cells
            ladders[name] = (rates, knob)
    names = {"replay, guard": ("replay", "guard"), "DGG": ("dgg",), "L2-SP": ("l2sp",),
             "EWC": ("ewc",)}  # fmt: skip
    assert ladders.keys() == names.keys()

    def read(cell):
        text = cell.split(":")[-1]
        start = [float(x) for bold in re.findall(r"\*\*(.*?)\*\*", text)
                 for x in re.findall(number, bold)]  # fmt: skip
        return [float(x) for x in re.findall(number, text)], start

    for name, families in names.items():
        rates, knob = ladders[name]
        rates = ladders["DGG"][0] if rates == "as DGG" else rates
        for family in (protocol.FAMILIES[f] for f in families):
            axes = list(family.axes.values())
            starts = [sorted({p[k] for p in family.start}) for k in range(len(axes))]
            for cell, ladder, start in zip((rates, knob), axes, starts, strict=False):
                assert read(cell) == (list(ladder), [ladder[k] for k in start]), (name, cell)
    text, _ = _protocol()
    said = re.search(
        r"α starts at (.*?) to (.*?), L2-SP at (.*?) to (.*?) and EWC at (.*?) to (.*?);", text
    )
    found = []
    for name in ("dgg", "l2sp", "ewc"):
        family = protocol.DIGIT_FAMILIES[name]
        found += [family.values(family.start[k]) for k in (0, -1)]
    assert [float(x) for x in said.groups()] == [v for one in found for v in one.values()]


def test_arms_of_the_protocol():
    values = {
        "replay": {"lr": 1e-3}, "guard": {"lr": 2e-3}, "dgg": {"lr": 3e-3, "alpha": 0.1},
        "l2sp": {"lr": 4e-3, "strength": 0.3}, "ewc": {"lr": 5e-3, "strength": 10.0},
        "other": {"lr": 6e-3, "strength": 1.0},
    }  # fmt: skip
    compared = {arm.name: arm for arm in protocol.test_arms(values, {"other": "spd"})}
    assert tuple(compared) == protocol.COMPARED
    assert compared.keys() == {p for pair in (protocol.PRIMARY, *protocol.SECONDARY) for p in pair}
    assert all(arm.replay and not arm.joint for arm in compared.values())
    assert [compared[g].options for g in ("guard0", "guard50", "guard100")] == [
        {"importance": w} for w in (0.0, 0.5, 1.0)
    ]
    assert {compared[g].lr for g in protocol.GUARDS} == {2e-3}
    assert (compared["replay_other_lr"].lr, compared["replay"].lr) == (3e-3, 1e-3)
    assert compared["ewc"].options == {"strength": 10.0, **protocol.FISHER}
    assert (compared["other"].kind, compared["l2sp"].options) == ("spd", {"strength": 0.3})
    import methods

    with_fisher = protocol.FIXED_OPTIONS.keys()
    assert with_fisher == {"ewc", "online_ewc", "perturb_and_merge"}
    for name, make in methods.METHODS.items():  # subclasses hand on what the class below names
        signatures = [inspect.signature(kind.__init__).parameters for kind in make.__mro__[:-1]]
        assert any("coverage" in each for each in signatures) == (name in with_fisher)
    bounds = {arm.name: arm for arm in protocol.bound_arms(values)}
    assert tuple(bounds) == protocol.BOUNDS
    assert bounds["joint"].joint and not any(arm.replay for arm in bounds.values())
    assert bounds["guidance"].options == {"alpha": 0.1}


def test_an_arm_that_dgg_cannot_train_is_named_before_anything_runs(monkeypatch, tmp_path):
    from study import jobs, run

    plan = replace(jobs.SMOKE, arms=("guard50",))
    monkeypatch.setattr(jobs.arms, "missing", lambda arm: "alpha must be a number")
    with pytest.raises(SystemExit, match="guard: alpha must be a number"):
        run._check(plan, ["tuning"], jobs.Results(tmp_path))
    with pytest.raises(SystemExit, match="run --part tuning first"):
        run._check(plan, ["in-domain"], jobs.Results(tmp_path))
