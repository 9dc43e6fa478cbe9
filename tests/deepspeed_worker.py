# SPDX-License-Identifier: BSD-3-Clause
"""What every rank of tests/test_deepspeed.py runs; started by torch.multiprocessing."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import logging
import os
import pathlib
import pickle
import sys
import warnings

import torch
import torch.distributed as dist

import dgg
import language_tasks
import ranks
import training
from dgg.deepspeed import partitions

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
STEPS = 50
BOUNDARIES = (4, 30)
# After more steps some weight's rounding to 16 bits falls the other way.
STEPS_16_BITS = 20


def on_ranks(function):
    """Makes of a function what a rank runs: with the group and a DeepSpeed that it needs."""

    @functools.wraps(function)
    def prepared(rank: int, world: int, folder: str, *arguments) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed.accelerator
        import deepspeed.ops
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        # It would compile a collective of its own for the CPU, for minutes; gloo has it too.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It refuses float16 on CPUs without instructions for it; torch computes it on every CPU.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        function(rank, world, folder, *arguments)

    return ranks.in_group(prepared)


@on_ranks
def run_several(rank: int, world: int, folder: str, names: list[str]) -> None:
    """Runs several of these functions in one start and notes which came to their end."""
    for name in names:
        globals()[name].__wrapped__(rank, world, folder)
        dist.barrier()
        if rank == 0:
            pathlib.Path(folder, f"{name} done").touch()


def network(dtype=torch.float32) -> torch.nn.Module:
    """Uneven sizes, a layer that is frozen, and biases in groups of their own."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 7), torch.nn.LayerNorm(7),
        torch.nn.Linear(7, 5), torch.nn.Linear(5, 1),
    )  # fmt: skip
    model[2].requires_grad_(False)
    return model.to(dtype)


class Tied(torch.nn.Module):
    """The numbers of a batch as words; the embedding is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.middle = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 6)
        self.head, self.out = torch.nn.Linear(6, 11, bias=False), torch.nn.Linear(11, 1)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x * 2).round().long() % 11
        return self.out(self.head(self.middle(self.embed(words)).tanh())).mean(1)


def lora() -> torch.nn.Module:
    """Adapters around two layers and a trained last layer; all else is frozen."""
    import peft

    model = network()
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["0", "4"], modules_to_save=["5"])
    )


def model_in_init() -> torch.nn.Module:
    """The network, partitioned by ZeRO-3 while it is made: no rank ever has it whole."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model = network()
    assert all(p.numel() == 0 and p.ds_numel > 0 for p in model.parameters())
    return model


MODELS = {"network": network, "lora": lora, "tied": Tied, "zero.Init": model_in_init}


def groups(model, *, tiny: bool = True) -> list[dict]:
    """Three groups: matrices, vectors, and one of a single element; with a frozen parameter.

    Of a model with adapters two: LoRA's B with a rate of its own, and everything else.
    """
    named = list(model.named_parameters())
    if hasattr(model, "peft_config"):
        ours = [p for name, p in named if "lora_B" in name]
        rest = [p for name, p in named if "lora_B" not in name]
        return [{"params": rest, "weight_decay": 0.1}, {"params": ours, "lr": 4e-2}]
    last = named[-1][1]
    # What ZeRO-3 has partitioned is flat itself.
    flat = [p for _, p in named if len(getattr(p, "ds_shape", p.shape)) == 1]
    matrices = [p for _, p in named if all(p is not q for q in flat)]
    if not tiny:
        return groups(model)[:1] + [{"params": flat, "lr": 1e-2}]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in flat if p is not last], "lr": 1e-2},
        {"params": [last], "alpha": 0.2, "strength": 0.4},
    ]


RULES = {
    "adamw": (dgg.AdamW, {"lr": 2e-2, "betas": (0.8, 0.95), "eps": 1e-4}),
    "sgd": (dgg.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
}


def build(model, rule: str, options: dict, *, tiny: bool = True):
    """Returns the optimizer of a case."""
    cls, defaults = RULES[rule]
    return cls(groups(model, tiny=tiny), **{**defaults, **training.GUIDED, **options})


def batch(k: int) -> torch.Tensor:
    """Returns the inputs of step k, the same on every rank."""
    return torch.randn(8, 6, generator=training.numbers_of(k))


def loss_of(model, x: torch.Tensor) -> torch.Tensor:
    """Returns a loss in which every trainable parameter takes part."""
    return (model(x.to(next(model.parameters()).dtype)).float() - x.sum(1, True)).square().mean()


def alone(rule="adamw", options=None, clip=None, last=STEPS, model="network", *, tiny=True):
    """The run without DeepSpeed, by the same optimizer, that clips for itself."""
    model = MODELS["network" if model == "zero.Init" else model]()
    optimizer = build(model, rule, {"max_grad_norm": clip, **(options or {})}, tiny=tiny)
    stats = []

    def note():
        stats.append(optimizer.guidance_stats())

    for k in training.steps(range(last), optimizer, boundaries=BOUNDARIES, after=note):
        loss_of(model, batch(k)).backward()
    return model, optimizer, stats


def config(stage: int, **changes) -> dict:
    """The documented configuration of a stage with changes; ``zero`` changes its section."""
    name = "deepspeed_zero3.json" if stage == 3 else "deepspeed_zero2.json"
    made = json.loads((DOCS / name).read_text())
    made["zero_optimization"].update({"stage": stage, **changes.pop("zero", {})})
    # A machine without a GPU: DeepSpeed's default would let the CPU's memory decide.
    made.update(changes)
    return made


def engine_of(model, optimizer, configuration):
    """Returns DeepSpeed's engine."""
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=configuration)[0]


def start(configuration, options=None, *, model=None, rule: str = "adamw", tiny: bool = True):
    """Returns DeepSpeed's engine with a new optimizer, and the optimizer."""
    model = network() if model is None else model
    optimizer = build(model, rule, options or {}, tiny=tiny)
    return engine_of(model, optimizer, configuration), optimizer


def outcome(call, error: type[Exception], otherwise: str) -> str:
    """Returns what a call is refused with, or that it was not."""
    try:
        call()
    except error as found:
        return f"{type(found).__name__}: {found}"
    return otherwise


