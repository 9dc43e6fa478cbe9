# SPDX-License-Identifier: BSD-3-Clause
"""Triton's own way from a launch to a compiled kernel, with a driver that starts nothing.

test_triton_code.py compiles what it has recorded; here Triton binds the arguments, looks into its
cache and compiles as it does on an H100. A process of its own, without the interpreter, whose
cache fails once as on a network file system (triton#11512).
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


# Registers spilled by the variants of a kernel, in the order in which they are loaded.
SPILLS = {"adam_kernel": [2, 0], "sgd_kernel": [1, 1]}
BENCH = pathlib.Path(__file__).parents[1] / "bench"


def main():
    """Launches every kernel, some with other numbers; prints what was started and compiled."""
    import torch
    import triton

    from gpu.launch_driver import Driver

    started = []

    def note(name, grid, function, arguments):
        # Constants and numbers as they are, of tensors the shape.
        started.append([name, grid, [str(getattr(x, "shape", x)) for x in arguments], function])

    driver = Driver(note, SPILLS)
    triton.runtime.driver.set_active(driver)
    put, failed = triton.runtime.cache.FileCacheManager.put, []

    def put_once_without_luck(self, *arguments, **options):
        path = put(self, *arguments, **options)
        if not failed:
            failed.append(path)
            raise OSError(errno.EBUSY, "Device or resource busy")
        return path

    triton.runtime.cache.FileCacheManager.put = put_once_without_luck
    run, looked_up = triton.runtime.jit.JITFunction.run, []

    def counted(self, *arguments, **options):
        looked_up.append(self.__name__)
        return run(self, *arguments, **options)

    triton.runtime.jit.JITFunction.run = counted
    from dgg.kernels import guide, layout, norms, optimizers, products

    from dgg import kernels

    def ints(*shape, dtype=torch.int64):
        return torch.zeros(*shape, dtype=dtype)

    def doubles(*shape):
        return torch.zeros(*shape, dtype=torch.float64)

    given = {"grad_scale": torch.ones(1), "found_inf": torch.ones(1), "draw_index": ints(1)}
    for rows, chunks, numbers, extra in (
        (2, 3, {"seed": 7, "draw": 0}, dict.fromkeys(given)),
        # Another size, and numbers that need other types if they are looked at: compiled already.
        (17, 16, {"seed": -(2**63), "draw": 2**32 - 1}, dict.fromkeys(given)),
        (1, 1, {"seed": 1, "draw": 1}, dict.fromkeys(given)),
        (2, 3, {"seed": 7, "draw": 0}, given),
    ):
        int32 = torch.int32
        common = (
            ints(rows, layout.COLUMNS), ints(rows, dtype=int32), ints(chunks, 2, dtype=int32),
            ints(rows + 1, dtype=int32), doubles(layout.PARTIALS, chunks),
            ints(rows + 1, dtype=int32), ints(rows), ints(0),
        )  # fmt: skip
        flags, which = ints(rows, dtype=torch.uint8), {"dtypes": 0, "replay_weight": 0.5}
        coefficients = doubles(4 + rows)
        kernels.norms_launch(
            *common, doubles(rows), doubles(3, rows), None, extra["grad_scale"],
            coefficients if rows > 1 else None, which=7, scaling=rows > 2, per_tensor=False,
            max_grad_norm=1.0 if chunks == 3 else None, **which,
        )  # fmt: skip
        guard = {"max_grad_norm": 1.0, "per_tensor": rows > 2, "maximize": rows == 1}
        kernels.products_launch(
            *common, flags, doubles(6, rows), extra["grad_scale"],
            doubles(6 + rows) if rows > 1 else None, importance=0.5, **guard, **which,
        )  # fmt: skip
        kernels.guard_coefficients_launch(doubles(6, rows), doubles(6 + rows), **guard)
        for name, hypers in (("adam", 10), ("sgd", 8)):
            getattr(kernels, f"{name}_launch_")(
                *common, coefficients, flags, doubles(1, hypers), doubles(rows), *extra.values(),
                variant=7 | layout.IMPORTANCE_BIT, importance=1.0, **which, **numbers,
            )  # fmt: skip
        table, first, cut, _, _, _, *addresses = common
        kernels.guide_launch_(
            table, first, cut, *addresses, coefficients, flags, doubles(1, 3),
            *extra.values(), variant=3, **which, **numbers,
        )  # fmt: skip
        kernels.coefficients_launch(
            doubles(3, rows), coefficients, max_grad_norm=1.0, scaling=True, per_tensor=False
        )
        kernels.draw_flags_launch(
            table, doubles(1, 10), ints(1), flags, ints(1, dtype=torch.uint8),
            seed=numbers["seed"], granularity=2, threshold_column=9, strength_column=8,
        )  # fmt: skip
    functions = (
        norms.norms_kernel, norms.coefficients_kernel, products.products_kernel,
        products.guard_coefficients_kernel, optimizers.adam_kernel, optimizers.sgd_kernel,
        guide.guide_kernel, guide.draw_flags_kernel,
    )  # fmt: skip
    compiled = {
        f.declared.__name__: len(next(iter(f.declared.device_caches.values()))[0])
        for f in functions
    }
    names = {f.declared.__name__: f.declared.arg_names for f in functions}
    found = {"compiled": compiled, "looked_up": looked_up, "failed": failed, "names": names}
    print(json.dumps({"started": started, **found}))


@pytest.mark.slow  # eight kernels are compiled
def test_launches_are_bound_and_compiled_once_for_every_variant(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    code = (
        f"import sys; sys.path[:0] = [{os.path.dirname(__file__)!r}, {str(BENCH)!r}]; "
        "import test_triton_launch; test_triton_launch.main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiled"] == {
        # The fourth launch has numbers on the device, where the others have none; of Adam and SGD
        # the first variant is compiled again, since it spilled registers.
        "norms_kernel": 2, "adam_kernel": 3, "sgd_kernel": 3, "guide_kernel": 2,
        "products_kernel": 2, "coefficients_kernel": 1, "guard_coefficients_kernel": 1,
        "draw_flags_kernel": 1,
    }  # fmt: skip
    for name, variants in found["compiled"].items():
        variants -= name in SPILLS
        grids, told, loaded = zip(*[s[1:] for s in found["started"] if s[0] == name], strict=True)
        single = variants == 1
        assert list(grids) == [[1 if single else m, 1, 1] for m in (3, 16, 1, 3)]
        # However they were found: the first and the fourth launch differ in what is given alone.
        names = found["names"][name]
        assert all(len(values) == len(names) for values in told)
        first, _, _, fourth = told
        different = {n for n, a, b in zip(names, first, fourth, strict=True) if a != b}
        given = {"grad_scale", "found_inf", "draw_index"} & {*names}
        assert different == (set() if single else given)
        # Triton looks at a launch once per variant, and at one whose cache failed once more.
        again = name == "norms_kernel" or name in SPILLS
        assert found["looked_up"].count(name) == variants + again
        # Kept is what spills less; compiled again it was loaded second, but not launched for that.
        kept = {"adam_kernel": [1, 2, 2, 3], "sgd_kernel": [1, 1, 1, 3]}
        expected = kept.get(name, [1, 1, 1, variants])
        assert [int(which.split()[-1]) for which in loaded] == expected
    assert len(found["failed"]) == 1 and "Trying again in 0.1 s" in done.stderr
