# SPDX-License-Identifier: BSD-3-Clause
"""The tensors a benchmark case steps on, and the check of a step against the float64 reference.

All variants of a case work on the same memory, each through Parameters with version counters of
their own. That is fair (no variant is lucky with its pages), and a case of 10**8 elements needs 6
arrays instead of 5 per variant. A variant therefore finds parameters that others have moved; what
it computes, and how long it takes, does not depend on that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dgg import reference

LR, BETA1, BETA2, EPS, WEIGHT_DECAY, MOMENTUM = 1e-2, 0.9, 0.999, 1e-8, 0.01, 0.9
# Adam's step count before the first call: bias corrections that are neither 0 nor 1.
FIRST_STEP = 10

# Float64 copies are made of so many elements at a time: on a CPU they stay in the cache, elsewhere
# each costs launches and a wait.
_CHUNK, _CHUNK_ELSEWHERE = 2**17, 2**25
# The update is compared on the CPU, whatever the device: what comes from elsewhere is less.
_SAMPLE, _SAMPLE_ELSEWHERE = 2**15, 2**12
_SAMPLED_TENSORS = 32
_GRADIENT_SEED = 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """What kind of step is taken."""

    name: str
    alpha: float | None  # probability of injecting; None: there is no anchor at all
    clipped: bool
    replay: bool = False  # there are replay gradients, too, which are added to the others
    importance: float = 0.0
    automatic: bool = False  # alpha="auto": the replay gradients decide how strong the pull is


PLAIN = Setting("plain", None, False)
CLIPPED = Setting("clipped", None, True)
GUIDED = Setting("guided", 1.0, True)
REPLAY = Setting("replay", None, False, replay=True)
REPLAY_CLIPPED = Setting("replay, clipped", None, True, replay=True)
REPLAY_GUIDED = Setting("replay, guided", 1.0, True, replay=True)
SETTINGS = (PLAIN, CLIPPED, GUIDED, REPLAY, REPLAY_CLIPPED, REPLAY_GUIDED)
WEIGHTED = Setting("guided, importance", 1.0, True, importance=1.0)
AUTO = Setting("auto", 1.0, True, replay=True, automatic=True)
AUTO_WEIGHTED = Setting("auto, importance", 1.0, True, True, importance=1.0, automatic=True)


def sampled(alpha: float) -> Setting:
    """Returns the setting of a guided run that injects at a share of the steps."""
    return Setting(f"alpha={alpha:g}", alpha, True)


class Workload:
    """Parameters, gradients, anchors and moments of one case.

    Args:
        shapes: Shapes of the parameters.
        dtype: Dtype of all of them; moments and anchors have it too, as in torch.optim.
        optimizer: "adamw", "sgd" or "momentum".
        device: Where they live.
        spare: Draw the gradients anew instead of keeping a copy to restore them from; for lists
            that fill the memory.
        replay: There are replay gradients, too.
        channels_last: All tensors (of four dimensions) lie in memory channels last.
        conflict: Replay gradients contradict the others, and going back to the anchors helps them,
            so that alpha="auto" pulls at every step.
    """

    lr = LR

    def __init__(
        self, shapes, dtype: torch.dtype, optimizer: str, device: torch.device, *,
        spare: bool = False, replay: bool = False, channels_last: bool = False,
        conflict: bool = False,
    ) -> None:  # fmt: skip
        self.dtype, self.optimizer, self.device = dtype, optimizer, device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._generator = torch.Generator(device).manual_seed(0)
        self.params = self._normal(shapes)
        self.grads = self._normal(shapes)
        self.pristine = None if spare else [g.clone() for g in self.grads]
        self.anchors = [torch.empty_like(p) for p in self.params]
        self.replays = self._normal(shapes) if replay else []
        self.conflict = conflict
        if conflict:
            for replay_gradient, grad in zip(self.replays, self.grads, strict=True):
                replay_gradient.mul_(0.3).sub_(grad, alpha=0.6)
        self.latest = None  # the variant whose step it is or was
        self.moments: list[list[Tensor]] = []
        if optimizer != "sgd":
            self.moments.append([m.mul_(0.1) for m in self._normal(shapes)])
        if optimizer == "adamw":
            self.moments.append([m.abs_().add_(0.5) for m in self._normal(shapes)])
        self.elements = sum(p.numel() for p in self.params)
        # About half the norm: clipping is always at work, and rounding in c and s is seen.
        self.max_grad_norm = 0.5 * math.sqrt(self.elements)
        self.move_anchors()

    def _normal(self, shapes) -> list[Tensor]:
        how = {"dtype": self.dtype, "device": self.device, "memory_format": self._format}
        return [torch.empty(s, **how).normal_(generator=self._generator) for s in shapes]

    def move_anchors(self) -> None:
        """Puts θ* at a distance from θ at which the scale s is neither 0 nor 1."""
        for row, (param, anchor) in enumerate(zip(self.params, self.anchors, strict=True)):
            anchor.normal_(std=2.0, generator=self._generator).add_(param)
            if self.conflict:
                anchor.sub_(self.replays[row], alpha=0.6)

    def set_anchors(self, optimizer, params) -> None:
        """Makes an optimizer of ours set the anchors that all variants share."""
        # set_anchor() writes into an anchor that is there already.
        for param, anchor in zip(params, self.anchors, strict=True):
            optimizer.state[param]["anchor"] = anchor
        optimizer.set_anchor()
        self.move_anchors()
        if optimizer.param_groups[0]["importance"]:
            for param, importance in zip(params, self.importances, strict=True):
                optimizer.state[param]["importance"] = importance

    @functools.cached_property
    def importances(self) -> list[Tensor]:
        """F of each parameter, of mean 1; all variants share it."""
        return [x.abs_().mul_(1.2533) for x in self._normal(p.shape for p in self.params)]

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns Parameters on the shared memory, with the shared gradients.

        ``.data`` gives each a version counter of its own, without which dgg would rightly take
        the other variants' steps for changes made behind its back, and measure again.
        """
        params = [torch.nn.Parameter(p.data) for p in self.params]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        return params

    def fresh_gradients(self) -> None:
        """Writes the gradients anew, as a backward pass would; some variants edit them."""
        if self.pristine is not None:
            torch._foreach_copy_(self.grads, self.pristine)
            return
        generator = torch.Generator(self.device).manual_seed(_GRADIENT_SEED)
        for grad in self.grads:
            grad.normal_(generator=generator)

    def stored(self) -> list[list[Tensor]]:
        """Returns the lists that a step writes."""
        return [self.params, *self.moments]

    def finite(self) -> bool:
        """Returns whether everything a step writes is finite."""
        stored = [x.detach() for tensors in self.stored() for x in tensors]
        return all(bool(torch.isfinite(torch.stack(torch.aminmax(x))).all()) for x in stored)


