# SPDX-License-Identifier: BSD-3-Clause
"""dgg: Dynamic Gradient Guidance for continual fine-tuning, fused into the optimizer step."""

import typing as _typing

from dgg import metrics
from dgg.backends import libraries as _libraries
from dgg.backends import show_config
from dgg.checkpoint.convert import convert_state_dict
from dgg.optim import SGD, Adam, AdamW, Guidance, unwrap
from dgg.replay import ReplayBuffer

_libraries.warn_if_unbuilt()

__version__ = "0.1.0.dev0"

__all__ = [
    "SGD", "Adam", "AdamW", "Guidance", "ReplayBuffer", "convert_state_dict", "hf", "metrics",
    "show_config", "unwrap",
]  # fmt: skip


if _typing.TYPE_CHECKING:
    from dgg import hf
else:  # type checkers would take a module with __getattr__ to have every name

    def __getattr__(name: str):
        # transformers is large and optional: dgg.hf is imported when it is asked for.
        if name == "hf":
            import importlib

            return importlib.import_module("dgg.hf")
        raise AttributeError(f"module 'dgg' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
