# SPDX-License-Identifier: BSD-3-Clause
"""dgg in sentence-transformers: two tasks of sentences, clipped, accumulated, resumed."""

from __future__ import annotations

import os

import pytest
import torch

import dgg
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

STEPS = 6
pytestmark = pytest.mark.usefixtures("one_thread", "nothing_installed")


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "__init__", transformers.Trainer.__init__)


def model(folder):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return st.SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)], device="cpu")


def pairs(stride):
    """Beginnings and ends of sentences that count in steps of ``stride``."""
    rows = [counted_words(start, stride) for start in range(40)]
    return datasets.Dataset.from_list(
        [{"anchor": " ".join(row[:4]), "positive": " ".join(row[4:])} for row in rows]
    )


def arguments(out, **over):
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": STEPS,
        "learning_rate": 1e-2, "max_grad_norm": 0.5, "logging_steps": 2, "save_strategy": "no",
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


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


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
    dgg.hf.install(alpha=1.0, seed=3)
    network = model(tmp_path / "model")
    first = train(network, 1, tmp_path / "0")
    assert not dgg.hf.is_active(first)
    start = weights(network)
    saving = {"save_strategy": "steps", "save_steps": 3}
    second = train(network, 3, tmp_path / "1", **saving)
    opt = dgg.unwrap(second.optimizer)
    assert dgg.hf.is_active(second)
    group = opt.param_groups[0]
    assert (group["task_index"], group["draw_index"]) == (1, STEPS)
    ends = dict(network.named_parameters())
    for name, p in ends.items():
        assert torch.equal(opt.state[p]["anchor"], start[name]), name
    logs = [e for e in second.state.log_history if "guidance/injected" in e]
    # Every step is guided, and by gradients that were clipped.
    assert logs and all(e["guidance/injected"] == 1 for e in logs)
    assert all(e["guidance/grad_norm"] <= 0.5 * 1.0001 for e in logs)
    assert max(e["grad_norm"] for e in second.state.log_history if "grad_norm" in e) > 0.5

    dgg.hf.install(alpha=1.0, seed=3, task=1)  # as a new process would
    again = train(
        model(tmp_path / "model"), 3, tmp_path / "2", resume=str(tmp_path / "1/checkpoint-3"),
        **saving,
    )  # fmt: skip
    assert dgg.unwrap(again.optimizer).param_groups[0]["draw_index"] == STEPS
    for name, p in again.model.named_parameters():
        assert torch.equal(p, ends[name]), name
