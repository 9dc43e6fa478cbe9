# SPDX-License-Identifier: BSD-3-Clause
"""Random calls of everything native on the CPU, for a library that watches its own memory.

tests/sanitized.py runs this in a process of its own. Results are not looked at: what is wrong is
found by the sanitizers the library was compiled with, or by the pages behind the tensors, which
cannot be touched (``--pages``). Of calls that are not allowed it is checked here that they are
refused and have written nothing.

Scenario k of a seed is always the same, whatever ran before it: ``--seed S --first k --calls 1``
repeats it. The file given by ``--progress`` names the one under way, for when the process dies.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import pathlib
import random
import resource
import struct
import threading
import warnings

import torch
from dgg.kernels.layout import (
    BASE,
    COLUMNS,
    EXP_AVG,
    GROUP,
    NUMEL,
    PARAM,
    SCALES,
    SLOT_BITS,
    STEP,
    STRETCH,
    STRIDE,
)
from dgg.kernels.layout import DTYPES as CODES

import dgg
from dgg.backends import native

ops = torch.ops.dgg
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]  # in the order of the codes
# Beyond it elements have no place in an unsharded parameter (make_rows of cpu_arguments.h).
LAST_PLACE = 2**61

# Around a vector, a strip, a block (cpu_loops.h), lanes, four blocks (cpu_squares.h) and a chunk
# (cpu_chunks.h).
TINY = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 100]
BLOCKS = [1000, 1023, 1024, 1025, 1055, 2047, 2048, 2049, 4095, 4096, 4097, 4096 + 1024 + 3]
CHUNKS = [32767, 32768, 32769, 2 * 32768, 2 * 32768 + 1, 3 * 32768 + 1025]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 3e38, 1e-30, 1e-40,
           5e-324, 1e300, 65504.0, 65520.0, 6e-8, 1.0]  # fmt: skip
POOL = 1 << 18
MOST_MEMORY = 1 << 32


def pools(wild: bool) -> dict[torch.dtype, torch.Tensor]:
    """Returns numbers to fill tensors with; `wild` ones are often no ordinary numbers."""
    generator = torch.Generator().manual_seed(int(wild))
    values = torch.randn(POOL, generator=generator, dtype=torch.float64)
    if wild:
        where = torch.randint(POOL, (POOL // 4,), generator=generator)
        which = torch.randint(len(SPECIAL), (POOL // 4,), generator=generator)
        values[where] = torch.tensor(SPECIAL, dtype=torch.float64)[which]
    return {dtype: values.to(dtype) for dtype in DTYPES}


POOLS = [pools(False), pools(True)]


class Pages:
    """Memory that ends where a page begins that nobody may touch.

    Sanitizers instrument loads and stores as they stand in the source, before the compiler makes
    vectors of them. A page sees what the finished code of the released library reads.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}
        self._used: list[tuple[int, mmap.mmap]] = []
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect

    def tensor(self, count: int, dtype: torch.dtype, at_end: bool) -> torch.Tensor:
        size = count * dtype.itemsize
        pages = max(1, -(-size // mmap.PAGESIZE))
        pages = 1 << (pages - 1).bit_length()  # few sizes, so that they are found again
        free = self._free.setdefault(pages, [])
        memory = free.pop() if free else self._map(pages)
        self._used.append((pages, memory))
        begin = mmap.PAGESIZE * (pages + 1) - size if at_end else mmap.PAGESIZE
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin)

    def _map(self, pages: int) -> mmap.mmap:
        memory = mmap.mmap(-1, mmap.PAGESIZE * (pages + 2))
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for place in (address, address + mmap.PAGESIZE * (pages + 1)):
            if self._protect(ctypes.c_void_p(place), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        return memory

    def reset(self) -> None:
        for pages, memory in self._used:
            self._free[pages].append(memory)
        self._used.clear()


class Memory:
    """Makes the tensors of a scenario: of exactly their size, at any place their type allows."""

    def __init__(self, rng: random.Random, pages: Pages | None) -> None:
        self.rng, self.pages = rng, pages
        self.pool = POOLS[rng.random() < 0.2]
        self.made: list[torch.Tensor] = []

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        rng = self.rng
        if self.pages is not None and count:
            made = self.pages.tensor(count, dtype, rng.random() < 0.8)
        else:
            # The end of the view is the end of the memory, the beginning is off by some elements.
            off = rng.choice((0, 0, 1, 2, 3, 5, 7))
            made = torch.empty(off + count, dtype=dtype)[off:]
        self.made.append(made)
        return made

    def numbers(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        begin = self.rng.randrange(POOL - count)
        return self.empty(count, dtype).copy_(self.pool[dtype][begin : begin + count])

    def of(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return self.empty(len(values), dtype).copy_(torch.tensor(values, dtype=dtype))

    def snapshot(self) -> list[torch.Tensor]:
        return [x.clone() for x in self.made]

    def unchanged(self, before: list[torch.Tensor]) -> bool:
        return all(
            torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            for x, y in zip(self.made, before, strict=True)
            if x.numel()
        )


def address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr() or 1


def some_size(rng: random.Random) -> int:
    kind = rng.random()
    return rng.choice(TINY if kind < 0.84 else BLOCKS if kind < 0.99 else CHUNKS)


def a_word(rng: random.Random) -> int:
    return rng.choice((0, 1, -1, 2**63 - 1, -(2**63), rng.getrandbits(64) - 2**63))


def a_number(rng: random.Random, usual: float) -> float:
    return usual if rng.random() < 0.9 else rng.choice(SPECIAL)


def a_threshold(rng: random.Random) -> float:
    return rng.choice((2.0**31, 2.0**31, 2.0**31, 0, 1, -1, 2.0**32 - 1, 2.0**32, 1e300,
                       float("nan"), float("inf"), 0.5))  # fmt: skip


def adam_numbers(rng: random.Random) -> list[float]:
    return [a_number(rng, 1e-2), a_number(rng, rng.choice((0.0, 0.3, 0.9))), a_number(rng, 0.99),
            a_number(rng, 1e-8), a_number(rng, 0.1), rng.random() < 0.5, rng.random() < 0.3,
            rng.random() < 0.2, a_number(rng, 0.7), a_threshold(rng)]  # fmt: skip


def sgd_numbers(rng: random.Random) -> list[float]:
    return [a_number(rng, 1e-2), rng.choice((0.0, 0.9)), a_number(rng, 0.1), a_number(rng, 0.1),
            rng.random() < 0.3, rng.random() < 0.2, a_number(rng, 0.7),
            a_threshold(rng)]  # fmt: skip


def guide_numbers(rng: random.Random) -> list[float]:
    return [rng.random() < 0.3, a_number(rng, 0.7), a_threshold(rng)]


RULES = {"adam": adam_numbers, "sgd": sgd_numbers, "guide": guide_numbers}


def places(rng: random.Random, size: int) -> tuple[int, int, int]:
    """Returns base, stretch and stride: the whole tensor, or how a shard may lie in it."""
    if rng.random() < 0.6 or size == 0:
        return 0, size, size
    some = (1, 2, 3, 5, 64, 1000, size, 2 * size)
    stretch = rng.choice(some) if size < 5000 else size // 3 + 1
    base = rng.choice((0, 1, 2, 3, 7, 2**33 + 1, LAST_PLACE - 1))
    turns = (size - 1) // stretch
    if turns and rng.random() < 0.05:
        return base, stretch, LAST_PLACE // turns - 1
    return base, stretch, stretch + rng.choice((0, 1, 3, 1000))


class Table:
    """Rows of addresses, with everything an operator on them takes."""

    def __init__(self, memory: Memory, rows: int | None = None, most: int = 1 << 30) -> None:
        rng = self.rng = memory.rng
        self.memory = memory
        n = self.n = rng.choice((0, 1, 1, 2, 3, 5, 9)) if rows is None else rows
        self.groups = rng.choice((1, 1, 2, 3))
        uniform = rng.choice(DTYPES) if rng.random() < 0.5 else None
        any_replay = rng.random() < 0.4
        table, grads, replays = [], [], []
        for row in range(n):
            size = min(some_size(rng), most)
            kinds = [uniform or rng.choice(DTYPES) for _ in range(9)]

            def tensor(slot, missing=0.0, size=size, kinds=kinds):
                absent = rng.random() < missing
                return None if absent else memory.numbers(size, kinds[slot])

            grad = tensor(1, 0.1)
            replay = tensor(2, 0.3) if any_replay else None
            states = [tensor(3 + place) for place in range(3)]
            step = memory.of([rng.choice((0.0, 3.0, 2.0**24, 1e9, float("inf")))], DTYPES[0])
            base, stretch, stride = places(rng, size)
            codes = sum(DTYPES.index(kind) << SLOT_BITS * slot for slot, kind in enumerate(kinds))
            table += [
                address(tensor(0)), *map(address, states), address(tensor(6, 0.25)),
                address(step), size, rng.randrange(self.groups), codes,
                rng.choice((row, 2**31, a_word(rng))), base, stretch, stride,
                address(tensor(7, 0.7)), address(tensor(8, 0.5)),
            ]  # fmt: skip
            grads.append(address(grad))
            replays.append(address(replay))
        self.table = memory.of(table, torch.int64).view(n, COLUMNS)
        self.grads = memory.of(grads, torch.int64)
        self.replays = memory.of(replays if any_replay else [], torch.int64)
        self.distances = memory.of([rng.choice((-1.0, -1.0, 0.5, float("nan"))) for _ in range(n)],
                                   torch.float64)  # fmt: skip
        self.flags = memory.of([rng.choice((0, 1, 2, 3, 4, 5, 6, 255)) for _ in range(n)],
                               torch.uint8)  # fmt: skip
        self.coefficients = memory.of(
            [a_number(rng, 0.5) for _ in range(SCALES + n)], torch.float64
        )

    def arguments(self, rule: str) -> list[torch.Tensor]:
        numbers = [float(x) for _ in range(self.groups) for x in RULES[rule](self.rng)]
        hyper = self.memory.of(numbers, torch.float64).view(self.groups, -1)
        given = [self.table, self.grads, self.replays, self.coefficients, self.flags, hyper]
        return given if rule == "guide" else [*given, self.distances]

    def options(self, rule: str) -> dict:
        rng = self.rng
        options = {"replay_weight": a_number(rng, 0.6),
                   "grad_scale": rng.choice((1.0, 1.0, 8.0, 0.0, float("inf")))}  # fmt: skip
        if rng.random() < 0.5:
            options["importance"] = rng.choice((0.0, 0.5, 1.0))
        if rule == "norms":
            return {**options, "which": rng.choice((7, 7, 0, 1, 2, 4, a_word(rng)))}
        if rule == "products":
            return options
        options |= {"seed": a_word(rng), "draw": a_word(rng)}
        if rule != "guide":
            options |= {"look_ahead": rng.random() < 0.5, "stochastic": rng.random() < 0.4,
                        "route": rng.choice((0, 0, 1, 2))}  # fmt: skip
        return options

    def norms(self) -> torch.Tensor:
        given = self.table, self.grads, self.replays, self.distances
        return ops.norms_table(*given, **self.options("norms"))

    def products(self) -> torch.Tensor:
        given = self.table, self.grads, self.replays, self.flags
        return ops.products_table(*given, **self.options("products"))


OPERATORS = {"adam": ops.adam_table_, "sgd": ops.sgd_table_, "guide": ops.guide_table_}


class Calls:
    """What has been done; every method that is a scenario adds to it."""

    def __init__(self, pages: Pages | None) -> None:
        self.pages = pages
        self.calls = self.refused = self.steps = 0
        self.library = native.load()
        if self.library is None:
            raise RuntimeError("the native functions of dgg/backends/native.py cannot be used here")

    def run(self, seed: int, number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        threads = rng.choice((1, 1, 1, 2, 3, 4))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        torch.manual_seed(rng.getrandbits(32))
        scenario = rng.choices(
            (self.tables, self.lists, self.words, self.squares, self.watches, self.gathers,
             self.bad_tables, self.bad_lists, self.bad_rest, self.optimizer),
            (44, 12, 3, 4, 6, 8, 9, 5, 4, 5),
        )[0]  # fmt: skip
        scenario(Memory(rng, self.pages))
        if self.pages is not None:
            self.pages.reset()

    # Allowed calls.

    def tables(self, memory: Memory) -> None:
        rng = memory.rng
        table = Table(memory)
        for _ in range(rng.randint(1, 6)):
            rule = rng.choice(("norms", "adam", "adam", "sgd", "sgd", "guide", "products"))
            self.calls += 1
            if rule == "products":
                self.calls += 1
                ops.guard_coefficients(
                    table.products(), max_grad_norm=rng.choice((None, 1.0, 0.0)),
                    per_tensor=rng.random() < 0.5, maximize=rng.random() < 0.5,
                )  # fmt: skip
                continue
            if rule == "norms":
                squares = table.norms()
                if rng.random() < 0.5:
                    self.calls += 1
                    table.coefficients = ops.coefficients(
                        squares, max_grad_norm=rng.choice((None, 1.0, 0.0)),
                        scaling=rng.random() < 0.8, per_tensor=rng.random() < 0.5,
                    )  # fmt: skip
            elif rule == "guide" and (table.grads == 0).any() and table.replays.numel():
                self.calls -= 1  # a replay gradient without a gradient: see bad_tables
            else:
                OPERATORS[rule](*table.arguments(rule), **table.options(rule))

    def lists(self, memory: Memory) -> None:
        rule, arguments, options = self._list_arguments(memory)
        self.calls += 1
        getattr(ops, rule)(*arguments.values(), **options)

    def _list_arguments(self, memory: Memory, rows: int | None = None):
        rng = memory.rng
        rule = rng.choice(("norms", "adam_", "sgd_", "guide_", "products"))
        n = rng.choice((0, 1, 2, 3, 5)) if rows is None else rows
        sizes = [some_size(rng) for _ in range(n)]
        uniform = rng.choice(DTYPES) if rng.random() < 0.5 else None

        def tensors(missing=0.0):
            if rng.random() < missing:
                return []
            made = [memory.numbers(size, uniform or rng.choice(DTYPES)) for size in sizes]
            return [x.view(2, -1) if size and size % 2 == 0 else x
                    for x, size in zip(made, sizes, strict=True)]  # fmt: skip

        arguments = {"params": tensors(), "grads": tensors(), "replays": tensors(0.5)}
        distances = memory.of([rng.choice((-1.0, 0.5)) for _ in range(n)], torch.float64)
        coefficients = memory.of([a_number(rng, 0.5) for _ in range(SCALES + n)], torch.float64)
        flags = memory.of([rng.choice((0, 1, 2, 3, 7)) for _ in range(n)], torch.uint8)
        indices = [a_word(rng) for _ in range(n)] if rng.random() < 0.5 else []
        scaling = {"replay_weight": 0.6, "grad_scale": rng.choice((1.0, 4.0))}
        if rng.random() < 0.5:
            scaling |= {"importances": tensors(0.2), "importance": rng.choice((0.0, 0.5, 1.0))}
        drawn = {"seed": a_word(rng), "draw": a_word(rng)}
        ahead = {"look_ahead": rng.random() < 0.5}
        if rule == "norms":
            arguments |= {"anchors": tensors(0.2), "distances": distances}
            return rule, arguments, {**scaling, "which": rng.randrange(8)}
        if rule == "products":
            return rule, {**arguments, "anchors": tensors(0.2), "flags": flags}, scaling
        tail = {"coefficients": coefficients, "flags": flags, "indices": indices}
        if rule == "guide_":
            names = "maximize", "strength", "threshold"
            arguments |= {"anchors": tensors(0.2), **tail}
        elif rule == "sgd_":
            names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize",
                     "strength", "threshold")  # fmt: skip
            arguments |= {"momentum_buffers": tensors(), "anchors": tensors(0.2),
                          "distances": distances, **tail}  # fmt: skip
        else:
            names = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "amsgrad",
                     "maximize", "strength", "threshold")  # fmt: skip
            steps = [memory.of([3.0], DTYPES[0]) for _ in range(n)]
            arguments |= {"exp_avgs": tensors(), "exp_avg_sqs": tensors(),
                          "max_exp_avg_sqs": tensors(), "anchors": tensors(0.2), "steps": steps,
                          "distances": distances, **tail}  # fmt: skip
        numbers = dict(zip(names, RULES[rule.rstrip("_")](rng), strict=True))
        numbers["threshold"] = rng.choice((0, 1, 2**31, 2**32, -1, 2**62))
        return (
            rule,
            arguments,
            {**numbers, **scaling, **drawn, **({} if rule == "guide_" else ahead)},
        )

    def words(self, memory: Memory) -> None:
        rng = memory.rng
        for _ in range(4):
            self.calls += 1
            ops.philox_words(a_word(rng), a_word(rng), a_word(rng), some_size(rng))

    def squares(self, memory: Memory) -> None:
        rng = memory.rng
        for _ in range(4):
            self.calls += 1
            squares = memory.numbers(3 * rng.choice(TINY), torch.float64).view(3, -1)
            ops.coefficients(
                squares, max_grad_norm=rng.choice((None, 1.0, 0.0, float("nan"))),
                scaling=rng.random() < 0.8, per_tensor=rng.random() < 0.5,
            )  # fmt: skip

    def watches(self, memory: Memory) -> None:
        rng = memory.rng
        tensors = [
            memory.numbers(some_size(rng), rng.choice(DTYPES)) for _ in range(rng.randint(0, 6))
        ]
        if rng.random() < 0.1:
            self._watch_in_threads(tensors)
            return
        handle = ops.watch(tensors)
        self.calls += 4
        ops.unmoved(handle)
        if tensors and rng.random() < 0.5:
            tensors[0].data = tensors[0].data.clone()
            if ops.unmoved(handle) and tensors[0].numel():
                raise AssertionError("a tensor that moved was not noticed")
        if rng.random() < 0.5:
            del tensors, memory.made[:]
        ops.unmoved(handle)
        ops.unwatch(handle)
        for stale in (handle, 0, -1, a_word(rng)):
            self.calls += 2
            ops.unwatch(stale)
            if ops.unmoved(stale):
                raise AssertionError("a watch that is over says that nothing moved")

    def _watch_in_threads(self, tensors: list[torch.Tensor]) -> None:
        def work():
            for _ in range(10):
                handle = ops.watch(tensors)
                ops.unmoved(handle)
                ops.unwatch(handle)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.calls += 90

    def gathers(self, memory: Memory) -> None:
        rng, library = memory.rng, self.library
        params = []
        for _ in range(rng.randint(0, 6)):
            shape = rng.choice(((), (3,), (2, 3), (0, 2), (4, 1, 3), (130,)))
            params.append(torch.nn.Parameter(torch.randn(shape).to(rng.choice(DTYPES))))
        others = [torch.zeros(rng.randint(0, 5)) for _ in range(rng.randint(0, 4))]
        n = len(params)
        handle = ops.watch(others)
        anchors = [rng.randrange(-1, len(others)) for _ in range(rng.choice((0, n, n)))]
        native.watch_params(library, handle, params, anchors)
        entries = [
            {i: object() for i in range(rng.randint(0, 4))} for _ in range(rng.randint(0, 3))
        ]
        native.watch_dicts(library, handle, entries)
        gradients = memory.of([0] * n, torch.int64), memory.of([0] * n, torch.int64)
        distances = memory.of([0.5] * n, torch.float64)
        usual = [rng.random() < 0.9 for _ in range(n)]
        gather = native.NativeGradients(library, handle, *gradients, distances, usual)
        self.calls += 4
        for _ in range(rng.randint(1, 5)):
            for param in params:
                self._give_gradient(rng, param)
            replays = [None if rng.random() < 0.5 else torch.ones_like(p) for p in params]
            happening = rng.random()
            if params and happening < 0.3:
                with torch.no_grad():
                    rng.choice(params).add_(1)
            elif params and happening < 0.4:
                param = rng.choice(params)
                param.data = param.data.clone()
            elif params and happening < 0.45:
                param = rng.choice(params)
                param.grad = None
                torch.utils.swap_tensors(param, torch.nn.Parameter(torch.zeros(2)))
            elif others and happening < 0.6:
                rng.choice(others).add_(1)
            elif entries and happening < 0.7:
                rng.choice(entries)[rng.randrange(5)] = object()
            elif happening < 0.73:
                ops.unwatch(handle)
            self.calls += 4
            present = gather.begin(rng.random() < 0.5, replays if rng.random() < 0.4 else ())
            library.unmoved(handle)
            library.same_dicts(handle)
            if present >= 0:
                list(gather.odd())
                if rng.random() < 0.3:  # taken away while the step works on them
                    for param in params:
                        param.grad = None
                if rng.random() < 0.9:
                    gather.end(written=rng.random() < 0.7)
        ops.unwatch(handle)
        self.calls += 1

    @staticmethod
    def _give_gradient(rng: random.Random, param: torch.nn.Parameter) -> None:
        kind = rng.random()
        param.grad = None
        if kind < 0.2:
            return
        grad = torch.ones_like(param)
        if kind < 0.3 and grad.dim() == 2:
            grad = grad.t().contiguous().t()
        elif kind < 0.4:
            grad = torch._neg_view(grad)
        elif kind < 0.45 and grad.dim():
            grad = grad.to_sparse()
        elif kind < 0.5:
            param.grad_dtype = None
            grad = grad.to(rng.choice(DTYPES))
        elif kind < 0.55:
            grad = torch.ones((), dtype=grad.dtype).expand(grad.shape)
        param.grad = grad

    def optimizer(self, memory: Memory) -> None:
        """Whole steps, as a user makes them."""
        rng = memory.rng
        dtype, many = rng.choice(DTYPES), rng.random() < 0.1
        sizes = [rng.choice(TINY) if many else some_size(rng) for _ in range(40 if many else 4)]
        params = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
        guided = {
            "alpha": rng.choice((1.0, 0.5, 0.2)), "strength": rng.choice((0.7, 1.0)),
            "scaling": rng.random() < 0.8, "norm_scope": rng.choice(("global", "tensor")),
            "granularity": rng.choice(("step", "tensor", "element")),
            "max_grad_norm": rng.choice((None, 1.0)), "replay_weight": 0.6,
            "seed": rng.getrandbits(64), "backend": "cpp",
            "anchor_dtype": rng.choice((None, None, *DTYPES)),
        }  # fmt: skip
        narrow = dtype in DTYPES[1:3]
        stored = {
            "state_dtype": rng.choice((None, torch.float32)),
            "stochastic_rounding": dtype == torch.bfloat16 and rng.random() < 0.3,
        }
        stored["master_weights"] = (
            narrow and not stored["stochastic_rounding"] and rng.random() < 0.4
        )
        adam = {"weight_decay": 0.1, "amsgrad": rng.random() < 0.3, "maximize": rng.random() < 0.2}
        kind = rng.choice(("adam", "adamw", "sgd", "foreign"))
        if kind == "foreign":
            optimizer = torch.optim.SGD(params, lr=1e-3)
            guidance = dgg.Guidance(optimizer, **guided)
        elif kind == "sgd":
            momentum = rng.choice((0.0, 0.9))
            optimizer = guidance = dgg.SGD(params, lr=1e-3, momentum=momentum, **guided, **stored)
        else:
            make = dgg.Adam if kind == "adam" else dgg.AdamW
            optimizer = guidance = make(params, lr=1e-3, **adam, **guided, **stored)
        steps = rng.randint(2, 6)
        boundary = rng.randrange(-1, steps)
        for step in range(steps):
            if step == boundary:
                guidance.set_anchor()
            if rng.random() < 0.3:
                with guidance.replay():
                    for param in params:
                        param.grad = torch.randn_like(param)
            for param in params:
                param.grad = None if rng.random() < 0.1 else torch.randn_like(param)
            happening = rng.random()
            if happening < 0.1:
                with torch.no_grad():
                    rng.choice(params).mul_(0.5)
            elif happening < 0.2:
                param = rng.choice(params)
                param.data = param.data.clone()
            elif happening < 0.25 and kind != "foreign":
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            self.steps += 1
            if rng.random() < 0.3:
                guidance.guidance_stats()
            if rng.random() < 0.5:
                optimizer.zero_grad()

    # Calls that must be refused.

    def refuse(self, memory: Memory, call, *arguments, told: str = "dgg", **options) -> None:
        """Makes a call that is not allowed; checks that it says so and leaves all as it was."""
        before = memory.snapshot()
        try:
            call(*arguments, **options)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            if told not in str(error):
                raise AssertionError(f"refused without saying who and why: {error}") from error
        else:
            raise AssertionError(f"{call} was not refused")
        if not memory.unchanged(before):
            raise AssertionError(f"{call} was refused, but has written something")
        self.refused += 1

    def bad_tables(self, memory: Memory) -> None:
        rng = memory.rng
        table = Table(memory, rows=rng.choice((1, 2, 3, 5)), most=2000)
        rule = rng.choice(("adam", "sgd", "guide"))
        arguments, options = table.arguments(rule), table.options(rule)
        row = rng.randrange(table.n)

        def with_cell(column, value):
            arguments[0] = table.table.clone()
            arguments[0][row, column] = value
            # Active rows only are looked at for what an update needs.
            arguments[1] = torch.where(table.grads == 0, table.table[:, PARAM], table.grads)

        kind = rng.choice(("cell", "cell", "cell", "cell", "place", "missing", "tensor", "tensor",
                           "tensor", "replay", "norms", "option"))  # fmt: skip
        if kind == "option":
            wrong = {"importance": rng.choice((-0.5, 1.5, float("nan")))}
            if rule != "guide" and rng.random() < 0.5:
                wrong = {"route": rng.choice((-1, 3, a_word(rng) | 4))}
            options |= wrong
        elif kind == "cell":
            column, value = rng.choice((
                (NUMEL, -1), (NUMEL, -(2**63)), (GROUP, -1), (GROUP, table.groups),
                (GROUP, 2**62), (GROUP, 2**63 - 1), (GROUP, -(2**63)),
                (CODES, 4 << SLOT_BITS * rng.randrange(9)), (CODES, -1), (CODES, -(2**63)),
                (CODES, 0x8 << SLOT_BITS * rng.randrange(9)), (STRETCH, 0), (STRETCH, -3),
                (STRETCH, -(2**63)),
            ))  # fmt: skip
            with_cell(column, value)
            if column == STRETCH and table.table[row, NUMEL] == 0:
                return
        elif kind == "place":
            column, value = self._no_place(rng, table.table[row])
            with_cell(column, value)
        elif kind == "missing":
            if rule == "guide" or table.table[row, NUMEL] == 0:
                return
            with_cell(STEP if rule == "adam" and rng.random() < 0.3 else EXP_AVG, 0)
            if rule == "sgd":
                arguments[5][:, 1] = 0.9
        elif kind == "tensor":
            place = rng.randrange(len(arguments))
            arguments[place] = self._spoiled(rng, arguments[place])
        elif kind == "replay":
            if rule != "guide":
                return
            arguments[1] = table.grads.clone()
            arguments[1][row] = 0
            arguments[2] = table.table[:, PARAM].contiguous()
        else:
            given = [table.table, table.grads, table.replays, table.distances]
            place = rng.randrange(4)
            if rng.random() < 0.5:
                given[place] = self._spoiled(rng, given[place])
            else:
                column, value = rng.choice((
                    (NUMEL, -1), (GROUP, -1), (STRETCH, -1), (CODES, 255),
                    self._no_place(rng, table.table[row]),
                ))  # fmt: skip
                if column == STRETCH and table.table[row, NUMEL] == 0:
                    return
                given[0] = table.table.clone()
                given[0][row, column] = value
            self.refuse(memory, ops.norms_table, *given, **table.options("norms"))
            return
        self.refuse(memory, OPERATORS[rule], *arguments, **options)

    @staticmethod
    def _no_place(rng: random.Random, row: torch.Tensor) -> tuple[int, int]:
        """Returns a column of a row and a number that leaves an element no place, or any."""
        choices = [(BASE, -1), (BASE, -(2**63)), (BASE, LAST_PLACE), (BASE, 2**63 - 1),
                   (STRIDE, -1), (STRIDE, -(2**63)), (NUMEL, LAST_PLACE),
                   (NUMEL, 2**63 - 1)]  # fmt: skip
        numel, stretch = row[NUMEL].item(), row[STRETCH].item()
        turns = (numel - 1) // stretch if numel else 0
        if turns:
            choices += 2 * [(STRIDE, -(-LAST_PLACE // turns)), (STRIDE, 2**63 - 1)]
        return rng.choice(choices)

    @staticmethod
    def _spoiled(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
        """Returns a tensor that none of the arguments may be."""
        one_more = torch.cat([x, x[:1]]) if x.numel() else x.new_zeros(1)
        choices = [x.to(torch.int32), x.to(torch.float32), torch.cat([one_more, one_more])]
        if x.numel() > 1:
            apart = torch.stack([x, x], -1).select(-1, 0)
            choices.append(apart)
        if x.dim() == 2:
            choices += [x[:, :-1].contiguous(), x.reshape(-1), x.unsqueeze(0), x[:, :0]]
            if x.shape[0] > 1:
                choices.append(x.t().contiguous().t())
            if rng.random() < 0.25:
                return x.new_zeros(())
        spoiled = rng.choice(choices)
        if x.dim() == 2 and x.shape[1] != COLUMNS and spoiled.shape == one_more.shape:
            return x.to(torch.int32)  # more groups than anybody uses are no fault
        if x.dim() == 2 and x.shape[1] != COLUMNS and spoiled.dtype == x.dtype:
            return x[:, :-1].contiguous()
        if x.numel() == 0 and x.dim() == 1:
            return torch.zeros(7, dtype=torch.int16)
        return spoiled

    def bad_lists(self, memory: Memory) -> None:
        rng = memory.rng
        rule, arguments, options = self._list_arguments(memory, rows=rng.choice((1, 2, 3)))
        n = len(arguments["params"])
        lists = [
            name for name, value in arguments.items()
            if isinstance(value, list) and name not in ("params", "indices") and value
        ]  # fmt: skip
        kind = rng.choice(("length", "shape", "dtype", "order", "column", "indices", "steps"))
        if kind == "length":
            name = rng.choice(lists)
            arguments[name] = arguments[name] * 2
        elif kind == "indices":
            if "indices" not in arguments:
                return
            arguments["indices"] = [0] * (n + 1)
        elif kind == "steps":
            if rule != "adam_":
                return
            wrong = rng.choice((torch.zeros(2), torch.zeros((), dtype=torch.float64),
                                torch.zeros(0), torch.zeros((), dtype=torch.int64)))  # fmt: skip
            arguments["steps"][rng.randrange(n)] = wrong
        elif kind == "column":
            name = rng.choice([name for name in ("distances", "coefficients", "flags")
                               if name in arguments])  # fmt: skip
            arguments[name] = rng.choice((
                torch.cat([arguments[name]] * 2), arguments[name].to(torch.int32),
                torch.stack([arguments[name]] * 2, -1).select(-1, 0),
            ))  # fmt: skip
            if arguments[name].dtype != torch.int32 and arguments[name].numel() == 1:
                arguments[name] = arguments[name].to(torch.int32)  # one element is contiguous
        else:
            name = rng.choice([name for name in lists if name != "steps"])
            row = rng.randrange(n)
            x = arguments[name][row]
            if kind == "shape":
                arguments[name][row] = torch.cat([x.reshape(-1), torch.ones(1, dtype=x.dtype)])
            elif kind == "dtype":
                arguments[name][row] = x.to(rng.choice((torch.int32, torch.complex64, torch.bool)))
            elif x.numel() > 1:
                arguments[name][row] = torch.stack([x, x], -1).select(-1, 0)
            else:
                return
        self.refuse(memory, getattr(ops, rule), *arguments.values(), **options)

    def bad_rest(self, memory: Memory) -> None:
        rng = memory.rng
        kind = rng.choice(("words", "squares", "watch", "end"))
        if kind == "words":
            n = rng.choice((-1, -(2**63)))
            self.refuse(memory, ops.philox_words, 0, 0, 0, n)
        elif kind == "squares":
            squares = rng.choice((
                torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float64),
                torch.zeros(12, dtype=torch.float64), torch.zeros(3, dtype=torch.int64),
                torch.zeros(4, 3, dtype=torch.float64).t(), torch.zeros((), dtype=torch.float64),
            ))  # fmt: skip
            self.refuse(memory, ops.coefficients, squares, max_grad_norm=1.0, scaling=True,
                        per_tensor=False)  # fmt: skip
        elif kind == "watch":
            tensors = [torch.zeros(3), torch.ones(3).to_sparse()]
            self.refuse(memory, ops.watch, tensors, told="")
        else:
            self._end_before_begin(memory)

    def _end_before_begin(self, memory: Memory) -> None:
        """Ends a step that has not begun, one with more parameters, and one of no watch."""
        rng, library = memory.rng, self.library
        params = [torch.nn.Parameter(memory.numbers(rng.choice(TINY), DTYPES[0]))
                  for _ in range(rng.randint(1, 6))]  # fmt: skip
        n = len(params)
        handle = ops.watch([])
        native.watch_params(library, handle, params, [])
        numbers = memory.of([0] * n, torch.int64), memory.of([0] * n, torch.int64)
        known = memory.of([0.5] * n, torch.float64)
        gather = native.NativeGradients(library, handle, *numbers, known, [True] * n)
        if rng.random() < 0.3:  # begun, but with fewer
            fewer = rng.randrange(n)
            few = native.NativeGradients(library, handle, *numbers, known, [True] * fewer)
            if few.begin(True) != 0:
                raise AssertionError("a parameter has a gradient that nobody gave it")
            self.calls += 1
        elif rng.random() < 0.3:
            ops.unwatch(handle)
        before = [p._version for p in params], list(gather.versions)
        self.refuse(memory, gather.end, written=rng.random() < 0.7, told="version")
        if before != ([p._version for p in params], list(gather.versions)):
            raise AssertionError("a step that has not begun was counted")
        ops.unwatch(handle)
        self.calls += 1


def provoke(kind: str) -> None:
    """Does on purpose what must be found, by a library that is otherwise right."""
    if kind == "undefined":
        # Stands in nothing but the library of tests/sanitized.py.
        library = next(pathlib.Path(dgg.__file__).parent.glob("_C.*so"))
        ctypes.CDLL(str(library)).dgg_overflow(2**31 - 1)
        return
    pages = Pages() if kind == "pages" else None
    memory = Memory(random.Random(0), pages)
    memory.pool = POOLS[0]
    param = pages.tensor(33, DTYPES[0], True) if pages else torch.zeros(33)
    grad, buffer = torch.zeros(64), torch.zeros(64)
    # One vector more than there is.
    table = [param.data_ptr(), buffer.data_ptr(), 0, 0, 0, 0, 41, 0, 0, 0, 0, 41, 41, 0, 0]
    ops.sgd_table_(
        torch.tensor([table]), torch.tensor([grad.data_ptr()]), torch.zeros(0, dtype=torch.int64),
        torch.ones(5, dtype=torch.float64), torch.zeros(1, dtype=torch.uint8),
        torch.tensor([[0.1, 0.9, 0, 0, 0, 0, 0, 0]], dtype=torch.float64),
        torch.full((1,), -1.0, dtype=torch.float64), replay_weight=1.0, grad_scale=1.0,
        look_ahead=False, seed=0, draw=0,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=1000, help="go on until there were as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="scenario to begin with")
    parser.add_argument("--pages", action="store_true", help="put tensors before forbidden pages")
    parser.add_argument("--progress", help="file to write the number of the scenario to")
    parser.add_argument("--provoke", choices=("memory", "undefined", "pages"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.provoke:
        provoke(given.provoke)
        print("nothing was found")
        return
    if given.pages:
        # What should have been refused may ask for all there is; ASan has a bound of its own.
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    done = Calls(Pages() if given.pages else None)
    progress = None
    if given.progress:
        with open(given.progress, "w+b") as file:
            file.write(bytes(8))
            file.flush()
            progress = mmap.mmap(file.fileno(), 8)
    number = given.first
    while done.calls + done.refused < given.calls:
        if progress is not None:
            struct.pack_into("q", progress, 0, number)
        try:
            done.run(given.seed, number)
        except AssertionError as error:
            raise SystemExit(f"scenario {number} of seed {given.seed}: {error}") from error
        number += 1
    print(
        f"isa: {ops.isa()}, scenarios: {number - given.first}, calls: {done.calls}, "
        f"refused: {done.refused}, steps: {done.steps}, findings: 0"
    )


if __name__ == "__main__":
    main()
