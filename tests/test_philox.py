# SPDX-License-Identifier: BSD-3-Clause
"""The draws: known answers, both spellings alike, rate, independence of position and order."""

from __future__ import annotations

import pytest
import torch

from dgg import _philox


def test_known_answers():
    # Random123's kat_vectors for philox4x32-10.
    assert [f"{w:08x}" for w in _philox.block(0, (0, 0, 0, 0))] == [
        "6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8",
    ]  # fmt: skip
    ones = 0xFFFFFFFF
    assert [f"{w:08x}" for w in _philox.block(2**64 - 1, (ones,) * 4)] == [
        "408f276d", "41c83b0e", "a20bc7c6", "6d5451fd",
    ]  # fmt: skip
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert [f"{w:08x}" for w in _philox.block(0x299F31D0A4093822, counter)] == [
        "d16cfe09", "94fdcceb", "5001e420", "24126ea1",
    ]  # fmt: skip


def test_tensors_and_integers_agree():
    seed = 0xDEADBEEFCAFEF00D
    elements = torch.tensor([0, 1, 2, 3, 4, 7, 4 * 2**32 + 1, 2**40 + 3])
    words = _philox.element_words(seed, 2**32 + 9, 5, elements)
    for i, word in zip(elements.tolist(), words.tolist(), strict=True):
        quad = i // 4
        counter = (quad & 0xFFFFFFFF, quad >> 32, 9, 2**31 + 5)
        assert _philox.block(seed, counter)[i % 4] == word
    tensor = _philox.tensor_words(seed, 3, torch.tensor([0, 11]))
    assert tensor.tolist() == [_philox.block(seed, (0, 0, 3, 1 + j))[0] for j in (0, 11)]
    assert _philox.step_word(seed, 3) == _philox.block(seed, (0, 0, 3, 0))[0]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_rate_is_alpha(alpha):
    # 40,000 draws: four standard deviations of a binomial.
    words = _philox.element_words(1, 2, 3, torch.arange(40_000))
    rate = (words < _philox.threshold(alpha)).double().mean().item()
    assert abs(rate - alpha) < 4 * (alpha * (1 - alpha) / 40_000) ** 0.5


def test_thresholds():
    assert _philox.threshold(0.0) == 0
    assert _philox.threshold(1.0) == 2**32
    assert _philox.threshold(0.2) == int(0.2 * 2**32)
    assert _philox.step_word(0, 0) < 2**32
