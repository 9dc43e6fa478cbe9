# SPDX-License-Identifier: BSD-3-Clause
"""AdamW, Adam and SGD with Dynamic Gradient Guidance, and the guidance of any other optimizer."""

from dgg.optim.adam import Adam, AdamW
from dgg.optim.guidance import Guidance
from dgg.optim.sgd import SGD
from dgg.optim.unwrap import unwrap

__all__ = ["SGD", "Adam", "AdamW", "Guidance", "unwrap"]
