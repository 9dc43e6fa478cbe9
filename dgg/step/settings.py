# SPDX-License-Identifier: BSD-3-Clause
"""The constructor's arguments that no group and no checkpoint changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, backends

# Arguments of constructors that no group has, and whose attributes no step reads.
CONSTRUCTED = (
    "backend", "anchor_dtype", "anchor_device", "state_dtype", "importance_dtype",
    "stochastic_rounding", "master_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The constructor's arguments that hold for an optimizer's life.

    Attributes:
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or None (the fastest).
        fused: A fused backend was demanded.
        unscales: ``fused=True``: steps take what a GradScaler says, as torch.optim's do.
        capturable: Steps can be captured into a CUDA graph.
        anchor_dtype: Storage dtype of the anchor; None is the parameter's.
        anchor_device: Storage device of the anchor; None is the parameter's.
        state_dtype: Storage dtype of the moments; None is the parameter's.
        importance_dtype: Storage dtype of the importance; None is the parameter's.
        stochastic_rounding: bfloat16 parameters are rounded stochastically.
        master_weights: 16-bit parameters have a float32 copy in the state.
    """

    backend: str | None = None
    fused: bool = False
    unscales: bool = False
    capturable: bool = False
    anchor_dtype: torch.dtype | None = None
    anchor_device: torch.device | None = None
    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    master_weights: bool = False
    importance_dtype: torch.dtype | None = None

    def has_master(self, param: Tensor) -> bool:
        """Returns whether a float32 copy of ``param`` is what steps update."""
        return self.master_weights and param.dtype in _arguments.NARROW


def take_settings(options: dict[str, Any]) -> Settings:
    """Takes an optimizer's settings out of its keyword arguments, and checks them."""
    capturable, fused = bool(options.pop("capturable")), options.pop("fused")
    foreach, backend = options.pop("foreach"), options.pop("backend")
    dtypes = {
        name: _arguments.check_dtype(name, options.pop(name))
        for name in ("anchor_dtype", "state_dtype", "importance_dtype")
    }
    anchor_device = _arguments.check_anchor_device(options.pop("anchor_device"))
    if capturable and anchor_device is not None:
        raise ValueError(
            f"capturable=True does not go with anchor_device={str(anchor_device)!r}: "
            "anchors are brought to the device for draws that the host knows, those of a "
            "captured step only the device knows; leave anchor_device None"
        )
    if not (fused or foreach) and (fused is False or foreach is False):
        # False asks for tensor-by-tensor arithmetic, which is the reference's. Beside a True of the
        # other it only says which of torch's fast ways is meant (torchtitan).
        if backend not in (None, "reference"):
            raise ValueError(
                f"fused={fused}, foreach={foreach} ask for an unfused step and "
                f"backend={backend!r} for a fused one; drop either"
            )
        backend = "reference"
    if (fused or foreach) and backend == "reference":
        raise ValueError(
            f"fused={fused}, foreach={foreach} ask for a fused step and backend='reference' "
            "for an unfused one; drop either"
        )
    return Settings(
        backend, bool(fused or foreach), bool(fused), capturable, anchor_device=anchor_device,
        stochastic_rounding=options.pop("stochastic_rounding"),
        master_weights=options.pop("master_weights"), **dtypes,
    )  # fmt: skip


def check_kernels(settings: Settings, params: Iterable[Tensor]) -> None:
    """Raises unless fused and captured steps can be had where the parameters are."""
    devices = [d for d in dict.fromkeys(p.device for p in params) if d.type != "meta"]
    if settings.capturable and len(devices) > 1:
        raise ValueError(
            f"capturable=True needs all parameters on one device, they are on {devices}; use "
            "an optimizer per device, or leave it False"
        )
    for device in devices:
        backend = backends.choose(settings.backend, device)
        if settings.fused and backend == "reference":
            raise RuntimeError(
                f"foreach=True or fused=True cannot be met on {str(device)!r}, the fused "
                f"kernels miss: {backends.unavailable('cpp', device)}"
            )
        if settings.capturable and not backends.launches(backend, device):
            raise ValueError(
                f"capturable=True needs kernels that run on a GPU; on {str(device)!r} the step "
                f"is the {backend!r} backend's, which no graph can capture: leave it False"
            )


# Attributes in copies and pickles of former releases → fields of `Settings`.
FORMER_NAMES = {
    "_backend": "backend", "_fused": "fused", "_unscales": "unscales",
    "_capturable": "capturable", "_anchor_dtype": "anchor_dtype",
    "_anchor_device": "anchor_device", "_state_dtype": "state_dtype",
    "_stochastic": "stochastic_rounding", "_master": "master_weights",
}  # fmt: skip


def settings_in(state: Mapping[str, Any]) -> Settings:
    """Returns the settings in the result of `Guided.__getstate__`, of any release."""
    if "_settings" in state:
        return state["_settings"]
    return Settings(**{new: state[old] for old, new in FORMER_NAMES.items() if old in state})
