# SPDX-License-Identifier: BSD-3-Clause
"""What came out: the comparisons of the protocol as tables, and all raw results as one file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from provenance import origin
from report import replace
from study import digits, jobs, paired, protocol, search
from study.arms import LABELS

ByArm = dict[str, dict[int, dict[str, Any]]]  # arm, seed: the result of the run
OTHER_METRICS = ("aia", "forgetting", "learning")
SHORT = {
    "replay": "replay", "dgg": "DGG, α tuned", "guard0": "guard, w = 0", "guard50": "w = ½",
    "guard100": "w = 1", "l2sp": "L2-SP", "ewc": "EWC", "laplace": "λ B Σv̂ ∘ d",
}  # fmt: skip


def write(plan: jobs.Plan, results: jobs.Results, out: Path) -> None:
    """Write study.json, report.md and the pictures, of what is there."""
    from study import pictures

    found = collected(plan, results)
    text = "\n\n".join(sections(found))
    replace(out / "report.md", text + "\n")
    stored = {"config": {**_provenance(plan), "origins": results.origins()}, **found}
    replace(out / "study.json", _in_lines(stored, 4) + "\n")
    made = pictures.draw(plan, found, out)
    print(f"{text}\n\n{out / 'report.md'}, {out / 'study.json'}, {len(made)} pictures")


def _in_lines(value: Any, depth: int) -> str:
    """JSON with a line for every entry down to a depth: a number a line would be a million."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    entries = (f"{json.dumps(key)}: {_in_lines(x, depth - 1)}" for key, x in value.items())
    return "{\n" + ",\n".join(entries) + "\n}"


PAGE_MARKS = ("<!-- study: begin; bench/study/run.py --page writes it -->", "<!-- study: end -->")


def into_page(found: dict[str, Any], page: str) -> str:
    """Returns a page of the documentation with the report between its marks.

    Raises:
        SystemExit: the page has not both marks, each once.
    """
    begin, end = PAGE_MARKS
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"the page needs the lines {begin} and {end}, each once")
    head, tail = page.split(begin)[0], page.split(end)[1]
    # A section of the report is a part of one of the page.
    text = "\n\n".join(sections(found)).replace("## ", "### ")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def collected(plan: jobs.Plan, results: jobs.Results) -> dict[str, Any]:
    """All results that are there, by part: JSON."""
    found: dict[str, Any] = {"digits": {}, "tuning": {}, "in-domain": {}, "shifted": {}}
    for job in jobs.digit_jobs(plan):
        if (result := results.of(job)) is not None:
            setting = f"{job.spec['digits']}-{job.spec['steps']}-{job.spec['remembered']}"
            kept = found["digits"].setdefault(setting, {"chosen": {}, "results": {}})
            kept["chosen"].update(result["chosen"])
            kept["results"].update(result["results"])
    for bed in jobs.LLAVA_BEDS:
        try:
            chosen, methods = jobs.chosen(plan, results, bed)
        except jobs.NotTunedError:
            continue
        found["tuning"][bed] = {
            "chosen": {name: asdict(one) for name, one in chosen.items()},
            "other": methods.get("other"),
        }
        for job in jobs.test_jobs(plan, results, bed):
            if (result := results.of(job)) is not None:
                found[bed].setdefault(job.spec["arm"]["name"], {})[str(job.spec["seed"])] = result
    return found


