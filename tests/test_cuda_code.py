# SPDX-License-Identifier: BSD-3-Clause
"""The machine code of the CUDA kernels, as nvcc compiles it; no GPU is needed to look at it."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import inspect
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

from cases import cpp_missing

ROOT = pathlib.Path(__file__).parent.parent
THREADS = 256  # of a block
# What one multiprocessor must have on its way from memory to keep it busy: 8 TB/s for a
# microsecond, divided among 148 (B200); an H200 with 4.8 TB/s and 132 needs less.
IN_FLIGHT = 8e12 * 1e-6 / 148
REGISTERS = 65536  # of a multiprocessor
SIZES = {"float": 4, "double": 8, "bfloat16": 2, "float16": 2}

FEW = {
    "adam": [
        "Plain<float, float, float, float>", "Guided<float, float, float, float>",
        "Replayed<float, float, float, float>", "Plain<float, bfloat16, bfloat16, bfloat16>",
        "Guided<float, bfloat16, bfloat16, bfloat16>", "Guided<float, bfloat16, bfloat16, float>",
        "Rounded<float, bfloat16, bfloat16, bfloat16>", "Master<bfloat16, true, false>",
        "Routed<float>", "Routed<bfloat16>", "Routed<bfloat16, float>",
        "AnyKind<float, true, Any>",
    ],
    "sgd": [
        "Plain<true, float, float>", "Guided<false, float, bfloat16>",
        "Guided<true, float, bfloat16>", "Routed<float>", "Routed<bfloat16>",
    ],
    "guide": [
        "Plain<float, bfloat16>", "Guided<float, float>", "Guided<float, bfloat16>",
        "Weighted<float>", "Weighted<bfloat16>",
    ],
    "norms": [
        "Gradients<float>", "Gradients<bfloat16>", "Replayed<float>", "Measured<float>",
        "Measured<bfloat16>", "Weighted<float>", "Weighted<bfloat16>",
    ],
    "products": [
        "Plain<float>", "Plain<bfloat16>", "Plain<float, bfloat16>", "Weighted<float>",
        "Weighted<bfloat16>", "AnyProducts<double>",
    ],
}  # fmt: skip
# Every instruction set that differs from the others.
MACHINES = [80, 90, 100, 120]
ALL_MACHINES = [80, 86, 89, 90, 100, 120]


def _load_setup():
    """setup.py as a module: what the libraries are built with."""
    spec = importlib.util.spec_from_file_location("dgg_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_setup()
NVCC = build.find_nvcc()


def _find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, which Triton's wheel brings along, too."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if NVCC:
        places.append(str(pathlib.Path(NVCC).resolve().parent))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(places))


CUOBJDUMP, FILT = _find_tool("cuobjdump"), _find_tool("c++filt")
needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="nvcc, which compiles the CUDA kernels, was not found"
)
needs_tools = pytest.mark.skipif(
    None in (NVCC, CUOBJDUMP, FILT),
    reason="nvcc, cuobjdump and c++filt, to compile the kernels and look at them, are not all here",
)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def _compile(unit: str, machine: int, folder: pathlib.Path) -> pathlib.Path:
    """A few kernels for one machine."""
    target = folder / f"{unit}-{machine}.cubin"
    source = folder / f"{unit}-{machine}.cu"
    # Not with -D: nvcc takes commas there for the ends of definitions.
    whole = ROOT / "csrc" / f"cuda_{unit}.cu"
    source.write_text(f'#define DGG_ONLY {", ".join(FEW[unit])}\n#include "{whole}"\n')
    command = [NVCC, *build.cuda_flags(), f"-arch=sm_{machine}", "--cubin"]
    _run([*command, "-o", str(target), str(source)])
    return target


def _groups_at_once(loads: int) -> int:
    """Groups of vectors that a thread reads before it computes, as in csrc/cuda_chunk.cuh."""
    return 1 if loads >= 5 else 2 if loads >= 3 else 4


class Walk:
    """One walk over a chunk, of streams with so many bytes an element.

    Attributes:
        loads: 128-bit loads.
        stores: 128-bit stores.
        once: How many of each are to leave the cache first: all but the streams in `again`.
    """

    def __init__(self, reads: list[int], writes: list[int], again: tuple[int, int]) -> None:
        # 128 bits of the narrowest type, and at least a quad.
        elements = 8 if min(reads + writes) == 2 else 4
        loads = elements * sum(reads) // 16
        groups = _groups_at_once(loads)
        self.loads = groups * loads
        self.stores = groups * elements * sum(writes) // 16
        kept = [groups * elements * size // 16 for size in again]
        self.once = (self.loads - kept[0], self.stores - kept[1])


class Kernel:
    """A kernel's machine code, and what its name says that it should be.

    Attributes:
        unit: Which rule: adam, sgd, guide, norms, products.
        kind: The template arguments of its kind, none for the kernels of one block.
        generic: It learns its types at run time.
        reads: It reads tensors and writes none.
        draws: It draws for every element.
        replays: It takes replay gradients in an update.
        loads: 128-bit loads.
        stores: 128-bit stores.
        once: How many of the loads and of the stores make room in the cache first.
        registers: Registers of a thread.
        local: Bytes of stack and local memory, and instructions that access it.
        counts: How often a block counts itself in.
        fences: Fences behind the first store, which wait for what is on its way to memory.
    """

    def __init__(self, unit: str, name: str, code: str, usage: str) -> None:
        self.unit, self.name = unit, name
        kind = re.search(r"Kind<(.*?)>", name)
        self.kind = [x.split("::")[-1].strip() for x in kind.group(1).split(",")] if kind else []
        self.generic = "Any" in self.kind
        self.reads = unit in ("norms", "products")
        updates = bool(kind) and not self.reads
        self.draws = updates and self.kind[8] == "true"
        self.replays = updates and self.kind[7] == "true"
        # LD and ST without G would be accesses to memory of a kind that the compiler did not know.
        self.loads = len(re.findall(r"\bLDG?\.[A-Z0-9.]*128", code))
        self.stores = len(re.findall(r"\bSTG?\.[A-Z0-9.]*128", code))
        self.once = tuple(
            len(re.findall(rf"\b{op}G?\.E\.EF\.[A-Z0-9.]*128", code)) for op in ("LD", "ST")
        )
        self.counts = len(re.findall(r"\bATOMG?\.", code))
        self.fences = len(re.findall(r"\bMEMBAR\b", re.sub(r"^.*?\bSTG?\.", "", code, flags=re.S)))
        self.unknown = len(re.findall(r"\b(?:LD|ST)\.E\b", code))
        self.registers = int(re.search(r"REG:(\d+)", usage).group(1))
        self.local = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
        self.local += len(re.findall(r"\b(?:LDL|STL)\b", code))

    def walks(self) -> list[Walk]:
        """What the kernel must read and write."""
        sizes = [SIZES.get(x, 0) for x in self.kind]
        yes = [x == "true" for x in self.kind]
        if self.unit == "norms":
            _, param, grad, anchor, _, importance = sizes
            weights = [importance] if importance else []
            reads = [[grad]] + [[grad, grad]] * yes[4] + [[param, anchor, *weights]] * (param > 0)
            # The update wants them again.
            return [Walk(each, [], (sum(each), 0)) for each in reads]
        if self.unit == "products":
            _, param, grad, anchor, importance = sizes
            reads = [grad, grad, param, anchor, *([importance] if importance else [])]
            return [Walk(reads, [], (sum(reads), 0))]
        _, param, grad, moment, anchor, copy = sizes[:6]
        guided, replayed, _, state = yes[6:10]
        reads = [grad] * (2 if replayed else 1) + ([anchor] if guided else [])
        reads += [sizes[10]] if sizes[10] else []  # importance
        if self.unit == "guide":
            return [Walk(reads + [param] * guided, [grad], (param * guided, grad))]
        moments = [moment] * {"adam": 2 + state, "sgd": int(state)}[self.unit]
        copies = [copy] if copy else []
        return [
            # A parameter is read beside its master, which it may have to replace.
            Walk(
                [*reads, param, *moments, *copies],
                [param, *moments, *copies],
                (0, param + sum(copies)),
            )
        ]


def _kernels(unit: str, compiled: pathlib.Path, machine: int) -> list[Kernel]:
    dump = [CUOBJDUMP, "--gpu-architecture", f"sm_{machine}", str(compiled)]
    code = _run([*dump, "--dump-sass"])
    usage = _run([*dump, "--dump-resource-usage"])
    usages = dict(re.findall(r"Function (\S+):\n\s*(REG:.*)", usage))
    parts = re.split(r"Function : (\S+)\n", code)[1:]
    mangled, texts = parts[::2], parts[1::2]
    assert mangled and set(mangled) == set(usages)
    names = _run([FILT, *mangled]).splitlines()
    return [
        Kernel(unit, name, text, usages[key])
        for key, name, text in zip(mangled, names, texts, strict=True)
    ]


def _check(kernel: Kernel, machine: int) -> None:
    what = f"sm_{machine}, {kernel.name}"
    assert kernel.local == 0, f"{what}: {kernel.local} bytes of local memory or accesses to it"
    if not kernel.kind or kernel.generic:
        return
    assert kernel.unknown == 0, f"{what}: {kernel.unknown} accesses to memory of an unknown kind"
    if not kernel.reads and kernel.kind[6] == "false":
        # It measures nothing, so it hands nothing over. That all have read the step is known early.
        assert (kernel.counts, kernel.fences) == (int(kernel.unit == "adam"), 0), what
    walks = kernel.walks()
    loads, stores = sum(w.loads for w in walks), sum(w.stores for w in walks)
    assert kernel.loads == loads, what
    # Where there is little to compute the compiler may make copies of it, for rows that are not
    # guided, have no replay gradient or no weight decay. One of them runs.
    small = kernel.unit == "guide" or (kernel.unit == "sgd" and kernel.kind[9] == "false")
    expected = {stores, 2 * stores, 4 * stores} if small else {stores}
    assert kernel.stores in expected, f"{what}: {kernel.stores} for {stores}"
    once = [sum(w.once[place] for w in walks) for place in range(2)]
    copies = kernel.stores // stores if stores else 1
    assert kernel.once == (once[0], copies * once[1]), f"{what}: {kernel.once} for {once}"
    blocks = min(REGISTERS // (-(-kernel.registers // 8) * 8 * THREADS), 1536 // THREADS)
    if kernel.draws or kernel.replays:
        # Philox is more work than its share of the memory's time, and a replay gradient more
        # registers: two blocks, 48 KiB with six loads, which is still what an H200 needs.
        assert blocks >= 2, f"{what}: {kernel.registers} registers"
        return
    flight = blocks * THREADS * 16 * min(w.loads for w in walks)
    assert flight >= IN_FLIGHT, f"{what}: {kernel.registers} registers leave {flight} bytes"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    jobs = list(itertools.product(FEW, MACHINES))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(jobs, pool.map(lambda job: _compile(*job, folder), jobs), strict=True))


@needs_tools
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("unit", FEW)
def test_machine_code(few, unit, machine):
    kernels = _kernels(unit, few[unit, machine], machine)
    assert len([kernel for kernel in kernels if kernel.kind]) == len(FEW[unit])
    for kernel in kernels:
        _check(kernel, machine)


@needs_tools
@pytest.mark.parametrize("machine", MACHINES)
def test_bytes_of_a_step(few, machine):
    """The table of design.md: 28 bytes a parameter, 32 guided, half of that in bfloat16."""
    kernels = {}
    for kernel in _kernels("adam", few["adam", machine], machine):
        kernels[", ".join(kernel.kind)] = kernel
    plain = kernels["float, float, float, float, float, void, false, false, false, false, void"]
    guided = kernels["float, float, float, float, float, void, true, false, false, false, void"]
    # Groups of four elements: two at once unguided, one guided.
    assert (plain.loads / 2, plain.stores / 2) == (4, 3)
    assert (guided.loads, guided.stores) == (5, 3)
    narrow = "bfloat16, bfloat16, bfloat16, bfloat16"
    plain = kernels[f"float, {narrow}, void, false, false, false, false, void"]
    guided = kernels[f"float, {narrow}, void, true, false, false, false, void"]
    # The same for eight elements.
    assert (plain.loads / 2, plain.stores / 2) == (4, 3)
    assert (guided.loads, guided.stores) == (5, 3)
    # With importance one more, and one for a replay gradient, which not every row has.
    for kind in ("float, " * 4, "bfloat16, " * 4):
        (routed,) = [
            kernel
            for name, kernel in kernels.items()
            if name.startswith(f"float, {kind}void, true, true") and "void" in name
            and name.endswith(f"false, {kind.split(',')[0]}")
        ]  # fmt: skip
        assert (routed.loads, routed.stores) == (7, 3)


@needs_nvcc
def test_operators_compile_against_this_torch(tmp_path):
    include = pathlib.Path(torch.__file__).parent / "include"
    target = tmp_path / "cuda.o"
    _run(
        [NVCC, *build.cuda_flags(), "-I", str(include), "-DUSE_CUDA",
         f"-D{build.TARGET[0]}={build.TARGET[1]}", "-c", "-o", str(target),
         str(ROOT / "csrc" / "cuda.cu")]
    )  # fmt: skip
    _assert_stable(target)


def _assert_stable(library: pathlib.Path) -> None:
    """Asserts that nothing of torch is used but its stable C interface."""
    symbols = _run(["nm", "--undefined-only", "--demangle", str(library)])
    used = [line.split(maxsplit=1)[1].strip() for line in symbols.splitlines() if line.strip()]
    assert "aoti_torch_get_current_cuda_stream" in used
    wrong = [x for x in used if re.match(r"(c10|at|torch|caffe2)::(?!stable|headeronly)", x)]
    assert not wrong, wrong


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder in which everything was built once, for every architecture, as it is released."""
    folder = tmp_path_factory.mktemp("whole")
    env = {**os.environ, "DGG_CUDA": "1", "DGG_CPP": "1"}
    env.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "setup.py", "-q",
               "build_ext", "--build-lib", str(folder / "lib"),
               "--build-temp", str(folder / "temp")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the build, in the first of these tests