def whole_weights(engine) -> list[torch.Tensor]:
    """Returns every parameter whole; of a 16-bit model what ZeRO steps in its place."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    params = list(engine.module.parameters())
    if params[0].dtype != torch.float32:
        params = [p for p in params if p.requires_grad]
        return [safe_get_full_fp32_param(p).detach().clone() for p in params]
    if hasattr(params[0], "ds_id"):
        with deepspeed.zero.GatheredParameters(params):
            return [p.detach().clone() for p in params]
    return [p.detach().clone() for p in params]


class OurCollectives:
    """Counts the collectives that dgg starts, not DeepSpeed's."""

    def __enter__(self):
        self.count, self._original = 0, dist.all_reduce

        def counting(*args, **kwargs):
            self.count += sys._getframe(1).f_globals["__name__"].startswith("dgg")
            return self._original(*args, **kwargs)

        dist.all_reduce = counting
        return self

    def __exit__(self, *exception):
        dist.all_reduce = self._original


def train(engine, optimizer, first=0, last=STEPS):
    """Trains; returns what dgg did in every step."""
    results = []
    for k in range(first, last):
        if k in BOUNDARIES:
            optimizer.set_anchor()
        with OurCollectives() as ours:
            engine.backward(loss_of(engine, batch(k)))
            engine.step()
        results.append((ours.count, optimizer.guidance_stats()))
    return results


@on_ranks
def run_cases(rank: int, world: int, folder: str, cases: list[dict]) -> None:
    """Runs every case; rank 0 leaves the results in ``folder``."""
    results = []
    for case in cases:
        model, configuration = MODELS[case["model"]](), config(**case["config"])
        engine, optimizer = start(configuration, case["options"], model=model, rule=case["rule"])
        assert dgg.unwrap(engine) is optimizer and dgg.unwrap(engine.optimizer) is optimizer
        # The constructor neither steps nor draws.
        assert optimizer.param_groups[0]["draw_index"] == 0
        last = STEPS if case["dtype"] is None else STEPS_16_BITS
        steps = train(engine, optimizer, last=last)
        assert {group["draw_index"] for group in optimizer.param_groups} == {last}
        # Every rank knows the same.
        facts = [
            [float(x) for x in s.values() if x is not None and x.numel() == 1] for _, s in steps
        ]
        everyone = [None] * world
        dist.all_gather_object(everyone, facts)
        assert all(other == facts for other in everyone), case
        results.append({"weights": whole_weights(engine), "steps": steps})
        engine.destroy()
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))


def of_case(case: dict, **changes):
    """Returns engine and optimizer of a case whose checkpoints can be universal."""
    configuration = config(**case["config"], **changes)
    return start(configuration, case["options"], rule=case["rule"], tiny=False)


@on_ranks
def run_checkpoints(rank: int, world: int, folder: str, cases: list[dict]) -> None:
    """Saves in the middle of a task, goes on, and goes on again from the file: the same bits."""
    results = []
    for number, case in enumerate(cases):
        saved = os.path.join(folder, f"saved {number}")

        engine, optimizer = of_case(case)
        train(engine, optimizer, 0, 4)
        boundary = whole_weights(engine)
        train(engine, optimizer, 4, 8)
        engine.save_checkpoint(saved, tag="middle")
        train(engine, optimizer, 8, 14)
        expected = whole_weights(engine)
        engine.destroy()
        engine, optimizer = of_case(case)
        engine.load_checkpoint(saved, tag="middle")
        group = optimizer.param_groups[0]
        assert (group["draw_index"], group["task_index"]) == (8, 1), group
        steps = train(engine, optimizer, 8, 14)
        assert any(bool(stats["injected"]) for _, stats in steps)
        found = whole_weights(engine)
        assert all(map(torch.equal, found, expected)), case
        engine.destroy()
        results.append({"weights": expected, "boundary": boundary})
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))


@on_ranks
def resume_on_others(rank: int, world: int, folder: str, saved: str, cases: list[dict]) -> None:
    """Another number of ranks: what DeepSpeed refuses, and what its universal format leaves out."""
    before = torch.load(os.path.join(saved, "results.pt"))
    messages, results = [], []
    for number, case in enumerate(cases):
        checkpoint = os.path.join(saved, f"saved {number}")
        engine, _ = of_case(case)
        load = functools.partial(engine.load_checkpoint, checkpoint, tag="middle")
        messages.append(outcome(load, Exception, "loaded"))
        engine.destroy()

        def universal(checkpoint=checkpoint, case=case):
            engine, optimizer = of_case(case, checkpoint={"load_universal": True})
            kept = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
            engine.load_checkpoint(checkpoint, tag="universal")
            # Under ZeRO-3 DeepSpeed gives every group the settings of the first.
            for group, (lr, decay) in zip(optimizer.param_groups, kept, strict=True):
                group.update(lr=lr, weight_decay=decay)
            return engine, optimizer

        engine, optimizer = universal()
        loaded = whole_weights(engine)
        step = functools.partial(train, engine, optimizer, 8, 9)
        messages.append(outcome(step, RuntimeError, "stepped without an anchor"))
        assert all(map(torch.equal, whole_weights(engine), loaded))
        engine.destroy()
        engine, optimizer = universal()
        names = [name for name, _ in engine.module.named_parameters()]
        boundary = dict(zip(names, before[number]["boundary"], strict=True))
        optimizer.set_anchor(boundary, task=1)
        assert optimizer.param_groups[0]["draw_index"] == 8
        train(engine, optimizer, 8, 14)
        results.append(whole_weights(engine))
        engine.destroy()
    if rank == 0:
        torch.save({"messages": messages, "weights": results}, os.path.join(folder, "results.pt"))


