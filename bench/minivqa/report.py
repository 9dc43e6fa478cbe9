# SPDX-License-Identifier: BSD-3-Clause
"""The table on the terminal and the picture."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
COLUMNS = (("faa", "FAA"), ("aia", "AIA"), ("bwt", "BWT"), ("forgetting", "forgetting"))


def by_method(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results grouped by method, each group in the order of its seeds."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result["method"]].append(result)
    return {name: sorted(group, key=lambda r: r["seed"]) for name, group in groups.items()}


def mean_std(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 for one value); None if a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) != len(values):
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def _text(pair: tuple[float, float] | None, seeds: int) -> str:
    if pair is None:
        return "–"
    return f"{pair[0]:.1f} ± {pair[1]:.1f}" if seeds > 1 else f"{pair[0]:.1f}"


def table(results: Sequence[Result]) -> str:
    """Mean ± sample standard deviation over seeds, as a Markdown table."""
    groups = by_method(results)
    seeds = sorted({len(group) for group in groups.values()})
    lines = [
        "| method | " + " | ".join(title for _, title in COLUMNS) + " | seconds a run |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for group in groups.values():
        cells = []
        for key, _ in COLUMNS:
            pair = mean_std([result[key] for result in group])
            cells.append(_text(pair, len(group)))
        seconds = statistics.mean(result["seconds"] for result in group)
        lines.append(f"| {group[0]['label']} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    lines.append("")
    if seeds == [1]:
        lines.append("Accuracy in %, one seed.")
    else:
        lines.append(
            "Accuracy in %, mean ± sample standard deviation over "
            f"{' or '.join(map(str, seeds))} seeds; task order, data, adapter and draws differ "
            "from seed to seed."
        )
    if "replay" in groups and "guidance_replay" in groups:
        plain = {result["seed"]: result["faa"] for result in groups["replay"]}
        gains = [
            r["faa"] - plain[r["seed"]] for r in groups["guidance_replay"] if r["seed"] in plain
        ]
        if gains:
            better = sum(gain > 0 for gain in gains)
            lines.append(
                f"ĝ + replay against replay only: {statistics.mean(gains):+.1f} points, "
                f"better on {better} of {len(gains)} seeds."
            )
    return "\n".join(lines)


def _mean_matrix(group: Sequence[Result]) -> list[list[float | None]]:
    """Entry by entry over the seeds, by position in the sequence (the orders differ)."""
    count = len(group[0]["matrix"])
    mean: list[list[float | None]] = [[None] * count for _ in range(count)]
    for i in range(count):
        for j in range(count):
            pair = mean_std([result["matrix"][i][j] for result in group])
            mean[i][j] = None if pair is None else pair[0]
    return mean


def picture(results: Sequence[Result], path: Path) -> None:
    """Heat maps of R, accuracy of every task over time, and FAA of all methods."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_method(results)
    staged = {name: group for name, group in groups.items() if name != "joint"}
    shown = [n for n in ("sequential", "replay", "l2sp", "guidance_replay") if n in staged]
    shown = shown or list(staged)[:4]
    columns = max(len(shown), 1)
    figure = plt.figure(figsize=(3.6 * columns + 0.6, 10.2), layout="constrained")
    grid = figure.add_gridspec(3, columns, height_ratios=(1.15, 0.9, 0.9))

    heat = None
    for column, name in enumerate(shown):
        mean = _mean_matrix(groups[name])
        count = len(mean)
        label = groups[name][0]["label"]
        axes = figure.add_subplot(grid[0, column])
        values = [[float("nan") if v is None else v for v in row] for row in mean]
        heat = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
        for i in range(count):
            for j in range(i + 1):
                if mean[i][j] is not None:
                    dark = mean[i][j] < 60
                    axes.text(
                        j, i, f"{mean[i][j]:.0f}", ha="center", va="center", fontsize=7,
                        color="white" if dark else "black",
                    )  # fmt: skip
        axes.set_title(label, fontsize=10)
        axes.set_xticks(range(count), [str(j + 1) for j in range(count)], fontsize=8)
        axes.set_yticks(range(count), [str(j + 1) for j in range(count)], fontsize=8)
        axes.set_xlabel("accuracy on the k-th sub-task", fontsize=8)
        axes.set_ylabel("after training the k-th" if column == 0 else "", fontsize=8)

        axes = figure.add_subplot(grid[1, column])
        shades = plt.get_cmap("plasma")
        for j in range(count):
            curve = [mean[i][j] for i in range(j, count)]
            axes.plot(
                range(j + 1, count + 1), [float("nan") if v is None else v for v in curve],
                marker="o", markersize=3, linewidth=1.2, color=shades(0.9 * j / max(count - 1, 1)),
            )  # fmt: skip
        axes.set_ylim(0, 102)
        axes.set_xlim(0.7, count + 0.3)
        axes.set_xlabel("sub-tasks trained", fontsize=8)
        axes.set_ylabel("accuracy, % (dark: learnt early)" if column == 0 else "", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    if heat is not None:
        figure.colorbar(heat, ax=figure.axes[0 : 2 * columns : 2], shrink=0.7, label="accuracy, %")

    axes = figure.add_subplot(grid[2, :])
    ordered = list(groups)[::-1]
    for row, name in enumerate(ordered):
        values = [result["faa"] for result in groups[name]]
        pair = mean_std(values)
        if pair is None:
            continue
        colour = {"joint": "0.6", "guidance_replay": "tab:orange", "guidance": "tab:orange"}.get(
            name, "tab:blue"
        )
        axes.barh(row, pair[0], xerr=pair[1], color=colour, alpha=0.85, height=0.65, capsize=3)
        axes.scatter(values, [row] * len(values), color="black", s=9, zorder=3)
        axes.text(1, row, _text(pair, len(values)), va="center", color="white", fontsize=9)
    axes.set_yticks(range(len(ordered)), [groups[name][0]["label"] for name in ordered], fontsize=9)
    axes.set_xlim(0, 100)
    axes.set_xlabel(
        "final average accuracy (FAA), %; bar: mean, whisker: std, dots: seeds", fontsize=9
    )
    axes.grid(axis="x", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(path)
