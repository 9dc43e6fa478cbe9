# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA library beside CUDA builds of torch, on a machine without a GPU.

What can be seen there: that it builds against the headers of the oldest and the newest release,
that it loads beside the real libtorch_cuda, what it registers, that torch can hand arguments to it,
what dgg says where there is no driver, and that the CPU's steps are those of any other build. The
kernels do not run.

An environment of several GB for each release stays in build/cuda_torch, and so does the dgg that
was built for it, for one architecture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

import cases
from dgg.backends import libraries, native
from test_cuda_code import NVCC, WRITTEN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # the installation and the build, in the first test of a release
    pytest.mark.skipif(NVCC is None, reason="nvcc, which compiles the CUDA kernels, was not found"),
    pytest.mark.skipif(
        sysconfig.get_platform() != "linux-x86_64",
        reason="torch's wheels are known to be CUDA builds on x86-64 Linux only",
    ),
    pytest.mark.skipif(
        cases.cpp_missing() is not None, reason="there is no CPU build to compare with"
    ),
]

ROOT = pathlib.Path(__file__).parent.parent
# The ends of what the package knows: the first and the last release that has native gradients.
OLDEST, NEWEST = (f"{major}.{minor}.0" for major, minor in native._READ)
ARCHITECTURE = "9.0"
NEEDED = 14 * 2**30  # bytes on the disk for one release: the wheels and what is in them
CORE = ["test_gather.py", "test_state.py", "test_drop_in.py", "test_cpp.py", "test_gpu_stand_in.py"]

LAUNCHES = {f"dgg::{name}" for name in WRITTEN}
# They say for a GPU's tensors what to call instead, whatever torch was built with.
REFUSED = {f"dgg::{name}" for name in ("norms", "coefficients", "adam_", "sgd_", "guide_")}


def _pinned(*names: str) -> list[str]:
    """Returns the requirements, with version and marker, that the lock has for some packages."""
    lines = [
        line
        for file in ("run.txt", "bench.txt", "test.txt")
        for line in (ROOT / "requirements" / file).read_text().splitlines()
        if re.split("[=; ]", line)[0] in names
    ]
    assert {re.split("[=; ]", line)[0] for line in lines} == set(names)
    return [line.partition("#")[0].strip() for line in lines]


@dataclasses.dataclass
class Environment:
    """An environment with a CUDA build of torch.

    Attributes:
        release: Of torch.
        python: Its interpreter.
        package: The folder with the dgg that was built there.
    """

    release: str
    python: pathlib.Path
    package: pathlib.Path

    def run(self, *command: object, package: pathlib.Path | None = None, **env: str):
        """Runs its interpreter, with its own dgg or another, where it finds no GPU."""
        env = {
            **os.environ, "PYTHONPATH": str(package or self.package), "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1", **env,
        }  # fmt: skip
        env.pop("TRITON_INTERPRET", None)  # which tests/conftest.py has set
        return subprocess.run(
            [self.python, *map(str, command)],
            cwd=ROOT, env=env, capture_output=True, text=True,
        )  # fmt: skip


def _installed(release: str) -> pathlib.Path:
    """Returns the interpreter of an environment with that torch, which is made if there is none."""
    place = ROOT / "build" / "cuda_torch" / f"{release}-{sys.implementation.cache_tag}"
    python, complete = place / "bin" / "python", place / "complete"
    wanted = [
        f"torch=={release}",
        *_pinned("setuptools", "packaging", "pytest", "pytest-timeout", "hypothesis", "expecttest"),
        "numpy<2.4",  # with later ones fails the interpreter of Triton 3.6, which torch 2.10 brings
    ]
    if complete.exists() and complete.read_text().split("\n") == wanted:
        return python
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if free < NEEDED:
        pytest.skip(f"torch {release} needs {NEEDED >> 30} GiB of the disk; {free >> 30} are free")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    # What pip keeps of these wheels would double what they take.
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(place)
        # Whose word it is that there is a conflict stands between the errors.
        said = re.findall(
            r"^(?:ERROR: |    (?=.*\(constraint\)))(.*)", done.stdout + done.stderr, re.MULTILINE
        )
        pytest.skip(
            f"pip cannot install torch {release} here: {'; '.join(said) or done.stderr[-400:]}"
        )
    version = (place / "lib").glob("python*/site-packages/torch/version.py")
    if not re.search(r"^cuda\b[^=\n]*=\s*'", next(version).read_text(), re.MULTILINE):
        shutil.rmtree(place)
        pytest.skip(f"pip gives a torch {release} without CUDA here")
    complete.write_text("\n".join(wanted))
    return python


