# SPDX-License-Identifier: BSD-3-Clause
"""Machine code of the Triton kernels, compiled ahead of time for GPUs that need not be here.

Another process, in which the kernels are not interpreted, runs the launches with a recorder in
place of the driver, compiles what they would have launched, and reads the machine code.

A variant is a kernel, a mix of dtypes, a guidance (none, per step, per element, each of the last
two with the look-ahead or without), extras (momentum or amsgrad, stochastic rounding, copies of
master weights), what is asked of the pull (importance, first moment alone, outside of the moments),
and whether there are replay gradients and numbers on the device. By default are
compiled

- the launches that people use most: COMMON for every target, MORE for sm_90 (`test_machine_code`),
- every sixth of `pairs` (`test_machine_code_of_every_pair`; the others are slow), in which of each
  kernel any two choices, the target among them, come together in one launch. Here accesses are
  counted in the whole kernel, not for each loop, and cache hints are not looked at.

Every pair of choices for each kernel, mix and target is `test_machine_code_of_every_variant`, which
is slow. Three choices together are compiled where they happen to meet.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile

import pytest
import torch
from dgg.kernels import layout

from cases import BF16, F16, F32, F64

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl
    from dgg.kernels.update import unsharded_index

    @triton.jit
    def places_kernel(out, first, base, stretch, stride, numel):
        offset = tl.arange(0, 1024)
        tl.store(out + offset, unsharded_index(first, offset, base, stretch, stride, numel))


DTYPES = [F32, BF16, F16, F64]  # in the order of their codes
ANCHOR, ELEMENTS, LOOK_AHEAD = layout.ANCHOR_BIT, layout.ELEMENTS_BIT, layout.LOOK_AHEAD_BIT
STATE, STOCHASTIC, COPY = layout.STATE_BIT, layout.STOCHASTIC_BIT, layout.COPY_BIT
IMPORTANCE, FIRST_MOMENT = layout.IMPORTANCE_BIT, layout.FIRST_MOMENT_BIT
DECOUPLED = layout.DECOUPLED_BIT

NVIDIA = ["sm_80", "sm_90", "sm_100", "sm_120"]
TARGETS = [*NVIDIA, "gfx942"]

# Dtypes of parameter, gradient, moments, anchor and copy that people use; importance is stored as
# the anchor.
MIXES = {
    "f32": (F32, F32, F32, F32, F32),
    "bf16": (BF16, BF16, BF16, BF16, BF16),
    "f16": (F16, F16, F16, F16, F16),
    "mixed": (BF16, BF16, F32, F32, BF16),
    "master": (F32, F32, F32, BF16, BF16),
    "anchor": (F32, F32, F32, BF16, F32),
    "f64": (F64, F64, F64, F64, F64),
}

# What the memory system of a large GPU wants to have under way in each multiprocessor: 4.8 TB/s
# (H200) times 0.8 us of latency over 132 multiprocessors. (A B200's wants 43 kB, which 12 rare ones
# of 350 variants do not reach.) With sm_120 there are none as large: 1.8 TB/s over 170 (RTX 5090).
H200 = 4.8e12 * 0.8e-6 / 132
BYTES_UNDER_WAY = dict.fromkeys(NVIDIA, H200) | {"sm_120": 1.8e12 * 0.8e-6 / 170}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a launch is compiled for."""

    kernel: str
    mix: str
    variant: int = 0
    replay: bool = False
    device: bool = False  # grad_scale, found_inf, draw_index and gate are given

    def __str__(self):
        names = ["anchor", "elements", "look-ahead", "state", "stochastic", "copy", "importance",
                 "first-moment", "decoupled"]  # fmt: skip
        words = [name for bit, name in enumerate(names) if self.variant >> bit & 1]
        words += ["replay"] * self.replay + ["device"] * self.device
        return "-".join([self.kernel, self.mix, *words])

    @property
    def anchored(self):
        return bool(self.variant & ANCHOR)

    @property
    def several(self):
        """Whether the compiler takes several blocks at once, since there is little to do with one.

        Gradients are scaled, no more; or there are two products, not five.
        """
        if self.kernel == "products":
            return not self.replay
        return self.kernel == "guide" and not self.anchored

    def streams(self):
        """Dtypes of the tensors that each element is loaded from and stored to."""
        param, grad, state, anchor, copy = MIXES[self.mix]
        loads = [grad] + [grad] * self.replay + [anchor] * self.anchored
        loads += [anchor] * bool(self.variant & IMPORTANCE)
        if self.kernel == "products":
            return loads + [param] + [copy] * (copy != param), []
        if self.kernel == "guide":
            return loads + [param] * self.anchored, [grad]
        moments = 2 + bool(self.variant & STATE) if self.kernel == "adam" else 0
        if self.kernel == "sgd":
            moments = int(bool(self.variant & STATE))
        # A parameter is read beside its master, which it may have to replace.
        copies = [copy] * bool(self.variant & COPY)
        loads += [param] + [state] * moments + copies
        return loads, [param] + [state] * moments + copies

    def wanted_again(self):
        """Dtypes of the tensors that should stay in the cache, of loads and of stores."""
        param, grad, _, _, copy = MIXES[self.mix]
        if self.kernel == "guide":  # by the optimizer behind it
            return [param] * self.anchored, [grad]
        return [], [param] + [copy] * bool(self.variant & COPY)

    def draws(self):
        """How many words each element needs."""
        param, *_, copy = MIXES[self.mix]
        narrow = param == BF16 or (self.variant & COPY and copy == BF16)
        rounded = bool(self.variant & STOCHASTIC) and narrow and self.kernel != "guide"
        return int(rounded) + bool(self.variant & ELEMENTS)

    def pack(self):
        """Elements of a block in one thread."""
        param, grad, state, anchor, copy = MIXES[self.mix]
        used = {param, grad, anchor} | ({state} if self.kernel in ("adam", "sgd") else set())
        used |= {copy} if self.kernel in ("adam", "sgd", "products") else set()
        return 8 if used & {BF16, F16} else 4


