# SPDX-License-Identifier: BSD-3-Clause
"""Distributed checkpoints: whatever is saved comes back to the last bit, or nothing does, loudly.

Models with uneven and empty shards, a frozen parameter and one without any gradient are saved on n
ranks and resumed on m, in every format that torch has: weights, moments, anchor, master weights,
draw and task index are compared with what was there at the save, then with the end of the training
that was not interrupted. And trainings are killed at random moments, often in the middle of a save.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import random
import subprocess
import sys

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import checkpoint_worker as worker

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


class Ranks:
    """Runs functions of checkpoint_worker on ranks that are forked from one process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, function, world, folder, *arguments, kill=None):
        request = {
            "function": function.__name__, "world": world, "folder": str(folder),
            "arguments": list(arguments), "kill": kill,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if not answer["killed"]:
            logs = [path.read_text() for path in sorted(pathlib.Path(folder).glob("rank*.log"))]
            if any(answer["codes"]):
                pytest.fail("\n".join([str(answer), *logs]), pytrace=False)
        return answer

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(30) == 0


@pytest.fixture(scope="module")
def ranks():
    made = Ranks()
    yield made
    made.close()


ALL = [*worker.CASES]
SOME = ["adamw", "adamw, bf16"]
OTHERS = [case for case in ALL if case not in SOME]
ONE = ["adamw"]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Returns the directory of checkpoints that some ranks have written."""

    @functools.cache
    def save(world, others=False):
        folder = tmp_path_factory.mktemp(f"saved on {world}")
        cases = (OTHERS, ["nested"]) if others else (SOME, worker.FORMATS)
        ranks.run(worker.save_all, world, folder, *cases)
        (folder / "world").write_text(str(world))
        return folder

    return save


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            *pair,
            marks=[
                pytest.mark.compat(
                    "FSDP2", "resume" if len({*pair}) == 1 else "resume on other ranks"
                ),
                *([] if pair in ((2, 2), (3, 2)) else [pytest.mark.slow]),
            ],
        )
        for pair in itertools.product((1, 2, 3), repeat=2)
    ],
)
def test_saved_and_resumed(before, after, ranks, saved, tmp_path):
    ranks.run(worker.resume_all, after, tmp_path, str(saved(before)), SOME, worker.FORMATS)


def test_every_optimizer_is_resumed(ranks, saved, tmp_path):
    folder = str(saved(2, others=True))
    ranks.run(worker.resume_all, 2, tmp_path, folder, OTHERS, ["nested"])


@pytest.mark.compat("FSDP2", "resume on other ranks")
@pytest.mark.parametrize(
    ("before", "after"),
    [(4, 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 3), (2, 4)))],
)
def test_importance_is_resumed_on_other_ranks(before, after, ranks, tmp_path):
    """Its sums too: there is a boundary after the resume, and the end is the unsharded one."""
    case = ["adamw, importance"]
    saved = tmp_path / "saved"
    ranks.run(worker.save_all, before, saved, case, worker.FORMATS)
    (saved / "world").write_text(str(before))
    ranks.run(worker.resume_all, after, tmp_path, str(saved), case, worker.FORMATS)
    model, optimizer = worker.build(case[0], "one process")
    worker.train(case[0], model, optimizer, 0, worker.LAST)
    _, end = torch.load(saved / f"FSDP2, {case[0]}")
    found = worker.snapshot(model, optimizer)
    worker.without_extras(end, found)
    assert found["groups"][0]["importance_mean"] > 0
    wrong = worker.differences(found, end, 1e-9)
    assert not wrong, wrong


@pytest.mark.slow
def test_every_optimizer_is_resumed_from_every_format(ranks, tmp_path):
    saved = tmp_path / "saved"
    ranks.run(worker.save_all, 2, saved, OTHERS, worker.FORMATS)
    (saved / "world").write_text("2")
    ranks.run(worker.resume_all, 2, tmp_path, str(saved), OTHERS, worker.FORMATS)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(worker.run_refusals, marks=pytest.mark.compat("FSDP2", "resume")),
        pytest.param(worker.run_by_itself, marks=pytest.mark.compat("FSDP2", "resume")),
        worker.run_importance,
        worker.run_frozen,
        worker.run_helper,
        worker.run_async,
        worker.run_torch,
    ],
)
def test_on_two_ranks(function, ranks, tmp_path):
    ranks.run(function, 2, tmp_path)


@pytest.mark.slow
def test_the_helper_changes_nothing_whatever_the_optimizer(ranks, tmp_path):
    ranks.run(worker.run_helper, 2, tmp_path, ALL)


def test_on_a_part_of_the_ranks(ranks, tmp_path):
    ranks.run(worker.run_part_of_the_ranks, 3, tmp_path)
    ranks.run(worker.save_all, 2, tmp_path / "two", ONE, ["nested"])
    _, expected = torch.load(tmp_path / "two" / "FSDP2, adamw")
    assert not worker.differences(torch.load(tmp_path / "end"), expected)


@pytest.mark.slow
@pytest.mark.compat("HSDP", "resume", "resume on other ranks")
@pytest.mark.compat("TP", "resume", "resume on other ranks")
@pytest.mark.compat("TP + FSDP2", "resume", "resume on other ranks")
def test_other_layouts(ranks, tmp_path):
    ranks.run(worker.run_engines, 4, tmp_path)
    for engine in ("HSDP", "TP", "TP + FSDP2"):
        arguments = (str(tmp_path), ONE, ["nested"], "FSDP2", engine)
        ranks.run(worker.resume_all, 2, tmp_path / engine, *arguments)


# -- killed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(ranks, tmp_path_factory):
    """The ends of trainings that nobody killed, and how long they took."""
    found = {}
    for name in ("adamw", "sgd"):
        root = tmp_path_factory.mktemp(f"uninterrupted {name}")
        answer = ranks.run(worker.run_trial, 2, root / "run", str(root), "progress")
        found[name] = torch.load(root / "end"), answer["seconds"]
    return found


def trial(number, ranks, uninterrupted, tmp_path):
    """Kills a training until it has ended all the same; returns how often within a save."""
    chance = random.Random(number)
    name = ("adamw", "sgd")[number % 2]
    root = tmp_path / name
    root.mkdir()
    expected, seconds = uninterrupted[name]
    kills, within, last = 0, 0, 0
    while not (root / "end").exists():
        kill = None
        if kills < 1 + (number % 4 == 0):
            order = chance.sample(range(2), 2)
            if chance.random() < 0.7:
                kill = {"save": chance.randint(1, 6), "fraction": chance.random(), "order": order}
            else:
                kill = {"after": chance.uniform(0.0, seconds), "order": order}
        answer = ranks.run(
            worker.run_trial, 2, tmp_path / f"run {kills}", str(root), "progress", kill=kill
        )
        if answer["killed"]:
            kills += 1
            assert set(answer["codes"]) <= {-9, 0, 1}, answer
            within += any(root.glob("*.partial"))
            # Nothing that was finished is lost: it goes on where the last whole save ended.
            finished = sorted(root.glob("step-?????????"))
            here = int(finished[-1].name[5:]) if finished else 0
            ended = answer["told"].count("e") * worker.EVERY
            assert here >= last + ended * ("r" in answer["told"])
            last = here
        else:
            assert f"r{last}." in answer["told"]
    wrong = worker.differences(torch.load(root / "end"), expected)
    assert not wrong, f"trial {number}: {wrong}"
    group = expected["groups"][0]
    assert (group["draw_index"], group["task_index"]) == (worker.TASKS * worker.PER_TASK, 2)
    return kills, within


@pytest.mark.compat("FSDP2", "resume")
def test_killed_and_resumed(ranks, uninterrupted, tmp_path):
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        trial(number, ranks, uninterrupted, folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_resumed_twenty_times(ranks, uninterrupted, tmp_path):
    kills = within = 0
    for number in range(3, 23):
        folder = tmp_path / str(number)
        folder.mkdir()
        more, inside = trial(number, ranks, uninterrupted, folder)
        kills, within = kills + more, within + inside
    print(f"{kills} kills, {within} in the middle of a save")
    assert kills >= 20 and within >= 5


@pytest.mark.compat("one process", "resume")
def test_killed_and_resumed_alone(ranks, tmp_path):
    whole, root = tmp_path / "whole", tmp_path / "adamw"
    for folder in (whole, root):
        folder.mkdir()
    ranks.run(worker.run_trial, 1, whole / "run", str(whole), "progress")
    chance = random.Random(7)
    for number in range(3):
        kill = {"save": chance.randint(1, 3), "fraction": chance.random(), "order": [0]}
        if number == 2:
            kill = None
        run = root / f"run {number}"
        answer = ranks.run(worker.run_trial, 1, run, str(root), "progress", kill=kill)
        assert answer["killed"] == (number < 2) or (root / "end").exists()
        if not answer["killed"]:
            break
    wrong = worker.differences(torch.load(root / "end"), torch.load(whole / "end"))
    assert not wrong, wrong
