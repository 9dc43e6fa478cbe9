# SPDX-License-Identifier: BSD-3-Clause
"""Every way to install ends with the compiled library, or with one line that says what mends it.

Plan: (1) inside a clone, installed or not: kernels and library are found, else the import says so;
(2) steps on the reference that nobody asked for warn once, with the reason and the command;
(3) what is compiled against, also in pip's isolated build; (4) the CUDA library is built when asked
for or when it takes no time; (5) real installs, of which those that need an index are slow.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import types
import venv
import zipfile

import pytest
import setuptools
import torch

from dgg import backends
from dgg.backends import libraries

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Where torch is. The second may be the first.
SITE = [sysconfig.get_path("purelib"), str(pathlib.Path(torch.__file__).parents[1])]
NO_LIBRARY = backends.unavailable("cpp", torch.device("cpu"))
needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=f"no library: {NO_LIBRARY}")

STEPS = """
import warnings
with warnings.catch_warnings(record=True) as at_import:
    warnings.simplefilter("always")
    import dgg
import torch
with warnings.catch_warnings(record=True) as at_steps:
    warnings.simplefilter("always")
    for _ in range(2):
        p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
        opt = dgg.AdamW([p], OPTIONS); opt.step(); opt.step()
for name, heard in (("import", at_import), ("step", at_steps)):
    for w in heard:
        print(name, w.filename, w.message)
print("backend", opt.guidance_stats()["backend"])
"""


def clone_into(folder):
    """Copies what a clone has, and nothing of what was built in it."""
    clone = folder / "a clone"  # a place that a shell would take for two
    built = shutil.ignore_patterns("*.so", "_build_error*.txt", "__pycache__", "kernels")
    shutil.copytree(ROOT / "dgg", clone / "dgg", ignore=built)
    for name in ("kernels", "csrc", "requirements"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy2(ROOT / name, clone)
    return clone


@pytest.fixture
def clone(tmp_path):
    return clone_into(tmp_path)


def run(code, cwd, *, path=SITE, **variables):
    """Runs code in a directory, and there alone: no .pth file leads to an editable install."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    code = f"import sys; sys.path += {list(map(str, path))!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=cwd, env=env | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def said(code, cwd, **options):
    done = run(code, cwd, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def steps(cwd, options="", **others):
    """Returns what the import and two optimizers' steps say, and the backend."""
    *heard, backend = said(STEPS.replace("OPTIONS", options), cwd, **others)
    return heard, backend.removeprefix("backend ")


# -- (1) inside a clone ----------------------------------------------------------------------------


def test_a_clone_in_which_nothing_is_built_says_so_at_the_import(clone):
    heard, backend = steps(clone)
    (line,) = heard
    assert line.startswith("import <string> dgg has no compiled library")
    assert line.endswith(f"pip install -e '{clone}'")
    assert backend == "reference"


def test_a_clone_finds_its_own_kernels(clone):
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import importlib, dgg, dgg.kernels as kernels\n"
        "print(kernels.__file__); print(dgg.kernels is kernels)\n"
        "print(importlib.import_module('dgg.kernels.layout').__file__); print(dgg.show_config())"
    )
    expected = str(clone / "kernels")
    plain = said(code, clone)
    assert plain[:3] == [f"{expected}/__init__.py", "True", f"{expected}/layout.py"]
    assert f"dgg from {clone / 'dgg'}" in plain
    # An editable install of another clone does not mix its kernels in.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=env, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[:3] == plain[:3], done.stderr


def library_of(folder):
    """Puts the library of these tests into a folder."""
    (library,) = sorted(libraries.FOLDER.glob("_C.*so")) or [None]
    if library is None:
        pytest.skip("the library of these tests is not in the package but in build/")
    folder.mkdir(parents=True, exist_ok=True)
    return pathlib.Path(shutil.copy(library, folder))


@needs_library
def test_a_clone_takes_the_library_that_pip_has_left_there(clone):
    """As after `pip install .`: Python takes the folder, not the package that was installed."""
    library = library_of(clone / "build" / "lib.some-platform" / "dgg")
    assert steps(clone) == ([], "cpp")
    # Sources that came later, with a `git pull`.
    os.utime(library, (1, 1))
    heard, backend = steps(clone)
    assert len(heard) == 1 and "is older than csrc/" in heard[0] and "pip install -e" in heard[0]
    assert backend == "reference"


@needs_library
def test_a_clone_takes_the_library_of_an_editable_install(clone):
    library_of(clone / "dgg")
    assert steps(clone) == ([], "cpp")
    assert steps(clone.parent, path=[clone, *SITE]) == ([], "cpp")


def test_a_part_of_the_package_is_refused_at_the_import(clone):
    shutil.move(clone / "dgg", clone.parent / "dgg")
    done = run("import dgg", clone.parent)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and "dgg.kernels is missing" in last
    assert "pip install --force-reinstall --no-deps ." in last


# -- (2) steps on the reference --------------------------------------------------------------------


@pytest.fixture
def installed(clone):
    """A package as pip leaves it where the library could not be built."""
    site = clone.parent / "site"
    shutil.copytree(clone / "dgg", site / "dgg")
    shutil.copytree(clone / "kernels", site / "dgg" / "kernels")
    note = "no C++ compiler: g++ is not there; install one, then install dgg again\nline\nlast line"
    (site / "dgg" / "_build_error.txt").write_text(note)
    record = site / "dgg-0.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: dgg\nVersion: 0.1\n")
    (record / "direct_url.json").write_text(f'{{"url": "{clone.as_uri()}", "dir_info": {{}}}}')
    return site


