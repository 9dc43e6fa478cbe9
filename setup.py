# SPDX-License-Identifier: BSD-3-Clause
"""Builds the optional libraries dgg/_C*.so and dgg/_C_cuda*.so; the rest is in pyproject.toml.

They use the stable ABI of torch 2.10 and no Python API, so one file serves every later torch and
Python. They are compiled against the torch of the environment that is installed into, also when
pip builds in an environment of its own.

Where one cannot be built the installation still succeeds: the reason goes to dgg/_build_error.txt
or dgg/_build_error_cuda.txt. Its first line ends with what to do; dgg adds the command. The first
step on the reference says it, and so does `dgg.show_config()`.

Environment:
    DGG_CPP   0 skips the C++ library, 1 makes its failure fatal.
    DGG_CUDA  0 skips the CUDA library, 1 builds it whatever torch is installed and makes its
              failure fatal; unset, it is built for a CUDA build of torch if nvcc is found, for the
              GPUs of this machine, and given up after a minute.
    DGG_TORCH  1 has pip fetch a CPU build of torch to compile against where none is installed.
    DGG_WHEEL  for releases: "binary" builds the C++ library or fails, and no CUDA library; "pure"
              builds none, and the wheel is for every platform. `make wheel` sets it.
    CUDA_HOME  where nvcc is; else PATH, the usual place, and NVIDIA's Python packages are searched.
    TORCH_CUDA_ARCH_LIST  compute capabilities, as torch reads it: "8.0;9.0+PTX".
    DEBUG  1 builds without optimisation and with debug information.
"""

import concurrent.futures
import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

CPP, CUDA = "dgg._C", "dgg._C_cuda"
ERROR_FILES = {CPP: "_build_error.txt", CUDA: "_build_error_cuda.txt"}
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
# Features newer than torch 2.10 are out of reach at compile time already.
TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")

# What DGG_TORCH=1 compiles against. Only the CPU builds of PyTorch's own index are called so: pip
# cannot take the one of PyPI instead, which brings gigabytes of CUDA.
PINNED_TORCH = "torch==2.13.0" if sys.platform == "darwin" else "torch==2.13.0+cpu"
OLDEST_TORCH = (2, 10)
# The C++ library: operators, passes over the CPU's memory, and the watch of tensors.
CPU_SOURCES = ("ops", "cpu", "cpu_lists", "cpu_products", "watch")
# What a wheel that others install says of a library that it leaves out.
WHEEL = os.environ.get("DGG_WHEEL", "")
LEFT_OUT = {
    CPP: (
        "this wheel, the one for every platform, has no compiled library; see that there is a C++ "
        "compiler, then install dgg again from its sources"
    ),
    CUDA: (
        "not built: the wheels have no CUDA library; where there is the CUDA toolkit, install dgg "
        "again from its sources"
    ),
}
# How long the CUDA library may take that nobody has asked for.
PATIENCE = 60.0

ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
OLDEST = 80  # bfloat16 conversions
NAMED = {
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 12.0+PTX",
}


def say(text: str) -> None:
    """Prints a line where a person sees it: pip keeps to itself what a build prints."""
    print(f"dgg: {text}", file=sys.stderr, flush=True)
    if os.name == "posix" and not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\ndgg: {text}", file=terminal)


