# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing: changes the package line by line and asks the tests whether they notice.

    make mutate                                # every target below, one process
    make mutate ARGS="reference"               # one of them
    make mutate ARGS="reference --keep"        # leaves build/mutate/reference for a closer look

mutmut makes the mutants and finds the tests that reach each function; `mutant_session.py` runs them
for each of its mutants. A survivor is a line that no test needs: either a test is missing, or the
mutant does what the original did, and then `docs/mutation_testing.md` says why. What is neither
fails the run.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / "docs" / "mutation_testing.md"
# The mutated file of dgg/ and its fastest tests that say all about it. More would not find more:
# what these do not notice is looked at, line by line.
TARGETS = {
    "_philox": ["test_philox.py"],
    "reference/measures": ["test_reference.py", "test_guard.py"],
    "reference/updates": ["test_reference.py", "test_guard.py"],
    "anchor/importance": ["test_importance.py"],
    "anchor/merge": ["test_merge.py"],
    "anchor/boundary": ["test_boundary.py"],
    "checkpoint/saved_state": ["test_saved_state.py"],
    "checkpoint/load": ["test_world_of_one.py", "test_loading.py"],
    "checkpoint/room": ["test_world_of_one.py", "test_loading.py"],
}
# Tests among them that start processes or write a gigabyte, and say nothing more.
SLOW = "scripts_of or library_that or whole_model or shards_read or one_anchor_however"
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"not ({SLOW})"]

SECTION = """
[tool.mutmut]
source_paths = ["dgg"]
only_mutate = ["dgg/{name}.py"]
also_copy = ["dgg", "tests"]
pytest_add_cli_args = {options}
pytest_add_cli_args_test_selection = {tests}
# torch has threads, which a fork does not take along.
process_isolation = "forkserver"
"""


class Mutant(NamedTuple):
    """A change that mutmut made."""

    function: str
    removed: str
    added: str

    def __str__(self):
        return "\n".join([f"{self.function}:", f"-{self.removed}", f"+{self.added}"])


def prepare(name: str) -> pathlib.Path:
    """Copies what the tests of a target need, in the layout of the installed package."""
    folder = ROOT / "build" / "mutate" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    without = shutil.ignore_patterns("__pycache__", "kernels", "_build_error*.txt")
    shutil.copytree(ROOT / "dgg", folder / "dgg", ignore=without)
    shutil.copytree(ROOT / "kernels", folder / "dgg" / "kernels", ignore=without)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=without)
    source = folder / "dgg" / f"{name}.py"
    source.write_text(undecorated(source.read_text()))
    tests = json.dumps([f"tests/{test}" for test in TARGETS[name]])
    section = SECTION.format(name=name, tests=tests, options=json.dumps(OPTIONS))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + section)
    return folder


