# SPDX-License-Identifier: BSD-3-Clause
"""Sharded parameters: the trajectory does not depend on ranks, mesh or placement.

Every case runs 50 guided, clipped steps with replay gradients, missing gradients, uneven and empty
shards on several gloo processes and once unsharded: parameters and state agree within the rounding
that another order of summation brings, masks exactly (granularity ``element`` would show every
wrong element), and a step has at most one collective per mesh, none where no norm is needed.
"""

from __future__ import annotations

import pytest
import torch

import ranks
import sharded_worker as worker
from training import TOLERANCES, whole_state

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

ONE = [["S0"]]
COLUMNS = [["S1"], ["S0"]]
MIXED = [["S0"], ["R"], ["S1"]]
GRID = [["S0", "S1"], ["S0", "R"], ["R", "S0"], ["R", "R"]]
HYBRID = [["R", "S0"]]
# Beside plain tensors, and on several meshes in one optimizer.
BESIDE_PLAIN = [["S0"], [], ["S1"]]
MESHES = [["dp", "S0"], ["S0", "S1"], [], ["tp", "S1"]]


def case(
    mesh, placements, dtype="float64", optimizer="adamw", granularity="step", scope="global",
    **options,
):  # fmt: skip
    return {
        "mesh": mesh, "placements": placements, "dtype": dtype, "optimizer": optimizer,
        "options": {**worker.guidance(granularity, scope), **options},
    }  # fmt: skip


def cases_of(world):
    cases = [case((world,), ONE, dtype) for dtype in ("float32", "float64")]
    elements = {"importance": 0.5, "granularity": "element"}
    cases.append(case((world,), MIXED, **elements))
    cases.append(case((world,), MIXED, importance=1.0, alpha="auto"))
    if world in (1, 3):
        return [*cases, case((world,), MIXED, granularity="element")]
    cases.append(case((world,), COLUMNS, "float32", alpha="auto", scope="tensor"))
    cases.append(case((world,), ONE, importance=1.0, backend="reference", max_grad_norm=None))
    cases.append(case((world,), BESIDE_PLAIN, importance=0.5, alpha="auto", scope="tensor"))
    cases.append(case((world,), MIXED, optimizer="foreign", importance=0.5, alpha="auto"))
    cases.append(case((world,), MIXED, optimizer="sgd", alpha="auto", backend="reference"))
    for route in ("first_moment", "decoupled"):
        cases.append(case((world,), MIXED, route=route, importance=0.5))
    for granularity in ("tensor", "element"):
        cases.append(case((world,), COLUMNS, granularity=granularity))
        cases.append(case((world,), MIXED, optimizer="sgd", granularity=granularity))
        cases.append(case((world,), MIXED, optimizer="foreign", granularity=granularity))
    cases.append(case((world,), BESIDE_PLAIN, granularity="element"))
    cases.append(case((world,), MIXED, scope="tensor"))
    cases.append(case((world,), MIXED, optimizer="foreign", scope="tensor"))
    cases.append(case((world,), MIXED, optimizer="foreign", granularity="element"))
    cases[-1]["options"].update(backend="reference")
    cases.append({**case((world,), ONE)})
    cases[-1]["options"].update(max_grad_norm=None, backend="reference")
    if world == 4:
        cases.append(case((2, 2), GRID, **elements))
        cases.append(case((2, 2), GRID, importance=0.5, alpha="auto"))
        cases.append(case((2, 2), HYBRID, importance=1.0, alpha="auto", scope="tensor"))
        cases.append(case((2, 2), MESHES, importance=0.5, alpha="auto"))
        cases.append({**case((2, 2), GRID, importance=1.0), "named": False})
        for granularity in ("step", "tensor", "element"):
            cases.append(case((2, 2), GRID, granularity=granularity))
            cases.append(case((2, 2), HYBRID, granularity=granularity, optimizer="sgd"))
        cases.append(case((2, 2), GRID, "float32", scope="tensor"))
        cases.append({**case((2, 2), GRID), "named": False})
        cases.append(case((2, 2), MESHES, granularity="element"))
        cases.append(case((2, 2), MESHES, scope="tensor", granularity="tensor"))
    return cases


