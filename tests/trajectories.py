# SPDX-License-Identifier: BSD-3-Clause
"""Hashes of many short trainings, by which two versions of the package can be compared bit for bit.

    python -P tests/trajectories.py                  # every combination; prints one hash a group
    python -P tests/trajectories.py --out now.json   # and writes the hash of each trajectory
    python -P tests/trajectories.py --compare old.json

It uses the public interface alone, so the same file runs before and after a redesign. Hashes depend
on the machine (torch makes the gradients' random numbers, and sums may be ordered otherwise
elsewhere): compare those of one machine.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

import dgg
from dgg import _arguments

STEPS, BOUNDARY = 7, 2
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (dgg.AdamW, {}),
    "AdamW amsgrad": (dgg.AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    "Adam": (dgg.Adam, {"weight_decay": 0.01}),
    "Adam maximize": (dgg.Adam, {"maximize": True}),
    "SGD": (dgg.SGD, {}),
    "SGD nesterov": (dgg.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Guidance": (None, {}),
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex64": torch.complex64,
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "master": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "narrow state": {"state_dtype": torch.bfloat16, "anchor_dtype": torch.bfloat16},
}


def combinations(backends: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every training that the package allows: its name and what it is made of."""
    for backend, (name, (cls, given)), (dtype_name, dtype), (precision, extra) in itertools.product(
        backends, OPTIMIZERS.items(), DTYPES.items(), PRECISIONS.items()
    ):
        if precision == "master" and dtype not in (torch.bfloat16, torch.float16):
            continue
        if precision == "stochastic" and dtype != torch.bfloat16:
            continue
        if precision == "narrow state" and dtype != torch.float32:
            continue
        if cls is None and precision != "plain":
            continue
        for granularity, scope, clip, replay in itertools.product(
            ("step", "tensor", "element"), ("global", "tensor"), (None, 0.5), (False, True)
        ):
            options = {**given, **extra, "granularity": granularity, "norm_scope": scope,
                       "max_grad_norm": clip}  # fmt: skip
            label = f"{backend} | {name} | {dtype_name} | {precision} | {granularity} | {scope}"
            label += f" | {'clipped' if clip else 'whole'} | {'replay' if replay else 'alone'}"
            yield (
                label,
                {"backend": backend, "cls": cls, "dtype": dtype, "options": options,
                 "replay": replay},
            )  # fmt: skip


def make_params(dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Returns parameters of every kind of shape and memory order."""

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    transposed = values(6, 5).t()
    made = [values(37), values(3, 4), values(1).reshape(()), values(0, 2),
            values(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), transposed,
            values(1100)]  # fmt: skip
    return [torch.nn.Parameter(x) for x in made]


def train(what: dict[str, Any]) -> str:
    """Returns the hash of the weights and state after each step of one training."""
    generator = torch.Generator().manual_seed(11)
    params = make_params(what["dtype"], generator)
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.02, "alpha": 1.0}]
    common = dict(alpha=0.5, seed=5, backend=what["backend"], **what["options"])
    if what["cls"] is None:
        base = torch.optim.SGD([{**g, "alpha": 0} for g in groups], lr=0.05)
        optimizer = dgg.Guidance(base, **common)
        step, zero_grad, keepers = base.step, base.zero_grad, (base, optimizer)
    else:
        optimizer = what["cls"](groups, lr=0.05, **common)
        step, zero_grad, keepers = optimizer.step, optimizer.zero_grad, (optimizer,)

    def backward(number: int) -> None:
        loss = torch.zeros((), dtype=torch.float64)
        for place, p in enumerate(params):
            if (number, place) == (4, 1):  # one without gradient in one step
                continue
            target = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            real = p.real + 2 * p.imag if p.is_complex() else p
            loss = loss + ((real.double() - target) ** 2).sum()
        loss.backward()

    digest = hashlib.sha256()
    for number in range(STEPS):
        if number == BOUNDARY:
            optimizer.set_anchor(task=1)
        zero_grad()
        if what["replay"] and number % 2:
            with optimizer.replay():
                backward(number)
        backward(number)
        step()
        for p in params:
            digest.update(bytes_of(p))
    for keeper in keepers:
        add_to(digest, keeper.state_dict())
    return digest.hexdigest()


NEW = [*getattr(_arguments, "NEW_OPTIONS", {}).items()]


def add_to(digest: Any, value: Any) -> None:
    """Adds whatever stands in a state dict."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + bytes_of(value))
    elif isinstance(value, dict):
        # What an earlier commit has not saved is left out where it is what that commit did.
        known = [
            key for key in value if isinstance(value[key], Tensor) or (key, value[key]) not in NEW
        ]
        for key in sorted(known, key=str):
            digest.update(str(key).encode())
            add_to(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            add_to(digest, each)
    else:
        digest.update(str(value).encode())


def bytes_of(x: Tensor) -> bytes:
    """Returns the bytes of a tensor in row-major order."""
    x = x.detach().contiguous().resolve_conj()
    return x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def main(arguments: list[str]) -> int:
    """Runs the trainings; returns 1 if a hash is another than that of ``--compare``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", default=["reference", "cpp", "triton"])
    parser.add_argument("--every", type=int, default=1, help="only one in so many trainings")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--compare", type=pathlib.Path)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, (label, what) in enumerate(combinations(chosen.backends)):
            if place % chosen.every:
                continue
            try:
                found[label] = train(what)
            except Exception as error:
                found[label] = f"{type(error).__name__}: {error}"[:200]
    together = collections.defaultdict(hashlib.sha256)
    for label, value in found.items():
        together[label.split(" | ")[0]].update(f"{label} {value}\n".encode())
    for backend, digest in together.items():
        mine = [v for label, v in found.items() if label.startswith(backend + " |")]
        errors = sum(": " in v for v in mine)
        print(f"{backend}: {len(mine)} trainings, {errors} refused, {digest.hexdigest()[:16]}")
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=0))
    if chosen.compare is None:
        return 0
    before = json.loads(chosen.compare.read_text())
    differ = [label for label, value in found.items() if before.get(label, value) != value]
    for label in differ[:20]:
        print(f"differs: {label}: {before[label][:60]} -> {found[label][:60]}")
    print(f"{len(differ)} of {len(found.keys() & before.keys())} differ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
