# SPDX-License-Identifier: BSD-3-Clause
"""The step of every optimizer: AdamW, Adam and SGD, captured or not, Guidance, and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dgg import _ranges, backends
from dgg.step import cache, checks, draws, norms
from dgg.step.draws import Decision


class Verbs(NamedTuple):
    """The parts of a step; an engine that makes one of them in another way has a function for it.

    Attributes:
        decide: Reads and checks the options: opt → decision. Nothing is changed.
        take_gradients: Hands the rows their gradients: opt, decision → rows of every device.
        measure: Draws, and computes c and s: opt, decision, rows → coefficients of every device.
        finish: Counts the step and keeps its results for the statistics.
        abandon: Releases the gradients after an error.
    """

    decide: Callable[[Any], Decision]
    take_gradients: Callable[[Any, Decision], Sequence[backends.Rows]]
    measure: Callable[[Any, Decision, Sequence[backends.Rows]], Sequence[Tensor]]
    finish: Callable[[Any, Decision, Sequence[backends.Rows], Sequence[Tensor]], None]
    abandon: Callable[[Any], None]


def run(opt, verbs: Verbs) -> None:
    """Makes one step: decide, take the gradients, measure, apply.

    It reads the optimizer's ``param_groups`` and ``state``, and the private ``_settings``,
    ``_rule``, ``_ownership``, ``_cache``, ``_draws`` and ``_replay``.
    """
    try:
        decision = verbs.decide(opt)
        all_rows = verbs.take_gradients(opt, decision)
        coefficients = () if decision.skipped else verbs.measure(opt, decision, all_rows)
        if decision.applies:
            rule, options = opt._rule, decision.options
            weight = float(options["replay_weight"])
            with _ranges.record("dgg.update"):
                for rows, flags, c_and_s in zip(
                    all_rows, decision.flags, coefficients, strict=True
                ):
                    arguments: tuple[Any, ...] = (
                        c_and_s, rule.final_flags(rows, flags), decision.hyper, decision.draw,
                        decision.scaling,
                    )  # fmt: skip
                    if rule.kernel is None:
                        rows.guide_(*arguments, replay_weight=weight)
                        continue
                    look_ahead = (
                        decision.looks_ahead
                        and opt._draws.flags(decision, rows, decision.index + 1) is not None
                    )
                    rows.update_(
                        rule.kernel, *arguments, look_ahead=look_ahead, replay_weight=weight
                    )
                    rule.after_update(rows)
    except BaseException:
        verbs.abandon(opt)
        raise
    verbs.finish(opt, decision, all_rows, coefficients)


def finish(
    opt, decision: Decision, all_rows: Sequence[backends.Rows], coefficients: Sequence[Tensor]
) -> None:
    """Counts the draw, keeps the record for the statistics, drops the replay gradients."""
    draws.advance(opt, decision)
    if coefficients:
        # A captured step has flags always; if none can inject, they say nothing.
        rows, flags = all_rows[0], decision.flags[0] if decision.injecting else None
        active = None if flags is None else rows.active
        if flags is not None and (
            decision.options["granularity"] == "tensor"
            or len(set(opt._draws.limits(decision.groups))) > 1
        ):
            flags = flags.clone()  # the next draw but one comes into the same place
        record = norms.record(decision, rows.device, rows.backend, flags, coefficients[0], active)
        captured = opt._settings.capturable and backends.capturing(rows.device)
        norms.keep(opt, record, captured=captured)
    elif params := decision.groups[0].get("params"):
        norms.keep(opt, norms.record_skipped(params[0].device))
    if opt._replay.recorded:
        opt._replay.clear()


def abandon(opt) -> None:
    """Releases the gradients of a step that raised."""
    if opt._cache is not None:
        opt._cache.abandon()


def measure_on_device(
    opt, decision: Decision, all_rows: Sequence[backends.Rows]
) -> Sequence[Tensor]:
    """Draws and measures as `norms.measure` does, but on the device, so that a graph can replay."""
    if not all_rows:
        return ()
    rows: Any  # `LaunchedRows`
    (rows,) = all_rows
    index = draws.index_on(opt, rows.device)
    if backends.capturing(rows.device):
        tensors = [x for g in opt.param_groups for x in g.values() if isinstance(x, Tensor)]
        opt._captured.append((opt._cache, index, decision.scaling, tensors))
    flags = opt._rule.final_flags(rows, rows.constant_flags(0)).clone()
    decision.flags, gates, options = [flags], None, decision.options
    shared = rows.reduction is not None
    guards = not decision.guarded or checks.has_replay(opt, rows.anchored, shared)
    if rows.anchored and guards:
        seed, granularity = options["seed"], options["granularity"]
        names = opt._rule.kernel.hyper
        gates = [rows.draw_flags(flags, decision.hyper, names, index, seed, granularity)]
    draws.settle(decision, rows.anchored and guards, index)
    decision.looks_ahead = False
    return norms.coefficients(decision, all_rows, gates)


EAGER = Verbs(draws.decide, cache.take_gradients, norms.measure, finish, abandon)
CAPTURED = EAGER._replace(measure=measure_on_device)
