# SPDX-License-Identifier: BSD-3-Clause
"""dgg in torchtune's recipe for one device: two tasks, clipped, accumulated, resumed in a task."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch

import dgg
from recipes import need, run_recipe

need("torchtune", "torchtune")
from omegaconf import OmegaConf  # noqa: E402
from torchtune import config  # noqa: E402

EPOCHS, STEPS = 2, 6  # 24 rows, 2 at a time, 2 times in a step, twice
MAX_NORM, SAVED = 0.5, "model-00001-of-00001.bin"
pytestmark = [
    pytest.mark.usefixtures("one_thread", "copied_recipe"), pytest.mark.timeout(600)
]  # fmt: skip
MODEL = {
    "_component_": "torchtune.models.llama3.llama3", "vocab_size": 32, "num_layers": 1,
    "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The folder with torchtune's recipe, as `tune cp` puts it there."""
    folder = tmp_path_factory.mktemp("recipes")
    command = "import sys, torchtune._cli.tune as t; sys.argv[0] = 'tune'; t.main()"
    name = "full_finetune_single_device"
    subprocess.run(
        [sys.executable, "-P", "-c", command, "cp", name, str(folder / f"{name}.py")], check=True
    )
    return folder


@pytest.fixture
def copied_recipe(copied, monkeypatch):
    monkeypatch.syspath_prepend(str(copied))


def first_weights(folder):
    torch.manual_seed(0)
    folder.mkdir()
    torch.save(config.instantiate(OmegaConf.create(MODEL)).state_dict(), folder / SAVED)
    return folder


def configuration(task, begin, out, *, resume=False):
    return OmegaConf.create(
        {
            "task": task, "output_dir": str(out), "device": "cpu", "dtype": "fp32", "seed": 5,
            "epochs": EPOCHS, "max_steps_per_epoch": None, "resume_from_checkpoint": resume,
            "gradient_accumulation_steps": 2, "optimizer_in_bwd": False, "compile": False,
            "clip_grad_norm": MAX_NORM, "batch_size": 2, "shuffle": True, "model": MODEL,
            "tokenizer": {"_component_": "torchtune_parts.Tokenizer"},
            "dataset": {"_component_": "torchtune_parts.counting", "stride": 1 + 2 * task},
            "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
            "optimizer": {
                "_component_": "dgg.AdamW", "lr": 1e-2, "alpha": 1.0, "seed": task, "fused": True,
            },
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 2,
            },
            "checkpointer": {
                "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
                "checkpoint_dir": str(begin), "model_type": "LLAMA3", "output_dir": str(out),
                "checkpoint_files": [f"epoch_0/{SAVED}" if resume else SAVED],
            },
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": f"{out}/logs",
            },
        }
    )  # fmt: skip


def train(cfg):
    """Runs the page's recipe over a configuration; returns the recipe and its guided steps."""
    seen, made = [], dgg.AdamW.step
    names = {"dgg": dgg, "cfg": cfg}

    def step(opt, closure=None):
        result = made(opt, closure)
        seen.append(opt.guidance_stats())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dgg.AdamW, "step", step)
        recipe = run_recipe("torchtune", names)["recipe"]
    return recipe, seen


def weights(recipe):
    return {name: p.detach().clone() for name, p in recipe._model.named_parameters()}


def norms(out):
    (log,) = pathlib.Path(out, "logs").glob("*.txt")
    return [float(line.split("grad_norm:")[1].split()[0]) for line in log.read_text().splitlines()]


def test_the_recipe_on_two_tasks(tmp_path):
    begin = first_weights(tmp_path / "begin")
    first, seen = train(configuration(0, begin, tmp_path / "0"))
    assert type(first._optimizer) is dgg.AdamW
    assert len(seen) == EPOCHS * STEPS and not any(stats["injected"] for stats in seen)

    ended = tmp_path / "0" / f"epoch_{EPOCHS - 1}"
    second, seen = train(configuration(1, ended, tmp_path / "1"))
    assert len(seen) == EPOCHS * STEPS and all(stats["injected"] for stats in seen)
    assert max(norms(tmp_path / "1")) > MAX_NORM  # before clipping; after it:
    assert all(float(stats["grad_norm"]) <= MAX_NORM * 1.0001 for stats in seen)
    opt, theta = second._optimizer, weights(second)
    assert (opt.param_groups[0]["task_index"], opt.param_groups[0]["draw_index"]) == (1, len(seen))
    for name, p in second._model.named_parameters():
        assert torch.equal(opt.state[p]["anchor"], weights(first)[name]), name
        assert not torch.equal(p, opt.state[p]["anchor"]), name

    # As if it had been interrupted in its second epoch: torchtune saves between epochs.
    again, seen = train(configuration(1, ended, tmp_path / "1", resume=True))
    assert len(seen) == STEPS and all(stats["injected"] for stats in seen)
    assert again._optimizer.param_groups[0]["draw_index"] == EPOCHS * STEPS
    for name, p in again._model.named_parameters():
        assert torch.equal(p, theta[name]), name
