# SPDX-License-Identifier: BSD-3-Clause
"""A small LLaVA, and the LoRA adapter that the sub-tasks train.

The base is a `LlavaForConditionalGeneration` built from a configuration (0.9 M parameters),
pre-trained on captions and on a mix of all eight kinds of question, seen by the plain camera only.
It is shipped as `base.safetensors` (float16); `bench/minivqa/pretrain.py` makes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

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
    return torch.cat([live_features(inner(model), part) for part in pixels.split(chunk)])


def live_features(llava, pixels: torch.Tensor) -> torch.Tensor:
    """The same, with their graph."""
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
