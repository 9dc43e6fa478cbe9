# SPDX-License-Identifier: BSD-3-Clause
"""What `make gpu` does, stage by stage, and when a kernel breaks the device or time runs out.

No GPU takes part: tests that end their process, a device that says it is lost, and processes that
answer as those on a GPU would stand for one; the checks of its first stage run on the CPU and,
where they need streams or graphs, on gpu_stand_in.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import gpu_stand_in
from dgg.backends import unavailable

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
def command(bench):
    return bench("gpu.run")


@pytest.fixture
def shared(bench, monkeypatch):
    found = bench("gpu.shared_tests")
    monkeypatch.setattr(found, "PATIENCE", 8.0)
    return found


def share_out(shared, folder, text, parts=2, **more):
    """Runs the tests in a file as `run_tests` does; returns the parts and what they witnessed."""
    file = folder / "test_it.py"
    file.write_text(text)

    def launch(output, environment):
        path = os.path.dirname(shared.__file__)
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder),
             "-p", "no:cacheprovider", "-p", "witness", "--continue-on-collection-errors",
             str(file)],
            cwd=folder, env={**os.environ, "PYTHONPATH": path, **QUICK, **environment, **more},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    share = [shared.Part(folder, (number, parts), launch) for number in range(parts)]
    end = time.monotonic() + 240
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda part: part.run(end), share))
    assert time.monotonic() < end
    found = [record for part in share for record in shared.witness.records(part.path)]
    return share, shared.summarise(found)


def test_one_test_costs_itself_alone_whatever_it_does(shared, tmp_path):
    share, found = share_out(shared, tmp_path, TESTS)
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
    assert found["slowest"] and not any(part.stopped for part in share)


def test_only_some_tests_are_taken(shared, tmp_path):
    more = {"DGG_ONLY": "test_good\ntest_last"}
    assert share_out(shared, tmp_path, TESTS, parts=1, **more)[1]["passed"] == 2


def test_a_file_that_cannot_be_imported_is_a_failure(shared, tmp_path):
    (part,), found = share_out(shared, tmp_path, "import no_such_module", parts=1)
    assert found["failed"] == 1 and "no_such_module" in found["failures"][0]["message"]
    assert found["lost"] == []


def test_a_device_that_is_lost_again_and_again_is_given_up(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "RESTARTS", 1)
    text = "import os\n" + "".join(f"def test_{n}(): os._exit(9)\n" for n in range(4))
    (part,), found = share_out(shared, tmp_path, text, parts=1)
    assert part.failed == "the device was lost 2 times" and found["failed"] == 2


def test_witnesses_that_were_cut_off_are_read(shared, tmp_path):
    witness, path = shared.witness, tmp_path / "0.jsonl"
    assert witness.records(path) == []
    path.write_text('{"begin": "a"}\n{"test": "a", "outcome": "passed"}\n{"begin": "b"}\n{"te')
    found = witness.records(path)
    assert len(found) == 3 and witness.unfinished(found) == "b"
    assert witness.unfinished(found[:2]) is None


def test_the_tests_are_shared_by_as_many_processes_as_fit(command, shared, tmp_path, monkeypatch):
    stages = command.Stages(tmp_path, [])
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for memory, parts in ((140, 12), (24, 4), (4, 1)):
        stages.environment = {"memory": memory * 2**30}
        assert shared.processes(stages) == parts
    stages.environment = {"memory": 140 * 2**30}
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert shared.processes(stages) == 1


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

    class Breaking(bench("torch_variants").TorchFused):
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
    first = next(case for case in step.PRESETS["smoke"]() if case.name == "adamw-float32-1e3")
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
    options = {"stream_elements": 2**10, "say": bench("report").Printer(False)}
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
    options = {"stream_elements": 2**10, "say": bench("report").Printer(False)}
    found = step.run(cases, broken.device, **options, keep=lambda results: None)
    assert [case["case"] for case in found["cases"]] == ["behind"]
    (skipped,) = found["skipped"]
    assert skipped["case"] == "one" and skipped["wrong"] and "not finite" in skipped["reason"]
    monkeypatch.setattr(workload.Workload, "finite", lambda self: False)
    with pytest.raises(FloatingPointError):
        step.run(cases[:1], broken.device, **options)


def test_the_command_starts_the_benchmark_again(bench, command, tmp_path, monkeypatch):
    stages = command.Stages(tmp_path / "build", [], rehearsal=True)
    stages.limit = 60.0
    lost = {"name": "dgg cpp", "setting": "guided", "case": "large", "reason": "gone"}
    measurements = bench("gpu.measurements")
    commands, codes = [], [bench("gpu.witness").LOST, 0, 0]

    def run(words, **options):
        commands.append(list(map(str, words)))
        folder = tmp_path / "build" / "step"
        folder.mkdir(exist_ok=True)
        results = {"cases": [{}] * len(commands), "skipped": [], "targets": [], "lost": [lost]}
        (folder / "step.json").write_text(json.dumps(results))
        return codes[len(commands) - 1], "printed"

    monkeypatch.setattr(stages, "command", run)
    found = measurements.run_step(stages)
    assert len(commands) == 2 and "--resume" not in commands[0]
    assert commands[1][-2:] == ["--resume", str(tmp_path / "build" / "step" / "step.json")]
    assert found["status"] == "failed" and "dgg cpp (guided) in large" in found["reason"]
    assert len(stages.results["step"]["cases"]) == 2
    # What lost the device in one benchmark is not tried in the other.
    monkeypatch.setattr(measurements, "_take", lambda *_: {"cases": []})
    measurements.run_training(stages)
    assert commands[-1][-2:] == ["--without", "dgg cpp"]


def test_training_results_are_kept_before_the_device_is_lost(bench, broken):
    training, machine = bench("training_step"), bench("machine")

    def breaking(params, alpha, seed):
        def step(inject):
            broken.lost = "CUDA error: misaligned address"
            raise RuntimeError(broken.lost)

        return step

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
    peers, workload, robin = bench("peers"), bench("workload"), bench("timing")
    shapes = [(7,), (3, 5), (64,)]
    work = workload.Workload(shapes, dtype, "adamw", torch.device("cpu"))
    variant = peers.IMPLEMENTATIONS[name](work, workload.GUIDED)
    variant._on_host = False
    assert robin.verify(variant) <= 1
    # Another dtype would cost torch's foreach functions a kernel for every tensor.
    assert variant._scalar(torch.ones((), dtype=torch.float64)).dtype == dtype


# -- the stages -----------------------------------------------------------------------------------


def test_a_library_that_does_not_load_fails_the_build(bench, command, tmp_path, monkeypatch):
    stages = command.Stages(tmp_path / "build", [])
    package = stages.site / "dgg"
    package.mkdir(parents=True)
    missing = {"cpp": None, "triton": None}

    def run(words, **options):
        found = {"dgg": str(package / "__init__.py"), "config": "config", "missing": missing}
        return 0, "FOUND " + json.dumps(found)

    monkeypatch.setattr(stages, "command", run)
    built = bench("gpu.build").import_built
    assert "status" not in built(stages, "with CUDA", [])
    missing["cpp"] = "its CUDA library is missing: undefined symbol"
    found = built(stages, "with CUDA", [])
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
def test_memory_checks_are_read(
    bench, command, tmp_path, monkeypatch, printed, code, status, words
):
    stages = command.Stages(tmp_path / "build", [])
    stages.environment = {"pytest": "9"}
    stages.results["stages"]["tests"] = {"lost": ["../tests/test_gpu.py::test_x[cpp-1]"]}
    given = {}

    def run(line, **options):
        given.update(options)
        return code, printed

    monkeypatch.setattr(stages, "command", run)
    sanitizer = bench("gpu.sanitizer")
    monkeypatch.setattr(sanitizer, "installed", lambda: "compute-sanitizer")
    found = {"status": "ok", **sanitizer.run_marked_tests(stages)}
    assert found["status"] == status
    assert words in (found.get("reason") or found["summary"])
    assert given["DGG_ONLY"].splitlines() == ["overrun", "../tests/test_gpu.py::test_x[cpp-1]"]


def test_a_profile_is_one_of_the_parts_that_are_asked_for(command, tmp_path, monkeypatch):
    staged = {part for stage in command.STAGES.values() for part in stage.parts}
    assert set(command.LIMITS) - staged == {"environment", "profile"}
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
    assert command.PARTS["profile"](stages)["summary"] == "step-trace.json.gz, step.nsys-rep"
    assert [path.name for path in out.iterdir()] == ["step-trace.json.gz"]
    assert set(command.RESULTS.iterdir()) == before
    assert "| range |" in stages.page()


def test_a_stage_alone_may_take_longer(command, tmp_path):
    stages = command.Stages(tmp_path / "build", [], budget=1000, most=480.0)
    limits = []
    stages.run("step", lambda stages: limits.append(stages.limit) or {}, [])
    assert limits == [480.0] and command.LIMITS["step"][0] < 480


PARTS = ["build", "checks", "small_step", "short", "tests", "step", "training", "sanitizer"]
FOUND = {"name": "NVIDIA H200", "torch": "2.13", "cuda": "13.0", "triton": "3.7", "python": "3.12",
         "capability": "9.0", "available": True, "pytest": "9"}  # fmt: skip


@pytest.fixture
def stubs(bench, command, tmp_path, monkeypatch):
    """The command on a GPU that is none: parts do what the test says, by default nothing."""
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.delenv("OUT", raising=False)
    called, doing = [], {}

    def find(stages):
        stages.environment = FOUND
        return {}

    monkeypatch.setattr(bench("gpu.build"), "find_environment", find)
    for name in PARTS:

        def part(stages, name=name):
            called.append(name)
            return doing.get(name, lambda stages: {})(stages)

        monkeypatch.setitem(command.PARTS, name, part)

    def run(*arguments):
        called.clear()
        code = command.main(["--build", str(tmp_path / "build"), *arguments])
        files = (tmp_path / "results").glob("*.json")
        return code, {
            path.stem[:4] + path.stem[15:]: json.loads(path.read_text()) for path in files
        }

    return types.SimpleNamespace(run=run, called=called, doing=doing)


def test_single_parts_do_not_replace_the_results_of_all(stubs):
    for parts in ([], ["--parts", "tests,build"]):
        assert stubs.run(*parts)[0] == 0
    code, files = stubs.run("--stage", "1")
    stages = ["h200-stage1", "h200-stage2", "h200-stage3"]
    assert code == 0 and sorted(files) == ["h200", "h200-build-tests", *stages]


def test_each_stage_leaves_its_own_results_and_prints_its_table(bench, stubs, command, capsys):
    code, files = stubs.run()
    assert code == 0 and stubs.called == PARTS
    for number, stage in command.STAGES.items():
        found = files[f"h200-stage{number}"]
        begun = ["environment"] if number == 1 else []
        assert list(found["stages"]) == [*begun, *stage.parts] and found["status"] == "ok"
        assert found["device"] == "NVIDIA H200" and found["date"] == files["h200"]["date"]
        assert found["versions"] == {k: FOUND[k] for k in ("python", "torch", "cuda", "triton")}
        assert (
            found["stage"] == number and found["sources"] == bench("gpu.sources").sources_digest()
        )
    assert list(files["h200"]["stages"]) == ["environment", *sum((list(s.parts) for s in
                                             command.STAGES.values()), [])]  # fmt: skip
    # Each table when its stage is over: before the next one begins.
    printed = capsys.readouterr().out
    order = [printed.index(f"stage {n}, {s.name}: ok") for n, s in command.STAGES.items()]
    begins = [printed.index(f"# Stage {n}:") for n in command.STAGES]
    assert begins[0] < order[0] < begins[1] < order[1] < begins[2] < order[2]
    assert "| small_step | ok |" in printed[order[0] : begins[1]]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_stage_alone(stubs, command, number):
    code, files = stubs.run("--stage", str(number))
    wanted = list(command.STAGES[number].parts)
    # What no earlier call has built is built first.
    wanted = wanted if number == 1 else ["build", *wanted]
    (found,) = files.values()
    assert code == 0 and list(files) == [f"h200-stage{number}"]
    assert list(found["stages"]) == ["environment", *wanted]


def test_what_is_built_is_not_built_again(bench, command, tmp_path, monkeypatch):
    build = bench("gpu.build")
    stages = command.Stages(tmp_path / "build", [])
    stages.environment = dict(FOUND)
    package = stages.site / "dgg"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert not build.is_built(stages)
    answer = {"dgg": str(package / "__init__.py"), "config": "", "missing": {"cpp": None}}
    answer = "FOUND " + json.dumps(answer)
    monkeypatch.setattr(stages, "command", lambda *_, **__: (0, answer))
    build.import_built(stages, "without CUDA", ["no nvcc"])
    assert not build.is_built(stages)
    build.import_built(stages, "with CUDA", [])
    assert build.is_built(stages)
    stages.environment["torch"] = "2.14"
    assert not build.is_built(stages)
    stages.environment["torch"] = FOUND["torch"]
    monkeypatch.setattr(build, "built_digest", lambda: "other sources")
    assert not build.is_built(stages)


@pytest.mark.parametrize("trouble", ["fails", "raises", "hangs"])
@pytest.mark.parametrize("part", PARTS)
def test_a_stage_that_fails_or_hangs_stops_no_other_and_shows(bench, stubs, command, part, trouble):
    failed = bench("gpu.stages").Failed

    def broken(stages):
        if trouble == "fails":
            raise failed("the compiler said no")
        if trouble == "raises":
            raise ZeroDivisionError
        # Its process is ended at the limit that the stage leaves it.
        stages.limit = 0.2
        code, _ = stages.command(["sleep", "60"])
        assert code is None
        raise failed("stopped at its limit")

    stubs.doing[part] = broken
    code, files = stubs.run()
    assert code == 1 and stubs.called == PARTS
    states = [files[f"h200-stage{n}"]["status"] for n in command.STAGES]
    (at,) = [n for n, s in command.STAGES.items() if part in s.parts]
    assert states == ["failed" if n == at else "ok" for n in command.STAGES]


def test_the_stages_fit_the_time_that_a_device_is_lent_for(stubs, command, monkeypatch):
    assert command.BUDGET <= 14 * 60
    assert command.STAGES[1].seconds <= 240 and command.STAGES[2].seconds <= 360
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limits = {}

    def spend(name):
        def part(stages):
            limits[name] = stages.limit
            now[0] += stages.limit  # all that it may take
            return {}

        return part

    for name in PARTS:
        stubs.doing[name] = spend(name)
    code, files = stubs.run()
    # Whatever the parts do, a stage ends in time, the rest takes what is left, and nothing is late.
    assert now[0] - 1000 <= command.BUDGET + 1
    build, checks, small = (limits[name] for name in PARTS[:3])
    assert build + checks + small <= 240 and min(checks, small) >= 40
    assert limits["short"] == command.LIMITS["short"][0] and limits["tests"] == 120
    late = {name for name, found in files["h200"]["stages"].items() if found.get("late")}
    # The deadline of everything leaves nothing for the last, which is no failure of theirs.
    assert late <= set(command.STAGES[3].parts) and code == 0


@pytest.mark.parametrize(("before", "stage"), [("build", 1), ("tests", 3)])
def test_no_time_is_a_failure_where_it_was_set_aside(stubs, before, stage):
    def slow(stages):
        stages.end = time.monotonic() + 1
        return {}

    stubs.doing[before] = slow
    code, files = stubs.run()
    late = "checks" if stage == 1 else "step"
    assert files[f"h200-stage{stage}"]["stages"][late]["reason"] == "no time was left for it"
    # The last stage goes on until the deadline, and whatever does not fit is left out.
    assert files[f"h200-stage{stage}"]["status"] == ("failed" if stage == 1 else "ok")
    assert code == (1 if stage == 1 else 0) and files["h200-stage2"]["status"] == "ok"


def answering(stages, monkeypatch, answer):
    """Lets ``answer(words)`` → (exit code, output) stand for processes; returns their commands."""
    commands = []

    def run(words, **options):
        commands.append(list(map(str, words)))
        return answer(commands[-1])

    monkeypatch.setattr(stages, "command", run)
    return commands


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (0, "ok", "1 checks, 1 not possible here"),
        (1, "failed", "graphs, cpp: other bits"),
        (None, "failed", "stopped at its limit"),
        (70, "failed", "the device was lost"),
    ],
)
def test_checks_are_read(command, tmp_path, monkeypatch, code, status, words):
    stages = command.Stages(tmp_path / "build", [])
    failed = {"status": "failed", "seen": "other bits", "seconds": 0.1}
    found = {
        "same bits, cpp": {"status": "ok", "seen": "21 runs", "seconds": 1.0},
        "graphs, cpp": failed if code else {**failed, "status": "not run"},
    }

    def answer(line):
        folder = tmp_path / "build" / "checks"
        folder.mkdir()
        (folder / "checks.json").write_text(json.dumps({"checks": found}))
        return code, "printed"

    (line,) = (answering(stages, monkeypatch, answer),)
    stages.run("checks", command.PARTS["checks"], [])
    ended = stages.results["stages"]["checks"]
    assert ended["status"] == status and words in (ended.get("reason") or ended["summary"])
    assert (
        stages.results["checks"] == found and "| same bits, cpp | ok | 21 runs |" in stages.page()
    )
    assert line[0][1].endswith("gpu/checks.py") and "--device" not in line[0]


BOTH = "echo 'triton: checked'"
SANITIZER = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$2" in
memcheck) echo "========= ERROR SUMMARY: {memory} errors" ;;
racecheck) echo "========= RACECHECK SUMMARY: {races} hazards displayed (0 errors, 0 warnings)" ;;
esac
echo "cpp: checked"
{end}
"""