def accelerated(case: dict, **changes):
    """Returns the accelerator of a case, the model and the optimizer that it has prepared."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = DeepSpeedPlugin(hf_ds_config=config(case["stage"], zero=case["zero"], **changes))
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=case["precision"])
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    model = MODELS[case["model"]]()
    # DeepSpeed's universal checkpoints cannot have a group of which a rank has only padding.
    made = build(model, "adamw", case["options"], tiny=not case["resumed"])
    model, wrapped = accelerator.prepare(model, made)
    assert dgg.unwrap(wrapped) is made
    return accelerator, model, wrapped


def train_accelerated(accelerator, model, wrapped, first, last, *, named=False):
    """Trains; returns the weights. ``named``: anchors are whole tensors by name."""
    for k in range(first, last):
        if k in BOUNDARIES:
            names = [name for name, _ in model.module.named_parameters()]
            present = dict(zip(names, whole_weights(model), strict=True)) if named else None
            dgg.unwrap(wrapped).set_anchor(present)
        accelerator.backward(loss_of(model, batch(k)))
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        wrapped.step()
        wrapped.zero_grad()
    assert dgg.unwrap(wrapped).param_groups[0]["draw_index"] == last
    return whole_weights(model)


@on_ranks
def resume_accelerate_on_others(
    rank: int, world: int, folder: str, saved: str, cases: list[dict]
) -> None:
    """Another number of ranks through accelerate: refused, or without an anchor until it is named.

    ``saved`` has the checkpoint of every case, and a universal one beside it.
    """
    messages, results = [], []
    for number, case in enumerate(cases):
        made = accelerated(case)
        load = functools.partial(made[0].load_state, os.path.join(saved, f"saved {number}"))
        messages.append(outcome(load, Exception, "loaded"))
        made[1].destroy()

        def universal(number=number, case=case):
            made = accelerated(case, checkpoint={"load_universal": True})
            optimizer = dgg.unwrap(made[2])
            kept = [(g["lr"], g["weight_decay"], g["alpha"]) for g in optimizer.param_groups]
            made[0].load_state(os.path.join(saved, f"universal {number}"))
            for group, (lr, decay, alpha) in zip(optimizer.param_groups, kept, strict=True):
                group.update(lr=lr, weight_decay=decay, alpha=alpha)
            return made, optimizer

        made, optimizer = universal()
        loaded = whole_weights(made[1])
        step = functools.partial(train_accelerated, *made, 8, 9)
        messages.append(outcome(step, RuntimeError, "stepped without an anchor"))
        assert all(map(torch.equal, whole_weights(made[1]), loaded))
        made[1].destroy()
        made, optimizer = universal()
        former = alone(clip=0.5, last=BOUNDARIES[0], tiny=False)[0]
        optimizer.set_anchor(former.state_dict(), task=1)
        results.append(train_accelerated(*made, 8, 14))
        made[1].destroy()
    if rank == 0:
        torch.save({"messages": messages, "weights": results}, os.path.join(folder, "results.pt"))


@on_ranks
def run_accelerate(rank: int, world: int, folder: str, cases: list[dict]) -> None:
    """The same training through accelerate's plugin; clipping is the configuration's."""
    results = []
    for number, case in enumerate(cases):
        saved = os.path.join(folder, f"saved {number}")
        last = STEPS if case["precision"] == "no" else STEPS_16_BITS
        made = accelerated(case)
        train = functools.partial(train_accelerated, named=case["named"])
        ranks.refused(RuntimeError, "dgg.ReplayBuffer.mix", dgg.unwrap(made[2]).replay)
        if case["resumed"]:
            # In the middle of a guided task.
            train(*made, 0, 8)
            made[0].save_state(saved)
            expected = train(*made, 8, 14)
            made[1].destroy()
            made = accelerated(case)
            made[0].load_state(saved)
            assert all(map(torch.equal, train(*made, 8, 14), expected)), case
            results.append(train(*made, 14, last))
        else:
            results.append(train(*made, 0, last))
        made[1].destroy()
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))


def language_model(adapters: bool = False) -> torch.nn.Module:
    """A tiny Llama with tied embeddings, the same every time; frozen but for adapters or not."""
    import peft

    model = language_tasks.llama(layers=1, tied=True)
    if not adapters:
        return model
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def trainer_of(
    model, task: int, out: str, deepspeed, *, size: int, die=False, options=None, anchor=None,
    importance=None, replay=None, **settings,
):  # fmt: skip
    """A Trainer of one task: under DeepSpeed if there is a configuration, else alone.

    ``model`` may be a function that makes it: it is called when the Trainer's arguments are there.
    """
    from dgg.hf import GuidanceCallback

    arguments = language_tasks.arguments_of(
        out, per_device_train_batch_size=size, max_steps=10, logging_steps=1,
        save_strategy="steps", save_steps=5, seed=3, lr_scheduler_type="constant",
        learning_rate=5e-3, deepspeed=deepspeed, **settings,
    )  # fmt: skip
    options = {"lr": 5e-3, "eps": 1e-3, "alpha": 0.5, "seed": 5, **(options or {})}
    callbacks = [GuidanceCallback(task=task, anchor=anchor, importance=importance)]
    if die:
        callbacks.append(language_tasks.killed_after(7))
    data = language_tasks.counting(1 + task)
    return language_tasks.trainer_of(model, arguments, data, options, *callbacks, **(replay or {}))


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """Returns the trained weights, whole, by their names in the model."""
    from types import SimpleNamespace

    model = trainer.accelerator.unwrap_model(trainer.model)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, whole_weights(SimpleNamespace(module=model)), strict=True))


def two_tasks(folder: str, stage: int | None, size: int, adapters: bool):
    """Trains two tasks, each by a Trainer of its own; the second goes on from a checkpoint.

    Adapters have an importance: the first Trainer leaves it in a file, which the second one reads.
    """
    weighted, file = {}, None
    if adapters:
        weighted = {"options": {"importance": 0.5}}
        file = os.path.join(folder, "first", "importance.safetensors")
    path = None if stage is None else str(DOCS / f"deepspeed_zero{stage}.json")
    model = language_model(adapters)
    first = trainer_of(model, 0, os.path.join(folder, "first"), path, size=size, **weighted)
    first.train()
    state = weights_of(first)
    logs = []
    for name in ("second", "interrupted"):
        if name == "interrupted" and stage is None:
            break
        out = os.path.join(folder, name)
        model = language_model(adapters)
        model.load_state_dict(state, strict=False)
        made = functools.partial(
            trainer_of, task=1, out=out, deepspeed=path, size=size, importance=file, **weighted
        )
        second = made(model, die=name == "interrupted")
        if name == "interrupted":
            ranks.refused(language_tasks.Killed, "", second.train)
            model = language_model(adapters)
            # What it was before: a checkpoint of adapters has only them.
            model.load_state_dict(state, strict=False)
            second = made(model)
            second.train(resume_from_checkpoint=True)
        else:
            second.train()
        logs.append((weights_of(second), second.state.log_history))
        optimizer = dgg.unwrap(second.optimizer)
        if stage is not None:
            ranks.refused(RuntimeError, "dgg.ReplayBuffer.mix", optimizer.replay)
        assert optimizer.param_groups[0]["draw_index"] == 10
        assert optimizer.param_groups[0]["task_index"] == 1
    return logs


def one_task(folder: str, case: dict, stage: int | None, size: int):
    """Trains one guided task through the Trainer; returns its weights and what it logged."""
    model, anchor = language_model(), None
    if case["named"]:
        anchor = {name: 0.9 * p.detach() for name, p in language_model().named_parameters()}
    if case["init"] and stage is not None:
        import transformers

        pretrained = os.path.join(folder, "pretrained")
        if dist.get_rank() == 0:
            model.save_pretrained(pretrained)
        dist.barrier()
        model = functools.partial(transformers.LlamaForCausalLM.from_pretrained, pretrained)
    path = None if stage is None else config(stage, zero=case["zero"])
    out = os.path.join(folder, "out")
    trainer = trainer_of(model, 1, out, path, size=size, options=case["options"], anchor=anchor)
    if case["init"] and stage is not None:
        assert all(p.numel() == 0 and p.ds_numel > 0 for p in trainer.model.parameters())
    trainer.train()
    return weights_of(trainer), trainer.state.log_history


def mixed_task(folder: str, stage: int) -> None:
    """Trains in bfloat16 through the Trainer and by DeepSpeed's engine alone: the same bits."""
    seen = []
    mixed = config(stage, bf16={"enabled": True})
    model = language_model()
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer = trainer_of(model, 1, os.path.join(folder, "out"), mixed, size=4, bf16=True)
    trainer.train()
    expected = weights_of(trainer)
    decayed = trainer.get_decay_parameter_names(language_model())
    trainer.model_wrapped.destroy()

    model = language_model()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = dgg.AdamW(groups, lr=5e-3, eps=1e-3, alpha=0.5, seed=5)
    engine = engine_of(model, optimizer, mixed)
    optimizer.set_anchor()
    injected = 0
    assert len(seen) == 10
    for inputs in seen:
        # The Trainer's loss is divided by all ranks' tokens, and DeepSpeed takes the ranks' mean.
        loss = engine(**inputs).loss * dist.get_world_size()
        engine.backward(loss)
        engine.step()
        injected += int(optimizer.guidance_stats()["injected"])
    assert 0 < injected < 10
    for (name, _), mine in zip(named, whole_weights(engine), strict=True):
        assert torch.equal(mine, expected[name]), name
    engine.destroy()


