# SPDX-License-Identifier: BSD-3-Clause
"""LoKI: only those rows of a layer train that old knowledge hardly uses.

For every item and layer each output node j gets the integrated gradient of the probability of what
the model itself answers, o_j ∫₀¹ ∂p(t o) / ∂o_j dt, o being the layer's output; it is scaled to 0
… 1 over the layer, and the lowest share q is marked. Of each layer the share q of nodes that is
marked most often trains from then on (layer-balanced), all else is frozen.

Wang et al.: "LoKI: low-damage knowledge implanting of large language models", AAAI 2026, arXiv
2505.22120; the trapezoid rule with 7 points is the authors', q = 10 % lies in their range. Against
the paper: the general data are those of the tasks so far, attributed at each boundary, counts
adding up; the first task therefore trains everything; layers are the feed-forward down-projections
where names say so (`modules`), else all linear layers, the last included; of a LoRA adapter rows
of B train and A is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Method
from methods.layers import trained_linears


class LoKI(Method):
    """Freezes all but the selected rows.

    Args:
        *loop: See `Method`; `logits_of` must call the layers.
        share: q.
        modules: Regular expression that the names of layers have; None: "down_proj", or all layers
            if none is called that.
        points: Of the integral.
        samples: Items of a task that are looked at, in whole batches; None: all given.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"share": (0.1, 0.2, 0.3, 0.5)}
    reads_modules: ClassVar[str] = "boundary"
    kept: ClassVar[tuple[str, ...]] = ("marks",)

    def __init__(
        self, *loop: Any, share: float = 0.1, modules: str | None = None, points: int = 7,
        samples: int | None = 50,
    ) -> None:  # fmt: skip
        super().__init__(*loop)
        self.share = self.require("share", share, "(0, 1]")
        self.points = self.require("points", points, "[2, inf)", whole=True)
        self.samples = self.require("samples", samples, "[1, inf)", whole=True, optional=True)
        layers = {
            name: layer
            for name, layer in trained_linears(self.model, self.named).items()
            if "lora_A" not in name.split(".")
        }
        pattern = modules
        if pattern is None:
            pattern = "down_proj" if any("down_proj" in name for name in layers) else ""
        self.layers = {name: found for name, found in layers.items() if re.search(pattern, name)}
        if not self.layers:
            raise ValueError(f"LoKI: modules={modules!r} is in no name of {sorted(layers)}")
        self.marks: dict[str, Tensor] = {}  # layer → how often each row was among the lowest
        self._before: list[Tensor] = []

    def attribute(self, name: str, batch: Any) -> Tensor:
        """Returns the integrated gradients (items, rows) of one layer, at the last position."""
        with torch.no_grad():
            answers = self.logits_of(batch).argmax(-1)
        # The rows are of the output of the adapted layer, if this is a factor B.
        module = self.model.get_submodule(name.split(".lora_B")[0])
        total: Tensor | None = None
        output = torch.zeros(())
        for k in range(self.points):
            scaled: list[Tensor] = []
            hook = _scale_output(k / (self.points - 1), scaled)
            handle = module.register_forward_hook(hook)
            try:
                with torch.enable_grad():
                    p = self.logits_of(batch).softmax(-1)
                    chosen = p.gather(1, answers[:, None]).sum()
            finally:
                handle.remove()
            if not scaled:
                raise RuntimeError(f"LoKI: logits_of did not call {name}: it cannot see its output")
            (g,) = torch.autograd.grad(chosen, scaled)
            weight = 0.5 if k in (0, self.points - 1) else 1.0
            total = weight * g if total is None else total + weight * g
            output = scaled[0].detach()  # of the last point, where the factor is 1
        attributed = total * output / (self.points - 1)
        return attributed.reshape(len(answers), -1, attributed.shape[-1])[:, -1]

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Marks the rows that this task hardly uses."""
        for name, layer in self.layers.items():
            rows = len(layer.module.weight)
            lowest = max(1, round(self.share * rows))
            marks = self.marks.get(name, torch.zeros(rows, dtype=torch.int64))
            items = 0
            for batch in batches:
                if self.samples is not None and items >= self.samples:
                    break
                # Scaling to 0 … 1 changes no order within an item and layer, so it is left out.
                found = self.attribute(name, batch)
                places = found.topk(lowest, largest=False).indices
                marks = marks + torch.bincount(places.flatten(), minlength=rows)
                items += len(found)
            self.marks[name] = marks

    def selected(self, name: str) -> Tensor:
        """Returns which rows of a layer train: those marked most often, of equals the first."""
        marks = self.marks[name]
        count = max(1, round(self.share * len(marks)))
        rows = torch.zeros(len(marks), dtype=torch.bool)
        rows[marks.sort(descending=True, stable=True).indices[:count]] = True
        return rows

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Lets selected rows keep their gradient."""
        if not self.marks:
            return
        self._before = self.snapshot()
        self._masks = self._make_masks()
        for p, mask in zip(self.parameters, self._masks, strict=True):
            if p.grad is not None:
                p.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self) -> None:
        """Puts the other rows back where weight decay or momentum moved them."""
        if self.marks:
            for p, before, mask in zip(self.parameters, self._before, self._masks, strict=True):
                p.copy_(torch.where(mask, p, before))

    def _make_masks(self) -> list[Tensor]:
        rows: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            selected = self.selected(name)
            rows[layer.weight] = selected[:, None]
            if layer.bias is not None:
                rows[layer.bias] = selected
        nothing = torch.zeros((), dtype=torch.bool)
        return [rows.get(name, nothing).to(p.device) for name, p in self.named.items()]


def _scale_output(factor: float, scaled: list[Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # A leaf, so that the gradient stops here: it is that with respect to the scaled output.
        scaled.append((output.detach() * factor).requires_grad_())
        return scaled[-1]

    return hook
