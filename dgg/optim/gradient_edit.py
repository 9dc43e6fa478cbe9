# SPDX-License-Identifier: BSD-3-Clause
"""The step of `dgg.Guidance`: an edit of the gradients, before the step of the other optimizer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, backends, sharding
from dgg.step import checks, gradients, norms
from dgg.step.cache import RowCache, with_sums
from dgg.step.draws import Decision
from dgg.step.rule import Rule, corrected_moment, threshold
from dgg.step.run import Verbs, abandon, finish


class GuideRule(Rule):
    """Makes every gradient G = c (g + w r) + b s u, equation (5), and nothing else."""

    no_moment = "the guided optimizer keeps none (exp_avg_sq in its state)"

    def second_moment(
        self, opt, param: Tensor, group: Mapping[str, Any]
    ) -> tuple[Tensor, float] | None:
        """Returns what Adam's heirs keep of ``param`` in the state of the guided optimizer."""
        moment = corrected_moment(opt.optimizer.state.get(param, {}), group)
        if moment is None:
            return None
        shard, of_param = sharding.local(moment[0]), sharding.local(param)
        plain = not sharding.keeps_values_elsewhere(shard)
        # Those of complex parameters are complex, too: the squares of both parts.
        plain = plain and shard.dtype.to_real().is_floating_point
        plain = plain and shard.is_complex() == of_param.is_complex()
        return moment if plain and shard.shape == of_param.shape else None


def _decide(opt) -> Decision:
    opt._replay.check_closed()
    options = opt._draws.options.read(opt.param_groups)
    decision = Decision(options, opt.param_groups, [], options["draw_index"])
    decision.strength = float(options["strength"])
    # The other optimizer moves the parameters past what an update could measure.
    decision.looks_ahead = False
    opt._rule.check_route(options["route"])
    opt._draws.guard(decision, opt.optimizer.param_groups)
    return decision


def _take_gradients(opt, decision: Decision) -> list[backends.Rows]:
    """Takes the gradients; makes the missing ones of parameters with a replay gradient."""
    slot, groups = opt._replay, opt.optimizer.param_groups
    elementwise = decision.options["granularity"] == "element"
    # A GradScaler hands still scaled gradients to an optimizer that unscales by itself.
    scale, found_inf = (getattr(opt.optimizer, n, None) for n in ("grad_scale", "found_inf"))
    if slot and (found_inf is not None or gradients.unscaled_unseen()):
        raise RuntimeError(
            "Guidance.replay() does not go together with a GradScaler, which cannot unscale "
            "the replay gradients; use dgg.AdamW, or bfloat16 without a scaler"
        )
    if scale is None and found_inf is None and _take_native_gradients(opt, groups, elementwise):
        return opt._cache.all_rows
    params = [p for group in groups for p in group["params"]]
    refuse_partitions(opt)
    _sum_partial_gradients(opt, params)
    _check(opt, groups, params, elementwise)
    if scale is not None:
        gradients.refuse_scaler(params, opt.process_group)
    if scale is not None or found_inf is not None:
        backend, stepped = opt._settings.backend, [p for p in params if p.grad is not None]
        launched = bool(stepped) and all(
            backends.launches(backends.choose_for(backend, p), p.device) for p in stepped
        )
        decision.scaling, decision.skipped = gradients.read_scaler(
            scale, found_inf, stepped[0].device if launched else None
        )
    if decision.skipped:
        return []
    seen: dict[int, Tensor | None] = {}  # which keeps them, so that no other has their identity
    for p in params:
        shard = sharding.local(p.grad)
        shared = shard is not None and id(p.grad) in seen
        opt._shared_gradients |= shared
        seen[id(p.grad)] = p.grad
        if shard is None and slot.get(p) is not None:
            p.grad = sharding.like(torch.zeros_like(sharding.local(p.detach())), p)
        elif shard is not None and (shared or not backends.is_dense(shard)):
            # An expanded gradient cannot be written in place, one of two parameters only once.
            shard = shard.clone(memory_format=torch.contiguous_format)
            p.grad = sharding.like(shard, p)
    grads, replays = [p.grad for p in params], slot.of(params)
    if opt._cache is None or not opt._cache.valid(opt, groups, params, grads, replays):
        opt._cache = RowCache(opt, groups, params, replays)
    opt._cache.take_gradients(grads, replays, elementwise=elementwise)
    return opt._cache.all_rows


