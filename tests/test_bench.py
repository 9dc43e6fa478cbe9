# SPDX-License-Identifier: BSD-3-Clause
"""The step benchmark: its JSON, its arithmetic, and that nothing wrong is ever timed."""

import copy
import dataclasses
import gc
import gzip
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import types
import weakref

import pytest
import torch

BENCH = pathlib.Path(__file__).parents[1] / "bench"

ENTRY = {
    "name": str, "setting": str, "seconds": float, "low": float, "high": float, "mean": float,
    "samples": int, "ns_per_element": float, "seed": int, "injected_fraction": float,
    "error_in_tolerances": float,
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of the smallest preset in a process of its own."""
    out = tmp_path_factory.mktemp("bench")
    options = ["--preset", "smoke", "--only", "float32-1e3", "--threads", "1", "--out", str(out)]
    command = [sys.executable, str(BENCH / "step.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("step-cpu-*.json")
    return json.loads(path.read_text()), done.stdout, out


def test_results_have_the_documented_fields(smoke):
    results, _, _ = smoke
    assert results["schema"] == 2
    known = ["cpu", "cores", "threads", "torch", "dgg", "compiler", "commit", "date"]
    assert {*known, "load_average"} <= results["provenance"].keys()
    assert results["provenance"]["threads"] == results["settings"]["threads"] == 1
    assert {c["optimizer"] for c in results["cases"]} == {"adamw", "sgd", "momentum"}
    for case in results["cases"]:
        assert case["elements"] == 1000 and case["tensors"] == 1 and case["rounds"] > 0
        for entry in case["variants"]:
            for name, kind in ENTRY.items():
                assert isinstance(entry[name], kind), (entry["name"], name)
            assert 0 < entry["low"] <= entry["seconds"] <= entry["high"]
            assert entry["error_in_tolerances"] <= 1
        assert any(entry["name"] == "torch fused" for entry in case["variants"])
        for missing in case["not_run"]:
            assert missing["reason"]


def test_table_is_printed_and_written(smoke):
    results, printed, out = smoke
    assert "torch fused" in printed and "ns/elem" in printed
    (page,) = out.glob("step-cpu-*.md")
    for case in results["cases"]:
        assert case["case"] in printed and case["case"] in page.read_text()


def _variant(bench, name, setting, shapes=((300,), (7, 11)), **more):
    workload, peers = bench("workload"), bench("peers")
    work = workload.Workload(
        list(shapes), torch.float32, "adamw", torch.device("cpu"), replay=setting.replay, **more
    )
    return work, peers.IMPLEMENTATIONS[name](work, setting)


@pytest.mark.parametrize(
    "name",
    [
        "dgg cpp", "dgg reference", "for-loop", "foreach + fused", "foreach + fused, d kept",
        "foreach + clip_grad_norm_ + fused",
    ],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_guided_variants_pass_their_verification(bench, name, alpha):
    try:
        _, variant = _variant(bench, name, bench("workload").sampled(alpha))
    except bench("variant").Unavailable as reason:
        pytest.skip(str(reason))
    assert bench("timing").verify(variant) <= 1
    assert variant.verified


REPLAYED = {
    "dgg cpp": ["GUIDED", "REPLAY", "REPLAY_CLIPPED", "REPLAY_GUIDED"],
    "dgg cpp, replay() timed": ["REPLAY", "REPLAY_CLIPPED", "REPLAY_GUIDED"],
    "dgg reference": ["GUIDED", "REPLAY", "REPLAY_CLIPPED", "REPLAY_GUIDED"],
    "dgg Guidance + torch fused": ["CLIPPED", "GUIDED", "REPLAY", "REPLAY_GUIDED"],
    "add + torch fused": ["REPLAY", "REPLAY_CLIPPED"],
    "add + torch fused, foreach clip": ["REPLAY_CLIPPED"],
    "foreach + fused": ["GUIDED", "REPLAY_CLIPPED", "REPLAY_GUIDED"],
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name, every in REPLAYED.items() for setting in every]
)
def test_replaying_variants_pass_their_verification(bench, name, setting, channels_last):
    shapes = [(3, 4, 2, 2), (5, 2, 1, 3)] if channels_last else [(300,), (7, 11)]
    try:
        work, variant = _variant(
            bench, name, getattr(bench("workload"), setting), shapes, channels_last=channels_last
        )
    except bench("variant").Unavailable as reason:
        pytest.skip(str(reason))
    everything = [*work.params, *work.grads, *work.anchors, *work.replays, *sum(work.moments, [])]
    assert all(x.is_contiguous() != channels_last for x in everything)
    assert bench("timing").verify(variant) <= 1
    assert variant.verified and (variant.bytes_moved() or 0) >= 0
    # Whoever was timed finds the gradients again, and waiting replay gradients at every step.
    variant.ready()
    assert all(map(torch.equal, work.grads, work.pristine))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("add + torch fused", "REPLAY"), ("add + torch fused", "REPLAY_CLIPPED"),
        ("foreach + fused", "REPLAY_GUIDED"), ("dgg cpp", "REPLAY"), ("dgg cpp", "REPLAY_GUIDED"),
        ("dgg Guidance + torch fused", "REPLAY_CLIPPED"),
    ],
)  # fmt: skip
def test_a_variant_that_leaves_the_replay_gradients_out_is_refused(bench, name, setting):
    workload = bench("workload")
    work, variant = _variant(bench, name, getattr(workload, setting))
    assert bench("timing").verify(variant) <= 1
    # The same memory, but what it takes for the replay gradients are zeros.
    variant.workload = copy.copy(variant.workload)
    variant.workload.replays = list(map(torch.zeros_like, variant.workload.replays))
    with pytest.raises(workload.VerificationError, match="tolerance"):
        workload.check(variant, work, injects=variant.pattern[0])


def test_no_peer_compiles_its_kernels_in_a_benchmark(bench, monkeypatch):
    """It would take minutes, and wait forever for the lock of a compilation once interrupted."""
    builder = pytest.importorskip("deepspeed.ops.op_builder.builder", reason="no DeepSpeed")
    compiled = []
    monkeypatch.setattr(builder.OpBuilder, "jit_load", lambda self, *_: compiled.append(self))
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", {"cpu_adam": False})
    plain = bench("workload").PLAIN
    with pytest.raises(bench("variant").Unavailable, match="DS_BUILD_CPU_ADAM=1"):
        _variant(bench, "DeepSpeedCPUAdam", plain)
    assert not compiled


@pytest.mark.parametrize("mistake", ["no guidance", "scale", "clip"])
def test_wrong_variant_is_refused(bench, mistake):
    workload = bench("workload")
    work, variant = _variant(bench, "foreach + fused", workload.GUIDED)
    right = variant.step
    if mistake == "no guidance":
        variant.step = lambda inject: right(False)
    elif mistake == "scale":
        variant._differences = lambda p, a: torch._foreach_sub(a, p)
    else:
        variant._max_norm *= 1.01
    with pytest.raises(workload.VerificationError, match="foreach"):
        bench("timing").verify(variant)
    assert not variant.verified


def test_unverified_variant_is_not_timed(bench):
    robin = bench("timing")
    work, variant = _variant(bench, "torch fused", bench("workload").PLAIN)
    before = [p.clone() for p in work.params]
    with pytest.raises(robin.NotVerified, match="torch fused"):
        robin.Timed(variant, 0.0).run(bench("machine").open_device("cpu").wall)
    assert all(map(torch.equal, before, work.params))


def test_a_variant_that_is_left_out_lets_go_of_its_memory(bench, monkeypatch):
    """On a full device the next one has no other place for its own."""
    robin, workload = bench("timing"), bench("workload")
    made = []

    class Failing(bench("torch_variants").TorchFused):
        def __init__(self, *arguments):
            gc.collect()
            assert all(former() is None for former in made)
            super().__init__(*arguments)
            made.append(weakref.ref(self))

        def step(self, inject):
            raise torch.OutOfMemoryError("no memory is left")

    names = ("one", "another", "torch fused")
    for name in names[:2]:
        monkeypatch.setitem(robin.IMPLEMENTATIONS, name, Failing)
    case = robin.Case("small", [(3,)], [(name, workload.PLAIN) for name in names], rounds=1)
    found = robin.run_case(case, bench("machine").open_device("cpu"))
    assert len(made) == 2 and [entry["name"] for entry in found["variants"]] == ["torch fused"]


def test_wrong_variant_ends_the_run(bench, capsys, monkeypatch):
    step, variants = bench("step"), bench("torch_variants")
    wrong = lambda self, params, anchors: torch._foreach_sub(anchors, params)  # noqa: E731
    monkeypatch.setattr(variants.ForeachGuidance, "_differences", wrong)
    assert step.main(["--preset", "smoke", "--only", "tiny"]) == 1
    assert "foreach + fused (guided)" in capsys.readouterr().err


def test_variants_on_shared_memory_have_their_own_version_counters(bench):
    work, variant = _variant(bench, "torch fused", bench("workload").PLAIN)
    other = work.parameters()
    before = other[0]._version
    variant()
    assert other[0].data_ptr() == variant.params[0].data_ptr()
    assert other[0]._version == before


def test_draws_of_the_window(bench):
    variants = bench("variant")
    for alpha in (0.05, 0.1, 0.2):
        seed = variants.choose_seed(alpha, 100)
        assert sum(variants.injections(seed, alpha, 100)) == round(100 * alpha)
    # 50 draws cannot be 5 % injections.
    rare = _variant(bench, "foreach + fused", bench("workload").sampled(0.05))[1]
    assert rare.window == 100 and float(rare.share_injected()) == 0.05
    shares = _variant(bench, "foreach + fused", bench("workload").sampled(0.2))[1].shares()
    assert sum(shares.values()) == 1
    assert float(sum(s for (now, _), s in shares.items() if now)) == 0.2


def test_bytes_moved(bench):
    workload = bench("workload")
    expected = {
        ("torch fused", workload.PLAIN): 28,
        ("torch fused", workload.CLIPPED): 40,
        ("dgg reference", workload.GUIDED): None,
        ("foreach + fused", workload.GUIDED): 72,
    }
    for (name, setting), wanted in expected.items():
        work, variant = _variant(bench, name, setting)
        moved = variant.bytes_moved()
        assert (moved if moved is None else moved / work.elements) == wanted


def test_parameter_lists(bench):
    lists = bench("parameter_lists")
    # A [r, in] and B [out, r] of q, k, v, o, gate, up and down in 32 layers.
    per_rank = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    for rank in (16, 64, 128):
        shapes = lists.llava_7b_lora(rank)
        assert len(shapes) == 448 and lists.count(shapes) == rank * per_rank
    assert lists.count(lists.many_tiny()) == 448 * 8


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_one_anchor_and_no_other_temporary(bench):
    found = bench("peak_memory").measure("step", 2**21)
    assert found["met"], found


def test_targets_are_judged(bench):
    report, targets = bench("report"), bench("cpu_targets").targets
    case = {"case": "adamw-float32-32Mi", "elements": 10**9, "variants": [],
            "memory_bandwidth": {"copy": 4e10, "read (a)": 1.5e10, "read (b)": 2.4e10}}  # fmt: skip
    times = {("dgg cpp", "plain"): 0.95, ("dgg cpp", "guided"): 1.2, ("dgg cpp", "alpha=0.2"): 1.0,
             ("torch fused", "plain"): 1.0, ("torch fused", "clipped"): 1.5,
             ("foreach + clip_grad_norm_ + fused", "guided"): 6.0}  # fmt: skip
    for (name, setting), seconds in times.items():
        case["variants"].append(
            {
                "name": name,
                "setting": setting,
                "seconds": seconds,
                "samples": 50,
                "share_of_bandwidth": 0.95,
            }  # fmt: skip
        )
    found = targets([case], [])
    assert len(found) == 8 and all(t["met"] in (True, None) for t in found)
    # 24 bytes of 10**9 elements at 24 GB/s take a second of the peer's six.
    assert [t["measured"] for t in found if t["met"] is None] == ["6.00"]
    case["variants"][0]["seconds"] = 1.01
    assert [t["met"] for t in targets([case], [])].count(False) == 1
    assert "NO" in report.targets_table(targets([case], []), markdown=False)
    assert report.losses(case) == [
        "LOST: dgg cpp (plain) takes 1.01 x the time of torch fused (plain)"
    ]


HOST_TIMES = {
    ("dgg cpp", "plain"): 1.0, ("dgg cpp", "replay"): 1.5, ("dgg cpp", "replay, guided"): 2.5,
    ("add + torch fused", "replay, clipped"): 10.0, ("foreach + fused", "guided"): 8.0,
    ("dgg Guidance + torch fused", "guided"): 2.8,
}  # fmt: skip


def _host_case(name="tiny448-warm"):
    entries = [
        {"name": n, "setting": s, "seconds": seconds, "low": seconds, "high": seconds, "samples": 7}
        for (n, s), seconds in HOST_TIMES.items()
    ]
    return {
        "case": name, "optimizer": "adamw", "dtype": "float32", "elements": 8, "tensors": 448,
        "cache": "warm", "variants": entries, "not_run": [],
    }  # fmt: skip


def test_targets_of_the_host_are_judged(bench):
    targets, case = bench("cpu_targets").targets, _host_case()
    found = targets([case], [])
    assert [t["met"] for t in found] == [True] * 3
    assert [t["target"] for t in found] == ["≤ 1.50", "≤ 0.25", "≤ 0.35"]
    for place in (1, 2, 5):
        case = _host_case()
        case["variants"][place]["seconds"] *= 1.01
        assert [t["met"] for t in targets([case], [])].count(False) == 1
    # A LoRA's time is the memory's, too: its rows are shown without a target.
    assert [t["met"] for t in targets([_host_case("llava7b-lora16")], [])] == [None] * 2


def test_ratios_of_the_host_s_table(bench):
    lines = bench("report").host_table(_host_case(), markdown=False).splitlines()
    # Between the median and the percentiles: to the same code's plain step, to the setting's peer,
    # and to adding, clipping and the fused step one after the other.
    begin, end = lines[1].index("/plain"), lines[1].index("/added") + len("/added")
    ratios = [line[begin:end].split() for line in lines[3:9]]
    ours = [["1.00", "0.10"], ["1.50", "0.15"], ["2.50", "0.25"]]
    assert ratios == [*ours, [], [], ["0.35", "0.28"]]


FIGURES = (
    "seconds", "low", "high", "host_seconds", "device_seconds", "device_low", "device_high",
    "kernel_seconds", "cpu_seconds",
)  # fmt: skip


def _wide_case(bench, device="cpu", peers="peers"):
    """A case with the longest names and large numbers, as `run_case` returns it."""
    names, workload = bench(peers).IMPLEMENTATIONS, bench("workload")
    settings = [value.name for value in vars(workload).values() if type(value) is workload.Setting]
    variants = [
        {
            "name": name, "setting": setting, "samples": 12345, "ns_per_element": 123456.0,
            "bytes_per_element": 132.0, "bandwidth": 4.8e12, "share_of_bandwidth": 0.987,
            "seed": 12345, "injected_fraction": 0.2, "device_late": 0.5, "launches": 1234,
            "waits_for_device": True, "temporary_bytes": 2**34, "collectives_per_step": 123,
            "bytes_per_step": 1234567, **dict.fromkeys(FIGURES, 1.23 + number / 10),
        }
        for number, name in enumerate(["torch fused", "foreach + fused", *names])
        for setting in ("plain", "clipped", "guided", *settings)
    ]  # fmt: skip
    missing = {"name": max(names, key=len), "setting": "guided", "reason": "a long reason, " * 12}
    return {
        "case": "momentum-float16-llava7b-lora128-guidance-channels-last", "optimizer": "momentum",
        "dtype": "float16", "elements": 10**10, "tensors": 448, "cache": "cold", "device": device,
        "profiler": None, "variants": variants, "not_run": [missing], "list": "llava7b-lora128",
        "ranks": 16,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["cpu", "cuda", "host", "sharded"])
def test_no_printed_line_is_longer_than_a_screen(bench, kind, capsys):
    """With the longest names; the ratios stand beside the time, in the first of the tables."""
    report, peers = bench("report"), "sharded_peers" if kind == "sharded" else "peers"
    case = _wide_case(bench, kind if kind == "cuda" else "cpu", peers)
    if kind == "host":
        case["variants"] = [e for e in case["variants"] if e["setting"] in report.PEERS]
    functions = {"host": report.host_table, "sharded": bench("sharded").case_table}
    more = (2,) if kind == "sharded" else ()
    say = report.Printer(markdown=False)
    say(functions.get(kind, report.case_table)(case, *more, markdown=False))
    printed = capsys.readouterr().out
    assert "LOST: " in printed and "not run: " in printed
    assert max(map(len, printed.splitlines())) <= 100
    first, *others = [line for line in printed.splitlines() if line.startswith("variant ")]
    ratios = re.findall(r"/ ?\w+", first)
    assert len(ratios) >= 3, first
    columns = [re.split(r"  +", line)[2:] for line in (first, *others)]
    header = {"cpu": report.HEADER, "cuda": report.GPU_HEADER,
              "sharded": bench("sharded").HEADER}.get(kind)  # fmt: skip
    if header is not None:
        assert sum(columns, []) == [*header[2:]], "a column is lost"
    # Every row stands in every table.
    last = case["variants"][-1]["name"]
    rows = sum(entry["name"] == last for entry in case["variants"])
    assert printed.count(f"\n{last} ") == rows * (1 + len(others))
    whole = functions.get(kind, report.case_table)(case, *more, markdown=True)
    assert whole.count("| variant") == 1


def test_targets_fit_a_screen(bench):
    report = bench("report")
    what = (
        "adamw-bfloat16-32Mi-guidance: auto, times faster than 4 passes of the same rule, by " * 2
    )
    found = [report.target(what, 12.5, most=13.0), report.target("short", 1.0)]
    lines = report.targets_table(found, markdown=False).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) > 4
    assert lines[2].endswith("yes") and lines[-1].startswith("short  ")
    words = " ".join(re.split("  +", line.strip())[0] for line in lines[2:-1])
    assert words == what.strip()
    assert what.strip() in report.targets_table(found, markdown=True)


def test_every_host_case_goes_through(bench):
    """All but the launched steps, which the interpreter of these tests has no use for."""
    step = bench("step")
    cases = step.PRESETS["host"]()
    assert [case.name for case in cases[:3]] == [
        "tiny448-warm", "tiny448-warm-channels-last", "tiny448-warm-launched"
    ]  # fmt: skip
    lists = bench("parameter_lists")
    for case in cases:
        assert lists.count(case.shapes) in (448 * 8, lists.count(lists.llava_7b_lora(16)))
        assert len(case.shapes) == 448
    small = [
        dataclasses.replace(case, shapes=case.shapes[:2] if "tiny" in case.name else [(2, 4, 2, 2)],
                            rounds=3, cold=False, seconds=2.0)
        for case in cases
    ]  # fmt: skip
    say = bench("report").Printer(markdown=False)
    device = bench("machine").open_device("cpu")
    results = step.run(small, device, stream_elements=2**10, say=say, host=True)
    assert [case["case"] for case in results["cases"]] == [case.name for case in cases]
    for case, done in zip(cases, results["cases"], strict=True):
        if "launched" in case.name:
            assert not done["variants"] and len(done["not_run"]) == 6
            assert all("interpreter" in missing["reason"] for missing in done["not_run"])
            continue
        ran = {(entry["name"], entry["setting"]) for entry in done["variants"]}
        assert ran | {(m["name"], m["setting"]) for m in done["not_run"]} == {
            (name, setting.name) for name, setting in case.runs
        }
        assert done["channels_last"] == case.channels_last
        assert ("torch fused", "clipped") in ran and all(
            entry["error_in_tolerances"] <= 1 for entry in done["variants"]
        )
    tables = [text for text in say.lines if "/added" in text]
    assert len(tables) == len(cases) and sum(", channels last\n" in text for text in tables) == 2
    assert max(len(line) for text in tables for line in text.splitlines()) <= 100


def test_a_launched_step_that_starts_something_else_is_not_timed(bench, monkeypatch):
    """The interpreter asks no driver for anything: nothing is started where kernels should be."""
    driver, workload = bench("gpu.launch_driver"), bench("workload")
    if bench("dgg").backends.unavailable("triton", torch.device("cpu")) is not None:
        pytest.skip("no Triton here")
    fake = driver.Driver()
    monkeypatch.setattr(driver, "install", lambda: fake)
    errors = dict.fromkeys((s.name for s in workload.SETTINGS), 0.5)
    monkeypatch.setattr(driver, "interpreted", lambda optimizer, dtype: errors)
    _, variant = _variant(bench, "dgg triton, nothing started", workload.CLIPPED, [(9000,), (3,)])
    with pytest.raises(workload.VerificationError, match=r"starts \[\], not .*'adam_kernel', 3"):
        bench("timing").verify(variant)
    assert not variant.verified

    def step(inject):
        for name in ("adam_kernel", "norms_kernel", "coefficients_kernel"):
            fake.started(name, [3 if name != "coefficients_kernel" else 1, 1, 1], "", ())

    variant.step = step
    assert bench("timing").verify(variant) == 0.5 and variant.verified


@pytest.mark.slow  # kernels are compiled, and interpreted in another process
def test_launched_steps_are_timed(tmp_path):
    options = ["--preset", "host", "--only", "tiny448-warm-launched", "--out", tmp_path]
    printed = run_script("step.py", *options)
    (path,) = tmp_path.glob("step-cpu-*.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert not case["not_run"] and len(case["variants"]) == 6, printed
    assert all(0 < entry["error_in_tolerances"] < 1 for entry in case["variants"])


# -- the GPU's bench, on a device that only says it is one ----------------------------------------


@pytest.fixture
def gpu(bench):
    """A Gpu whose every word to CUDA is answered by the CPU; its times are never stored."""
    machine = bench("machine")

    class Profile:
        def __enter__(self):
            self._real = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self._real.__enter__()
            return self

        def __exit__(self, *error):
            self._real.__exit__(*error)

        def events(self):
            events = list(self._real.events())
            windows = [e.time_range for e in events if e.name.startswith("measured call")]
            kernels = [_kernel("update", w.start + 1, w.start + 4) for w in windows]
            return events + kernels + [_kernel("Memcpy HtoD", w.start, w.end) for w in windows]

    class Simulated(machine.Gpu):
        def __init__(self):
            self.device, self.cache_bytes = torch.device("cpu"), 2**16
            self._sweep, self._host_seconds, self._cycles = torch.zeros(2**14), 1e-4, 1.0

        def _spin(self, seconds):
            assert 0 < seconds <= 5e-2

        def _between(self, function):
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin, False

        def synchronize(self):
            pass

        def release(self):
            pass

        def free_bytes(self):
            return 2**30

        def waits(self, function):
            return function()

        def temporary_bytes(self, function):
            function()
            return 0

        def _profiler(self):
            return Profile()

    return Simulated()


def _kernel(name, start, end):
    device = torch.autograd.DeviceType.CUDA
    span = types.SimpleNamespace(start=start, end=end)
    return types.SimpleNamespace(name=name, device_type=device, time_range=span)


def _shrunk(case):
    """The case with few small tensors, without what takes long to compile or to interpret."""
    shapes = [(min(8, torch.Size(s).numel()),) for s in case.shapes[:6]]
    runs = [run for run in case.runs if run[0] not in ("torch.compile", "dgg triton")]
    return dataclasses.replace(case, shapes=shapes, runs=runs, rounds=5)


def test_every_gpu_case_goes_through(bench, gpu, tmp_path):
    step, report = bench("step"), bench("report")
    cases = [_shrunk(case) for case in step.gpu_cases()]
    assert cases[0].name == "adamw-float32-256Mi" and len({c.name for c in cases}) == len(cases)
    # One of a kind: all settings, a list, a spare one, another optimizer.
    kinds = ("adamw-float32-256Mi", "llava7b-lora16", "llava7b-full-bfloat16", "sgd-bfloat16-256Mi")
    cases = [case for case in cases if case.name in kinds]
    kept, say = [], bench("report").Printer(markdown=True)
    results = step.run(
        cases, gpu, stream_elements=2**10, say=say, keep=lambda r: kept.append(len(r["cases"]))
    )
    assert [case["case"] for case in results["cases"]] == [case.name for case in cases]
    assert kept == [1, 2, 3, 4] and results["skipped"] == []
    for case in results["cases"]:
        assert case["device"] == "cuda" and case["profiler"] is None
        for entry in case["variants"]:
            assert entry["host_seconds"] <= entry["seconds"]
            assert entry["device_low"] <= entry["device_seconds"] <= entry["device_high"]
            assert entry["launches"] == entry["copies"] == 1
            assert entry["kernel_seconds"] == pytest.approx(3e-6)
            assert entry["waits_for_device"] is None and entry["temporary_bytes"] == 0
            if entry["bytes"] is not None:
                assert entry["bandwidth"] * entry["device_seconds"] == pytest.approx(entry["bytes"])
        assert all(missing["reason"] for missing in case["not_run"])
    json.dumps(results)
    page = "\n".join(say.lines)
    assert "dev / clip+fused" in page and "launches" in page
    # alpha = 0.05 counts one step in twenty as injected, however few of them were timed.
    rare = report.find(results["cases"][0], "dgg cpp", "alpha=0.05")
    assert rare["injected_fraction"] == pytest.approx(0.05)


def test_no_case_begins_after_the_deadline(bench, gpu):
    step = bench("step")
    cases = [_shrunk(case) for case in step.gpu_cases()[:2]]
    results = step.run(
        cases,
        gpu,
        stream_elements=2**10,
        say=bench("report").Printer(False),
        deadline=time.perf_counter(),
    )
    assert results["cases"] == []
    assert [s["reason"] for s in results["skipped"]] == ["no time was left for it"] * 2


@pytest.mark.parametrize("broken", ["wrong", "fails"])
def test_a_broken_variant_costs_a_gpu_run_only_itself(bench, gpu, monkeypatch, broken):
    step, variants = bench("step"), bench("torch_variants")

    def differences(self, params, anchors):
        if broken == "fails":
            raise ArithmeticError("no kernel")
        return torch._foreach_sub(anchors, params)

    monkeypatch.setattr(variants.ForeachGuidance, "_differences", differences)
    cases = [_shrunk(case) for case in step.gpu_cases()[:1]]
    say = bench("report").Printer(False)
    results = step.run(cases, gpu, stream_elements=2**10, say=say, keep=lambda r: None)
    (case,) = results["cases"]
    (missing,) = [m for m in case["not_run"] if m["wrong"]]
    assert (missing["name"], missing["setting"]) == ("foreach + fused", "guided")
    assert ("no kernel" if broken == "fails" else "tolerance") in missing["reason"]
    assert any(e["name"] == "dgg cpp" for e in case["variants"])


def test_another_project_s_optimizer_that_differs_is_left_out(bench, gpu, monkeypatch):
    peers, workload = bench("peers"), bench("workload")

    class Foreign(bench("torch_variants").TorchFused):
        name, foreign = "foreign", True

        def step(self, inject):
            pass

    class Behind(Foreign):
        name, foreign, built_on = "behind", False, "foreign"

    monkeypatch.setitem(peers.IMPLEMENTATIONS, "foreign", Foreign)
    monkeypatch.setitem(peers.IMPLEMENTATIONS, "behind", Behind)
    runs = [(name, workload.PLAIN) for name in ("foreign", "behind", "torch fused")]
    case = bench("timing").Case("one", [(9,)], runs, rounds=3)
    found = bench("timing").run_case(case, gpu)
    assert [entry["name"] for entry in found["variants"]] == ["torch fused"]
    assert [entry["name"] for entry in found["not_run"]] == ["foreign", "behind"]
    for entry in found["not_run"]:
        assert "times its tolerance away" in entry["reason"] and not entry["wrong"]
    # Alone it has nobody to blame.
    case = dataclasses.replace(case, runs=runs[1:])
    with pytest.raises(bench("workload").VerificationError):
        bench("timing").run_case(case, gpu)


def test_kinds_of_steps_come_behind_the_step_that_precedes_them(bench):
    workload, peers = bench("workload"), bench("peers")
    work = workload.Workload([(5,)], torch.float32, "adamw", torch.device("cpu"))
    variant = peers.IMPLEMENTATIONS["foreach + fused"](work, workload.sampled(0.2))
    taken = []
    variant.step = taken.append
    assert len(variant.shares()) == 4
    for kind in variant.shares():
        taken.clear()
        variant.approach(kind)
        assert variant.kind() == kind
        assert taken == [variant.pattern[(variant._draw - 1) % variant.window]]


def test_kernels_are_sorted_by_the_call_that_ran_them(bench):
    machine = bench("machine")
    on_host = torch.autograd.DeviceType.CPU

    def host(name, start, end):
        span = types.SimpleNamespace(start=start, end=end)
        return types.SimpleNamespace(name=name, device_type=on_host, time_range=span)

    events = [
        host("measured call 0", 1000.0, 1100.0),
        host("measured call 1", 9000.0, 9100.0),
        host("dgg.norm", 1010.0, 1020.0),
        _kernel("dgg.norm", 1015.0, 1095.0),  # the shadow of a range
        _kernel("norms", 1015.0, 1025.0),
        _kernel("update", 1030.0, 1060.0),
        _kernel("Memcpy HtoD (Pinned -> Device)", 1005.0, 1008.0),
        _kernel("gradients", 5000.0, 5900.0),  # between the calls
        _kernel("update", 9050.0, 9070.0),
        _kernel("update", 9071.0, 9081.0),
    ]
    first, second = machine.kernels_of(events, 2)
    assert (first.launches, first.copies) == (2, 1)
    assert first.seconds == pytest.approx(40e-6)
    assert (second.launches, second.copies) == (2, 0)
    assert second.names == {"update": (2, pytest.approx(30e-6))}


def test_open_device_says_what_is_missing(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU here"):
        bench("machine").open_device("cuda")


def _gpu_entry(name, setting, *, wall, host, device, launches=2, share=None, waits=None):
    return {
        "name": name, "setting": setting, "seconds": wall, "host_seconds": host,
        "device_seconds": device, "launches": launches, "share_of_bandwidth": share,
        "waits_for_device": waits,
    }  # fmt: skip


def _gpu_results():
    def entry(name, setting, device, share=None, **more):
        return _gpu_entry(
            name, setting, wall=device + 1, host=0.5, device=device, share=share, **more
        )

    large = [
        entry("dgg cpp", "plain", 28.0, 0.95), entry("dgg cpp", "guided", 35.0, 0.93),
        entry("dgg cpp", "alpha=0.2", 33.0, 0.91), entry("torch fused", "plain", 28.0),
        entry("torch fused", "clipped", 40.0), entry("torch.compile", "guided", 45.0),
        entry("foreach + clip_grad_norm_ + fused", "guided", 80.0),
    ]  # fmt: skip
    lora = [
        _gpu_entry("dgg cpp", "plain", wall=1.0, host=0.1, device=0.9, launches=1),
        _gpu_entry("dgg cpp", "guided", wall=1.1, host=0.2, device=0.9, launches=2),
        _gpu_entry("torch fused", "plain", wall=3.0, host=0.5, device=0.9, launches=12),
        _gpu_entry("torch fused", "clipped", wall=4.0, host=1.0, device=0.9, launches=30),
        _gpu_entry("foreach + clip_grad_norm_ + fused", "guided", wall=6.0, host=5.0, device=0.9),
    ]
    return [
        {"case": name, "optimizer": "adamw", "elements": elements, "variants": variants}
        for name, elements, variants in (
            ("adamw-float32-256Mi", 2**28, large), ("llava7b-lora16", 4 * 10**7, lora)
        )
    ]  # fmt: skip


def test_gpu_targets_are_judged(bench):
    judge = bench("gpu.targets").gpu_targets
    found = {target["what"]: target for target in judge(_gpu_results())}
    assert all(target["met"] is not False for target in found.values()), found
    judged = [target for target in found.values() if target["met"] is not None]
    # Three ratios and a speed-up, three shares; two ratios, a speed-up, two launch counts; waits.
    assert len(judged) == 3 + 1 + 3 + 2 + 1 + 2 + 1


@pytest.mark.parametrize(
    ("case", "place", "change", "words"),
    [
        (0, 1, {"device_seconds": 36.1}, "guided / torch fused clipped, device"),
        (0, 2, {"device_seconds": 33.7}, "alpha=0.2 / torch fused clipped, device"),
        (0, 5, {"device_seconds": 41.1}, "guided / torch.compile"),
        (0, 6, {"device_seconds": 69.9}, "times faster than foreach"),
        (0, 0, {"share_of_bandwidth": 0.899}, "plain, share of copy"),
        (1, 0, {"host_seconds": 0.151}, "plain / torch fused plain, host"),
        (1, 1, {"host_seconds": 0.31}, "guided / torch fused clipped, host"),
        (1, 1, {"launches": 3}, "guided, kernel launches"),
        (1, 4, {"seconds": 5.4}, "times faster than foreach"),
        (1, 1, {"waits_for_device": "called a synchronizing operation"}, "wait for the device"),
    ],
)
def test_a_missed_gpu_target_shows(bench, case, place, change, words):
    cases = _gpu_results()
    cases[case]["variants"][place].update(change)
    found = bench("gpu.targets").gpu_targets(cases)
    missed = [target["what"] for target in found if target["met"] is False]
    assert len(missed) == 1 and words in missed[0]
    assert "NO" in bench("report").targets_table(found, markdown=True)


def test_gpu_losses_are_named_by_the_clock_that_lost(bench):
    cases = _gpu_results()
    cases[0]["device"] = "cuda"
    cases[0]["variants"][0]["device_seconds"] = 29.0
    assert bench("report").losses(cases[0]) == [
        "LOST: dgg cpp (plain) takes 1.04 x the device time of torch fused (plain)"
    ]


def test_backends_are_compared_where_both_ran(bench):
    cases = _gpu_results()
    table = bench("gpu.targets").backend_table
    assert table(cases, markdown=True) == ""
    twin = {**cases[0]["variants"][0], "name": "dgg triton", "device_seconds": 56.0}
    cases[0]["variants"].append(twin)
    assert "0.50" in table(cases, markdown=True).splitlines()[-1]


# -- training step, profiles, and the one command -------------------------------------------------


def run_script(name, *options, expect=0, timeout=290):
    command = [sys.executable, str(BENCH / name), *map(str, options)]
    environment = {k: v for k, v in os.environ.items() if k not in ("OUT", "TRITON_INTERPRET")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


STAGES = "environment,checks,small_step,short,tests,step,training,sanitizer"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """All of `make gpu` but the build, which takes a minute, and what only a GPU can do."""
    out = tmp_path_factory.mktemp("gpu")
    options = ["--rehearse", "--parts", STAGES, "--out", out, "--build", out / "build"]
    printed = run_script("gpu/run.py", *options)
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), printed, path


@pytest.mark.slow
def test_gpu_command_rehearsed(rehearsed):
    results, printed, path = rehearsed
    assert results["rehearsal"] and list(results["stages"]) == STAGES.split(",")
    for name in ("environment", "checks", "short", "tests", "step", "training"):
        assert results["stages"][name]["status"] == "ok", results["stages"][name]
    for name in ("sanitizer", "small_step"):
        assert results["stages"][name]["status"] in ("not run", "ok")
    assert results["checks"]["same bits, cpp"]["status"] == "ok"
    assert all(results[name]["cases"] for name in ("short", "step", "training"))
    assert "rehearsal" in path.with_suffix(".md").read_text()
    assert path.with_name("gpu.log").exists() and "| step | ok |" in printed
    assert "PytestUnknownMarkWarning" not in printed


@pytest.mark.slow
def test_training_step_on_a_cpu(rehearsed):
    results, printed = rehearsed[0]["training"], rehearsed[1]
    assert [case["case"] for case in results["cases"]] == ["lora2", "full-2-layers"]
    for case in results["cases"]:
        assert case["case"] in printed
        names = [(entry["name"], entry["alpha"]) for entry in case["variants"]]
        assert names[:2] == [
            ("torch fused + clip", None), ("foreach guidance + clip + torch fused", 0.2)
        ]  # fmt: skip
        for entry in case["variants"]:
            assert 0 < entry["optimizer_seconds"] < entry["seconds"]
            assert entry["optimizer_share"] == pytest.approx(
                entry["optimizer_seconds"] / entry["seconds"]
            )
            # Two blocks; the host's memory is no device's.
            assert entry["samples"] in (10, 20) and entry["peak_bytes"] is None
    # A block of a LoRA has A and B of seven linear layers.
    assert results["cases"][0]["tensors"] == 2 * 7 * 2


def test_variants_of_the_training_step_compute_the_same(bench):
    """From the same weights, on the same data, guided at the same steps."""
    training, shaped = bench("training_step"), bench("llava_shaped")
    device = bench("machine").open_device("cpu")
    wanted, _ = training.variants(device, 5)
    wanted = [variant for variant in wanted if "triton" not in variant.name]
    finals = {}
    for variant in wanted:
        if variant.alpha == 0.05:
            continue
        model = shaped.make(shaped.TINY, device.device, torch.float64, None)
        data = shaped.batch(shaped.TINY, device.device, torch.float64, 8)
        times, _ = training.train(model, data, variant, device)
        injected, plain = len(times.get(True, ())), len(times[False])
        assert (injected, plain) == ((1, 4) if variant.alpha else (0, 5))
        finals[variant.name] = [p.detach() for p in model.parameters()]
    eager = finals.pop("foreach guidance + clip + torch fused")
    unguided = finals.pop("torch fused + clip")
    assert finals, "no backend of dgg ran"
    for mine in finals.values():
        torch.testing.assert_close(mine, eager, rtol=1e-7, atol=1e-9)
        assert not torch.allclose(mine[0], unguided[0], rtol=1e-4, atol=0)


def test_a_broken_variant_costs_a_training_run_only_itself(bench):
    training, shaped = bench("training_step"), bench("llava_shaped")

    def broken(params, alpha, seed):
        raise ArithmeticError("no kernel")

    model = training.Model("tiny", shaped.TINY, 2, text=8, dtype=torch.float32)
    wanted = [
        training.Variant("broken", broken, None, 2),
        training.Variant("torch fused + clip", training._torch_fused, None, 2),
    ]
    device = bench("machine").open_device("cpu")
    found = training.run_model(model, device, wanted, lambda line: None)
    assert [entry["name"] for entry in found["variants"]] == ["torch fused + clip"]
    (missing,) = found["not_run"]
    assert missing["wrong"] and missing["reason"] == "ArithmeticError: no kernel"


def test_training_times_are_weighed_by_alpha(bench):
    training = bench("training_step")
    variant = training.Variant("v", None, 0.2, 5)
    blocks = [{True: [(3.0, 2.0)], False: [(1.0, 0.5)] * 4}, {False: [(1.0, 0.5)] * 5}]
    entry = training.summary(variant, blocks, {"peak": 7, "steady": 5})
    assert entry["seconds"] == pytest.approx(0.2 * 3 + 0.8)
    assert entry["optimizer_seconds"] == pytest.approx(0.2 * 2 + 0.8 * 0.5)
    assert (entry["samples"], entry["peak_bytes"]) == (10, 7)


def test_full_fine_tuning_is_cut_to_the_memory(bench):
    fitting, full = bench("training_step").fitting, bench("llava_shaped").Shape()
    assert fitting(140 * 2**30) == full
    shape = fitting(40 * 2**30)
    assert 1 < shape.layers < 32 and shape.parameters() * 14 <= 0.9 * 40 * 2**30
    assert fitting(0).layers == 1


def test_lists_are_those_of_the_model(bench):
    """The parameter lists of step.py are what the model of training_step.py trains."""
    lists, shaped = bench("parameter_lists"), bench("llava_shaped")
    with torch.device("meta"):
        model = shaped.LlavaShaped(shaped.Shape())
        shapes = sorted(tuple(p.shape) for p in model.parameters())
        assert shapes == sorted(lists.llava_7b_full())
        assert sum(p.numel() for p in model.parameters()) == shaped.Shape().parameters()
        for module in model.modules():
            if isinstance(module, shaped.Linear):
                module.add_lora(16)
    factors = [tuple(p.shape) for n, p in model.named_parameters() if "lora" in n]
    assert sorted(factors) == sorted(lists.llava_7b_lora(16))


def test_profile_on_a_cpu(tmp_path):
    printed = run_script("gpu/nsys_step.py", "--launch", "--shape", "tiny", "--out", tmp_path)
    # What is done, how far it is, and where the result goes, before it is there.
    trace = tmp_path / "step-trace.json.gz"
    told = printed[: printed.index("| range")].splitlines()
    for line in (
        "no GPU here: torch.profiler",
        f"profiling with torch.profiler; the trace goes to {trace}",
        "building the model: shape tiny, LoRA of rank 16, on cpu",
        "warm-up: step 1 of 10", "warm-up: step 10 of 10",
        "torch.profiler records: a step that is thrown away",
        "torch.profiler records: step 3 of 3", f"writing {trace}",
    ):  # fmt: skip
        assert line in told, printed
        told = told[told.index(line) :]
    for name in ("dgg.step", "dgg.norm", "dgg.update"):
        assert f"| {name} " in printed, printed
    assert str(trace) in printed and 0 < trace.stat().st_size < 16 * 2**20
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))[
        "traceEvents"]}  # fmt: skip
    assert {"dgg.step", "dgg.norm", "dgg.update"} <= names


def test_nsys_captures_the_measured_steps_alone(bench, monkeypatch, capsys):
    nsys = bench("gpu.nsys_step")
    taken = []
    training = types.SimpleNamespace(step=lambda: taken.append("step"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: taken.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: taken.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: taken.append("stop"))
    nsys.under_nsys(training, 2)
    assert taken == ["step"] * nsys.WARM_UP + ["wait", "start", "step", "step", "wait", "stop"]
    told = capsys.readouterr().out.splitlines()
    assert told[-2:] == ["nsys records: step 1 of 2", "nsys records: step 2 of 2"]


def test_nsys_is_called_with_a_capture_range_and_its_failure_is_survived(
    bench, monkeypatch, tmp_path, capsys
):
    nsys = bench("gpu.nsys_step")
    fake = tmp_path / "nsys"
    fake.write_text(f'#!/bin/sh\necho "$DGG_NVTX $@" >> {tmp_path}/calls\nexit 3\n')
    fake.chmod(0o755)
    assert not nsys.launch(str(fake), tmp_path, ["--alpha", "0.5"])
    call = (tmp_path / "calls").read_text()
    assert call.startswith("1 profile -t cuda,nvtx,osrt --capture-range=cudaProfilerApi")
    assert "--capture-range-end=stop" in call and call.rstrip().endswith("--captured --alpha 0.5")
    printed = capsys.readouterr().out
    assert "torch.profiler instead" in printed
    assert f"the report goes to {tmp_path / 'step.nsys-rep'}" in printed
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = profile ] && touch {tmp_path}/step.nsys-rep\n'
        f'echo "$@" >> {tmp_path}/calls\n'
    )
    assert nsys.launch(str(fake), tmp_path, [])
    assert (
        "stats --force-export=true --report cuda_gpu_kern_sum" in (tmp_path / "calls").read_text()
    )


def test_profile_tables_sort_kernels(bench):
    nsys = bench("gpu.nsys_step")
    on_host = torch.autograd.DeviceType.CPU

    def host(name, start, end, kernels=()):
        return types.SimpleNamespace(
            name=name, device_type=on_host, time_range=types.SimpleNamespace(start=start, end=end),
            kernels=[types.SimpleNamespace(name=kernel) for kernel in kernels],
        )  # fmt: skip

    events = [
        host("aten::mm", 0, 10, ["gemm"]),
        host("dgg.step", 20, 60),
        host("dgg.update", 30, 50, ["adam"]),
        _kernel("gemm", 5, 500),
        _kernel("adam", 600, 2600),
        _kernel("dgg.update", 600, 2600),
    ]
    ranges, own, others = nsys.tables(events, 2).split("\n\n")
    assert "dgg.step" in ranges and "0.0200" in ranges
    assert "adam" in own and "1.0000" in own and "gemm" not in own
    assert "gemm" in others and "adam" not in others and "dgg.update" not in own + others


def test_gpu_command_without_a_gpu_says_so(tmp_path):
    printed = run_script("gpu/run.py", "--build", tmp_path / "build", "--out", tmp_path, expect=2)
    assert "no GPU here that torch can use" in printed
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture
def stages(bench, tmp_path):
    return bench("gpu.run").Stages(tmp_path / "build", [tmp_path], budget=100, rehearsal=True)


def test_a_failing_stage_stops_nothing(bench, stages, tmp_path):
    gpu = bench("gpu.stages")
    begun = []

    def failing(stages):
        begun.append("failing")
        raise gpu.Failed("the compiler said no")

    def broken(stages):
        begun.append("broken")
        raise ZeroDivisionError("division")

    stages.run("build", failing, ["step"])
    stages.run("tests", broken, ["step"])
    stages.run("step", lambda stages: {"summary": "fine"}, [])
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["stages"]
    assert begun == ["failing", "broken"]
    assert found["build"]["reason"] == "the compiler said no"
    assert found["tests"]["reason"] == "ZeroDivisionError: division"
    assert found["step"]["status"] == "ok"


def test_a_stage_leaves_time_for_those_behind_it(bench, stages):
    limits = []
    kept = sum(bench("gpu.run").LIMITS[name][1] for name in ("step", "training"))
    stages.end = time.monotonic() + kept + 50
    stages.run("tests", lambda stages: limits.append(stages.limit) or {}, ["step", "training"])
    assert limits[0] == pytest.approx(50, abs=2)
    stages.end = time.monotonic() + 1
    stages.run("step", lambda stages: limits.append(0) or {}, [])
    assert stages.results["stages"]["step"]["status"] == "not run" and len(limits) == 1


def test_a_command_is_stopped_at_its_limit_with_its_children(stages, tmp_path):
    begin = time.monotonic()
    code, output = stages.command(
        ["sh", "-c", f"echo begun; (sleep 3; touch {tmp_path}/late) & sleep 60"], limit=1
    )
    assert code is None and output == "begun\n" and time.monotonic() - begin < 20
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_the_repository_root_is_on_no_path_of_a_stage(stages):
    code, output = stages.command([sys.executable, "-c", "import sys; print(sys.path)"], limit=60)
    assert code == 0 and repr(str(BENCH.parent)) not in output


def test_device_names_make_file_names(bench):
    slug = bench("gpu.stages").slug
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA GeForce RTX 4090") == "rtx-4090"
    assert slug("AMD Instinct MI300X") == "amd-instinct-mi300x"


# -- the tests for a GPU, on the CPU --------------------------------------------------------------


# Keeps the first, the middle and the last case of every test.
SOME = """
import sys, pytest

class Some:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        cases = {}
        for item in items:
            cases.setdefault(item.originalname, []).append(item)
        chosen = {id(every[i]) for every in cases.values() for i in (0, len(every) // 2, -1)}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
        items[:] = [item for item in items if id(item) in chosen]

sys.exit(pytest.main(sys.argv[1:], plugins=[Some()]))
"""
EVERY = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.parametrize("which", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)],
                         ids=["some", "every"])  # fmt: skip
def test_gpu_tests_run_on_the_cpu(which):
    """Their bodies, on the CPU's kernels: a mistake in them is no surprise on a GPU."""
    environment = {**os.environ, "DGG_GPU_TESTS_ON": "cpu"}
    tests = pathlib.Path(__file__).parent / "test_gpu.py"
    command = [
        sys.executable, "-c", which, str(tests), "-q", "-p", "no:cacheprovider", "-k", "cpp",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, cwd=tests.parent
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(re.findall(r"(\d+) passed", done.stdout)[-1])
    assert passed >= (20 if which is SOME else 60), done.stdout[-4000:]