@on_ranks
def run_trainer_cases(rank: int, world: int, folder: str, cases: list[dict]) -> None:
    """One task of every case through the Trainer."""
    results = []
    for number, case in enumerate(cases):
        inside = os.path.join(folder, f"case {number}")
        if case["mixed"]:
            mixed_task(inside, case["stage"])
            results.append(None)
        else:
            results.append(one_task(inside, case, case["stage"], 4))
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))


@on_ranks
def resume_trainer_on_others(rank: int, world: int, folder: str, saved: str) -> None:
    """A Trainer on another number of ranks than its checkpoint was written by."""
    messages = []
    for stage in (2, 3):
        path = str(DOCS / f"deepspeed_zero{stage}.json")
        out = os.path.join(folder, f"stage {stage}")
        trainer = trainer_of(language_model(), 1, out, path, size=4)
        checkpoint = os.path.join(saved, f"stage {stage}", "second", "checkpoint-5")
        resume = functools.partial(trainer.train, resume_from_checkpoint=checkpoint)
        messages.append(outcome(resume, Exception, "trained"))
        # As far as the checkpoint says, and no step further.
        assert trainer.state.global_step <= 5
    if rank == 0:
        torch.save(messages, os.path.join(folder, "messages.pt"))


@on_ranks
def run_trainer(rank: int, world: int, folder: str, adapters: bool) -> None:
    """Two tasks through the Trainer, with the documented configurations."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    reports = logging.getLogger("dgg.hf")
    reports.setLevel(logging.INFO)
    reports.addHandler(handler)
    for stage in (2, 3):
        said.clear()
        logs = two_tasks(os.path.join(folder, f"stage {stage}"), stage, 4, adapters)
        if rank == 0:
            torch.save((*logs, said), os.path.join(folder, f"results {stage}.pt"))
    if adapters:
        return

    # A memory, in the first task as well, where it would not be needed yet.
    for stage in (2, 3):
        memory = {"replay_buffer": dgg.ReplayBuffer(4)}
        make = functools.partial(
            trainer_of, language_model(), 0, os.path.join(folder, "memory"), config(stage),
            size=4, replay=memory,
        )  # fmt: skip
        ranks.refused(RuntimeError, "dgg.ReplayBuffer.mix in the data_collator", make)

    # An optimizer of DeepSpeed's own in the place of ours.
    block = {"optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}}}
    out = os.path.join(folder, "block")
    trainer = trainer_of(language_model(), 0, out, config(2, **block), size=4)
    message = outcome(trainer.train, TypeError, "trained")
    if rank == 0:
        torch.save((message, trainer.state.global_step), os.path.join(folder, "block.pt"))


def alone_in_16_bits(dtype: torch.dtype, clip: float, scale: float = 1.0):
    """The mixed run without DeepSpeed: 16-bit model, the optimizer steps float32 copies of it."""
    model, copies = network(dtype), network()
    copies.load_state_dict(model.state_dict())
    optimizer = build(copies, "adamw", {})
    pairs = [
        (p, q)
        for p, q in zip(model.parameters(), copies.parameters(), strict=True)
        if p.requires_grad
    ]
    for k in range(STEPS_16_BITS):
        if k in BOUNDARIES:
            optimizer.set_anchor()
        (loss_of(model, batch(k)) * scale).backward()
        for p, q in pairs:
            q.grad = p.grad.float()
        norm = torch.stack([q.grad.double().norm() for _, q in pairs]).norm().float() / scale
        factor = 1.0 / (torch.clamp((norm + 1e-6) / clip, min=1.0) * scale)
        for _, q in pairs:
            q.grad.mul_(factor)
        optimizer.step()
        with torch.no_grad():
            for p, q in pairs:
                p.copy_(q)
        model.zero_grad()
    return [q.detach() for _, q in pairs]


@on_ranks
def run_loss_scaling(rank: int, world: int, folder: str) -> None:
    """float16 with a scale that first overflows, then grows: skipped steps and the norm."""
    half = {"enabled": True, "initial_scale_power": 22, "loss_scale_window": 3, "hysteresis": 1}
    for stage, micro in ((2, 1), (3, 1), (1, 2), (2, 2), (3, 2)):
        changes = {"fp16": half, "gradient_accumulation_steps": micro}
        engine, optimizer = start(config(stage, **changes), {"alpha": 1.0})
        optimizer.set_anchor()
        handed, scales = [], []

        def keep(opt, args, kwargs, handed=handed):
            grads = [p.grad for group in opt.param_groups for p in group["params"]]
            handed.extend(g.double().square().sum() for g in grads if g is not None)

        optimizer.register_step_pre_hook(keep)
        taken = 0
        for k in range(30):
            handed.clear()
            before = optimizer.param_groups[0]["draw_index"]
            scale = engine.optimizer.loss_scale
            for part in range(micro):
                assert not handed
                engine.backward(loss_of(engine, batch(30 * part + k)))
                engine.step()
            scales.append(engine.optimizer.loss_scale / scale)
            if engine.optimizer.overflow:
                # DeepSpeed skips without a call: no draw is used up.
                assert not handed and optimizer.param_groups[0]["draw_index"] == before
                continue
            taken += 1
            norm = torch.stack(handed).sum()
            dist.all_reduce(norm)
            stats = optimizer.guidance_stats()
            torch.testing.assert_close(
                stats["grad_norm"].double(), norm.sqrt(), rtol=1e-6, atol=0, msg=f"step {k}"
            )
        # It shrank, and it grew in steps that were taken.
        assert 0 < taken < 30 and 0.5 in scales and 2.0 in scales, scales
        assert optimizer.param_groups[0]["draw_index"] == taken
        engine.destroy()


@on_ranks
def run_accumulation(rank: int, world: int, folder: str) -> None:
    """Two backward passes a step are one step, one draw and one ‖g‖ of their mean."""
    twin = network()
    alone = build(twin, "adamw", {"max_grad_norm": 0.5})
    stats = []

    def note():
        stats.append(alone.guidance_stats())

    for k in training.steps(range(14), alone, boundaries=BOUNDARIES, after=note):
        for part in range(2):
            (loss_of(twin, batch(2 * k + part)) / 2).backward()
    offload = {"offload_optimizer": {"device": "cpu"}}
    for stage, section in ((1, {}), (2, {}), (3, {}), (2, offload), (3, offload)):
        twice = config(stage, zero=section, gradient_accumulation_steps=2)
        engine, optimizer = start(twice)
        for k in range(14):
            if k in BOUNDARIES:
                optimizer.set_anchor()
            for part in range(2):
                engine.backward(loss_of(engine, batch(2 * k + part)))
                engine.step()
                assert optimizer.param_groups[0]["draw_index"] == k + part
            found = optimizer.guidance_stats()
            assert torch.equal(found["injected"], stats[k]["injected"])
            torch.testing.assert_close(found["scale"], stats[k]["scale"], rtol=1e-4, atol=1e-6)
        training.assert_close(whole_weights(engine), twin.parameters(), torch.float32)
        engine.destroy()
    assert any(bool(x["injected"]) for x in stats)


def tensors_alive() -> tuple[int, int]:
    """Returns how many tensors there are in this process, and their bytes."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [x for x in gc.get_objects() if type(x) in kinds]
    return len(found), sum(x.numel() * x.element_size() for x in found)


@on_ranks
def run_boundaries(rank: int, world: int, folder: str) -> None:
    """Many tasks in one process, with one engine or a new one, and two engines at once."""
    for stage in (1, 2, 3):
        model = network()
        optimizer = build(model, "adamw", {"alpha": 1.0})
        engine = engine_of(model, optimizer, config(stage))
        alive = []
        for task in range(12):
            for k in range(2):
                engine.backward(loss_of(engine, batch(2 * task + k)))
                engine.step()
            optimizer.set_anchor()
            alive.append(tensors_alive() if task in (3, 11) else None)
        assert alive[3] == alive[11] is not None, alive
        assert optimizer.param_groups[0]["task_index"] == 12

        # The next task in an engine of its own: it takes a new optimizer.
        left = whole_weights(engine)
        engine.destroy()
        optimizer = build(model, "adamw", {"alpha": 1.0})
        engine = engine_of(model, optimizer, config(stage))
        assert all(map(torch.equal, whole_weights(engine), left))
        optimizer.set_anchor(task=12)
        assert [g["task_index"] for g in optimizer.param_groups] == [12] * 3
        train(engine, optimizer, 5, 8)
        assert not torch.equal(whole_weights(engine)[0], left[0])
        assert float(optimizer.guidance_stats()["distance"]) > 0
        engine.destroy()
        # DeepSpeed's own errors: it takes the former engine's partitions for parameters.
        again = functools.partial(engine_of, model, optimizer, config(stage))
        ranks.refused((KeyError, IndexError), "", again)

    # Two at once, of different stages: each finds its own engine.
    pairs = []
    for rule, stage in (("adamw", 2), ("sgd", 3)):
        pairs.append((rule, *start(config(stage), rule=rule)))
    for k in range(8):
        for _, engine, optimizer in pairs:
            train(engine, optimizer, k, k + 1)
    for rule, engine, _ in pairs:
        expected = alone(rule, clip=0.5, last=8)[0].parameters()
        training.assert_close(whole_weights(engine), expected, torch.float32)
    for _, engine, _ in pairs:
        engine.destroy()


@on_ranks
def run_without_states(rank: int, world: int, folder: str) -> None:
    """Weights loaded without the optimizer's state, and state that was there before the engine."""

    def made(stage):
        return start(config(stage), {"alpha": 1.0}, tiny=False)

    for stage in (1, 2, 3):
        saved = os.path.join(folder, f"weights {stage}")
        engine, optimizer = made(stage)
        train(engine, optimizer, 0, 6)
        engine.save_checkpoint(saved)
        expected = whole_weights(engine)
        engine.destroy()

        engine, optimizer = made(stage)
        engine.load_checkpoint(saved, load_optimizer_states=False)
        assert all(map(torch.equal, whole_weights(engine), expected))
        for group in optimizer.param_groups:
            assert (group["draw_index"], group["task_index"], group["anchored"]) == (0, 0, 0)
        assert not any("anchor" in entry for entry in optimizer.state.values())
        optimizer.set_anchor()
        train(engine, optimizer, 6, 8)
        assert float(optimizer.guidance_stats()["distance"]) > 0
        # What is anchored already keeps its anchor, and measures from there.
        kept = [entry["anchor"].clone() for entry in optimizer.state.values()]
        engine.load_checkpoint(saved, load_optimizer_states=False)
        assert all(
            torch.equal(entry["anchor"], x)
            for entry, x in zip(optimizer.state.values(), kept, strict=True)
        )
        train(engine, optimizer, 8, 9)
        assert float(optimizer.guidance_stats()["distance"]) == 0
        engine.destroy()

        # An anchor before the engine is on parameters that the optimizer will not step.
        model = network()
        optimizer = build(model, "adamw", {"alpha": 1.0}, tiny=False)
        optimizer.set_anchor()
        engine = engine_of(model, optimizer, config(stage))
        before = whole_weights(engine)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            ranks.refused(
                RuntimeError, "set_anchor(tensors)", lambda e=engine: train(e, None, 0, 1)
            )
        (told,) = [x for x in heard if "set_anchor() after deepspeed.initialize" in str(x.message)]
        assert told.filename == __file__
        assert all(map(torch.equal, whole_weights(engine), before))
        # Even now all that there is can be saved, and is all.
        optimizer.set_anchor()
        engine.save_checkpoint(os.path.join(folder, f"early {stage}"), tag="x")
        anchors = [entry["anchor"] for entry in optimizer.state.values()]
        engine.destroy()
        engine, optimizer = made(stage)
        engine.load_checkpoint(os.path.join(folder, f"early {stage}"), tag="x")
        found = [entry["anchor"] for entry in optimizer.state.values()]
        assert len(found) == 2 and all(map(torch.equal, found, anchors))
        # DeepSpeed's sign for a norm that is none.
        engine.optimizer._global_grad_norm = -1.0
        assert partitions.grad_norm(engine.optimizer).isnan()
        engine.destroy()