def refuse_partitions(opt) -> None:
    """Raises a RuntimeError where DeepSpeed steps flat partitions, one after the other."""
    known = opt._original_ids
    strange = (
        type(p) is Tensor and p.dim() == 1 and id(p) not in known
        for group in opt.optimizer.param_groups
        for p in group["params"]
    )
    if "deepspeed" in sys.modules and any(strange):
        raise RuntimeError(
            "DeepSpeed's ZeRO has put flat partitions in place of the parameters and steps "
            "them one by one, of which dgg.Guidance would take wrong norms; use dgg.AdamW, "
            "dgg.Adam or dgg.SGD, which know it"
        )


@torch.no_grad()
def _sum_partial_gradients(opt, params: Sequence[Tensor]) -> None:
    """Sums partial gradients over their ranks; the sums become ``.grad``."""
    grads, replays = [p.grad for p in params], opt._replay.of(params)
    sums, replays = with_sums(opt, params, grads, replays)
    for p, grad, total in zip(params, grads, sums, strict=True):
        if total is not grad:
            p.grad = total
    if opt._partial and replays:
        opt._replay.exchange(params, replays)


def _check(opt, groups, params: Sequence[Tensor], elementwise: bool) -> None:
    for p, label in zip(params, _arguments.group_labels(groups), strict=True):
        r, entry = opt._replay.get(p), opt.state.get(p, {})
        for grad, kind in ((p.grad, "gradient"), (r, "replay gradient")):
            if grad is not None:
                _arguments.check_gradient(grad, p, label, kind)
                _arguments.check_param(p, label, stepped=True, elements=elementwise)
                checks.check_weighed(entry, opt.param_groups[0]["importance"], label)
        value = entry.get("anchor")
        if value is not None and value.shape != p.shape:
            raise ValueError(
                f"{label} has another shape than its anchor, {tuple(value.shape)}: call "
                "set_anchor() after a parameter has changed its shape"
            )


def _take_native_gradients(opt, groups, elementwise: bool) -> bool:
    """Takes the gradients natively and without checks, if only their values are new."""
    cache = opt._cache
    if cache is None or opt._shared_gradients:
        return False
    replays = opt._replay.of(cache.params)
    # A parameter with a replay gradient alone is given a gradient by `_take_gradients`.
    pairs = zip(cache.params, replays, strict=True)
    if replays and any([r is not None and p.grad is None for p, r in pairs]):
        return False
    if not cache.take_native_gradients(opt, groups, replays, elementwise=elementwise):
        return False
    # An expanded gradient cannot be written in place.
    if all([backends.is_dense(x) for x in cache.all_rows[0].odd_gradients()]):
        return True
    cache.abandon()
    return False


def _measure(opt, decision: Decision, all_rows: Sequence[backends.Rows]) -> Sequence[Tensor]:
    """Draws and measures; decides whether the step changes any gradient."""
    for rows in all_rows:
        rows.use_options(decision.options)
        # The other optimizer has moved the parameters since the distances were measured.
        rows.forget(anchors=False)
    coefficients = norms.measure(opt, decision, all_rows)
    scaled = getattr(opt.optimizer, "grad_scale", None) is not None
    clips = decision.options["max_grad_norm"] is not None
    decision.hyper = [
        {
            "maximize": bool(group.get("maximize", False)),
            "strength": float(options["strength"]),
            "threshold": threshold(options["alpha"]),
        }
        for group, options in zip(opt.optimizer.param_groups, opt.param_groups, strict=True)
    ]
    decision.applies = bool(decision.injecting or clips or opt._replay or scaled)
    if not decision.applies:
        abandon(opt)
    return coefficients


def _finish(opt, decision: Decision, all_rows, coefficients) -> None:
    if decision.applies and all_rows and getattr(opt.optimizer, "grad_scale", None) is not None:
        # The gradients are unscaled now; the optimizer must not divide them again.
        opt.optimizer.grad_scale = None
    finish(opt, decision, all_rows, coefficients)
    if decision.skipped:
        device = opt.optimizer.param_groups[0]["params"][0].device
        norms.keep(opt, norms.record_skipped(device))


EDIT = Verbs(_decide, _take_gradients, _measure, _finish, abandon)
