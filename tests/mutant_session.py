# SPDX-License-Identifier: BSD-3-Clause
"""Tries mutants one after the other, each in a fork of one pytest session that has collected.

Run by `mutate.py` in the folder that mutmut has made. mutmut itself begins a session for every
mutant and writes a report about every test that fails, for which pytest parses a source of
megabytes: that took ten times as long.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import itertools
import json
import os
import pathlib
import resource
import signal
import sys
import time

import pytest
import torch

KILLED, ALIVE, SLOW = "killed", "alive", "slow"


class Session:
    """A pytest plugin in place of the loop that runs the tests."""

    def __init__(self, mutants: list[str]) -> None:
        self.mutants, self.verdicts = mutants, {}
        self.failed: int | None = None  # in a fork: where to write which test failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        skipped = call.excinfo is not None and isinstance(call.excinfo.value, pytest.skip.Exception)
        if call.excinfo is not None and not skipped:
            os.write(self.failed, item.nodeid.encode())
            os._exit(1)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        torch.set_num_threads(1)  # a fork would wait for the others, which it has not
        stats = json.loads(pathlib.Path("mutmut-stats.json").read_text())
        reach, took = stats["tests_by_mangled_function_name"], stats["duration_by_test"]
        began = time.monotonic()
        modules = pathlib.Path("modules").absolute()
        verdict, test = self._fork("", session.items, 3600, modules)
        if verdict != ALIVE:
            raise RuntimeError(f"without any mutant: {verdict} {test}")
        limit = 20 + 20 * (time.monotonic() - began)
        # What the tests import late, imported once.
        for name in json.loads(modules.read_text()):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        kills = collections.defaultdict(collections.Counter)
        for mutant in self.mutants:
            function = mutant.rpartition("__mutmut_")[0]
            reaching = set(reach.get(function, ()))
            # First those that have killed others of this function. Files stay together: what their
            # tests share is made once.
            items = sorted(
                (item for item in session.items if item.nodeid in reaching),
                key=lambda x: (-kills[function][x.nodeid], str(x.path), took[x.nodeid]),
            )
            self.verdicts[mutant], test = self._fork(mutant, items, limit)
            if test:
                kills[function][test] += 1
        # Whether it was the mutants, and not the order, that the tests failed of.
        for function, killers in kills.items():
            items = [x for x in session.items if x.nodeid in killers]
            items.sort(key=lambda x: -killers[x.nodeid])
            verdict, test = self._fork("", items, limit)
            if verdict != ALIVE:
                raise RuntimeError(f"{function} without a mutant: {verdict} {test}")
        return True

    def _fork(self, mutant, items, limit, modules=None):
        """Runs tests in a fork until one fails; returns the verdict and which one it was."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            self.failed = writing
            self._run(mutant, items, limit, modules)
        os.close(writing)
        until, ended = time.monotonic() + 10 * limit, 0
        while not ended:
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            test = pipe.read()
        code = os.waitstatus_to_exitcode(status)
        verdict = {0: ALIVE, 1: KILLED, -signal.SIGXCPU: SLOW, -signal.SIGKILL: SLOW}.get(code)
        if verdict is None or (verdict == KILLED and not test):  # pytest itself broke off
            raise RuntimeError(f"{mutant}: neither killed nor alive, exit code {code}")
        return verdict, test

    def _run(self, mutant, items, limit, modules):
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(null, stream)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        os.environ["MUTANT_UNDER_TEST"] = mutant
        before = set(sys.modules)
        # Of a function that no test reaches there is none, and its mutants are alive.
        for item, following in itertools.zip_longest(items, items[1:]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if modules is not None:
            modules.write_text(json.dumps([name for name in sys.modules if name not in before]))
        os._exit(0)


def main() -> None:
    """Reads which mutants from a file, writes what became of each into another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mutants", type=pathlib.Path)
    parser.add_argument("verdicts", type=pathlib.Path)
    parser.add_argument("options", nargs="*", help="of pytest")
    given = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    os.environ["MUTANT_UNDER_TEST"] = ""
    session = Session(json.loads(given.mutants.read_text()))
    code = pytest.main(given.options, plugins=[session])
    if len(session.verdicts) < len(session.mutants) or code not in (0, 5):
        raise SystemExit("the session broke off")
    given.verdicts.write_text(json.dumps(session.verdicts))


if __name__ == "__main__":
    main()