def test_the_first_step_on_the_reference_warns_once(installed, clone):
    heard, backend = steps(installed)
    (line,) = heard
    assert line.startswith("step <string> steps on 'cpu' take the slow reference: ")
    command = f"pip install --force-reinstall --no-deps --no-cache-dir '{clone}'"
    assert f"g++ is not there; install one, then install dgg again: {command}. " in line
    assert "last line" not in line
    assert backend == "reference"
    (installed / "dgg-0.1.dist-info" / "direct_url.json").rename(clone / "moved.json")
    (line,), _ = steps(installed)
    options = "--force-reinstall --no-deps --no-cache-dir"
    assert f": pip install {options} . (in a clone of dgg). " in line
    (clone / "moved.json").rename(installed / "dgg-0.1.dist-info" / "direct_url.json")
    (installed / "dgg-0.1.dist-info" / "INSTALLER").write_text("uv\n")
    (line,), _ = steps(installed)
    assert f": uv {command.replace('install', 'install --no-build-isolation', 1)}. " in line
    # What the compiler said is not lost.
    config = said("import dgg; print(dgg.show_config())", installed)
    assert config[config.index("    line") + 1] == "    last line"


@pytest.mark.parametrize("options", ["backend='reference'", "fused=False", "foreach=False"])
def test_who_asks_for_the_reference_is_not_warned(installed, options):
    assert steps(installed, options) == ([], "reference")


def test_who_wanted_no_library_is_not_warned(installed):
    note = "not built: DGG_CPP=0 was set during installation; unset it, then install dgg again"
    (installed / "dgg" / "_build_error.txt").write_text(note)
    assert steps(installed) == ([], "reference")
    config = said("import dgg; print(dgg.show_config())", installed)
    assert [line for line in config if note in line]