@on_ranks
def run_misuses(rank: int, world: int, folder: str) -> None:
    """What cannot be had says so on every rank, and changes nothing."""

    def step(engine):
        engine.backward(loss_of(engine, batch(0)))
        engine.step()

    for stage in (1, 2, 3):
        engine, optimizer = start(config(stage))
        ranks.refused(RuntimeError, "dgg.ReplayBuffer.mix", optimizer.replay)
        step(engine)
        ranks.refused(RuntimeError, "dgg.ReplayBuffer.mix", optimizer.replay)
        copied = pickle.loads(pickle.dumps(optimizer)) if stage < 3 else None
        if copied is not None:
            for group in copied.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            ranks.refused(RuntimeError, "set optimizer.process_group", copied.step)

        # By name: every rank has its part of the whole tensors.
        named = {n: torch.randn(p.shape) for n, p in network().named_parameters()}
        optimizer.set_anchor(named, model=engine.module)
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        optimizer.set_anchor(named)
        assert optimizer.param_groups[0]["task_index"] == 2
        pieces = [p for p in optimizer._driver.partitions]
        for piece in pieces:
            for f in piece.fragments:
                whole = named[piece.members[f.member].name].flatten()
                found = optimizer.state[piece.tensor]["anchor"][f.start : f.start + f.count]
                assert torch.equal(found, whole[f.base : f.base + f.count])
        values = [optimizer.state[piece.tensor]["anchor"].clone() for piece in pieces]
        lacking = {n: x for n, x in named.items() if n != "5.bias"}
        ranks.refused(KeyError, "5.bias", lambda o=optimizer, t=lacking: o.set_anchor(t))
        wrong = {**named, "0.weight": torch.zeros(3)}
        ranks.refused(ValueError, "0.weight", lambda o=optimizer, t=wrong: o.set_anchor(t))
        # The weights of one rank's partition are nobody else's to see.
        weights = next(x for piece in pieces if piece.fragments for x in [piece.tensor.data])
        first = weights[0].clone()
        if rank == 1:
            weights[0] = torch.nan
        error = (ValueError, "inf or NaN") if rank == 1 else (RuntimeError, "rank 1: ")
        ranks.refused(*error, optimizer.set_anchor)
        weights[0] = first
        assert optimizer.param_groups[0]["task_index"] == 2
        for piece, value in zip(pieces, values, strict=True):
            assert torch.equal(optimizer.state[piece.tensor]["anchor"], value)
        step(engine)
        optimizer.clear_anchor()
        assert not any("anchor" in entry for entry in optimizer.state.values())
        step(engine)
        assert not bool(optimizer.guidance_stats()["injected"])
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        if stage < 3:  # a step shows one group of the new list at a time
            ranks.refused(RuntimeError, "Change it in place", lambda e=engine: step(e))
        else:
            step(engine)
        engine.destroy()

    bf16 = {"bf16": {"enabled": True}}
    group = {"process_group": dist.group.WORLD}
    narrow = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    engine, optimizer = start(config(2, bf16=narrow), model=network(torch.bfloat16))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        step(engine)
        step(engine)
    (told,) = [x for x in heard if "16-bit weights lose" in str(x.message)]
    assert "leave bf16_master_weights_and_grads" in str(told.message)
    assert told.filename == __file__
    assert next(iter(optimizer.state)).dtype == torch.bfloat16
    engine.destroy()
    for options, error, text, changes, dtype in (
        ({"stochastic_rounding": True}, ValueError, "stochastic_rounding", bf16, torch.bfloat16),
        (group, ValueError, "its own process group is used", {}, torch.float32),
        (
            {"master_weights": True}, ValueError, "bf16_master_weights_and_grads",
            {"bf16": narrow}, torch.bfloat16,
        ),
    ):  # fmt: skip
        engine, optimizer = start(config(2, **changes), options, model=network(dtype))
        ranks.refused(error, text, optimizer.set_anchor)
        ranks.refused(error, text, lambda e=engine: step(e))
        engine.destroy()

    unmeasured = config(2, gradient_clipping=0.0, zero={"compute_grad_norm": False})
    engine, optimizer = start(unmeasured, {"alpha": 1.0})
    step(engine)
    optimizer.set_anchor()
    ranks.refused(RuntimeError, "compute_grad_norm", lambda: step(engine))
    engine.destroy()

    model = network()
    inner = torch.optim.AdamW(groups(model)[:2], lr=1e-2)
    dgg.Guidance(inner, alpha=1.0)
    engine = engine_of(model, inner, config(2))
    ranks.refused(RuntimeError, "use dgg.AdamW", lambda: step(engine))
    engine.destroy()

    # DeepSpeed's own errors for the two settings that the documented files have.
    untested = {k: v for k, v in config(2).items() if k != "zero_allow_untested_optimizer"}
    ranks.refused(AssertionError, "zero_allow_untested_optimizer", lambda: start(untested))
    offload = {"offload_optimizer": {"device": "cpu"}}
    forced = {k: v for k, v in config(2, zero=offload).items() if "force" not in k}
    ranks.refused(Exception, "zero_force_ds_cpu_optimizer", lambda: start(forced))

    # Partitions of an engine that nobody knows.
    optimizer = dgg.AdamW(network().parameters(), alpha=1.0)
    flat = torch.zeros(5, requires_grad=True)
    flat.grad = torch.ones(5)
    optimizer.param_groups[0]["params"] = [flat]
    ranks.refused(RuntimeError, "process_group=", optimizer.step)
    ranks.refused(RuntimeError, "process_group=", optimizer.set_anchor)
    assert not flat.any()
    optimizer.process_group = dist.group.WORLD
    optimizer.step()
    assert flat.any()


