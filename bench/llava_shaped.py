# SPDX-License-Identifier: BSD-3-Clause
"""A model with LLaVA-7B's shapes, of plain torch modules; for training_step.py and nsys_step.py.

The language model is Llama's (RMS norm, rotary positions, SwiGLU) behind LLaVA's projector of image
features; weights are random. The vision tower, frozen in LLaVA's fine-tuning, is left out: its
features are an input. Plain modules instead of transformers, so that a machine needs torch alone
and every version of it runs the same operations.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parameter_lists import HIDDEN, INTERMEDIATE, LAYERS, VISION, VOCABULARY


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults are LLaVA-7B's."""

    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE
    layers: int = LAYERS
    heads: int = 32
    vocabulary: int = VOCABULARY
    vision: int = VISION
    patches: int = 576

    def parameters(self) -> int:
        """Returns the number of weights."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        projector = self.vision * self.hidden + self.hidden**2 + 2 * self.hidden
        ends = 2 * self.vocabulary * self.hidden + self.hidden
        return self.layers * layer + projector + ends


TINY = Shape(hidden=32, intermediate=48, layers=2, heads=4, vocabulary=64, vision=16, patches=6)


class Linear(nn.Linear):
    """A linear layer with room for an adapter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.lora_a = self.lora_b = None

    def add_lora(self, rank: int) -> None:
        """Freezes the weight and adds float32 factors A [rank, in], B [out, rank], as peft does."""
        self.weight.requires_grad_(False)
        device = self.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device).normal_())
        # Not zero, as a fresh adapter's: A would have no gradient and the norms no meaning.
        self.lora_b = nn.Parameter(
            torch.empty(self.out_features, rank, device=device).normal_(std=1e-3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Applies weight and adapter."""
        y = super().forward(x)
        if self.lora_a is None:
            return y
        low = F.linear(x, self.lora_a.to(x.dtype))
        return y + F.linear(low, self.lora_b.to(x.dtype))


class Layer(nn.Module):
    """One block of Llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h, m = shape.hidden, shape.intermediate
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (Linear(h, h) for _ in range(4))
        self.gate, self.up, self.down = Linear(h, m), Linear(h, m), Linear(m, h)
        self.norm_attention, self.norm_mlp = (nn.RMSNorm(h, eps=1e-5) for _ in range(2))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Returns the block's output, [items, length, hidden]."""
        items, length, hidden = x.shape
        y = self.norm_attention(x)
        q, k, v = (
            f(y).view(items, length, self.heads, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        q, k = (z * cosine + _turned(z) * sine for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(items, length, hidden))
        y = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class LlavaShaped(nn.Module):
    """Projector and language model; build it with `make`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        first, second = nn.Linear(shape.vision, shape.hidden), nn.Linear(shape.hidden, shape.hidden)
        self.project = nn.Sequential(first, nn.GELU(), second)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Returns the loss of tokens [items, text] behind features [items, patches, vision]."""
        x = torch.cat([self.project(features), self.embed(tokens)], 1)
        length, width = x.shape[1], self.shape.hidden // self.shape.heads
        rate = 1e4 ** -(torch.arange(0, width, 2, device=x.device) / width)
        angle = torch.outer(torch.arange(length, device=x.device), rate).repeat(1, 2)
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        text = self.head(self.norm(x[:, features.shape[1] :]))[:, :-1]
        return F.cross_entropy(text.flatten(0, 1).float(), tokens[:, 1:].flatten())


def make(shape: Shape, device: torch.device, dtype: torch.dtype, rank: int | None) -> LlavaShaped:
    """Returns a model with random weights; nothing of its size is made elsewhere.

    With a LoRA rank all linear layers of the blocks have adapters, and everything else is frozen.
    """
    with torch.device("meta"):
        model = LlavaShaped(shape).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=0.02)
    if rank is not None:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, Linear):
                module.add_lora(rank)
    return model


def batch(
    shape: Shape, device: torch.device, dtype: torch.dtype, text: int
) -> tuple[Tensor, Tensor]:
    """Returns one item: image features and tokens."""
    generator = torch.Generator(device).manual_seed(1)
    features = torch.empty(1, shape.patches, shape.vision, device=device, dtype=dtype)
    tokens = torch.randint(shape.vocabulary, (1, text), generator=generator, device=device)
    return features.normal_(generator=generator), tokens