@pytest.mark.parametrize(
    ("record", "source"),
    [
        ({"url": "file:///home/me/dgg", "dir_info": {}}, "/home/me/dgg"),
        ({"url": "file:///home/a%20b/dgg.tar.gz", "archive_info": {}}, "/home/a b/dgg.tar.gz"),
        ({"url": "https://host/dgg.tar.gz", "archive_info": {}}, "https://host/dgg.tar.gz"),
        (
            {"url": "https://host/dgg", "vcs_info": {"vcs": "git", "commit_id": "12ab"}},
            "git+https://host/dgg@12ab",
        ),
        # Nothing is built of a wheel, and an index' dgg may be somebody else's.
        ({"url": "file:///home/me/dgg-0.1-py3-none-any.whl", "archive_info": {}}, ""),
        ({}, ""),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="the paths are of POSIX")
def test_the_command_names_what_was_installed(record, source):
    assert libraries._origin(record) == source


def test_every_reason_of_a_build_says_what_to_do():
    """The package puts the command behind the first line."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert len(re.findall(r"then\s*(?:\"\s*\")?install dgg\s*(?:\"\s*f?\")?\s*again", text)) >= 8


# -- (3) what is compiled against ------------------------------------------------------------------


@pytest.fixture
def setup_file():
    spec = importlib.util.spec_from_file_location("dgg_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("dgg_setup", {str(ROOT / "setup.py")!r})
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)
"""


@pytest.fixture
def tools(tmp_path):
    """A folder with what builds, and without torch: as pip's isolated environment."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("setuptools", "packaging"):
        package = importlib.metadata.distribution(name)
        for part in {file.parts[0] for file in package.files if ".." not in file.parts}:
            if part != "__pycache__" and not part.endswith(".pth"):
                (folder / part).symlink_to(package.locate_file(part))
    return folder


def test_an_isolated_build_finds_the_torch_of_the_interpreter(tools):
    code = SETUP + "assert not importlib.util.find_spec('torch')\nprint(setup.torch_directory())"
    (found,) = said(code, tools, path=[tools], PYTHONPATH=str(tools), PYTHONNOUSERSITE="1")
    assert pathlib.Path(found).samefile(pathlib.Path(torch.__file__).parent)
    code = SETUP + "print(setup.build_requirements())"
    assert said(code, tools, path=[tools], DGG_TORCH="1") == ["[]"]


@pytest.mark.parametrize(("asked", "wanted"), [("", False), ("0", False), ("1", True)])
def test_torch_is_fetched_to_build_with_only_when_asked(clone, tools, asked, wanted):
    bare = clone.parent / "bare"
    venv.create(bare, with_pip=False)
    hook = "import setuptools.build_meta as hooks; print(hooks.get_requires_for_build_wheel())"
    done = subprocess.run(
        [bare / ("Scripts/python.exe" if os.name == "nt" else "bin/python"), "-c", hook],
        cwd=clone, env={**os.environ, "PYTHONPATH": str(tools), "DGG_TORCH": asked},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    requirements = done.stdout.splitlines()[-1]
    assert ("torch==" in requirements) is wanted, requirements


def test_the_torch_to_build_with_is_a_cpu_build_of_the_lock(setup_file):
    lock = (ROOT / "requirements" / "run.txt").read_text(encoding="utf-8")
    pinned, _, kind = setup_file.PINNED_TORCH.partition("+")
    assert f"\n{pinned}\n" in lock
    # On macOS there is no other.
    assert kind == ("" if sys.platform == "darwin" else "cpu")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("command", "files"),
    [
        ("demo", ["run"]), ("study", ["run"]), ("profile", ["run"]), ("bench-sharded", ["run"]),
        ("bench", ["run", "bench"]), ("test", ["run", "test", "deepspeed"]),
    ],
)  # fmt: skip
def test_a_command_installs_what_it_needs_and_nothing_else(tmp_path, command, files):
    done = subprocess.run(
        ["make", "-n", command, f"VENV={tmp_path / 'none'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    installed = re.findall(r" -r requirements/(\w+)\.txt$", done.stdout, re.M)
    assert installed == files, done.stdout


def test_a_torch_that_is_too_old_is_named(setup_file, tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\ncuda = None\n")
    monkeypatch.setattr(setup_file, "find_torch", lambda: tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"torch 2\.9\.1\+cpu is older than 2\.10; inst"):
        setup_file.torch_directory()
    (tmp_path / "version.py").write_text("__version__ = '2.10.0'\ncuda = None\n")
    assert setup_file.torch_directory() == tmp_path


# -- (4) CUDA --------------------------------------------------------------------------------------


@pytest.fixture
def cuda(setup_file, tmp_path, monkeypatch):
    """Returns a function that builds with a compiler that only writes down what it is told."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda = '13.0'\n")
    monkeypatch.setattr(setup_file, "find_torch", lambda: tmp_path)
    lines = []
    monkeypatch.setattr(setup_file, "say", lines.append)
    log = tmp_path / "log"

    def script(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def build(required=False, gpu="9.0", compiles="true"):
        nvcc = script("nvcc", f"""
            [ "$1" = --list-gpu-code ] && echo sm_80 sm_90 sm_100 && exit
            echo "$@" >> {log}
            {compiles}""")  # fmt: skip
        script("nvidia-smi", f"echo '{gpu}'")
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(setup_file, "find_nvcc", lambda: nvcc)
        builder = types.SimpleNamespace(
            reasons={}, compiler=types.SimpleNamespace(compiler_type="unix"),
            build_temp=str(tmp_path), get_ext_fullpath=lambda name: str(tmp_path / "out" / name),
        )  # fmt: skip
        sources = [f"csrc/cuda_{x}.cu" for x in ("adam", "sgd")]
        extension = setuptools.Extension(setup_file.CUDA, sources=sources)
        reason = setup_file.BuildExtension.build_cuda(builder, extension, required)
        return reason, log.read_text() if log.exists() else "", lines

    return build


@pytest.mark.skipif(os.name == "nt", reason="the compiler is a shell script")
class TestCuda:
    def test_unasked_it_is_built_for_the_gpus_of_this_machine(self, cuda):
        reason, log, lines = cuda()
        assert reason is None
        assert "sm_90" in log and "sm_80" not in log
        # Progress: what is compiled and for how long at most, then every file.
        assert "for 9.0, 2 files, 60 s at most; DGG_CUDA=0" in lines[0]
        assert [re.sub(r"csrc/cuda_\w+|\d+ s", "", x) for x in lines[1:]] == [
            ".cu is compiled, 1 of 2, after ", ".cu is compiled, 2 of 2, after ",
        ]  # fmt: skip

    def test_unasked_it_is_not_built_where_there_is_no_gpu(self, cuda):
        reason, log, lines = cuda(gpu="")
        assert "there is no GPU here" in reason and "DGG_CUDA=1" in reason
        assert not log and not lines

    def test_unasked_it_is_given_up_when_it_takes_long(self, cuda, setup_file, monkeypatch):
        monkeypatch.setattr(setup_file, "PATIENCE", 0.3)
        begin = time.monotonic()
        reason, *_ = cuda(compiles="sleep 100")
        assert time.monotonic() - begin < 50
        assert "it takes more than" in reason and "DGG_CUDA=1" in reason

    def test_asked_for_it_takes_its_time(self, cuda, setup_file, monkeypatch):
        monkeypatch.setattr(setup_file, "PATIENCE", 0.0)
        reason, log, lines = cuda(required=True, gpu="", compiles="sleep 0.2")
        assert reason is None
        assert "sm_80" in log and "sm_90" in log and "sm_100" in log
        assert "every architecture" in lines[0] and "at most" not in lines[0]

    def test_a_compiler_that_is_stopped_leaves_no_process_behind(self, setup_file, tmp_path):
        child = tmp_path / "child"
        command = ["/bin/sh", "-c", f"sleep 100 & echo $! > {child}; wait"]
        with pytest.raises(TimeoutError):
            setup_file.spawn_with_reason(command, deadline=time.monotonic() + 2)
        number = int(child.read_text())
        for _ in range(100):  # until somebody has taken note of its end
            try:
                os.kill(number, 0)
            except ProcessLookupError:
                break
            if (
                "Z"
                in subprocess.run(
                    ["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True
                ).stdout
            ):
                break
            time.sleep(0.1)
        else:
            os.kill(number, signal.SIGKILL)
            pytest.fail("the child of the compiler goes on")


# -- (5) real installs -----------------------------------------------------------------------------


def unpacked(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def has_compiler():
    return any(shutil.which(x) for x in ("c++", "g++", "clang++"))


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler, there is none")
def test_a_wheel_of_an_isolated_build_has_the_library(clone, tools):
    """As pip builds it, but with the tools that are installed here: torch is out of sight."""
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    env |= {
        "PYTHONPATH": str(tools),
        "DEBUG": "1",
        "DGG_CPP": "",
        "DGG_CUDA": "",
        "PYTHONNOUSERSITE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c",
         f"from setuptools import build_meta as hooks; hooks.build_wheel({str(clone.parent)!r})"],
        cwd=clone, env=env, capture_output=True, text=True, timeout=280, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dgg: compiling the CPU library against" in done.stderr
    (wheel,) = clone.parent.glob("dgg-*.whl")
    site = unpacked(wheel, clone.parent / "site")
    # Outside of the clone, and inside, where Python takes the folder.
    assert steps(clone.parent, path=[site, *SITE]) == ([], "cpp")
    assert steps(clone) == ([], "cpp")


def environment(folder):
    """An environment of its own, with pip, in which torch is installed."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    for old in pathlib.Path(place).glob("setuptools*"):  # which Python 3.11 brings along
        shutil.rmtree(old)
    # All that is installed here but dgg, which pip would take for the one to replace.
    others = folder / "others"
    others.mkdir()
    for entry in pathlib.Path(SITE[0]).iterdir():
        if (
            not re.match(r"dgg|__editable__|pip\b|__pycache__", entry.name)
            and entry.suffix != ".pth"
        ):
            (others / entry.name).symlink_to(entry)
    pathlib.Path(place, "others.pth").write_text(f"{others}\n")
    return python


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", ["plain", "editable", "without isolation", "sdist"])
def test_pip_install(clone, how):
    python = environment(clone.parent / "environment")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for name in ("DGG_CPP", "DGG_CUDA", "DGG_TORCH"):
        env.pop(name, None)

    def call(*arguments, cwd):
        return subprocess.run([python, *map(str, arguments)], cwd=cwd, env=env, text=True,
                              capture_output=True, timeout=600, start_new_session=True)  # fmt: skip

    source = {"editable": ["-e", "."], "without isolation": ["--no-build-isolation", "."]}
    what = source.get(how, ["."])
    if how == "sdist":
        done = call("-c", "from setuptools import build_meta as b; b.build_sdist('..')", cwd=clone)
        assert done.returncode == 0, done.stderr
        what = list(clone.parent.glob("dgg-*.tar.gz"))
    done = call("-m", "pip", "install", "--no-deps", *what, cwd=clone)
    if "Could not find a version that satisfies the requirement setuptools" in done.stderr:
        pytest.skip("pip's isolated build needs an index with setuptools, there is none")
    assert done.returncode == 0, done.stdout + done.stderr
    code = STEPS.replace("OPTIONS", "")
    for cwd in [clone.parent] + [clone] * (how != "sdist"):
        done = call("-c", code, cwd=cwd)
        assert done.stdout == "backend cpp\n", done.stdout + done.stderr
