# SPDX-License-Identifier: BSD-3-Clause
"""The demo end to end, and that an interrupted run ends with the numbers of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

BENCH = Path(__file__).parents[1] / "bench"
SCRIPT = BENCH / "demo.py"
ARMS = ("joint", "dgg", "guard50", "ewc", "replay", "sequential")

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the demo is not in the wheel")


def _command(out, *arguments):
    return [sys.executable, str(SCRIPT), "--smoke", "--out", str(out), *arguments]


def _run(out, *arguments):
    done = subprocess.run(
        _command(out, *arguments), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _results(out):
    return json.loads((out / "demo.json").read_text(encoding="utf-8"))["runs"]


def _numbers(run):
    return {key: value for key, value in run.items() if key != "seconds"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    return out, _run(out, "--seeds", "0", "1")


def test_results(smoke):
    out, text = smoke
    runs = _results(out)
    assert set(runs) == set(ARMS)
    for name, by_seed in runs.items():
        assert set(by_seed) == {"0", "1"}
        for run in by_seed.values():
            matrix, count = run["matrix"], len(run["tasks"])
            assert count == len(matrix) == 6
            assert all(0 <= value <= 100 for row in matrix for value in row if value is not None)
            for i, row in enumerate(matrix):
                full = name != "joint" or i == count - 1
                trained = [value is not None for value in row]
                assert trained == ([k <= i for k in range(count)] if full else [False] * count)
            assert run["faa"] == pytest.approx(sum(matrix[-1]) / count)
    assert len({json.dumps(by_seed) for by_seed in runs.values()}) == len(ARMS)
    # What is compared, how long, where it goes; what the letters mean, and how little it proves.
    banner, _, rest = text.partition("[   1/12]")
    assert "Compared: " in banner and "Seeds: 0, 1. 12 runs of 24 steps" in banner
    assert f"Results go to {out}. Ctrl-C stops" in banner and " s\n" in banner.replace(".", "")
    for words in ("FAA: final average accuracy", "some four points from one processor to another",
                  "guard, w = ½ − replay only", "replay only", "EWC"):  # fmt: skip
        assert words in rest, words
    assert rest.split("|---")[0].count("|") > 5
    for name in ("matrices-in-domain", "stability-plasticity-in-domain"):
        assert (out / f"{name}.png").stat().st_size > 5_000
        assert str(out / f"{name}.png") in rest
    assert (out / "report.md").read_text(encoding="utf-8").strip() in text


def test_every_arm_does_what_its_name_says(smoke):
    """Guidance that silently does nothing would give a plausible table."""
    runs = _results(smoke[0])
    for name in ("dgg", "guard50"):
        means = runs[name]["0"]["means"]
        assert not means[0].get("pull")  # nothing to keep at the first task
        # In so few steps no replayed example asks the guard for a pull; test_study.py sees that.
        measured = "pull" if name == "dgg" else "alignment"
        assert any(abs(stage.get(measured, 0)) > 0 for stage in means[1:]), name
    for name in ("sequential", "replay", "joint"):
        assert all("pull" not in stage for stage in runs[name]["0"]["means"])


def test_a_second_time_it_is_there_already(smoke):
    out, text = smoke
    before = {path: path.stat().st_mtime_ns for path in out.rglob("runs/demo/*.json")}
    again = _run(out, "--seeds", "0", "1")
    assert (
        "12 runs are finished already (commit " in again and "about" not in again.split("\n\n")[1]
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert text.split("| arm")[1] == again.split("| arm")[1]


def test_its_arms_are_those_of_the_study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from study import protocol

    stored = json.loads((BENCH / "results" / "study-2026-11-30.json").read_text(encoding="utf-8"))
    for arm in protocol.DEMO_ARMS:
        assert asdict(arm) == stored["in-domain"][arm.name]["0"]["arm"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(smoke, tmp_path, how):
    names = ("guard50", "ewc")
    process = subprocess.Popen(
        _command(tmp_path, "--seeds", "0", "--arms", *names),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    checkpoints = [tmp_path / "checkpoints" / f"demo-{name}-0.pt" for name in names]
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.exists() for path in checkpoints):
            break
        time.sleep(0.005)
    os.killpg(process.pid, how)
    text, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on" in text
        assert "Traceback" not in text + errors
    assert not (tmp_path / "demo.json").exists()
    _run(tmp_path, "--seeds", "0", "--arms", *names)
    resumed, whole = _results(tmp_path), _results(smoke[0])
    for name in names:
        assert _numbers(resumed[name]["0"]) == _numbers(whole[name]["0"])


def test_errors(smoke):
    out, _ = smoke
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), "--arms", "replay", "--seeds", "0"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "another experiment" in done.stderr
    done = subprocess.run(
        _command(out, "--arms", "nonsense"), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "there is no arm nonsense; there are joint" in done.stderr


@pytest.fixture
def minivqa(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from minivqa import model, scenes

    return model, scenes


def test_features_stand_for_images(minivqa):
    """Cached features and the head on the last position give what the whole LLaVA gives."""
    model, scenes = minivqa
    task = scenes.TASKS[0]
    items = scenes.make_items(task, 6, random.Random(0))
    pixels = scenes.render(items, task.camera, torch.Generator().manual_seed(0))
    prompts, _ = scenes.encode(items)
    llava = model.with_lora(model.load_base(), 4, 0)
    names = [name for name, p in llava.named_parameters() if p.requires_grad]
    assert len(names) == 56  # 4 layers x 7 linear layers x (A, B)
    assert all("language_model" in name for name in names)
    with torch.no_grad():
        short = model.answer_logits(llava, prompts, model.image_features(llava, pixels))
        whole = llava(input_ids=prompts, pixel_values=pixels).logits[:, -1]
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-4)


def test_answerer_is_the_model(minivqa):
    """What trains (adapter added to the weights, last position only) is LLaVA with its adapter."""
    model, scenes = minivqa
    task = scenes.TASKS[3]
    items = scenes.make_items(task, 12, random.Random(0))
    pixels = scenes.render(items, task.camera, torch.Generator().manual_seed(0))
    prompts, answers = scenes.encode(items)
    llava = model.with_lora(model.load_base(), 4, 0)
    parameters = [p for p in llava.parameters() if p.requires_grad]
    answer = model.Answerer(llava)
    features = model.image_features(llava, pixels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:  # after the Answerer was made: it has to follow the parameters
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    both = []
    for logits in (
        answer(prompts, features),
        llava(input_ids=prompts, pixel_values=pixels).logits[:, -1],
    ):
        loss = torch.nn.functional.cross_entropy(logits, answers)
        both.append((logits.detach(), torch.autograd.grad(loss, parameters)))
    (fast, fast_gradients), (slow, slow_gradients) = both
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for one, other in zip(fast_gradients, slow_gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    right = (slow.argmax(-1) == answers).float().mean().item()
    rows = (prompts, features, answers)
    assert model.accuracy(answer, rows, chunk=5) == pytest.approx(100 * right)


def test_cameras_shift_names_only(minivqa):
    """Every camera shows colours that pre-training showed, and no two cameras are the same."""
    _, scenes = minivqa
    for task in scenes.TASKS:
        seen = []
        for name in scenes.COLOURS:
            lit = [scenes._RGB[name][k] for k in task.camera.channels]
            seen.append(tuple(1 - x if task.camera.invert else x for x in lit))
        assert sorted(seen) == sorted(scenes._RGB.values())
        turned = task.camera.turns or task.camera.mirror
        assert turned or seen != list(scenes._RGB.values())  # something has to be learnt
    assert len({task.camera for task in scenes.TASKS}) == len(scenes.TASKS)
    words = {w for t in scenes.TASKS for i in _items(scenes, t) for w in (*i.question, i.answer)}
    assert words <= set(scenes.VOCABULARY)


def _items(scenes, task):
    return scenes.make_items(task, 400, random.Random(1))


def test_answers_are_true(minivqa):
    """The answers, worked out again from the scenes."""
    _, scenes = minivqa
    colours, shapes = scenes.COLOURS, scenes.SHAPES
    for task in scenes.TASKS:
        for things, question, answer in _items(scenes, task):
            assert len({thing.cell for thing in things}) == len(things)
            assert len(question) <= scenes.QUESTION_WORDS
            named = [colours.index(w) for w in question if w in colours]
            shape = [shapes.index(w) for w in question if w in shapes]
            count = [sum(t.colour == k for t in things) for k in range(6)]
            if task.name in ("recognition", "location"):
                (found,) = (t for t in things if t.colour == named[0])
                truth = shapes[found.shape]
                if task.name == "location":
                    truth = scenes.PLACES[found.cell]
            elif task.name == "counting":
                truth = scenes.NUMBERS[count[named[0]]]
            elif task.name == "colour":
                (found,) = (t for t in things if t.shape == shape[0])
                truth = colours[found.colour]
            elif task.name == "comparison":
                a, b = count[named[0]], count[named[1]]
                truth = "equal" if a == b else colours[named[0] if a > b else named[1]]
            elif task.name == "judging":
                pair = any((t.shape, t.colour) == (shape[0], named[0]) for t in things)
                truth = "yes" if pair else "no"
            elif task.name == "majority":
                assert sorted(count)[-1] > sorted(count)[-2]
                truth = colours[count.index(max(count))]
            else:
                place = next(w for w in question if w in scenes.PLACES)
                (found,) = (t for t in things if scenes.PLACES[t.cell] == place)
                truth = shapes[found.shape]
            assert answer == truth
