# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of the study, and the traces of one seed as TensorBoard events.

Events are written only where `torch.utils.tensorboard` can be imported: tensorboard is none of the
pinned requirements, so that the study installs nothing for them.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dgg.metrics import AccuracyMatrix
from study import digits_study, jobs, paired, protocol, summary
from study.arms import LABELS

Found = dict[str, Any]
SHOWN = ("sequential", "replay", "dgg", "guard50", "l2sp", "ewc", "other")
COLOURS = {
    "joint": "0.45", "sequential": "0.7", "replay": "black", "replay_other_lr": "0.3",
    "dgg": "tab:orange", "guard0": "tab:green", "guard50": "tab:blue", "guard100": "tab:cyan",
    "l2sp": "tab:red", "ewc": "tab:purple", "other": "tab:brown", "guidance": "tab:pink",
}  # fmt: skip


def draw(plan: jobs.Plan, found: Found, out: Path) -> list[Path]:
    """Draw what there are results for; returns the files."""
    made = []
    if found["digits"] or found["in-domain"] or found["shifted"]:
        made.append(_saved(_forest(found), out / "forest.png"))
    if any(not setting.endswith("-0") for setting in found["digits"]):  # some have a memory
        made.append(_saved(_alphas(plan, found), out / "alpha.png"))
    for bed in jobs.LLAVA_BEDS:
        if found[bed]:
            made += of_bed(bed, found[bed], out)
            if figure := _traces(plan, found[bed]):
                made.append(_saved(figure, out / f"traces-{bed}.png"))
            write_events(found[bed], out / "events" / bed)
    return made


def of_bed(bed: str, runs: summary.ByArm, out: Path) -> list[Path]:
    """Draw matrices, curves and the scatter of one LLaVA bed; returns the files."""
    return [
        _saved(_matrices(runs), out / f"matrices-{bed}.png"),
        _saved(_scatter(runs), out / f"stability-plasticity-{bed}.png"),
    ]


def _saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=110)
    part.replace(path)
    return path


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **more: Any) -> Any:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


# -- paired differences ----------------------------------------------------------------------------


def _forest(found: Found) -> Any:
    """Mean paired difference with its 95 % interval, a row a comparison, a dot a seed."""
    rows: list[tuple[str, str, str, str]] = []
    for bed in jobs.LLAVA_BEDS:
        for first, second in (protocol.PRIMARY, *protocol.SECONDARY):
            rows.append((f"{bed}: {summary.pair(first, second)}", bed, first, second))
    for setting in found["digits"]:
        rows.append((f"{setting}: guard, w = ½ − replay", setting, *protocol.PRIMARY))
    known = [r for r in rows if summary.comparison(found, *r[1:]) is not None]
    figure, axes = _figure(9, 1.4 + 0.27 * len(known))
    axes = axes[0, 0]
    for place, (_, bed, first, second) in enumerate(known):
        each = list(summary.differences(found, bed, first, second).values())
        got = paired.compare(each)
        axes.scatter(each, [place] * len(each), s=6, color="0.7", zorder=1)
        sure = got.p is not None and got.p < protocol.LEVEL
        colour = "tab:blue" if sure and got.mean > 0 else "tab:red" if sure else "black"
        if got.n > 1:
            axes.plot([got.low, got.high], [place, place], color=colour, linewidth=1.6, zorder=2)
        axes.plot(got.mean, place, "o", color=colour, markersize=4.5, zorder=3)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(known)), [text for text, *_ in known], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(
        "difference of final average accuracy, points: mean and 95 % interval; dots: seeds;\n"
        "coloured: p < 0.05, not corrected", fontsize=8,
    )  # fmt: skip
    axes.grid(axis="x", alpha=0.25)
    return figure


# -- α ---------------------------------------------------------------------------------------------


def _alphas(plan: jobs.Plan, found: Found) -> Any:
    """FAA against α, the guard as a band: tiny memory left, ample memory right."""
    memories = sorted({*plan.digit_remembered} - {0})
    columns = [(steps, memory) for steps in plan.digit_steps for memory in memories]
    beds = plan.digit_beds
    figure, axes = _figure(2.7 * len(columns), 2.2 * len(beds) + 0.6, len(beds), len(columns))
    for row, bed in enumerate(beds):
        for column, (steps, memory) in enumerate(columns):
            setting, panel = f"{bed}-{steps}-{memory}", axes[row, column]
            if setting not in found["digits"]:
                panel.set_axis_off()
                continue
            _alpha_panel(panel, found, setting)
            panel.set_title(f"{bed}, {steps} steps, {memory} remembered", fontsize=8)
    figure.supylabel("final accuracy − replay only", fontsize=9)
    figure.supxlabel("α; at 0 replay only. Bars and band: 95 % intervals", fontsize=9)
    drawn = [panel for panel in axes.flat if panel.has_data()]
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _alpha_panel(panel: Any, found: Found, setting: str) -> None:
    gains = [summary.comparison(found, setting, f"alpha{a:g}", "replay") for a in protocol.ALPHAS]
    places = [k + 1 for k, got in enumerate(gains) if got]
    known = [got for got in gains if got]
    reach = [got.high - got.mean if got.n > 1 else 0 for got in known]
    panel.errorbar(
        [0, *places], [0, *(got.mean for got in known)], [0, *reach],
        marker="o", markersize=3, linewidth=1.2, capsize=2, color=COLOURS["dgg"], label="DGG",
    )  # fmt: skip
    for name in protocol.GUARDS:
        got = summary.comparison(found, setting, name, "replay")
        if got is None:
            continue
        panel.axhline(got.mean, color=COLOURS[name], linewidth=1.1, label=LABELS[name])
        if name == protocol.PRIMARY[0] and got.n > 1:
            panel.axhspan(got.low, got.high, color=COLOURS[name], alpha=0.15, linewidth=0)
    labels = ["0", *(f"{a:g}" for a in protocol.ALPHAS)]
    panel.set_xticks(range(len(labels)), labels, fontsize=7)
    panel.tick_params(labelsize=7)
    panel.axhline(0, color="0.5", linewidth=0.6)
    panel.grid(alpha=0.25)


