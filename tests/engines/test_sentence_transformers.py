# SPDX-License-Identifier: BSD-3-Clause
"""dgg in sentence-transformers: two tasks of sentences, clipped, accumulated, resumed."""

from __future__ import annotations

import os

import pytest
import torch

import dgg
import trainer_tasks
from language_tasks import SPECIAL, WORDS, counted_words, tokenizer
from recipes import need, run_recipe

os.environ["HF_HUB_OFFLINE"] = "1"
need("sentence_transformers", "sentence_transformers")
import datasets  # noqa: E402
import sentence_transformers as st  # noqa: E402
import transformers  # noqa: E402
from sentence_transformers.base.modules import Transformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "trainers")


def model(folder):
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), dim=16, hidden_dim=32, n_layers=1, n_heads=2,
        max_position_embeddings=16, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    transformers.DistilBertModel(config).save_pretrained(folder)
    words = tokenizer()
    words.model_input_names = ["input_ids", "attention_mask"]
    words.save_pretrained(folder)
    return st.SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)], device="cpu")


def pairs(stride):
    """Beginnings and ends of sentences that count in steps of ``stride``."""
    rows = [counted_words(start, stride) for start in range(40)]
    return datasets.Dataset.from_list(
        [{"anchor": " ".join(row[:4]), "positive": " ".join(row[4:])} for row in rows]
    )


def arguments(out, **over):
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": trainer_tasks.STEPS, "learning_rate": 1e-2,
        "max_grad_norm": trainer_tasks.BOUND,
        "adam_beta2": 0.95, "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "fp16": False,
        "dataloader_pin_memory": False, **over,
    }  # fmt: skip
    return st.SentenceTransformerTrainingArguments(str(out), **settings)


def train(network, stride, out, *, loss=losses.MultipleNegativesRankingLoss, resume=None, **over):
    trainer = st.SentenceTransformerTrainer(
        network, arguments(out, **over), train_dataset=pairs(stride), loss=loss(network)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_recipe(tmp_path):
    network = model(tmp_path / "model")
    loss = losses.MultipleNegativesRankingLoss(network)
    names = {"dgg": dgg, "tasks": [pairs(1), pairs(3)], "model": network, "loss": loss}
    names["args"] = arguments(tmp_path)
    trainer = run_recipe("sentence-transformers", names)["trainer"]
    assert dgg.hf.is_active(trainer)
    assert dgg.unwrap(trainer.optimizer).param_groups[0]["task_index"] == 1


def test_two_tasks(tmp_path):
    """Clipped, accumulated, anchored where the second task begins, resumed bit for bit there."""
    plain = train(model(tmp_path / "model"), 1, tmp_path / "plain")
    dgg.hf.install(alpha=1.0, seed=3)
    network = model(tmp_path / "model")
    first = train(network, 1, tmp_path / "0")
    trainer_tasks.assert_first_task(first, plain)
    start = trainer_tasks.trained(network)
    saving = {"save_strategy": "steps", "save_steps": trainer_tasks.SAVED}
    second = train(network, 3, tmp_path / "1", **saving)
    trainer_tasks.assert_second_task(second, start)

    dgg.hf.install(alpha=1.0, seed=3, task=1)  # as a new process would
    half = str(tmp_path / "1" / f"checkpoint-{trainer_tasks.SAVED}")
    again = train(model(tmp_path / "model"), 3, tmp_path / "2", resume=half, **saving)
    trainer_tasks.assert_resumed(again, second)


def test_a_loss_that_is_trained(tmp_path):
    """Its classifier is in the optimizer, and guided in the second task; so are rates by name."""
    dgg.hf.install(alpha=1.0)
    network = model(tmp_path / "model")
    rows = [(counted_words(k, 1), counted_words(k, 3), k % 2) for k in range(32)]
    labelled = datasets.Dataset.from_list(
        [{"a": " ".join(a), "b": " ".join(b), "label": label} for a, b, label in rows]
    )
    loss = losses.SoftmaxLoss(network, 16, 2)
    for number in range(2):
        before = loss.classifier.weight.detach().clone()
        trainer = st.SentenceTransformerTrainer(
            network,
            arguments(tmp_path / str(number), learning_rate_mapping={r"classifier\.": 0.05}),
            train_dataset=labelled,
            loss=loss,
        )
        trainer.train()
        assert not torch.equal(loss.classifier.weight, before)
        opt = dgg.unwrap(trainer.optimizer)
        entry = opt.state[loss.classifier.weight]
        assert dgg.hf.is_active(trainer) == ("anchor" in entry) == (number == 1)
        assert {group["initial_lr"] for group in opt.param_groups} == {1e-2, 0.05}
    assert torch.equal(entry["anchor"], before)
