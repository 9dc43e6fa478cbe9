# SPDX-License-Identifier: BSD-3-Clause
"""dgg in Mammoth: two tasks of seq-mnist over digits made here, and the second from a checkpoint.

Mammoth is on no index: ``DGG_MAMMOTH`` is the path of a clone.
"""

from __future__ import annotations

import json
import os
import pathlib
import struct
import sys
import types

import pytest
import torch

import dgg
from cpu_torchvision import import_torchvision
from recipes import need, run_recipe

need("kornia", "mammoth")
STEPS = 10  # 40 digits of a task, 8 at a time, twice
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def mammoth():
    """Mammoth's functions, from the clone."""
    clone = os.environ.get("DGG_MAMMOTH")
    if clone is None:
        pytest.skip(
            "Mammoth is on no index: git clone https://github.com/aimagelab/mammoth, and set "
            "DGG_MAMMOTH to the clone's path"
        )
    declared = import_torchvision()
    # Its packages are named datasets, models and utils. Five of its data sets fetch weights of
    # CLIP for their transforms when they are imported.
    clip = types.ModuleType("open_clip")
    clip.create_model_and_transforms = lambda *args, **more: (None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(clone)
        patch.setitem(sys.modules, "open_clip", clip)
        patch.chdir(clone)
        from models import register_model
        from utils.notebooks import load_runner
        from utils.training import train

        yield types.SimpleNamespace(
            register_model=register_model, load_runner=load_runner, train=train, kept=declared
        )


def write(path, array):
    """Writes an array as MNIST's files are."""
    head = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    path.write_bytes(head + array.to(torch.uint8).numpy().tobytes())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of data, with digits of noise around ten pictures where MNIST is looked for."""
    folder, rng = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 180, (10, 28, 28), generator=rng)
    for part, count in (("train", 200), ("t10k", 40)):
        y = torch.arange(count) % 10
        x = pictures[y] + torch.randint(0, 70, (count, 28, 28), generator=rng)
        for name in ("MNIST", "MyMNIST"):
            raw = folder / "MNIST" / name / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            write(raw / f"{part}-images-idx3-ubyte", x)
            write(raw / f"{part}-labels-idx1-ubyte", y)
    return folder


def model_and_data(mammoth, digits, name, **more):
    settings = {
        "lr": 1e-3, "n_epochs": 2, "batch_size": 8, "base_path": f"{digits}/", "num_workers": 0,
        "seed": 0, "stop_after": 2, "non_verbose": 1,
        "checkpoint_path": f"{digits}/checkpoints", **more,
    }  # fmt: skip
    made = mammoth.load_runner(name, "seq-mnist", settings)
    torch.set_num_threads(1)
    return made


def weights(model):
    return {name: p.detach().clone() for name, p in model.net.named_parameters()}


@pytest.fixture(scope="module")
def watched(mammoth):
    """The recipe's model, with what happened in every task, and draws of the data by the task."""
    guided = run_recipe("Mammoth", {"dgg": dgg})["Guided"]

    @mammoth.register_model("watched")
    class Watched(guided):
        def begin_task(self, dataset):
            super().begin_task(dataset)
            self.seen = getattr(self, "seen", [])
            self.seen.append({"began": weights(self), "steps": [], "opt": None})

        def begin_epoch(self, epoch, dataset):
            torch.manual_seed(10 * self.current_task + epoch)
            super().begin_epoch(epoch, dataset)
            task, opt = self.seen[-1], self.opt
            if task["opt"] is not opt:
                assert task["opt"] is None, "two optimizers in one task"
                task["opt"] = opt
                opt.param_groups[0].update(alpha=1.0, max_grad_norm=0.1)
                opt.register_step_post_hook(
                    lambda opt, *_: task["steps"].append(opt.guidance_stats())
                )

        def end_task(self, dataset):
            super().end_task(dataset)
            self.seen[-1]["ended"] = weights(self)

    return Watched


@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_two_tasks_and_one_again(schedule, mammoth, digits, watched):
    """Clipped, anchored where the second begins; from the first's checkpoint it is bit for bit."""
    more = {"savecheck": "task", "ckpt_name": f"run-{schedule}", "lr_scheduler": schedule}
    model, data = model_and_data(mammoth, digits, "watched", **more)
    mammoth.train(model, data)
    first, second = model.seen
    assert type(first["opt"]) is dgg.AdamW is type(second["opt"])
    assert first["opt"] is not second["opt"]  # Mammoth makes one for every task
    assert len(first["steps"]) == len(second["steps"]) == STEPS
    assert not any(step["injected"] for step in first["steps"])
    assert all(step["injected"] for step in second["steps"])
    assert min(float(step["clip"]) for step in second["steps"]) < 1
    group = second["opt"].param_groups[0]
    assert (group["task_index"], group["seed"], group["draw_index"]) == (1, 1, STEPS)
    for name, p in model.net.named_parameters():
        assert torch.equal(second["opt"].state[p]["anchor"], first["ended"][name]), name
        assert not torch.equal(p, first["ended"][name]), name

    (saved,) = pathlib.Path(digits, "checkpoints").glob(f"run-{schedule}*_0.pt")
    more |= {"start_from": 1, "loadcheck": str(saved), "savecheck": None}
    again, data = model_and_data(mammoth, digits, "watched", **more)
    mammoth.train(again, data)
    assert len(again.seen[-1]["steps"]) == STEPS and again.seen[-1]["opt"] is not None
    assert again.seen[-1]["opt"].param_groups[0]["task_index"] == 1
    for name, value in again.seen[-1]["ended"].items():
        assert torch.equal(value, second["ended"][name]), name


def test_the_recipe_by_its_name(mammoth, digits, watched):
    model, data = model_and_data(mammoth, digits, "guided")
    mammoth.train(model, data)
    group = model.opt.param_groups[0]
    assert type(model.opt) is dgg.AdamW and group["task_index"] == 1
    assert group["lr"] == json.loads(os.environ["MAMMOTH_ARGS"])["lr"]
