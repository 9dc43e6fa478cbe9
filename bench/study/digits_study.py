# SPDX-License-Identifier: BSD-3-Clause
"""What is run on the digits beds: all rules of a setting, and the classes of bench/methods/."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dgg
from dgg import metrics
from methods import METHODS
from study import arms, digits, protocol, rules, search

METRICS = ("faa", "aia", "bwt", "forgetting", "learning")
Matrix = list[list[float | None]]


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Entry by entry over seeds, by the place in the sequence; None where nothing was trained."""
    size = range(len(matrices[0]))

    def entry(i: int, j: int) -> float | None:
        values = [matrix[i][j] for matrix in matrices]
        return None if None in values else statistics.mean(values)

    return [[entry(i, j) for j in size] for i in size]


def described(matrices: Sequence[Matrix]) -> dict[str, Any]:
    """Every metric by seed, and the mean matrix."""
    summaries = [metrics.summary(matrix) for matrix in matrices]
    mean = [[x if x is None else round(x, 2) for x in row] for row in mean_matrix(matrices)]
    return {**{k: [round(s[k], 4) for s in summaries] for k in METRICS}, "mean_matrix": mean}


def applies(rule: rules.Rule, remembered: int) -> bool:
    """Whether a rule does anything with so large a memory."""
    return remembered > 0 or rule.kind not in protocol.NEED_MEMORY


def run_setting(
    bed: str, steps: int, remembered: int, seeds: Sequence[int], tuning_seeds: Sequence[int]
) -> dict[str, Any]:
    """Tune on validation items of the tuning seeds, then train all rules on the test seeds."""
    setting = digits.Setting(bed, steps, remembered)
    validation = digits.stream(replace(setting, split="validation"), tuning_seeds)
    found, all_rules = {}, dict(protocol.FIXED_RULES)
    for name, family in protocol.DIGIT_FAMILIES.items():
        kind = protocol.DIGIT_RULES.get(name, {"kind": name})
        if not applies(rules.Rule(**kind), remembered):
            continue

        def score(values: dict[str, float], kind: dict[str, Any] = kind) -> float:
            trained = rules.train(rules.Rule(**kind, **values), validation)
            return statistics.mean(described(trained["matrices"])["faa"])

        chosen = search.choose(family, search.walk(family, protocol.DIGIT_BUDGET, score))
        found[name] = asdict(chosen)
        all_rules[name] = rules.Rule(**kind, **chosen.values)
    test, results = digits.stream(setting, seeds), {}
    for name, rule in all_rules.items():
        if applies(rule, remembered):
            trained = rules.train(rule, test)
            pull = [round(x, 5) for x in trained["pull"]]
            results[name] = {**described(trained["matrices"]), "pull": pull}
    return {"chosen": found, "results": results}


# -- the classes of bench/methods/, one seed after another -----------------------------------------


def run_method(
    bed: str,
    steps: int,
    remembered: int,
    method: str,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
) -> dict[str, Any]:
    """Tune one comparison method over the points that it names, then train it on the test seeds."""
    make = METHODS[method]
    setting = digits.Setting(bed, steps, remembered)
    validation = replace(setting, split="validation")

    def score(values: dict[str, float]) -> float:
        matrices = [train_alone(make, values, validation, seed) for seed in tuning_seeds]
        return statistics.mean(described(matrices)["faa"])

    values: dict[str, float] = {}
    found = None
    if make.knobs:
        ((name, ladder),) = make.knobs.items()
        family = search.Family(method, {name: ladder}, tuple((k,) for k in range(len(ladder))))
        chosen = search.choose(family, search.walk(family, len(ladder), score))
        values, found = chosen.values, asdict(chosen)
    matrices = [train_alone(make, values, setting, seed) for seed in seeds]
    return {"chosen": {method: found}, "results": {method: described(matrices)}}


def train_alone(make: type, options: dict[str, Any], setting: digits.Setting, seed: int) -> Matrix:
    """One network with one comparison method, on what the rules see of the same seed."""
    stream = digits.stream(setting, (seed,))
    torch.manual_seed(seed)
    model = network(stream.weights[0])
    named = dict(model.named_parameters())
    opt = dgg.AdamW(named.values(), lr=stream.lr, alpha=0.0, weight_decay=0.0)
    more = {"seed": seed} if "seed" in inspect.signature(make).parameters else {}
    method = make(
        model, named, opt,
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        lambda batch: model(batch[0]),
        **options, **more,
    )  # fmt: skip
    matrix: Matrix = []
    for task, batches in enumerate(stream.tasks):
        arms.forget_moments(opt)
        method.begin_task(task)
        steps = list(zip(batches.images[0], batches.labels[0], strict=True))
        new = digits.BATCH - batches.replayed
        for step, (images, labels) in enumerate(steps):
            rate = min(1, (step + 1) / digits.WARMUP) * (1 - step / setting.steps)
            opt.param_groups[0]["lr"] = stream.lr * rate
            old = (images[new:], labels[new:]) if batches.replayed else None
            method.step((images, labels), old)
        # The new rows of the last steps: some 300 examples of the task.
        method.end_task(task, [(x[:new], y[:new]) for x, y in steps[-12:]])
        with torch.no_grad():
            accuracy = [
                100 * (model(images[0]).argmax(-1) == labels[0]).sum().item()
                / (labels[0] >= 0).sum().item()
                for images, labels in zip(stream.test_images, stream.test_labels, strict=True)
            ]  # fmt: skip
        matrix.append([a if j <= task else None for j, a in enumerate(accuracy)])
    return matrix


def network(flat: Tensor) -> torch.nn.Module:
    """The network of the beds as a module, with these weights."""
    model = torch.nn.Sequential(
        torch.nn.Linear(digits.INPUTS, digits.HIDDEN),
        torch.nn.ReLU(),
        torch.nn.Linear(digits.HIDDEN, digits.CLASSES),
    ).to(flat.dtype)
    # Copied: the stream is another method's, too.
    torch.nn.utils.vector_to_parameters(flat.clone(), model.parameters())
    return model
