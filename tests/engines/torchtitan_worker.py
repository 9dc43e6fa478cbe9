# SPDX-License-Identifier: BSD-3-Clause
"""A rank of torchtitan's Trainer on the CPU: two tasks of a small Llama over FSDP2, and a resume.

torchtitan trains on GPUs. What it asks of one is answered here for a CPU (`CPU`), and two of its
habits are changed, which gloo and our release of torch do not know. The rest is torchtitan's:
model, FSDP2, optimizer container, schedule, clipping, loop and checkpoints.
"""

from __future__ import annotations

import os
import shutil
import types
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torchtitan.tools.utils as devices

CPU = types.SimpleNamespace(
    set_device=lambda device: None, device_count=lambda: 1, current_device=lambda: 0,
    get_device_name=lambda device: "cpu", reset_peak_memory_stats=lambda: None,
    get_device_properties=lambda device: types.SimpleNamespace(total_memory=1 << 34),
    empty_cache=lambda: None, memory_stats=lambda device: {}, synchronize=lambda: None,
)  # fmt: skip
devices.device_type, devices.device_module = "cpu", CPU  # before the others import them

import torchtitan.distributed.utils as of_groups  # noqa: E402
from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import model_registry  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

import dgg  # noqa: E402
from ranks import in_group  # noqa: E402
from recipes import run_recipe  # noqa: E402

STEPS, SAVED = 4, 2
MAX_NORM = 0.5
LENGTH, WORDS = 16, 32


class Tokenizer(BaseTokenizer):
    """None is needed: the data are numbers."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, *, tokenizer_path):
        super().__init__()

    def encode(self, *args, **kwargs):
        raise NotImplementedError

    decode = encode

    def get_vocab_size(self):
        return 2 * WORDS


class Counting(BaseDataLoader):
    """Rows that count in steps of 1 (task 0) or 3 (task 1), in words of their own."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_rank, local_batch_size, **more):
        self.task, self.rank, self.rows, self.given = (
            int(config.dataset), dp_rank, local_batch_size, 0,
        )  # fmt: skip

    def __iter__(self):
        places = torch.arange(LENGTH + 1)
        while True:
            starts = torch.arange(self.rows) + self.rows * (2 * self.given + self.rank)
            row = (starts[:, None] + (1 + 2 * self.task) * places) % WORDS + WORDS * self.task
            self.given += 1
            positions = places[:LENGTH].expand(self.rows, -1).contiguous()
            yield {"input": row[:, :-1], "positions": positions}, row[:, 1:].contiguous()

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state_dict):
        self.given = state_dict["given"]


def small_llama():
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:1]
    for layer in spec.model.layers:  # FlexAttention has no backward pass on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


def train(out, task, *, load_from=None):
    """Trains a task, from its beginning or from the last checkpoint in ``out``; returns all."""
    guided = run_recipe("torchtitan", {"dgg": dgg, "task": task})["Guided"]
    chosen = default_adamw(lr=1e-3, alpha=1.0).param_groups
    trainer = Trainer.Config(
        model_spec=small_llama(), loss=CrossEntropyLoss.Config(), tokenizer=Tokenizer.Config(),
        dataloader=Counting.Config(dataset=str(task)),
        optimizer=guided.Config(
            param_groups=chosen, optimizer_factory_kwargs_by_name={"AdamW": {"seed": task}}
        ),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=2, global_batch_size=8, seq_len=LENGTH, steps=STEPS,
            max_norm=MAX_NORM, disable_cuda_graphs=True,
        ),
        # The default backend shards by an attention that needs a GPU.
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=SAVED, keep_latest_k=0, last_save_model_only=False,
            initial_load_path=load_from,
        ),
        metrics=MetricsProcessor.Config(log_freq=1), activation_checkpoint=None,
        dump_folder=out, debug=DebugConfig(seed=0, deterministic=True),
    ).build()  # fmt: skip
    assert trainer.gradient_accumulation_steps == 2
    for module in trainer.model_parts[0].modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    norms, injected = [], []
    log = trainer.metrics_processor.log
    trainer.metrics_processor.log = lambda *args, **more: (
        norms.append(args[3]),
        log(*args, **more),
    )
    (opt,) = trainer.optimizers

    def watch(*_):
        if trainer.step:  # not the step without gradients that makes room for a checkpoint
            injected.append(opt.guidance_stats())

    opt.register_step_post_hook(watch)
    trainer.train()
    named = dict(trainer.model_parts[0].named_parameters())
    state = {
        key: {n: opt.state[p][key].to_local().clone() for n, p in named.items()}
        for key in ("exp_avg", "anchor")
        if key in opt.state[named["norm.weight"]]
    }
    weights = {name: p.detach().to_local().clone() for name, p in named.items()}
    trainer.close()
    return types.SimpleNamespace(
        opt=opt, weights=weights, norms=norms, stats=injected, group=opt.param_groups[0], **state
    )


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@in_group
def two_tasks(rank, world, folder):
    """Clipped, accumulated, anchored where the second begins, resumed in its middle."""
    of_groups.set_pg_timeouts = lambda **groups: None  # needs a torch after 2.13
    first = train(f"{folder}/0", 0)
    assert type(first.opt) is dgg.AdamW
    assert not any(stats["injected"] for stats in first.stats) and max(first.norms) > MAX_NORM
    second = train(f"{folder}/1", 1, load_from=f"{folder}/0/checkpoint/step-{STEPS}")
    assert len(second.stats) == STEPS and all(stats["injected"] for stats in second.stats)
    # torch's norm over half a million float32 elements is off by 1e-4 on a CPU, dgg's is not.
    clipped = [float(stats["grad_norm"]) for stats in second.stats]
    assert max(clipped) <= MAX_NORM * 1.001 and min(second.norms) > 2 * MAX_NORM
    assert second.group["seed"] == second.group["task_index"] == 1
    assert second.group["draw_index"] == STEPS
    assert same(second.anchor, first.weights) and not same(second.weights, first.weights)
    dist.barrier()
    if rank == 0:
        for step in range(SAVED + 1, STEPS + 1):
            shutil.rmtree(f"{folder}/1/checkpoint/step-{step}", ignore_errors=True)
        assert os.listdir(f"{folder}/1/checkpoint") == [f"step-{SAVED}"]
    dist.barrier()
    again = train(f"{folder}/1", 1)
    assert len(again.stats) == STEPS - SAVED
    assert (again.group["task_index"], again.group["draw_index"]) == (1, STEPS)
    for key in ("weights", "anchor", "exp_avg"):
        assert same(getattr(again, key), getattr(second, key)), key
