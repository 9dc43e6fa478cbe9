# SPDX-License-Identifier: BSD-3-Clause
"""dgg in LLaMA-Factory: two tasks of an adapter, each a configuration of its own."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types

import pytest

import trainer_tasks
from language_tasks import counted_words, tokenizer, word_llama
from recipes import need, run_recipe

os.environ["HF_HUB_OFFLINE"] = "1"
need("llamafactory", "llamafactory")
# It imports torchaudio for sounds, which no test has; the wheel that there is wants a CUDA build of
# torch ("Could not load this library: _torchaudio.so").
stand_in = types.ModuleType("torchaudio")
stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules.setdefault("torchaudio", stand_in)
from llamafactory.train.tuner import run_exp  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    """Model, tokenizer and the rows of two tasks, as files."""
    word_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for stride in (1, 3):
        rows = [counted_words(start, stride) for start in range(48)]
        pairs = [
            {"instruction": " ".join(r[:3]), "input": "", "output": " " + " ".join(r[3:])}
            for r in rows
        ]
        (tmp_path / f"task{stride}.json").write_text(json.dumps(pairs))
    files = {f"task{stride}": {"file_name": f"task{stride}.json"} for stride in (1, 3)}
    (tmp_path / "dataset_info.json").write_text(json.dumps(files))
    return tmp_path


def configuration(folder, out, dataset, **over):
    return {
        "model_name_or_path": f"{folder}/model", "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj",
        "dataset": dataset, "dataset_dir": str(folder), "template": "empty", "cutoff_len": 32,
        "output_dir": f"{folder}/{out}", "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "max_steps": trainer_tasks.STEPS, "learning_rate": 1e-2,
        "max_grad_norm": trainer_tasks.BOUND, "adam_beta2": 0.95, "weight_decay": 0.1,
        "lr_scheduler_type": "cosine", "logging_steps": 1, "save_steps": trainer_tasks.SAVED,
        "report_to": "none", "use_cpu": True, "bf16": False, "seed": 0, "disable_tqdm": True,
        "dataloader_pin_memory": False, "plot_loss": False, **over,
    }  # fmt: skip


def test_the_recipe(folder, trainers, monkeypatch):
    """`python guided.py task.yaml`, a process per task; the second is resumed in its middle."""
    run_exp(configuration(folder, "plain", "task1"))
    former = {"adapter_name_or_path": f"{folder}/0"}
    half = {**former, "resume_from_checkpoint": f"{folder}/1/checkpoint-{trainer_tasks.SAVED}"}
    for task, out, dataset, over in (
        ("0", "0", "task1", {}), ("1", "1", "task3", former), ("1", "again", "task3", half)
    ):  # fmt: skip
        file = folder / f"{out}.yaml"
        file.write_text(json.dumps(configuration(folder, out, dataset, **over)))
        monkeypatch.setenv("DGG_TASK", task)
        monkeypatch.setattr(sys, "argv", ["guided.py", str(file)])
        run_recipe("LLaMA-Factory", {})
        if out == "0":
            start = trainer_tasks.trained(trainers[-1].model)
    plain, first, second, again = trainers
    trainer_tasks.assert_first_task(first, plain)
    trainer_tasks.assert_second_task(second, start)
    trainer_tasks.assert_resumed(again, second)
