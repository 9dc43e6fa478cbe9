# SPDX-License-Identifier: BSD-3-Clause
"""AdamW and Adam with Dynamic Gradient Guidance: drop-in for ``torch.optim``.

This file has what is particular to them: arguments, state and hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dgg import backends, reference
from dgg._literals import Alpha, Backend, Granularity, NormScope, ProcessGroup, Route
from dgg._signatures import listed
from dgg.optim import construction
from dgg.optim.guided import Guided
from dgg.step import state
from dgg.step.rule import Rule, corrected_moment, flag, number, threshold

# torch.optim may be patched later, with these classes in place of its own.
_TorchAdam = torch.optim.Adam
# Arguments that torch.optim.Adam takes and that numpy's numbers may be given for.
_NUMBERS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")


class AdamRule(Rule):
    """Adam and AdamW."""

    kernel = backends.ADAM
    routes = reference.ROUTES
    columns = {
        "exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs", "max_exp_avg_sq": "max_exp_avg_sqs",
        "step": "steps", "anchor": "anchors", "importance": "importances",
    }  # fmt: skip

    def needed(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns both moments, and with amsgrad the largest second one."""
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def needed_to_load(self, group: Mapping[str, Any], entry: Any) -> tuple[str, ...]:
        """Returns the moments and the step count."""
        return ("step", *self.needed(group))

    def init_state(self, opt, param: Tensor, group: Mapping[str, Any], *, first: bool) -> None:
        """Makes step count, moments and master weight."""
        entry = opt.state[param]
        entry["step"] = state.step_scalar(opt, param, entry.get("step", 0.0))
        master = ("master",) if opt._settings.has_master(param) else ()
        state.make(opt, param, (*self.needed(group), *master))

    def hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the hyper-parameters that `backends.ADAM` names."""
        return {
            "lr": number("lr", group["lr"]),
            "beta1": number("betas", group["betas"][0]),
            "beta2": number("betas", group["betas"][1]),
            "eps": number("eps", group["eps"]),
            "weight_decay": number("weight_decay", group["weight_decay"]),
            "decoupled": flag("decoupled_weight_decay", group["decoupled_weight_decay"]),
            "amsgrad": flag("amsgrad", group["amsgrad"]),
            "maximize": flag("maximize", group["maximize"]),
            "strength": number("strength", group["strength"]),
            "threshold": threshold(group["alpha"]),
        }

    def second_moment(
        self, opt, param: Tensor, group: Mapping[str, Any]
    ) -> tuple[Tensor, float] | None:
        """Returns exp_avg_sq of ``param`` and its bias correction; None before its first step."""
        return corrected_moment(opt.state.get(param, {}), group)

    def skip_update(self, opt, param: Tensor) -> None:
        """Counts a step in which every element of ``param`` is padding."""
        step = opt.state[param].get("step")
        if step is not None:
            step += 1


@listed
class Adam(Guided, torch.optim.Adam):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`torch.optim.Adam` with Dynamic Gradient Guidance (arXiv 2511.15164) in the same pass.

    The arguments from ``alpha`` to ``backend`` are those of `AdamW`, which describes them.

    Args:
        params: Parameters, groups or named parameters, as in torch.optim.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient G.
        amsgrad: Divide by the largest second moment so far.
        foreach: True demands a fused backend, False the tensor-by-tensor reference.
        maximize: Ascend the objective; the guidance still pulls towards the anchor.
        capturable: Make steps that a CUDA graph can capture: draw index, draws and step counts
            stay on the device, and ``lr`` and ``alpha`` may be tensors there. GPU only.
        differentiable: Refused: the step records no graph.
        fused: True demands a fused backend, False the reference.
        decoupled_weight_decay: True makes this AdamW.

    Raises:
        TypeError: An argument or a trainable parameter has an unsupported type.
        ValueError: An argument is out of range, contradicts another, or is refused.
        RuntimeError: The named backend cannot run here.
    """

    _new_rule = AdamRule

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, amsgrad: bool = False, *, foreach: bool | None = None,
        maximize: bool = False, capturable: bool = False, differentiable: bool = False,
        fused: bool | None = None, decoupled_weight_decay: bool = False, alpha: Alpha = 0.2,
        strength: float = 1.0, scaling: bool = True, norm_scope: NormScope = "global",
        granularity: Granularity = "step", max_grad_norm: float | None = None,
        replay_weight: float = 1.0, importance: float = 0.0, route: Route = "gradient",
        seed: int = 0,
        anchor_dtype: torch.dtype | None = None, importance_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None, state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False, master_weights: bool = False,
        process_group: ProcessGroup | None = None, backend: Backend | None = None,
    ) -> None:  # fmt: skip
        construction.build(self, _TorchAdam.__init__, _NUMBERS, locals())


