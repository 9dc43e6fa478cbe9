# SPDX-License-Identifier: BSD-3-Clause
"""Builds the optional libraries dgg/_C*.so and dgg/_C_cuda*.so; the rest is in pyproject.toml.

They use the stable ABI of torch 2.10 and no Python API, so one file serves every later torch and
Python. Where one cannot be built the installation still succeeds: the reason goes to
dgg/_build_error.txt or dgg/_build_error_cuda.txt, and `dgg.show_config()` prints it.

Environment:
    DGG_CPP   0 skips the C++ library, 1 makes its failure fatal.
    DGG_CUDA  0 skips the CUDA library, 1 builds it whatever torch is installed and makes its
              failure fatal; unset, it is built for a CUDA build of torch if nvcc is found.
    CUDA_HOME  where nvcc is; else PATH, the usual place, and NVIDIA's Python packages are searched.
    TORCH_CUDA_ARCH_LIST  compute capabilities, as torch reads it: "8.0;9.0+PTX".
    DEBUG  1 builds without optimisation and with debug information.
"""

import concurrent.futures
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPP, CUDA = "dgg._C", "dgg._C_cuda"
ERROR_FILES = {CPP: "_build_error.txt", CUDA: "_build_error_cuda.txt"}
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
# Features newer than torch 2.10 are out of reach at compile time already.
TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")

ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
OLDEST = 80  # bfloat16 conversions
NAMED = {
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 12.0+PTX",
}


def torch_directory() -> pathlib.Path:
    """Returns the directory of torch without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "torch is not installed where the package was built; install it first, then "
            "`pip install --no-build-isolation` this package"
        )
    return pathlib.Path(spec.origin).parent


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
    text = (torch / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None


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


def spawn_with_reason(command: list[str], **_) -> None:
    """Runs a compiler so that what it complains about is not lost."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CompileError(f"no C++ compiler: {error}") from error
    sys.stderr.write(done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise CompileError(f"{command[0]} failed with exit code {done.returncode}:\n{tail}")


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
            print(f"dgg: continuing without {name} ({reason})", file=sys.stderr)

    def build_extensions(self):
        for extension in list(self.extensions):
            build, switch = {
                CPP: (self.build_cpp, "DGG_CPP"),
                CUDA: (self.build_cuda, "DGG_CUDA"),
            }[extension.name]
            wanted = os.environ.get(switch, "")
            if wanted == "0":
                reason = f"not built: {switch}=0 was set during installation"
            else:
                try:
                    reason = build(extension, wanted == "1")
                except Exception as error:
                    if wanted == "1":
                        raise
                    reason = f"{type(error).__name__}: {error}"
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
            return "not built: the torch of the installation has no CUDA (DGG_CUDA=1 builds anyway)"
        nvcc = find_nvcc()
        if nvcc is None:
            missing = "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
            if required:
                raise CompileError(missing)
            return f"not built: {missing}"
        if self.compiler.compiler_type == "msvc":
            raise CompileError("the CUDA library is built with g++ or clang++, not with MSVC")
        listed = subprocess.run([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE, text=True)
        known = {int(number) for number in re.findall(r"sm_(\d+)\b", listed.stdout)}
        codes = code_options(os.environ.get("TORCH_CUDA_ARCH_LIST") or None, known)

        folder = pathlib.Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        cores = os.cpu_count() or 1
        threads = max(1, cores // len(extension.sources))
        include = ["-I", str(torch / "include"), f"-D{TARGET[0]}={TARGET[1]}", "-DUSE_CUDA"]
        objects = [folder / f"{pathlib.Path(source).stem}.o" for source in extension.sources]

        def compile_one(source, target):
            # Only the operators, which are host code, see torch. Without a GPU to name, nvcc would
            # compile nothing for the oldest that it knows.
            own = [*include, codes[0]] if source.endswith("cuda.cu") else codes
            spawn_with_reason(
                [nvcc, *cuda_flags(), *own, f"--threads={threads}", "-c", source, "-o", str(target)]
            )

        with concurrent.futures.ThreadPoolExecutor(min(cores, len(objects))) as pool:
            list(pool.map(compile_one, extension.sources, objects))
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
if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                CPP,
                sources=["csrc/ops.cpp", "csrc/cpu.cpp", "csrc/cpu_lists.cpp", "csrc/watch.cpp"],
                depends=[
                    "csrc/cpu_arguments.h",
                    "csrc/cpu_chunks.h",
                    "csrc/cpu_loops.h",
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
                    "csrc/cuda_adam.cu",
                    "csrc/cuda_sgd.cu",
                    "csrc/cuda_norms.cu",
                    "csrc/cuda_guide.cu",
                    "csrc/cuda.cu",
                ],
                depends=[
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
    )