@pytest.mark.parametrize(
    ("memory", "races", "end", "status", "words"),
    [
        (0, 0, BOTH, "ok", "memcheck: 0 errors (cpp, triton), racecheck: 0 errors (cpp, triton)"),
        (2, 0, f"{BOTH}; exit 99", "failed", "memcheck: 2 errors, exit code 99"),
        (0, 1, BOTH, "failed", "racecheck: 1 errors"),
        (0, 0, "echo triton is not checked", "failed", "memcheck: 0 errors, exit code 0"),
        (0, 0, "echo 'Error: Device not supported'; exit 1", "not run", "memcheck: Device not"),
        (0, 0, "sleep 60", "failed", "racecheck: stopped at its limit"),
        (0, 0, "exit 3", "failed", "exit code 3"),
    ],
)  # fmt: skip
def test_a_small_step_is_checked_by_both_tools(
    bench, command, tmp_path, monkeypatch, memory, races, end, status, words
):
    stages = command.Stages(tmp_path / "build", [])
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(folder=tmp_path, memory=memory, races=races, end=end))
    tool.chmod(0o755)
    monkeypatch.setattr(bench("gpu.sanitizer"), "installed", lambda: str(tool))
    stages.limit = 20.0 if "sleep" not in end else 1.0
    found = {"status": "ok", **command.PARTS["small_step"](stages)}
    assert found["status"] == status
    assert words in (found.get("reason") or found["summary"])
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert [call.split()[1] for call in calls] == ["memcheck", "racecheck"]
    assert all(call.endswith("gpu/checks.py --small-step") for call in calls)