# -- matrices, curves, scatter ---------------------------------------------------------------------


def _matrices(runs: summary.ByArm) -> Any:
    """Above the accuracy matrices, below the accuracy on every sub-task over time."""
    names = [name for name in SHOWN if name in runs] or list(runs)[:6]
    figure, axes = _figure(2.5 * len(names) + 0.6, 5.2, 2, len(names))
    image = None
    for column, name in enumerate(names):
        mean = digits_study.mean_matrix([run["matrix"] for run in runs[name].values()])
        panel = AccuracyMatrix.from_rows(mean).plot(axes[0, column], vmax=100)
        image = panel.images[0]
        for text in panel.texts:
            text.set_fontsize(6)
        panel.set(xlabel="", ylabel="")
        panel.set_title(LABELS.get(name, name), fontsize=8)
        numbers = [str(k + 1) for k in range(len(mean))]
        panel.set_xticks(range(len(mean)), numbers, rotation=0, ha="center")
        panel.set_yticks(range(len(mean)), numbers)
        for j in range(len(mean)):
            curve = [mean[i][j] for i in range(j, len(mean))]
            axes[1, column].plot(
                range(j + 1, len(mean) + 1), curve, marker="o", markersize=2.5, linewidth=1,
                color=f"C{j}",
            )  # fmt: skip
        axes[1, column].set_ylim(0, 102)
        axes[1, column].set_xlabel("sub-tasks trained", fontsize=7)
        axes[1, column].grid(alpha=0.25)
        for panel in axes[:, column]:
            panel.tick_params(labelsize=6)
    axes[0, 0].set_ylabel("after training the k-th", fontsize=7)
    axes[1, 0].set_ylabel("accuracy, %", fontsize=7)
    figure.colorbar(image, ax=axes[0, :].tolist(), shrink=0.8)
    return figure


def _scatter(runs: summary.ByArm) -> Any:
    """Plasticity (learning accuracy) against stability (− forgetting), a dot a seed."""
    figure, axes = _figure(6, 4.6)
    axes = axes[0, 0]
    for name, by_seed in runs.items():
        known = [r for r in by_seed.values() if r["forgetting"] is not None]
        if not known:
            continue
        x, y = [run["learning"] for run in known], [-run["forgetting"] for run in known]
        colour = COLOURS.get(name, "0.5")
        axes.scatter(x, y, s=8, color=colour, alpha=0.35)
        axes.plot(
            statistics.mean(x), statistics.mean(y), "o", color=colour, markersize=8,
            markeredgecolor="black", label=LABELS.get(name, name),
        )  # fmt: skip
    axes.set_xlabel("plasticity: accuracy right after training, %", fontsize=9)
    axes.set_ylabel("stability: − forgetting, points", fontsize=9)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.25)
    return figure


# -- traces ----------------------------------------------------------------------------------------

TRACED = ("loss", "pull", "alignment", "distance")


def traced(runs: summary.ByArm) -> dict[str, list[dict[str, float]]]:
    """The traces of the one seed that has them, by arm."""
    found = {}
    for name, by_seed in runs.items():
        for run in by_seed.values():
            if run["trace"]:
                found[name] = run["trace"]
    return found


def _traces(plan: jobs.Plan, runs: summary.ByArm) -> Any:
    """Pull, alignment and distance over the steps of one seed."""
    shown = {
        name: trace
        for name, trace in traced(runs).items()
        if any("pull" in point for point in trace)
    }
    if not shown:
        return None
    figure, axes = _figure(9, 6.4, len(TRACED) - 1, 1, sharex=True)
    texts = ("‖pull‖ / ‖gradient‖", "cos(h, r)", "‖u‖")
    for panel, what, text in zip(axes[:, 0], TRACED[1:], texts, strict=True):
        for name, trace in shown.items():
            points = [(p["step"], p[what]) for p in trace if what in p]
            if points:
                panel.plot(
                    *zip(*points, strict=True), linewidth=0.9, color=COLOURS.get(name),
                    label=LABELS.get(name, name),
                )  # fmt: skip
        panel.set_ylabel(text, fontsize=8)
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7)
    axes[-1, 0].set_xlabel(f"step of seed {plan.test_seeds[0]}", fontsize=8)
    return figure


def write_events(runs: summary.ByArm, folder: Path) -> bool:
    """The traces as TensorBoard events, a run an arm; False where there is no tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    for name, trace in traced(runs).items():
        with SummaryWriter(str(folder / name)) as writer:
            for point in trace:
                for what in TRACED:
                    if what in point:
                        writer.add_scalar(what, point[what], int(point["step"]))
    return True