def _built(release: str, python: pathlib.Path) -> pathlib.Path:
    """Returns the folder with the dgg built there; it stays as long as nothing of it changes."""
    sources = [
        ROOT / "setup.py", ROOT / "pyproject.toml",
        *sorted((ROOT / "csrc").iterdir()),
        *sorted((ROOT / "dgg").rglob("*.py")), *sorted((ROOT / "kernels").glob("*.py")),
    ]  # fmt: skip
    digest = hashlib.sha256(f"{release} {python}".encode())
    for source in sources:
        digest.update(str(source.relative_to(ROOT)).encode() + source.read_bytes())
    places = python.parents[2]
    place = places / f"dgg-{release}-{digest.hexdigest()[:16]}"
    if place.exists():
        return place
    for old in places.glob(f"dgg-{release}-*"):
        shutil.rmtree(old)
    unfinished = places / f"unfinished-{release}"
    shutil.rmtree(unfinished, ignore_errors=True)
    env = {**os.environ, "DGG_CUDA": "1", "DGG_CPP": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    env.pop("DEBUG", None)
    done = subprocess.run(
        [python, "setup.py", "-q", "build", "--build-base", unfinished / "temp",
         "--build-lib", unfinished / "lib"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (unfinished / "lib").rename(place)
    shutil.rmtree(unfinished)
    return place


@pytest.fixture(scope="module", params=[OLDEST, NEWEST])
def environment(request):
    python = _installed(request.param)
    return Environment(request.param, python, _built(request.param, python))


CASES = {
    f"{rule}, {guidance}": (
        cases.OPTIMIZERS[rule][0].__name__,
        cases.OPTIMIZERS[rule][1] | cases.GUIDANCE[guidance],
    )
    for rule in cases.OPTIMIZERS
    for guidance in cases.GUIDANCE
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A file with what the steps begin with: no release has to draw the same numbers as another."""
    path = tmp_path_factory.mktemp("work") / "work.pt"
    generator = torch.Generator().manual_seed(0)
    dtypes = [cases.F32, cases.BF16, cases.F16]
    params = [p.detach() for d in dtypes for p in cases.make_params(cases.SHAPES, d)]
    grads = [
        [torch.randn(p.shape, generator=generator, dtype=cases.F64).to(p.dtype) for p in params]
        for _ in range(3)
    ]
    torch.save({"params": params, "grads": grads, "cases": CASES}, path)
    return path


WORKER = ["-P"] * (sys.version_info >= (3, 11)) + [ROOT / "tests" / "cuda_torch_worker.py"]


def _asked(run, work: pathlib.Path, **options) -> dict:
    """Returns what the worker says."""
    answer = work.with_name("answer.pt")
    done = run(*WORKER, work, answer, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(answer, weights_only=True)


@pytest.fixture(scope="module")
def here(work):
    """What the worker says beside the torch of the tests."""
    package = libraries.FOLDER.parent
    ours = Environment(torch.__version__, pathlib.Path(sys.executable), package)
    return _asked(ours.run, work)


@pytest.fixture(scope="module")
def there(environment, work):
    """What the worker says beside a CUDA build of torch."""
    return _asked(environment.run, work)


def _assert_loaded(answer: dict, torch_of: Environment, package: pathlib.Path) -> None:
    """Asserts that the worker's dgg and torch are those, and that their libraries are loaded."""
    assert answer["cuda"] is not None
    assert answer["torch"].startswith(torch_of.release)
    assert answer["missing"] is None, answer["missing"]
    libraries = [pathlib.Path(x) for x in answer["libraries"]]
    (real,) = [x for x in libraries if x.name == "libtorch_cuda.so"]
    assert torch_of.python.parents[1] in real.parents and real.stat().st_size > 100 * 2**20
    ours = {x.name.partition(".")[0] for x in libraries if x.parent == package / "dgg"}
    assert ours == {"_C", "_C_cuda"}


def test_loads_beside_the_real_libtorch_cuda(environment, there, here):
    _assert_loaded(there, environment, environment.package)
    assert there["warnings"] == here["warnings"]  # of 16 bits
    # Neither its functions nor where words stand in a tensor have changed.
    assert there["native gradients"]


def test_registers_kernels_for_cuda(there, here):
    assert here["schemas"].keys() >= LAUNCHES | REFUSED
    assert there["schemas"] == here["schemas"]
    assert set(there["kernels"]["CUDA"]) == LAUNCHES | REFUSED
    assert there["kernels"]["CPU"] == here["kernels"]["CPU"] != []
    if torch.version.cuda is None:  # else the tests' own dgg may have its CUDA library, too
        assert set(here["kernels"]["CUDA"]) == REFUSED


def test_torch_hands_arguments_to_the_operators(there):
    """Each is reached through the dispatcher, and ends at the first thing that needs a device."""
    assert there["calls"].keys() == LAUNCHES
    for said in there["calls"].values():
        assert re.match("RuntimeError: .*aoti_torch_create_device_guard", said, re.DOTALL), said


def test_without_a_driver_it_says_so(environment, there):
    first, *backends, default = there["config"].splitlines()
    assert first.startswith(f"torch {there['torch']}, Python ")
    assert [line.split()[:3] for line in backends] == [
        ["reference", "cpu", "usable"],
        ["cpp", "cpu", "usable"],
        ["triton", "cpu", "not"],
    ]
    assert default.startswith("default: cpp on cpu; on other devices")

    driver = "its CUDA library cannot run there: (Found no NVIDIA driver|No CUDA GPUs)"
    assert re.match(driver, there["unavailable"])
    assert re.match(f"RuntimeError: backend='cpp' cannot run: {driver}", there["demanded"])
    assert there["chosen"] == "reference"


def test_cpu_steps_have_the_bits_of_the_cpu_build(there, here):
    assert here["steps"].keys() == there["steps"].keys() == CASES.keys()
    for case, ours in here["steps"].items():
        theirs = there["steps"][case]
        assert [x.dtype for x in ours] == [x.dtype for x in theirs], case
        assert all(map(torch.equal, ours, theirs)), case


def test_what_the_oldest_builds_loads_beside_the_newest(environment, work, there):
    if environment.release == OLDEST:
        pytest.skip("built here, and loaded in the other tests")
    python = _installed(OLDEST)
    package = _built(OLDEST, python)
    answer = _asked(environment.run, work, package=package)
    _assert_loaded(answer, environment, package)
    assert answer["kernels"] == there["kernels"]
    assert answer["steps"].keys() == there["steps"].keys()
    for case, steps in answer["steps"].items():
        assert all(map(torch.equal, steps, there["steps"][case])), case


def test_core(environment):
    """The tests of the core, on the CPU."""
    files = [ROOT / "tests" / name for name in CORE]
    done = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-6000:]