def test_without_the_tool_a_small_step_is_said_to_be_unchecked(
    bench, command, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench("gpu.sanitizer"), "installed", lambda: None)
    found = command.PARTS["small_step"](command.Stages(tmp_path / "build", []))
    assert found == {"status": "not run", "reason": "compute-sanitizer is not installed here"}


@pytest.mark.parametrize("short", ["ok", "failed", None])
def test_the_rest_leaves_out_what_the_second_stage_has_measured(
    command, tmp_path, monkeypatch, short
):
    stages = command.Stages(tmp_path / "build", [])
    stages.limit = 60.0

    def answer(line):
        folder = tmp_path / "build" / ("short" if "gpu-short" in line else "step")
        folder.mkdir(exist_ok=True)
        results = {"cases": [], "skipped": [], "targets": [], "lost": []}
        (folder / "step.json").write_text(json.dumps(results))
        return 0, ""

    lines = answering(stages, monkeypatch, answer)
    command.PARTS["short"](stages)
    if short is not None:
        stages.results["stages"]["short"] = {"status": short}
    command.PARTS["step"](stages)
    presets = [line[line.index("--preset") + 1] for line in lines]
    assert presets == ["gpu-short", "gpu-rest" if short == "ok" else "gpu"]
    assert {"short", "step"} <= stages.results.keys()


