# SPDX-License-Identifier: BSD-3-Clause
"""Merging the weights with their anchor at the end of a task, before the anchor is set anew.

With d = θ - θ*, where θ* is the merged model of the former tasks and θ the end of this one:

    "mean"     θ ← θ* + d / t, t tasks so far: the running mean of the tasks' models
    "fisher"   θ ← θ* + a d,  a = ⟨d, v̂ d⟩ / ⟨d, (v̂ + Σ v̂) d⟩: where the tasks' losses, each a
               quadratic with its diagonal Fisher matrix, have their least sum on the way from θ* to
               θ, the former ones at their least in θ* (Perturb-and-Merge, arXiv 2505.22389)
    "rows"     the rows of every matrix that moved farthest keep their d, the others get d = 0
               (Neuron-Fusion's kind, arXiv 2505.16703)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, anchor, sharding
from dgg.anchor import importance
from dgg.backends.views import real_view
from dgg.sharding import fsdp1

RULES = ("mean", "fisher", "rows")
_NO_MOMENTS = (
    "merge_anchor('fisher') weighs the tasks by their second moments: build the optimizer (Adam or "
    "AdamW) with importance > 0, and call it at the end of a task, before set_anchor() and before "
    "the moments are reset; or use 'mean'"
)


def merge(
    opt, groups: Sequence[Mapping[str, Any]], rule: str, keep: float | None,
    weights: Callable[[Tensor], Tensor],
) -> float:  # fmt: skip
    """Merges all anchored parameters in place; see `dgg.AdamW.merge_anchor`.

    ``weights`` returns the tensor that the optimizer steps for a parameter: itself or its master.
    """
    params = [p for group in groups for p in group["params"] if "anchor" in opt.state.get(p, ())]
    peers = opt._ownership.peers([p for group in groups for p in group["params"]])
    with sharding.on_all_or_none(peers, {"rule": rule, "keep": keep}):
        _check(opt, groups, params, rule, keep, weights)
    if rule == "rows":
        share = 0.5 if keep is None else float(keep)
    elif rule == "mean":
        share = 1 / (int(opt.param_groups[0]["task_index"]) + 1)
    else:
        share = _least(opt, params, weights)
    for p in params:
        theta, base = weights(p), opt.state[p]["anchor"]
        if rule == "rows":
            merged = _rows_kept(theta, base, share)
        else:
            shard = sharding.local(theta).to(importance.exact_dtype(p))  # rounded when it is stored
            shard_of_base = sharding.local(base).to(shard.device, shard.dtype)
            merged = sharding.like(torch.lerp(shard_of_base, shard, share), p)
        if "master" in opt.state[p]:
            anchor.write(opt.state[p]["master"], merged)
        anchor.write(p, merged)
    opt._ownership.share_weights()
    return share


def _check(
    opt, groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor], rule: str,
    keep: float | None, weights: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    if rule not in RULES:
        raise ValueError(f"merge_anchor(rule={rule!r}) is not one of {RULES}")
    if keep is not None:
        if not _arguments.is_number(keep) or not 0 < float(keep) <= 1:
            raise ValueError(f"keep={keep!r} must lie in (0, 1]: it is a share of the rows")
        if rule != "rows":
            raise ValueError(
                f"keep={keep!r} is a share of the rows, which merge_anchor({rule!r}) would ignore: "
                "leave it out, or merge with 'rows'"
            )
    counted = any(group.get("anchored") for group in opt.param_groups)
    if not params and not (counted and not opt._ownership.has_all):
        raise RuntimeError(
            "merge_anchor() has no anchor to merge with: call it at the end of the second task and "
            "later ones, before set_anchor()"
        )
    partitioned = opt.process_group is not None or any(map(fsdp1.is_one, params))
    if rule == "rows" and partitioned:
        raise RuntimeError(
            "merge_anchor('rows') needs whole matrices, and an engine has put flat partitions in "
            "their place; use 'mean', or merge the saved weights"
        )
    if rule == "fisher" and any("importance" not in opt.state[p] for p in params):
        raise RuntimeError(_NO_MOMENTS)
    all_params = [p for group in groups for p in group["params"]]
    for p, label in zip(all_params, _arguments.group_labels(groups), strict=True):
        base = opt.state.get(p, {}).get("anchor")
        if base is None:
            continue
        if base.shape != p.shape:
            raise ValueError(
                f"{label} has another shape than its anchor, {tuple(base.shape)}, and cannot be "
                "merged with it: merge before a parameter changes its shape"
            )
        if not (anchor.finite(weights(p)) and anchor.finite(base)):
            raise ValueError(
                f"{label}, or its anchor, holds inf or NaN, of which no merged model can be made: "
                "load the last finite weights first"
            )


def _least(opt, params: Sequence[Tensor], weights: Callable[[Tensor], Tensor]) -> float:
    """Returns the a of "fisher", in [0, 1]; every rank calls it."""
    sums = []
    mean = float(opt.param_groups[0]["importance_mean"])
    totals, _ = importance.running_sums(opt, opt.param_groups, params)
    moments = importance.second_moments(opt, opt.param_groups, params)
    for p, read, moment in zip(params, totals, moments, strict=True):
        theta = real_view(sharding.local(weights(p)))
        base = real_view(sharding.local(opt.state[p]["anchor"])).to(theta.device)
        squares = (theta.double() - base.double()).square_()
        total = read().double()
        before = real_view(sharding.local(opt.state[p]["importance"])).to(total.device)
        present = total - before.double() * mean
        # A rank whose part is empty, or had no gradient, has no moments; the others may have.
        known = total.new_tensor(moment is not None)
        sums.append(torch.stack([(squares * present).sum(), (squares * total).sum(), known]))
    of_task, of_all, known = opt._ownership.total(params, sums, 3).tolist()
    if not known:
        raise RuntimeError(_NO_MOMENTS)
    if not of_all > 0:  # nothing moved that matters to any task
        return 1.0
    return min(1.0, max(0.0, of_task / of_all))


def _rows_kept(theta: Tensor, base: Tensor, keep: float) -> Tensor:
    """Returns θ with all but its farthest rows back at the anchor; vectors as they are."""
    if theta.dim() < 2 or not theta.numel():
        return theta
    dtype = importance.exact_dtype(theta)
    way = (theta.to(dtype) - base.to(theta.device, dtype)).abs().flatten(1)
    base = base.to(theta.device, theta.dtype)
    # In float64: the squares of what has moved far overflow.
    lengths = torch.linalg.vector_norm(way, dim=1, dtype=torch.float64)
    whole = lengths.full_tensor() if sharding.is_dtensor(lengths) else lengths
    count = max(1, round(keep * len(whole)))
    chosen = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
    chosen[whole.topk(count).indices] = True
    chosen = chosen.view(-1, *[1] * (theta.dim() - 1)).expand(theta.shape)
    if not sharding.is_dtensor(theta):
        return torch.where(chosen, theta, base)
    shard = sharding.shard_of(chosen, theta)
    kept = torch.where(shard, sharding.local(theta), sharding.local(base))
    return sharding.like(kept, theta)
