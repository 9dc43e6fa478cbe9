# SPDX-License-Identifier: BSD-3-Clause
"""DOC: old functional directions are tracked while training goes on; gradients leave them alone.

h is what a gradient step would change in the layers' outputs for the mean input x̄ of the batch,
all layers side by side: (∂B)(A x̄) + B (∂A) x̄ for LoRA, (∂W) x̄ + ∂b for a plain layer, divided
by its running root mean square. Online PCA keeps components v_i with counts n_i:

    η = min(1 + l, max(n_i − 1, 1)) / n_i,  v_i ← (1 − η) v_i + η (⟨h, v_i⟩ / ‖v_i‖) h,
    h ← h − (⟨h, v_i⟩ / ‖v_i‖²) v_i

If the rest of h has a share of ‖h‖² of at least 0.1 and there is room, it becomes a component; if
of at least 0.02, all v_i drift a little towards h. From the second task on gradients lose what lies
along the components of old tasks, ∂B ← ∂B − v (vᵀ ∂B) / ‖v‖² (∂W and ∂b of a plain layer), but for
components that all tasks so far and this h pull the same way.

Zhang et al.: "Dynamic orthogonal continual fine-tuning for mitigating catastrophic forgetting",
arXiv 2509.23893. Defaults are the authors' (48 components a task, l = 2, 0.1, 0.02, drift at most
0.1 · share^½), for layers some thousand wide: as many components as a layer is wide let nothing of
it train. Against the paper: a layer loses the span of its slices of all removed components
together, so that the rest is orthogonal to each of them also where slices are not orthogonal to
each other; the step is Adam's, whose preconditioner does not keep that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.base import Method
from methods.layers import Layer, trained_linears


class DOC(Method):
    """Removes old components, which it tracks, from the gradients.

    Args:
        *loop: See `Method`; the forward pass must call the layers of `model`.
        k_start: Components that the first task may have.
        k_add: Components that each further task may add; None: as many as k_start.
        drift_eps: Share of the rest from which on components drift.
        add_eps: Share of the rest from which on it becomes a component.
        amnesia: l.
        max_drift: Rate of the drift at a share of 1.
        drift_power: Exponent of the share in that rate.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"k_start": (1, 2, 4, 8)}
    reads_modules: ClassVar[str] = "step"
    kept: ClassVar[tuple[str, ...]] = (
        "components", "counts", "cosines", "historical", "square", "steps",
    )  # fmt: skip

    def __init__(
        self, *loop: Any, k_start: int = 48, k_add: int | None = None, drift_eps: float = 0.02,
        add_eps: float = 0.1, amnesia: float = 2.0, max_drift: float = 0.1,
        drift_power: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(*loop)
        self.k_start = self.require("k_start", k_start, "[1, inf)", whole=True)
        k_add = k_start if k_add is None else k_add
        self.k_add = self.require("k_add", k_add, "[0, inf)", whole=True)
        self.add_eps = self.require("add_eps", add_eps, "[0, 1]")
        self.drift_eps = self.require("drift_eps", drift_eps, f"[0, {add_eps}]")
        self.amnesia = self.require("amnesia", amnesia, "[0, inf)")
        self.max_drift = self.require("max_drift", max_drift, "[0, 1]")
        self.drift_power = self.require("drift_power", drift_power, "[0, inf)")
        layers = trained_linears(self.model, self.named)
        if not layers:
            raise ValueError("DOC: no linear layer has its weight in named")
        # Places: (layer that writes into the output, factor A before it if it is a factor B).
        self._layers = layers
        self._places: list[tuple[str, str | None]] = []
        for name in layers:
            parts = name.split(".")
            if "lora_A" in parts and name.replace("lora_A", "lora_B") in layers:
                continue
            first = name.replace("lora_B", "lora_A") if "lora_B" in parts else None
            self._places.append((name, first if first in layers else None))
        p = self.parameters[0]
        self._widths = [len(layers[name].module.weight) for name, _ in self._places]
        self.components = p.new_zeros(0, sum(self._widths)).detach()  # v_i
        self.counts: list[int] = []  # n_i
        self.cosines: list[list[float]] = []  # a task → mean of cos(h, v_i), as many as it had
        self.historical = 0  # so many components, the first ones, are of old tasks
        self.square = 0.0  # running mean of ‖h‖²
        self.steps = 0
        self._task = 0
        self._sums: list[float] = []
        self._seen: list[int] = []
        self._inputs: dict[str, tuple[Tensor, int]] = {}
        self._handles: list[Any] = []

    # -- what a step would change ------------------------------------------------------------------

    def begin_task(self, task: int) -> None:
        """What is there is now of old tasks; there is room for more."""
        self._task = task
        self.historical = len(self.components)
        self._sums, self._seen = [0.0] * self.historical, [0] * self.historical

    def before_forward(self) -> None:
        """Watches the inputs of layers."""
        self._inputs = {}
        for name, layer in self._layers.items():
            self._handles.append(layer.module.register_forward_pre_hook(self._watch(name)))

    def after_forward(self) -> None:
        """Watches no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2)
            total, count = self._inputs.get(name, (0, 0))
            self._inputs[name] = (total + x.sum(0), count + len(x))

        return hook

    def _mean_input(self, name: str) -> Tensor:
        if name not in self._inputs:
            raise RuntimeError(f"DOC: the forward pass did not call {name}: it cannot see x̄")
        total, count = self._inputs[name]
        return total / count

    def increment(self) -> Tensor:
        """Returns h, before it is normalised."""
        parts = []
        for name, first in self._places:
            layer = self._layers[name]
            weight = self.named[layer.weight]
            h = _gradient(weight) @ self._mean_input(name)
            if layer.bias is not None:
                h = h + _gradient(self.named[layer.bias])
            if first is not None:
                inner = _gradient(self.named[self._layers[first].weight]) @ self._mean_input(first)
                h = h + weight.detach() @ inner
            parts.append(h)
        return torch.cat(parts)

    # -- a step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Removes old components from the gradients, and goes on tracking."""
        h = self.increment()
        norm = float(h.square().sum())
        if norm > 0:
            self.steps += 1
            self.square += (norm - self.square) / self.steps
            h = h / self.square**0.5
        if self.historical:
            self._remove(self.components[self._removed(h)])
        if norm > 0:
            self._track(h)

    def _removed(self, h: Tensor) -> list[int]:
        """Returns which components go: those that not all tasks and h pull the same way."""
        old = self.components[: self.historical]
        found = []
        for i, inner in enumerate((old @ h).tolist()):
            signs = [task[i] > 0 for task in self.cosines if i < len(task)] + [inner > 0]
            if not (all(signs) or not any(signs)):
                found.append(i)
        return found

    def _remove(self, components: Tensor) -> None:
        if not len(components):
            return
        for (name, _), part in zip(self._places, components.split(self._widths, 1), strict=True):
            u, sigma, _ = torch.linalg.svd(part.T, full_matrices=False)
            basis = u[:, sigma > 1e-6 * components.norm(dim=1).max()]
            layer: Layer = self._layers[name]
            for parameter in (layer.weight, layer.bias):
                g = self.named[parameter].grad if parameter is not None else None
                if g is not None:
                    g.sub_(basis @ (basis.T @ g))

    def _track(self, h: Tensor) -> None:
        v = self.components
        norms = v.norm(dim=1).clamp(min=1e-30)
        for i, cosine in enumerate((v @ h / (norms * h.norm())).tolist()):
            self._sums[i] += cosine
            self._seen[i] += 1
        rest = h
        for i in range(len(v)):
            self.counts[i] += 1
            n = self.counts[i]
            rate = min(1 + self.amnesia, max(n - 1, 1)) / n
            length = v[i].norm().clamp(min=1e-30)
            v[i] = (1 - rate) * v[i] + rate * (rest @ v[i]) / length * rest
            square = v[i].square().sum()
            if square > 0:
                rest = rest - (rest @ v[i]) / square * v[i]
        share = float(rest.square().sum() / h.square().sum())
        if share >= self.add_eps and len(v) < self.k_start + self.k_add * self._task:
            self.components = torch.cat([v, rest[None]])
            self.counts.append(1)
            self._sums.append(0.0)
            self._seen.append(0)
        elif share >= self.drift_eps:
            rate = self.max_drift * share**self.drift_power
            lengths = v.norm(dim=1).clamp(min=1e-30)
            v.mul_(1 - rate).add_(torch.outer(v @ h / lengths, h), alpha=rate)

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Keeps how the task agreed with each component."""
        pairs = zip(self._sums, self._seen, strict=True)
        self.cosines.append([total / max(seen, 1) for total, seen in pairs])


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad
