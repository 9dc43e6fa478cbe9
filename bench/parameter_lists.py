# SPDX-License-Identifier: BSD-3-Clause
"""Parameter lists the step benchmark runs on."""

from __future__ import annotations

import math

# The public configuration of Llama-2-7B, the language model of LLaVA-1.5-7B.
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 4096, 11008, 32, 32000
# Width of the CLIP tower whose features LLaVA projects.
VISION = 1024
# (inputs, outputs) of the linear layers of a block: q, k, v, o, gate, up, down.
LINEARS = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INTERMEDIATE)] * 2 + [(INTERMEDIATE, HIDDEN)]


def one_tensor(elements: int) -> list[tuple[int, ...]]:
    """Returns the shape list of a single vector."""
    return [(elements,)]


def many_tiny(tensors: int = 448, elements: int = 8) -> list[tuple[int, ...]]:
    """Returns as many shapes as a 7B LoRA has, too small for anything but overhead to count."""
    return [(elements,)] * tensors


def llava_7b_lora(rank: int) -> list[tuple[int, ...]]:
    """Returns A [rank, inputs] and B [outputs, rank] of all linear layers of LLaVA-7B's Llama."""
    layer = [shape for inputs, outputs in LINEARS for shape in ((rank, inputs), (outputs, rank))]
    return layer * LAYERS


def of_four_dimensions(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns shapes of as many elements that a convolution could have, for channels_last.

    The inputs of a matrix become a quarter as many at 2 × 2 positions; a vector gets two outputs.
    """
    found = []
    for shape in shapes:
        outputs, inputs = shape if len(shape) == 2 else (2, shape[0] // 2)
        found.append((outputs, inputs // 4, 2, 2) if inputs > 4 else (outputs, inputs // 2, 2, 1))
    return found


def llava_7b_full() -> list[tuple[int, ...]]:
    """Returns what full fine-tuning of LLaVA-7B trains: language model and projector."""
    layer = [(outputs, inputs) for inputs, outputs in LINEARS] + [(HIDDEN,)] * 2
    projector = [(HIDDEN, VISION), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,)]
    embeddings = [(VOCABULARY, HIDDEN)]
    return embeddings + layer * LAYERS + [(HIDDEN,)] + embeddings + projector


def count(shapes: list[tuple[int, ...]]) -> int:
    """Returns the number of elements of a shape list."""
    return sum(math.prod(shape) for shape in shapes)
