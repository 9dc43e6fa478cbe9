# SPDX-License-Identifier: BSD-3-Clause
"""What the parts of the study consist of: jobs, each with a file of its own.

Tuning goes in rounds, because the next points depend on the results of the last ones; the test arms
depend on what tuning chose. All of it is read from the files, so that a killed study goes on.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from methods import METHODS
from study import arms, digits, digits_study, in_domain, protocol, search, shifted, training
from study.arms import Arm

BEDS = {"in-domain": in_domain.BED, "shifted": shifted.BED}
LLAVA_BEDS = tuple(BEDS)
# Comparison methods beside those that have an arm of their own.
OTHERS = tuple(name for name in METHODS if name not in protocol.OWN_ARMS)


@dataclass(frozen=True)
class Plan:
    """How much of everything: the protocol's numbers, or tiny ones for tests."""

    sizes: dict[str, training.Sizes]
    test_seeds: tuple[int, ...] = protocol.TEST_SEEDS
    bound_seeds: tuple[int, ...] = protocol.BOUND_SEEDS
    tuning_seeds: tuple[int, ...] = protocol.TUNING_SEEDS
    screening_seeds: tuple[int, ...] = protocol.SCREENING_SEEDS
    budget: int = protocol.BUDGET
    digit_beds: tuple[str, ...] = digits.BEDS
    digit_steps: tuple[int, ...] = protocol.DIGIT_STEPS
    digit_remembered: tuple[int, ...] = protocol.DIGIT_REMEMBERED
    digit_seeds: tuple[int, ...] = protocol.DIGIT_SEEDS
    other_steps: int = protocol.OTHER_STEPS
    arms: tuple[str, ...] | None = None  # only these, and only these families


