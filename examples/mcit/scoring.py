# SPDX-License-Identifier: BSD-3-Clause
r"""Answers by `generate`, scores of answers, and the metrics of a run.

**Scores** of a prediction p against the answers of a question, in per cent:

- ``exact``: p is one of the answers, apart from upper and lower case and outer spaces. CoIN scores
  its question-answering tasks so.
- ``contained``: p is not empty and stands in one of the answers, by the same comparison. UCIT's
  scripts do so (and count an empty p as right, which is not done here).
- ``rouge_l``: for captions, ROUGE-L as coco-caption computes it: from the longest common
  subsequence of words, precision P and recall R, each the best over all captions of the picture;
  the score is (1 + β²) P R / (R + β² P) with β = 1.2. Words are runs of ``\w``, in lower case.

**Metrics** from R[i][j], the score on task j after training on task i of T (both from 0). MCITlib
(arXiv 2508.07307) names them; dgg.metrics has each by another name:

    MFT  mean finetune accuracy   1/T · Σ_j R[j][j]                          learning accuracy
    MFN  mean final accuracy      1/T · Σ_j R[T-1][j]                        FAA
    MAA  mean average accuracy    1/T · Σ_i ( 1/(i+1) · Σ_{j≤i} R[i][j] )    AIA
    BWT  backward transfer        1/(T-1) · Σ_{j<T-1} ( R[T-1][j] - R[j][j] )

The paper of DGG reports ``faa_weighted``: Σ_j n_j R[T-1][j] / Σ_j n_j with n_j test questions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from dgg.metrics import AccuracyMatrix

MCITLIB = {"MFT": "learning", "MFN": "faa", "MAA": "aia", "BWT": "bwt"}
BETA = 1.2


def score(name: str, prediction: str, answers: Sequence[str]) -> float:
    """Returns a score from 0 to 1; the names are those of the module's docstring."""
    if name == "rouge_l":
        return _rouge_l(prediction, answers)
    said = prediction.strip().upper()
    known = [answer.strip().upper() for answer in answers]
    if name == "exact":
        return float(said in known)
    if name == "contained":
        return float(bool(said) and any(said in answer for answer in known))
    raise ValueError(f"no score {name!r}")


def _rouge_l(prediction: str, answers: Sequence[str]) -> float:
    words = _words(prediction)
    precision = recall = 0.0
    for answer in answers:
        other = _words(answer)
        if words and other:
            common = _longest_common(words, other)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(other))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        above = 0  # of the row before, one column to the left
        for place, other in enumerate(right, 1):
            kept = row[place]
            row[place] = above + 1 if word == other else max(kept, row[place - 1])
            above = kept
    return row[-1]


def scores_of(wanted: str, predictions: Sequence[str], rows: Sequence[dict]) -> dict[str, float]:
    """Returns the means in per cent: the task's own score, and for questions both of them."""
    names = [wanted] if wanted == "rouge_l" else ["exact", "contained"]
    pairs = list(zip(predictions, rows, strict=True))
    return {
        name: 100 * sum(score(name, said, row["answers"]) for said, row in pairs) / len(pairs)
        for name in names
    }


@torch.inference_mode()
def answers(
    model, batches, rows: Sequence[dict], size: int, longest: int, rank: int, world: int
) -> list[str]:
    """Returns what the model says to every question: greedily, each rank a part, all on all ranks.

    Args:
        model: The whole model, on this rank's device.
        batches: Makes prompts, a `Batches`.
        rows: The questions, the same on all ranks.
        size: How many are answered at once.
        longest: Tokens of an answer at most.
        rank: This rank.
        world: How many there are.
    """
    from accelerate.utils import gather_object

    model.eval()
    mine = list(range(rank, len(rows), world))
    found: list[tuple[int, str]] = []
    dtype = next(p.dtype for n, p in model.named_parameters() if "lora_" not in n)
    for start in range(0, len(mine), size):
        part = mine[start : start + size]
        batch = batches.prompts([rows[k] for k in part]).to(model.device, dtype)
        out = model.generate(**batch, max_new_tokens=longest, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        said = batches.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        found += [(k, text.strip()) for k, text in zip(part, said, strict=True)]
    every = gather_object(found) if world > 1 else found
    return [text for _, text in sorted(every)]


def results(
    names: Sequence[str], sizes: Sequence[int], kinds: Sequence[str], rows: Sequence[Sequence]
) -> dict[str, Any]:
    """Returns what is known after some tasks: matrix and metrics, over the tasks so far.

    Args:
        names: The tasks so far.
        sizes: How many test questions each has.
        kinds: Which score stands in the matrix for each.
        rows: Row i has the scores on tasks 0 to i after training on task i.
    """
    square = [[*row, *[None] * (len(rows) - len(row))] for row in rows]
    matrix = AccuracyMatrix.from_rows(square, names, sizes)
    known = matrix.summary()
    return {
        "after": names[-1], "tasks": list(names), "sizes": list(sizes), "scores": list(kinds),
        "matrix": matrix.rows,
        "mcitlib": {name: known[ours] for name, ours in MCITLIB.items()},
        "metrics": known, "undefined": matrix.undefined(),
    }  # fmt: skip
