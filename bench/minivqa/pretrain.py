# SPDX-License-Identifier: BSD-3-Clause
"""Makes bench/minivqa/base.safetensors again: python bench/minivqa/pretrain.py"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

# One thread adds up in one order only. The variables must be set before torch is loaded.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> None:
    """Pre-train, write the file, and print the accuracy of every kind of question."""
    import torch

    from minivqa import model

    torch.set_num_threads(1)
    began = time.perf_counter()
    scores = model.pretrain()
    print({name: round(value, 1) for name, value in scores.items()})
    print(f"{model.BASE_PATH}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
