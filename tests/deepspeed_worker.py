# SPDX-License-Identifier: BSD-3-Clause
"""What every rank of tests/test_deepspeed.py runs; started by torch.multiprocessing."""

from __future__ import annotations

import datetime
import functools
import json
import logging
import os
import pathlib
import pickle
import sys

import torch
import torch.distributed as dist

import dgg

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
STEPS = 50
BOUNDARIES = (4, 30)
# After more steps some weight's rounding to 16 bits falls the other way.
STEPS_16_BITS = 20


def start(rank: int, world: int, folder: str) -> None:
    """Makes the process group; DeepSpeed takes the one that is there."""
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.path.join(folder, "store"), world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    import deepspeed.accelerator
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed would compile a collective of its own for the CPU, for minutes; gloo has it too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It refuses float16 on CPUs without instructions for it; torch computes it on every CPU.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True


def on_ranks(function):
    """Makes of a function what a rank runs: with the process group around it."""

    @functools.wraps(function)
    def run(rank: int, world: int, folder: str, *arguments) -> None:
        start(rank, world, folder)
        function(rank, world, folder, *arguments)
        dist.barrier()
        dist.destroy_process_group()

    return run


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
GUIDANCE = {"alpha": 0.5, "strength": 0.7, "seed": 2**63 + 9}


def build(model, rule: str, options: dict, *, tiny: bool = True):
    """Returns the optimizer of a case."""
    cls, defaults = RULES[rule]
    return cls(groups(model, tiny=tiny), **{**defaults, **GUIDANCE, **options})


def batch(k: int) -> torch.Tensor:
    """Returns the inputs of step k, the same on every rank."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1000 + k))


def loss_of(model, x: torch.Tensor) -> torch.Tensor:
    """Returns a loss in which every trainable parameter takes part."""
    return (model(x.to(next(model.parameters()).dtype)).float() - x.sum(1, True)).square().mean()


def alone(rule="adamw", options=None, clip=None, last=STEPS, model="network"):
    """The run without DeepSpeed, by the same optimizer, that clips for itself."""
    model = MODELS["network" if model == "zero.Init" else model]()
    optimizer = build(model, rule, {"max_grad_norm": clip, **(options or {})})
    stats = []
    for k in range(last):
        if k in BOUNDARIES:
            optimizer.set_anchor()
        loss_of(model, batch(k)).backward()
        optimizer.step()
        optimizer.zero_grad()
        stats.append(optimizer.guidance_stats())
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
        model = MODELS[case["model"]]()
        optimizer = build(model, case["rule"], case["options"])
        engine = engine_of(model, optimizer, config(**case["config"]))
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


@on_ranks
def run_checkpoints(rank: int, world: int, folder: str, cases: list[dict]) -> None:
    """Saves in the middle of a task, goes on, and goes on again from the file: the same bits."""
    results = []
    for number, case in enumerate(cases):
        saved = os.path.join(folder, f"saved {number}")

        def made(case=case):
            model = network()
            optimizer = build(model, case["rule"], case["options"], tiny=False)
            return engine_of(model, optimizer, config(**case["config"])), optimizer

        engine, optimizer = made()
        train(engine, optimizer, 0, 4)
        boundary = whole_weights(engine)
        train(engine, optimizer, 4, 8)
        engine.save_checkpoint(saved, tag="middle")
        train(engine, optimizer, 8, 14)
        expected = whole_weights(engine)
        engine.destroy()
        engine, optimizer = made()
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
        model = network()
        optimizer = build(model, case["rule"], case["options"], tiny=False)
        engine = engine_of(model, optimizer, config(**case["config"]))
        try:
            engine.load_checkpoint(os.path.join(saved, f"saved {number}"), tag="middle")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("loaded")
        engine.destroy()

        def universal(number=number, case=case):
            changes = {**case["config"], "checkpoint": {"load_universal": True}}
            model = network()
            optimizer = build(model, case["rule"], case["options"], tiny=False)
            engine = engine_of(model, optimizer, config(**changes))
            kept = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
            engine.load_checkpoint(os.path.join(saved, f"saved {number}"), tag="universal")
            # Under ZeRO-3 DeepSpeed gives every group the settings of the first.
            for group, (lr, decay) in zip(optimizer.param_groups, kept, strict=True):
                group.update(lr=lr, weight_decay=decay)
            return engine, optimizer

        engine, optimizer = universal()
        loaded = whole_weights(engine)
        try:
            train(engine, optimizer, 8, 9)
        except RuntimeError as error:
            messages.append(str(error))
        else:
            messages.append("stepped without an anchor")
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


@on_ranks
def run_accelerate(rank: int, world: int, folder: str, cases: list[dict]) -> None:
    """The same training through accelerate's plugin; clipping is the configuration's."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    def prepared(case):
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = DeepSpeedPlugin(hf_ds_config=config(case["stage"]))
        accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=case["precision"])
        assert accelerator.distributed_type == DistributedType.DEEPSPEED
        model = MODELS[case["model"]]()
        made = build(model, "adamw", {})
        model, wrapped = accelerator.prepare(model, made)
        assert dgg.unwrap(wrapped) is made
        return accelerator, model, wrapped

    def run(accelerator, model, wrapped, first, last):
        for k in range(first, last):
            if k in BOUNDARIES:
                dgg.unwrap(wrapped).set_anchor()
            accelerator.backward(loss_of(model, batch(k)))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            wrapped.step()
            wrapped.zero_grad()
        assert dgg.unwrap(wrapped).param_groups[0]["draw_index"] == last
        return whole_weights(model)

    results = []
    for number, case in enumerate(cases):
        saved = os.path.join(folder, f"saved {number}")
        last = STEPS if case["precision"] == "no" else STEPS_16_BITS
        made = prepared(case)
        if case["resumed"]:
            # In the middle of a guided task.
            run(*made, 0, 8)
            made[0].save_state(saved)
            expected = run(*made, 8, 14)
            made[1].destroy()
            made = prepared(case)
            made[0].load_state(saved)
            assert all(map(torch.equal, run(*made, 8, 14), expected)), case
            results.append(run(*made, 14, last))
        else:
            results.append(run(*made, 0, last))
        made[1].destroy()
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))