def find_torch() -> pathlib.Path | None:
    """Returns the directory of torch without importing it, or None if there is none.

    In pip's isolated build the interpreter is that of the environment, and only environment
    variables hide what is installed there: asked without them, it tells.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return pathlib.Path(spec.origin).parent
    code = (
        "import importlib.util, sys; sys.path.pop(0); spec = importlib.util.find_spec('torch'); "
        "print(spec and spec.origin or '')"
    )
    done = subprocess.run([sys.executable, "-E", "-c", code], stdout=subprocess.PIPE, text=True)
    return pathlib.Path(done.stdout.strip()).parent if done.stdout.strip() else None


def torch_directory() -> pathlib.Path:
    """Returns the directory of a torch that can be compiled against."""
    torch = find_torch()
    if torch is None:
        raise ModuleNotFoundError(
            "torch is not installed where the package was built; install torch, then install dgg "
            "again"
        )
    found = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", version_of(torch), re.MULTILINE)
    if found is not None and (int(found[2]), int(found[3])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ModuleNotFoundError(
            f"torch {found[1]} is older than {oldest}; install a newer one, then install dgg again"
        )
    return torch


def version_of(torch: pathlib.Path) -> str:
    file = torch / "version.py"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def build_requirements() -> list[str]:
    """Returns what an isolated build needs besides pyproject.toml: torch, if that was asked for."""
    asked = os.environ.get("DGG_TORCH", "") not in ("", "0")
    return [PINNED_TORCH] if asked and find_torch() is None else []


def flags(msvc: bool) -> list[str]:
    # No fast-math: NaN must stay NaN. No contraction: with fused multiply-adds on some machines
    # only, results would differ between instruction sets.
    if msvc:
        return ["/std:c++17", "/fp:precise", *(["/Od", "/Z7"] if DEBUG else ["/O2"])]
    return [
        "-std=c++17",
        # Unswitching doubles the time to compile and gains nothing at memory speed.
        *(["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-fno-unswitch-loops"]),
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fopenmp-simd",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
        "-Wno-ignored-optimization-argument",
    ]


def cuda_flags() -> list[str]:
    return [
        "-std=c++17",
        *(["-O0", "-g", "-G"] if DEBUG else ["-O3"]),
        # As on the CPU: no variant of a kernel may round differently from another.
        "-fmad=false",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-Xfatbin=-compress-all",
    ]


def torch_has_cuda(torch: pathlib.Path) -> bool:
    """Returns whether the installed torch is a CUDA build, without importing it."""
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", version_of(torch), re.MULTILINE) is not None


def find_nvcc() -> str | None:
    places = [
        os.path.join(os.environ[name], "bin")
        for name in ("CUDA_HOME", "CUDA_PATH")
        if os.environ.get(name)
    ]
    places += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    packages = importlib.util.find_spec("nvidia")
    for root in packages.submodule_search_locations or () if packages else ():
        places += map(str, pathlib.Path(root).glob("*/bin"))
    return shutil.which("nvcc", path=os.pathsep.join(places))


def local_architectures() -> str | None:
    """Returns the compute capabilities of this machine's GPUs, as TORCH_CUDA_ARCH_LIST has them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.findall(r"^\s*(\d+\.\d)\s*$", done.stdout, re.MULTILINE)
    return ";".join(sorted(set(found))) or None


