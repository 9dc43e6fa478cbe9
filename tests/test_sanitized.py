# SPDX-License-Identifier: BSD-3-Clause
"""Random calls of the C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer.

The short form of ``make sanitize`` (docs/sanitizers.md), with the same seed every time. Most of its
time is the library's compilation, which is done once per state of the sources.
"""

from __future__ import annotations

import pytest
import torch

import sanitized
from cases import cpp_missing

# Of all instruction sets together, with either way to find what is wrong.
CALLS = 20_000

pytestmark = pytest.mark.skipif(
    cpp_missing() is not None, reason=f"C++ backend missing: {cpp_missing()}"
)
ISAS = sanitized.instruction_sets() if cpp_missing() is None else []


@pytest.fixture(scope="module")
def library():
    if sanitized.missing() is not None:
        pytest.skip(sanitized.missing())
    return sanitized.build()


def assert_counts(counts, calls):
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    assert counts["findings"] == 0
    assert counts["calls"] + counts["refused"] >= calls
    # No kind of call is left out.
    assert counts["refused"] > calls / 100 and counts["steps"] > calls / 100


@pytest.mark.parametrize("isa", ISAS)
def test_random_calls_under_sanitizers(library, isa):
    assert_counts(sanitized.run(library, isa, CALLS // len(ISAS), seed=0), CALLS // len(ISAS))


@pytest.mark.parametrize("isa", ISAS)
def test_random_calls_before_forbidden_pages(isa):
    # The library as it is installed: what the compiler has made of the loops.
    folder, calls = sanitized.released(), CALLS // len(ISAS)
    assert_counts(sanitized.run(folder, isa, calls, seed=1, pages=True), calls)


# That nothing is found means something only if what is there is found.


@pytest.mark.parametrize(
    "kind,told", [("memory", "heap-buffer-overflow"), ("undefined", "signed integer overflow")]
)
def test_sanitizers_find_what_is_there(library, kind, told):
    done = sanitized.provoke(library, kind, torch.ops.dgg.isa())
    assert done.returncode == 99 and told in done.stderr, done.stderr[-2000:] or done.stdout


def test_forbidden_pages_find_what_is_there():
    done = sanitized.provoke(sanitized.released(), "pages", torch.ops.dgg.isa())
    assert done.returncode == -11, done.stderr[-2000:] or done.stdout


def test_a_finding_says_how_to_repeat_it(library, monkeypatch, tmp_path):
    broken = tmp_path / "sanitized_calls.py"
    text = sanitized.CALLS.read_text()
    changed = text.replace(
        "        scenario(Memory(rng, self.pages))",
        "        if number == 7:\n            provoke('memory')\n"
        "        scenario(Memory(rng, self.pages))",
    )
    assert changed != text
    broken.write_text(changed)
    monkeypatch.setattr(sanitized, "CALLS", broken)
    with pytest.raises(sanitized.Finding, match=r"scenario 7 of seed 5 .*--seed 5 --first 7"):
        sanitized.run(library, "baseline", 1000, seed=5)


def test_a_killed_process_is_no_finding(monkeypatch, tmp_path):
    killed = tmp_path / "sanitized_calls.py"
    killed.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(sanitized, "CALLS", killed)
    with pytest.raises(RuntimeError, match="killed from outside"):
        sanitized.run(sanitized.released(), "baseline", 1000, seed=0, pages=True)
