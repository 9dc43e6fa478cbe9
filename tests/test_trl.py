# SPDX-License-Identifier: BSD-3-Clause
"""dgg in trl's Trainers: two tasks of text, tokenized by a tokenizer made here, no downloads."""

from __future__ import annotations

import copy
import os

import pytest
import torch

import dgg
import trainer_tasks
from language_tasks import WORDS, counted_words, tokenizer
from recipes import run_recipe

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from dgg.hf import GuidanceCallback, is_active, with_replay  # noqa: E402

STEPS = 6
pytestmark = pytest.mark.usefixtures("one_thread")


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def texts(stride):
    """Prompts and completions that count in steps of ``stride``: every stride is another task."""
    rows = [counted_words(start, stride) for start in range(40)]
    return datasets.Dataset.from_list(
        [{"prompt": " ".join(row[:3]), "completion": " " + " ".join(row[3:])} for row in rows]
    )


def trainer_for(network, stride, out, callbacks, *, peft_config=None, replay=None, **over):
    settings = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "max_steps": STEPS,
        "gradient_accumulation_steps": 2, "logging_steps": 2, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, "bf16": False,
        "dataloader_pin_memory": False, "gradient_checkpointing": False, **over,
    }  # fmt: skip
    return (trl.SFTTrainer if replay is None else with_replay(trl.SFTTrainer))(
        network,
        trl.SFTConfig(**settings),
        train_dataset=texts(stride),
        processing_class=tokenizer(),
        peft_config=peft_config,
        optimizer_cls_and_kwargs=(dgg.AdamW, {"lr": 1e-2, "alpha": 0.5, "seed": 3}),
        callbacks=callbacks,
        **(replay or {}),
    )


def trainable(network):
    return {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True])
def test_two_tasks(tmp_path, lora):
    """The second task is anchored where it begins, and resumes bit for bit in its middle."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    first = trainer_for(
        model(), 1, tmp_path / "0", [GuidanceCallback()], peft_config=config if lora else None
    )
    first.train()
    assert not is_active(first)
    start = trainable(first.model)
    assert any("lora" in name for name in start) == lora

    saving = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.05}
    second = trainer_for(first.model, 3, tmp_path / "1", [GuidanceCallback(task=1)], **saving)
    second.train()
    assert is_active(second)
    optimizer = dgg.unwrap(second.optimizer)
    group = optimizer.param_groups[0]
    assert (group["task_index"], group["draw_index"]) == (1, STEPS)
    names = {n: p for n, p in second.model.named_parameters() if p.requires_grad}
    assert names.keys() == start.keys()
    for name, p in names.items():
        assert torch.equal(optimizer.state[p]["anchor"], start[name]), name
    entries = [e for e in second.state.log_history if "guidance/injected" in e]
    assert entries and entries[-1]["guidance/injected"] > 0
    assert entries[-1]["guidance/distance"] > 0
    assert all(e["guidance/grad_norm"] <= 0.05001 for e in entries)
    assert min(e["grad_norm"] for e in second.state.log_history if "grad_norm" in e) > 0.05

    fresh = peft.get_peft_model(model(), config) if lora else model()
    again = trainer_for(fresh, 3, tmp_path / "again", [GuidanceCallback(task=1)], **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3"))
    for name, value in trainable(again.model).items():
        assert torch.equal(value, names[name]), name


def test_replay(tmp_path):
    """trl's own loss over what its collator makes of old rows; resumed bit for bit."""
    memory, drawn, looked = dgg.ReplayBuffer(per_task=8, seed=1), [], []
    replay = {"replay_buffer": memory, "replay_ratio": 0.5}
    first = trainer_for(model(), 1, tmp_path / "0", [GuidanceCallback()], replay=replay)
    first.train()
    assert first.remember() == 8 and memory.tasks == (0,)
    start = {name: value.clone() for name, value in first.model.state_dict().items()}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, model, **kwargs):
            (batch,) = drawn
            loss = model(**batch).loss
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            expected = torch.autograd.grad(loss, [p for _, p in named])
            slot = dgg.unwrap(optimizer)._replay
            for (name, p), grad in zip(named, expected, strict=True):
                torch.testing.assert_close(slot.get(p), grad, rtol=1e-4, atol=1e-6, msg=name)
            looked.append(len(batch["input_ids"]))
            drawn.clear()

    def second(network, out, **more):
        saving = {"save_strategy": "steps", "save_steps": 3}
        callbacks = [GuidanceCallback(task=1), *more.pop("callbacks", [])]
        return trainer_for(network, 3, out, callbacks, **saving, **more)

    straight = second(first.model, tmp_path / "1", callbacks=[Look()], replay=replay)
    collate = straight.data_collator
    straight.replay_collator = lambda rows: drawn.append(collate(rows)) or collate(rows)
    straight.train()
    assert looked == [4] * STEPS
    assert any("replay/loss" in entry for entry in straight.state.log_history)

    again = second(
        model(), tmp_path / "2", replay={"replay_buffer": dgg.ReplayBuffer(8), "replay_ratio": 0.5}
    )
    again.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3"))
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[name]), name
    assert any(
        not torch.equal(value, start[name]) for name, value in again.model.state_dict().items()
    )