def _provenance(plan: jobs.Plan) -> dict[str, Any]:
    versions = {}
    for package in ("dgg", "torch", "transformers", "peft", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "plan": asdict(plan),
        **origin(),
        "versions": versions,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


# -- comparisons -----------------------------------------------------------------------------------


def values(found: dict[str, Any], bed: str, name: str, metric: str = "faa") -> dict[int, float]:
    """A metric by seed, of an arm of a LLaVA bed or of a rule of a digits setting."""
    if bed in jobs.LLAVA_BEDS:
        runs = found[bed].get(name, {})
        return {int(seed): run[metric] for seed, run in runs.items() if run[metric] is not None}
    rule = found["digits"].get(bed, {}).get("results", {}).get(name)
    return dict(enumerate(rule[metric])) if rule else {}


def differences(
    found: dict[str, Any], bed: str, first: str, second: str, metric: str = "faa"
) -> dict[int, float]:
    """First minus second by seed, of the seeds that both have."""
    ours, theirs = (values(found, bed, name, metric) for name in (first, second))
    seeds = sorted(ours.keys() & theirs.keys())
    return dict(zip(seeds, paired.differences(ours, theirs, seeds), strict=True))


def comparison(
    found: dict[str, Any], bed: str, first: str, second: str, metric: str = "faa"
) -> paired.Comparison | None:
    """First minus second over the seeds that both have; None if there are none."""
    gains = differences(found, bed, first, second, metric)
    return paired.compare(list(gains.values())) if gains else None


def row(what: str, got: paired.Comparison, *more: str) -> tuple[str, ...]:
    """One line of a table of differences."""
    p = [chance(x) for x in (got.p, got.p_sign_flip)]
    return (
        what, str(got.n), signed(got.mean), f"{signed(got.low)} to {signed(got.high)}", *p,
        number(got.d_z, 2).replace("-", "−"), f"{got.wins}/{got.ties}/{got.losses}", *more,
    )  # fmt: skip


HEAD = (
    "difference", "n", "mean", "95 % interval", "p (t)", "p (flips)", "d_z", "won/tied/lost"
)  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, "|---|" + "---:|" * (len(head) - 1), *others])


def number(x: float | None, digits: int) -> str:
    """A number, or a dash where there is none."""
    return "–" if x is None or x != x else f"{x:.{digits}f}"


def chance(p: float | None) -> str:
    """A probability."""
    return "< 0.001" if p is not None and p < 0.001 else number(p, 3)


def signed(x: float) -> str:
    """A number with its sign; a true minus."""
    return number(x, 1) if x != x else f"{x:+.1f}".replace("-", "−")


def sections(found: dict[str, Any]) -> list[str]:
    """The headings, texts and tables of the report."""
    sections = ["## Primary tests", _primary(found)]
    for bed in jobs.LLAVA_BEDS:
        if found[bed]:
            sections += [f"## The bed {bed}", marginals(found[bed]), _tests(found, bed)]
            sections.append(_minus_replay(found, bed))
            if bed == "in-domain":
                sections.append(_fresh(found))
    if found["digits"]:
        sections += ["## The digits", *_digits(found), _own_rates(found)]
        sections += [_ample(found), _goals(found)]
    sections += ["## The orderings of the paper", _orderings(found), _flat(found)]
    if found["tuning"]:
        sections += ["## What tuning chose", _tuning(found)]
    return sections


def marginals(runs: ByArm) -> str:
    """Every arm's own numbers; differences are for the next table."""
    rows = []
    for name in sorted(runs, key=lambda n: list(LABELS).index(n) if n in LABELS else 99):
        group = list(runs[name].values())
        cells = [LABELS.get(name, name), str(len(group))]
        for metric in ("faa", *OTHER_METRICS):
            known = [run[metric] for run in group if run[metric] is not None]
            cells.append(number(statistics.mean(known), 1) if known else "–")
        rows.append(cells)
    return table(("arm", "seeds", "FAA", *map(str.upper, OTHER_METRICS)), rows)


def _primary(found: dict[str, Any]) -> str:
    """The primary test on both LLaVA beds, with Holm's p over the two."""
    what = pair(*protocol.PRIMARY)
    tests = {f"{what}, {b}": comparison(found, b, *protocol.PRIMARY) for b in jobs.LLAVA_BEDS}
    return table((*HEAD, "Holm's p"), _with_holm(tests))


