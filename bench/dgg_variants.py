# SPDX-License-Identifier: BSD-3-Clause
"""The variants in peers.py that are dgg: its backends, and its guidance over torch's optimizer."""

from __future__ import annotations

from typing import ClassVar

import torch
from dgg.kernels.layout import CHUNK

import dgg
from dgg import backends
from gpu import launch_driver
from variant import Unavailable, Variant, arguments, guidance, preset, torch_optimizer
from workload import Setting, VerificationError, Workload


class _Guiding(Variant):
    """Has an optimizer of ours, made by `_build`, which keeps replay gradients apart."""

    guided = replays = automatic = weighs = True
    backend: ClassVar[str]

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        if (reason := backends.unavailable(self.backend, workload.device)) is not None:
            raise Unavailable(reason)
        self.optimizer = self._build(**guidance(workload, setting, self.seed, self.backend))
        if setting.alpha is not None:
            workload.set_anchors(self.optimizer, self.params)

    def ready(self) -> None:
        """The same, and the replay gradients wait for the step."""
        super().ready()
        if self.setting.replay:
            self.optimizer.clear_replay()
            self.record()

    def record(self) -> None:
        """A block with a backward pass that makes the replay gradients."""
        with self.optimizer.replay():
            for param, replay in zip(self.params, self.workload.replays, strict=True):
                param.grad = replay

    def seek(self, draw: int) -> None:
        """Goes to a draw index; it stands in the groups, as after a resume."""
        super().seek(draw)
        for group in self.optimizer.param_groups:
            group["draw_index"] = draw


class Dgg(_Guiding):
    """The package under test; it draws for itself."""

    def _build(self, **how: object) -> torch.optim.Optimizer:
        kind = dgg.AdamW if self.workload.optimizer == "adamw" else dgg.SGD
        optimizer = kind(self.params, **arguments(self.workload), **how)
        preset(optimizer, self.params, self.workload)
        return optimizer

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns the defaults of torch.testing: dgg has no excuse."""
        relative = {torch.float32: 1.3e-6, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
        return relative[dtype], 1e-5

    def elements_moved(self) -> float | None:
        """One pass; the gradients once more for their norm; the anchor when it is used."""
        normed = self.setting.clipped or self.setting.alpha is not None
        gradients = 1.0 + self.setting.replay
        pull = self.share_injected() * (1.0 + bool(self.setting.importance))
        measured = 0.0
        if self.setting.automatic:  # θ, θ* and F once more, beside the gradients
            measured = 2.0 + bool(self.setting.importance)
        return self._update_arrays() - 1.0 + gradients * (1 + normed) + pull + measured


class DggCpp(Dgg):
    name, backend = "dgg cpp", "cpp"


class DggCppBlock(DggCpp):
    """The same with the block timed that takes the replay gradients apart from the others.

    The backward pass in it is not a step's affair: assigning the gradients stands for it.
    """

    name = "dgg cpp, replay() timed"
    needs: ClassVar[dict[str, str]] = {"replay": "dgg cpp"}

    def ready(self) -> None:
        """Gradients alone; what is kept from a step that was not taken is dropped."""
        Variant.ready(self)
        self.optimizer.clear_replay()

    def step(self, inject: bool) -> None:
        """The block, then the step."""
        self.record()
        super().step(inject)


class DggTriton(Dgg):
    name, backend = "dgg triton", "triton"


class DggLaunched(DggTriton):
    """Launched steps as the host makes them, with a driver that starts nothing.

    Its time is the host's for a GPU, less what only a GPU's driver does; see launch_driver.py.
    """

    name = "dgg triton, nothing started"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        if workload.device.type != "cpu":
            raise Unavailable("on a GPU the steps of dgg triton are launched")
        try:
            self._driver = launch_driver.install()
        except RuntimeError as reason:
            raise Unavailable(str(reason)) from reason
        super().__init__(workload, setting)

    def verified_elsewhere(self) -> float:
        """Compares what the interpreter computes, and looks at what is started here.

        Raises:
            VerificationError: A step is wrong, or does not start what it has to.
        """
        work, setting = self.workload, self.setting
        dtype = str(work.dtype).removeprefix("torch.")
        try:
            error = launch_driver.interpreted(work.optimizer, dtype)[setting.name]
        except RuntimeError as reason:
            raise VerificationError(f"{self.name} ({setting.name}): {reason}") from reason
        chunks = sum(max(1, -(-p.numel() // CHUNK)) for p in self.params)
        update = "adam_kernel" if work.optimizer == "adamw" else "sgd_kernel"
        # The norms' kernel where there is a norm, and always the update: once, over all chunks.
        wanted = [(update, chunks)]
        if setting.clipped or setting.alpha is not None:
            wanted.append(("norms_kernel", chunks))
        for _ in range(2):
            self.ready()
            started = launch_driver.started_by(self._driver, self)
            large = [launch for launch in started if launch[0] in ("norms_kernel", update)]
            if sorted(large) != sorted(wanted):
                raise VerificationError(
                    f"{self.name} ({setting.name}) starts {started}, not {wanted}"
                )
        self.seek(0)
        return error

    def elements_moved(self) -> float | None:
        """Nothing is."""
        return None


class DggReference(Dgg):
    """The specification in plain torch; slow by intent, never an opponent."""

    name, backend = "dgg reference", "reference"

    def elements_moved(self) -> float | None:
        """Not accounted: float32 copies of everything."""
        return None


class GuidanceOverFused(_Guiding):
    """`dgg.Guidance` over torch's fused optimizer: the gradients are edited, torch steps."""

    name = "dgg Guidance + torch fused"
    built_on, backend = "torch fused", "cpp"

    def _build(self, **how: object) -> torch.optim.Optimizer:
        if self.setting.alpha is None and not self.setting.clipped and not self.setting.replay:
            raise Unavailable("without anything to do to the gradients it is torch fused")
        self._torch = torch_optimizer(self.params, self.workload, fused=True)
        return dgg.Guidance(self._torch, **how)

    def step(self, inject: bool) -> None:
        """Torch's step; the guidance hangs on it."""
        self._torch.step()

    def elements_moved(self) -> float | None:
        """Norms: g, r, and d's two; the edit: g twice, r, d's two; the update."""
        gradients = 1.0 + self.setting.replay
        edit = gradients + 1.0 + 2.0 * self.share_injected()
        return self._update_arrays() + gradients + 2.0 * self.share_injected() + edit
