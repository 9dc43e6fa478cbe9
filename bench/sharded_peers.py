# SPDX-License-Identifier: BSD-3-Clause
"""What sharded.py compares: the parameters of its cases, the variants, and the float64 check."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

import dgg
from dgg_variants import DggCpp
from parameter_lists import count
from torch_variants import TorchFused, TorchFusedForeachClip, guide_by_foreach
from variant import Variant, arguments, guidance
from workload import CLIPPED, GUIDED, PLAIN, Setting, VerificationError, largest_error, sampled

ALPHA = sampled(0.2)
MAX_NORM = 1.0
# ‖g‖ is twice the largest norm allowed: clipping is always at work.
GRAD_NORM = 2.0
# Steps in a row that are compared with the reference, so that what dgg measures ahead is used.
VERIFIED_STEPS = 3

FUSED, FOREACH, LOOP = "torch fused", "torch foreach", "torch for-loop"
FOREACH_CLIP, EAGER, BY_HAND = "torch fused, foreach clip", "foreach guidance", "by hand on shards"
RUNS: list[tuple[str, Setting]] = [
    *(("dgg cpp", s) for s in (PLAIN, CLIPPED, GUIDED, ALPHA)),
    *((name, s) for name in (FUSED, FOREACH, LOOP) for s in (PLAIN, CLIPPED)),
    (FOREACH_CLIP, CLIPPED),
    (EAGER, GUIDED),
    *((BY_HAND, s) for s in (PLAIN, CLIPPED, GUIDED)),
]


class Sharded:
    """Parameters, gradients and anchors of one case, the same numbers on any number of ranks."""

    optimizer, lr = "adamw", 1e-3
    dtype = torch.float32
    device = torch.device("cpu")
    max_grad_norm = MAX_NORM
    # Steps begin without any, as in a training.
    moments = ()

    def __init__(self, shapes: Sequence[tuple[int, ...]], mesh) -> None:
        self.shapes, self.mesh, self.elements = shapes, mesh, count(shapes)
        self._grads = [self.shard(x).to_local() for x in self.whole("grads")]

    def whole(self, what: str) -> list[Tensor]:
        """Returns unsharded float32 tensors: ``anchors``, ``moved`` (θ) or ``grads``."""
        seed, std = {
            "anchors": (1, 1.0), "moved": (2, 2.0), "grads": (3, GRAD_NORM / self.elements**0.5),
        }[what]  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) * std for shape in self.shapes]

    def shard(self, whole: Tensor):
        """Returns a whole tensor as a DTensor; nothing is sent."""
        from torch.distributed.tensor import Shard, distribute_tensor

        return distribute_tensor(whole, self.mesh, [Shard(0)], src_data_rank=None)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns new DTensor parameters that stand at the anchors."""
        return [torch.nn.Parameter(self.shard(x)) for x in self.whole("anchors")]

    def set_anchors(self, optimizer, params) -> None:
        """Makes an optimizer of ours set its anchors, where the parameters stand."""
        optimizer.set_anchor()

    def local_grads(self) -> list[Tensor]:
        """Returns this rank's gradients, in new memory."""
        return [grad.clone() for grad in self._grads]


class OverShards(Variant):
    """What a variant does otherwise where its parameters are DTensors."""

    def __init__(self, workload: Sharded, setting: Setting) -> None:
        # The parameters stand at the anchors while the optimizer is made.
        super().__init__(workload, setting)
        self.locals = [param.detach().to_local() for param in self.params]
        for param, moved in zip(self.locals, workload.whole("moved"), strict=True):
            param.copy_(workload.shard(moved).to_local())

    def ready(self) -> None:
        """Gives every parameter a new gradient, as a backward pass does."""
        from torch.distributed.tensor import DTensor

        for param, grad in zip(self.params, self.workload.local_grads(), strict=True):
            place = param.device_mesh, param.placements
            how = {"run_check": False, "shape": param.shape, "stride": param.stride()}
            param.grad = DTensor.from_local(grad, *place, **how)

    def results(self) -> dict[str, list[Tensor]]:
        """Returns this rank's shards of parameters and first moments."""
        moments = [self.optimizer.state[param]["exp_avg"].to_local() for param in self.params]
        return {"θ": self.locals, "m": moments}


class Ours(OverShards, DggCpp):
    """The package under test."""

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        return 1e-5, 0.0  # what float32 arithmetic leaves


class Fused(OverShards, TorchFused):
    """torch.optim.AdamW over DTensors, behind torch.nn.utils.clip_grad_norm_ if it clips."""


class Foreach(Fused):
    """The same with foreach=True."""

    name = FOREACH
    how: ClassVar[dict[str, bool]] = {"foreach": True}


class Loop(Fused):
    """The same, a parameter after the other."""

    name = LOOP
    how: ClassVar[dict[str, bool]] = {"foreach": False, "fused": False}


class FusedForeachClip(OverShards, TorchFusedForeachClip):
    """torch fused with the clipping told to use foreach."""


class ForeachGuidance(Fused):
    """Guidance by torch._foreach_* over DTensors, between clipping and the fused optimizer."""

    name = EAGER
    guided = True

    def __init__(self, workload: Sharded, setting: Setting) -> None:
        super().__init__(workload, setting)
        self._anchors = [workload.shard(x) for x in workload.whole("anchors")]

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Clips, guides, steps; the norm that the clipping found is used again."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        if inject:
            guide_by_foreach(
                self.params, self._anchors, grad_norm=torch.clamp(norm, max=MAX_NORM),
                norm=functools.partial(torch.nn.utils.get_total_norm, foreach=True),
            )  # fmt: skip
        self.optimizer.step()


class ByHand(OverShards):
    """What a careful user writes without dgg: plain local shards, one all-reduce, torch fused.

    The optimizer holds plain tensors then: what is saved of it are one rank's shards.
    """

    name = BY_HAND
    guided = True

    def __init__(self, workload: Sharded, setting: Setting) -> None:
        super().__init__(workload, setting)
        self._shards = [torch.nn.Parameter(x) for x in self.locals]
        self._anchors = [workload.shard(x).to_local() for x in workload.whole("anchors")]
        self.optimizer = torch.optim.AdamW(self._shards, **arguments(workload), fused=True)

    def ready(self) -> None:
        """As for the others; the parameters of the model stay DTensors."""
        for shard, grad in zip(self._shards, self.workload.local_grads(), strict=True):
            shard.grad = grad

    @torch.no_grad()
    def step(self, inject: bool) -> None:
        """Clips and guides with both norms in one all-reduce."""
        if self.setting.clipped:
            grads = [shard.grad for shard in self._shards]
            measured = [grads]
            if inject:
                measured.append(torch._foreach_sub(self._shards, self._anchors))
            norms = [torch.stack(torch._foreach_norm(x)).double() for x in measured]
            squares = torch.stack([x.square().sum() for x in norms])
            dist.all_reduce(squares, group=self.workload.mesh.get_group())
            norm, *distance = squares.sqrt().tolist()
            clip = min(1.0, MAX_NORM / (norm + 1e-6))
            torch._foreach_mul_(grads, clip)
            if inject:
                scale = min(1.0, clip * norm / distance[0])
                torch._foreach_add_(grads, measured[1], alpha=scale)
            del measured
        self.optimizer.step()

    def results(self) -> dict[str, list[Tensor]]:
        moments = [self.optimizer.state[shard]["exp_avg"] for shard in self._shards]
        return {"θ": self.locals, "m": moments}


IMPLEMENTATIONS: dict[str, type[OverShards]] = {
    kind.name: kind
    for kind in (Ours, Fused, Foreach, Loop, FusedForeachClip, ForeachGuidance, ByHand)
}


class Oracle:
    """The same steps unsharded, in float64, by dgg's reference backend."""

    def __init__(self, work: Sharded) -> None:
        self._work = work
        self._found: dict[str, dict[str, list[Tensor]]] = {}

    def results(self, variant: OverShards, draw: int) -> dict[str, list[Tensor]]:
        """Returns this rank's shards of parameters and first moments after the verified steps."""
        setting = variant.setting
        if setting.name not in self._found:
            params = [torch.nn.Parameter(x.double()) for x in self._work.whole("anchors")]
            how = guidance(self._work, setting, variant.seed, "reference")
            optimizer = dgg.AdamW(params, **arguments(self._work), **how)
            if setting.alpha is not None:
                optimizer.set_anchor()
            optimizer.param_groups[0]["draw_index"] = draw
            grads = [x.double() for x in self._work.whole("grads")]
            with torch.no_grad():
                for param, moved in zip(params, self._work.whole("moved"), strict=True):
                    param.copy_(moved)
            for _ in range(VERIFIED_STEPS):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad.clone()
                optimizer.step()
            moments = [optimizer.state[param]["exp_avg"] for param in params]
            self._found[setting.name] = {
                name: [self._work.shard(x.detach()).to_local().clone() for x in tensors]
                for name, tensors in (("θ", params), ("m", moments))
            }
        return self._found[setting.name]


def verify(variant: OverShards, oracle: Oracle) -> float:
    """Takes the first steps of a variant and compares them; only then it may be timed.

    Every rank compares its shards; a mistake on one is an error on all.

    Returns:
        The largest error in units of the variant's tolerance.

    Raises:
        VerificationError: The variant computes something else. On all ranks.
    """
    draw = 0
    if variant.setting.alpha not in (None, 0.0, 1.0):
        # A step that does not inject before one that does: the first one measures ahead.
        while variant.kind() != (False, True):
            draw += 1
            variant.seek(draw)
    for _ in range(VERIFIED_STEPS):
        variant.ready()
        variant()
    variant.seek(0)
    tolerance, _ = variant.tolerance(torch.float32)
    expected = oracle.results(variant, draw)
    own = largest_error(
        (got.double(), want, tolerance * (want.square().mean().sqrt() + want.abs()))
        for name, tensors in variant.results().items()
        for got, want in zip(tensors, expected[name], strict=True)
    )
    found = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, own)
    worst = max(found)
    if not worst <= 1.0:
        raise VerificationError(
            f"{variant.name} ({variant.setting.name}) on {dist.get_world_size()} ranks is "
            f"{worst:.3g} times its tolerance away from the float64 reference and is not timed"
        )
    variant.verified = True
    return worst