def test_cases_of_the_second_stage(bench):
    step, workload = bench("step"), bench("workload")
    cases = step.PRESETS["gpu-short"]()
    assert [(case.name, len(case.shapes)) for case in cases] == [
        ("adamw-float32-256Mi", 1), ("llava7b-lora16", 448), ("tiny448-warm", 448)
    ]  # fmt: skip
    for case in cases:
        for backend in ("dgg cpp", "dgg triton"):
            taken = {setting.name for name, setting in case.runs if name == backend}
            assert {"plain", "clipped", "guided", "replay"} <= taken
    short, rest = ({c.name: set(c.runs) for c in step.PRESETS[preset]()}
                   for preset in ("gpu-short", "gpu-rest"))  # fmt: skip
    for case in step.PRESETS["gpu"]():
        # Together they have all that there is; twice, what is divided by alone.
        done = short.get(case.name, set())
        assert set(case.runs) <= done | rest[case.name]
        assert {name for name, _ in done & rest[case.name]} <= {"torch fused"}
    assert ("dgg cpp", workload.PLAIN) not in rest["llava7b-lora16"]


# -- the checks of the first stage ----------------------------------------------------------------


@pytest.fixture
def checks(bench):
    return bench("gpu.checks")


def here(bench, checks, device=None):
    return checks.Where(device or bench("machine").open_device("cpu"), [(65,), (3, 5)], [(8,)] * 5)


