# SPDX-License-Identifier: BSD-3-Clause
"""What is released: the version, the archive of sources, the two wheels, the files around them.

Plan: (1) version, changelog and tag agree, and so do the pins of the workflow; (2) the archive of
sources is whole; (3) the pure wheel, and what it says at the first step; (4) what a wheel is
refused for; (5) other compilers; (6) slow: all of `make wheel`. `make wheel-test` tries wheels
beside other releases of torch and Python.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest
import torch
import yaml
from packaging.version import Version

import wheels
from test_install import clone, has_compiler, said, setup_file, steps  # noqa: F401
from test_layout import NO_TERMINAL

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = [pathlib.Path(sys.executable).parent / name for name in ("twine", "abi3audit")]


def hook(call, cwd, **variables):
    """Calls a build hook of setuptools, as pip does, in a directory."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DGG_")}
    return subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{call}"],
        cwd=cwd, env=env | variables, capture_output=True, text=True, timeout=240, **NO_TERMINAL,
    )  # fmt: skip


# -- (1) what must agree ---------------------------------------------------------------------------


def test_a_version_that_is_no_development_has_its_section_in_the_changelog():
    version, text = Version(wheels.version()), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert sections[0] == "Unreleased"
    released = [Version(section) for section in sections[1:]]
    assert released == sorted(released, reverse=True)
    if version.is_devrelease:
        assert version not in released and all(version > each for each in released)
    else:
        assert released[0] == version


@pytest.mark.parametrize("tag", ["v0.1.0", "0.1.0.dev0", "v9.9.9", "v0.1.0.dev0"])
def test_a_tag_that_is_not_the_version_is_refused(tag, monkeypatch):
    monkeypatch.setattr(wheels, "version", lambda: "0.1.0.dev0")
    with pytest.raises(SystemExit, match=re.escape(tag)):
        wheels.check_tag(tag)


def test_a_tag_needs_the_changelog_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "version", lambda: "1.2.0")
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    with pytest.raises(SystemExit, match=r"no section for 1\.2\.0"):
        wheels.check_tag("v1.2.0")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.0] - 2030-01-01\n")
    wheels.check_tag("v1.2.0")


def test_the_workflow_takes_what_the_lock_has(setup_file):  # noqa: F811
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    lock = (ROOT / "requirements" / "wheel.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lock if line and not line.startswith(("#", "-r"))]
    assert all(re.match(r"[\w.-]+==[\w.]+($|; )", pin) for pin in pins)
    for name, version in re.findall(r"\b(abi3audit|twine)==([\d.]+)", text):
        assert f"{name}=={version}" in pins
    torches = set(re.findall(r"torch==[\d.]+(?:\+cpu)?", text))
    plain = setup_file.PINNED_TORCH.removesuffix("+cpu")
    assert torches == {plain, f"{plain}+cpu"}
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["upload"]["permissions"] == {"id-token": "write"}
    assert sorted(jobs["upload"]["needs"]) == ["sources", "wheels"]
    for name in ("libtorch*", "libc10*"):
        assert f'--exclude "{name}.so*"' in text and name in wheels.NOT_BUNDLED


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = citation["references"]
    reference = (ROOT / "dgg" / "reference" / "__init__.py").read_text(encoding="utf-8")
    assert f'"{paper["title"]}"' in reference and "arXiv 2511.15164" in reference
    assert paper["url"].endswith("/2511.15164")
    assert citation["license"] == "BSD-3-Clause"


def test_what_is_tried_is_there():
    assert not [name for name in wheels.CORE if not (ROOT / "tests" / name).exists()]
    assert "dgg.AdamW(" in wheels.readme_example()


# -- (2) the archive of sources --------------------------------------------------------------------


def test_the_archive_of_sources_has_all_that_builds_and_tests(tmp_path):
    """Of the files under version control all but those of the repository itself."""
    listing = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    tracked = [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    if not tracked:
        pytest.skip("no repository: its files cannot be told from others")
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "tree" / name)
    done = hook(f"build_sdist({str(tmp_path)!r})", tmp_path / "tree")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("dgg-*.tar.gz")
    assert archive.stat().st_size < wheels.LIMIT
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    missing = set(tracked) - names
    assert not [name for name in missing if not name.startswith((".ci/", ".git", ".pre-commit"))]
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


# -- (3) the pure wheel ----------------------------------------------------------------------------


def test_the_pure_wheel_is_for_every_platform_and_says_what_to_do(clone):  # noqa: F811
    done = hook(f"build_wheel({str(clone.parent)!r})", clone, DGG_WHEEL="pure")
    assert done.returncode == 0, done.stderr
    (wheel,) = clone.parent.glob("*.whl")
    assert wheel.name == f"dgg-{wheels.version()}-py3-none-any.whl"
    assert wheels.check_wheel(wheel) == ["no library"]
    site = clone.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (record,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: true" in archive.read(record).decode()
    heard, backend = steps(site)
    (line,) = heard
    assert backend == "reference"
    assert line.startswith("step <string> steps on 'cpu' take the slow reference: ")
    assert ": this wheel, the one for every platform, has no compiled library; " in line
    assert "see that there is a C++ compiler, then install dgg again from its sources: " in line
    # The wheel itself would bring the same again.
    assert "pip install --force-reinstall --no-deps --no-cache-dir . (in a clone of dgg)" in line
    config = said("import dgg; print(dgg.show_config())", site)
    assert [text for text in config if "has no compiled library" in text]


# -- (4) what a wheel is refused for ---------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="the compiler is a command of POSIX")
def test_a_binary_wheel_is_never_one_without_its_library(clone):  # noqa: F811
    call = f"build_wheel({str(clone.parent)!r})"
    done = hook(call, clone, DGG_WHEEL="binary", CC="/bin/false", CXX="/bin/false")
    assert done.returncode != 0 and not list(clone.parent.glob("*.whl"))
    done = hook(call, clone, DGG_WHEEL="fast")
    assert "DGG_WHEEL is 'fast'; it must be binary, pure or unset" in done.stderr


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("dgg-1-py3-none-any.whl", ["dgg/_C.abi3.so", "dgg/_build_error.txt"], "every platform"),
        ("dgg-1-py3-none-any.whl", ["dgg/a.py"], "every platform"),
        ("dgg-1-cp310-abi3-win_amd64.whl", ["dgg/a.py"], "was to be in it"),
        ("dgg-1-cp311-cp311-win_amd64.whl", ["dgg/_C.pyd"], "was to be in it"),
        ("dgg-1-cp310-abi3-win_amd64.whl", ["dgg/_C.pyd", "dgg/_C_cuda.pyd"], "was to be in it"),
        ("dgg-1-cp310-abi3-win_amd64.whl", ["dgg/_C.pyd", "dgg.libs/libc10.so"], r"libc10\.so"),
        ("dgg-1-cp310-abi3-win_amd64.whl", ["dgg/_C.pyd", "tests/cases.py"], r"cases\.py"),
    ],
)
def test_a_wheel_that_is_not_what_its_name_says_is_refused(tmp_path, name, files, said):  # noqa: F811
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for file in files:
            archive.writestr(file, "x")
    with pytest.raises(SystemExit, match=said):
        wheels.check_wheel(tmp_path / name)


