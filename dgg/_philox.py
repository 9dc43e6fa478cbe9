# SPDX-License-Identifier: BSD-3-Clause
"""Philox4x32-10, the counter-based generator of every Bernoulli draw.

A draw is a pure function of the seed, the draw index and the position in the unsharded
parameter, so masks are bit-identical on every backend, rank count and mesh, nothing touches a
global generator, and the draw of the next step is known at this one.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF

STREAM_STEP = 0
STREAM_TENSOR = 1
STREAM_ELEMENT = 1 << 31
STREAM_ROUNDING = 3 << 30


def block(seed, counter):
    """Returns the four 32-bit words of one counter.

    The arithmetic is plain ``*``, ``>>``, ``^`` and ``&``, so the counter's words may be Python
    integers or int64 tensors that broadcast; both give the same words.

    Args:
        seed: Python integer in [0, 2**64); low word and high word are the key.
        counter: Four words in [0, 2**32): integers or int64 tensors.

    Returns:
        Tuple of four words of the counter's type, each in [0, 2**32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64; shifting and masking recovers both halves anyway.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def step_word(seed: int, draw: int) -> int:
    """Returns the word that decides step ``draw`` (granularity ``"step"``)."""
    return block(seed, (0, 0, draw & _MASK, STREAM_STEP))[0]


def tensor_words(seed: int, draw: int, indices: torch.Tensor) -> torch.Tensor:
    """Returns one word per tensor (granularity ``"tensor"``).

    Args:
        seed: Seed in [0, 2**64).
        draw: Draw index k.
        indices: int64 tensor of tensor indices j, counted over all groups in order.

    Returns:
        int64 tensor shaped like ``indices``.
    """
    zero = torch.zeros_like(indices)
    return block(seed, (zero, zero, zero + (draw & _MASK), indices + STREAM_TENSOR))[0]


def element_words(
    seed: int, draw: int, index: int, elements: torch.Tensor, stream: int = STREAM_ELEMENT
) -> torch.Tensor:
    """Returns one word per element (granularity ``"element"``, and stochastic rounding).

    Args:
        seed: Seed in [0, 2**64).
        draw: Draw index k.
        index: Index j of the tensor over all groups.
        elements: int64 tensor of row-major indices in the unsharded parameter.
        stream: STREAM_ELEMENT, or STREAM_ROUNDING for the words of stochastic rounding.

    Returns:
        int64 tensor shaped like ``elements``: output word i mod 4 of counter i // 4.
    """
    quad = elements >> 2
    zero = torch.zeros_like(elements)
    words = block(seed, (quad & _MASK, quad >> 32, zero + (draw & _MASK), zero + (stream + index)))
    lane = elements & 3
    out = words[3]
    for number in (2, 1, 0):
        out = torch.where(lane == number, words[number], out)
    return out


def threshold(alpha: float) -> int:
    """Returns floor(alpha * 2**32): inject iff word < threshold (1 always, 0 never)."""
    return int(alpha * 4294967296.0)
