# SPDX-License-Identifier: BSD-3-Clause
"""dgg in ms-swift: a plugin file, and `--optimizer dgg` for two tasks of an adapter."""

from __future__ import annotations

import json
import os

import pytest

import trainer_tasks
from language_tasks import counted_words, tokenizer, word_llama
from recipes import need, recipe

os.environ["HF_HUB_OFFLINE"] = os.environ["USE_HF"] = "1"
need("swift", "ms_swift")
from swift.optimizers import optimizers_map  # noqa: E402
from swift.pipelines import sft_main  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    """Model, tokenizer and the rows of two tasks, as files."""
    word_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for stride in (1, 3):
        rows = [counted_words(start, stride) for start in range(48)]
        lines = [{"query": " ".join(r[:3]), "response": " " + " ".join(r[3:])} for r in rows]
        text = "\n".join(map(json.dumps, lines))
        (tmp_path / f"task{stride}.jsonl").write_text(text)
    return tmp_path


def arguments(folder, out, dataset, **over):
    settings = {
        "model": f"{folder}/model", "model_type": "llama", "template": "default",
        "torch_dtype": "float32", "dataset": f"{folder}/{dataset}.jsonl",
        "split_dataset_ratio": 0, "dataset_num_proc": 1, "dataloader_num_workers": 0,
        "tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0, "target_modules": "q_proj v_proj",
        "output_dir": f"{folder}/{out}", "add_version": False, "max_length": 64,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": trainer_tasks.STEPS, "learning_rate": 1e-2,
        "max_grad_norm": trainer_tasks.BOUND,
        "adam_beta2": 0.9, "weight_decay": 0.1, "warmup_ratio": 0, "logging_steps": 1,
        "save_steps": trainer_tasks.SAVED, "report_to": "none", "use_cpu": True,
        "gradient_checkpointing": False, "dataloader_pin_memory": False, "check_model": False,
        "seed": 0, **over,
    }  # fmt: skip
    return [part for key, value in settings.items() for part in (f"--{key}", *str(value).split())]


def test_the_recipe(folder, trainers, monkeypatch):
    """`swift sft --external_plugins ... --optimizer dgg`; the second task resumed in its middle."""
    monkeypatch.setitem(optimizers_map, "dgg", None)  # taken out again at the end
    sft_main(arguments(folder, "plain", "task1"))
    plugin = folder / "dgg_plugin.py"
    plugin.write_text(recipe("ms-swift"))
    guided = {"external_plugins": plugin, "optimizer": "dgg"}
    former = {**guided, "adapters": f"{folder}/0/checkpoint-{trainer_tasks.STEPS}"}
    half = {**guided, "resume_from_checkpoint": f"{folder}/1/checkpoint-{trainer_tasks.SAVED}"}
    for task, out, dataset, over in (
        ("0", "0", "task1", guided), ("1", "1", "task3", former), ("1", "again", "task3", half)
    ):  # fmt: skip
        monkeypatch.setenv("DGG_TASK", task)
        sft_main(arguments(folder, out, dataset, **over))
        if out == "0":
            start = trainer_tasks.trained(trainers[-1].model)
    plain, first, second, again = trainers
    trainer_tasks.assert_first_task(first, plain)
    trainer_tasks.assert_second_task(second, start)
    trainer_tasks.assert_resumed(again, second)
