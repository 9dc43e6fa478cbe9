# SPDX-License-Identifier: BSD-3-Clause
"""Pre-trains the base and makes base.safetensors again: python bench/minivqa/pretrain.py

First the vision tower alone, then captions of crowded scenes, then one caption batch to seven
question batches; the scenes asked about grow from two objects to four or more. Data never repeat,
so there is nothing to over-fit to.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from functools import partial
from pathlib import Path

# One thread adds up in one order only. The variables must be set before torch is loaded.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from minivqa import model as vqa  # noqa: E402
from minivqa import scenes  # noqa: E402


def _crowd(rng: random.Random) -> scenes.Item:
    """A scene full of objects, with nothing asked: a caption of it teaches the most."""
    looks = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randint(3, scenes.CELLS))]
    return scenes.Item(scenes.scatter(rng, looks), (), "")


def _caption_loss(model, items, pixels) -> torch.Tensor:
    """Cross-entropy of the caption's 18 words, teacher-forced: a dense signal."""
    prompts, captions = scenes.encode_captions(items)
    tokens = torch.cat((prompts, captions[:, :-1]), dim=1)
    hidden = vqa.last_hidden(model, tokens, vqa.live_features(model, pixels))
    logits = model.lm_head(hidden[:, prompts.shape[1] - 1 :])
    return F.cross_entropy(logits.flatten(0, 1), captions.flatten())


def _question_loss(model, items, pixels) -> torch.Tensor:
    prompts, answers = scenes.encode(items)
    return F.cross_entropy(
        vqa.answer_logits(model, prompts, vqa.live_features(model, pixels)), answers
    )


def plain_accuracy(model) -> dict[str, float]:
    """Accuracy of the base on 300 fresh questions a sub-task, seen by the plain camera."""
    rng, generator = random.Random(10_000), torch.Generator().manual_seed(10_000)
    scores = {}
    for task in scenes.TASKS:
        items = scenes.make_items(task, 300, rng)
        features = vqa.image_features(model, scenes.render(items, scenes.PLAIN, generator))
        prompts, answers = scenes.encode(items)
        scores[task.name] = vqa.accuracy(
            partial(vqa.answer_logits, model), (prompts, features, answers)
        )
    return scores


def _train_eyes(model, rng, generator, steps: int, batch: int) -> None:
    """Vision tower and projector first, with a linear head that is thrown away afterwards.

    Through four fresh layers of language model the tower learns colours at once but shapes not in
    2,000 steps; asked directly for what is in each cell it takes 200.
    """
    head = torch.nn.Linear(128, 14)  # 6 colours or none, 6 shapes or none
    tower = (model.model.vision_tower, model.model.multi_modal_projector, head)
    parameters = [p for module in tower for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        items = [_crowd(rng) for _ in range(batch)]
        truth = torch.full((2, batch, scenes.CELLS), 6)
        for k, item in enumerate(items):
            for thing in item.things:
                truth[:, k, thing.cell] = torch.tensor((thing.colour, thing.shape))
        pixels = scenes.render(items, scenes.PLAIN, generator)
        logits = head(vqa.live_features(model, pixels)).unflatten(-1, (2, 7)).movedim(2, 0)
        loss = F.cross_entropy(logits.flatten(0, 2), truth.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = (logits.argmax(-1) == truth).float().mean()
            print(f"eyes {step + 1:5d}  loss {loss.item():.3f}  cells right {100 * right:.1f} %")


def main() -> None:
    """Pre-train, write the file, and print the accuracy of every kind of question."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    steps, caption_steps, batch, lr = 3000, 300, 64, 2e-3
    torch.manual_seed(0)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    model = vqa.build().train()
    _train_eyes(model, rng, generator, 300, batch)
    # torch's own AdamW on purpose: the base shall not depend on what the demo is about.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    running = {"caption": 0.0, "question": 0.0}
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * warm * max(decay, 0.01)
        crowd = 2 if step < caption_steps + steps // 8 else 4
        if step < caption_steps or step % 8 == 0:
            kind, loss_of = "caption", _caption_loss
            items = [_crowd(rng) for _ in range(batch)]
        else:
            kind, loss_of = "question", _question_loss
            items = [rng.choice(scenes.TASKS).make(rng, crowd) for _ in range(batch)]
        loss = loss_of(model, items, scenes.render(items, scenes.PLAIN, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = loss.item()
        running[kind] = value if running[kind] == 0 else 0.97 * running[kind] + 0.03 * value
        if (step + 1) % 100 == 0:
            losses = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"{step + 1:5d}  {losses}", flush=True)
        if (step + 1) % 500 == 0:
            save(model)
            model.eval()
            print("       " + "  ".join(f"{k} {v:.0f}" for k, v in plain_accuracy(model).items()))
            model.train()
    scores = plain_accuracy(vqa.load_base())
    print({name: round(value, 1) for name, value in scores.items()})
    print(f"{vqa.BASE_PATH}: {time.perf_counter() - began:.0f} s")


def save(model) -> None:
    """Store the weights in float16, half the bytes and no measurable loss."""
    weights = {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    save_file(weights, vqa.BASE_PATH, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