@needs_tools
@pytest.mark.parametrize("machine", ALL_MACHINES)
@pytest.mark.parametrize("unit", FEW)
def test_machine_code_of_all_kernels(whole, unit, machine):
    kernels = _kernels(unit, whole / "temp" / "cuda" / f"cuda_{unit}.o", machine)
    assert len(kernels) > 10
    for kernel in kernels:
        _check(kernel, machine)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_tools
def test_library(whole):
    """Machine code for every architecture, PTX, size, and what it links to."""
    (library,) = (whole / "lib" / "dgg").glob("_C_cuda*.so")
    assert not list((whole / "lib" / "dgg").glob("_build_error*"))
    assert sum(f.stat().st_size for f in (whole / "lib" / "dgg").glob("*.so")) < 10 * 2**20

    known = set(re.findall(r"sm_(\d+)", _run([NVCC, "--list-gpu-code"])))
    expected = [machine for machine in ALL_MACHINES if str(machine) in known]
    machine_code = re.findall(r"\.sm_(\d+)\.cubin", _run([CUOBJDUMP, "--list-elf", str(library)]))
    units = len(FEW)
    # The operators' unit has no kernel, for the first few.
    assert {int(m): machine_code.count(m) for m in set(machine_code)} == {
        machine: units + (machine in (80, 86, 89)) for machine in expected
    }
    ptx = re.findall(r"\.sm_(\d+)\.ptx", _run([CUOBJDUMP, "--list-ptx", str(library)]))
    assert ptx == [str(max(expected))] * units
    _assert_stable(library)
    needed = re.findall(r"NEEDED\).*\[(.*)\]", _run(["readelf", "--dynamic", str(library)]))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not [name for name in needed if "cudart" in name]


