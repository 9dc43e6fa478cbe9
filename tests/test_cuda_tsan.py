# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels under ThreadSanitizer, with a thread of the CPU for each of theirs.

tests/test_cuda_host.py runs them one thread at a time, where nothing can race. Here what is not
ordered by a barrier, or by a count and the fence behind it, is reported (cuda_on_threads.h).
"""

from __future__ import annotations

import re

import pytest

import thread_sanitizer
from thread_sanitizer import RACE, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        thread_sanitizer.missing() is not None, reason=str(thread_sanitizer.missing())
    ),
]

# The kernels that cuda_races.cpp launches: all of them would take long to compile.
KERNELS = {
    "cuda_adam.cu": "Plain<float,float,float,float>,Guided<float,float,float,float>,"
                    "Replayed<float,float,float,float>,Drawn<float,float,float,float>,"
                    "Rounded<float,bfloat16,bfloat16,bfloat16>,"
                    "Drawn<float,bfloat16,bfloat16,bfloat16>,Master<bfloat16,true,false>,"
                    "Routed<float>,Routed<bfloat16>,"
                    "AnyKind<float,false>,AnyKind<float,true>,AnyKind<float,true,Any>",
    "cuda_sgd.cu": "Plain<true,float,float>,Guided<true,float,float>,Replayed<float>,Drawn<float>,"
                   "Rounded<bfloat16>,Drawn<bfloat16>,Routed<float>,Routed<bfloat16>,"
                   "AnyKind<float,false>,AnyKind<float,true>,AnyKind<float,true,Any>",
    "cuda_guide.cu": "Plain<float,float>,Guided<float,float>,Guided<float,bfloat16>,"
                     "Weighted<float>,Weighted<bfloat16>,"
                     "AnyKind<float,false>,AnyKind<float,true>,AnyKind<float,true,Any>",
    "cuda_norms.cu": "Gradients<float>,Replayed<float>,Measured<float>,Measured<bfloat16>,"
                     "Weighted<float>,Weighted<bfloat16>,AnyNorms<float>,AnyNorms<float,Any>",
    "cuda_products.cu": "Plain<float>,Plain<bfloat16>,Weighted<float>,Weighted<bfloat16>,"
                        "AnyProducts<float>",
}  # fmt: skip
# Small blocks and chunks: a row of many chunks then takes as many threads as a CPU can start.
SMALLER = {
    "cuda_chunk.cuh": ("kThreads = 256;", "kThreads = 32;"),
    "table.h": ("kLaunchChunk = 8192;", "kLaunchChunk = 1024;"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    shared = 0
    for source in [*(ROOT / "csrc").glob("*.cu*"), *(ROOT / "csrc").glob("*.h")]:
        text = source.read_text()
        text, count = re.subn(
            r"__shared__ ([\w:<> ]+?) (\w+)((?:\[\w+\])*);",
            r"auto& \2 = cuda_on_host::shared<\1\3>([] {});",
            text,
        )
        assert "__shared__" not in text or source.name == "cuda_on_host.h"
        shared += count
        if source.name in SMALLER:
            before, after = SMALLER[source.name]
            assert text.count(before) == 1
            text = text.replace(before, after)
        (folder / source.name).write_text(text)
    assert shared >= 10
    common = ["-DCUDA_ON_THREADS", "-include", str(ROOT / "tests" / "cuda_on_host.h"), "-I",
              str(folder), "-x", "c++"]  # fmt: skip
    if "fma" in open("/proc/cpuinfo").read().split():
        common.append("-mfma")
    units = {folder / name: [*common, f"-DDGG_ONLY={only}"] for name, only in KERNELS.items()}
    units[ROOT / "tests" / "cuda_races.cpp"] = common
    thread_sanitizer.build(folder / "races", units)
    return folder / "races"


def test_no_races(program):
    done = thread_sanitizer.run(program)
    assert done.returncode == 0, done.stderr[:6000]
    assert re.fullmatch(r"launches: (\d+)\n", done.stdout) and int(done.stdout.split()[1]) > 200


@pytest.mark.parametrize("left_out", ["release", "acquire", "barrier"])
def test_missing_order_is_found(program, left_out):
    done = thread_sanitizer.run(program, left_out, halt_on_error=1)
    assert done.returncode != 0 and RACE in done.stderr, done.stdout + done.stderr[:4000]