def accesses(dtypes, pack):
    """Returns how many 128-bit accesses a thread makes for its elements of a block."""
    return sum(pack * dtype.itemsize // 16 for dtype in dtypes)


# One of everything, for every target.
COMMON = [
    Launch("adam", "f32", ANCHOR),
    Launch("adam", "bf16", ANCHOR | LOOK_AHEAD | STOCHASTIC),
    Launch("guide", "bf16", ANCHOR | ELEMENTS),
    Launch("norms", "f32"),
    Launch("products", "f32", ANCHOR | IMPORTANCE, replay=True),
]
# Where people will look first.
MORE = [
    Launch("adam", "f32"),
    Launch("sgd", "f32", ANCHOR | STATE, replay=True),
    Launch("adam", "bf16"),
    Launch("adam", "bf16", ANCHOR),
    Launch("adam", "mixed", ANCHOR),
    Launch("adam", "anchor", ANCHOR),
    Launch("adam", "f64", ANCHOR),
    Launch("adam", "f32", ANCHOR | LOOK_AHEAD),
    Launch("adam", "f32", ANCHOR | ELEMENTS),
    Launch("adam", "bf16", ANCHOR | ELEMENTS),
    Launch("adam", "mixed", 31, replay=True, device=True),
    Launch("adam", "mixed", ANCHOR | LOOK_AHEAD | STATE, replay=True),
    Launch("adam", "master", ANCHOR | COPY | STOCHASTIC),
    Launch("sgd", "f32"),
    Launch("sgd", "bf16", ANCHOR | STATE),
    Launch("norms", "bf16"),
    Launch("norms", "mixed", replay=True, device=True),
    Launch("adam", "f32", ANCHOR | IMPORTANCE, replay=True),
    Launch("adam", "bf16", ANCHOR | IMPORTANCE | LOOK_AHEAD),
    Launch("adam", "master", ANCHOR | IMPORTANCE | COPY | STOCHASTIC, replay=True),
    Launch("adam", "f32", ANCHOR | FIRST_MOMENT),
    Launch("adam", "mixed", ANCHOR | IMPORTANCE | DECOUPLED, replay=True),
    Launch("sgd", "f32", ANCHOR | IMPORTANCE | DECOUPLED | STATE, replay=True),
    Launch("guide", "f32", ANCHOR | IMPORTANCE, replay=True),
    Launch("norms", "f32", IMPORTANCE),
    Launch("products", "f32", ANCHOR, replay=True),
    Launch("products", "bf16", ANCHOR | IMPORTANCE, replay=True, device=True),
    Launch("products", "mixed", ANCHOR, replay=True),
    Launch("products", "master", ANCHOR | IMPORTANCE, replay=True),
    Launch("products", "f64", ANCHOR | IMPORTANCE, replay=True),
    Launch("products", "f32", ANCHOR),
]
FAST = [(target, launch) for target in TARGETS for launch in COMMON]
FAST += [("sm_90", launch) for launch in MORE]
FAST += [("gfx942", launch) for launch in MORE[:2]]


def covering(*axes):
    """Yields rows of the product, the last one first, until every pair of values was in one."""
    rows = {row: set(itertools.combinations(enumerate(row), 2)) for row in itertools.product(*axes)}
    missing, row = set().union(*rows.values()), [*rows][-1]
    while missing:
        yield row
        missing -= rows[row]
        rows = {other: left for other, pairs in rows.items() if (left := pairs & missing)}
        row = max(rows, key=lambda other: len(rows[other]), default=None)


def launches(kernel, *choices):
    """Yields values of the choices and a launch, in which every pair of choices comes.

    With and without what asks little of the compiler all together would be hours. The first launch
    has everything at once, and so the most registers.
    """
    flags = [False, True]
    if kernel in ("norms", "products"):
        anchored = ANCHOR if kernel == "products" else 0
        for *chosen, mix, weighing, replay, device in covering(
            *choices, [0, IMPORTANCE], flags, flags
        ):
            yield *chosen, Launch(kernel, mix, anchored | weighing, replay, device)
        return
    guidances, extras = [0, ANCHOR, ANCHOR | ELEMENTS], [0]
    if kernel != "guide":
        guidances += [ANCHOR | LOOK_AHEAD, ANCHOR | ELEMENTS | LOOK_AHEAD]
        extras = [0, STATE, STOCHASTIC, STATE | STOCHASTIC]
    # What is asked of the pull goes with any guidance, and with none it is nothing.
    pulls = [0, IMPORTANCE]
    pulls += {"adam": [FIRST_MOMENT, IMPORTANCE | DECOUPLED], "sgd": [DECOUPLED]}.get(kernel, [])
    for *chosen, mix, guidance, pull, extra, replay, device in covering(
        *choices, guidances, pulls, extras, flags, flags
    ):
        variant = guidance | extra | (COPY if mix == "master" and kernel != "guide" else 0)
        variant |= pull if guidance else 0
        yield *chosen, Launch(kernel, mix, variant, replay, device)


KERNELS = ["adam", "sgd", "guide", "norms", "products"]


def pairs():
    """Yields launches with every pair of choices of each kernel; all but each sixth are slow."""
    rows = (row for kernel in KERNELS for row in launches(kernel, TARGETS, [*MIXES]))
    for number, row in enumerate(rows):
        marks = [] if number % 6 == 1 else [pytest.mark.slow]
        yield pytest.param(*row, marks=marks)


# The other process


def record(launch, target):
    """Runs a launch; returns what it would have started: kernel, arguments, options."""
    from dgg.kernels import launcher
    from triton.runtime.jit import JITFunction

    from dgg import kernels

    started = []
    launcher._warp_size = lambda device: 64 if target.startswith("gfx") else 32

    def run(self, *args, grid, warmup, **options):
        started.append((self, dict(zip(self.arg_names, args, strict=True)), options))

    JITFunction.run = run

    def ints(*shape, dtype=torch.int64):
        return torch.zeros(*shape, dtype=dtype)

    def doubles(*shape):
        return torch.zeros(*shape, dtype=F64)

    one = torch.ones(1)
    scale, found = (one, one) if launch.device else (None, None)
    drawn = ints(1) if launch.device else None
    gate = ints(1, dtype=torch.uint8) if launch.device else None
    param, grad, state, anchor, copy = MIXES[launch.mix]
    # Where importance is not read, its dtype says nothing, as in a table without it.
    weighted = bool(launch.variant & IMPORTANCE)
    kinds = [param, grad, grad, state, state, state, anchor, copy, anchor if weighted else param]
    codes = sum(DTYPES.index(kind) << layout.SLOT_BITS * place for place, kind in enumerate(kinds))
    int32 = torch.int32
    table = ints(2, layout.COLUMNS)
    rows, parts, starts = ints(2, dtype=int32), ints(2, 2, dtype=int32), ints(3, dtype=int32)
    partials, counters = doubles(layout.PARTIALS, 2), ints(3, dtype=int32)
    importance = 0.5 if weighted else 0.0
    addresses = ints(2), ints(2 if launch.replay else 0)
    common = (*addresses, doubles(6), ints(2, dtype=torch.uint8), doubles(1, 10))
    draws = dict(dtypes=codes, replay_weight=0.5, seed=1, draw=0, variant=launch.variant,
                 importance=importance)  # fmt: skip
    if launch.kernel == "norms":
        kernels.norms_launch(
            table, rows, parts, starts, partials, counters, *addresses, doubles(2), doubles(3, 2),
            gate, scale, doubles(6), dtypes=codes, replay_weight=0.5, which=7, max_grad_norm=1.0,
            scaling=True, per_tensor=False, importance=importance,
        )  # fmt: skip
    elif launch.kernel == "products":
        kernels.products_launch(
            table, rows, parts, starts, partials, counters, *addresses, ints(2, dtype=torch.uint8),
            doubles(6, 2), scale, doubles(8), dtypes=codes, replay_weight=0.5,
            importance=importance, max_grad_norm=1.0, per_tensor=False, maximize=False,
        )  # fmt: skip
    elif launch.kernel == "guide":
        kernels.guide_launch_(table, rows, parts, *common, scale, found, drawn, **draws)
    elif launch.kernel == "coefficients":
        kernels.coefficients_launch(
            doubles(3, 2), doubles(6), max_grad_norm=1.0, scaling=True, per_tensor=launch.device
        )
    elif launch.kernel == "guard_coefficients":
        kernels.guard_coefficients_launch(
            doubles(6, 2), doubles(8), max_grad_norm=1.0, per_tensor=launch.device, maximize=False
        )
    elif launch.kernel == "draw_flags":
        kernels.draw_flags_launch(
            table, doubles(1, 10), ints(1), ints(2, dtype=torch.uint8),
            ints(1, dtype=torch.uint8), seed=1, granularity=1, threshold_column=1,
            strength_column=2,
        )  # fmt: skip
    else:
        getattr(kernels, f"{launch.kernel}_launch_")(
            table, rows, parts, starts, partials, counters, *common, doubles(2), scale, found,
            drawn, **draws,
        )  # fmt: skip
    return started


def compile_for(target, function, arguments, options):
    """Compiles one recorded start for a target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    signature, constants = {}, {}
    for parameter in function.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = parameter.annotation_type or mangle_type(value)
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(ASTSource(function, signature, constants), target=gpu, options=options)


def tool(name):
    import triton

    return pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def innermost(lines, label, branch):
    """Lines of the innermost loops, given how labels and branches look."""
    places, loops = {}, []
    for number, line in enumerate(lines):
        if found := re.match(label, line):
            places[found.group(1)] = number
        if (found := re.search(branch, line)) and found.group(1) in places:
            loops.append((places[found.group(1)], number))
    return [
        lines[first : last + 1]
        for first, last in loops
        if not any(first <= a and b < last for a, b in loops)
    ]


def count(lines, pattern):
    return sum(bool(re.search(pattern, line)) for line in lines)


def count_codes(cubin):
    """Counts 128-bit loads and stores and accesses to local memory, without a disassembler.

    That takes as long as compiling. Instructions have 16 bytes, their codes are the lowest 12 bits
    and the width of an access stands in bits 73 to 75: so on every target here, which the tests
    with a disassembler hold against it.
    """
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + n * size) for n in range(number)]
    found = {"loads": 0, "stores": 0, "local": 0}
    for name, _, _, _, begin, length in headers:
        if not cubin[headers[names][4] + name :].startswith(b".text."):
            continue
        for low, high in struct.iter_unpack("<QQ", cubin[begin : begin + length]):
            code, wide = low & 0xFFF, high >> 9 & 7 == 6
            found["loads"] += code == 0x981 and wide  # LDG
            found["stores"] += code == 0x986 and wide  # STG
            found["local"] += code in (0x983, 0x387)  # LDL, STL
    return found


def read_nvidia(compiled, whole):
    """Reads machine code; not ``whole`` leaves the disassembler out, and with it the loops."""
    counts = count_codes(compiled.asm["cubin"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def ask_tool(name, option):
            command = [tool(name), option, file.name]
            return subprocess.run(command, capture_output=True, text=True).stdout

        usage = ask_tool("cuobjdump", "-res-usage")
        result = {
            "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
            "scratch": int(re.search(r"STACK:(\d+)", usage).group(1)) + counts["local"],
            "loads": counts["loads"],
            "stores": counts["stores"],
        }
        if not whole:
            return result
        lines = ask_tool("nvdisasm", "-c").splitlines()
    loops = innermost(lines, r"\s*(\.L_x_\d+):", r"BRA\b.*`\((\.L_x_\d+)\)")
    result["once"] = [count(lines, rf"\b{op}G\.E\.EF\.128\b") for op in ("LD", "ST")]
    result |= wide(lines, loops, *(rf"\b{op}G\.E\b[^;]*" for op in ("LD", "ST")), r"\.128\b")
    local = count(lines, r"\b(LD|ST)L\b")
    assert counts == {"loads": result["loads"], "stores": result["stores"], "local": local}
    return result


def read_amd(compiled, whole):
    lines = compiled.asm["amdgcn"].splitlines()
    loops = innermost(lines, r"(\.LBB\d+_\d+):", r"s_c?branch\w*\s+(\.LBB\d+_\d+)")

    def number(field):
        return int(re.search(rf"\.{field}:\s+(\d+)", compiled.asm["amdgcn"]).group(1))

    return {
        "registers": number("vgpr_count"),
        "scratch": number("private_segment_fixed_size") + number("vgpr_spill_count"),
        "bypassing": count(lines, r"_load_\w+ .*\bsc1\b"),  # the caches
        "acquires": count(lines, r"^\s*buffer_inv\b"),
        **wide(
            lines, loops, *(rf"\b(global|buffer)_{op}_\w+" for op in ("load", "store")), "x4\\b"
        ),
    }


def wide(lines, loops, load, store, width):
    """Counts 128-bit accesses, everywhere and with the others in each loop that has any."""
    result = {"loads": 0, "stores": 0, "loops": []}
    for kind, pattern in (("loads", load), ("stores", store)):
        result[kind] = sum(
            bool(re.search(width, found.group()))
            for line in lines
            if (found := re.search(pattern, line))
        )
    for loop in loops:
        counts = {}
        for kind, pattern in (("loads", load), ("stores", store)):
            hits = [found.group() for line in loop if (found := re.search(pattern, line))]
            counts[kind] = sum(bool(re.search(width, hit)) for hit in hits)
            counts[f"narrow {kind}"] = len(hits) - counts[kind]
        if counts["loads"]:
            result["loops"].append(counts)
    return result


def answer(target, launch, whole):
    """Compiles a launch; returns what its machine code is like, a dict for each kernel."""
    from dgg.kernels.launcher import ROOM

    result = []
    for function, arguments, options in record(launch, target):
        compiled = compile_for(target, function, arguments, options)
        read = read_amd if target.startswith("gfx") else read_nvidia
        width = 64 if target.startswith("gfx") else 32
        threads = options["num_warps"] * width
        found = read(compiled, whole)
        found["again"] = bool(found["scratch"]) and target in NVIDIA
        if found["again"]:  # as a launch does
            compiled = compile_for(target, function, arguments, {**options, **ROOM})
            found |= read(compiled, whole)
        result.append({"name": function.__name__, "threads": threads, **found})
    return result


def serve():
    """Answers questions, a line each, until there are no more."""
    for line in sys.stdin:
        target, launch, whole = json.loads(line)
        try:
            reply = answer(target, Launch(**launch), whole)
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"
        print(json.dumps(reply), flush=True)


# The tests


def missing():
    """Returns why nothing can be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    absent = [name for name in ("nvdisasm", "cuobjdump") if not tool(name).exists()]
    return f"this Triton comes without {' and '.join(absent)}" if absent else None


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def ask(request):
    """Asks the other process about one launch on one target."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
        "import test_triton_code; test_triton_code.serve()"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip

        def question(target, launch, whole=True):
            asked = json.dumps([target, dataclasses.asdict(launch), whole])
            print(asked, file=process.stdin, flush=True)
            reply = json.loads(process.stdout.readline())
            if "ROCm linker" in reply:  # recent versions bring their own
                pytest.skip(f"this Triton cannot finish code for AMD here: {reply}")
            assert isinstance(reply, list), reply
            return reply

        yield question
        process.stdin.close()


def check(target, launch, kernels):
    (main,) = kernels
    assert main["scratch"] == 0, "registers were spilled"
    pack, disassembled = launch.pack(), "loops" in main
    if launch.kernel == "norms":
        param, grad, _, anchor, _ = MIXES[launch.mix]
        gradients = accesses([grad] * (1 + launch.replay), pack)
        weighted = bool(launch.variant & IMPORTANCE)
        differences = accesses([param, anchor] + [anchor] * weighted, pack)
        ahead = 4 * gradients
        assert main["loads"] >= ahead + 4 * differences
        # Of the coefficients four numbers lie side by side.
        assert main["stores"] == (0 if target in NVIDIA else 2)
    if launch.kernel == "norms" and disassembled:
        assert len(main["loops"]) >= 2
        # A loop each for gradients and differences, besides what is left of an unrolled one.
        # On AMD a masked load, of one gradient of two, is a branch, so loops are not what they look
        # like; the whole kernel is.
        if target in NVIDIA or not launch.replay:
            found = [loop["loads"] for loop in main["loops"]]
            for each in (gradients, differences):
                assert any(loads >= 4 * each and loads % each == 0 for loads in found)
        for loop in main["loops"]:
            if target in NVIDIA or not launch.replay:
                assert loop["loads"] % gradients == 0 or loop["loads"] % differences == 0
            assert loop["stores"] == loop["narrow loads"] == loop["narrow stores"] == 0
        if target in NVIDIA:
            assert main["once"] == [0, 0], "the update wants what a norm pass has read"
    elif launch.kernel == "products":
        ahead = accesses(launch.streams()[0], pack)
        # Of each stream as many accesses as of every other; what is small is unrolled.
        assert main["loads"] % ahead == 0 and main["loads"] > 0
        each = ahead
        if launch.several and disassembled and target in NVIDIA:
            ahead = max(loop["loads"] for loop in main["loops"])
        # Of the coefficients four numbers lie side by side, and behind the strengths two.
        assert main["stores"] == (0 if target in NVIDIA else 3)
        if target in NVIDIA and disassembled:
            assert main["once"] == [0, 0], "the update wants what this pass has read"
            assert main["loops"]
            for loop in main["loops"]:
                assert loop["loads"] % each == 0
                assert loop["stores"] == loop["narrow loads"] == loop["narrow stores"] == 0
    elif launch.kernel != "norms" and target not in NVIDIA:
        # Numbers of the table that lie side by side come in one load, in each of the two walks.
        loads, stores = (accesses(streams, pack) for streams in launch.streams())
        # What is small is unrolled: of each stream as many accesses as of every other.
        blocks = main["stores"] // stores
        assert main["stores"] == blocks * stores > 0
        assert main["loads"] - blocks * loads in (0, 2 * launch.draws())
    elif launch.kernel != "norms":
        loads, stores = (accesses(streams, pack) for streams in launch.streams())
        ahead = loads
        if launch.several:
            ahead = max(loop["loads"] for loop in main["loops"])
        # Of each stream as many accesses as of every other: k blocks at a time.
        for counts in (main, *main.get("loops", [])):
            assert counts["loads"] == counts["stores"] // stores * loads > 0, (loads, stores)
            assert counts["stores"] % stores == 0, stores
    if launch.kernel not in ("norms", "products") and target in NVIDIA and disassembled:
        assert main["loops"]
        again = [accesses(streams, pack) for streams in launch.wanted_again()]
        copies = main["stores"] // stores
        assert main["once"] == [copies * (loads - again[0]), copies * (stores - again[1])]
        for loop in main["loops"]:
            # Five numbers of the table say where in the unsharded parameter the elements lie.
            blocks = loop["stores"] // stores
            assert loop["narrow loads"] in (0, 5 * launch.draws() * blocks)
            assert loop["narrow stores"] == 0
    if target in NVIDIA:
        registers = -(-main["registers"] // 8) * 8 * main["threads"]
        resident = min(REGISTERS // registers, THREADS // main["threads"], BLOCKS)
        threads = resident * main["threads"]
        enough = threads * 16 * ahead >= BYTES_UNDER_WAY[target]
        if launch.draws():
            # Philox is more work than its share of the memory's time: as many threads as the CUDA
            # kernels must have for it do, too.
            enough = enough or threads >= 512
        assert enough, f"{main['registers']} registers"


@pytest.mark.parametrize("target,launch", FAST, ids=lambda x: str(x))
def test_machine_code(target, launch, ask):
    """128-bit accesses only, as many as predicted, nothing spilled, enough loads under way."""
    kernels = ask(target, launch)
    assert not kernels[0]["again"], "what most people use is to be compiled once"
    check(target, launch, kernels)


@pytest.mark.parametrize("target,launch", [*pairs()], ids=lambda x: str(x))
def test_machine_code_of_every_pair(target, launch, ask):
    """As above without the disassembler: counts of the whole kernel, no loops, no cache hints."""
    check(target, launch, ask(target, launch, whole=launch.several))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_of_every_variant(target, mix, kernel, ask):
    for (launch,) in launches(kernel, [mix]):
        check(target, launch, ask(target, launch))


@pytest.mark.parametrize(
    "launch,counters",
    [
        (Launch("norms", "f32"), 2),  # of a row's chunks, and of the rows
        (Launch("products", "f32", ANCHOR, replay=True), 2),
        (Launch("adam", "bf16", ANCHOR | LOOK_AHEAD | STOCHASTIC), 1),
        (Launch("adam", "f32"), 1),  # the last one counts the step that all have read
        (Launch("sgd", "f32"), 0),
    ],
    ids=lambda x: str(x),
)
def test_what_others_wrote_is_acquired_once(launch, counters, ask):
    """On AMD each load that goes around the caches would be waited for by itself."""
    (kernel,) = ask("gfx942", launch)
    assert kernel["acquires"] == counters and kernel["bypassing"] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_small_kernels(target, ask):
    """The kernels of one program, whose norms are of all tensors or of each."""
    names = ["coefficients", "guard_coefficients", "draw_flags"]
    for name, device in itertools.product(names, (False, True)):
        (kernel,) = ask(target, Launch(name, "f32", device=device))
        assert kernel["name"] == f"{name}_kernel"
        assert kernel["scratch"] == 0, "registers were spilled"


@pytest.mark.parametrize(
    "first,stretch",
    [(2**40, 3), (2**40 - 7, 1000), (2**33 - 1, 2**30), (2**31 - 94, 2**30 + 3),
     (2**33 - 100, 2**32), (2**33, 2**32), (3 << 20, 2**32), (2**50 - 1, 2**41)],
)  # fmt: skip
def test_places_in_the_unsharded_parameter(first, stretch):
    """In the interpreter: stretches whose ends come often in a block, once, or not at all."""
    base, stride = 2**35 + 1, 3 * stretch + 5
    out = torch.zeros(1024, dtype=torch.int64)
    places_kernel[(1,)](out, first, base, stretch, stride, 2**60)
    place = first + torch.arange(1024)
    assert torch.equal(out, base + place // stretch * stride + place % stretch)


def test_the_unguided_kernel_never_loads_the_anchor(ask):
    plain, guided = (ask("sm_90", Launch("adam", "f32", variant))[0] for variant in (0, ANCHOR))
    assert (plain["loads"], plain["stores"]) == (4, 3)  # theta g m v, theta m v
    assert (guided["loads"], guided["stores"]) == (5, 3)
