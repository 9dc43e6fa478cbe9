# SPDX-License-Identifier: BSD-3-Clause
"""Type checkers understand the package, and find a user's usual mistakes.

They see the package as it is installed, with the kernels inside. `make types` runs all of this;
pyright brings a Node.js along and is no requirement of the other tests.
"""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
import pydoc
import re
import shutil
import subprocess
import sys
import typing

import pytest

import dgg
from dgg import _arguments, _literals, backends, reference
from dgg.anchor import merge

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "tests" / "typed").glob("*.py"))
CHECKERS = ["mypy", pytest.param("pyright", marks=pytest.mark.slow)]
# Line and message of an error, as both print it.
ERROR = re.compile(r"^\s*(\S+?):(\d+)(?::\d+)?:? (?:- )?error: (.*)$", re.M)


def need(checker):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed; `make types` installs it")


def lay_out(folder):
    """Makes a copy of the package as it is installed, with the scripts beside it."""
    sources = shutil.ignore_patterns("*.so", "*.txt", "__pycache__")
    shutil.copytree(ROOT / "dgg", folder / "dgg", ignore=sources)
    shutil.copytree(ROOT / "kernels", folder / "dgg" / "kernels", ignore=sources)
    for path in (*SCRIPTS, ROOT / "pyproject.toml"):
        shutil.copy(path, folder)


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """Returns a function: checker → {file: {line: message}}, computed once."""
    known = {}

    def of(checker):
        need(checker)
        if checker not in known:
            folder = tmp_path_factory.mktemp(checker)
            lay_out(folder)
            command = {
                "mypy": [sys.executable, "-P", "-m", "mypy", "--no-error-summary"],
                "pyright": [sys.executable, "-P", "-m", "pyright", "--pythonpath", sys.executable],
            }[checker]
            done = subprocess.run(
                [*command, "dgg", *(path.name for path in SCRIPTS)],
                cwd=folder, capture_output=True, text=True, timeout=280,
            )  # fmt: skip
            # 0: nothing found, 1: something; anything else is a failure of the checker's own.
            assert done.returncode in (0, 1), done.stdout + done.stderr
            found = {}
            for name, line, message in ERROR.findall(done.stdout):
                path = pathlib.Path(name)
                name = path.relative_to(folder) if path.is_absolute() else path
                found.setdefault(name.as_posix(), {})[int(line)] = message
            assert found or done.returncode == 0, done.stdout + done.stderr
            known[checker] = found
        return known[checker]

    return of


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_package_is_clean(checker, complaints):
    found = complaints(checker)
    ours = {name: of_file for name, of_file in found.items() if name.startswith("dgg/")}
    lines = [f"{name}:{line}: {text}" for name, x in ours.items() for line, text in x.items()]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_right_script_is_clean(checker, complaints):
    assert complaints(checker).get("right.py", {}) == {}


@pytest.mark.parametrize("checker", CHECKERS)
def test_every_mistake_is_found(checker, complaints):
    text = (ROOT / "tests" / "typed" / "wrong.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert len(marked) > 20
    found = complaints(checker)["wrong.py"]
    missed = [lines[number - 1].strip() for number in sorted(marked - found.keys())]
    more = {number: found[number] for number in found.keys() - marked}
    assert not missed, "\n".join(missed)
    assert not more, more


@pytest.mark.slow
def test_a_right_script_is_clean_where_mypy_is_strict(tmp_path):
    """As in the project of a user who checks strictly, and sees no errors of packages."""
    need("mypy")
    lay_out(tmp_path)
    command = ["-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "right.py"]
    done = subprocess.run(
        [sys.executable, "-P", *command], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_literal_types_are_the_values_that_are_taken():
    for literal, values in (
        (_literals.Backend, backends.BACKENDS),
        (_literals.Route, reference.ROUTES),
        (_literals.MergeRule, merge.RULES),
        (_literals.NormScope, _arguments._CHOICES["norm_scope"]),
        (_literals.Granularity, _arguments._CHOICES["granularity"]),
    ):
        assert typing.get_args(literal) == values
    texts = [x for x in typing.get_args(_literals.Alpha) if typing.get_origin(x) is typing.Literal]
    assert [typing.get_args(x) for x in texts] == [(_arguments.AUTO,)]


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD, dgg.Guidance, dgg.ReplayBuffer])
def test_types_can_be_read_at_run_time(cls):
    hints = typing.get_type_hints(cls.__init__)
    assert {"seed", "return"} <= hints.keys()


@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.Adam, dgg.SGD, dgg.Guidance])
def test_help_has_an_argument_per_line(cls):
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    head, body = text.split("Args:", 1)
    signature = [line.removeprefix(" |      ") for line in head.splitlines()]
    for line in (
        "alpha: Alpha = 0.2,",
        "granularity: Granularity = 'step',",
        "max_grad_norm: float | None = None,",
        "process_group: ProcessGroup | None = None,",
    ):
        assert line in signature
    assert not re.search(r": '|-> '", head), "types stand in quotation marks"
    assert max(map(len, head.splitlines())) < 100
    # The arguments are described in the order in which they are taken.
    parameters = [name for name in inspect.signature(cls).parameters]
    described = re.findall(r"^ \|      (\w+): ", body.split("Raises:")[0], re.M)
    described = [name for name in described if name in parameters]
    assert described == [name for name in parameters if name in described]
    assert len(described) == len(parameters) or "those of `AdamW`" in head


def test_signatures_that_help_prints_are_those_of_calls():
    for function in (dgg.AdamW.step, dgg.AdamW.set_anchor, dgg.AdamW.__init__, dgg.unwrap):
        shown, plain = inspect.signature(function), inspect.Signature.from_callable(function)
        assert shown.parameters == plain.parameters
    assert str(inspect.signature(dgg.AdamW.step)) == (
        "(self, closure: Callable[[], Any] | None = None) -> Any"
    )

    class Mine(dgg.SGD):
        def __init__(self, params):
            super().__init__(params)

    assert list(inspect.signature(Mine).parameters) == ["params"]
