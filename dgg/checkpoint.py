# SPDX-License-Identifier: BSD-3-Clause
"""Distributed checkpoints: what one holds of an optimizer, and whether torch's helper is at work.

torch.distributed.checkpoint fills a template, and what the template has no room for is left out.
The template of a new optimizer is made by a step with zero gradients.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

_HELPERS = "torch.distributed.checkpoint.state_dict"


def making_template() -> bool:
    """Returns whether torch's helper is making state by a step with zero gradients.

    Told by who calls: a learning rate of 0 is legitimate (warm-up), and whether all gradients are 0
    ranks would not agree on.
    """
    helper = getattr(sys.modules.get(_HELPERS), "_init_optim_state", None)
    code = getattr(helper, "__code__", None)
    frame = sys._getframe(1) if code is not None else None
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def held_by(checkpoint: Any, keys: Collection[str]) -> dict[str, dict[str, torch.dtype | None]]:
    """Returns what a distributed checkpoint holds of optimizers' state.

    Args:
        checkpoint: Directory of the checkpoint, a StorageReader or its Metadata.
        keys: State keys to look for.

    Returns:
        Name of a parameter (or its number) → state key → dtype, None for what is no tensor.

    Raises:
        FileNotFoundError: There is no distributed checkpoint in the directory.
        TypeError: ``checkpoint`` is none of these.
    """
    held: dict[str, dict[str, torch.dtype | None]] = {}
    for path, entry in _entries(checkpoint).items():
        head, _, key = path.rpartition(".")
        if key in keys:
            dtype = getattr(getattr(entry, "properties", None), "dtype", None)
            # A module may be called state, too: every reading of the path is kept.
            for match in re.finditer(r"(?:^|(?<=\.))state\.", head):
                held.setdefault(head[match.end() :], {})[key] = dtype
    return held


def _entries(checkpoint: Any) -> Mapping[str, Any]:
    if isinstance(checkpoint, (str, os.PathLike)):
        from torch.distributed.checkpoint import FileSystemReader

        folder = os.fspath(checkpoint)
        if not os.path.isfile(os.path.join(folder, ".metadata")):
            raise FileNotFoundError(
                f"{folder!r} holds no finished distributed checkpoint: there is no .metadata in "
                "it. Pass the checkpoint_id that dcp.save() was given"
            )
        checkpoint = FileSystemReader(folder)
    if hasattr(checkpoint, "read_metadata"):
        checkpoint = checkpoint.read_metadata()
    if not hasattr(checkpoint, "state_dict_metadata"):
        raise TypeError(
            f"a {type(checkpoint).__name__} is no distributed checkpoint; pass its directory, a "
            "StorageReader or its Metadata"
        )
    return checkpoint.state_dict_metadata


def find(
    held: Mapping[str, dict[str, torch.dtype | None]], names: Sequence[Sequence[str]]
) -> list[dict[str, torch.dtype | None]]:
    """Returns what a checkpoint holds of every parameter.

    Args:
        held: From `held_by`.
        names: For each parameter the names it may have; none for parameters saved by number.

    Raises:
        KeyError: It holds state, but of none of the parameters.
    """
    # An optimizer's own state_dict() counts its parameters.
    numbered = all(name.isdigit() for name in held)
    found = []
    for number, candidates in enumerate(names):
        if numbered:
            candidates = [*candidates, str(number)]
        found.append(next((held[name] for name in candidates if name in held), {}))
    if held and not any(found):
        mine = next((candidates[0] for candidates in names if candidates), None)
        raise KeyError(
            f"the checkpoint holds optimizer state of {sorted(held)[0]!r} and others, but of no "
            f"parameter of this optimizer"
            + (
                f" (the first is {mine!r}); pass the model the checkpoint was made with"
                if mine
                else "; pass model=, which knows the names of the parameters"
            )
        )
    return found
