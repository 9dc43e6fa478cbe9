# SPDX-License-Identifier: BSD-3-Clause
"""SGD with Dynamic Gradient Guidance: drop-in for ``torch.optim.SGD``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dgg import backends, reference, sharding
from dgg._literals import Alpha, Backend, Granularity, NormScope, ProcessGroup, Route
from dgg._signatures import listed
from dgg.optim import construction
from dgg.optim.guided import Guided
from dgg.step import state
from dgg.step.rule import Rule, flag, number, threshold

# torch.optim may be patched later, with this class in place of its own.
_TorchSGD = torch.optim.SGD
# Arguments that torch.optim.SGD takes and that numpy's numbers may be given for.
_NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class SgdRule(Rule):
    """SGD, with or without momentum.

    The first step of a parameter makes its buffer, which becomes G in that step (as in torch,
    without dampening).

    Attributes:
        fresh: Identities of the parameters whose buffer was made for the step that comes next.
    """

    kernel = backends.SGD
    routes = ("gradient", "decoupled")
    no_moment = "SGD has none"
    columns = {"momentum_buffer": "exp_avgs", "anchor": "anchors", "importance": "importances"}

    def __init__(self) -> None:
        self.fresh: set[int] = set()

    def needed(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the momentum's buffer, if there is momentum."""
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def needed_to_load(self, group: Mapping[str, Any], entry: Any) -> tuple[str, ...]:
        """Returns the buffer, if the entry has a key that only a step can have made."""
        made_without_step = {"anchor", "importance", "master", "momentum_buffer"}
        stepped = isinstance(entry, Mapping) and entry.keys() - made_without_step
        return self.needed(group) if stepped else ()

    def init_state(self, opt, param: Tensor, group: Mapping[str, Any], *, first: bool) -> None:
        """Makes the master weight and, for the first step, the buffer."""
        if opt._settings.has_master(param):
            state.make(opt, param, ("master",))
        if group["momentum"] == 0 or not first:
            return
        if opt.state[param].get("momentum_buffer") is None:
            state.make(opt, param, ("momentum_buffer",))
            self.fresh.add(id(param))

    def hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the hyper-parameters that `backends.SGD` names."""
        return {
            "lr": number("lr", group["lr"]),
            "momentum": number("momentum", group["momentum"]),
            "dampening": number("dampening", group["dampening"]),
            "weight_decay": number("weight_decay", group["weight_decay"]),
            "nesterov": flag("nesterov", group["nesterov"]),
            "maximize": flag("maximize", group["maximize"]),
            "strength": number("strength", group["strength"]),
            "threshold": threshold(group["alpha"]),
        }

    def final_flags(self, rows: backends.Rows, flags: Tensor | None) -> Tensor:
        """Returns the flags with FIRST_STEP where the buffer is fresh."""
        flags = rows.constant_flags(0) if flags is None else flags
        if not self.fresh:
            return flags
        fresh = [reference.FIRST_STEP if id(p) in self.fresh else 0 for p in rows.holders]
        return flags | rows.flags(fresh, "fresh")

    def after_update(self, rows: backends.Rows) -> None:
        """Notes that the buffers of these rows are no longer fresh."""
        if self.fresh:
            self.fresh.difference_update(map(id, rows.holders))

    def after_load(self, opt, state_dict: Mapping[str, Any]) -> None:
        """Notes buffers of zeros as fresh, if the state dict is from before the first step."""
        # torch's checkpoint helpers make such buffers.
        if all(saved.get("draw_index", 1) == 0 for saved in state_dict["param_groups"]):
            self.fresh.update(
                id(p)
                for p, entry in opt.state.items()
                if isinstance(entry, dict)
                and isinstance(entry.get("momentum_buffer"), Tensor)
                and not sharding.local(entry["momentum_buffer"]).any()
            )

    def skip_update(self, opt, param: Tensor) -> None:
        """Notes that the buffer is no longer fresh, although all of it is padding."""
        self.fresh.discard(id(param))

    def waits_for_scaler(self, opt) -> bool:
        """Returns whether this step makes a buffer, unless it is skipped."""
        return opt._cache is None or bool(self.fresh)


@listed
class SGD(Guided, torch.optim.SGD):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`torch.optim.SGD` with Dynamic Gradient Guidance (arXiv 2511.15164) in the same pass.

    The arguments from ``alpha`` to ``backend`` are those of `AdamW`, which describes them.

    Args:
        params: Parameters, groups or named parameters, as in torch.optim.
        lr: Learning rate, a number or a one-element tensor.
        momentum: Momentum factor μ.
        dampening: Dampening τ of the momentum.
        weight_decay: L2 penalty, added to the gradient G.
        nesterov: Nesterov momentum.
        maximize: Ascend the objective; the guidance still pulls towards the anchor.
        foreach: True demands a fused backend, False the tensor-by-tensor reference.
        differentiable: Refused: the step records no graph.
        fused: True demands a fused backend, False the reference.
        capturable: As in `AdamW`.

    Raises:
        TypeError: An argument or a trainable parameter has an unsupported type.
        ValueError: An argument is out of range, contradicts another, or is refused.
        RuntimeError: The named backend cannot run here.
    """

    _new_rule = SgdRule

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float | Tensor = 0, nesterov: bool = False, *, maximize: bool = False,
        foreach: bool | None = None, differentiable: bool = False, fused: bool | None = None,
        capturable: bool = False, alpha: Alpha = 0.2, strength: float = 1.0,
        scaling: bool = True, norm_scope: NormScope = "global", granularity: Granularity = "step",
        max_grad_norm: float | None = None, replay_weight: float = 1.0, importance: float = 0.0,
        route: Route = "gradient", seed: int = 0, anchor_dtype: torch.dtype | None = None,
        importance_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None, state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False, master_weights: bool = False,
        process_group: ProcessGroup | None = None, backend: Backend | None = None,
    ) -> None:  # fmt: skip
        construction.build(self, _TorchSGD.__init__, _NUMBERS, locals())
