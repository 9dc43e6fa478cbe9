# SPDX-License-Identifier: BSD-3-Clause
"""What `make gpu` does when a kernel breaks the device, a test hangs, or time runs out.

No GPU takes part: tests that end their process, and a device that says it is lost, stand for one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch

TESTS = """
import os, signal, sys, time, types
import pytest

def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_skipped(): pytest.skip("one GPU")
def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
def test_after_killed(): pass
def test_loses_the_device():
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lost)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
def test_after_lost(): pass
def test_hangs(): time.sleep(600)
def test_last(): pass
"""
QUICK = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
NAMES = [line[4:].partition("(")[0] for line in TESTS.splitlines() if line.startswith("def test")]


@pytest.fixture
def command(bench, monkeypatch):
    found = bench("gpu")
    monkeypatch.setattr(found, "PATIENCE", 8.0)
    return found


def share_out(command, folder, text, parts=2, **more):
    """Runs the tests in a file as `run_tests` does; returns the parts and what they witnessed."""
    file = folder / "test_it.py"
    file.write_text(text)

    def launch(output, environment):
        path = os.path.dirname(command.__file__)
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder),
             "-p", "no:cacheprovider", "-p", "witness", "--continue-on-collection-errors",
             str(file)],
            cwd=folder, env={**os.environ, "PYTHONPATH": path, **QUICK, **environment, **more},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    share = [command.Part(folder, (number, parts), launch) for number in range(parts)]
    for part in share:
        part.start()
    end = time.monotonic() + 240
    while any([part.running() for part in share]):
        assert time.monotonic() < end
        time.sleep(0.1)
    found = [record for part in share for record in command.witness.records(part.path)]
    return share, command.summarise(found)


def test_one_test_costs_itself_alone_whatever_it_does(command, tmp_path):
    share, found = share_out(command, tmp_path, TESTS)
    assert [part.failed for part in share] == [None, None]
    failures = {f["name"].partition("::")[2]: f["message"] for f in found["failures"]}
    assert list(sorted(failures)) == [
        "test_bad", "test_hangs", "test_killed", "test_loses_the_device"
    ]  # fmt: skip
    assert "one is not two" in failures["test_bad"]
    assert failures["test_killed"] == "its process ended with exit code -9"
    assert failures["test_hangs"].startswith("no end after ")
    assert "illegal memory access" in failures["test_loses_the_device"]
    # Everything else was run, once, each by one of the processes.
    good = len(NAMES) - len(failures) - 1
    assert (found["passed"], found["failed"], found["skipped"]) == (good, 4, 1)
    assert found["skip_reasons"] == {"one GPU": 1}
    lost = {name.partition("::")[2] for name in found["lost"]}
    assert lost == {"test_killed", "test_hangs", "test_loses_the_device"}
    assert found["slowest"] and not any(part.stop() for part in share)


def test_only_some_tests_are_taken(command, tmp_path):
    more = {"DGG_ONLY": "test_good\ntest_last"}
    assert share_out(command, tmp_path, TESTS, parts=1, **more)[1]["passed"] == 2


def test_a_file_that_cannot_be_imported_is_a_failure(command, tmp_path):
    (part,), found = share_out(command, tmp_path, "import no_such_module", parts=1)
    assert found["failed"] == 1 and "no_such_module" in found["failures"][0]["message"]
    assert found["lost"] == []


def test_a_device_that_is_lost_again_and_again_is_given_up(command, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESTARTS", 1)
    text = "import os\n" + "".join(f"def test_{n}(): os._exit(9)\n" for n in range(4))
    (part,), found = share_out(command, tmp_path, text, parts=1)
    assert part.failed == "the device was lost 2 times" and found["failed"] == 2


def test_witnesses_that_were_cut_off_are_read(command, tmp_path):
    witness, path = command.witness, tmp_path / "0.jsonl"
    assert witness.records(path) == []
    path.write_text('{"begin": "a"}\n{"test": "a", "outcome": "passed"}\n{"begin": "b"}\n{"te')
    found = witness.records(path)
    assert len(found) == 3 and witness.unfinished(found) == "b"
    assert witness.unfinished(found[:2]) is None


def test_the_tests_are_shared_by_as_many_processes_as_fit(command, tmp_path, monkeypatch):
    stages = command.Stages(tmp_path, [])
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for memory, parts in ((140, 12), (24, 4), (4, 1)):
        stages.environment = {"memory": memory * 2**30}
        assert stages._parts() == parts
    stages.environment = {"memory": 140 * 2**30}
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert stages._parts() == 1


# -- the benchmark --------------------------------------------------------------------------------


@pytest.fixture
def broken(bench, monkeypatch):
    """A device that an implementation, in its third timed step, makes unusable."""
    machine, peers = bench("machine"), bench("peers")
    state = types.SimpleNamespace(lost=None, when="timed")

    class Device(machine.Cpu):
        def __init__(self):
            self.device, self.cache_bytes = torch.device("cpu"), 2**40
            self._sweep = torch.zeros(1)

        def lost(self):
            return state.lost

    class Breaking(peers.TorchFused):
        def step(self, inject):
            if self.verified == (state.when == "timed"):
                state.lost = "CUDA error: an illegal memory access was encountered"
            if state.lost is not None:
                raise RuntimeError(state.lost)
            super().step(inject)

    monkeypatch.setitem(peers.IMPLEMENTATIONS, "torch fused", Breaking)
    state.device = Device()
    return state


def two_cases(step):
    first = next(case for case in step.cases_of("smoke") if case.name == "adamw-float32-1e3")
    runs = [run for run in first.runs if run[0] in ("dgg reference", "torch fused", "for-loop")]
    without = [run for run in runs if run[0] != "torch fused"]
    limits = {"rounds": 3, "seconds": 1.0}
    return [
        dataclasses.replace(first, name="one", runs=without, **limits),
        dataclasses.replace(first, name="two", runs=runs, **limits),
    ]


@pytest.mark.parametrize("when", ["timed", "verified"])
def test_the_benchmark_goes_on_without_what_lost_the_device(bench, broken, when):
    step, machine = bench("step"), bench("machine")
    broken.when, kept = when, []
    options = {"stream_elements": 2**10, "say": step.Printer(False)}
    keep = {"keep": lambda results: kept.append(json.loads(json.dumps(results)))}
    with pytest.raises(machine.DeviceLost, match="torch fused .*illegal memory access"):
        step.run(two_cases(step), broken.device, **options, **keep)
    (lost,) = kept[-1]["lost"]
    assert (lost["name"], lost["setting"], lost["case"]) == ("torch fused", "plain", "two")
    assert [case["case"] for case in kept[-1]["cases"]] == ["one"]
    broken.lost = None  # a new process
    found = step.run(two_cases(step), broken.device, **options, **keep, before=kept[-1])
    assert [case["case"] for case in found["cases"]] == ["one", "two"]
    assert found["lost"] == [lost] and found["cases"][0] == kept[-1]["cases"][0]
    names = {entry["name"] for entry in found["cases"][1]["variants"]}
    assert names == {"dgg reference", "for-loop"}


def test_a_case_that_fails_costs_a_gpu_run_only_itself(bench, broken, monkeypatch):
    step, workload = bench("step"), bench("workload")
    cases = [two_cases(step)[0], dataclasses.replace(two_cases(step)[0], name="behind")]
    answers = iter([False, True])
    monkeypatch.setattr(workload.Workload, "finite", lambda self: next(answers))
    options = {"stream_elements": 2**10, "say": step.Printer(False)}
    found = step.run(cases, broken.device, **options, keep=lambda results: None)
    assert [case["case"] for case in found["cases"]] == ["behind"]
    (skipped,) = found["skipped"]
    assert skipped["case"] == "one" and skipped["wrong"] and "not finite" in skipped["reason"]
    monkeypatch.setattr(workload.Workload, "finite", lambda self: False)
    with pytest.raises(FloatingPointError):
        step.run(cases[:1], broken.device, **options)


def test_the_command_starts_the_benchmark_again(command, tmp_path, monkeypatch):
    stages = command.Stages(tmp_path / "build", [], rehearsal=True)
    stages.limit = 60.0
    lost = {"name": "dgg cpp", "setting": "guided", "case": "large", "reason": "gone"}
    commands, codes = [], [command.witness.LOST, 0, 0]

    def run(words, **options):
        commands.append(list(map(str, words)))
        folder = tmp_path / "build" / "step"
        folder.mkdir(exist_ok=True)
        results = {"cases": [{}] * len(commands), "skipped": [], "targets": [], "lost": [lost]}
        (folder / "step.json").write_text(json.dumps(results))
        return codes[len(commands) - 1], "printed"

    monkeypatch.setattr(stages, "command", run)
    found = stages.run_step()
    assert len(commands) == 2 and "--resume" not in commands[0]
    assert commands[1][-2:] == ["--resume", str(tmp_path / "build" / "step" / "step.json")]
    assert found["status"] == "failed" and "dgg cpp (guided) in large" in found["reason"]
    assert len(stages.results["step"]["cases"]) == 2
    # What lost the device in one benchmark is not tried in the other.
    monkeypatch.setattr(stages, "_take", lambda *_: {"cases": []})
    stages.run_training()
    assert commands[-1][-2:] == ["--without", "dgg cpp"]


def test_training_results_are_kept_before_the_device_is_lost(bench, broken):
    training, machine = bench("training_step"), bench("machine")

    def breaking(params, alpha, seed):
        def step(inject):
            broken.lost = "CUDA error: misaligned address"
            raise RuntimeError(broken.lost)

        return step, None

    (model,) = [m for m in training.models(broken.device, "smoke") if m.name == "lora2"]
    wanted = [
        training.Variant("torch fused + clip", training._torch_fused, None, 2),
        training.Variant("dgg cpp", breaking, 0.5, 2),
    ]
    kept = []
    with pytest.raises(machine.DeviceLost, match="dgg cpp .*misaligned"):
        training.run_model(
            model, broken.device, wanted, lambda line: None, keep=lambda x: kept.append(dict(x))
        )
    assert [entry["name"] for entry in kept[-1]["variants"]] == ["torch fused + clip"]
    (missing,) = kept[-1]["not_run"]
    assert missing["wrong"] and "misaligned" in missing["reason"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["for-loop", "foreach + fused", "foreach + clip_grad_norm_ + fused"]
)
def test_peers_compute_the_step_where_numbers_stay_on_the_device(bench, name, dtype):
    peers, workload, robin = bench("peers"), bench("workload"), bench("round_robin")
    shapes = [(7,), (3, 5), (64,)]
    work = workload.Workload(shapes, dtype, "adamw", torch.device("cpu"))
    variant = peers.IMPLEMENTATIONS[name](work, workload.GUIDED)
    variant._on_host = False
    assert robin.verify(variant, workload.Verifier(work)) <= 1
    # Another dtype would cost torch's foreach functions a kernel for every tensor.
    assert variant._scalar(torch.ones((), dtype=torch.float64)).dtype == dtype


# -- the stages -----------------------------------------------------------------------------------


def test_a_library_that_does_not_load_fails_the_build(command, tmp_path, monkeypatch):
    stages = command.Stages(tmp_path / "build", [])
    package = stages.site / "dgg"
    package.mkdir(parents=True)
    missing = {"cpp": None, "triton": None}

    def run(words, **options):
        found = {"dgg": str(package / "__init__.py"), "config": "config", "missing": missing}
        return 0, "FOUND " + json.dumps(found)

    monkeypatch.setattr(stages, "command", run)
    assert "status" not in stages._built("with CUDA", [])
    missing["cpp"] = "its CUDA library is missing: undefined symbol"
    found = stages._built("with CUDA", [])
    assert found["status"] == "failed" and "undefined symbol" in found["reason"]


@pytest.mark.parametrize(
    ("printed", "code", "status", "words"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0, "ok", "0 errors"),
        ("ERROR SUMMARY: 0 errors\nERROR SUMMARY: 2 errors\n", 99, "failed", "2 errors"),
        ("ERROR SUMMARY: 0 errors\nERROR SUMMARY: 2 errors\n", 0, "failed", "2 errors"),
        ("no summary at all", 0, "failed", "exit code 0"),
        ("Error: Device not supported", 1, "not run", "Device not supported"),
        ("", None, "failed", "stopped at its limit; 0 tests had passed"),
    ],
)
def test_memory_checks_are_read(command, tmp_path, monkeypatch, printed, code, status, words):
    stages = command.Stages(tmp_path / "build", [])
    stages.environment = {"pytest": "9"}
    stages.results["stages"]["tests"] = {"lost": ["../tests/test_gpu.py::test_x[cpp-1]"]}
    given = {}

    def run(line, **options):
        given.update(options)
        return code, printed

    monkeypatch.setattr(stages, "command", run)
    monkeypatch.setattr(command, "_sanitizer", lambda: "compute-sanitizer")
    found = {"status": "ok", **stages.run_sanitizer()}
    assert found["status"] == status
    assert words in (found.get("reason") or found["summary"])
    assert given["DGG_ONLY"].splitlines() == ["overrun", "../tests/test_gpu.py::test_x[cpp-1]"]


def test_a_profile_is_one_of_the_stages_that_are_asked_for(command, tmp_path, monkeypatch):
    assert set(command.LIMITS) - set(command.USUAL) == {"profile"}
    out = tmp_path / "out"
    stages = command.Stages(tmp_path / "build", [command.RESULTS, out], rehearsal=True)
    before = set(command.RESULTS.iterdir())

    def run(words, **options):
        folder = tmp_path / "build" / "profile"
        folder.mkdir()
        (folder / "step-trace.json.gz").write_bytes(b"trace")
        with (folder / "step.nsys-rep").open("wb") as file:
            file.truncate(16 * 2**20)
        return 0, "| range |"

    monkeypatch.setattr(stages, "command", run)
    assert stages.run_profile()["summary"] == "step-trace.json.gz, step.nsys-rep"
    assert [path.name for path in out.iterdir()] == ["step-trace.json.gz"]
    assert set(command.RESULTS.iterdir()) == before
    assert "| range |" in stages.page()


def test_a_stage_alone_may_take_longer(command, tmp_path):
    stages = command.Stages(tmp_path / "build", [], budget=1000, most=480.0)
    limits = []
    stages.run("step", lambda: limits.append(stages.limit) or {}, [])
    assert limits == [480.0] and command.LIMITS["step"][0] < 480


def test_single_stages_do_not_replace_the_results_of_all(command, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    found = {"name": "NVIDIA H200", "torch": "2", "cuda": "13", "available": True}

    def find(self):
        self.environment = found
        return {}

    monkeypatch.setattr(command.Stages, "find_environment", find)
    for name in ("build_package", "run_tests", "run_step", "run_training", "run_sanitizer"):
        monkeypatch.setattr(command.Stages, name, lambda self: {})
    monkeypatch.delenv("OUT", raising=False)
    for stages in ([], ["--stages", "tests,build"]):
        assert command.main(["--build", str(tmp_path / "build"), *stages]) == 0
    names = sorted(path.stem[:4] + path.stem[15:] for path in (tmp_path / "results").glob("*.json"))
    assert names == ["h200", "h200-build-tests"]


def test_results_say_which_sources_they_are_of(command, tmp_path):
    stages = command.Stages(tmp_path / "build", [], commit="abc")
    assert stages.results["commit"] == "abc"
    assert stages.results["sources"] == command.sources_digest() and command.sources_digest()