@listed
class AdamW(Adam, torch.optim.AdamW):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`torch.optim.AdamW` with Dynamic Gradient Guidance (arXiv 2511.15164) in the same pass.

    Args:
        params: Parameters, groups or named parameters, as in torch.optim.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay: θ is multiplied by 1 - lr · weight_decay.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend the objective; the guidance still pulls towards the anchor.
        foreach: True demands a fused backend, False the tensor-by-tensor reference.
        capturable: Make steps that a CUDA graph can capture: draw index, draws and step counts
            stay on the device, and ``lr`` and ``alpha`` may be tensors there. GPU only.
        differentiable: Refused: the step records no graph.
        fused: True demands a fused backend, False the reference.
        alpha: Probability of injecting the guidance at a step (α); per group, schedulable. Or
            ``"auto"``: every step pulls as strongly as its replay gradients ask for, equation (7);
            see `replay`.
        strength: Factor of the guidance's scale s; per group, schedulable.
        scaling: Scale by min(1, c ‖g‖ / ‖θ - θ*‖); False is the paper's ablation (s = strength).
        norm_scope: ``"global"``: one norm over all guided parameters; ``"tensor"``: one each.
        granularity: What one Bernoulli draw decides: ``"step"``, ``"tensor"`` or ``"element"``.
        max_grad_norm: Clip the real gradient's total norm within the step, or None.
        replay_weight: Weight w of the replay gradients recorded by `replay`.
        importance: Weight i of the importance F in the pull, in [0, 1]: it acts along
            ((1 - i) + i F) ∘ (θ - θ*). F is made at task boundaries, from Adam's second moments;
            see `set_anchor`.
        route: Where the pull enters: ``"gradient"`` (both moments, the paper's),
            ``"first_moment"``, or ``"decoupled"`` (outside of the moments, as weight decay is).
        seed: Seed of the draws, in [0, 2**64).
        anchor_dtype: Storage dtype of the anchor; None is the parameter's.
        importance_dtype: Storage dtype of the importance; None is the parameter's.
        anchor_device: Storage device of anchor and importance; None is the parameter's.
        state_dtype: Storage dtype of the moments; None is the parameter's.
        stochastic_rounding: Round bfloat16 parameters stochastically, so that small updates are
            not lost in the mean; the random words are drawn as the Bernoulli draws are.
        master_weights: Keep a float32 copy of every bfloat16 and float16 parameter in
            ``state[p]["master"]``; steps update it and write its rounding to the parameter.
        process_group: Group over whose ranks plain parameters are flat partitions of a whole, as
            some engines hand them over; norms are summed over it. DTensors need none.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or None (the fastest).

    Raises:
        TypeError: An argument or a trainable parameter has an unsupported type.
        ValueError: An argument is out of range, contradicts another, or is refused.
        RuntimeError: The named backend cannot run here.

    Examples:
        >>> opt = dgg.AdamW(model.parameters(), lr=2e-4, alpha=0.2, max_grad_norm=1.0)
        >>> for task in tasks:
        ...     for batch in task:
        ...         model(batch).backward()
        ...         opt.step()
        ...         opt.zero_grad()
        ...     opt.set_anchor()
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
        foreach: bool | None = None, capturable: bool = False, differentiable: bool = False,
        fused: bool | None = None, alpha: Alpha = 0.2, strength: float = 1.0,
        scaling: bool = True, norm_scope: NormScope = "global", granularity: Granularity = "step",
        max_grad_norm: float | None = None, replay_weight: float = 1.0, importance: float = 0.0,
        route: Route = "gradient", seed: int = 0, anchor_dtype: torch.dtype | None = None,
        importance_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None, state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False, master_weights: bool = False,
        process_group: ProcessGroup | None = None, backend: Backend | None = None,
    ) -> None:  # fmt: skip
        Adam.__init__(**locals(), decoupled_weight_decay=True)