# Which architectures


DEFAULT = [
    "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89]",
    "-gencode=arch=compute_90,code=[sm_90]",
    "-gencode=arch=compute_100,code=[sm_100]",
    "-gencode=arch=compute_120,code=[sm_120,compute_120]",
]


@pytest.mark.parametrize(
    "wanted,known,expected",
    [
        (None, {75, 80, 86, 89, 90, 100, 120}, DEFAULT),
        (
            None,
            {75, 80, 86, 89, 90},
            [DEFAULT[0], "-gencode=arch=compute_90,code=[sm_90,compute_90]"],
        ),
        ("9.0", set(), [DEFAULT[1]]),
        ("8.6;8.0+PTX", set(), ["-gencode=arch=compute_80,code=[sm_80,sm_86,compute_80]"]),
        ("Hopper", set(), ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]),
        ("9.0a", set(), ["-gencode=arch=compute_90a,code=[sm_90a]"]),
        ("7.5 8.9+PTX", set(), ["-gencode=arch=compute_89,code=[sm_89,compute_89]"]),
        (
            "8.0,8.6+PTX",
            set(),
            [
                "-gencode=arch=compute_80,code=[sm_80,sm_86]",
                "-gencode=arch=compute_86,code=[compute_86]",
            ],
        ),
    ],
)
def test_architectures(wanted, known, expected):
    assert build.code_options(wanted, known) == expected


