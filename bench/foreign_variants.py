# SPDX-License-Identifier: BSD-3-Clause
"""The variants in peers.py that a user installs: AdamW of other projects."""

from __future__ import annotations

import importlib
from typing import ClassVar

import torch
from torch import Tensor

from report import first_line
from variant import Unavailable, Variant, arguments
from workload import FIRST_STEP, Setting, Workload


class _ForeignAdamW(Variant):
    """Somebody else's fused AdamW, where it is installed; neither guidance nor clipping.

    It is the class ``kind`` of ``module``, told ``how`` beside the hyper-parameters, and runs on a
    device of the type ``where``. ``kernels`` are those of DeepSpeed that it calls. Where they are
    not built it is refused: DeepSpeed would first compile them, minutes that nobody asked for. A
    compilation that was once interrupted leaves a lock behind for which torch waits forever.
    """

    foreign = True
    module: ClassVar[str]
    kind: ClassVar[str]
    how: ClassVar[dict[str, bool]] = {}
    where: ClassVar[str] = "cuda"
    kernels: ClassVar[str | None] = None

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        if workload.optimizer != "adamw" or setting.clipped:
            raise Unavailable("it is a plain AdamW")
        if workload.device.type != self.where:
            raise Unavailable(f"it runs on a {'GPU' if self.where == 'cuda' else 'CPU'} only")
        try:
            if self.kernels is not None:
                from deepspeed.git_version_info import installed_ops

                if not installed_ops.get(self.kernels):
                    variable = f"DS_BUILD_{self.kernels.upper()}=1"
                    reason = f"its kernels are not built; install DeepSpeed with {variable}"
                    raise Unavailable(reason)
            kind = getattr(importlib.import_module(self.module), self.kind)
            self.optimizer = kind(self.params, **self.how, **arguments(workload))
            for param, *moments in zip(self.params, *workload.moments, strict=True):
                self._seed_state(param, *moments)
        except Unavailable:
            raise
        except Exception as error:  # not installed, or built for another torch: all one here
            raise Unavailable(first_line(error)) from error

    def _seed_state(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        state = self.optimizer.state[param]
        state.update(step=FIRST_STEP, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        for group in self.optimizer.param_groups:
            group["step"] = FIRST_STEP


class DeepSpeedCpuAdam(_ForeignAdamW):
    """DeepSpeed's AdamW for CPUs; one that computes something else ends the run."""

    name = kind = "DeepSpeedCPUAdam"
    module, kernels = "deepspeed.ops.adam", "cpu_adam"
    how: ClassVar[dict[str, bool]] = {"adamw_mode": True, "fp32_optimizer_states": False}
    foreign, where = False, "cpu"


class ApexFusedAdam(_ForeignAdamW):
    name = "apex FusedAdam"
    module, kind = "apex.optimizers", "FusedAdam"
    how: ClassVar[dict[str, bool]] = {"adam_w_mode": True}


class DeepSpeedFusedAdam(_ForeignAdamW):
    """DeepSpeed's AdamW for GPUs."""

    name = "DeepSpeed FusedAdam"
    module, kind, kernels = "deepspeed.ops.adam", "FusedAdam", "fused_adam"
    how: ClassVar[dict[str, bool]] = {"adam_w_mode": True}


class BitsAndBytes(_ForeignAdamW):
    """bitsandbytes with 32-bit state: the same arithmetic, a kernel per tensor."""

    name = "bitsandbytes AdamW32bit"
    module, kind = "bitsandbytes.optim", "AdamW32bit"

    def _seed_state(self, param, exp_avg, exp_avg_sq) -> None:
        self.optimizer.state[param].update(step=FIRST_STEP, state1=exp_avg, state2=exp_avg_sq)


class Optimi(_ForeignAdamW):
    """optimi's Triton kernels."""

    name = "optimi AdamW"
    module, kind = "optimi", "AdamW"
    how: ClassVar[dict[str, bool]] = {"triton": True, "kahan_sum": False}

    def _seed_state(self, param, exp_avg, exp_avg_sq) -> None:
        super()._seed_state(param, exp_avg, exp_avg_sq)
        for group in self.optimizer.param_groups:
            group["step"] = torch.tensor(FIRST_STEP, dtype=torch.int32)