def _with_holm(tests: dict[str, paired.Comparison | None]) -> list[tuple[str, ...]]:
    """The rows of a family of tests, of those that could be made."""
    known = {what: got for what, got in tests.items() if got}
    adjusted = paired.holm({what: got.p for what, got in known.items()})
    return [row(what, got, chance(adjusted[what])) for what, got in known.items()]


def _tests(found: dict[str, Any], bed: str) -> str:
    """The secondary tests with Holm's p, and other metrics of the primary pair."""
    rows = _with_holm({pair(*p): comparison(found, bed, *p) for p in protocol.SECONDARY})
    for metric in OTHER_METRICS:
        if got := comparison(found, bed, *protocol.PRIMARY, metric):
            rows.append(row(f"{metric}, {pair(*protocol.PRIMARY)}", got, ""))
    return table((*HEAD, "Holm's p"), rows)


def _minus_replay(found: dict[str, Any], bed: str) -> str:
    """The arms that no test against replay was planned for."""
    rows = [
        row(pair(name, "replay"), got)
        for name in ("l2sp", "ewc", "other")
        if (got := comparison(found, bed, name, "replay"))
    ]
    return f"Not planned, and not corrected:\n\n{table(HEAD, rows)}" if rows else ""


def pair(first: str, second: str) -> str:
    """How a difference is written."""
    return f"{LABELS.get(first, first)} − {LABELS.get(second, second)}"


def _fresh(found: dict[str, Any]) -> str:
    """The primary test over the seeds that no earlier study has run."""
    gains = differences(found, "in-domain", *protocol.PRIMARY)
    fresh = [gain for seed, gain in gains.items() if seed not in protocol.SEEN_SEEDS]
    if not fresh:
        return ""
    return table(HEAD, [row("primary, seeds never run before", paired.compare(fresh))])


def _digits(found: dict[str, Any]) -> list[str]:
    """A table a memory with the rules that matter most, and one with all the others."""
    sections = [
        "Mean difference from replay alone in points of FAA (of replay alone the FAA itself); a "
        "star where p < 0.05, not\ncorrected. Without a memory replay alone is training on the new "
        "task only, and the guard cannot act."
    ]
    settings = [setting.split("-") for setting in found["digits"]]
    for memory in sorted({int(memory) for _, _, memory in settings}):
        rows = [
            [f"{bed}, {steps} steps"]
            + [_gain(found, f"{bed}-{steps}-{memory}", name) for name in SHORT]
            for bed, steps, its_memory in settings
            if int(its_memory) == memory
        ]
        sections.append(table([f"{memory} remembered", *SHORT.values()], rows))
    shown = [setting for setting in settings if setting[1] == str(protocol.OTHER_STEPS)]
    keys = ["-".join(setting) for setting in shown]
    names = dict.fromkeys(n for key in keys for n in found["digits"][key]["results"])
    rows = [
        [LABELS.get(name, name), *(_gain(found, key, name) for key in keys)]
        for name in names
        if name == "replay" or name not in SHORT
    ]
    if rows:
        columns = [f"{bed[0]} {memory}" for bed, _, memory in shown]
        sections.append("All others, by the first letter of the bed and the memory.")
        sections.append(table([f"{protocol.OTHER_STEPS} steps", *columns], rows))
    return sections


def _gain(found: dict[str, Any], setting: str, name: str) -> str:
    """A cell of the digits tables."""
    if name == "replay":
        known = values(found, setting, name).values()
        return f"{statistics.mean(known):.1f}" if known else "–"
    got = comparison(found, setting, name, "replay")
    star = "\\*" if got and got.p is not None and got.p < protocol.LEVEL else ""
    return f"{signed(got.mean)}{star}" if got else "–"


def _own_rates(found: dict[str, Any]) -> str:
    """Guard − replay where each has the learning rate that tuning chose for it."""
    rows = []
    for setting, one in found["digits"].items():
        if got := comparison(found, setting, *protocol.OWN_RATES):
            bed_rate = digits.LEARNING_RATES[setting.split("-")[0]]
            rates = "; ".join(
                f"{one['chosen'][name]['values']['rate']:g} × {bed_rate:g}"
                for name in protocol.OWN_RATES
            )
            rows.append(row(f"{setting} ({rates})", got))
    text = (
        "Guard (w = ½) − replay, each with a learning rate of its own (in this order in brackets)."
    )
    return f"{text}\n\n{table(HEAD, rows)}"