@pytest.mark.usefixtures("quick_interpreter")
def test_checks_on_the_cpu(bench, checks, monkeypatch):
    monkeypatch.setattr(checks, "REPEATS", 2)
    kept = []
    where = here(bench, checks)
    missing = unavailable("triton", where.device.device)
    found = checks.run(where, lambda results: kept.append(json.loads(json.dumps(results))))
    assert list(found) == list(checks.checks()) and kept[-1] == found
    for name, result in found.items():
        possible = name.startswith(("reference", "same bits", "agree"))
        possible = possible and not (missing and "triton" in name)
        assert result["status"] == ("ok" if possible else "not run"), (name, result)
    # Of a process that ends in a check the results say in which.
    begun = next(results["graphs, cpp"] for results in kept if "graphs, cpp" in results)
    assert begun == {"status": "failed", "seen": "the process ended in it", "seconds": 0.0}
    assert "| same bits, cpp " in checks.results_table(found)


class Counting:
    """A device whose profile has as many launches as the test says."""

    name = "cuda"

    def __init__(self, kernels, device, waits=None):
        self.device, self._kernels, self._waits = device, kernels, waits

    def profile(self, calls):
        for prepare, call in calls:
            prepare()
            call()
        return [self._kernels(2), self._kernels(self.launched)]

    def waits(self, function):
        function()
        return self._waits

    def lost(self):
        return None


