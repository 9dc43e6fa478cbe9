# SPDX-License-Identifier: BSD-3-Clause
"""What guidance did, for programs, loggers and people: `Reporting`."""

from __future__ import annotations

from typing import Any

from dgg import backends
from dgg._imitable import imitable
from dgg._signatures import listed
from dgg.step import norms
from dgg.step.checks import Warned
from dgg.step.gradients import ReplaySlot
from dgg.step.journal import Journal

_MEANINGS = {
    "scale": "mean scale s of the pulled steps",
    "pull": "length of the pull / that of the gradient",
    "distance": "distance from the anchor",
    "alignment": "cosine of gradient and replay gradient",
    "clip": "clipping factor",
}


@listed
class Reporting:
    """The methods of every optimizer, and of `dgg.Guidance`, that say what guidance did."""

    param_groups: list[dict[str, Any]]
    # What `construction` sets.
    _journal: Journal
    _last: dict[str, Any] | None  # of the last step, for the statistics
    _named: int | None  # the task that set_anchor(task=...) named
    _replay: ReplaySlot
    _resumed: int | None  # steps of the checkpoint that a new optimizer has loaded
    _warned: Warned

    def _count_anchors(self) -> int:
        """Returns the number of parameters with an anchor, those of all ranks."""
        return sum(group["anchored"] for group in self.param_groups)

    @property
    def _shown(self) -> str:
        """The name in texts."""
        return type(self).__name__

    @imitable
    def guidance_stats(self) -> norms.Statistics:
        """Returns what the last step did, as tensors on the device: no synchronisation.

        Returns:
            ``injected`` (bool, whether anything was pulled; a drawn step was, if only by 0, as at
            the first one after `set_anchor`, where θ is θ*; with ``alpha="auto"`` a pull of 0 is
            none), ``scale`` (s with the first group's strength; one value per tensor for
            ``norm_scope="tensor"``), ``grad_norm`` (‖g‖), ``distance`` (‖u‖: ‖θ - θ*‖ without
            importance) and ``clip`` (c); None for what that step had no need to measure. With
            ``alpha="auto"`` also ``alignment`` (⟨h, r⟩ / ‖h‖ ‖r‖, negative where a step would undo
            the former tasks) and ``pull`` (a ‖u‖ / ‖h‖), and ``grad_norm`` is ‖h‖. ``anchored``
            (int64: how many parameters have an anchor; 0 means that nothing can be guided yet) and
            ``guided`` (int64: how many were pulled; 0 where nothing was drawn). The attribute
            ``backend`` is the name of the step's backend.
        """
        return norms.statistics(self._last, self._count_anchors())

    @imitable
    def guidance_log(self) -> dict[str, float]:
        """Returns what guidance did since the last call as numbers, for W&B or TensorBoard.

        Returns:
            Means over the steps since the last call, each over those that measured it, of
            ``guidance/injected`` (share of the steps that pulled, if only by 0: see
            `guidance_stats`; a step with a closure counts once), ``guidance/scale`` (s),
            ``guidance/pull`` (length of the pull / that of c g, with ``alpha="auto"`` of c h; not
            with draws or scales per tensor or element), ``guidance/distance`` (‖u‖),
            ``guidance/grad_norm`` (‖g‖), ``guidance/clip`` (c) and, with ``alpha="auto"``,
            ``guidance/alignment``; those that no step measured are left out. And as they are now
            ``guidance/task`` and ``guidance/anchored`` (parameters with an anchor). The call
            synchronises with the device once; the steps do not. Replays of a CUDA graph are not
            seen.

        Examples:
            >>> if number % 100 == 0:
            ...     wandb.log(opt.guidance_log(), step=number)
        """
        found = {f"guidance/{name}": value for name, value in self._journal.logged.means().items()}
        task = self.param_groups[0]["task_index"]
        return {**found, "guidance/task": task, "guidance/anchored": self._count_anchors()}

    @imitable
    def summary(self) -> str:
        """Returns what guidance did since the anchor was set, as text of a few lines.

        Class, backend, α, number and size of the anchors; steps, the share of them that pulled, and
        means as in `guidance_log`. The call synchronises with the device once.

        Examples:
            >>> print(opt.summary())
            dgg.AdamW (backend cpp), alpha 0.2, anchor of 4 tensors (0.0 MiB)
            task 1: 200 steps since the anchor was set or loaded
              18.5 % of the steps pulled
              0.9 mean scale s of the pulled steps
        """
        steps, means = self._journal.since_boundary()
        anchored = self._count_anchors() > 0
        since = "since the anchor was set or loaded" if anchored else "without an anchor"
        lines = [head(self), f"task {self.param_groups[0]['task_index']}: {steps} steps {since}"]
        if steps and anchored:
            lines.append(f"  {100 * means.get('injected', 0.0):.1f} % of the steps pulled")
        lines += [
            f"  {means[key]:.4g} {meaning}" for key, meaning in _MEANINGS.items() if key in means
        ]
        return "\n".join(lines)


def head(opt: Any) -> str:
    """Returns one line: class, backends, α and the size of the anchor."""
    driver = opt._deepspeed_driver() if hasattr(opt, "_deepspeed_driver") else None
    pieces = "tensors" if driver is None else "partitions of this rank"
    # From the ownership, since DeepSpeed's ZeRO-3 keeps the groups empty between the steps.
    members = opt._ownership.tensors(getattr(opt, "optimizer", opt).param_groups)
    devices = {p.device for params in members for p in params}
    used = sorted({backends.choose(opt._settings.backend, device) for device in devices})
    alphas = sorted({_alpha(group["alpha"]) for group in opt.param_groups})
    text = f"dgg.{opt._shown} (backend {', '.join(used)}), alpha {', '.join(alphas)}, "
    sizes = {
        name: [entry[name] for entry in opt.state.values() if name in entry]
        for name in ("anchor", "importance")
    }
    if not sizes["anchor"]:
        return text + "no anchor: nothing is guided"
    text += f"anchor of {len(sizes['anchor'])} {pieces} ({_mebibytes(sizes['anchor'])})"
    if sizes["importance"]:
        text += f", importance ({_mebibytes(sizes['importance'])})"
    return text


def _alpha(alpha: Any) -> str:
    return alpha if isinstance(alpha, str) else f"{float(alpha):g}"


def _mebibytes(tensors: list[Any]) -> str:
    local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]  # of this rank
    return f"{sum(x.numel() * x.element_size() for x in local) / 2**20:.1f} MiB"
