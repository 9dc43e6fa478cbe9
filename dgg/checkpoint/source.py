# SPDX-License-Identifier: BSD-3-Clause
"""Distributed checkpoints: what one holds of an optimizer, and who asks for room for it.

torch.distributed.checkpoint fills a template, and what the template has no room for is left out.
The template of a new optimizer is made by a step with zero gradients, which is told by who calls.
So is what the template will be filled from, where that can be known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dgg import _callers

_HELPERS = "torch.distributed.checkpoint.state_dict"
# Functions that make a new optimizer's state by a step with zero gradients: in torch's helpers, in
# torchtitan and torchtnt. Only the first step of an optimizer without state asks for them.
_TEMPLATE_MAKERS = ("_init_optim_state", "init_optim_state")

# torch's helper that loads a state dict, and the one that asks for a template.
_LOADS = (_HELPERS, "_load_optim_state_dict")
_ASKS = (_HELPERS, "_get_optim_state_dict")
# Who asks for a template to load a distributed checkpoint into it: module, function, and the local
# variable that has the checkpoint. Whatever is not as named here is not recognised.
_LOADERS = {
    ("accelerate.utils.fsdp_utils", "load_fsdp_optimizer"): "ckpt_dir",
    ("torch.distributed.checkpoint.state_dict_loader", "load"): "storage_reader",
}


class Source(NamedTuple):
    """What a template will be filled from.

    Attributes:
        model: Has the names of the parameters.
        checkpoint: Directory or StorageReader of a distributed checkpoint; None for a state dict.
        given: The state dict that this rank was given, which may be None.
        broadcast: The state dict of rank 0 is everybody's.
        strict: Parameters that are trained and not in it are an error.
    """

    model: torch.nn.Module
    checkpoint: Any
    given: Any = None
    broadcast: bool = False
    strict: bool = False


def making_template() -> bool:
    """Returns whether a helper, torch's or torchtitan's, makes state by a step with zero gradients.

    Told by who calls: a learning rate of 0 is legitimate (warm-up), and whether all gradients are 0
    ranks would not agree on.
    """
    return _callers.called_by_name(*_TEMPLATE_MAKERS)


def of_template() -> Source | None:
    """Returns what the state being made or asked for will be filled from; None if nobody can know.

    Known are a state dict that torch's helper is to load, if it loads by what is there; accelerate,
    and with it the Trainer, that load a directory; and a ``Stateful`` in ``dcp.load``.
    """
    calls = _callers.calls_of(_LOADS, _ASKS, *_LOADERS)
    asker, local = next((call for call in calls if call[0] in (_LOADS, _ASKS)), (None, {}))
    model = local.get("model")
    if not isinstance(model, torch.nn.Module):
        return None
    if asker == _LOADS:
        return _given(model, local)
    # The loader further out: what was called by it in turn has been passed.
    for function, local in calls:
        if function in _LOADERS:
            found = local.get(_LOADERS[function])
            known = isinstance(found, (str, os.PathLike)) or hasattr(found, "read_metadata")
            return Source(model, found) if known else None
    return None


def _given(model: torch.nn.Module, local: Mapping[str, Any]) -> Source | None:
    info, given = local.get("info"), local.get("state_dict")
    whole, broadcast, strict, flat_parameters = (
        getattr(info, name, None)
        for name in ("full_state_dict", "broadcast_from_rank0", "strict", "fsdp_modules")
    )
    if flat_parameters is None or flat_parameters:  # of FSDP1, which loads in its own way
        return None
    if whole and broadcast:
        return Source(model, None, given, True, bool(strict))
    # Otherwise only of whole and of flattened ones is taken just what there is room for.
    if isinstance(given, Mapping) and given and (whole or "state" not in given):
        return Source(model, None, given)
    return None


def entries_in(state_dict: Mapping[str, Any], keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns what a state dict of torch's helpers, nested or flattened, holds.

    Args:
        state_dict: By names, or by the numbers of the parameters.
        keys: State keys to look for.

    Returns:
        Name of a parameter (or its number) → state key → value; of parameters without any of the
        keys as well.

    Raises:
        TypeError: It is no such state dict.
    """
    found: dict[str, dict[str, Any]] = {}
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("state", {}), Mapping):
        raise TypeError(
            "no optimizer's state dict: pass what get_optimizer_state_dict() returned, not "
            f"{type(state_dict).__name__}"
        )
    if "state" in state_dict:
        for name, entry in state_dict["state"].items():
            entry = entry if isinstance(entry, Mapping) else {}
            found[str(name)] = {key: value for key, value in entry.items() if key in keys}
        return found
    for path, value in state_dict.items():
        head, _, key = path.rpartition(".")
        if path.startswith("state.") and key in keys:
            found.setdefault(head.removeprefix("state."), {})[key] = value
    return found


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