def undecorated(source: str) -> str:
    """Applies decorators after the function instead of on it: mutmut leaves out what has any."""
    lines = source.splitlines()
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and node.decorator_list
        and ast.unparse(node.decorator_list[0]) not in ("property", "staticmethod", "classmethod")
        and not ast.unparse(node.decorator_list[0]).endswith(".setter")
    ]
    for node in sorted(found, key=lambda node: -node.lineno):
        indent = " " * node.col_offset
        applied = node.name
        for decorator in reversed(node.decorator_list):
            applied = f"{ast.unparse(decorator)}({applied})"
        lines.insert(node.end_lineno, f"{indent}{node.name} = {applied}")
        first = min(decorator.lineno for decorator in node.decorator_list)
        del lines[first - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def python(folder: pathlib.Path, *arguments: str) -> str:
    """Runs Python in a folder; returns what it has written."""
    # One thread: as many as there are cores would wait for each other on tensors this small.
    env = dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed in {folder}\n{done.stdout or ''}")
    return done.stdout or ""


def functions(folder: pathlib.Path, name: str) -> dict[str, list[str]]:
    """Returns the lines of every mutant, and of every original, by the name of the function."""
    source = (folder / "mutants" / "dgg" / f"{name}.py").read_text()
    lines = source.splitlines()
    return {
        node.name: [
            line.replace(node.name, "function") for line in lines[node.lineno - 1 : node.end_lineno]
        ]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and "__mutmut_" in node.name
    }


def mutant_of(key: str, lines: dict[str, list[str]]) -> Mutant:
    """Returns the change of a mutant by mutmut's name of it."""
    _, module, mutant = key.rsplit(".", 2)
    function = mutant.rpartition("__mutmut_")[0]
    changes = list(
        difflib.unified_diff(lines[f"{function}__mutmut_orig"], lines[mutant], lineterm="", n=0)
    )[2:]  # the names of files, which have none
    removed, added = (
        " ".join(line[1:].strip() for line in changes if line.startswith(sign)) for sign in "-+"
    )
    function = re.sub(r"^xǁ(\w+)ǁ", r"\1.", function)
    return Mutant(f"{module}.{function.removeprefix('x_')}", removed, added)


def explanations() -> dict[Mutant, str]:
    """Returns the explained mutants of the docs: a heading, a diff block each, the reason below."""
    found: dict[Mutant, str] = {}
    function, waiting, removed, added, inside = "", [], [], [], False
    for line in EXPLAINED.read_text().splitlines():
        if line.startswith("### `"):
            function, waiting = line.split("`")[1], []
        elif line in ("```diff", "```text"):
            inside, removed, added = True, [], []
        elif line == "```" and inside:
            inside = False
            waiting.append(Mutant(function, " ".join(removed), " ".join(added)))
        elif inside:
            (removed if line.startswith("-") else added).append(line[1:].strip())
        elif line and waiting:
            found.update(dict.fromkeys(waiting, line))
            waiting = []
    return found


class _Unworded(ast.NodeTransformer):
    """Empties the text of everything that is raised or warned of."""

    def __init__(self):
        self.inside = False

    def visit(self, node):
        before = self.inside
        if isinstance(node, ast.Raise):
            self.inside = True
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warn"):
            self.inside = True
        elif self.inside and isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.Constant("")
        elif self.inside and isinstance(node, ast.JoinedStr):
            node.values = [v for v in node.values if not isinstance(v, ast.Constant)]
        made = self.generic_visit(node)
        self.inside = before
        return made


def wording(folder: pathlib.Path, name: str) -> set[str]:
    """Returns the mutants that change the text of an error or a warning and nothing else."""
    tree = ast.parse((folder / "mutants" / "dgg" / f"{name}.py").read_text())
    bodies = {
        node.name: [ast.unparse(_Unworded().visit(x)) for x in (*node.args.defaults, *node.body)]
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "__mutmut_" in node.name
    }
    found = set()
    for key in mutants(folder, name):
        mutant = key.rpartition(".")[2]
        original = mutant.rpartition("__mutmut_")[0] + "__mutmut_orig"
        if bodies[mutant] == bodies[original]:
            found.add(key)
    return found


def mutants(folder: pathlib.Path, name: str) -> list[str]:
    """Returns mutmut's names of all mutants that it has made."""
    meta = (folder / "mutants" / "dgg" / f"{name}.py.meta").read_text()
    return list(json.loads(meta)["exit_code_by_key"])


def verdicts(folder: pathlib.Path, name: str, tested: list[str]) -> dict[str, str]:
    """Returns of every mutant whether it was killed, is alive, or became too slow."""
    given, found = folder / "tested.json", folder / "verdicts.json"
    given.write_text(json.dumps(tested))
    files = [f"tests/{test}" for test in TARGETS[name]]
    session = str(ROOT / "tests" / "mutant_session.py")
    python(folder / "mutants", "-P", session, str(given), str(found), "--", *OPTIONS, *files)
    return json.loads(found.read_text())


def run(name: str, explained: dict[Mutant, str], *, keep: bool) -> list[Mutant]:
    """Tests one file, prints its line of the table, and returns what nobody has explained."""
    began = time.monotonic()
    folder = prepare(name)
    # Mutants are made by a run, here of one of each function.
    python(folder, "-m", "mutmut", "run", "--max-children", "1", "*__mutmut_1")
    left_out = wording(folder, name)
    tested = [key for key in mutants(folder, name) if key not in left_out]
    found = verdicts(folder, name, tested)
    lines = functions(folder, name)
    alive = [mutant_of(key, lines) for key in tested if found[key] == "alive"]
    slow = sum(verdict == "slow" for verdict in found.values())
    known = [m for m in alive if m in explained]
    open_ones = [m for m in alive if m not in explained]
    print(
        f"{name:<22} {len(tested):>5} mutants, {len(left_out)} of wording apart:"
        f" {len(tested) - len(alive)} killed (of these by time {slow}),"
        f" {len(known)} explained, {len(open_ones)} open; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    module = f"{pathlib.Path(name).name}."
    for mutant in explained:
        if mutant.function.startswith(module) and mutant not in known:
            print(f"explained, but gone or killed: {mutant}")
    for mutant in open_ones:
        print(f"OPEN {mutant}")
    if not keep:
        shutil.rmtree(folder)
    return open_ones


def main() -> None:
    """Runs the targets named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; none for all")
    parser.add_argument("--keep", action="store_true", help="leave build/mutate as it is")
    options = parser.parse_args()
    unknown = set(options.targets) - TARGETS.keys()
    if unknown:
        parser.error(
            f"no such target: {', '.join(sorted(unknown))}; choose of {', '.join(TARGETS)}"
        )
    explained = explanations()
    names = options.targets or list(TARGETS)
    open_ones = [mutant for name in names for mutant in run(name, explained, keep=options.keep)]
    if open_ones:
        raise SystemExit(
            f"{len(open_ones)} survivors without a test or a reason ({EXPLAINED.relative_to(ROOT)})"
        )


if __name__ == "__main__":
    main()
