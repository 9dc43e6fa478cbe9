# SPDX-License-Identifier: BSD-3-Clause
"""A mutant counts as killed only if a test failed of it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

SESSION = pathlib.Path(__file__).with_name("mutant_session.py")
TESTS = """
import os

def test_one():
    assert os.environ["MUTANT_UNDER_TEST"] != "m.x_reached__mutmut_1"

def test_two():
    if os.environ["MUTANT_UNDER_TEST"] == "m.x_reached__mutmut_3":
        import pytest
        pytest.exit("no test failed of this")
"""
# What mutmut found out: the tests that call each function, and how long they take.
STATS = {
    "tests_by_mangled_function_name": {
        "m.x_reached": ["test_m.py::test_one", "test_m.py::test_two"]
    },
    "duration_by_test": {"test_m.py::test_one": 0.1, "test_m.py::test_two": 0.1},
}


def session(folder, *mutants):
    """Returns the finished process and the verdict of every mutant."""
    (folder / "test_m.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "mutmut-stats.json").write_text(json.dumps(STATS))
    (folder / "mutants.json").write_text(json.dumps(mutants))
    command = [sys.executable, "-P", SESSION, "mutants.json", "verdicts.json", "--", "-q"]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "test_m.py"]
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [*command, *options], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    found = folder / "verdicts.json"
    return done, json.loads(found.read_text()) if found.exists() else None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants are tried in forks")
def test_what_no_test_calls_is_alive(tmp_path):
    done, verdicts = session(
        tmp_path, "m.x_reached__mutmut_1", "m.x_reached__mutmut_2", "m.x_unreached__mutmut_1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts == {
        "m.x_reached__mutmut_1": "killed",
        "m.x_reached__mutmut_2": "alive",
        "m.x_unreached__mutmut_1": "alive",
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants are tried in forks")
def test_a_session_that_breaks_off_kills_no_mutant(tmp_path):
    done, verdicts = session(tmp_path, "m.x_reached__mutmut_3")
    assert done.returncode != 0 and verdicts is None
    assert "neither killed nor alive" in done.stdout + done.stderr