VOCAB, LENGTH = 24, 8


def language_model(adapters: bool = False) -> torch.nn.Module:
    """A tiny Llama with tied embeddings, the same every time; frozen but for adapters or not."""
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    if not adapters:
        return model
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def task_data(stride: int) -> list[dict]:
    """Sequences that count in steps of ``stride``."""
    starts = torch.arange(64) % VOCAB
    rows = (starts[:, None] + stride * torch.arange(LENGTH)) % VOCAB
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


class Stop(Exception):
    """Ends a training in the middle."""


def trainer_of(model, task: int, out: str, deepspeed, *, size: int, steps=10, die=False):
    """A Trainer of one task: under DeepSpeed if there is a configuration, else alone."""
    import transformers

    from dgg.hf import GuidanceCallback

    class Die(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise Stop

    arguments = transformers.TrainingArguments(
        output_dir=out, per_device_train_batch_size=size, max_steps=steps, max_grad_norm=0.5,
        logging_steps=1, save_strategy="steps", save_steps=5, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=3, dataloader_pin_memory=False, lr_scheduler_type="constant",
        learning_rate=5e-3,
        deepspeed=deepspeed,
    )  # fmt: skip
    options = {"lr": 5e-3, "eps": 1e-3, "alpha": 0.5, "seed": 5}
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=task_data(1 + task),
        optimizer_cls_and_kwargs=(dgg.AdamW, options),
        callbacks=[GuidanceCallback(task=task), *([Die()] if die else [])],
    )


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """Returns the trained weights, whole, by their names in the model."""
    from types import SimpleNamespace

    model = trainer.accelerator.unwrap_model(trainer.model)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, whole_weights(SimpleNamespace(module=model)), strict=True))


def two_tasks(folder: str, stage: int | None, size: int, adapters: bool):
    """Trains two tasks, each by a Trainer of its own; the second goes on from a checkpoint."""
    path = None if stage is None else str(DOCS / f"deepspeed_zero{stage}.json")
    model = language_model(adapters)
    first = trainer_of(model, 0, os.path.join(folder, "first"), path, size=size)
    first.train()
    state = weights_of(first)
    logs = []
    for name in ("second", "interrupted"):
        if name == "interrupted" and stage is None:
            break
        out = os.path.join(folder, name)
        model = language_model(adapters)
        model.load_state_dict(state, strict=False)
        second = trainer_of(model, 1, out, path, size=size, die=name == "interrupted")
        if name == "interrupted":
            try:
                second.train()
            except Stop:
                pass
            model = language_model(adapters)
            # What it was before: a checkpoint of adapters has only them.
            model.load_state_dict(state, strict=False)
            second = trainer_of(model, 1, out, path, size=size)
            second.train(resume_from_checkpoint=True)
        else:
            second.train()
        logs.append((weights_of(second), second.state.log_history))
        optimizer = dgg.unwrap(second.optimizer)
        assert optimizer.param_groups[0]["draw_index"] == 10
        assert optimizer.param_groups[0]["task_index"] == 1
    return logs


