# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of sharded steps: its JSON, its counts of collectives, its model of many ranks.

No test looks at how long anything took.
"""

import dataclasses
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
    runs = {(name, setting.name) for name, setting in bench("sharded").RUNS}
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
    for words in ("tiny6 on 2 ranks", "/ clip+fused", "collectives", "MODEL, not measured"):
        assert words in printed and words in page.read_text()
    for target in results["targets"]:
        assert target["what"] in printed


def test_model_stands_on_what_was_counted(quick):
    results, _, _ = quick
    model = results["model"]
    assert model["label"] == "MODEL, not measured"
    assert {row["label"] for row in model["rows"]} == {model["label"]}
    assert model["host_from"] == ["tiny6-2", "tiny12-2"]
    assert model["assumptions"]["memory_bandwidth"] > 0
    for method in model["methods"]:
        name, setting = method["name"], method["setting"].partition(",")[0]
        counted = entry_of(results["cases"][0], name, setting)["collectives"]
        if setting == method["setting"]:
            assert [k["awaited"] + k["ahead"] for k in method["kinds"]] == [
                c["count"] for c in counted
            ]
        assert [k["share"] for k in method["kinds"]] == [c["share"] for c in counted]
    (clip,) = [
        m for m in model["methods"] if (m["name"], m["setting"]) == ("torch fused", "clipped")
    ]
    (kind,) = clip["kinds"]
    assert (kind["fixed_bytes"], kind["tensor_bytes"]) == (0, 4)


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
    with bench("sharded").CollectiveCounter() as counter:
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
    sharded, workload = bench("sharded"), bench("workload")
    work = sharded.Sharded(sharded.LISTS["tiny6"], alone)
    variant = sharded.IMPLEMENTATIONS["by hand on shards"](work, workload.GUIDED)
    right = variant.step
    if mistake == "no guidance":
        variant.step = lambda inject: right(False)
    elif mistake == "clip":
        original = work.local_grads
        work.local_grads = lambda: [1.01 * grad for grad in original()]
        # Larger gradients that are clipped to the same norm change nothing.
        assert sharded.verify(variant, sharded.Oracle(work)) <= 1
        variant = sharded.IMPLEMENTATIONS["torch fused"](work, workload.PLAIN)
    elif mistake == "not a number":
        variant.step = lambda inject: (right(inject), variant.locals[0].fill_(math.nan))
    oracle = sharded.Oracle(work)
    if mistake == "none":
        assert sharded.verify(variant, oracle) <= 1 and variant.verified
        return
    with pytest.raises(workload.VerificationError, match="not timed"):
        sharded.verify(variant, oracle)
    assert not variant.verified
    with pytest.raises(RuntimeError, match="was not verified"):
        sharded._Timed(variant, 0.0, []).run()


def test_counts_that_disagree_end_the_run(bench, alone, monkeypatch):
    from torch.distributed.tensor.debug import CommDebugMode

    sharded, workload = bench("sharded"), bench("workload")
    work = sharded.Sharded(sharded.LISTS["tiny6"], alone)
    variant = sharded.IMPLEMENTATIONS["by hand on shards"](work, workload.GUIDED)
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


def test_all_reduce_by_hand(bench):
    scaling = bench("scaling")
    given = scaling.Assumptions(
        ranks_per_node=8, inside_latency=2.0, inside_bandwidth=100.0, between_latency=5.0,
        between_bandwidth=10.0, launch=7.0,
    )  # fmt: skip
    assert scaling.all_reduce(1, 100, given) == 0
    # Two ranks: a tree is 1 hop up and 1 down, 2 (2 + 1); a ring 2 hops of half, 2 (2 + 0.5).
    assert scaling.all_reduce(2, 100, given) == pytest.approx(7 + 5)
    # 64 ranks, 8 nodes of 8: 3 hops inside (2 + 1) and 3 between (5 + 10), up and down; the ring
    # would take 126 (5 + 100 / 64 / 10).
    assert scaling.all_reduce(64, 100, given) == pytest.approx(7 + 2 * (3 * 3 + 3 * 15))


def test_cost_by_hand(bench):
    scaling = bench("scaling")
    given = scaling.Assumptions(
        memory_bandwidth=1000.0, ranks_per_node=4, inside_latency=1.0, inside_bandwidth=1e30,
        between_latency=3.0, between_bandwidth=1e30, launch=10.0,
    )  # fmt: skip
    kinds = (
        scaling.Kind(0.25, 9.0, awaited=1, ahead=1, fixed_bytes=24.0, tensor_bytes=0.0),
        scaling.Kind(0.75, 7.0, awaited=0, ahead=0, fixed_bytes=0.0, tensor_bytes=0.0),
    )
    method = scaling.Method("x", "y", kinds, host_fixed=2.0, host_tensor=0.5, state_arrays=5)
    found = scaling.cost(
        method, 8000, 10, 8, given, late=lambda ranks, meetings, given: 100.0 * meetings
    )
    # 1000 elements a rank; 9 and 7 arrays of 4000 bytes.
    assert found["local"] == pytest.approx(0.25 * 36 + 0.75 * 28)
    assert found["host"] == pytest.approx(2 + 10 * 0.5)
    # Two nodes: 2 hops inside, 1 between, up and down; the one sent ahead costs its launch.
    assert found["collectives"] == pytest.approx(0.25 * (10 + 2 * (2 * 1 + 3)) + 0.25 * 10)
    assert found["stragglers"] == pytest.approx(0.25 * 200 + 0.75 * 100)
    parts = [found[name] for name in ("local", "host", "collectives", "stragglers")]
    assert found["total"] == pytest.approx(sum(parts))
    assert found["total_host_ahead"] == pytest.approx(sum(parts) - found["host"])


@pytest.mark.parametrize("meetings", [1, 3])
def test_stragglers_agree_with_the_harmonic_number(bench, meetings):
    scaling = bench("scaling")
    given = scaling.Assumptions(jitter=2.0, trials=4000)
    # The latest of n exponential times is 1 + 1/2 + … + 1/n means late, with a standard deviation
    # below π/√6 of them. Five standard errors of the mean of 4000 trials.
    expected = meetings * 2.0 * sum(1 / n for n in range(1, 65))
    error = 5 * 2.0 * math.pi / math.sqrt(6 * 4000 / meetings)
    assert scaling.stragglers(64, meetings, given) == pytest.approx(expected, abs=error)
    assert scaling.stragglers(64, meetings, dataclasses.replace(given, jitter=0.0)) == 0


def test_arrays_of_a_step(bench):
    arrays = bench("scaling").arrays
    never = {"clips": False, "injects": False, "next_injects": False}
    clips = {**never, "clips": True}
    guided = {"clips": True, "injects": True, "next_injects": True}
    # design.md: 28 bytes a parameter, 4 for the anchor; the norm of the gradient 4.
    assert arrays("dgg cpp", **never) == arrays("torch fused", **never) == 7
    assert arrays("dgg cpp", **clips) == 8 and arrays("torch fused", **clips) == 10
    assert arrays("dgg cpp", **guided) == 9
    # The step before one that injects measures the distance.
    assert arrays("dgg cpp", **{**clips, "next_injects": True}) == 9
    assert arrays("foreach guidance", **guided) == 19
    assert arrays("by hand on shards", **guided) == 17
    with pytest.raises(ValueError, match="no account"):
        arrays("torch for-loop", **never)


def counted_case(tensors, awaited=1):
    """A case as sharded.py would write it, with made-up host times."""

    def entry(name, setting, count, size, seconds):
        injects = setting == "guided"
        kind = {"injects": injects, "next_injects": injects, "share": 1.0, "count": count}
        kind.update(asynchronous=0, bytes=size)
        return {
            "name": name, "setting": setting, "collectives": [kind], "cpu_seconds": seconds,
        }  # fmt: skip

    return {
        "case": f"list{tensors}-2", "ranks": 2, "elements": 64 * tensors, "tensors": tensors,
        "variants": [
            entry("dgg cpp", "plain", 0, 0, 1e-3 + 1e-5 * tensors),
            entry("dgg cpp", "guided", awaited, 24, 2e-3 + 1e-5 * tensors),
            entry("torch fused", "clipped", 1, 4 * tensors, 1e-3 + 1e-4 * tensors),
        ],
    }  # fmt: skip


def test_model_is_monotonic(bench):
    scaling = bench("scaling")
    found = scaling.model([counted_case(120), counted_case(448)])
    rows = {(r["model"], r["ranks"], r["name"], r["setting"]): r for r in found["rows"]}
    methods = {(r["name"], r["setting"]) for r in found["rows"]}
    assert methods == {
        ("dgg cpp", "plain"), ("dgg cpp", "guided"), ("dgg cpp", "guided, ‖d‖ sent ahead"),
        ("dgg cpp", "guided, ‖d‖ waited for apart"), ("torch fused", "clipped"),
    }  # fmt: skip
    assert {r["ranks"] for r in found["rows"]} == {8, 64, 512, 4096, 16384}
    assert {r["model"] for r in found["rows"]} == {"7B", "70B", "405B"}
    for method in methods:
        for size in scaling.SIZES:
            line = [rows[(size, ranks, *method)] for ranks in scaling.RANKS]
            for fewer, more in zip(line, line[1:], strict=False):
                # Less to do for each, as much for the host, more to wait for.
                assert fewer["local"] == pytest.approx(
                    more["local"] * more["ranks"] / fewer["ranks"]
                )
                assert fewer["host"] == more["host"]
                assert fewer["collectives"] <= more["collectives"]
                assert fewer["stragglers"] < more["stragglers"]
                assert fewer["fits"] <= more["fits"]
        for ranks in scaling.RANKS:
            small, middle, large = (rows[(size, ranks, *method)]["total"] for size in scaling.SIZES)
            assert small < middle < large
    # Whoever waits twice pays twice; what is sent ahead makes nobody wait, but has to be sent.
    together, ahead, apart = (
        rows[("7B", 16384, "dgg cpp", f"guided{words}")]
        for words in ("", ", ‖d‖ sent ahead", ", ‖d‖ waited for apart")
    )
    assert apart["collectives"] == pytest.approx(2 * together["collectives"])
    assert together["stragglers"] == ahead["stragglers"] < apart["stragglers"]
    assert together["total"] < ahead["total"] < apart["total"]
    assert rows["7B", 8, "dgg cpp", "plain"]["collectives"] == 0
    # The host's line through 120 and 448 tensors, at 291.
    assert rows["7B", 8, "dgg cpp", "plain"]["host"] == pytest.approx(1e-3 + 291e-5)
    # 16 bytes of state a parameter, 20 with the anchor, 80 GB a rank.
    assert (
        not rows["70B", 8, "dgg cpp", "plain"]["fits"]
        and rows["70B", 64, "dgg cpp", "plain"]["fits"]
    )
    page = scaling.page(found, markdown=True)
    assert page.count("MODEL, not measured") == 5 and "16,384 ranks" in page


def test_model_refuses_what_it_cannot_know(bench):
    scaling = bench("scaling")
    alone = scaling.model([counted_case(120)])
    assert "two lists" in alone["missing"] and "two lists" in scaling.page(alone, markdown=False)
    with pytest.raises(ValueError, match="no such method"):
        scaling.model([counted_case(120), counted_case(448, awaited=3)])
    for wrong in ({"jitter": -1.0}, {"memory_bandwidth": 0.0}, {"launch": math.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            scaling.Assumptions(**wrong)


def test_model_of_a_file(bench, quick, capsys):
    scaling = bench("scaling")
    (path,) = quick[2].glob("sharded-cpu-*.json")
    assert scaling.main([str(path), "--assume", "jitter=0", "ranks_per_node=4"]) == 0
    printed = capsys.readouterr().out
    assert "4 ranks a node" in printed and "late by 0 µs" in printed
    with pytest.raises(SystemExit):
        scaling.main([str(path), "--assume", "speed=3"])
    assert "speed" in capsys.readouterr().err
