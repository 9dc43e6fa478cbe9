# SPDX-License-Identifier: BSD-3-Clause
"""The variants in peers.py that a user installs: AdamW of other projects."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from report import first_line
from variant import Unavailable, Variant, arguments
from workload import FIRST_STEP, Setting, Workload


def _deepspeed_kernels(name: str) -> None:
    """Refuses kernels that DeepSpeed would first compile: minutes that nobody asked for.

    A compilation that was once interrupted leaves a lock behind for which torch waits forever.
    """
    from deepspeed.git_version_info import installed_ops

    if not installed_ops.get(name):
        raise Unavailable(
            f"its kernels are not built; install DeepSpeed with DS_BUILD_{name.upper()}=1"
        )


class _ForeignAdamW(Variant):
    """Somebody else's fused AdamW, where it is installed; neither guidance nor clipping."""

    guided = False
    foreign = True
    where: ClassVar[str] = "cuda"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        if workload.optimizer != "adamw" or setting.clipped:
            raise Unavailable("it is a plain AdamW")
        if workload.device.type != self.where:
            raise Unavailable(f"it runs on a {'GPU' if self.where == 'cuda' else 'CPU'} only")
        try:
            self.optimizer = self._build(self.params, **arguments(workload))
            for param, *moments in zip(self.params, *workload.moments, strict=True):
                self._seed_state(param, *moments)
        except Unavailable:
            raise
        except Exception as error:  # not installed, or built for another torch: all one here
            raise Unavailable(first_line(error)) from error

    @abc.abstractmethod
    def _build(self, params, **how) -> torch.optim.Optimizer: ...

    def _seed_state(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        state = self.optimizer.state[param]
        state.update(step=FIRST_STEP, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        for group in self.optimizer.param_groups:
            group["step"] = FIRST_STEP


class DeepSpeedCpuAdam(_ForeignAdamW):
    """DeepSpeed's AdamW for CPUs; one that computes something else ends the run."""

    name = "DeepSpeedCPUAdam"
    foreign = False
    where = "cpu"

    def _build(self, params, **how):
        _deepspeed_kernels("cpu_adam")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, adamw_mode=True, fp32_optimizer_states=False, **how)


class ApexFusedAdam(_ForeignAdamW):
    name = "apex FusedAdam"

    def _build(self, params, **how):
        from apex.optimizers import FusedAdam

        return FusedAdam(params, adam_w_mode=True, **how)


class DeepSpeedFusedAdam(_ForeignAdamW):
    """DeepSpeed's AdamW for GPUs."""

    name = "DeepSpeed FusedAdam"

    def _build(self, params, **how):
        _deepspeed_kernels("fused_adam")
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(params, adam_w_mode=True, **how)


class BitsAndBytes(_ForeignAdamW):
    """bitsandbytes with 32-bit state: the same arithmetic, a kernel per tensor."""

    name = "bitsandbytes AdamW32bit"

    def _build(self, params, **how):
        from bitsandbytes.optim import AdamW32bit

        return AdamW32bit(params, **how)

    def _seed_state(self, param, exp_avg, exp_avg_sq) -> None:
        self.optimizer.state[param].update(step=FIRST_STEP, state1=exp_avg, state2=exp_avg_sq)


class Optimi(_ForeignAdamW):
    """optimi's Triton kernels."""

    name = "optimi AdamW"

    def _build(self, params, **how):
        from optimi import AdamW

        return AdamW(params, triton=True, kahan_sum=False, **how)

    def _seed_state(self, param, exp_avg, exp_avg_sq) -> None:
        super()._seed_state(param, exp_avg, exp_avg_sq)
        for group in self.optimizer.param_groups:
            group["step"] = torch.tensor(FIRST_STEP, dtype=torch.int32)
