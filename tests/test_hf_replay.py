# SPDX-License-Identifier: BSD-3-Clause
"""Replay in the Hugging Face Trainer: the real one, against a loop written by hand.

Plan: (1) the same weights to the last bit: plain, accumulated, clipped, in bfloat16, over several
tasks, resumed; (2) what r is: the mean over the step's old examples, whoever normalises the loss;
(3) collators, logs, trl; (4) what is refused. Two ranks are for test_parallel.py.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import linecache
import os

import pytest
import torch

import dgg

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dgg.hf import GuidanceCallback, ReplayTrainer, is_active, with_replay  # noqa: E402
from dgg.replay.buffer import course  # noqa: E402
from language_tasks import Killed, arguments_of, counting, killed_after, llama  # noqa: E402

STEPS, SIZE = 6, 4
OPTIONS = {"lr": 1e-2, "alpha": 0.5, "seed": 3, "replay_weight": 0.7}
pytestmark = pytest.mark.usefixtures("one_thread")


def task_data(stride):
    """Rows with different numbers of tokens that count: a mean over rows is none over tokens."""
    rows = counting(stride)
    for number, row in enumerate(rows):
        row["labels"][: 1 + number % 5] = -100
        row["source"] = f"task {stride}"  # a column that no model takes
    return rows


def trainer_for(
    model, data, out, memory, *, task=None, options=None, cls=ReplayTrainer, callbacks=(),
    replay=None, **over,
):  # fmt: skip
    settings = {
        "per_device_train_batch_size": SIZE, "max_steps": STEPS, "logging_steps": 2,
        "save_strategy": "no", "seed": 0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", **over,
    }  # fmt: skip
    return cls(
        model,
        arguments_of(out, **settings),
        train_dataset=data,
        optimizer_cls_and_kwargs=(dgg.AdamW, {**OPTIONS, **(options or {})}),
        callbacks=[GuidanceCallback(task=task), *callbacks],
        replay_buffer=memory,
        **{"replay_ratio": 0.5, **(replay or {})},
    )


def memory_of(*strides, seed=7):
    memory = dgg.ReplayBuffer(per_task=9, seed=seed)
    for stride in strides:
        memory.add_task(task_data(stride))
    return memory


def batch_of(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}


def chunks(rows, size=SIZE):
    return [batch_of(rows[start : start + size]) for start in range(0, len(rows), size)]


def mean_loss(model, batches):
    """Leaves the gradient of the mean loss over all tokens of the batches, one after the other."""
    tokens = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=tokens).loss.backward()


def by_hand(
    model, data, memory, *, ratio=0.5, accumulation=1, autocast=None, anchor=True, opt=None,
    **options,
):  # fmt: skip
    """What the Trainer is to do, in a loop."""
    opt = opt or dgg.AdamW(model.parameters(), weight_decay=0.0, **{**OPTIONS, **options})
    if anchor:
        opt.set_anchor()
    model.train()
    per_step = SIZE * accumulation
    low = autocast or contextlib.nullcontext
    for step in range(STEPS):
        new = data[step * per_step :][:per_step]  # fewer in the last step, if they accumulate
        with low():
            mean_loss(model, chunks(new))
        count = memory.share(len(new), ratio)
        if count:
            with opt.replay(), low():
                mean_loss(model, chunks(memory.sample(count)))
        opt.step()
        opt.zero_grad()
    return opt


def assert_same_weights(left, right):
    right = dict(right.named_parameters())
    for name, p in left.named_parameters():
        assert torch.equal(p, right[name]), name


# -- (1) to the last bit ---------------------------------------------------------------------------


@pytest.mark.compat("one process", "replay", "clipping")
@pytest.mark.parametrize(
    ("over", "hand"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param(
            {"gradient_accumulation_steps": 3}, {"accumulation": 3}, id="accumulated, parts of 4, 2"
        ),
        pytest.param(
            {"replay": {"replay_ratio": 0.1}, "gradient_accumulation_steps": 2},
            {"ratio": 0.1, "accumulation": 2},
            id="some steps without",
        ),
        pytest.param({"max_grad_norm": 0.05}, {"max_grad_norm": 0.05}, id="clipped"),
        pytest.param(
            {"max_grad_norm": 0.5, "options": {"max_grad_norm": 0.05}},
            {"max_grad_norm": 0.05},
            id="clipped by the smaller of two",
        ),
        pytest.param(
            {"bf16": True},
            {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)},
            id="bfloat16",
        ),
    ],
)
def test_same_weights_as_by_hand(tmp_path, over, hand):
    model, alone, memory = llama(), llama(), memory_of(1)
    twin = copy.deepcopy(memory)
    trainer = trainer_for(model, task_data(3), tmp_path, memory, task=1, **over)
    trainer.train()
    assert is_active(trainer)
    other = by_hand(alone, task_data(3), twin, **hand)
    assert_same_weights(model, alone)
    assert course(memory) == course(twin)
    # And replay is no no-op.
    without = llama()
    by_hand(without, task_data(3), dgg.ReplayBuffer(1), **hand)
    assert not torch.equal(without.lm_head.weight, alone.lm_head.weight)
    if "max_grad_norm" in over:
        clips = [e["guidance/clip"] for e in trainer.state.log_history if "loss" in e]
        assert clips and all(0 < c < 1 for c in clips)
        assert other.guidance_stats()["clip"] < 1


def test_tasks_one_after_the_other(tmp_path):
    """The first task replays nothing; each is remembered under its number."""
    model, alone = llama(), llama()
    memory, twin = memory_of(), memory_of()
    for number, stride in enumerate((1, 3, 5)):
        trainer = trainer_for(model, task_data(stride), tmp_path / str(number), memory)
        trainer.train()
        assert any("replay/loss" in e for e in trainer.state.log_history) == (number > 0)
        assert trainer.remember() == 9
        by_hand(alone, task_data(stride), twin, anchor=number > 0)
        twin.add_task(task_data(stride), number)
        assert_same_weights(model, alone)
    assert memory.tasks == (0, 1, 2)
    with pytest.raises(ValueError, match="task 2 is in the buffer already"):
        trainer.remember()
    assert trainer.remember("more", task_data(7)[:2]) == 2


def test_same_trainer_next_task(tmp_path):
    """The optimizer goes on; it clips from the first task on that has something to replay."""
    model, alone, memory, twin = llama(), llama(), memory_of(), memory_of()
    trainer = trainer_for(
        model, task_data(1), tmp_path, memory, max_grad_norm=0.05, replay={"replay_ratio": 0.1}
    )
    trainer.train()
    opt = dgg.unwrap(trainer.optimizer)
    assert opt.param_groups[0]["max_grad_norm"] is None
    assert trainer.remember() == 9
    # From here on as by hand, where the first two steps have no old example.
    twin.add_task(task_data(1), 0)
    alone.load_state_dict(model.state_dict())
    other = dgg.AdamW(alone.parameters(), weight_decay=0.0, max_grad_norm=0.05, **OPTIONS)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        other.state[q] = copy.deepcopy(opt.state[p])
    other.param_groups[0]["draw_index"] = STEPS
    trainer.train_dataset = task_data(3)
    trainer.train()
    by_hand(alone, task_data(3), twin, opt=other, ratio=0.1)
    assert_same_weights(model, alone)
    assert [group["max_grad_norm"] for group in opt.param_groups] == [0.05, 0.05]


def test_the_smaller_bound_holds_wherever_it_was_set(tmp_path):
    """In the groups, too; and a bound that was handed over is none of the optimizer's own."""

    def bounds(trainer, resume=None):
        trainer.train(resume_from_checkpoint=resume)
        return {group["max_grad_norm"] for group in dgg.unwrap(trainer.optimizer).param_groups}

    model, memory = llama(), memory_of(1)
    trainer = trainer_for(
        model, task_data(3), tmp_path, memory, max_steps=1, max_grad_norm=0.5, save_strategy="steps"
    )
    assert bounds(trainer) == {0.5}
    opt = dgg.unwrap(trainer.optimizer)
    trainer.args.max_grad_norm = 2.0
    assert bounds(trainer) == {2.0}
    for group in opt.param_groups:
        group["max_grad_norm"] = 1.0
    assert bounds(trainer) == {1.0}
    trainer.args.max_grad_norm = 0.25
    assert bounds(trainer) == {0.25}
    # The next Trainer, with the same optimizer.
    other = trainer_for(model, task_data(3), tmp_path, memory, max_steps=1, max_grad_norm=3.0)
    other.optimizer = opt
    assert bounds(other) == {1.0}
    # A process of its own, which asks for more than the one that was killed.
    saved = str(tmp_path / "checkpoint-1")
    again = trainer_for(llama(), task_data(3), tmp_path, memory, max_steps=2, max_grad_norm=3.0)
    assert bounds(again, saved) == {3.0}