# -- (5) other compilers ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++ here")
def test_the_sources_compile_with_clang(setup_file):  # noqa: F811
    flags = [*setup_file.flags(msvc=False), f"-D{'='.join(setup_file.TARGET)}"]
    include = pathlib.Path(torch.__file__).parent / "include"
    for name in setup_file.CPU_SOURCES:
        done = subprocess.run(
            ["clang++", "-fsyntax-only", *flags, "-isystem", include, ROOT / f"csrc/{name}.cpp"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "warning:" not in done.stderr, done.stderr


def test_no_source_needs_an_extension_that_msvc_lacks_unguarded():
    """What MSVC does not know stands behind a look at the compiler."""
    unknown = re.compile(r"__attribute__|__builtin_|\b__restrict__|\basm\b")
    with_them = {
        path.name
        for path in (ROOT / "csrc").glob("*")
        if path.suffix in {".h", ".cpp"} and unknown.search(path.read_text(encoding="utf-8"))
    }
    for name in with_them:
        text = (ROOT / "csrc" / name).read_text(encoding="utf-8")
        assert re.search(r"_MSC_VER|_WIN32|__GNUC__", text), name


# Put before a source: what the system's and torch's headers need is done, and from here on the
# compiler passes for MSVC, which knows none of GCC's own words.
AS_MSVC = """
#undef __GNUC__
#undef __clang__
#undef __x86_64__
#undef __linux__
#define _WIN32 1
#define _MSC_VER 1940
#define __forceinline inline
#define __declspec(what)
#define __attribute__(what) a word of GCC
#pragma GCC poison __builtin_prefetch __builtin_cpu_init __builtin_cpu_supports __builtin_cpu_is
#pragma GCC poison __restrict__ __int128 ssize_t dlopen dlsym dladdr
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler, there is none")
def test_what_msvc_takes_of_the_sources_is_standard_cpp(setup_file, tmp_path):  # noqa: F811
    """Not a proof that MSVC compiles them: its headers and its errors are its own."""
    compiler = next(filter(shutil.which, ("clang++", "g++", "c++")))
    headers = {
        line
        for path in (ROOT / "csrc").glob("*")
        if path.suffix in {".h", ".cpp"}
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"#include <(?!dlfcn|cpuid|immintrin)", line)
    }
    include = pathlib.Path(torch.__file__).parent / "include"
    command = [
        compiler, "-std=c++17", "-fsyntax-only", "-pedantic-errors", "-Wall", "-Werror",
        f"-D{'='.join(setup_file.TARGET)}", "-isystem", include,
    ]  # fmt: skip
    for name in setup_file.CPU_SOURCES:
        source = tmp_path / f"{name}.cpp"
        lines = [*sorted(headers), AS_MSVC, f'#include "{ROOT / "csrc" / name}.cpp"', ""]
        source.write_text("\n".join(lines), encoding="utf-8")
        done = subprocess.run([*command, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# -- (6) all of it ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not all(map(pathlib.Path.exists, TOOLS)), reason="make wheel installs its tools"
)
def test_make_wheel_builds_three_files_that_pass_and_work(tmp_path):
    kinds = ("sdist", "binary", "pure")
    files = wheels.build(tmp_path / "dist", kinds)
    rows = wheels.check(files)
    assert len(rows) == 4
    names = sorted(path.name for path in files)
    assert [name for name in names if name.endswith(".tar.gz")]
    assert [name for name in names if "-cp310-abi3-" in name]
    arguments = types.SimpleNamespace(
        dist=tmp_path / "dist", wheel="both", torch=["installed"], cuda=False, tests=wheels.CORE,
        python=[pathlib.Path(sys.executable)],
    )  # fmt: skip
    cells = wheels.test(arguments)
    assert [cell.wheel for cell in cells] == ["binary", "pure"]
    assert all(re.match(r"\d\d+ passed", cell.result) for cell in cells), cells