def spawn(function, world, folder, *arguments):
    ranks.run(function, world, world, str(folder), *arguments)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world", "dimensions"),
    [(1, 1), (2, 1), (3, 1), pytest.param(4, 1, marks=pytest.mark.slow), (4, 2)],
)
def test_trajectories_do_not_depend_on_sharding(world, dimensions, tmp_path):
    cases = [one for one in cases_of(world) if len(one["mesh"]) == dimensions]
    spawn(worker.run_cases, world, tmp_path, cases)
    for one, result in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        params, optimizer, scales = worker.whole(
            getattr(torch, one["dtype"]), one["optimizer"], one["options"]
        )
        tolerance = TOLERANCES[getattr(torch, one["dtype"])]
        message = {"msg": lambda m, c=one: f"{c}: {m}"}
        for mine, theirs in zip(result["params"], params, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), **tolerance, **message)
        plain = whole_state(optimizer, dict(enumerate(params)))
        assert all("anchor" in entry for entry in plain.values())
        torch.testing.assert_close(result["state"], plain, **tolerance, **message)
        torch.testing.assert_close(result["scales"], scales, rtol=1e-6, atol=1e-6, **message)
        assert any(bool(scale.any()) for scale in scales), one
        weighted = one["options"].get("importance", 0.0)
        assert all(("importance" in entry) == (weighted > 0) for entry in plain.values())
        mean = optimizer.param_groups[0]["importance_mean"]
        assert result["importance_mean"] == pytest.approx(mean, rel=tolerance["rtol"])
        assert (mean > 0) == (weighted > 0)
        counts = result["collectives"]
        if weighted and world > 1:
            # The mean of the importance, over every mesh, when an anchor is set.
            for boundary in (5, 30):
                counts[boundary - 1] -= 3 if one["placements"] is MESHES else 1
        if world == 1:
            assert set(counts) == {0}
        elif one["options"]["max_grad_norm"] is not None:
            assert set(counts) == {3 if one["placements"] is MESHES else 1}, one
        else:
            # From the first anchor on about half of the steps inject; no other has a collective.
            assert set(counts[:5]) == {0} and set(counts) == {0, 1}


def unsharded():
    model = worker.network()
    optimizer = worker.dgg.AdamW(model.parameters(), **worker.FSDP_OPTIONS)
    worker.fit(model, optimizer, 0, 14)
    return model, optimizer


def assert_same_training(found):
    model, optimizer = unsharded()
    names = dict(model.named_parameters())
    for name, value in found["model"].items():
        torch.testing.assert_close(value, names[name].detach(), rtol=1e-9, atol=1e-10)
    for name, entry in found["optimizer"]["state"].items():
        for key, value in entry.items():
            expected = optimizer.state[names[name]][key]
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
        assert "anchor" in entry
    group = found["optimizer"]["param_groups"][0]
    assert (group["draw_index"], group["task_index"]) == (14, 1)


@pytest.mark.compat("FSDP2", "trajectory", "clipping", "frozen parts")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "made_before",
    [
        pytest.param(False, marks=pytest.mark.compat("FSDP2", "resume", "resume on other ranks")),
        True,
    ],
)
def test_fsdp2_trains_as_one_process_and_resumes_on_other_ranks(made_before, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    spawn(worker.run_fsdp, 2, first, made_before)
    assert_same_training(torch.load(first / "results.pt"))
    if made_before:
        return
    for world in (3, 2):
        folder = tmp_path / f"resumed on {world}"
        folder.mkdir()
        spawn(worker.resume_fsdp, world, folder, str(first / "saved"))
        assert_same_training(torch.load(folder / "results.pt"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "function",
    [
        worker.run_partitions, worker.run_uneven_partitions, worker.run_failing_ranks,
        worker.run_failing_importance, worker.run_replay_on_one_rank, worker.run_merges,
        worker.run_ranges, worker.run_misuses,
    ],
)  # fmt: skip
def test_on_two_ranks(function, tmp_path):
    spawn(function, 2, tmp_path)


@pytest.mark.timeout(300)
def test_a_mesh_over_a_part_of_the_world_needs_nobody_else(tmp_path):
    spawn(worker.run_part_of_the_world, 5, tmp_path)