def code_options(wanted: str | None, known: set[int]) -> list[str]:
    """Returns nvcc's options for machine code and PTX.

    Args:
        wanted: TORCH_CUDA_ARCH_LIST, or None for what this package is released with.
        known: Architectures that this nvcc knows, 90 for 9.0; the default is cut down to them.

    Raises:
        CompileError: The list is not understood, or none of it is new enough.
    """
    text = wanted or ARCHITECTURES
    for name, meaning in NAMED.items():
        text = text.replace(name, meaning)
    parsed = set()
    for item in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise CompileError(
                f"TORCH_CUDA_ARCH_LIST has {item!r}; it must be numbers like 8.0;9.0+PTX"
            )
        major, minor, suffix, with_ptx = match.groups()
        number = int(major + minor)
        if number >= OLDEST and (wanted is not None or number in known):
            parsed.add((number, suffix, bool(with_ptx)))
    machine: dict[str, list[str]] = {}  # of virtual architectures
    numbers, ptx = [], []
    for number, suffix, with_ptx in sorted(parsed):
        base = f"{number}{suffix}"
        if not suffix:
            numbers.append(number)
            # Minor versions run the code of their major version's first, which is compiled once.
            base = str(min(n for n in numbers if n // 10 == number // 10))
        machine.setdefault(base, []).append(f"sm_{number}{suffix}")
        if with_ptx:
            ptx.append(f"{number}{suffix}")
    if not machine:
        raise CompileError(
            f"none of {text} can run these kernels, which need compute capability 8.0 or newer and "
            "an nvcc that knows it"
        )
    if wanted is None and not ptx:
        ptx.append(str(max(numbers)))
    for base in ptx:
        machine.setdefault(base, []).append(f"compute_{base}")
    return [
        f"-gencode=arch=compute_{base},code=[{','.join(dict.fromkeys(codes))}]"
        for base, codes in machine.items()
    ]


def spawn_with_reason(command: list[str], *, deadline: float | None = None, **_) -> None:
    """Runs a compiler so that what it complains about is not lost.

    Args:
        command: The compiler and its arguments.
        deadline: When it is stopped, with all that it has started, in seconds of time.monotonic().

    Raises:
        CompileError: It is not there, or it failed; what it printed follows the first line.
        TimeoutError: The deadline has passed.
    """
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=deadline is not None,
        )  # fmt: skip
    except OSError as error:
        raise CompileError(
            f"no C++ compiler: {error}; install one (on Debian: apt-get install g++), then install "
            "dgg again"
        ) from error
    try:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise TimeoutError(f"{command[0]} was stopped") from None
    sys.stderr.write(output)
    if process.returncode:
        tail = "\n".join(output.splitlines()[-20:])
        raise CompileError(
            f"{command[0]} failed with exit code {process.returncode} (dgg.show_config() has its "
            f"output); see that it compiles C++17, then install dgg again\n{tail}"
        )


class BuildPure(build_py):
    """Puts the reason into a wheel that has no libraries."""

    def run(self):
        super().run()
        for name, file in ERROR_FILES.items():
            path = pathlib.Path(self.build_lib) / "dgg" / file
            path.write_text(LEFT_OUT[name] + "\n", encoding="utf-8")


class BuildExtension(build_ext):
    """Builds what it can and keeps the reason where it cannot."""

    def run(self):
        # Where the libraries will be in the end: an editable install has them among the sources.
        self.places = {name: pathlib.Path(self.get_ext_fullpath(name)) for name in ERROR_FILES}
        self.reasons = {}
        super().run()
        for name, place in self.places.items():
            report = place.parent / ERROR_FILES[name]
            reason = self.reasons.get(name)
            if reason is None:
                report.unlink(missing_ok=True)
                continue
            # A library of an earlier build would load and be taken for this one.
            place.unlink(missing_ok=True)
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(reason + "\n", encoding="utf-8")
            first = reason.splitlines()[0]
            torch = find_torch()
            if name == CPP:
                say(f"INSTALLED WITHOUT ITS FAST CPU LIBRARY, steps will be slow: {first}")
            elif torch is not None and torch_has_cuda(torch):
                say(f"installed without its CUDA library: {first}")
            else:  # which nobody can use there
                print(f"dgg: continuing without {name}: {first}", file=sys.stderr)

    def build_extensions(self):
        for extension in list(self.extensions):
            build, switch = {
                CPP: (self.build_cpp, "DGG_CPP"),
                CUDA: (self.build_cuda, "DGG_CUDA"),
            }[extension.name]
            wanted = os.environ.get(switch, "")
            if WHEEL == "binary":
                wanted = "1" if extension.name == CPP else "left out"
            if wanted == "left out":
                reason = LEFT_OUT[CUDA]
            elif wanted == "0":
                reason = (
                    f"not built: {switch}=0 was set during installation; unset it, then install "
                    "dgg again"
                )
            else:
                try:
                    reason = build(extension, wanted == "1")
                except Exception as error:
                    if wanted == "1":
                        raise
                    reason = str(error)
                    if not isinstance(error, (CompileError, ModuleNotFoundError)):
                        reason = f"{type(error).__name__}: {error}"
                    if "install dgg again" not in reason:
                        first, *others = reason.splitlines() or [""]
                        reason = "\n".join([f"{first}; mend that, then install dgg again", *others])
            if reason is not None:
                self.reasons[extension.name] = reason
                # Setuptools would look for the outputs of what was not built. A new list: the old
                # one is the distribution's, and without any module the wheel has another layout.
                self.extensions = [other for other in self.extensions if other is not extension]

    def build_cpp(self, extension, required: bool) -> str | None:
        torch = torch_directory()
        msvc = self.compiler.compiler_type == "msvc"
        if not msvc:
            # Setuptools before 84 runs the compiler with `spawn`, later ones with `call`.
            self.compiler.spawn = self.compiler.call = spawn_with_reason
        extension.include_dirs.append(str(torch / "include"))
        extension.library_dirs.append(str(torch / "lib"))
        extension.libraries.append("torch_cpu")
        extension.extra_compile_args.extend(flags(msvc))
        say(f"compiling the CPU library against {torch} (a minute at most, on most machines)")
        self.build_extension(extension)
        return None

    def build_cuda(self, extension, required: bool) -> str | None:
        """Builds the CUDA library; returns the reason if there is none to be built here."""
        if CPP in self.reasons:
            missing = f"its operators are declared in the C++ library: {self.reasons[CPP]}"
            if required:
                raise CompileError(missing)
            return f"not built: {missing}"
        torch = torch_directory()
        if not required and not torch_has_cuda(torch):
            return (
                "not built: the torch of the installation has no CUDA; install a CUDA build of "
                "torch, then install dgg again"
            )
        nvcc = find_nvcc()
        if nvcc is None:
            missing = (
                "nvcc was not found; install the CUDA toolkit or set CUDA_HOME, then install dgg "
                "again"
            )
            if required:
                raise CompileError(missing)
            return f"not built: {missing}"
        wanted, deadline = os.environ.get("TORCH_CUDA_ARCH_LIST") or None, None
        if not required:
            # Nobody has asked for it: it is built if that takes no time worth mentioning.
            deadline = time.monotonic() + PATIENCE
            wanted = wanted or local_architectures()
            if wanted is None:
                return (
                    "not built: there is no GPU here to build it for; set DGG_CUDA=1 to build it "
                    "for all, then install dgg again"
                )
        if self.compiler.compiler_type == "msvc":
            raise CompileError("the CUDA library is built with g++ or clang++, not with MSVC")
        listed = subprocess.run([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE, text=True)
        known = {int(number) for number in re.findall(r"sm_(\d+)\b", listed.stdout)}
        codes = code_options(wanted, known)

        folder = pathlib.Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        cores = os.cpu_count() or 1
        threads = max(1, cores // len(extension.sources))
        include = ["-I", str(torch / "include"), f"-D{TARGET[0]}={TARGET[1]}", "-DUSE_CUDA"]
        objects = [folder / f"{pathlib.Path(source).stem}.o" for source in extension.sources]

        limit = "" if required else f", {PATIENCE:.0f} s at most"
        say(
            f"compiling the CUDA library for {wanted or 'every architecture'}, {len(objects)} "
            f"files{limit}; DGG_CUDA=0 leaves it out"
        )
        begin, done = time.monotonic(), []

        def compile_one(source, target):
            # Only the operators, which are host code, see torch. Without a GPU to name, nvcc would
            # compile nothing for the oldest that it knows.
            own = [*include, codes[0]] if source.endswith("cuda.cu") else codes
            options = [*cuda_flags(), *own, f"--threads={threads}", "-c", source]
            spawn_with_reason([nvcc, *options, "-o", str(target)], deadline=deadline)
            done.append(source)
            seconds = time.monotonic() - begin
            say(f"{source} is compiled, {len(done)} of {len(objects)}, after {seconds:.0f} s")

        try:
            with concurrent.futures.ThreadPoolExecutor(min(cores, len(objects))) as pool:
                list(pool.map(compile_one, extension.sources, objects))
        except TimeoutError:
            return (
                f"not built: it takes more than {PATIENCE:.0f} s here; set DGG_CUDA=1 to wait for "
                "it, then install dgg again"
            )
        library = pathlib.Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        libraries = [torch / "lib"]
        if not (torch / "lib" / "libtorch_cuda.so").exists():
            # Built for a torch with CUDA on a machine without: name the library that will be there.
            libraries.append(folder)
            empty = folder / "empty.cpp"
            empty.write_text("")
            spawn_with_reason(
                [nvcc, "-shared", "-cudart=none", "-Xlinker=-soname,libtorch_cuda.so", str(empty),
                 "-o", str(folder / "libtorch_cuda.so")]
            )  # fmt: skip
        # CUDA's runtime comes along, so that it need not be the one that torch has. Without
        # -nodlink, which no kernel needs, so would code for the oldest GPU that nvcc knows.
        spawn_with_reason(
            [nvcc, "-shared", "-nodlink", "-cudart=static", *map(str, objects), "-o", str(library),
             "-Xlinker=--no-as-needed", *(f"-L{place}" for place in libraries), "-ltorch_cpu",
             "-ltorch_cuda"]
        )  # fmt: skip
        return None

    def get_export_symbols(self, ext):
        # Not a Python module: there is no PyInit function to export.
        return []


# Tests import this file for what the libraries are built with.
if __name__ == "__main__" and WHEEL not in ("", "binary", "pure"):
    raise SystemExit(f"DGG_WHEEL is {WHEEL!r}; it must be binary, pure or unset")
if __name__ == "__main__" and WHEEL == "pure":
    setup(cmdclass={"build_py": BuildPure})
elif __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                CPP,
                sources=[f"csrc/{name}.cpp" for name in CPU_SOURCES],
                depends=[
                    "csrc/arguments.h",
                    "csrc/cpu_arguments.h",
                    "csrc/cpu_chunks.h",
                    "csrc/cpu_loops.h",
                    "csrc/cpu_squares.h",
                    "csrc/cpu_updates.h",
                    "csrc/table.h",
                    "csrc/torch_inside.h",
                    "csrc/update.h",
                ],
                define_macros=[TARGET],
                language="c++",
                py_limited_api=True,
            ),
            Extension(
                CUDA,
                # The longest to compile first.
                sources=[
                    "csrc/cuda_guide.cu",
                    "csrc/cuda_adam.cu",
                    "csrc/cuda_sgd.cu",
                    "csrc/cuda_norms.cu",
                    "csrc/cuda_products.cu",
                    "csrc/cuda.cu",
                ],
                depends=[
                    "csrc/arguments.h",
                    "csrc/cuda_body.cuh",
                    "csrc/cuda_chunk.cuh",
                    "csrc/cuda_streams.cuh",
                    "csrc/cuda_update.cuh",
                    "csrc/table.h",
                    "csrc/update.h",
                ],
                language="c++",
                py_limited_api=True,
            ),
        ],
        cmdclass={"build_ext": BuildExtension},
        setup_requires=build_requirements(),
    )
