# SPDX-License-Identifier: BSD-3-Clause
"""Every script of examples/ runs as its first line says, and guidance forgets less in it.

Seeds are fixed. The scripts are in the source distribution, and examples/README.md lists them.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tarfile

import pytest

from test_layout import copy_of_the_tree

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LIMIT = 200  # seconds; each takes 2 to 15 of them on a machine that does nothing else

# What is trained, by script: a row of its table without guidance and one with it for each.
TRAINED = {
    "two_tasks.py": [""],
    "any_optimizer.py": ["Muon", "Lion"],  # and schedule-free, for which there is a test below
    "peft_lora.py": [""],
    "lightning_module.py": [""],
    "fsdp2.py": [""],
    "deepspeed_zero2.py": [""],
}
NEEDS = {
    "peft_lora.py": ["transformers", "accelerate", "peft"],
    "lightning_module.py": ["pytorch_lightning"],
    "deepspeed_zero2.py": ["deepspeed"],
}
SLOW = {"peft_lora.py", "deepspeed_zero2.py"}  # for their imports, more than 20 seconds at times
PROCESSES = {"fsdp2.py", "deepspeed_zero2.py"}


def command(name):
    """The first line of the script's docstring."""
    script = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
    return ast.get_docstring(script).splitlines()[0]


def skip_without(libraries):
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


@functools.cache  # two tests look at some of them
def table_of(name):
    """{(what is trained, "plain" or "guided"): [learnt, kept, new, forgot]} as printed."""
    env = dict(
        os.environ,
        # This environment's python and torchrun.
        PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        # Other tests run at the same time; threads of one process would wait for each other.
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        HF_HUB_OFFLINE="1",
    )
    with subprocess.Popen(
        shlex.split(command(name)), cwd=ROOT, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun and its processes
            raise
    assert process.returncode == 0, out + err
    row = r"^(|\S+ +)(plain|guided) +(\d+) % +(\d+) % +(\d+) % +(-?\d+) points$"
    rows = re.findall(row, out, re.M)
    found = {(what.strip(), kind): [*map(int, numbers)] for what, kind, *numbers in rows}
    assert len(found) == len(rows) >= 2, out
    return found


def assert_guidance_forgets_less(table, what):
    plain, guided = table[what, "plain"], table[what, "guided"]
    for learnt, kept, new, forgot in (plain, guided):
        assert abs(learnt - kept - forgot) <= 1, "each is rounded"
        # Both tasks are learnt: there are four classes.
        assert learnt > 60 and new > 50
    assert plain[0] == guided[0], "the first task is not guided"
    assert plain[3] > 20, "without guidance the tasks disturb each other"
    assert guided[3] < plain[3] - 5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name in SLOW) + [pytest.mark.dist] * (name in PROCESSES),
        )
        for name in TRAINED
    ],
)
def test_guidance_forgets_less(name):
    skip_without(NEEDS.get(name, []))
    table = table_of(name)
    expected = {(what, kind) for what in TRAINED[name] for kind in ("plain", "guided")}
    assert {key for key in table if key[0] != "schedule-free"} == expected
    for what in TRAINED[name]:
        assert_guidance_forgets_less(table, what)


def test_schedule_free_is_guided():
    skip_without(["schedulefree"])
    assert_guidance_forgets_less(table_of("any_optimizer.py"), "schedule-free")


@pytest.mark.dist
def test_sharding_changes_nothing():
    """The same seeds draw the same weights and the same rows in both scripts."""
    alone, sharded = table_of("two_tasks.py"), table_of("fsdp2.py")
    for key, numbers in alone.items():
        # Sums over ranks round otherwise, so single points of 2000 may change sides.
        assert sharded[key] == pytest.approx(numbers, abs=2), key


def test_the_page_lists_every_script_with_its_command():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\) \|.*\| `([^`]+)` \|$", page, re.M)
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert sorted(TRAINED) == scripts
    assert sorted(rows) == [(name, name, command(name)) for name in scripts]


def test_the_page_prints_what_the_first_script_does():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for (_, kind), numbers in table_of("two_tasks.py").items():
        (printed,) = re.findall(rf"^{kind} .*$", page, re.M)
        # Another processor rounds otherwise.
        found = [*map(int, re.findall(r"\d+", printed))]
        assert found == pytest.approx(numbers, abs=3), kind


@pytest.mark.parametrize("name", TRAINED)
def test_examples_are_short_and_hide_no_library(name):
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 60
    # Python puts the folder of a script first on the path of its imports.
    stem = name.removesuffix(".py")
    assert stem not in {"lightning", *(library for needed in NEEDS.values() for library in needed)}
    assert importlib.util.find_spec(stem) is None


def test_they_are_in_the_source_distribution(tmp_path):
    """test_layout.py sees to it that they are not in the wheel."""
    done = subprocess.run(
        [
            sys.executable, "-c",
            f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})",
        ],
        cwd=copy_of_the_tree(tmp_path), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("dgg-*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {f"examples/{name}" for name in (*TRAINED, "README.md")} <= names
