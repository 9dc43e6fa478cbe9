# SPDX-License-Identifier: BSD-3-Clause
"""What every comparison method is: the hooks that a training loop calls, and checked numbers.

`Method.step` is a step of the loop. Around a task: begin_task before its first step, end_task
behind its last one. What a method adds to gradients is thus outside of the clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Method:
    """A comparison method: hooks that a training loop calls. This one does nothing.

    Args:
        model: The model that is trained.
        named: Its trainable parameters, or some of them, by their name in the model.
        optimizer: Steps these parameters (no guidance, no clipping of its own).
        loss_of: Returns the mean loss of a batch, with its graph. What a batch is, the loop knows.
        logits_of: Returns the logits (items, classes) of a batch.

    Subclasses hand these five on as `*loop`; what they add are keywords.
    """

    #: The points at which the knob of the method is tuned: a keyword and its values.
    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {}
    #: True: `edit_gradients` wants the gradients of the replayed rows alone.
    needs_replay_gradients: ClassVar[bool] = False
    #: True: `choose(batches, scores, k)` picks the examples to replay.
    chooses_examples: ClassVar[bool] = False
    #: Where forward hooks read layers, so that they must be called as modules, not by F.linear with
    #: their weights: in `logits_of` at a "boundary", or in the forward pass of every "step".
    reads_modules: ClassVar[str] = ""
    #: Names of the attributes that make up the state: tensors, numbers, lists and dicts of them.
    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[[Any], Tensor],
        logits_of: Callable[[Any], Tensor],
    ) -> None:
        if not named:
            raise ValueError(f"{type(self).__name__}: named has no parameter")
        theirs = dict(model.named_parameters())
        foreign = [name for name, p in named.items() if theirs.get(name) is not p]
        if foreign:
            raise ValueError(f"{type(self).__name__}: the model has no parameter {foreign[0]!r}")
        self.model, self.named, self.optimizer = model, dict(named), optimizer
        self.loss_of, self.logits_of = loss_of, logits_of
        self.parameters: list[nn.Parameter] = list(named.values())

    def step(self, batch: Any, old: Any = None, max_grad_norm: float = math.inf) -> Tensor:
        """Trains one step with all hooks; returns the loss.

        Args:
            batch: What is trained on, replayed rows included.
            old: The replayed rows alone; None: there are none.
            max_grad_norm: What the gradients are clipped to before they are edited.
        """
        self.optimizer.zero_grad()
        self.before_forward()
        loss = self.loss_of(batch)
        loss.backward()
        replay = None
        if self.needs_replay_gradients and old is not None:
            replay = list(torch.autograd.grad(self.loss_of(old), self.parameters))
        self.after_forward()
        if max_grad_norm < math.inf:
            nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self.edit_gradients(replay)
        self.optimizer.step()
        self.after_step()
        return loss

    # -- the hooks ---------------------------------------------------------------------------------

    def begin_task(self, task: int) -> None:
        """Called before the first step of task 0, 1, …"""

    def before_forward(self) -> None:
        """Called at each step before the forward pass: may move parameters."""

    def after_forward(self) -> None:
        """Called at each step behind the backward pass: undoes what before_forward moved."""

    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Called at each step behind the clipping: may change the gradients.

        Args:
            replay: Gradients of the replayed rows alone, in the order of `named`, or None.
        """

    def after_step(self) -> None:
        """Called at each step behind optimizer.step()."""

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Called at a task's end, with batches of its training data; may move parameters."""

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns what a study that goes on at this task boundary must load."""
        return {name: _copy(getattr(self, name)) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of a method of the same kind."""
        if state.keys() != set(self.kept):
            raise ValueError(
                f"{type(self).__name__} keeps {sorted(self.kept)}, the state has {sorted(state)}"
            )
        for name in self.kept:
            setattr(self, name, _copy(state[name]))

    # -- for the methods ---------------------------------------------------------------------------

    def require(
        self, name: str, value: float | None, span: str, *, whole: bool = False,
        optional: bool = False,
    ) -> Any:  # fmt: skip
        """Returns a hyper-parameter in its span, as "[0, 1)", or raises an error naming it."""
        if optional and value is None:
            return None
        owner = type(self).__name__
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "a whole number" if whole else "a number"
            raise TypeError(f"{owner}: {name} must be {kind}, not {value!r}")
        low, high = map(float, span[1:-1].split(","))
        above = value >= low if span[0] == "[" else value > low
        below = value <= high if span[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{owner}: {name} must lie in {span}, not {value!r}")
        return value

    def require_choice(self, name: str, value: str, choices: Sequence[str]) -> str:
        """Returns a hyper-parameter that is one of a few words, or raises an error naming it."""
        if value not in choices:
            raise ValueError(
                f"{type(self).__name__}: {name} must be one of {', '.join(choices)}, not {value!r}"
            )
        return value

    def snapshot(self) -> list[Tensor]:
        """Returns copies of the parameters as they are now."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def put_back(self, values: Sequence[Tensor]) -> None:
        """Sets the parameters to these values, bit for bit."""
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)

    def groups(self) -> list[dict[str, Any]]:
        """Returns the optimizer's group of every parameter: learning rate and weight decay."""
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        return [group_of[id(p)] for p in self.parameters]

    def add_to_gradients(self, terms: Sequence[Tensor], strength: float) -> None:
        """Adds strength times these tensors; a parameter without a gradient gets one."""
        for p, term in zip(self.parameters, terms, strict=True):
            if p.grad is None:
                p.grad = term * strength
            else:
                p.grad.add_(term, alpha=strength)


class Anchored(Method):
    """A method whose state is where the last task ended: `anchor`, empty in the first task."""

    kept: ClassVar[tuple[str, ...]] = ("anchor",)
    anchor: Sequence[Tensor] = ()  # replaced at a boundary, never changed in place

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Moves the anchor here."""
        self.anchor = self.snapshot()


class Drawing(Method):
    """A method that draws random numbers, from a generator of its own.

    Args:
        seed: Of the draws.
    """

    def __init__(self, *loop: Any, seed: int = 0) -> None:
        super().__init__(*loop)
        self.require("seed", seed, "[0, inf)", whole=True)
        self.generator = torch.Generator(self.parameters[0].device).manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, the place in the stream of draws included."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state; the draws go on where they stood."""
        rest = {name: value for name, value in state.items() if name != "generator"}
        super().load_state_dict(rest)
        self.generator.set_state(state["generator"])


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copy(part) for name, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, (list, tuple)) else value


def dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
    """Returns the inner product of two lists of tensors, summed in float64; None counts as 0."""
    found = [
        (a.double() * b.double()).sum()
        for a, b in zip(left, right, strict=True)
        if a is not None and b is not None
    ]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)