def largest_error(compared: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Returns the largest |got - want| / allowed of (got, want, allowed); of NaN infinity."""
    worst = 0.0
    for got, want, allowed in compared:
        if got.numel() > 0:
            error = float(((got - want).abs() / allowed).max())
            worst = max(worst, error) if error == error else math.inf
    return worst


class VerificationError(AssertionError):
    """A variant does not compute the guided step."""


def check(variant, work: Workload, *, injects: bool) -> float:
    """Runs one step of a variant, which must inject or not, and compares it with float64.

    Norms run over every element, whatever the size; the update is compared at all elements of
    small workloads, at the ends and in the middle of the tensors of large ones.

    Returns:
        The largest error in units of the tolerance.

    Raises:
        VerificationError: An element is further off than the variant's tolerance.
    """
    setting, places = variant.setting, _places(work)
    count = len(places)
    variant.ready()
    expected = [_sample(tensors, places) for tensors in work.stored()]
    found = _coefficients(work, setting, injects, count)
    grads, anchors = _sample(work.grads, places), _sample(work.anchors, places)
    replays = _sample(work.replays, places) if setting.replay else []
    flags = torch.full((count,), reference.INJECT if injects else 0, dtype=torch.uint8)
    shared = {
        "lr": LR, "weight_decay": WEIGHT_DECAY, "maximize": False, "strength": 1.0,
        "threshold": 1 << 32, "importance": setting.importance,
    }  # fmt: skip
    if setting.importance:
        shared["importances"] = _sample(work.importances, places)
    distances, rows = torch.full((count,), -1.0, dtype=torch.float64), list(range(count))
    if work.optimizer == "adamw":
        reference.adam_(
            expected[0], grads, replays, expected[1], expected[2], [None] * count, anchors,
            [torch.tensor(float(FIRST_STEP + variant.calls)) for _ in rows], distances, found,
            flags, rows, beta1=BETA1, beta2=BETA2, eps=EPS, decoupled=True, amsgrad=False,
            **shared,
        )  # fmt: skip
    else:
        buffers = expected[1] if work.moments else [None] * count
        reference.sgd_(
            expected[0], grads, replays, buffers, anchors, distances, found, flags, rows,
            momentum=MOMENTUM if work.moments else 0.0, dampening=0.0, nesterov=False,
            **shared,
        )  # fmt: skip
    variant()
    relative, absolute = variant.tolerance(work.dtype)
    worst = largest_error(
        (got, want, absolute + relative * want.abs())
        for tensors, wanted in zip(work.stored(), expected, strict=True)
        for got, want in zip(_sample(tensors, places), wanted, strict=True)
    )
    if not worst <= 1.0:
        raise VerificationError(
            f"{variant.name} ({setting.name}) is {worst:.3g} times its tolerance away from the "
            "float64 reference and is not timed"
        )
    return worst


def _coefficients(work: Workload, setting: Setting, injects: bool, count: int) -> Tensor:
    """Returns c and the scale of the pull as coefficients of ``count`` rows."""
    params, grads = _chunks(work.params), _chunks(work.grads)
    replays = _chunks(work.replays) if setting.replay else []
    anchors = _chunks(work.anchors) if injects else [None] * len(params)
    weighing = {"importance": setting.importance}
    if setting.importance:
        weighing["importances"] = _chunks(work.importances)
    how = {"max_grad_norm": work.max_grad_norm if setting.clipped else None}
    if setting.automatic:
        flags = torch.full((len(params),), reference.INJECT, dtype=torch.uint8)
        sums = reference.products(params, grads, replays, anchors, flags, **weighing)
        found = reference.guard_coefficients(sums, per_tensor=False, **how)
        if not found[reference.SCALES] > 0:
            raise VerificationError("alpha='auto' pulls nothing on this workload")
    else:
        unknown = torch.full((len(params),), -1.0, dtype=torch.float64)
        squares = reference.norms(params, grads, replays, anchors, unknown, **weighing)
        found = reference.coefficients(squares, scaling=True, per_tensor=False, **how)
    scale = found[reference.SCALES].expand(count)
    return torch.cat([found[: reference.SCALES], scale])


def _places(work: Workload) -> list[tuple[int, slice]]:
    """Returns where the update is compared: rows, and elements of each."""
    count = len(work.params)
    sample = _SAMPLE if work.device.type == "cpu" else _SAMPLE_ELSEWHERE
    stride = max(1, count // _SAMPLED_TENSORS)
    rows = range(count) if work.elements <= 64 * sample else range(0, count, stride)
    return [(row, part) for row in rows for part in _parts(work.params[row], sample)]


def _sample(tensors: list[Tensor], places: list[tuple[int, slice]]) -> list[Tensor]:
    # Clones: what is a float64 CPU tensor already would be handed out as it is.
    return [_flat(tensors[row])[part].to("cpu", torch.float64, copy=True) for row, part in places]


def _flat(x: Tensor) -> Tensor:
    """Returns the elements in the order in which they lie in memory, without a copy."""
    return x.as_strided((x.numel(),), (1,))


def _chunks(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the elements of all tensors, cut into pieces."""
    size = _CHUNK if tensors[0].device.type == "cpu" else _CHUNK_ELSEWHERE
    return [piece for x in tensors for piece in _flat(x).split(size)]


def _parts(tensor: Tensor, sample: int) -> list[slice]:
    count = tensor.numel()
    if count <= 4 * sample:
        return [slice(0, count)]
    starts = [0, count // 3, 2 * count // 3, count - sample]
    return [slice(start, start + sample) for start in starts]
