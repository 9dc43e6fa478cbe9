# SPDX-License-Identifier: BSD-3-Clause
"""Distributed checkpoints: the optimizer state in one, and which one a template is made for.

torch.distributed.checkpoint fills a template, and leaves out what the template has no room for.
Helpers make the template of a new optimizer by a step with zero gradients. The callers of that step
show that it is one, and often which checkpoint will fill the template.
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
# Functions that load a distributed checkpoint into a template: module, name, and the local variable
# that has the checkpoint. Functions with other names are not recognised.
_LOADERS: dict[tuple[str, ...], str] = {
    ("accelerate.utils.fsdp_utils", "load_fsdp_optimizer"): "ckpt_dir",
    ("torch.distributed.checkpoint.state_dict_loader", "load"): "storage_reader",
}


class Source(NamedTuple):
    """The checkpoint or state dict that will fill a template.

    Attributes:
        model: Has the names of the parameters; None if only the optimizer may have them.
        checkpoint: Directory or StorageReader of a distributed checkpoint; None for a state dict.
        state_dict: The state dict on this rank, which may be None.
        broadcast: All ranks load the state dict of rank 0.
        strict: It is an error if the state dict lacks a trainable parameter.
    """

    model: torch.nn.Module | None
    checkpoint: Any
    state_dict: Any = None
    broadcast: bool = False
    strict: bool = False


def making_template() -> bool:
    """Returns whether a helper, torch's or torchtitan's, makes state by a step with zero gradients.

    The callers show it. A learning rate of 0 would not (warm-up), nor would gradients of 0, which
    not all ranks need to have.
    """
    return _callers.called_by_name(*_TEMPLATE_MAKERS)


def of_template() -> Source | None:
    """Returns the source that will fill the present template; None if the callers do not show it.

    Recognised are a state dict that torch's helper loads into the template; a directory that
    accelerate (and with it the Trainer) loads; and a ``Stateful`` in ``dcp.load``, whether it asks
    torch's helper for the template or makes it by itself, as torchtitan's does.
    """
    model = None
    for function, local in _callers.calls_of(_LOADS, _ASKS, *_LOADERS):
        if function in _LOADERS:
            checkpoint = local.get(_LOADERS[function])
            is_path = isinstance(checkpoint, (str, os.PathLike))
            readable = is_path or hasattr(checkpoint, "read_metadata")
            return Source(model, checkpoint) if readable else None
        if model is None:
            model = local.get("model")
            if not isinstance(model, torch.nn.Module):
                return None
            if function == _LOADS:
                return _of_state_dict(model, local)
    return None


def _of_state_dict(model: torch.nn.Module, local: Mapping[str, Any]) -> Source | None:
    info, state_dict = local.get("info"), local.get("state_dict")
    full, broadcast, strict, fsdp1_modules = (
        getattr(info, name, None)
        for name in ("full_state_dict", "broadcast_from_rank0", "strict", "fsdp_modules")
    )
    if fsdp1_modules is None or fsdp1_modules:  # FSDP1 loads without a template
        return None
    if full and broadcast:
        return Source(model, None, state_dict, True, bool(strict))
    # Of other state dicts the helper takes all, whether the template has room for it or not.
    if isinstance(state_dict, Mapping) and state_dict and (full or "state" not in state_dict):
        return Source(model, None, state_dict)
    return None


def entries_in(state_dict: Mapping[str, Any], keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns the values under these state keys in a state dict of torch's helpers.

    Returns:
        Name of a parameter (or its number) → state key → value; of parameters without any of the
        keys as well.
    """
    entries: dict[str, dict[str, Any]] = {}
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("state", {}), Mapping):
        raise TypeError(
            "no optimizer's state dict: pass what get_optimizer_state_dict() returned, not "
            f"{type(state_dict).__name__}"
        )
    if "state" in state_dict:
        for name, entry in state_dict["state"].items():
            entry = entry if isinstance(entry, Mapping) else {}
            entries[str(name)] = {key: value for key, value in entry.items() if key in keys}
        return entries
    for path, value in state_dict.items():
        head, _, key = path.rpartition(".")
        if path.startswith("state.") and key in keys:
            entries.setdefault(head.removeprefix("state."), {})[key] = value
    return entries


def dtypes_in(checkpoint: Any, keys: Collection[str]) -> dict[str, dict[str, torch.dtype | None]]:
    """Returns which of these state keys a distributed checkpoint holds, by parameters.

    Args:
        checkpoint: Directory of the checkpoint, a StorageReader or its Metadata.
        keys: State keys to look for.

    Returns:
        Name of a parameter (or its number) → state key → dtype, None if the value is no tensor.
    """
    saved: dict[str, dict[str, torch.dtype | None]] = {}
    for path, entry in _entries(checkpoint).items():
        head, _, key = path.rpartition(".")
        if key in keys:
            dtype = getattr(getattr(entry, "properties", None), "dtype", None)
            # A module may have the name state, too: every reading of the path is kept.
            for match in re.finditer(r"(?:^|(?<=\.))state\.", head):
                saved.setdefault(head[match.end() :], {})[key] = dtype
    return saved


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
    saved: Mapping[str, dict[str, torch.dtype | None]], names: Sequence[Sequence[str]]
) -> list[dict[str, torch.dtype | None]]:
    """Returns the entry of every parameter in a checkpoint; empty if there is none.

    Args:
        saved: From `dtypes_in` or `entries_in`.
        names: For each parameter the names it may have; none for parameters saved by number.

    Raises:
        KeyError: It holds state, but of none of the parameters.
    """
    # An optimizer's own state_dict() counts its parameters.
    numbered = all(name.isdigit() for name in saved)
    entries = []
    for number, candidates in enumerate(names):
        if numbered:
            candidates = [*candidates, str(number)]
        entries.append(next((saved[name] for name in candidates if name in saved), {}))
    if saved and not any(entries):
        first = next((candidates[0] for candidates in names if candidates), None)
        remedy = "; pass model=, which knows the names of the parameters"
        if first:
            remedy = f" (the first is {first!r}); pass the model the checkpoint was made with"
        raise KeyError(
            f"the checkpoint holds optimizer state of {sorted(saved)[0]!r} and others, but of no "
            f"parameter of this optimizer{remedy}"
        )
    return entries
