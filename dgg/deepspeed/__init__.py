# SPDX-License-Identifier: BSD-3-Clause
"""Steps that DeepSpeed's ZeRO optimizers drive, a flat partition at a time."""

from dgg.deepspeed.driver import Driver, find_driver

__all__ = ["Driver", "find_driver"]