def test_checks_find_what_is_wrong(bench, checks, monkeypatch):
    machine = bench("machine")
    cpu = torch.device("cpu")

    def kernels(number):
        return machine.Kernels(0.0, number, 0, {"norms": (number, 0.0)})

    device = Counting(kernels, cpu)
    where = here(bench, checks, device)
    device.launched = checks.LAUNCHES
    assert checks.launches("cpp", where) == f"{checks.LAUNCHES} for 5 tensors"
    device.launched += 1
    with pytest.raises(checks.Broken, match=f"{checks.LAUNCHES + 1}, not {checks.LAUNCHES}: norms"):
        checks.launches("cpp", where)
    assert checks.no_wait("cpp", where) == "4 settings"
    device._waits = "called a synchronizing operation"
    with pytest.raises(checks.Broken, match="a plain step waits: called a synchronizing"):
        checks.no_wait("cpp", where)
    # Steps that differ from run to run, and backends from each other.
    taken = checks._steps
    bias = iter(range(100))

    def drifting(*arguments):
        return [x + 1e-3 * next(bias) for x in taken(*arguments)]

    monkeypatch.setattr(checks, "_steps", drifting)
    monkeypatch.setattr(checks, "BACKENDS", ("cpp", "reference"))
    with pytest.raises(checks.Broken, match="differs from the first"):
        checks.same_bits("cpp", where)
    with pytest.raises(checks.Broken, match="what is allowed apart"):
        checks.agree(where)
    results = checks.run(where, lambda results: None)
    assert results["same bits, cpp"]["status"] == "failed"
    assert results["reference, cpp"]["status"] == "ok"


