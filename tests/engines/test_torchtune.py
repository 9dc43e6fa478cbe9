# SPDX-License-Identifier: BSD-3-Clause
"""dgg in torchtune's recipes for one device: two tasks, clipped, accumulated, resumed in a task."""

from __future__ import annotations

import importlib
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import dgg
from recipes import need, recipe, run_recipe

need("torchtune", "torchtune")
from omegaconf import OmegaConf  # noqa: E402
from torchtune import config  # noqa: E402

EPOCHS, STEPS = 2, 6  # 24 rows, 2 at a time, 2 times in a step, twice
MAX_NORM, SAVED = 0.1, "model-00001-of-00001.bin"
pytestmark = [
    pytest.mark.usefixtures("one_thread", "copied_recipe"), pytest.mark.timeout(600)
]  # fmt: skip
SIZES = {
    "vocab_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16,
    "max_seq_len": 16,
}  # fmt: skip
MODEL = {"_component_": "torchtune.models.llama3.llama3", **SIZES}
LORA = {
    "_component_": "torchtune.models.llama3.lora_llama3", "lora_rank": 2, "lora_alpha": 8,
    "lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, **SIZES,
}  # fmt: skip
COSINE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 2,
}
# File and class of torchtune's recipes.
FULL = ("full_finetune_single_device", "FullFinetuneRecipeSingleDevice")
ADAPTER = ("lora_finetune_single_device", "LoRAFinetuneRecipeSingleDevice")


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The folder with torchtune's recipes, as `tune cp` puts them there."""
    folder = tmp_path_factory.mktemp("recipes")
    command = "import sys, torchtune._cli.tune as t; sys.argv[0] = 'tune'; t.main()"
    for name, _ in (FULL, ADAPTER):
        call = [sys.executable, "-P", "-c", command, "cp", name, str(folder / f"{name}.py")]
        subprocess.run(call, check=True)
    return folder


@pytest.fixture
def copied_recipe(copied, monkeypatch):
    """Puts the recipes where they are imported.

    At every save the one with an adapter adds that to the weights that ``.cpu()`` returned, which
    on a CPU are those of the running model. It is given copies, as on a GPU.
    """
    monkeypatch.syspath_prepend(str(copied))
    recipe = importlib.import_module(ADAPTER[0])
    merged = recipe.get_merged_lora_ckpt
    monkeypatch.setattr(
        recipe, "get_merged_lora_ckpt",
        lambda state, **more: merged({key: x.clone() for key, x in state.items()}, **more),
    )  # fmt: skip


def first_weights(folder):
    torch.manual_seed(0)
    folder.mkdir()
    torch.save(config.instantiate(OmegaConf.create(MODEL)).state_dict(), folder / SAVED)
    return folder


def configuration(task, begin, out, *, kind=FULL, resume=False):
    return OmegaConf.create(
        {
            "task": task, "output_dir": str(out), "device": "cpu", "dtype": "fp32", "seed": 5,
            "epochs": EPOCHS, "max_steps_per_epoch": None, "resume_from_checkpoint": resume,
            "gradient_accumulation_steps": 2, "optimizer_in_bwd": False, "compile": False,
            "clip_grad_norm": MAX_NORM, "batch_size": 2, "shuffle": True,
            "model": MODEL if kind is FULL else LORA,
            "tokenizer": {"_component_": "torchtune_parts.Tokenizer"},
            "dataset": {"_component_": "torchtune_parts.counting", "stride": 1 + 2 * task},
            "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
            "optimizer": {
                "_component_": "dgg.AdamW", "lr": 1e-2, "alpha": 1.0, "seed": task, "fused": True,
            },
            "lr_scheduler": COSINE if kind is FULL else {"_component_": "torchtune_parts.constant"},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
                "checkpoint_dir": str(begin), "model_type": "LLAMA3", "output_dir": str(out),
                "checkpoint_files": [f"epoch_0/{SAVED}" if resume and kind is FULL else SAVED],
            },
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": f"{out}/logs",
            },
        }
    )  # fmt: skip


def train(cfg, kind=FULL):
    """Runs the page's recipe, or that of an adapter, over a configuration; returns it and stats."""
    seen, made = [], dgg.AdamW.step
    names = {"dgg": dgg, "cfg": cfg}

    def step(opt, closure=None):
        result = made(opt, closure)
        seen.append(opt.guidance_stats())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dgg.AdamW, "step", step)
        if kind is FULL:
            run_recipe("torchtune", names)
        else:
            code = recipe("torchtune")
            for ours, theirs in zip(FULL, ADAPTER, strict=True):
                code = code.replace(ours, theirs)
            exec(code, names)
    return names["recipe"], seen


def weights(recipe):
    return {name: p.detach().clone() for name, p in recipe._model.named_parameters()}


def norms(out):
    (log,) = pathlib.Path(out, "logs").glob("*.txt")
    return [float(line.split("grad_norm:")[1].split()[0]) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("kind", [FULL, ADAPTER], ids=["full", "adapter"])
def test_the_recipe_on_two_tasks(kind, tmp_path):
    begin = first_weights(tmp_path / "begin")
    first, seen = train(configuration(0, begin, tmp_path / "0", kind=kind), kind)
    assert type(first._optimizer) is dgg.AdamW
    assert len(seen) == EPOCHS * STEPS and not any(stats["injected"] for stats in seen)

    ended = tmp_path / "0" / f"epoch_{EPOCHS - 1}"
    second, seen = train(configuration(1, ended, tmp_path / "1", kind=kind), kind)
    assert len(seen) == EPOCHS * STEPS and all(stats["injected"] for stats in seen)
    assert max(norms(tmp_path / "1")) > MAX_NORM  # before clipping; after it:
    assert all(float(stats["grad_norm"]) <= MAX_NORM * 1.0001 for stats in seen)
    opt, theta = second._optimizer, weights(second)
    assert (opt.param_groups[0]["task_index"], opt.param_groups[0]["draw_index"]) == (1, len(seen))
    for name, p in second._model.named_parameters():
        if kind is FULL:
            assert torch.equal(opt.state[p]["anchor"], weights(first)[name]), name
        elif "lora_b" in name:  # the first adapter is merged: a new one that adds nothing
            assert not opt.state[p]["anchor"].any(), name
        assert not p.requires_grad or not torch.equal(p, opt.state[p]["anchor"]), name
    if kind is ADAPTER:
        merged, before = (
            torch.load(folder / SAVED, weights_only=True) for folder in (ended, begin)
        )
        name = "layers.0.attn.q_proj.weight"
        assert torch.equal(theta[name], merged[name]) and not torch.equal(theta[name], before[name])

    # As if it had been interrupted in its second epoch: torchtune saves between epochs.
    shutil.rmtree(tmp_path / "1" / f"epoch_{EPOCHS - 1}")
    again, seen = train(configuration(1, ended, tmp_path / "1", kind=kind, resume=True), kind)
    assert len(seen) == STEPS and all(stats["injected"] for stats in seen)
    assert again._optimizer.param_groups[0]["draw_index"] == EPOCHS * STEPS
    for name, p in again._model.named_parameters():
        assert torch.equal(p, theta[name]), name
