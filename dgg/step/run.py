# SPDX-License-Identifier: BSD-3-Clause
"""The step of every optimizer: AdamW, Adam and SGD, captured or not, Guidance, and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dgg import _ranges, backends
from dgg.step import cache, draws, norms
from dgg.step.draws import Decision


class Verbs(NamedTuple):
    """What a step consists of; an engine that does something in its own way brings its own.

    Attributes:
        decide: Reads and checks the options: opt → decision. Nothing is changed.
        take_gradients: Hands the rows their gradients: opt, decision → rows of every device.
        measure: Draws, and computes c and s: opt, decision, rows → coefficients of every device's.
        finish: Counts the step and keeps what the statistics are made of.
        abandon: Lets go of the gradients after an error.
    """

    decide: Callable[[Any], Decision]
    take_gradients: Callable[[Any, Decision], Sequence[backends.Rows]]
    measure: Callable[[Any, Decision, Sequence[backends.Rows]], Sequence[Tensor]]
    finish: Callable[[Any, Decision, Sequence[backends.Rows], Sequence[Tensor]], None]
    abandon: Callable[[Any], None]


def run(opt, verbs: Verbs) -> None:
    """Makes one step: decide, take the gradients, measure, apply.

    Args:
        opt: The optimizer. A step reads its ``param_groups`` and ``state``, and of what is private
            ``_settings``, ``_rule``, ``_ownership``, ``_cache``, ``_draws`` and ``_replay``.
        verbs: How it does that.
    """
    try:
        decision = verbs.decide(opt)
        all_rows = verbs.take_gradients(opt, decision)
        found = () if decision.skipped else verbs.measure(opt, decision, all_rows)
        if decision.applies:
            rule, options = opt._rule, decision.options
            weight = float(options["replay_weight"])
            with _ranges.record("dgg.update"):
                for rows, flags, c_and_s in zip(all_rows, decision.flags, found, strict=True):
                    final = rule.final_flags(rows, flags)
                    if rule.kernel is None:
                        rows.guide_(
                            c_and_s, final, decision.hyper, decision.draw, decision.scaling,
                            replay_weight=weight,
                        )  # fmt: skip
                        continue
                    rows.update_(
                        rule.kernel, c_and_s, final, decision.hyper, decision.draw,
                        decision.scaling, replay_weight=weight,
                        look_ahead=decision.looks_ahead
                        and opt._draws.flags(decision, rows, decision.index + 1) is not None,
                    )  # fmt: skip
                    rule.after_update(rows)
    except BaseException:
        verbs.abandon(opt)
        raise
    verbs.finish(opt, decision, all_rows, found)


def finish(
    opt, decision: Decision, all_rows: Sequence[backends.Rows], found: Sequence[Tensor]
) -> None:
    """Counts the draw, keeps what the statistics are made of, drops the replay gradients."""
    draws.advance(opt, decision)
    if found:
        rows, flags = all_rows[0], decision.flags[0]
        opt._last = norms.record(
            decision, rows.device, rows.backend, flags, found[0],
            None if flags is None else rows.active,
        )  # fmt: skip
    elif params := decision.groups[0].get("params"):
        opt._last = norms.record_skipped(params[0].device)
    opt._replay.clear()


def abandon(opt) -> None:
    """Lets go of the gradients of a step that raised."""
    if opt._cache is not None:
        opt._cache.abandon()


def measure_on_device(
    opt, decision: Decision, all_rows: Sequence[backends.Rows]
) -> Sequence[Tensor]:
    """Draws and measures as `norms.measure`, all on the device: a graph of it can be replayed."""
    if not all_rows:
        return ()
    (rows,) = all_rows
    index = draws.index_on(opt, rows.device)
    if backends.capturing(rows.device):
        tensors = [x for g in opt.param_groups for x in g.values() if isinstance(x, Tensor)]
        opt._captured.append((opt._cache, index, decision.scaling, tensors))
    flags = opt._rule.final_flags(rows, rows.constant_flags(0)).clone()
    decision.flags, gates, options = [flags], None, decision.options
    if rows.anchored:
        names = opt._rule.kernel.hyper
        gates = [
            rows.draw_flags(
                flags, decision.hyper, names, index, options["seed"], options["granularity"]
            )
        ]
    draws.settle(decision, rows.anchored, index)
    decision.looks_ahead = False
    return norms.coefficients(decision, all_rows, gates)


EAGER = Verbs(draws.decide, cache.take_gradients, norms.measure, finish, abandon)
CAPTURED = EAGER._replace(measure=measure_on_device)
