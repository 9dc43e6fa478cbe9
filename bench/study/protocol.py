# SPDX-License-Identifier: BSD-3-Clause
"""The numbers of the protocol in docs/forgetting.md: seeds, sizes, ladders, arms, tests.

They were written down before a test seed was run; tests/test_study.py compares page and code.
"""

from __future__ import annotations

from dataclasses import dataclass

from study.arms import Arm
from study.digits import BEDS
from study.rules import Rule
from study.search import Family
from study.training import Sizes

# -- seeds and tests -------------------------------------------------------------------------------

TUNING_SEEDS = (100, 101, 102, 103)
SCREENING_SEEDS = (100, 101)
TEST_SEEDS = tuple(range(20))  # of both LLaVA beds
SEEN_SEEDS = tuple(range(5))  # of the in-domain bed, run by the study before this one
BOUND_SEEDS = TEST_SEEDS[:4]  # joint and sequential training, ĝ alone
DIGIT_SEEDS = tuple(range(20, 40))  # 0 to 9 were looked at while the bed was built
LEVEL = 0.05
MARGIN = 1.0  # points of final average accuracy
BUDGET = 6  # points of every family on the LLaVA beds
DIGIT_BUDGET = 6

# First minus second, on FAA. The guard of the primary test has w = ½.
PRIMARY = ("guard50", "replay")
SECONDARY = (
    ("guard50", "dgg"), ("guard50", "l2sp"), ("guard50", "ewc"), ("guard50", "other"),
    ("guard50", "replay_other_lr"), ("guard0", "replay"), ("guard100", "replay"), ("dgg", "replay"),
)  # fmt: skip

# -- the LLaVA beds --------------------------------------------------------------------------------

IN_DOMAIN = Sizes(steps=260, train_items=600, test_items=200, remembered=6)
SHIFTED = Sizes(steps=260, train_items=600, test_items=200, remembered=6)

RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
FINE_RATES = (5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2)
LINE = ((2,), (3,), (4,), (5,))
SQUARE = ((2, 2), (2, 3), (3, 2), (3, 3))
FAMILIES = {
    "replay": Family("replay", {"lr": FINE_RATES}, LINE),
    "guard": Family("guard", {"lr": FINE_RATES}, LINE),
    "dgg": Family("dgg", {"lr": RATES, "alpha": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)}, SQUARE),
    "l2sp": Family("l2sp", {"lr": RATES, "strength": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}, SQUARE),
    "ewc": Family("ewc", {"lr": RATES, "strength": (10.0, 30.0, 100.0, 300.0, 1e3, 3e3)}, SQUARE),
}
# Methods of bench/methods/ that have an arm of their own name.
OWN_ARMS = ("l2sp", "ewc")
# Of every method with a Fisher matrix: the sum over all 70 to 110 words and 600 items would take
# longer than the training.
FISHER = {"samples": 40, "coverage": 0.9}
# What comparison methods always get on the LLaVA beds.
FIXED_OPTIONS = dict.fromkeys(("ewc", "online_ewc", "perturb_and_merge"), FISHER)
GUARDS = {"guard0": 0.0, "guard50": 0.5, "guard100": 1.0}
SCREENING_LR = 3e-3
TUNED_ARMS = ("replay", "dgg", "l2sp", "ewc", "other")  # each at the values of its own family
COMPARED = (*TUNED_ARMS, "replay_other_lr", *GUARDS)
BOUNDS = ("joint", "sequential", "guidance")


def tuned_arm(family: str, values: dict[str, float], methods: dict[str, str]) -> Arm:
    """The arm of one point of a family; `methods` says which method `other` is."""
    options = {name: value for name, value in values.items() if name != "lr"}
    kind = family
    if family == "replay":
        kind = "plain"
    elif family == "guard":
        options["importance"] = GUARDS[PRIMARY[0]]
    elif family != "dgg":
        kind = methods.get(family, family)
        options = {**FIXED_OPTIONS.get(kind, {}), **options}
    return Arm(family, kind, values["lr"], options)


def other_family(knobs: dict[str, tuple[float, ...]]) -> Family:
    """The family of the strongest other method, from the knobs that its class names."""
    if not knobs:
        return Family("other", {"lr": FINE_RATES}, LINE)
    ((name, ladder),) = knobs.items()
    middle = len(ladder) // 2
    start = tuple((lr, k) for lr in (2, 3) for k in (middle - 1, middle))
    return Family("other", {"lr": RATES, name: tuple(ladder)}, start)


def test_arms(chosen: dict[str, dict[str, float]], methods: dict[str, str]) -> list[Arm]:
    """All arms that are run on every test seed, at the values chosen for every family."""
    found = [tuned_arm(name, chosen[name], methods) for name in TUNED_ARMS if name in chosen]
    if "dgg" in chosen:
        found.append(Arm("replay_other_lr", "plain", chosen["dgg"]["lr"]))
    for name, weight in GUARDS.items():
        if "guard" in chosen:
            found.append(Arm(name, "guard", chosen["guard"]["lr"], {"importance": weight}))
    return found


