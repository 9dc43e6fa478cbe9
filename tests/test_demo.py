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
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

BENCH = Path(__file__).parents[1] / "bench"
SCRIPT = BENCH / "continual.py"
METHODS = ("joint", "guidance_replay", "l2sp", "replay", "guidance", "sequential")
CHANGES_FROM_RUN_TO_RUN = {"seconds", "run"}

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the demo is not in the wheel")


def _command(out, *arguments):
    return [
        sys.executable, str(SCRIPT), "--preset", "smoke", "--quiet", "--out", str(out), *arguments
    ]  # fmt: skip


def _run(out, *arguments):
    done = subprocess.run(
        _command(out, *arguments), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _results(out):
    data = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return data["config"], {result["method"]: result for result in data["results"]}


def _numbers(result):
    return {key: value for key, value in result.items() if key not in CHANGES_FROM_RUN_TO_RUN}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    return out, _run(out)


def test_results(smoke):
    out, text = smoke
    config, results = _results(out)
    assert set(results) == set(METHODS)
    assert config["preset"] == "smoke"
    assert config["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "cpu", "settings"} <= set(config)
    for name, result in results.items():
        assert len(result["tasks"]) >= 6
        matrix = result["matrix"]
        count = len(result["tasks"])
        assert len(matrix) == count
        assert all(0 <= value <= 100 for row in matrix for value in row if value is not None)
        for i, row in enumerate(matrix):
            full = name != "joint" or i == count - 1
            trained = [value is not None for value in row]
            assert trained == ([k <= i for k in range(count)] if full else [False] * count)
        assert result["faa"] == pytest.approx(sum(matrix[-1]) / count)
        assert result["label"] in text
    assert results["joint"]["bwt"] is None
    assert (out / "continual.png").stat().st_size > 10_000
    assert len(list((out / "matrices").glob("*.csv"))) == len(METHODS)
    assert "FAA" in (out / "table.md").read_text(encoding="utf-8")


def test_every_method_does_what_its_name_says(smoke):
    """A regulariser or guidance that silently does nothing would give a plausible table."""
    _, results = _results(smoke[0])

    def total(name, key):
        return sum(stage[key] for stage in results[name]["trace"])

    for name in ("guidance", "guidance_replay"):
        assert results[name]["alpha"] > 0
        assert total(name, "injected") > 0
        assert total(name, "distance") > 0
        assert results[name]["trace"][0]["injected"] == 0  # nothing to keep at the first task
    for name in ("sequential", "replay", "l2sp", "joint"):
        assert total(name, "injected") == 0
    assert all(stage["penalty"] > 0 for stage in results["l2sp"]["trace"][1:])
    numbers = {name: json.dumps(result["matrix"]) for name, result in results.items()}
    assert len(set(numbers.values())) == len(METHODS)


def _kill_after_first_checkpoints(out, names):
    """Start a run and kill it, workers and all, once every method has finished a sub-task."""
    process = subprocess.Popen(
        _command(out, "--methods", *names, "--workers", str(len(names))),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = [out / "checkpoints" / f"{name}-0.pt" for name in names]
    deadline = time.monotonic() + 200
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if all(path.exists() for path in checkpoints):
                break
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return checkpoints


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_killed_and_resumed(smoke, tmp_path):
    names = ("guidance_replay", "l2sp")
    checkpoints = _kill_after_first_checkpoints(tmp_path, names)
    assert not (tmp_path / "results.json").exists()
    # One of the two may be through already, its checkpoint gone; at least one was in the middle.
    stages = [torch.load(p, weights_only=True)["stage"] for p in checkpoints if p.exists()]
    assert any(1 <= stage < 6 for stage in stages)
    _run(tmp_path, "--methods", *names, "--resume")
    _, resumed = _results(tmp_path)
    _, whole = _results(smoke[0])
    for name in names:
        assert _numbers(resumed[name]) == _numbers(whole[name])


def test_resume_refuses_another_experiment(tmp_path, smoke):
    out = smoke[0]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--preset", "tiny", "--out", str(out), "--resume",
         "--methods", "replay", "--seeds", "0"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "another experiment" in done.stderr
    done = subprocess.run(
        _command(tmp_path, "--methods", "nonsense"),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "no method nonsense" in done.stderr


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
    assert model.accuracy(answer, prompts, features, answers, chunk=5) == pytest.approx(100 * right)


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