@on_ranks
def run_importance(rank: int, world: int, folder: str) -> None:
    """Importance over three tasks, saved and resumed in the second; sums by name; refusals."""
    options = {"importance": 0.5, "importance_dtype": torch.float64}
    model = network()
    twin = build(model, "adamw", {**options, "max_grad_norm": 0.5})
    for k in training.steps(range(12), twin, boundaries=(4, 9)):
        loss_of(model, batch(k)).backward()
    sums = {name: torch.rand(p.shape) + 0.1 for name, p in network().named_parameters()}
    for stage in (1, 2, 3):
        zero = {"sub_group_size": 20} if stage == 3 else {}

        def made(more=None, stage=stage, zero=zero):
            return start(config(stage, zero=zero), {**options, **(more or {})})

        def goes_on(engine, optimizer):
            train(engine, optimizer, 7, 9)
            optimizer.set_anchor(task=2)
            train(engine, optimizer, 9, 12)
            state = [
                {key: x.clone() for key, x in optimizer.state[p.tensor].items()}
                for p in optimizer._driver.partitions
            ]
            groups = [{**group, "params": None} for group in optimizer.param_groups]
            weights = whole_weights(engine)
            whole = optimizer.importance_dict()
            named = optimizer.importance_dict(model=engine.module)
            assert whole.keys() == named.keys()
            assert all(torch.equal(x, named[name]) for name, x in whole.items())
            engine.destroy()
            return state, groups, weights, whole

        saved = os.path.join(folder, f"importance {stage}")
        engine, optimizer = made()
        ranks.refused(RuntimeError, "a new optimizer has none", optimizer.set_anchor)
        train(engine, optimizer, 0, 7)
        engine.save_checkpoint(saved, tag="x")
        state, groups, weights, whole = goes_on(engine, optimizer)
        training.assert_close(weights, model.parameters(), torch.float32)
        # Whole tensors on every rank, those of a training without DeepSpeed.
        expected = twin.importance_dict(model=model)
        assert whole.keys() == expected.keys()
        for name, value in whole.items():
            assert value.shape == expected[name].shape and value.dtype == torch.float32
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)
        mean = twin.param_groups[0]["importance_mean"]
        assert all(abs(group["importance_mean"] - mean) < 1e-5 * mean for group in groups)
        assert all(group["task_index"] == 2 for group in groups)
        assert all(x["importance"].dtype == torch.float64 for x in state)

        engine, optimizer = made()
        engine.load_checkpoint(saved, tag="x")
        again, groups_again, weights_again, whole_again = goes_on(engine, optimizer)
        assert groups == groups_again
        for one, other in zip(state, again, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(x, other[key]) for key, x in one.items())
        assert all(map(torch.equal, weights, weights_again))
        assert all(torch.equal(x, whole_again[name]) for name, x in whole.items())

        # The next engine takes them, and has the same F as the one before would have.
        engine, optimizer = made()
        ranks.refused(RuntimeError, "a new optimizer has none", optimizer.importance_dict)
        optimizer.set_anchor(importance=whole)
        mean = torch.cat([x.flatten() for x in whole.values()]).mean().item()
        assert abs(optimizer.param_groups[0]["importance_mean"] / mean - 1) < 1e-6
        sums_again = optimizer.importance_dict()
        for name, value in whole.items():
            torch.testing.assert_close(sums_again[name], value, rtol=1e-6, atol=0)
        engine.destroy()

        # By name, and what is wrong with a name or with a value.
        engine, optimizer = made()
        for given, error, text in (
            ({n: x for n, x in sums.items() if n != "5.bias"}, KeyError, "5.bias"),
            ({**sums, "0.weight": torch.zeros(3)}, ValueError, "importance given for"),
            ({**sums, "0.weight": sums["0.weight"] * torch.nan}, ValueError, "0.weight"),
        ):
            give = functools.partial(optimizer.set_anchor, importance=given)
            ranks.refused(error, text, give)
            assert not any("importance" in entry for entry in optimizer.state.values())
        optimizer.set_anchor(importance=sums)
        trained = [n for n, p in network().named_parameters() if p.requires_grad]
        mean = torch.cat([sums[n].flatten() for n in trained]).mean().item()
        assert abs(optimizer.param_groups[0]["importance_mean"] - mean) < 1e-6
        for piece in optimizer._driver.partitions:
            found = optimizer.state[piece.tensor]["importance"]
            left = torch.ones(len(found), dtype=torch.bool)
            for f in piece.fragments:
                whole = sums[piece.members[f.member].name].flatten()[f.base : f.base + f.count]
                part = slice(f.start, f.start + f.count)
                torch.testing.assert_close(found[part].float(), whole / mean)
                left[part] = False
            assert not found[left].any()
        optimizer.set_anchor(importance=sums, model=engine.module)
        # A moment of one rank that is not finite.
        train(engine, optimizer, 0, 1)
        moment = optimizer.state[optimizer._driver.partitions[0].tensor]["exp_avg_sq"]
        first = moment[0].clone()
        kept = [entry["importance"].clone() for entry in optimizer.state.values()]
        if rank == 1:
            moment[0] = torch.nan
        ranks.refused(ValueError, "the mean of the second moments is nan", optimizer.set_anchor)
        moment[0] = first
        assert optimizer.param_groups[0]["task_index"] == 2
        found = [entry["importance"] for entry in optimizer.state.values()]
        assert all(map(torch.equal, found, kept))
        ranks.refused(RuntimeError, "merge the saved weights", optimizer.merge_anchor)
        # Switched on between two boundaries it has nothing to weigh with.
        for entry in optimizer.state.values():
            del entry["importance"]
        before = whole_weights(engine)
        lost = "importance=0.5 weighs the pull"
        ranks.refused(RuntimeError, lost, functools.partial(train, engine, optimizer, 1, 2))
        assert all(map(torch.equal, whole_weights(engine), before))
        engine.destroy()

        engine, optimizer = made({"alpha": "auto"})
        before = whole_weights(engine)
        for call in (optimizer.set_anchor, functools.partial(train, engine, optimizer, 0, 1)):
            ranks.refused(ValueError, "alpha='auto' needs replay gradients kept apart", call)
            assert all(map(torch.equal, whole_weights(engine), before))
        engine.destroy()