def bound_arms(chosen: dict[str, dict[str, float]]) -> list[Arm]:
    """The bounds and ĝ alone, which are run on few seeds and were not tuned."""
    if "dgg" not in chosen:
        return []
    lr, options = chosen["dgg"]["lr"], {"alpha": chosen["dgg"]["alpha"]}
    return [
        Arm("joint", "plain", lr, replay=False, joint=True),
        Arm("sequential", "plain", lr, replay=False),
        Arm("guidance", "dgg", lr, options, replay=False),
    ]


# -- digits ----------------------------------------------------------------------------------------

DIGIT_STEPS = (60, 160, 300)
DIGIT_REMEMBERED = (0, 5, 100)
AMPLE = 100  # remembered examples at which the guard must not be worse by the margin
ALPHAS = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the curve of FAA against α
DIGIT_FAMILIES = {
    "dgg": Family("dgg", {"alpha": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)}, LINE),
    "l2sp": Family("l2sp", {"knob": (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3)},
                   ((3,), (4,), (5,), (6,))),
    "ewc": Family("ewc", {"knob": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}, LINE),
    # Both sides of the primary test, each at the learning rate that is best for itself.
    **{
        name: Family(name, {"rate": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)}, LINE)
        for name in ("replay_own_rate", "guard50_own_rate")
    },
}  # fmt: skip
# What a family of another name than its rule's trains with.
DIGIT_RULES = {
    "replay_own_rate": {"kind": "replay"},
    "guard50_own_rate": {"kind": "guard", "importance": GUARDS["guard50"]},
}
OWN_RATES = ("guard50_own_rate", "replay_own_rate")
FIXED_RULES = {
    "replay": Rule("replay"),
    "guard0": Rule("guard", importance=0.0),
    "guard50": Rule("guard", importance=0.5),
    "guard100": Rule("guard", importance=1.0),
    **{f"alpha{a:g}": Rule("dgg", alpha=a) for a in ALPHAS},
    # At the paper's way to draw, where the pull acts and enters.
    "dgg_w50": Rule("dgg", alpha=0.1, importance=0.5),
    "dgg_w100": Rule("dgg", alpha=0.1, importance=1.0),
    "dgg_first_moment": Rule("dgg", alpha=0.1, route="first_moment"),
    "dgg_decoupled": Rule("dgg", alpha=0.1, route="decoupled"),
    "guard50_first_moment": Rule("guard", importance=0.5, route="first_moment"),
    "guard50_decoupled": Rule("guard", importance=0.5, route="decoupled"),
    # The paper's ablations, and a pull of a tenth at every step in place of the draw.
    "no_scaling": Rule("dgg", alpha=0.1, scaling=False),
    "no_draw": Rule("dgg", alpha=1.0),
    "no_draw_tenth": Rule("dgg", alpha=1.0, strength=0.1),
    "laplace": Rule("laplace", knob=1.0),
    "agem": Rule("agem"),
}  # fmt: skip
# Without a memory these are training without replay, and the guard never pulls.
NEED_MEMORY = ("guard", "agem")
NOT_ON_DIGITS = ("grads",)  # it chooses the memory, which is the same for all methods there
ORACLE_STEPS = (60, 160)  # the settings of the goal that looks at the best α in hindsight
OTHER_STEPS = 160  # the classes of bench/methods/ are run at this length alone


@dataclass(frozen=True)
class Ordering:
    """One ordering that the paper reports, as first minus second on one bed."""

    claim: str
    bed: str  # "in-domain", "shifted", or a setting of the digits
    first: str
    second: str


_LLAVA = ("in-domain", "shifted")
ORDERINGS = (
    *(Ordering("ĝ + replay > replay", bed, "dgg", "replay") for bed in _LLAVA),
    *(Ordering("ĝ + replay > replay", f"{bed}-160-5", "dgg", "replay") for bed in BEDS),
    *(Ordering("ĝ alone > sequential", bed, "guidance", "sequential") for bed in _LLAVA),
    *(Ordering("ĝ alone > sequential", f"{bed}-160-0", "dgg", "replay") for bed in BEDS),
    *(Ordering("scaling matters", f"{bed}-160-5", "alpha0.1", "no_scaling") for bed in BEDS),
    *(Ordering("the draw matters", f"{bed}-160-5", "alpha0.1", "no_draw") for bed in BEDS),
)
# “α is flat” is judged by equivalence: both ends of the interval within ± MARGIN.
FLAT = ("alpha0.05", "alpha0.2")

# -- make demo -------------------------------------------------------------------------------------

# What the tuning of the in-domain bed chose on 2026-11-29, for three seeds in four minutes.
DEMO_ARMS = (
    Arm("joint", "plain", 3e-3, replay=False, joint=True),
    Arm("dgg", "dgg", 3e-3, {"alpha": 0.1}),
    Arm("guard50", "guard", 3e-3, {"importance": GUARDS["guard50"]}),
    Arm("ewc", "ewc", 3e-3, {**FISHER, "strength": 100.0}),
    Arm("replay", "plain", 1.5e-3),
    Arm("sequential", "plain", 3e-3, replay=False),
)
