# SPDX-License-Identifier: BSD-3-Clause
"""dgg in axolotl: a plugin that a configuration names, for two tasks of an adapter."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import pytest
import transformers

import trainer_tasks
from language_tasks import counted_words, tokenizer, word_llama
from recipes import need, recipe

os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
need("axolotl", "axolotl")
from axolotl.cli.train import do_cli  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Model, tokenizer, the rows of two tasks and the plugin, as files."""
    word_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for stride in (1, 3):
        rows = [counted_words(start, stride) for start in range(48)]
        lines = [{"instruction": " ".join(r[:3]), "output": " " + " ".join(r[3:])} for r in rows]
        text = "\n".join(map(json.dumps, lines))
        (tmp_path / f"task{stride}.jsonl").write_text(text)
    (tmp_path / "dgg_axolotl.py").write_text(recipe("axolotl"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    yield tmp_path
    sys.modules.pop("dgg_axolotl", None)


def configuration(folder: pathlib.Path, out: str, dataset: str, **over) -> str:
    settings = {
        "base_model": f"{folder}/model", "tokenizer_type": "AutoTokenizer", "adapter": "lora",
        "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
        "datasets": [
            {"path": f"{folder}/{dataset}.jsonl", "ds_type": "json", "type": "alpaca"}
        ],
        "dataset_prepared_path": f"{folder}/prepared-{dataset}", "dataset_num_proc": 1,
        "output_dir": f"{folder}/{out}", "sequence_len": 128, "micro_batch_size": 4,
        "gradient_accumulation_steps": 2, "max_steps": trainer_tasks.STEPS, "learning_rate": 1e-2,
        "max_grad_norm": trainer_tasks.BOUND, "adam_beta2": 0.95, "weight_decay": 0.1,
        "lr_scheduler": "cosine", "optimizer": "adamw_torch", "logging_steps": 1,
        "save_steps": trainer_tasks.SAVED, "bf16": False, "fp16": False, "tf32": False,
        "flash_attention": False, "gradient_checkpointing": False, "seed": 0,
        # Triton's kernels for adapters, which axolotl turns on by itself, need a GPU.
        **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}, **over,
    }  # fmt: skip
    file = folder / f"{out}.yaml"
    file.write_text(json.dumps(settings))
    return str(file)


def train(*args, **over) -> None:
    transformers.set_seed(0)  # axolotl itself makes the adapter before it does so
    do_cli(configuration(*args, **over))


def test_the_recipe(folder, trainers, monkeypatch):
    """`axolotl train` with `plugins:`; the second task is resumed in its middle."""
    train(folder, "plain", "task1")
    guided = {"plugins": ["dgg_axolotl.Guided"]}
    former = {**guided, "lora_model_dir": f"{folder}/0"}
    half = {**former, "resume_from_checkpoint": f"{folder}/1/checkpoint-{trainer_tasks.SAVED}"}
    for task, out, dataset, over in (
        ("0", "0", "task1", guided), ("1", "1", "task3", former), ("1", "again", "task3", half)
    ):  # fmt: skip
        monkeypatch.setenv("DGG_TASK", task)
        train(folder, out, dataset, **over)
        if out == "0":
            start = trainer_tasks.trained(trainers[-1].model)
    plain, first, second, again = trainers
    trainer_tasks.assert_first_task(first, plain)
    trainer_tasks.assert_second_task(second, start)
    trainer_tasks.assert_resumed(again, second)