@on_ranks
def run_trainer(rank: int, world: int, folder: str, adapters: bool) -> None:
    """Two tasks through the Trainer, with the documented configurations."""
    for stage in (2, 3):
        logs = two_tasks(os.path.join(folder, f"stage {stage}"), stage, 4, adapters)
        if rank == 0:
            torch.save(logs, os.path.join(folder, f"results {stage}.pt"))
    if adapters:
        return

    # An optimizer of DeepSpeed's own in the place of ours.
    block = {"optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}}}
    out = os.path.join(folder, "block")
    trainer = trainer_of(language_model(), 0, out, config(2, **block), size=4)
    message = "trained"
    try:
        trainer.train()
    except TypeError as error:
        message = str(error)
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
    for stage in (2, 3):
        model = network()
        optimizer = build(model, "adamw", {"alpha": 1.0})
        engine = engine_of(model, optimizer, config(stage, fp16=half))
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
            engine.backward(loss_of(engine, batch(k)))
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


def refused(error, text, call) -> None:
    """Checks that a call raises this error with this text."""
    try:
        call()
    except error as found:
        assert text in str(found), found
    else:
        raise AssertionError(f"{text!r} was not refused")


@on_ranks
def run_misuses(rank: int, world: int, folder: str) -> None:
    """What cannot be had says so on every rank, and changes nothing."""

    def engine_with(options, configuration, dtype=torch.float32):
        model = network(dtype)
        optimizer = build(model, "adamw", options)
        return engine_of(model, optimizer, configuration), optimizer

    def step(engine):
        engine.backward(loss_of(engine, batch(0)))
        engine.step()

    for stage in (1, 2, 3):
        engine, optimizer = engine_with({}, config(stage))
        refused(RuntimeError, "dgg.ReplayBuffer.mix", optimizer.replay)
        step(engine)
        refused(RuntimeError, "dgg.ReplayBuffer.mix", optimizer.replay)
        copied = pickle.loads(pickle.dumps(optimizer)) if stage < 3 else None
        if copied is not None:
            for group in copied.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            refused(RuntimeError, "set optimizer.process_group", copied.step)

        # By name: every rank has its part of the whole tensors.
        named = {n: torch.randn(p.shape) for n, p in network().named_parameters()}
        optimizer.set_anchor(named, model=engine.module)
        optimizer.set_anchor(named)
        assert optimizer.param_groups[0]["task_index"] == 2
        pieces = [p for p in optimizer._driver._partitions]
        for piece in pieces:
            for f in piece.fragments:
                whole = named[piece.members[f.member].name].flatten()
                found = optimizer.state[piece.tensor]["anchor"][f.start : f.start + f.count]
                assert torch.equal(found, whole[f.base : f.base + f.count])
        values = [optimizer.state[piece.tensor]["anchor"].clone() for piece in pieces]
        lacking = {n: x for n, x in named.items() if n != "5.bias"}
        refused(KeyError, "5.bias", lambda o=optimizer, t=lacking: o.set_anchor(t))
        wrong = {**named, "0.weight": torch.zeros(3)}
        refused(ValueError, "0.weight", lambda o=optimizer, t=wrong: o.set_anchor(t))
        for piece, value in zip(pieces, values, strict=True):
            assert torch.equal(optimizer.state[piece.tensor]["anchor"], value)
        step(engine)
        optimizer.clear_anchor()
        assert not any("anchor" in entry for entry in optimizer.state.values())
        step(engine)
        assert not bool(optimizer.guidance_stats()["injected"])
        engine.destroy()

    bf16 = {"bf16": {"enabled": True}}
    group = {"process_group": dist.group.WORLD}
    for options, error, text, changes, dtype in (
        ({"stochastic_rounding": True}, ValueError, "stochastic_rounding", bf16, torch.bfloat16),
        (group, ValueError, "its own process group is used", {}, torch.float32),
    ):
        engine, optimizer = engine_with(options, config(2, **changes), dtype)
        refused(error, text, optimizer.set_anchor)
        refused(error, text, lambda e=engine: step(e))
        engine.destroy()

    unmeasured = config(2, gradient_clipping=0.0, zero={"compute_grad_norm": False})
    engine, optimizer = engine_with({"alpha": 1.0}, unmeasured)
    step(engine)
    optimizer.set_anchor()
    refused(RuntimeError, "compute_grad_norm", lambda: step(engine))
    engine.destroy()

    model = network()
    inner = torch.optim.AdamW(groups(model)[:2], lr=1e-2)
    dgg.Guidance(inner, alpha=1.0)
    engine = engine_of(model, inner, config(2))
    refused(RuntimeError, "use dgg.AdamW", lambda: step(engine))
    engine.destroy()

    # DeepSpeed's own errors for the two settings that the documented files have.
    untested = {k: v for k, v in config(2).items() if k != "zero_allow_untested_optimizer"}
    refused(AssertionError, "zero_allow_untested_optimizer", lambda: engine_with({}, untested))
    offload = {"offload_optimizer": {"device": "cpu"}}
    forced = {k: v for k, v in config(2, zero=offload).items() if "force" not in k}
    refused(Exception, "zero_force_ds_cpu_optimizer", lambda: engine_with({}, forced))

    # Partitions of an engine that nobody knows.
    optimizer = dgg.AdamW(network().parameters(), alpha=1.0)
    flat = torch.zeros(5, requires_grad=True)
    flat.grad = torch.ones(5)
    optimizer.param_groups[0]["params"] = [flat]
    refused(RuntimeError, "process_group=", optimizer.step)
    refused(RuntimeError, "process_group=", optimizer.set_anchor)
    assert not flat.any()
    optimizer.process_group = dist.group.WORLD
    optimizer.step()
    assert flat.any()


@on_ranks
def run_padding(rank: int, world: int, folder: str) -> None:
    """ZeRO-3 leaves the padding of its partitions as the memory was: NaN there harms nothing."""
    model = network()
    optimizer = build(model, "adamw", {})
    engine = engine_of(model, optimizer, config(3))
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
