# SPDX-License-Identifier: BSD-3-Clause
"""Carries the importance from the optimizer of one training to that of the next."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import weakref

from torch import Tensor, nn

from dgg import _callers, sharding
from dgg._literals import TensorsOrPath

logger = logging.getLogger("dgg.hf")

# The file that a finished training leaves in its output_dir, for a process per task.
FILE = "importance.safetensors"
# Sums of v̂ at the end of the last training, by model, for scripts that make a new Trainer for every
# task.
_sums: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def keep(opt, model: nn.Module, core: nn.Module, output_dir: str | None, *, writes: bool) -> None:
    """Keeps the sums of a finished training for the next one, and in a file of its output_dir.

    All ranks call this, and one of them ``writes``. ``core`` is the module inside of wrappers, by
    which the next training finds the sums.
    """
    if not opt.param_groups[0]["importance"]:
        return
    try:
        sums = opt.importance_dict(model=model)
    except (RuntimeError, ValueError) as error:
        logger.warning(
            "the importance of this training is not carried to the next one: %s", error,
            stacklevel=_callers.stacklevel(),
        )  # fmt: skip
        return
    _sums[core] = sums
    if output_dir is None:
        return
    whole = {}
    for name, value in sums.items():
        value = value.full_tensor() if sharding.is_dtensor(value) else value
        if writes:
            whole[name] = value.contiguous().to("cpu")
    if writes and not any(value.is_complex() for value in whole.values()):
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        part = os.path.join(output_dir, f".{FILE}.part")
        try:
            os.makedirs(output_dir, exist_ok=True)
            save_file(whole, part)
            os.replace(part, os.path.join(output_dir, FILE))  # whole or not at all
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                os.remove(part)
            logger.warning(
                "%s was not written into %s (%s): the next Trainer of this process has it, another "
                "process needs opt.importance_dict(model=model), saved before this one ends",
                FILE, output_dir, error, stacklevel=_callers.stacklevel(),
            )  # fmt: skip


def source_of(
    opt, core: nn.Module, given: TensorsOrPath | None, anchor_source: TensorsOrPath | None
) -> TensorsOrPath | None:
    """Returns the source for ``set_anchor(importance=...)`` of a task that begins.

    It is what the callback was given, else the file beside the anchor's path, else what `keep` has
    kept; None if the optimizer has second moments of its own, or weighs nothing.

    Raises:
        RuntimeError: The optimizer is new, and nobody has kept the importance of the last task.
    """
    if not opt.param_groups[0]["importance"]:
        return None
    if given is not None:
        return given
    state = getattr(opt, "optimizer", opt).state
    steps = [entry.get("step") for entry in state.values() if isinstance(entry, dict)]
    if any(isinstance(step, (int, float, Tensor)) and step > 0 for step in steps):
        return None
    if isinstance(anchor_source, (str, os.PathLike)):
        path = pathlib.Path(anchor_source)
        for folder in (path, path.parent):
            if (folder / FILE).is_file():
                return folder / FILE
    if core in _sums:
        return _sums[core]
    raise RuntimeError(
        f"the optimizer weighs its pull (importance={opt.param_groups[0]['importance']}), is new, "
        "and nothing is known of the training before: pass GuidanceCallback(importance=...) with "
        f"the path of the {FILE} that the former training has left in its output_dir, or build the "
        "optimizer with importance=0"
    )