def preferences(stride):
    """Prompts whose continuation in steps of ``stride`` is preferred to one in steps of 7."""
    rows = [(counted_words(start, stride), counted_words(start, 7)) for start in range(48)]
    return datasets.Dataset.from_list(
        [
            {"prompt": " ".join(good[:3]), "chosen": " " + " ".join(good[3:]),
             "rejected": " " + " ".join(bad[3:])}
            for good, bad in rows
        ]
    )  # fmt: skip


def rewards(completions, **_):
    """High words are rewarded."""
    numbers = [[int(word[1:]) for word in c.split() if word in WORDS] for c in completions]
    return [sum(row) / 20 for row in numbers]


def other_trainer(kind, network, stride, out, **over):
    """DPOTrainer or GRPOTrainer, which take neither a class of optimizers nor its arguments."""
    settings = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": trainer_tasks.STEPS, "learning_rate": 3e-3, "adam_beta2": 0.95,
        "weight_decay": 0.1, "max_grad_norm": trainer_tasks.BOUND, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
        "bf16": False, "dataloader_pin_memory": False, "gradient_checkpointing": False, **over,
    }  # fmt: skip
    if kind == "DPO":
        reference = copy.deepcopy(network)
        args = trl.DPOConfig(**settings, beta=1.0)
        return trl.DPOTrainer(
            network, reference, args, train_dataset=preferences(stride),
            processing_class=tokenizer(),
        )  # fmt: skip
    args = trl.GRPOConfig(**settings, num_generations=4, max_completion_length=6)
    return trl.GRPOTrainer(
        network, rewards, args, train_dataset=preferences(stride).select_columns(["prompt"]),
        processing_class=tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_two_tasks_of_preferences(tmp_path, trainers, kind):
    """By dgg.hf.install: plain, first task, second task, and that resumed in its middle."""
    plain = other_trainer(kind, model(), 1, tmp_path / "plain")
    plain.train()
    dgg.hf.install(alpha=1.0, seed=3)
    first = other_trainer(kind, model(), 1, tmp_path / "0")
    first.train()
    trainer_tasks.assert_first_task(first, plain)
    start = trainer_tasks.trained(first.model)
    saving = {"save_strategy": "steps", "save_steps": trainer_tasks.SAVED}
    second = other_trainer(kind, first.model, 3, tmp_path / "1", **saving)
    second.train()
    trainer_tasks.assert_second_task(second, start)

    dgg.hf.install(alpha=1.0, seed=3, task=1)  # as a new process would
    former = model()
    former.load_state_dict(start)
    again = other_trainer(kind, former, 3, tmp_path / "2", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "1" / f"checkpoint-{trainer_tasks.SAVED}"))
    trainer_tasks.assert_resumed(again, second)


def test_the_recipe_of_preferences(tmp_path, trainers):
    args = trl.DPOConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    names = {"dgg": dgg, "tasks": [preferences(1), preferences(3)], "model": model(), "args": args,
             "tokenizer": tokenizer(), "reference": model()}  # fmt: skip
    run_recipe("TRL: DPO, GRPO and others", names)
    assert is_active(names["trainer"])
    assert dgg.unwrap(names["trainer"].optimizer).param_groups[0]["task_index"] == 1


def test_the_recipe(tmp_path):
    """The block of docs/recipes.md runs as printed."""
    args = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    names = {"dgg": dgg, "tasks": [texts(1), texts(3)], "model": model(), "args": args,
             "tokenizer": tokenizer()}  # fmt: skip
    run_recipe("TRL", names)
    assert is_active(names["trainer"])
    assert dgg.unwrap(names["trainer"].optimizer).param_groups[0]["task_index"] == 1
