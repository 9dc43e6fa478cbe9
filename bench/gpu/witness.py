# SPDX-License-Identifier: BSD-3-Clause
"""A pytest plugin for run.py: says at once how each test ended, and gives up a lost device.

A kernel that reads where it must not takes the whole process with it: every later call to CUDA
fails, and each test behind it would be blamed. So the process ends there, with the exit code LOST,
and is started again for the tests that are left. The environment says what to do:

    DGG_WITNESS  file of JSON lines; tests whose end stands in it already are left out
    DGG_PART     "2/8": take the third of eight parts of the tests
    DGG_ONLY     lines: take the tests that have one of them in their names
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

LOST = 70


def records(path: pathlib.Path) -> list[dict]:
    """Returns what a file of witnesses says; the last line may be cut off."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def note(path: pathlib.Path, **record: object) -> None:
    """Appends a record, on a line of its own: the one before may have been cut off."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record) + "\n")


def unfinished(found: list[dict]) -> str | None:
    """Returns the test that was begun last if its end is missing."""
    last = None
    for record in found:
        if "begin" in record:
            last = record["begin"]
        elif record.get("test") == last:
            last = None
    return last


def lost_device() -> str | None:
    """Returns why CUDA cannot be used any more in this process, or None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    reason = None
    # What is wrong once may have been left by a call that was meant to fail.
    for _ in range(2):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        else:
            return None
    return reason


class Witness:
    """The plugin, for a part of the tests; ``only``: words of the names of those to take."""

    def __init__(self, path: pathlib.Path, part: tuple[int, int], only: list[str]) -> None:
        self._part, self._path, self._only = part, path, only
        self._known = {record["test"] for record in records(path) if "test" in record}

    def pytest_collection_modifyitems(self, config, items) -> None:
        """Keeps this part's tests that have not ended yet."""
        number, parts = self._part
        wanted = [i for i in items if not self._only or any(w in i.nodeid for w in self._only)]
        left = [i for i in wanted[number::parts] if i.nodeid not in self._known]
        kept = set(map(id, left))
        config.hook.pytest_deselected(items=[i for i in items if id(i) not in kept])
        items[:] = left

    def pytest_collectreport(self, report) -> None:
        """Notes a file that cannot be imported."""
        if report.failed and report.nodeid not in self._known:
            failed = {"outcome": "failed", "message": _message(report), "seconds": 0}
            note(self._path, test=report.nodeid, **failed)

    def pytest_runtest_logstart(self, nodeid) -> None:
        """Notes that a test begins."""
        note(self._path, begin=nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        """Notes how a test ended; ends the process with it if the device is lost."""
        if report.when != "call" and report.passed:
            return
        reason = lost_device()
        message = _message(report)
        outcome = "failed" if reason else report.outcome
        note(
            self._path, test=report.nodeid, outcome=outcome, seconds=round(report.duration, 2),
            lost=reason, message="; ".join(filter(None, (message, reason))),
        )  # fmt: skip
        if reason:
            print(report.longreprtext, flush=True)
            os._exit(LOST)


def _message(report) -> str:
    if report.passed:
        return ""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else report.longreprtext).strip().splitlines()
    # Of a file that cannot be imported, what Python said and not from where it was asked.
    lines = [line[1:].strip() for line in lines if line.startswith("E ")] or lines
    return " ".join(lines[:3])[:300]


def pytest_configure(config) -> None:
    """Registers the plugin where run.py asks for it."""
    path = os.environ.get("DGG_WITNESS")
    if path:
        number, parts = map(int, os.environ.get("DGG_PART", "0/1").split("/"))
        only = os.environ.get("DGG_ONLY", "").splitlines()
        plugin = Witness(pathlib.Path(path), (number, parts), only)
        config.pluginmanager.register(plugin, "dgg-witness")
