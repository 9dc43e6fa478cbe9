# SPDX-License-Identifier: BSD-3-Clause
"""A small LLaVA, its pre-training, and the LoRA adapter that the sub-tasks train.

The base is a `LlavaForConditionalGeneration` built from a configuration (0.9 M parameters),
pre-trained on captions and on a mix of all eight kinds of question, seen by the plain camera only.
It is shipped as `base.safetensors` (float16); `bench/minivqa/pretrain.py` makes it again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from minivqa import scenes

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

BASE_PATH = Path(__file__).with_name("base.safetensors")
# Plain names would also match the vision tower, whose attention has a q_proj and a v_proj too.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build() -> LlavaForConditionalGeneration:
    """The model with fresh weights (drawn from torch's global generator)."""
    # Imported here because it takes seconds, and the process that shows progress needs none of it.
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        image_size=scenes.IMAGE_PIXELS, patch_size=scenes.CELL_PIXELS, projection_dim=96,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=len(scenes.VOCABULARY), max_position_embeddings=64,
        bos_token_id=scenes.WORD_ID[scenes.BEGIN], eos_token_id=None, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=scenes.WORD_ID[scenes.IMAGE],
        image_seq_length=scenes.CELLS, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def load_base() -> LlavaForConditionalGeneration:
    """The shipped base in float32, frozen."""
    model = build()
    weights = {name: value.float() for name, value in load_file(BASE_PATH).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing or unexpected:
        raise ValueError(f"{BASE_PATH} does not fit the model: {missing=} {unexpected=}")
    return model.eval().requires_grad_(False)


def with_lora(model: LlavaForConditionalGeneration, rank: int, seed: int):
    """The base with a LoRA adapter on every linear layer of its language model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # peft draws the A factors from the global generator
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS, bias="none"
    )
    return get_peft_model(model, config)


def inner(model) -> LlavaForConditionalGeneration:
    """The LLaVA inside peft's wrapper (or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def image_features(model, pixels: torch.Tensor, chunk: int = 512) -> torch.Tensor:
    """Projected image tokens (items, 9, hidden): the tower is frozen, so once is enough."""
    return torch.cat([_live_features(inner(model), part) for part in pixels.split(chunk)])


def _live_features(llava, pixels: torch.Tensor) -> torch.Tensor:
    return torch.stack(tuple(llava.get_image_features(pixel_values=pixels).pooler_output))


def last_hidden(model, prompts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Hidden states of the language model for prompts whose <image> tokens are these features."""
    llava = inner(model)
    embeds = llava.get_input_embeddings()(prompts)
    slots = (prompts == scenes.WORD_ID[scenes.IMAGE]).unsqueeze(-1)
    embeds = embeds.masked_scatter(slots, features.to(embeds.dtype))
    return llava.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def answer_logits(model, prompts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Logits of the one-word answer: the head is applied to the last position only."""
    return inner(model).lm_head(last_hidden(model, prompts, features)[:, -1])


class Answerer:
    """The logits and gradients of `answer_logits` of an adapted model, with fewer operations.

    At this size a training step is mostly the cost of calling small operations. So the adapter is
    added to the frozen weights first (W + scaling * B A, all layers of one shape in one call), and
    the last layer is worked out for the last position only. The model's own parameters are used:
    what the optimizer changes is what the next call sees.
    """

    def __init__(self, model) -> None:
        llava = inner(model)
        self._language = language = llava.model.language_model
        self._head, self._embed = llava.lm_head, llava.get_input_embeddings()
        layers = language.layers
        self._attention = _Stack(
            [getattr(x.self_attn, n) for x in layers for n in ("q_proj", "k_proj", "v_proj")]
        )
        self._out = _Stack([x.self_attn.o_proj for x in layers])
        self._up = _Stack([getattr(x.mlp, n) for x in layers for n in ("gate_proj", "up_proj")])
        self._down = _Stack([x.mlp.down_proj for x in layers])
        self._width = layers[0].self_attn.head_dim
        length = 2 + scenes.QUESTION_WORDS + scenes.CELLS
        cosine, sine = language.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        # Rotation is x * cos + roll(x) * sin, with the sign of the first half put into sin.
        self._cosine, self._sine = cosine[0], sine[0].clone()
        self._sine[:, : self._width // 2].neg_()
        self._mask = torch.full((length, length), float("-inf")).triu(1)

    def __call__(self, prompts: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Logits (items, words) for prompts (items, 19) and image features (items, 9, hidden)."""
        slots = (prompts == scenes.WORD_ID[scenes.IMAGE]).unsqueeze(-1)
        x = self._embed(prompts).masked_scatter(slots, features)
        items, _, hidden = x.shape
        width, cosine, sine, mask = self._width, self._cosine, self._sine, self._mask
        layers = self._language.layers
        stacks = (self._attention, self._out, self._up, self._down)
        weights = zip(*(stack.merged(len(layers)) for stack in stacks), strict=True)
        for layer, (attention, out, up, down) in zip(layers, weights, strict=True):
            y = F.linear(_norm(x, layer.input_layernorm), attention)
            q, k, v = y.view(items, -1, 3, hidden // width, width).permute(2, 0, 3, 1, 4)
            k = k * cosine + k.roll(width // 2, -1) * sine
            if layer is layers[-1]:  # nothing but the last position is asked for
                x, q = x[:, -1:], q[:, :, -1:]
                cosine, sine, mask = cosine[-1:], sine[-1:], mask[-1:]
            q = q * cosine + q.roll(width // 2, -1) * sine
            score = q @ k.transpose(-1, -2) * width**-0.5 + mask
            y = (score.softmax(-1) @ v).transpose(1, 2).reshape(items, -1, hidden)
            x = x + F.linear(y, out)
            y = F.linear(_norm(x, layer.post_attention_layernorm), up)
            gate, value = y.chunk(2, -1)
            x = x + F.linear(F.silu(gate) * value, down)
        return self._head(_norm(x[:, -1], self._language.norm))


class _Stack:
    """Linear layers of one shape, with their adapters."""

    def __init__(self, linears) -> None:
        self._frozen = torch.stack([linear.base_layer.weight for linear in linears])
        self._a = [linear.lora_A["default"].weight for linear in linears]
        self._b = [linear.lora_B["default"].weight for linear in linears]
        (self._scaling,) = {linear.scaling["default"] for linear in linears}

    def merged(self, layers: int) -> tuple[torch.Tensor, ...]:
        """W + scaling * B A: one matrix a layer, the rows of its linears below each other."""
        b, a = torch.stack(self._b), torch.stack(self._a)
        merged = torch.baddbmm(self._frozen, b, a, alpha=self._scaling)
        return merged.view(layers, -1, merged.shape[-1]).unbind()


def _norm(x: torch.Tensor, norm) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def accuracy(
    answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    together: int = 1,
    chunk: int = 100,
) -> float:
    """Share of right items in %, over the whole vocabulary (no list of choices is given).

    Args:
        answer: returns logits for prompts and image features.
        rows: prompts, image features and answers.
        together: so many rows make one item, which is right if all of them are.
        chunk: rows that are answered at once.
    """
    found = []
    for prompts, features, answers in zip(*(x.split(chunk) for x in rows), strict=True):
        found.append(answer(prompts, features).argmax(-1) == answers)
    return 100 * torch.cat(found).view(-1, together).all(1).double().mean().item()


# -------------------------------------------------------------------------------- pre-training


def _crowd(rng: random.Random) -> scenes.Item:
    """A scene full of objects, with nothing asked: a caption of it teaches the most."""
    looks = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randint(3, scenes.CELLS))]
    return scenes.Item(scenes.scatter(rng, looks), (), "")


def _caption_loss(model, items, pixels) -> torch.Tensor:
    """Cross-entropy of the caption's 18 words, teacher-forced: a dense signal."""
    prompts, captions = scenes.encode_captions(items)
    tokens = torch.cat((prompts, captions[:, :-1]), dim=1)
    hidden = last_hidden(model, tokens, _live_features(model, pixels))
    logits = model.lm_head(hidden[:, prompts.shape[1] - 1 :])
    return F.cross_entropy(logits.flatten(0, 1), captions.flatten())


def _question_loss(model, items, pixels) -> torch.Tensor:
    prompts, answers = scenes.encode(items)
    return F.cross_entropy(answer_logits(model, prompts, _live_features(model, pixels)), answers)


def plain_accuracy(model) -> dict[str, float]:
    """Accuracy of the base on 300 fresh questions a sub-task, seen by the plain camera."""
    rng, generator = random.Random(10_000), torch.Generator().manual_seed(10_000)
    scores = {}
    for task in scenes.TASKS:
        items = scenes.make_items(task, 300, rng)
        features = image_features(model, scenes.render(items, scenes.PLAIN, generator))
        prompts, answers = scenes.encode(items)
        scores[task.name] = accuracy(partial(answer_logits, model), (prompts, features, answers))
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
        logits = head(_live_features(model, pixels)).unflatten(-1, (2, 7)).movedim(2, 0)
        loss = F.cross_entropy(logits.flatten(0, 2), truth.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = (logits.argmax(-1) == truth).float().mean()
            print(f"eyes {step + 1:5d}  loss {loss.item():.3f}  cells right {100 * right:.1f} %")


def pretrain() -> dict[str, float]:
    """Pre-train the base and save it in float16.

    First the vision tower alone, then captions of crowded scenes, then one caption batch to seven
    question batches; the scenes asked about grow from two objects to four or more. Data never
    repeat, so there is nothing to over-fit to.
    """
    steps, caption_steps, batch, lr = 3000, 300, 64, 2e-3
    torch.manual_seed(0)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    model = build().train()
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
    return plain_accuracy(load_base())


def save(model) -> None:
    """Store the weights in float16, half the bytes and no measurable loss."""
    weights = {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    save_file(weights, BASE_PATH, metadata={"format": "pt"})
