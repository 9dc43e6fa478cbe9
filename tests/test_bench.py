# SPDX-License-Identifier: BSD-3-Clause
"""The step benchmark: its JSON, its arithmetic, and that nothing wrong is ever timed."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest
import torch

BENCH = pathlib.Path(__file__).parents[1] / "bench"

ENTRY = {
    "name": str, "setting": str, "seconds": float, "low": float, "high": float, "mean": float,
    "samples": int, "ns_per_element": float, "seed": int, "injected_fraction": float,
    "error_in_tolerances": float,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """Imports modules of bench/, which is no package, as step.py itself does."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of the smallest preset in a process of its own."""
    out = tmp_path_factory.mktemp("bench")
    options = ["--preset", "smoke", "--only", "float32-1e3", "--threads", "1", "--out", str(out)]
    command = [sys.executable, str(BENCH / "step.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("step-cpu-*.json")
    return json.loads(path.read_text()), done.stdout, out


def test_results_have_the_documented_fields(smoke):
    results, _, _ = smoke
    assert results["schema"] == 1
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


def _variant(bench, name, setting, shapes=((300,), (7, 11))):
    workload, peers = bench("workload"), bench("peers")
    work = workload.Workload(list(shapes), torch.float32, "adamw", torch.device("cpu"))
    return work, peers.IMPLEMENTATIONS[name](work, setting), workload.Verifier(work)


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
        _, variant, verifier = _variant(bench, name, bench("workload").sampled(alpha))
    except bench("peers").Unavailable as reason:
        pytest.skip(str(reason))
    assert bench("round_robin").verify(variant, verifier) <= 1
    assert variant.verified


@pytest.mark.parametrize("mistake", ["no guidance", "scale", "clip"])
def test_wrong_variant_is_refused(bench, mistake):
    workload = bench("workload")
    work, variant, verifier = _variant(bench, "foreach + fused", workload.GUIDED)
    right = variant.step
    if mistake == "no guidance":
        variant.step = lambda inject: right(False)
    elif mistake == "scale":
        variant._differences = lambda p, a: torch._foreach_sub(a, p)
    else:
        variant._max_norm *= 1.01
    with pytest.raises(workload.VerificationError, match="foreach"):
        bench("round_robin").verify(variant, verifier)
    assert not variant.verified


def test_unverified_variant_is_not_timed(bench):
    robin = bench("round_robin")
    work, variant, _ = _variant(bench, "torch fused", bench("workload").PLAIN)
    before = [p.clone() for p in work.params]
    with pytest.raises(robin.NotVerified, match="torch fused"):
        robin._Timed(variant, 0.0).run(bench("machine").open_device("cpu"))
    assert all(map(torch.equal, before, work.params))


def test_wrong_variant_ends_the_run(bench, capsys, monkeypatch):
    step, peers = bench("step"), bench("peers")
    wrong = lambda self, params, anchors: torch._foreach_sub(anchors, params)  # noqa: E731
    monkeypatch.setattr(peers.ForeachGuidance, "_differences", wrong)
    assert step.main(["--preset", "smoke", "--only", "tiny"]) == 1
    assert "foreach + fused (guided)" in capsys.readouterr().err


def test_variants_on_shared_memory_have_their_own_version_counters(bench):
    work, variant, _ = _variant(bench, "torch fused", bench("workload").PLAIN)
    other = work.parameters()
    before = other[0]._version
    variant()
    assert other[0].data_ptr() == variant.params[0].data_ptr()
    assert other[0]._version == before


def test_draws_of_the_window(bench):
    peers = bench("peers")
    for alpha in (0.05, 0.1, 0.2):
        seed = peers.choose_seed(alpha, 100)
        assert sum(peers.injections(seed, alpha, 100)) == round(100 * alpha)
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
        work, variant, _ = _variant(bench, name, setting)
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
    report = bench("step_report")
    case = {"case": "adamw-float32-32Mi", "variants": []}
    times = {("dgg cpp", "plain"): 0.95, ("dgg cpp", "guided"): 1.2, ("dgg cpp", "alpha=0.2"): 1.0,
             ("torch fused", "plain"): 1.0, ("torch fused", "clipped"): 1.5,
             ("foreach + fused", "guided"): 6.0}  # fmt: skip
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
    found = report.targets([case], [])
    assert len(found) == 7 and all(t["met"] for t in found)
    case["variants"][0]["seconds"] = 1.01
    assert [t["met"] for t in report.targets([case], [])].count(False) == 1
    assert "NO" in report.targets_table(report.targets([case], []), markdown=False)
    assert report.losses(case) == [
        "LOST: dgg cpp (plain) takes 1.01 x the time of torch fused (plain)"
    ]
