# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of sharded steps: its JSON, its counts of collectives.

No test looks at how long anything took.
"""

import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without torch.distributed or gloo", allow_module_level=True)

# Whichever test comes first waits for the run of the benchmark.
pytestmark = pytest.mark.timeout(600)

BENCH = pathlib.Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One real run on two ranks, in processes of its own."""
    out = tmp_path_factory.mktemp("sharded")
    options = ["--quick", "--rounds", "7", "--seconds", "3", "--out", str(out)]
    command = [sys.executable, str(BENCH / "sharded.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("sharded-cpu-*.json")
    return json.loads(path.read_text()), done.stdout, out


def entry_of(case, name, setting):
    (found,) = [e for e in case["variants"] if (e["name"], e["setting"]) == (name, setting)]
    return found


def test_results_have_the_documented_fields(quick, bench):
    results, _, _ = quick
    assert results["schema"] == 1 and results["complete"]
    known = {"cpu", "cores", "torch", "dgg", "commit", "date", "load_average", "load_average_after"}
    assert known <= results["provenance"].keys()
    assert results["settings"]["ranks"] == [2] and results["settings"]["threads_per_rank"] == 1
    assert [case["case"] for case in results["cases"]] == ["tiny6-2", "tiny12-2"]
    runs = {(name, setting.name) for name, setting in bench("sharded_peers").RUNS}
    for case in results["cases"]:
        assert case["ranks"] == 2 and case["rounds"] >= 7 and case["placements"] == "Shard(0)"
        assert case["tensors"] == int(case["list"].removeprefix("tiny"))
        absent = {(missing["name"], missing["setting"]) for missing in case["not_run"]}
        assert all(missing["reason"] for missing in case["not_run"])
        assert {(e["name"], e["setting"]) for e in case["variants"]} == runs - absent
        # Nothing of torch's is ever absent.
        assert {name for name, _ in absent} <= {"dgg cpp"}
        for entry in case["variants"]:
            assert 0 < entry["fastest"] <= entry["low"] <= entry["seconds"] <= entry["high"]
            assert len(entry["seconds_by_rank"]) == 2
            assert entry["seconds"] == max(entry["seconds_by_rank"])
            assert entry["cpu_seconds"] > 0 and entry["process_seconds"] > 0
            assert entry["samples"] >= 7
            assert 0 <= entry["error_in_tolerances"] <= 1
            assert sum(c["share"] for c in entry["collectives"]) == pytest.approx(1)


@pytest.mark.parametrize("place", [0, 1])
def test_collectives_are_counted(quick, place):
    case = quick[0]["cases"][place]
    tensors = case["tensors"]

    def counted(name, setting):
        entry = entry_of(case, name, setting)
        return [(c["count"], c["bytes"]) for c in entry["collectives"]]

    for name in ("torch fused", "torch foreach", "torch for-loop", "by hand on shards"):
        assert counted(name, "plain") == [(0, 0)]
    # clip_grad_norm_ reduces the float32 norms of all tensors of a mesh at once.
    for name in ("torch fused", "torch foreach", "torch for-loop", "torch fused, foreach clip"):
        assert counted(name, "clipped") == [(1, 4 * tensors)]
    assert counted("foreach guidance", "guided") == [(2, 2 * 4 * tensors)]
    assert counted("by hand on shards", "guided") == [(1, 2 * 8)]
    for entry in case["variants"]:
        for found in entry["collectives"]:
            assert sum(found["operations"].values()) == found["count"] >= found["asynchronous"]


@pytest.mark.parametrize("place", [0, 1])
def test_our_collectives_are_as_few_as_promised(quick, place):
    case = quick[0]["cases"][place]
    if case["not_run"]:
        pytest.skip(case["not_run"][0]["reason"])
    plain, clipped, guided, sampled = (
        entry_of(case, "dgg cpp", s) for s in ("plain", "clipped", "guided", "alpha=0.2")
    )
    assert [c["count"] for c in plain["collectives"]] == [0]
    assert [c["count"] for c in clipped["collectives"]] == [1]
    assert [c["count"] for c in guided["collectives"]] == [1]
    # All four kinds: injects or not, and the next step or not.
    kinds = {(c["injects"], c["next_injects"]): c["count"] for c in sampled["collectives"]}
    assert len(kinds) == 4 and set(kinds.values()) == {1}
    assert sampled["injected_fraction"] == pytest.approx(0.2)
    for entry in (clipped, guided, sampled):
        # Float64 squares: their number does not grow with that of the tensors.
        assert all(c["bytes"] % 8 == 0 and c["bytes"] <= 3 * 8 for c in entry["collectives"])


def test_tables_and_targets_are_printed_and_written(quick):
    results, printed, out = quick
    (page,) = out.glob("sharded-cpu-*.md")
    for words in ("tiny6 on 2 ranks", "/ clip+fused", "collectives"):
        assert words in printed and words in page.read_text()
    for target in results["targets"]:
        assert target["what"] in printed


@pytest.fixture
def alone(bench, monkeypatch):
    """A process group of this process alone; yields a mesh on it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_counter_sees_every_way_to_send(bench, alone):
    import torch.distributed as dist
    from torch.distributed._functional_collectives import all_reduce

    group = alone.get_group()
    with bench("collectives").CollectiveCounter() as counter:
        dist.all_reduce(torch.ones(3, dtype=torch.float64), group=group)
        assert (counter.operations, counter.asynchronous, counter.bytes) == (
            {"all_reduce": 1},
            0,
            24,
        )
        dist.all_reduce(torch.ones(5), group=group, async_op=True).wait()
        assert (counter.operations, counter.asynchronous, counter.bytes) == (
            {"all_reduce": 2},
            1,
            44,
        )
        all_reduce(torch.ones(2), "sum", group).add_(1)
        assert (counter.operations, counter.asynchronous, counter.bytes) == (
            {"all_reduce": 3},
            1,
            52,
        )
        dist.broadcast(torch.ones(1), src=0, group=group)
        assert counter.operations == {"all_reduce": 3, "broadcast": 1} and counter.bytes == 56


@pytest.mark.parametrize("mistake", ["none", "no guidance", "clip", "not a number"])
def test_wrong_variant_is_refused(bench, alone, mistake):
    sharded, peers, workload = map(bench, ("sharded", "sharded_peers", "workload"))
    work = peers.Sharded(sharded.LISTS["tiny6"], alone)
    variant = peers.IMPLEMENTATIONS["by hand on shards"](work, workload.GUIDED)
    right = variant.step
    if mistake == "no guidance":
        variant.step = lambda inject: right(False)
    elif mistake == "clip":
        original = work.local_grads
        work.local_grads = lambda: [1.01 * grad for grad in original()]
        # Larger gradients that are clipped to the same norm change nothing.
        assert peers.verify(variant, peers.Oracle(work)) <= 1
        variant = peers.IMPLEMENTATIONS["torch fused"](work, workload.PLAIN)
    elif mistake == "not a number":
        variant.step = lambda inject: (right(inject), variant.locals[0].fill_(math.nan))
    oracle = peers.Oracle(work)
    if mistake == "none":
        assert peers.verify(variant, oracle) <= 1 and variant.verified
        return
    with pytest.raises(workload.VerificationError, match="not timed"):
        peers.verify(variant, oracle)
    assert not variant.verified
    with pytest.raises(RuntimeError, match="was not verified"):
        bench("timing").Timed(variant, 0.0).take_turn(sharded.Rank())


def test_counts_that_disagree_end_the_run(bench, alone, monkeypatch):
    from torch.distributed.tensor.debug import CommDebugMode

    sharded, peers, workload = map(bench, ("sharded", "sharded_peers", "workload"))
    work = peers.Sharded(sharded.LISTS["tiny6"], alone)
    variant = peers.IMPLEMENTATIONS["by hand on shards"](work, workload.GUIDED)
    (found,) = sharded.count_collectives(variant, alone.get_group())
    assert (found["count"], found["bytes"]) == (1, 16)
    monkeypatch.setattr(CommDebugMode, "get_total_counts", lambda self: 0)
    with pytest.raises(RuntimeError, match="CommDebugMode saw 0"):
        sharded.count_collectives(variant, alone.get_group())


@pytest.mark.parametrize(("ours", "met"), [(0.34, True), (0.36, False)])
def test_target_is_judged_by_the_stated_case(bench, ours, met):
    def entry(name, setting, seconds, count):
        found = {"name": name, "setting": setting, "seconds": seconds}
        return {**found, "collectives": [{"count": count}]}

    variants = [
        entry("dgg cpp", "plain", 0.1, 0), entry("dgg cpp", "guided", ours, 1),
        entry("torch fused", "clipped", 1.0, 1),
    ]  # fmt: skip
    sharded = bench("sharded")
    first, *counts = sharded.targets([{"case": "small120-2", "variants": variants}])
    assert first["met"] is met and first["target"] == "≤ 0.35"
    assert [target["met"] for target in counts] == [True, True]
    variants[1]["collectives"][0]["count"] = 2
    assert sharded.targets([{"case": "small120-2", "variants": variants}])[-1]["met"] is False
    # Other lists and ranks have no target in time.
    others = sharded.targets([{"case": "small120-4", "variants": variants}])
    assert all("collectives" in target["what"] for target in others)
