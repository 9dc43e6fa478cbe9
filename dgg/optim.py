# SPDX-License-Identifier: BSD-3-Clause
"""AdamW, Adam and SGD with Dynamic Gradient Guidance: drop-in for ``torch.optim``.

Here stands what tells them apart: arguments, state and hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, backends, guidance, reference, sharding
from dgg._guided import Guided

__all__ = ["SGD", "Adam", "AdamW"]

# torch.optim may be patched later, with these classes in place of its own.
_TorchAdam, _TorchSGD = torch.optim.Adam, torch.optim.SGD


class Adam(Guided, torch.optim.Adam):
    """`torch.optim.Adam` with Dynamic Gradient Guidance (arXiv 2511.15164) in the same pass.

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
        guidance: The keyword arguments from ``alpha`` to ``backend`` are those of `AdamW`.

    Raises:
        TypeError: An argument or a trainable parameter has an unsupported type.
        ValueError: An argument is out of range, contradicts another, or is refused.
        RuntimeError: The named backend cannot run here.
    """

    _rule = backends.ADAM
    _columns = {
        "exp_avg": "exp_avgs",
        "exp_avg_sq": "exp_avg_sqs",
        "max_exp_avg_sq": "max_exp_avg_sqs",
        "step": "steps",
        "anchor": "anchors",
    }

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        alpha: float = 0.2,
        strength: float = 1.0,
        scaling: bool = True,
        norm_scope: str = "global",
        granularity: str = "step",
        max_grad_norm: float | None = None,
        replay_weight: float = 1.0,
        seed: int = 0,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        process_group=None,
        backend: str | None = None,
    ) -> None:
        lr, betas, eps, weight_decay, amsgrad, maximize = _plain(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
            maximize=maximize,
        )  # fmt: skip
        arguments = {"foreach": foreach, "fused": fused, "maximize": maximize}

        def parent() -> None:
            _TorchAdam.__init__(
                self, params, lr, betas, eps, weight_decay, amsgrad,
                decoupled_weight_decay=decoupled_weight_decay, **arguments,
            )  # fmt: skip

        self._init_guidance(
            parent, foreach=foreach, fused=fused, capturable=capturable,
            differentiable=differentiable, alpha=alpha, strength=strength, scaling=scaling,
            norm_scope=norm_scope, granularity=granularity, max_grad_norm=max_grad_norm,
            replay_weight=replay_weight, seed=seed, anchor_dtype=anchor_dtype,
            anchor_device=anchor_device, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding, master_weights=master_weights,
            process_group=process_group, backend=backend,
        )  # fmt: skip

    def _needed(self, group: dict) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def _needed_to_load(self, group: dict, entry: Mapping[str, Any]) -> tuple[str, ...]:
        return ("step", *self._needed(group))

    def _init_state(self, param: Tensor, group: dict, *, before_first_step: bool = False) -> None:
        state = self.state[param]
        state["step"] = self._step_scalar(param, state.get("step", 0.0))
        self._make_state(param, self._needed(group))
        if self._has_master(param):
            self._make_state(param, ("master",))

    def _hyper(self, group: dict) -> dict[str, Any]:
        return {
            "lr": _host(group, "lr"),
            "beta1": _host_value("betas", group["betas"][0]),
            "beta2": _host_value("betas", group["betas"][1]),
            "eps": _host(group, "eps"),
            "weight_decay": _host(group, "weight_decay"),
            "decoupled": _flag(group, "decoupled_weight_decay"),
            "amsgrad": _flag(group, "amsgrad"),
            "maximize": _flag(group, "maximize"),
            "strength": _host(group, "strength"),
            "threshold": guidance.threshold(group["alpha"]),
        }


class AdamW(Adam, torch.optim.AdamW):
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
        alpha: Probability of injecting the guidance at a step (α); per group, schedulable.
        strength: Factor of the guidance's scale s; per group, schedulable.
        scaling: Scale by min(1, c ‖g‖ / ‖θ - θ*‖); False is the paper's ablation (s = strength).
        norm_scope: ``"global"``: one norm over all guided parameters; ``"tensor"``: one each.
        granularity: What one Bernoulli draw decides: ``"step"``, ``"tensor"`` or ``"element"``.
        max_grad_norm: Clip the real gradient's total norm within the step, or None.
        replay_weight: Weight w of the replay gradients recorded by `replay`.
        seed: Seed of the draws, in [0, 2**64).
        anchor_dtype: Storage dtype of the anchor; None is the parameter's.
        anchor_device: Storage device of the anchor; None is the parameter's.
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

    Example:
        >>> opt = dgg.AdamW(model.parameters(), lr=2e-4, alpha=0.2, max_grad_norm=1.0)
        >>> for task in tasks:
        ...     for batch in task:
        ...         model(batch).backward()
        ...         opt.step()
        ...         opt.zero_grad()
        ...     opt.set_anchor()
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        alpha: float = 0.2,
        strength: float = 1.0,
        scaling: bool = True,
        norm_scope: str = "global",
        granularity: str = "step",
        max_grad_norm: float | None = None,
        replay_weight: float = 1.0,
        seed: int = 0,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        process_group=None,
        backend: str | None = None,
    ) -> None:
        Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=True, alpha=alpha, strength=strength, scaling=scaling,
            norm_scope=norm_scope, granularity=granularity, max_grad_norm=max_grad_norm,
            replay_weight=replay_weight, seed=seed, anchor_dtype=anchor_dtype,
            anchor_device=anchor_device, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding, master_weights=master_weights,
            process_group=process_group, backend=backend,
        )  # fmt: skip


class SGD(Guided, torch.optim.SGD):
    """`torch.optim.SGD` with Dynamic Gradient Guidance (arXiv 2511.15164) in the same pass.

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
        guidance: The keyword arguments from ``alpha`` to ``backend`` are those of `AdamW`.

    Raises:
        TypeError: An argument or a trainable parameter has an unsupported type.
        ValueError: An argument is out of range, contradicts another, or is refused.
        RuntimeError: The named backend cannot run here.
    """

    _rule = backends.SGD
    _columns = {"momentum_buffer": "exp_avgs", "anchor": "anchors"}

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        alpha: float = 0.2,
        strength: float = 1.0,
        scaling: bool = True,
        norm_scope: str = "global",
        granularity: str = "step",
        max_grad_norm: float | None = None,
        replay_weight: float = 1.0,
        seed: int = 0,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        process_group=None,
        backend: str | None = None,
    ) -> None:
        lr, momentum, dampening, weight_decay, nesterov, maximize = _plain(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, maximize=maximize,
        )  # fmt: skip

        def parent() -> None:
            _TorchSGD.__init__(
                self, params, lr, momentum, dampening, weight_decay, nesterov,
                maximize=maximize, foreach=foreach, fused=fused,
            )  # fmt: skip

        self._init_guidance(
            parent, foreach=foreach, fused=fused, capturable=capturable,
            differentiable=differentiable, alpha=alpha, strength=strength, scaling=scaling,
            norm_scope=norm_scope, granularity=granularity, max_grad_norm=max_grad_norm,
            replay_weight=replay_weight, seed=seed, anchor_dtype=anchor_dtype,
            anchor_device=anchor_device, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding, master_weights=master_weights,
            process_group=process_group, backend=backend,
        )  # fmt: skip

    def _transient(self) -> None:
        super()._transient()
        # Parameters whose buffer was made for this step and takes G as it is (torch: no dampening).
        self._fresh: set[int] = set()

    def _needed(self, group: dict) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _needed_to_load(self, group: dict, entry: Mapping[str, Any]) -> tuple[str, ...]:
        # A buffer is made by the first step, to which anchor and master need not have come.
        others = isinstance(entry, Mapping) and entry.keys() - {
            "anchor",
            "master",
            "momentum_buffer",
        }
        return self._needed(group) if others else ()

    def _init_state(self, param: Tensor, group: dict, *, before_first_step: bool = False) -> None:
        if self._has_master(param):
            self._make_state(param, ("master",))
        # The buffer is made by the first step, in which it becomes G; the anchor may come earlier.
        if group["momentum"] == 0 or before_first_step:
            return
        if self.state[param].get("momentum_buffer") is None:
            self._make_state(param, ("momentum_buffer",))
            self._fresh.add(id(param))

    def _hyper(self, group: dict) -> dict[str, Any]:
        return {
            "lr": _host(group, "lr"),
            "momentum": _host(group, "momentum"),
            "dampening": _host(group, "dampening"),
            "weight_decay": _host(group, "weight_decay"),
            "nesterov": _flag(group, "nesterov"),
            "maximize": _flag(group, "maximize"),
            "strength": _host(group, "strength"),
            "threshold": guidance.threshold(group["alpha"]),
        }

    def _final_flags(self, rows: backends.Rows, flags: Tensor | None) -> Tensor:
        flags = super()._final_flags(rows, flags)
        if not self._fresh:
            return flags
        fresh = [reference.FIRST_STEP if id(p) in self._fresh else 0 for p in rows.holders]
        return flags | rows.flags(fresh, "fresh")

    def _load_checked(self, state_dict: Mapping[str, Any]) -> None:
        super()._load_checked(state_dict)
        # Torch's checkpoint helpers save buffers of zeros before the first step.
        if all(saved.get("draw_index", 1) == 0 for saved in state_dict["param_groups"]):
            self._fresh.update(
                id(p)
                for p, entry in self.state.items()
                if isinstance(entry, dict)
                and isinstance(entry.get("momentum_buffer"), Tensor)
                and not sharding.local(entry["momentum_buffer"]).any()
            )

    def _skip_update(self, param: Tensor) -> None:
        self._fresh.discard(id(param))

    def _waits_for_scaler(self) -> bool:
        # A buffer is made by its first step, if that is not skipped.
        return self._rows is None or bool(self._fresh)

    def _update_(self, rows: backends.Rows, *args, **kwargs) -> None:
        super()._update_(rows, *args, **kwargs)
        self._fresh.difference_update(map(id, rows.holders))


def unwrap(optimizer: Any) -> Any:
    """Returns the dgg optimizer inside wrappers.

    Args:
        optimizer: A dgg optimizer, or accelerate's, DeepSpeed's, Lightning's or Megatron's wrapper
            around one, or a ZeroRedundancyOptimizer (its local optimizer), nested to any depth.

    Raises:
        TypeError: There is no dgg optimizer inside.
    """
    seen: list[str] = []
    inner = optimizer
    while inner is not None and len(seen) < 16:
        # Lightning's and Fabric's wrappers imitate the class of what they wrap.
        inside = vars(inner).get("_optimizer") if isinstance(inner, Guided) else None
        if isinstance(inner, Guided) and not isinstance(inside, Guided):
            return inner
        seen.append(type(inner).__name__)
        inner = (
            inside
            if inside is not None
            else next(
                (
                    found
                    for name in ("optimizer", "_optimizer", "basic_optimizer", "optim")
                    if (found := getattr(inner, name, None)) is not None
                ),
                None,
            )
        )
    raise TypeError(
        f"no dgg optimizer inside {' > '.join(seen)}: pass dgg.AdamW, dgg.Adam or dgg.SGD to the "
        "framework (Trainer: optimizer_cls_and_kwargs=(dgg.AdamW, {...}))"
    )


def _plain(**arguments: Any) -> list[Any]:
    return [_arguments.plain(name, value) for name, value in arguments.items()]


def _host(group: Mapping[str, Any], name: str) -> float | Tensor:
    return _host_value(name, group[name])


def _host_value(name: str, value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of {value.numel()} elements; pass a number or a tensor of one"
            )
        # A tensor on an accelerator stays there: reading it would synchronise.
        if value.device.type != "cpu":
            return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} in a parameter group must be a number") from None


def _flag(group: Mapping[str, Any], name: str) -> bool:
    value = group[name]
    if not isinstance(value, (bool, int)):
        value = _arguments.plain(name, value)
        if not isinstance(value, (bool, int)):
            raise TypeError(f"{name}={value!r} in a parameter group must be True or False")
    return bool(value)
