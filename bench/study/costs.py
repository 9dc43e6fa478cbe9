# SPDX-License-Identifier: BSD-3-Clause
"""How long the study takes: a few steps of each bed are timed before it starts.

Times are those of the processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

from minivqa import model as vqa
from study import digits, jobs, rules, training
from study.arms import Arm

# Arms take longer than replay alone: two backward passes (guard), Fisher matrices, methods' hooks.
# The mean over the arms of a seed, measured on two cores.
ARMS_OVER_REPLAY = 1.3


def steps_left(plan: jobs.Plan, results: jobs.Results, part: str) -> float:
    """Steps that a part still has."""
    try:
        known = jobs.of_part(plan, results, part)
    except jobs.NotTunedError:
        known = []
    done = sum(job.steps for job in known if results.of(job) is not None)
    return jobs.estimated_steps(plan, part) - done


def of_step(plan: jobs.Plan, part: str) -> float:
    """Seconds a step of a part in one process."""
    if part == "digits":
        return digits_step()
    beds = tuple(plan.sizes) if part == "tuning" else (part,)
    return statistics.mean(llava_step(bed, plan.sizes[bed]) for bed in beds)


@cache
def digits_step(steps: int = 20) -> float:
    """Seconds of one step of one rule, twenty seeds together."""
    torch.set_num_threads(1)
    stream = digits.stream(digits.Setting("permuted", steps, 5), range(200, 220))
    began = time.process_time()
    rules.train(rules.Rule("dgg", alpha=0.1), stream)
    return (time.process_time() - began) / (steps * digits.TASKS)


@cache
def llava_step(bed: str, sizes: training.Sizes, steps: int = 20) -> float:
    """Seconds of one step of an average arm, its share of evaluation included."""
    torch.set_num_threads(1)
    run = training._Run(jobs.BEDS[bed], Arm("replay"), sizes, 200)
    tasks = len(run.data.tasks)
    rows = list(range(sizes.batch))
    run.step(rows, [])
    began = time.process_time()
    for _ in range(steps):
        run.step(rows, [])
    step = (time.process_time() - began) / steps
    began = time.process_time()
    vqa.accuracy(run.answer, *run.data.test[0])
    # After sub-task i all of 0 … i are evaluated.
    evaluation = (time.process_time() - began) * (tasks + 1) / 2 / sizes.steps
    return (step + evaluation) * ARMS_OVER_REPLAY