def test_backends_that_leave_no_numbers_do_not_agree(bench, checks, monkeypatch):
    def steps(where, backend, setting, count):
        return [torch.full((3,), 1.0 if backend == "cpp" else torch.nan)]

    monkeypatch.setattr(checks, "_steps", steps)
    with pytest.raises(checks.Broken, match="inf times what is allowed apart"):
        checks.agree(here(bench, checks))


def test_a_check_that_loses_the_device_ends_the_process(bench, checks, monkeypatch):
    class Ended(BaseException):
        pass

    def leave(code):
        raise Ended(code)

    device = Counting(None, torch.device("cpu"))
    device.lost = lambda: "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(checks, "checks", lambda: {"broken, cpp": lambda where: 1 / 0})
    kept = []
    with pytest.raises(Ended, match=str(bench("gpu.witness").LOST)):
        checks.run(here(bench, checks, device), lambda results: kept.append(dict(results)))
    assert kept[-1]["broken, cpp"]["seen"] == "ZeroDivisionError: division by zero"


@pytest.mark.usefixtures("quick_interpreter")
def test_graphs_and_waits_are_checked_on_the_stand_in(bench, checks, monkeypatch):
    if (reason := unavailable("triton", torch.device("cpu"))) is not None:
        pytest.skip(f"no Triton here: {reason}")
    with monkeypatch.context() as patch, gpu_stand_in.StandIn(patch) as gpu:

        class Device(Counting):
            def synchronize(self):
                gpu.wait("synchronize()")

            def waits(self, function):
                before = len(gpu.waits)
                function()
                return ", ".join(gpu.waits[before:]) or None

        where = here(bench, checks, Device(None, gpu_stand_in.DEVICE))
        assert checks.graphs("triton", where) == f"{checks.REPLAYS} replays"
        # A replay that leaves something out shows.
        with monkeypatch.context() as broken:
            replay = gpu_stand_in.Graph.replay
            seen = iter(range(100))
            broken.setattr(
                gpu_stand_in.Graph, "replay", lambda graph: next(seen) == 3 or replay(graph)
            )
            with pytest.raises(checks.Broken, match="other bits"):
                checks.graphs("triton", where)


def test_results_say_which_sources_they_are_of(bench, command, tmp_path):
    stages = command.Stages(tmp_path / "build", [], commit="abc")
    assert stages.results["commit"] == "abc"
    digest = bench("gpu.sources").sources_digest()
    assert stages.results["sources"] == digest and digest