@on_ranks
def run_padding(rank: int, world: int, folder: str) -> None:
    """ZeRO-3 leaves the padding of its partitions as the memory was: NaN there harms nothing."""
    engine, optimizer = start(config(3))
    poisoned = 0
    for number, params in enumerate(engine.optimizer.fp16_groups):
        offset = 0
        for p in params:
            size = p.partition_numel()
            real = min(max(p.ds_numel - rank * size, 0), size)
            padding = engine.optimizer.fp32_partitioned_groups_flat[number].data
            padding[offset + real : offset + size] = float("nan")
            poisoned += size - real
            offset += size
    total = torch.tensor(poisoned)
    dist.all_reduce(total)
    assert total > 0
    train(engine, optimizer, 0, 14)
    state = optimizer.state.values()
    assert all(bool(entry["anchor"].isfinite().all()) for entry in state)
    weights = whole_weights(engine)
    if rank == 0:
        torch.save(weights, os.path.join(folder, "padding.pt"))


def with_experts() -> tuple[list[dict], torch.nn.Module]:
    """Returns the groups of a model with experts on every rank, and the model."""
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    experts = MoE(8, torch.nn.Linear(8, 8), num_experts=2, ep_size=2, k=1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), experts)
    made = split_params_into_different_moe_groups_for_optimizer(
        [{"params": list(model.parameters()), "name": "all"}]
    )
    return made, model


class EveryRankIsTensorParallel:
    """What DeepSpeed asks about model parallel ranks: all are, so none is data parallel."""

    def __init__(self) -> None:
        self._alone = [dist.new_group([r]) for r in range(dist.get_world_size())]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_group(self):
        return dist.group.WORLD

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_group(self):
        return self._alone[dist.get_rank()]

    def get_data_parallel_world_size(self) -> int:
        return 1


@on_ranks
def run_refusals(rank: int, world: int, folder: str) -> None:
    """What DeepSpeed can do and dgg cannot: an error before anything is changed."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.utils import groups as parallel_groups

    def check(engine, optimizer, text, error=RuntimeError, call=None):
        before = [p.detach().clone() for p in engine.module.parameters()]
        groups_before = [{**group, "params": None} for group in optimizer.param_groups]
        held = list(optimizer.state)
        for attempt in (optimizer.set_anchor, *([call] if call else [])):
            ranks.refused(error, text, attempt)
            assert all(map(torch.equal, engine.module.parameters(), before)), text
            assert [{**group, "params": None} for group in optimizer.param_groups] == groups_before
            assert list(map(id, optimizer.state)) == list(map(id, held)), text
        engine.destroy()

    def stepping(engine, weight=1.0):
        def step():
            engine.backward(loss_of(engine, batch(0)) * weight)
            engine.step()

        return step

    for stage in (1, 2):
        made, model = with_experts()
        optimizer = dgg.AdamW(made)
        check(engine_of(model, optimizer, config(stage)), optimizer, "expert parameters (MoE)")

    for stage in (1, 2, 3):
        # No CPU has what it needs, so the constructor would have refused it already.
        model = network()
        optimizer = build(model, "adamw", {})
        optimizer._settings = dataclasses.replace(optimizer._settings, capturable=True)
        engine = engine_of(model, optimizer, config(stage))
        check(engine, optimizer, "capturable=True does not go", ValueError, stepping(engine))

        # The engine's parameters are others than those the optimizer was built with.
        model, other = network(), network()
        optimizer = build(model, "adamw", {"granularity": "tensor"})
        instead = dict(zip(model.parameters(), other.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [instead[p] for p in group["params"]]
        engine = engine_of(other, optimizer, config(stage))
        check(engine, optimizer, "8 parameters that this optimizer was not built with")

    # ZenFlow has a class of its own for stage 2 only; it wants a block it makes no optimizer of.
    zenflow = {
        "topk_ratio": 0.1, "update_interval": 4, "select_strategy": "step", "select_interval": 4,
        "overlap_step": False,
    }  # fmt: skip
    block = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}}
    changes = {"offload_optimizer": {"device": "cpu"}, "zenflow": zenflow, "overlap_comm": False}
    for stage, text in ((2, "without zenflow"), (3, "zenflow steps selected columns")):
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
        optimizer = dgg.AdamW(model.parameters())
        engine = engine_of(model, optimizer, config(stage, zero=changes, optimizer=block))
        check(engine, optimizer, text)

    # What DeepSpeed itself refuses, here or always.
    for error, text, zero_changes in (
        (
            AssertionError,
            "DeepSpeedCPUAdam",
            {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        ),
        (
            AssertionError,
            "SuperOffload only supports",
            {"offload_optimizer": {"device": "cpu", "super_offload": True}},
        ),
        (
            RuntimeError,
            "async_io",
            {"offload_optimizer": {"device": "nvme", "nvme_path": folder}},
        ),
        (Exception, "MiCS ZeRO-3 sharding has been removed", {"mics_shard_size": 2}),
    ):
        ranks.refused(error, text, functools.partial(start, config(3, zero=zero_changes)))
    # So what dgg says of NVMe is seen only by an engine that claims to have it.
    engine, optimizer = start(config(3))
    engine.optimizer.swap_optimizer = True
    check(engine, optimizer, "use offload device cpu")

    # Elastic checkpoints need a count of steps in the groups, which torch's classes have not.
    elastic = config(2, zero={"elastic_checkpoint": True})
    engine, optimizer = start(elastic, tiny=False)
    train(engine, optimizer, 0, 1)
    engine.save_checkpoint(os.path.join(folder, "elastic"), tag="x")
    engine.destroy()
    engine, optimizer = start(elastic, tiny=False)
    load = functools.partial(engine.load_checkpoint, os.path.join(folder, "elastic"), tag="x")
    ranks.refused(AssertionError, "", load)
    engine.destroy()

    layers = [torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda x, y: (x - y).square().mean())
    optimizer = dgg.AdamW(model.parameters())
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config(1))[0]
    check(engine, optimizer, "model parallel ranks beside ZeRO")

    # DeepSpeed keeps these for the whole process.
    for stage in (1, 2, 3):
        model = network()
        optimizer = build(model, "adamw", {})
        engine = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config(stage), mpu=EveryRankIsTensorParallel()
        )[0]
        check(engine, optimizer, "model parallel ranks beside ZeRO", call=stepping(engine))
        parallel_groups.mpu = None
    for stage in (1, 2, 3):
        half = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
        engine, optimizer = start(config(stage, **half))
        # Small, since DeepSpeed never lowers the scale of a step that overflows.
        check(engine, optimizer, "torch_autocast with float16", call=stepping(engine, 1e-4))