def test_first_task_is_the_trainers(tmp_path):
    """With an empty buffer nothing differs, not the clipping before the step either."""
    model, plain = llama(), llama()
    arguments = {"max_grad_norm": 0.05, "options": {"max_grad_norm": None}}
    trainer_for(model, task_data(1), tmp_path, memory_of(), **arguments).train()
    trainer = trainer_for(plain, task_data(1), tmp_path, None, **arguments)
    trainer.train()
    assert_same_weights(model, plain)
    assert dgg.unwrap(trainer.optimizer).param_groups[0]["max_grad_norm"] is None


@pytest.mark.compat("one process", "resume")
def test_resumed_bit_for_bit(tmp_path):
    """Killed in the middle of the second task; a new process has a new, empty buffer."""
    saving = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.05, "task": 1}
    start, memory = llama(), memory_of(1)
    straight = trainer_for(
        copy.deepcopy(start), task_data(3), tmp_path / "a", copy.deepcopy(memory), **saving
    )
    straight.train()
    killed = trainer_for(
        start, task_data(3), tmp_path / "b", memory, callbacks=[killed_after(5)], **saving
    )
    with pytest.raises(Killed):
        killed.train()
    fresh = memory_of(seed=99)
    resumed = trainer_for(llama(), task_data(3), tmp_path / "b", fresh, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_same_weights(resumed.model, straight.model)
    left, right = (t.optimizer.state_dict() for t in (resumed, straight))
    assert left["param_groups"] == right["param_groups"]
    for number, state in right["state"].items():
        assert state.keys() == left["state"][number].keys() and "anchor" in state
        assert all(torch.equal(left["state"][number][key], value) for key, value in state.items())
    assert course(fresh) == course(straight.replay_buffer)
    assert fresh.tasks == (0,) and len(fresh) == 9
    logged = [[e for e in t.state.log_history if e["step"] > 4][0] for t in (resumed, straight)]
    assert logged[0]["loss"] == logged[1]["loss"]


def test_interrupted_between_the_passes_and_the_step(tmp_path):
    """What a step that never came has recorded is not added to the next one's."""

    class Interrupt(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise Killed

    interrupt = Interrupt()
    memory, twin = memory_of(1), memory_of(1)
    trainer = trainer_for(
        llama(), task_data(3), tmp_path, memory, task=1, callbacks=[interrupt], max_steps=3
    )
    with pytest.raises(Killed):
        trainer.train()
    opt = dgg.unwrap(trainer.optimizer)
    assert opt._replay
    trainer.remove_callback(interrupt)
    trainer.args.max_steps = 1
    alone = llama()
    alone.load_state_dict(trainer.model.state_dict())
    other = dgg.AdamW(alone.parameters(), weight_decay=0.0, **OPTIONS)
    other.set_anchor()
    for p, q in zip(trainer.model.parameters(), alone.parameters(), strict=True):
        other.state[q] = copy.deepcopy(opt.state[p])
    for key in ("draw_index", "task_index", "anchored"):
        other.param_groups[0][key] = opt.param_groups[0][key]
    trainer.train()
    twin.sample(6)  # of the three steps before
    mean_loss(alone, chunks(task_data(3)[:SIZE]))
    with other.replay():
        mean_loss(alone, chunks(twin.sample(2)))
    other.step()
    assert_same_weights(trainer.model, alone)


# -- (2) the mean over the step's old examples ----------------------------------------------------


class Regression(torch.nn.Module):
    """A model that knows nothing of the step's tokens: its loss is a mean over its batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


def points(count, offset):
    generator = torch.Generator().manual_seed(offset)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return [{"x": row, "labels": row.sum() + offset} for row in x]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_r_is_the_mean_over_the_steps_old_examples(tmp_path, accumulation):
    """Of parts of 4 and 2 examples each example counts the same."""
    model, memory = Regression(), dgg.ReplayBuffer(20)
    memory.add_task(points(20, 1))
    drawn, seen = [], []

    def collate(rows):
        drawn.extend(rows)
        return transformers.default_data_collator(rows)

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            batch = transformers.default_data_collator(drawn)
            expected = torch.autograd.grad(model(**batch)["loss"], [*model.parameters()])
            opt = dgg.unwrap(optimizer)
            seen.append(len(drawn))
            for p, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(opt._replay.get(p), grad, rtol=1e-12, atol=1e-12)
            new = points(40, 2)[state.global_step * SIZE * accumulation :][: SIZE * accumulation]
            batch = transformers.default_data_collator(new)
            expected = torch.autograd.grad(model(**batch)["loss"], [*model.parameters()])
            for p, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-12)
            drawn.clear()

    trainer = trainer_for(
        model, points(40, 2), tmp_path, memory, task=1, callbacks=[Look()], max_steps=3,
        gradient_accumulation_steps=accumulation, replay={"replay_collator": collate},
    )  # fmt: skip
    trainer.train()
    assert seen == [2 * accumulation] * 3


def test_a_loss_of_the_users_is_given_the_old_examples_tokens(tmp_path):
    counts = []

    def loss(outputs, labels, num_items_in_batch=None):
        counts.append((len(labels), int(num_items_in_batch)))
        logits = outputs.logits[:, :-1].flatten(0, 1)
        labels = labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / (
            num_items_in_batch
        )

    class WithLoss(ReplayTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, compute_loss_func=loss, **kwargs)

    model, alone, memory, twin = llama(), llama(), memory_of(1), memory_of(1)
    trainer = trainer_for(
        model, task_data(3), tmp_path, memory, task=1, cls=WithLoss, gradient_accumulation_steps=3
    )
    trainer.train()
    by_hand(alone, task_data(3), twin, accumulation=3)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    # The epoch ends with a step of one batch.
    assert [rows for rows, _ in counts] == [4, 4, 4, 4, 2] * (STEPS - 1) + [4, 2]
    assert all(len({items for _, items in counts[k + 3 : k + 5]}) == 1 for k in range(0, 25, 5))


# -- (3) collators, logs, subclasses --------------------------------------------------------------


def test_the_replayed_loss_is_logged(tmp_path):
    model, memory = llama(), memory_of(1)
    losses = []

    class Watched(ReplayTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            losses.append(loss.item())
            return loss

    trainer = trainer_for(model, task_data(3), tmp_path, memory, task=1, cls=Watched)
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(losses) == 2 * STEPS and len(entries) == 3
    for place, entry in enumerate(entries):
        new, old = losses[4 * place : 4 * place + 4 : 2], losses[4 * place + 1 : 4 * place + 4 : 2]
        assert entry["loss"] == pytest.approx(sum(new) / 2)
        assert entry["replay/loss"] == pytest.approx(sum(old) / 2)
    assert "replay/loss" not in trainer.state.log_history[-1]


def test_own_collator_sees_what_was_kept(tmp_path):
    seen = []

    def collate(rows):
        seen.extend(row["source"] for row in rows)
        return batch_of(rows)

    trainer = trainer_for(
        llama(), task_data(3), tmp_path, memory_of(1), task=1, max_steps=2,
        replay={"replay_collator": collate, "replay_ratio": 1.0},
    )  # fmt: skip
    trainer.train()
    assert seen == ["task 1"] * 2 * SIZE


def test_with_replay_takes_trainers_only():
    class Mine(transformers.Trainer):
        pass

    made = with_replay(Mine)
    assert issubclass(made, Mine) and made.__name__ == "ReplayMine"
    assert with_replay(Mine) is made and with_replay(made) is made
    assert with_replay(ReplayTrainer) is ReplayTrainer
    for wrong in (dgg.AdamW, Mine.train):
        with pytest.raises(TypeError, match="a subclass of transformers.Trainer, not"):
            with_replay(wrong)


# -- (4) what is refused, or told -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"replay_buffer": [1]}, TypeError, "must be a dgg.ReplayBuffer, not list"),
        ({"replay_collator": 3}, TypeError, "a function of a list of examples, not int"),
        ({"replay_ratio": 0}, ValueError, "replay_ratio=0 replays nothing"),
        ({"replay_ratio": 1.5}, ValueError, r"ratio must be in \[0, 1\]"),
        ({"replay_ratio": "half"}, TypeError, "ratio"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, text):
    with pytest.raises(error, match=text):
        ReplayTrainer(llama(), arguments_of(tmp_path), **arguments)


def test_remember_needs_a_memory(tmp_path):
    with pytest.raises(ValueError, match="replay_buffer="):
        trainer_for(llama(), task_data(1), tmp_path, None).remember()


def test_other_optimizer_raises(tmp_path):
    trainer = ReplayTrainer(
        llama(), arguments_of(tmp_path, max_steps=1), train_dataset=task_data(3),
        replay_buffer=memory_of(1),
    )  # fmt: skip
    with pytest.raises(TypeError, match="ReplayTrainer found no dgg optimizer"):
        trainer.train()


def test_a_scaler_is_refused_before_anything_is_trained(tmp_path):
    """accelerate makes one for fp16=True, but only where there is a GPU."""

    class Scaled(transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    with pytest.raises(RuntimeError, match="fp16=True.*use bf16=True"):
        trainer_for(llama(), task_data(3), tmp_path, memory_of(1), cls=with_replay(Scaled))
    trainer_for(llama(), task_data(3), tmp_path, None, cls=with_replay(Scaled))


def test_an_older_trainer_that_would_clip_g_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(transformers.Trainer, "_clip_grad_norm")
    model = llama()
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_for(model, task_data(3), tmp_path, memory_of(1), task=1, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="set max_grad_norm=0 in the TrainingArguments"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


SAVING = {"save_strategy": "steps", "save_steps": 3, "task": 1}


def test_resume_of_a_checkpoint_without_a_buffer_warns(tmp_path, caplog):
    trainer_for(llama(), task_data(3), tmp_path, None, max_steps=3, **SAVING).train()
    trainer = trainer_for(llama(), task_data(3), tmp_path, memory_of(1), **SAVING)
    trainer.train(resume_from_checkpoint=True)
    (record,) = [r for r in caplog.records if "has no replay buffer" in r.getMessage()]
    assert (record.name, record.pathname, record.levelname) == ("dgg.hf", __file__, "WARNING")
    assert ".train(" in linecache.getline(__file__, record.lineno)


@pytest.mark.parametrize("left", ["zeros", "half", "nothing"])
def test_a_damaged_memory_is_named_and_not_taken_for_unknown_types(left, tmp_path):
    trainer_for(llama(), task_data(3), tmp_path, memory_of(1), max_steps=3, **SAVING).train()
    path = tmp_path / "checkpoint-3" / "replay_buffer.pt"
    whole = path.read_bytes()
    path.write_bytes(
        {"zeros": bytes(len(whole)), "half": whole[: len(whole) // 2], "nothing": b""}[left]
    )
    trainer = trainer_for(llama(), task_data(3), tmp_path, memory_of(), **SAVING)
    with pytest.raises(RuntimeError, match=r"replay_buffer\.pt is damaged .* remove the file"):
        trainer.train(resume_from_checkpoint=True)
    path.unlink()
    filled = trainer_for(llama(), task_data(3), tmp_path, memory_of(1), **SAVING)
    filled.train(resume_from_checkpoint=True)  # the remedy
    assert filled.state.global_step == STEPS


@dataclasses.dataclass
class Example:
    """An example of a type that torch does not load unasked."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, key):
        return getattr(self, key)


def test_examples_of_the_users_types_are_loaded_once_they_are_named(tmp_path):
    def rows(stride):
        return [Example(row["input_ids"], row["labels"]) for row in task_data(stride)]

    def trainer(steps):
        memory = dgg.ReplayBuffer(9)
        memory.add_task(rows(1))
        return trainer_for(
            llama(), task_data(3), tmp_path, memory, max_steps=steps, **SAVING,
            replay={"replay_collator": batch_of},
        )  # fmt: skip

    trainer(3).train()
    with pytest.raises(RuntimeError, match="add_safe_globals.*before resuming"):
        trainer(4).train(resume_from_checkpoint=True)
    with torch.serialization.safe_globals([Example]):
        resumed = trainer(4)
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
