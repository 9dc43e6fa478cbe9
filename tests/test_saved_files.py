# SPDX-License-Identifier: BSD-3-Clause
"""What older versions saved is read, and the training goes on as it would have there."""

from __future__ import annotations

import io
import pathlib
import pickle

import pytest
import torch

import dgg
from saved_files import OPTIMIZERS, batches, make, steps

SAVED = sorted((pathlib.Path(__file__).parent / "saved").iterdir())


def names(suffix):
    return [
        pytest.param(path, name, id=f"{folder.name}-{name}")
        for folder in SAVED
        for name in OPTIMIZERS
        if (path := folder / f"{name.replace(' ', '_')}{suffix}").exists()
    ]


def same_but_for_rounding(params, expected):
    # Torch rounds otherwise on another processor: one unit in the last place or two, after a few
    # steps.
    for p, value in zip(params, expected, strict=True):
        eps = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.detach(), value, rtol=8 * eps, atol=8 * eps)


def test_there_are_such():
    assert len(names(".pt")) >= 2 * len(OPTIMIZERS)


@pytest.mark.parametrize(("path", "name"), names(".pt"))
def test_state_dicts_are_loaded_and_the_training_goes_on(path, name):
    saved = torch.load(path, weights_only=True)
    params, optimizer, guided = make(name)
    for p, value in zip(params, saved["params"], strict=True):
        p.data.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    if guided is not optimizer:
        guided.load_state_dict(saved["guidance"])
    steps(params, optimizer, range(5, 9))
    same_but_for_rounding(params, saved["then"])


@pytest.mark.parametrize(("path", "name"), names(".pickle"))
def test_pickled_optimizers_go_on(path, name):
    optimizer = pickle.loads(path.read_bytes())
    assert type(optimizer) is getattr(dgg, name.split()[0])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = torch.load(path.with_suffix(".pt"), weights_only=True)
    assert all(map(torch.equal, params, saved["params"]))
    steps(params, optimizer, range(5, 9))
    same_but_for_rounding(params, saved["then"])


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_a_replay_memory_is_read(folder):
    buffer = dgg.ReplayBuffer(6, seed=2)
    buffer.load_state_dict(torch.load(folder / "ReplayBuffer.pt", weights_only=True))
    again = dgg.ReplayBuffer(6, seed=2)
    again.add_task([{"x": torch.tensor([float(i)]), "text": str(i)} for i in range(9)])
    assert [e["text"] for e in buffer] == [e["text"] for e in again]


MEMORIES = [path for folder in SAVED if (path := folder / "ReplayBuffer.pickle").exists()]


def test_there_is_a_pickled_memory():
    assert MEMORIES


@pytest.mark.parametrize("path", MEMORIES, ids=lambda path: path.parent.name)
def test_a_pickled_replay_memory_goes_on_in_its_pass(path):
    buffer = pickle.loads(path.read_bytes())
    assert type(buffer) is dgg.ReplayBuffer
    # An older version reads a pickle made now, which names the same classes.
    assert classes(pickle.dumps(buffer)) == classes(path.read_bytes())
    again = dgg.ReplayBuffer(6, seed=2)
    again.add_task([{"x": torch.tensor([float(i)]), "text": str(i)} for i in range(9)])
    numbers = batches(again)
    next(numbers)
    # The pickle has the pass; what makes it go on is a state dict, as after a restart.
    buffer.load_state_dict(buffer.state_dict())
    assert list(batches(buffer)) == list(numbers)


def classes(pickled):
    """Returns the classes of ours that a pickle names."""
    names = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            names.add(f"{module}.{name}")
            return super().find_class(module, name)

    Reader(io.BytesIO(pickled)).load()
    return {name for name in names if name.startswith("dgg")}
