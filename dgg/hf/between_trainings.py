# SPDX-License-Identifier: BSD-3-Clause
"""What is kept of a model and of an optimizer from one training to the next.

A script may make a new Trainer and a new callback for every task.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from dgg.anchor.names import RESERVED

# How many tasks have come to their end, by model; see `core`.
tasks_done: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
# Number of the task that has made a step and did not reach its end, by model.
unfinished: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
# Which groups had an alpha of 0 when not all had, by optimizer.
_unguided: weakref.WeakKeyDictionary[Any, list[bool]] = weakref.WeakKeyDictionary()


def core(model: nn.Module) -> nn.Module:
    """Returns the module inside the wrappers of torch, of engines and of peft.

    It outlives them: `merge_and_unload`, a second `get_peft_model`, a wrapper for every task.
    """
    while True:
        children = dict(model.named_children())
        base: Any = getattr(model, "get_base_model", None)
        inner: Any = next((children[name] for name in RESERVED if name in children), None)
        if inner is None and list(children) == ["module"]:  # DDP, DataParallel
            inner = children["module"]
        elif inner is None and callable(base):
            inner = base()
        if inner is None or inner is model:
            return model
        model = inner


def unguided_groups(opt) -> list[bool]:
    """Returns which groups are not to be guided in any task: alpha is 0 there, and not in all.

    In all of them it may be 0 for one task, by a callback with an alpha for each.
    """
    zero = [bool(group["alpha"] == 0) for group in opt.param_groups]
    if not all(zero):
        _unguided[opt] = zero
        return zero
    known = _unguided.get(opt, [])
    return known if len(known) == len(zero) else [False] * len(zero)