def _ample(found: dict[str, Any]) -> str:
    """Non-inferiority to replay where the memory is ample."""
    rows = []
    for setting in found["digits"]:
        if not setting.endswith(f"-{protocol.AMPLE}"):
            continue
        for name in protocol.GUARDS:
            ours, theirs = values(found, setting, name), values(found, setting, "replay")
            if len(ours) < 2:
                continue
            got = paired.non_inferior(paired.differences(ours, theirs), protocol.MARGIN)
            shown = "not worse" if got.holds else "not shown"
            rows.append((f"{setting}, {LABELS[name]}", signed(got.low), shown))
    margin, memory = f"{protocol.MARGIN:g} point", f"{protocol.AMPLE} remembered examples"
    text = f"Not worse than replay by {margin}, with {memory}:"
    head = ("guard − replay", "lower end of the 95 % interval", "verdict")
    return f"{text}\n\n{table(head, rows)}"


def goals(found: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """How often the goals of the protocol are met on the digits: (met, settings)."""
    below: list[bool] = []
    oracle: list[bool] = []
    for setting in found["digits"]:
        if (got := comparison(found, setting, "guard100", "replay")) is None:
            continue  # no memory
        below.append(got.p is None or got.p >= protocol.LEVEL or got.mean > 0)
        if int(setting.split("-")[1]) not in protocol.ORACLE_STEPS:
            continue
        curve = {
            name: statistics.mean(values(found, setting, name).values())
            for name in (f"alpha{a:g}" for a in protocol.ALPHAS)
        }
        best = max(curve, key=curve.__getitem__)
        against = comparison(found, setting, protocol.PRIMARY[0], best)
        oracle.append(against is not None and against.n > 1 and against.mean >= -against.error)
    return {
        "guard with w = 1 not significantly below replay": (sum(below), len(below)),
        "guard with w = ½ within one standard error of the best α": (sum(oracle), len(oracle)),
    }


def _goals(found: dict[str, Any]) -> str:
    rows = [(what, f"{met} of {count}") for what, (met, count) in goals(found).items()]
    return table(("goal, settings with a memory", "met"), rows)


def _orderings(found: dict[str, Any]) -> str:
    rows = []
    for one in protocol.ORDERINGS:
        if got := comparison(found, one.bed, one.first, one.second):
            rows.append(row(f"{one.claim}; {one.bed}", got, paired.verdict(got)))
    return table((*HEAD, "verdict"), rows)


def flat(got: paired.Comparison, margin: float) -> str:
    """The verdict on “α hardly matters”: the whole interval within ± margin, or p < 0.05."""
    if got.n > 1 and -margin < got.low and got.high < margin:
        return "reproduced"
    return "not reproduced" if got.p is not None and got.p < protocol.LEVEL else "undecided"


def _flat(found: dict[str, Any]) -> str:
    rows = []
    for bed in found["digits"]:
        if got := comparison(found, bed, *protocol.FLAT):
            rows.append(row(f"α 0.05 − α 0.2; {bed}", got, flat(got, protocol.MARGIN)))
    return table((*HEAD, "α is flat"), rows)


def _tuning(found: dict[str, Any]) -> str:
    rows = []
    for bed, tuned in found["tuning"].items():
        for name, one in tuned["chosen"].items():
            what = tuned["other"] if name == "other" else name
            inside = "yes" if one["interior"] else "no"
            score, tried = f"{one['score']:.1f}", str(one["tried"])
            rows.append((bed, what, search.label(one["values"]), score, tried, inside))
    return table(("bed", "family", "chosen", "FAA, validation", "points", "interior"), rows)