@pytest.mark.parametrize(
    "wanted,message", [("7.5", "compute capability 8.0 or newer"), ("foo", "TORCH_CUDA_ARCH_LIST")]
)
def test_architectures_that_cannot_be(wanted, message):
    with pytest.raises(build.CompileError, match=message):
        build.code_options(wanted, set())


# Schemas


WRITTEN = {
    "norms_launch": {"partials", "counters", "distances", "squares", "out"},
    "coefficients_launch": {"out"},
    "products_launch": {"partials", "counters", "products", "out"},
    "guard_coefficients_launch": {"out"},
    "adam_launch_": {"partials", "counters", "distances"},
    "sgd_launch_": {"partials", "counters", "distances"},
    "guide_launch_": set(),
    "draw_flags_launch": {"flags", "gate"},
}


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
@pytest.mark.parametrize("name", WRITTEN)
def test_schemas_say_what_is_written(name):
    schema = getattr(torch.ops.dgg, name).default._schema
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    assert written == WRITTEN[name]


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton, the other backend, is not installed"
)
@pytest.mark.parametrize("name", WRITTEN)
def test_both_backends_have_the_same_signature(name):
    kernels = pytest.importorskip("dgg.kernels")
    signature = inspect.signature(getattr(kernels, name))
    theirs = [
        (p.name, p.kind is p.KEYWORD_ONLY)
        for p in signature.parameters.values()
        if p.default is p.empty
    ]
    schema = getattr(torch.ops.dgg, name).default._schema
    ours = [(a.name, a.kwarg_only) for a in schema.arguments if not a.has_default_value()]
    assert ours == theirs


@pytest.mark.skipif(cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}")
@pytest.mark.parametrize(
    "name", ["norms", "coefficients", "products", "guard_coefficients", "adam_", "sgd_", "guide_"]
)
def test_operators_on_lists_refuse_tensors_on_a_gpu(name):
    """As the dispatcher would find it from a CUDA tensor, here with others in its place."""
    operator = getattr(torch.ops.dgg, name).default
    values = {"Tensor": torch.zeros(1), "List[Tensor]": [torch.zeros(1)], "List[int]": [0],
              "Optional[float]": None, "Optional[List[Tensor]]": None, "float": 0.5, "int": 0,
              "bool": False}  # fmt: skip
    given = {a.name: values[str(a.type)] for a in operator._schema.arguments}
    positional = [given.pop(a.name) for a in operator._schema.arguments if not a.kwarg_only]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match=f"dgg.reference.{name} takes tensors of any"):
        operator.redispatch(keys, *positional, **given)