FULL = Plan({"in-domain": protocol.IN_DOMAIN, "shifted": protocol.SHIFTED})
_TINY = {"steps": 4, "train_items": 24, "test_items": 12, "remembered": 3, "warmup": 2}
SMOKE = Plan(
    {bed: training.Sizes(**_TINY) for bed in LLAVA_BEDS},
    test_seeds=(0, 1, 2), bound_seeds=(0,), tuning_seeds=(100,), screening_seeds=(100,), budget=2,
    digit_beds=("permuted",), digit_steps=(8,), digit_remembered=(0, 5), digit_seeds=(20, 21, 22),
    other_steps=8,
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One file of results: where it belongs, and everything its numbers depend on."""

    part: str
    name: str
    spec: dict[str, Any]
    steps: float  # of the optimizer, for estimates

    @property
    def path(self) -> str:
        """Relative to the folder of the study."""
        return f"runs/{self.part}/{self.name}.json"

    def fingerprint(self) -> str:
        """Names everything that the numbers depend on."""
        return json.dumps({"spec": self.spec, "data": _digest(self.spec["bed"])}, sort_keys=True)


@cache
def _digest(bed: str) -> str:
    files = (digits.DATA_PATH,) if bed == "digits" else BEDS[bed].files
    return training.file_digest(*files)


# -- digits ----------------------------------------------------------------------------------------


def digit_jobs(plan: Plan) -> list[Job]:
    """One job a setting with all rules, and one a setting and comparison method."""
    seeds = {"seeds": list(plan.digit_seeds), "tuning_seeds": list(plan.tuning_seeds)}
    found, runs = [], len(plan.digit_seeds) + 4 * len(plan.tuning_seeds)
    settings = itertools.product(plan.digit_beds, plan.digit_steps, plan.digit_remembered)
    for bed, steps, remembered in settings:
        spec = {"bed": "digits", "digits": bed, "steps": steps, "remembered": remembered, **seeds}
        name = f"{bed}-{steps}-{remembered}"
        # All seeds of a rule at once take as long as one or two by themselves.
        found.append(Job("digits", name, spec, 40 * 5 * steps))
        for method in OTHERS if steps == plan.other_steps else ():
            if method not in protocol.NOT_ON_DIGITS:
                alone = {**spec, "method": method}
                found.append(Job("digits", f"{name}-{method}", alone, runs * 5 * steps))
    return found


# -- the LLaVA beds --------------------------------------------------------------------------------


def llava_job(part: str, name: str, bed: str, arm: Arm, sizes: training.Sizes, seed: int) -> Job:
    """One arm, one seed, which is the end of the job's name."""
    spec = {"bed": bed, "arm": asdict(arm), "sizes": asdict(sizes), "seed": seed}
    return Job(part, f"{name}-{seed}", spec, 6 * sizes.steps)


class NotTunedError(SystemExit):
    """The test arms are not known before the tuning is finished."""

    def __init__(self) -> None:
        super().__init__("tuning is not finished: run --part tuning first")


class Results:
    """The files of a study's folder."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def of(self, job: Job) -> dict[str, Any] | None:
        """The result of a job, or None if it is not finished.

        Raises:
            SystemExit: the file is of another experiment.
        """
        path = self.out / job.path
        if not path.exists():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["fingerprint"] != job.fingerprint():
            raise SystemExit(f"{path} is of another experiment; use another --out")
        return stored["result"]

    def origins(self) -> list[dict[str, Any]]:
        """Code version and processor of all runs, each once, with their first and last date."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.out.glob("runs/*/*.json")):
            origin = json.loads(path.read_text(encoding="utf-8"))["origin"]
            date = origin.pop("date")
            kept = found.setdefault(json.dumps(origin, sort_keys=True), {**origin, "runs": 0})
            kept["runs"] += 1
            kept["first_date"] = min(date, kept.get("first_date", date))
            kept["last_date"] = max(date, kept.get("last_date", date))
        return list(found.values())


def _wanted(plan: Plan, name: str) -> bool:
    """Whether an arm, or the family that its values come from, is part of the plan."""
    return plan.arms is None or name in plan.arms


def screening_jobs(plan: Plan) -> list[Job]:
    """Every comparison method at one point, in-domain, to find the strongest."""
    if not _wanted(plan, "other"):
        return []
    sizes = replace(plan.sizes["in-domain"], split="validation")
    found = []
    for seed, name in itertools.product(plan.screening_seeds, OTHERS):
        knobs = METHODS[name].knobs
        options = {knob: ladder[len(ladder) // 2 - 1] for knob, ladder in knobs.items()}
        options = {**protocol.FIXED_OPTIONS.get(name, {}), **options}
        arm = Arm(name, name, protocol.SCREENING_LR, options)
        found.append(llava_job("tuning", f"screening-{name}", "in-domain", arm, sizes, seed))
    return found


def tuned_families(plan: Plan) -> list[str]:
    """Names of the families that are tuned for the arms of the plan."""
    guarded = any(_wanted(plan, name) for name in protocol.GUARDS)
    return [
        name
        for name in (*protocol.FAMILIES, "other")
        if _wanted(plan, name) or (name == "guard" and guarded)
    ]


def strongest(plan: Plan, results: Results) -> str | None:
    """The comparison method with the highest mean FAA in the screening; None while it runs."""
    scores: dict[str, list[float]] = {}
    for job in screening_jobs(plan):
        found = results.of(job)
        if found is None:
            return None
        scores.setdefault(job.spec["arm"]["name"], []).append(found["faa"])
    return max(scores, key=lambda name: statistics.mean(scores[name])) if scores else None


def families(plan: Plan, results: Results) -> tuple[dict[str, search.Family], dict[str, str]]:
    """The families to tune, and the method that is `other`."""
    tuned = tuned_families(plan)
    found = {name: family for name, family in protocol.FAMILIES.items() if name in tuned}
    other = strongest(plan, results)
    if other is None:
        return found, {}
    found["other"] = protocol.other_family(METHODS[other].knobs)
    return found, {"other": other}


def tuning_round(plan: Plan, results: Results) -> list[Job]:
    """The jobs of the tuning that can run now: the next points of every family of both beds."""
    found = screening_jobs(plan)
    all_families, methods = families(plan, results)
    for bed in plan.sizes:
        for family in all_families.values():
            scores = _tried(plan, results, bed, family, methods)
            for point in [*scores, *search.next_points(family, scores, plan.budget)]:
                found += _point_jobs(plan, bed, family, family.values(point), methods)
    return found


def _point_jobs(
    plan: Plan, bed: str, family: search.Family, values: dict[str, float], methods: dict[str, str]
) -> list[Job]:
    name = f"{bed}-{family.name}-{search.label(values)}"
    arm = protocol.tuned_arm(family.name, values, methods)
    sizes = replace(plan.sizes[bed], split="validation")
    return [llava_job("tuning", name, bed, arm, sizes, seed) for seed in plan.tuning_seeds]


def _tried(
    plan: Plan, results: Results, bed: str, family: search.Family, methods: dict[str, str]
) -> dict[search.Point, float]:
    """The mean FAA of the points that are finished; found by walking the search again."""

    def score(values: dict[str, float]) -> float | None:
        done = [results.of(job) for job in _point_jobs(plan, bed, family, values, methods)]
        return None if None in done else statistics.mean(found["faa"] for found in done)

    return search.walk(family, plan.budget, score)


def chosen(
    plan: Plan, results: Results, bed: str
) -> tuple[dict[str, search.Chosen], dict[str, str]]:
    """What tuning chose on a bed.

    Raises:
        NotTunedError: tuning is not finished.
    """
    all_families, methods = families(plan, results)
    found = {}
    if _wanted(plan, "other") and "other" not in all_families:
        raise NotTunedError
    for name, family in all_families.items():
        scores = _tried(plan, results, bed, family, methods)
        if search.next_points(family, scores, plan.budget):
            raise NotTunedError
        found[name] = search.choose(family, scores)
    return found, methods


def test_jobs(plan: Plan, results: Results, bed: str) -> list[Job]:
    """All arms on all test seeds, seed by seed, so that a worker keeps the images of a seed."""
    picked, methods = chosen(plan, results, bed)
    values = {name: one.values for name, one in picked.items()}
    sizes, found = plan.sizes[bed], []
    for seed in plan.test_seeds:
        compared = protocol.test_arms(values, methods)
        if seed in plan.bound_seeds:
            compared += protocol.bound_arms(values)
        found += [
            llava_job(bed, arm.name, bed, arm, sizes, seed)
            for arm in compared
            if _wanted(plan, arm.name)
        ]
    return found


def estimated_steps(plan: Plan, part: str) -> float:
    """How many steps a whole part has, before it is known which they are."""
    if part == "digits":
        return sum(job.steps for job in digit_jobs(plan))
    steps = {bed: 6 * sizes.steps for bed, sizes in plan.sizes.items()}
    if part == "tuning":
        points = len(tuned_families(plan)) * plan.budget * len(plan.tuning_seeds)
        screening = sum(job.steps for job in screening_jobs(plan))
        return sum(points * x for x in steps.values()) + screening
    compared = sum(_wanted(plan, name) for name in protocol.COMPARED)
    bounds = sum(_wanted(plan, name) for name in protocol.BOUNDS)
    return (compared * len(plan.test_seeds) + bounds * len(plan.bound_seeds)) * steps[part]


def of_part(plan: Plan, results: Results, part: str) -> list[Job]:
    """The jobs of a part, finished or not; of the tuning those that are known by now."""
    if part == "digits":
        return digit_jobs(plan)
    return tuning_round(plan, results) if part == "tuning" else test_jobs(plan, results, part)


def expected_jobs(plan: Plan, part: str, known: Sequence[Job]) -> int:
    """How many jobs a part has in all, those included that are not known yet."""
    if part != "tuning":
        return len(known)
    points = len(tuned_families(plan)) * plan.budget * len(plan.tuning_seeds) * len(plan.sizes)
    return points + len(screening_jobs(plan))


# -- one job ---------------------------------------------------------------------------------------


def unrunnable(jobs: Iterable[Job]) -> dict[str, str]:
    """Why some arms cannot run with the installed dgg, by name."""
    found: dict[str, str] = {}
    for job in jobs:
        if "arm" in job.spec:
            arm = Arm(**job.spec["arm"])
            if arm.name not in found and (reason := arms.missing(arm)):
                found[arm.name] = reason
    return found


def execute(job: Job, checkpoint: Path, stop: Callable[[], bool]) -> dict[str, Any]:
    """Run a job in this process."""
    spec = job.spec
    if spec["bed"] == "digits":
        where = (spec["digits"], spec["steps"], spec["remembered"])
        seeds: Sequence[Sequence[int]] = (spec["seeds"], spec["tuning_seeds"])
        if "method" in spec:
            return digits_study.run_method(*where, spec["method"], *seeds)
        return digits_study.run_setting(*where, *seeds)
    sizes, seed = training.Sizes(**spec["sizes"]), spec["seed"]
    # Curves of single steps are shown of one seed; those of all would be megabytes.
    every = 10 if seed == protocol.TEST_SEEDS[0] else 0
    return training.run(
        BEDS[spec["bed"]], Arm(**spec["arm"]), sizes, seed, checkpoint,
        trace_every=every, stop=stop,
    )  # fmt: skip
