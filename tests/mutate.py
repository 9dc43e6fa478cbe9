# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing: changes the package line by line and asks the tests whether they notice.

    make mutate                                # every target below, one process
    make mutate ARGS="reference"               # one of them
    make mutate ARGS="_loading --keep"         # leaves build/mutate/_loading for a closer look

mutmut makes the mutants and runs, for each, the tests that reach the function it is in. A survivor
is a line that no test needs: either a test is missing, or the mutant does what the original did,
and then `docs/mutation_testing.md` says why. What is neither fails the run.
"""

from __future__ import annotations

import argparse
import ast
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
# The mutated file's fastest tests that say all about it. More would not find more: what these do
# not notice is looked at, line by line.
TARGETS = {
    "_philox": ["test_philox.py"],
    "reference": ["test_reference.py"],
    "_boundary": ["test_boundary.py"],
    "_saved_state": ["test_saved_state.py"],
    "_loading": ["test_world_of_one.py", "test_loading.py"],
}
# Tests among them that start processes or write a gigabyte, and say nothing more.
SLOW = "scripts_of or library_that or whole_model or shards_read or one_anchor_however"
# mutmut's exit codes of a test run: no test failed, no test reached it, too slow.
KILLED, ALIVE, TIMEOUT = (1, 3), (0, 5, 33), (-24, 24, 36, 152)

SECTION = """
[tool.mutmut]
source_paths = ["dgg"]
only_mutate = ["dgg/{name}.py"]
also_copy = ["dgg", "tests"]
# Nobody reads the tracebacks, and the sources that they would quote are megabytes of mutants.
pytest_add_cli_args = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", "not ({slow})"]
pytest_add_cli_args_test_selection = {tests}
# torch has threads, which a fork does not take along.
process_isolation = "forkserver"
"""


# Appended to the conftest.py of the copy: mutmut mixes the tests of several files, the quickest
# first, and what a file's tests share would be made anew again and again.
FILE_BY_FILE = """

_longest_first = pytest_collection_modifyitems


def pytest_collection_modifyitems(items):
    _longest_first(items)
    files = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: files.index(item.path))
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
    with (folder / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(FILE_BY_FILE)
    source = folder / "dgg" / f"{name}.py"
    source.write_text(undecorated(source.read_text()))
    tests = json.dumps([f"tests/{test}" for test in TARGETS[name]])
    section = SECTION.format(name=name, tests=tests, slow=SLOW)
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


def mutmut(folder: pathlib.Path, *arguments: str) -> str:
    # One thread: as many as there are cores would wait for each other on tensors this small.
    env = dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"mutmut {' '.join(arguments)} failed in {folder}\n{done.stdout or ''}")
    return done.stdout or ""


def mutant_of(folder: pathlib.Path, name: str) -> Mutant:
    """Returns the change of a mutant by mutmut's name of it."""
    removed, added = [], []
    for line in mutmut(folder, "show", name).splitlines():
        if line.startswith(("---", "+++")):
            continue
        if line.startswith("-"):
            removed.append(line[1:].strip())
        elif line.startswith("+"):
            added.append(line[1:].strip())
    function = name.rpartition("__mutmut_")[0].rpartition(".")[2]
    function = re.sub(r"^xǁ(\w+)ǁ", r"\1.", function)
    module = name.split(".")[1]
    return Mutant(f"{module}.{function.removeprefix('x_')}", " ".join(removed), " ".join(added))


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
    for key in exit_codes(folder, name):
        mutant = key.rpartition(".")[2]
        original = mutant.rpartition("__mutmut_")[0] + "__mutmut_orig"
        if bodies[mutant] == bodies[original]:
            found.add(key)
    return found


def exit_codes(folder: pathlib.Path, name: str) -> dict[str, int | None]:
    """Returns how the tests of every mutant ended, None where they have not run."""
    meta = (folder / "mutants" / "dgg" / f"{name}.py.meta").read_text()
    return json.loads(meta)["exit_code_by_key"]


def run(name: str, explained: dict[Mutant, str], *, keep: bool) -> list[Mutant]:
    """Tests one file, prints its line of the table, and returns what nobody has explained."""
    began = time.monotonic()
    folder = prepare(name)
    # Mutants are made by a run, here of one of each function; then it is seen which are wording.
    mutmut(folder, "run", "--max-children", "1", "*__mutmut_1")
    left_out = wording(folder, name)
    tested = [key for key in exit_codes(folder, name) if key not in left_out]
    mutmut(folder, "run", "--max-children", "1", *tested)
    codes = {key: code for key, code in exit_codes(folder, name).items() if key not in left_out}
    strange = {k: v for k, v in codes.items() if v not in (*KILLED, *ALIVE, *TIMEOUT)}
    if strange:
        raise SystemExit(f"{name}: neither killed nor alive, exit codes {strange}; see {folder}")
    alive = [mutant_of(folder, key) for key, code in codes.items() if code in ALIVE]
    slow = sum(code in TIMEOUT for code in codes.values())
    known = [m for m in alive if m in explained]
    open_ones = [m for m in alive if m not in explained]
    print(
        f"{name:<12} {len(codes):>5} mutants, {len(left_out)} of wording apart:"
        f" {len(codes) - len(alive)} killed (of these by time {slow}),"
        f" {len(known)} explained, {len(open_ones)} open; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    module = f"{name}."
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
