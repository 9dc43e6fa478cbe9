# SPDX-License-Identifier: BSD-3-Clause
"""torch's own engines: FSDP2, HSDP, tensor parallelism and both together train as one process does.

Real models under the real engines on gloo: 50 guided, clipped steps with replay gradients, every
rank with its own part of the batch and its own seed of torch's generator. Parameters, moments and
anchors agree with the unsharded run; the draws of every single element agree exactly; a step has
at most one collective per mesh, none where no norm is needed, and no DTensor operation.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import engines_worker as worker
import ranks

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

TOLERANCES = {
    "float32": {"rtol": 1e-5, "atol": 1e-6},
    "float64": {"rtol": 1e-10, "atol": 1e-10},
    # Two ranks add the same two gradients as the unsharded run: nothing may differ, not a rounding.
    "bfloat16": {"rtol": 0.0, "atol": 0.0},
}
pytestmark = pytest.mark.usefixtures("one_thread")
compat = pytest.mark.compat
hugging_face = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "peft")),
    reason="the models of this case are transformers' and peft's, which are not installed",
)
slow = pytest.mark.slow


class Case:
    """A case, the ranks it runs on, and the marks of the test that stands for it."""

    def __init__(self, world: int, marks=(), **case) -> None:
        self.world, self.marks, self.case = world, list(marks), case
        if case.get("model") in ("tied", "llava", "lora block", "lora words"):
            self.marks.append(hugging_face)

    @property
    def name(self) -> str:
        given = [str(v) if isinstance(v, str) else f"{k}={v}" for k, v in self.case.items()]
        return f"{self.world}: {' '.join(given)}"


def row(engine: str, world: int, *features: str, slowly: bool = False, **case) -> Case:
    """Returns a case that stands for these columns of the engine's row in docs/compatibility.md."""
    marks = [compat(engine, *features)] if features else []
    return Case(world, [*marks, *[slow] * slowly], engine=engine, **case)


BASIC = ("trajectory", "replay", "clipping")
CASES = [
    # FSDP2: what it can be asked for.
    row("FSDP2", 2, *BASIC, "tied weights", "frozen parts", model="odd"),
    row("FSDP2", 2, model="odd", dtype="float32", reshard=False, slowly=True),
    row(
        "FSDP2", 2, "granularity tensor", "norm_scope tensor",
        model="odd", granularity="tensor", scope="tensor", reshard=True,
    ),
    row(
        "FSDP2", 2, "granularity element", "clipping",
        model="odd", granularity="element", optimizer="sgd", clip="outside", made="before",
    ),
    row(
        "FSDP2", 2, "mixed precision",
        model="odd", dtype="float32", mixed="bfloat16", parts=2, slowly=True,
    ),
    row("FSDP2", 2, model="odd", dtype="float32", mixed="float32", parts=2, slowly=True),
    row(
        "FSDP2", 2, "mixed precision",
        model="odd", dtype="bfloat16", mixed="bfloat16", parts=2, storage="master_weights",
    ),
    row(
        "FSDP2", 2, "mixed precision",
        model="odd", dtype="bfloat16", mixed="bfloat16", parts=2, storage="stochastic_rounding",
        granularity="element", optimizer="sgd", slowly=True,
    ),
    row("FSDP2", 2, "CPU offload", model="odd", offload=True, slowly=True),
    row("FSDP2", 2, "meta init", model="odd", made="meta after", slowly=True),
    row("FSDP2", 2, "meta init", model="odd", made="meta before", slowly=True),
    row("FSDP2", 2, "CPU offload", "meta init", model="odd", offload=True, made="meta before"),
    row("FSDP2", 1, model="odd", granularity="element"),
    row("FSDP2", 3, model="odd", granularity="element", dtype="float32"),
    row("FSDP2", 4, model="odd", granularity="element", slowly=True),
    # Importance, the strength without a search, and where the pull enters.
    row("FSDP2", 2, model="odd", importance=0.5, granularity="element"),
    row("FSDP2", 4, model="odd", importance=1.0, alpha="auto", scope="tensor", slowly=True),
    row("FSDP2", 2, model="odd", importance=0.5, route="decoupled", dtype="float32", slowly=True),
    row("FSDP2", 2, model="llava", importance=1.0, alpha="auto", slowly=True),
    row("HSDP", 4, model="odd", importance=1.0, alpha="auto", slowly=True),
    row(
        "HSDP", 4, model="odd", importance=0.5, granularity="tensor", route="first_moment",
        slowly=True,
    ),
    row("TP", 2, model="block", sequence=True, importance=0.5, alpha="auto"),
    row(
        "TP", 2, model="words block", sequence=False, importance=1.0, granularity="element",
        slowly=True,
    ),
    row("TP + FSDP2", 4, model="block", sequence=True, importance=0.5, alpha="auto"),
    row(
        "TP + FSDP2", 4, model="lora words", sequence=True, importance=1.0, granularity="element",
        slowly=True,
    ),
    row(
        "TP + FSDP2", 4, model="lora words", sequence=False, importance=1.0, alpha="auto",
        scope="tensor", slowly=True,
    ),
    # dgg.Guidance over torch's own optimizer.
    row("FSDP2", 2, model="odd", granularity="element", optimizer="foreign"),
    row("TP", 2, model="block", sequence=True, optimizer="foreign", slowly=True),
    # FSDP2: models.
    row("FSDP2", 2, "LoRA", "frozen parts", model="llava"),
    *(row("FSDP2", n, "LoRA", "frozen parts", model="llava", slowly=True) for n in (1, 3)),
    row(
        "FSDP2", 4, "LoRA", "frozen parts",
        model="llava", granularity="element", dtype="float32", slowly=True,
    ),
    row("FSDP2", 2, "tied weights", model="tied", granularity="tensor", slowly=True),
    row("FSDP2", 3, model="tied", granularity="element", slowly=True),
    # HSDP.
    row(
        "HSDP", 4, *BASIC, "tied weights", "frozen parts", "granularity element",
        "norm_scope tensor", "CPU offload", "meta init",
        model="odd", granularity="element", scope="tensor", offload=True, made="meta after",
    ),
    row(
        "HSDP", 4, "LoRA", "frozen parts", "granularity tensor",
        model="llava", granularity="tensor", slowly=True,
    ),
    row(
        "HSDP", 4, "granularity element", "norm_scope tensor",
        model="odd", granularity="element", scope="tensor", slowly=True,
    ),
    row(
        "HSDP", 4, "granularity tensor", "clipping",
        model="odd", granularity="tensor", optimizer="sgd", clip="outside", dtype="float32",
        slowly=True,
    ),
    row(
        "HSDP", 4, "mixed precision",
        model="odd", dtype="float32", mixed="bfloat16", parts=4, slowly=True,
    ),
    row("HSDP", 4, "CPU offload", model="odd", offload=True, slowly=True),
    row("HSDP", 4, "meta init", model="odd", made="meta after", slowly=True),
    # Tensor parallelism: norms are plain, or under sequence parallelism have partial gradients.
    row(
        "TP", 2, *BASIC, "granularity element",
        model="block", sequence=True, granularity="element",
    ),
    row(
        "TP", 2, "granularity tensor", "norm_scope tensor",
        model="block", sequence=False, granularity="tensor", scope="tensor", optimizer="sgd",
        slowly=True,
    ),
    row(
        "TP", 2, "clipping",
        model="block", sequence=True, clip="outside", dtype="float32", slowly=True,
    ),
    row("TP", 2, "meta init", model="block", sequence=True, made="meta before", slowly=True),
    row("TP", 4, *BASIC, model="wide block", sequence=True, slowly=True),
    row(
        "TP", 2, *BASIC, "LoRA", "tied weights", "frozen parts", "granularity tensor",
        "norm_scope tensor",
        model="lora words", sequence=False, granularity="tensor", scope="tensor", slowly=True,
    ),
    row(
        "TP", 2, "LoRA", "tied weights", "frozen parts",
        model="lora words", sequence=True, granularity="element", slowly=True,
    ),
    row(
        "TP", 2, "tied weights", "frozen parts",
        model="words block", sequence=True, granularity="element", slowly=True,
    ),
    row(
        "TP", 2, "tied weights", "frozen parts", "norm_scope tensor",
        model="words block", sequence=False, scope="tensor", optimizer="sgd", slowly=True,
    ),
    row(
        "TP", 2, "LoRA", "frozen parts",
        model="lora block", sequence=True, granularity="element", slowly=True,
    ),
    row(
        "TP", 2, "LoRA", "frozen parts", "granularity tensor",
        model="lora block", sequence=False, granularity="tensor", dtype="float32", slowly=True,
    ),
    # Both.
    row(
        "TP + FSDP2", 4, "tied weights", "frozen parts",
        model="words block", sequence=True, granularity="element", slowly=True,
    ),
    row(
        "TP + FSDP2", 4, "LoRA", "frozen parts",
        model="lora block", sequence=True, granularity="element", slowly=True,
    ),
    row(
        "TP + FSDP2", 4, *BASIC, "granularity element", "LoRA", "tied weights", "frozen parts",
        model="lora words", sequence=True, granularity="element", slowly=True,
    ),
    row(
        "TP + FSDP2", 4, *BASIC, "granularity element",
        model="block", sequence=True, granularity="element",
    ),
    row(
        "TP + FSDP2", 4, "granularity tensor", "norm_scope tensor", "clipping",
        model="block", sequence=False, granularity="tensor", scope="tensor", optimizer="sgd",
        slowly=True,
    ),
    row(
        "TP + FSDP2", 4, "clipping",
        model="block", sequence=True, clip="outside", dtype="float32", slowly=True,
    ),
    row("TP + FSDP2", 4, "CPU offload", model="block", sequence=True, offload=True, slowly=True),
    row(
        "TP + FSDP2", 4, "meta init",
        model="block", sequence=True, made="meta after", slowly=True,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory):
    """Returns the result of a case: all that are selected on as many ranks ran together."""
    chosen = [item.callspec.params.get("case") for item in request.session.items
              if hasattr(item, "callspec") and item.path == request.path]  # fmt: skip
    done = {}

    def result(case: Case) -> dict:
        if case.name not in done:
            together = [c for c in chosen if isinstance(c, Case) and c.world == case.world] or [
                case
            ]
            folder = tmp_path_factory.mktemp("engines")
            cases = {c.name: c.case for c in together}
            ranks.run(worker.run, case.world, case.world, str(folder), cases)
            done.update(torch.load(folder / "results.pt"))
        found = done[case.name]
        assert "error" not in found, found["error"]
        return found

    return result


def params_of(cases):
    slowly = pytest.mark.timeout(600)  # the first one waits for all on as many ranks
    return [pytest.param(c, id=c.name, marks=[*c.marks, slowly]) for c in cases]


def probe(name, world=2, *marks):
    return pytest.mark.parametrize("case", params_of([Case(world, marks, probe=name)]))


@pytest.mark.dist
@pytest.mark.parametrize("case", params_of(CASES))
def test_trains_as_one_process_does(case, ran):
    found, expected = ran(case), worker.whole(case.case)
    tolerance = TOLERANCES[case.case.get("dtype", "float64")]
    assert found["params"].keys() == expected["params"].keys()
    for kind in ("params", "frozen"):
        torch.testing.assert_close(found[kind], expected[kind], **tolerance)
    assert found["numbers"] == expected["numbers"]
    assert found["numbers"]["task_index"] == 2
    torch.testing.assert_close(found["scales"], expected["scales"], rtol=1e-6, atol=1e-6)
    assert any(bool(scale.any()) for scale in found["scales"])
    weighted = case.case.get("importance", 0.0) > 0
    assert found["importance_mean"] == pytest.approx(
        expected["importance_mean"], rel=tolerance["rtol"]
    )
    assert (found["importance_mean"] > 0) == weighted
    assert all(("importance" in state) == weighted for state in expected["state"].values())
    for name, state in expected["state"].items():
        assert "anchor" in state
        torch.testing.assert_close(found["state"][name], state, **tolerance)


@pytest.mark.dist
@pytest.mark.parametrize("case", params_of(CASES))
def test_every_element_draws_what_it_draws_unsharded(case, ran):
    found, expected = ran(case)["masks"], worker.whole(case.case)["masks"]
    assert found.keys() == expected.keys()
    for name, draws in expected.items():
        assert torch.equal(found[name], draws), name
    # Draws of every granularity hit some and miss some, or this compared nothing.
    every = torch.cat([draws.flatten() for draws in expected.values()]).long()
    for place in range(len(worker.GRANULARITIES)):
        hits = [(every >> (4 * place + draw)) & 1 for draw in range(4)]
        assert 0 < torch.stack(hits).float().mean() < 1


@pytest.mark.dist
@pytest.mark.parametrize("case", params_of(CASES))
def test_a_step_has_one_collective_per_mesh_where_norms_are_needed(case, ran):
    found = ran(case)
    sharded = case.world > 1
    # Sequence parallelism leaves the sum of the norms' gradients to the optimizer.
    # where they are trained.
    partial = (
        case.case["engine"] == "TP" and case.case["sequence"] and case.case["model"] != "lora block"
    )
    clips = case.case.get("clip", "inside") == "inside"
    kinds = set()
    for k, (collectives, dtensor, injected) in enumerate(found["steps"]):
        kinds.add(injected)
        assert collectives == sharded * ((clips or injected) * found["meshes"] + partial), k
        # The first step makes state, the first after an anchor looks at all parameters again.
        # torch's own optimizer steps over DTensors.
        if k not in (0, *worker.BOUNDARIES) and case.case.get("optimizer") != "foreign":
            assert not dtensor, (k, dtensor)
    assert kinds == {True, False}


@slow
@pytest.mark.dist
@hugging_face
@pytest.mark.timeout(600)
def test_shards_are_what_tensor_parallelism_with_and_without_fsdp_makes(ran):
    """The cases whose elements are hardest to number really occur, with uneven shards."""
    tp, both = (
        ran(case)["placements"]
        for case in CASES
        if case.case["model"] == "lora words" and any(BASIC[0] in mark.args for mark in case.marks)
    )
    placed = {
        "embed.weight": "columns",  # the head's as well
        "block.up.base_layer.bias": "columns",
        "block.up.lora_A.default.weight": "columns",
        "block.up.lora_B.default.weight": "columns",
        "block.down.base_layer.bias": "replicated",
        "block.down.lora_A.default.weight": "rows",
        "block.down.lora_B.default.weight": "columns",
    }
    expected = {
        "columns": ("(Shard(dim=0),)", "(_StridedShard(dim=0, sf=2), Shard(dim=0))"),
        "rows": ("(Shard(dim=1),)", "(Shard(dim=0), Shard(dim=1))"),
        "replicated": ("(Replicate(),)", "(Shard(dim=0), Replicate())"),
    }
    for name, kind in placed.items():
        name = f"base_model.model.{name}"
        assert (tp[name], both[name]) == expected[kind], name
    assert "base_model.model.head.weight" not in tp.keys() | both.keys()
    assert worker.VOCABULARY % 2 == worker.RANK % 2 == 1


BFLOAT16 = {"model": "block", "probe": "followed"}
FOLLOWED = [
    row(
        "TP", 2, "mixed precision",
        **BFLOAT16, sequence=True, dtype="bfloat16", storage="master_weights",
        state_dtype="float32",
    ),
    row(
        "TP + FSDP2", 4, "mixed precision",
        **BFLOAT16, sequence=True, dtype="float32", mixed="bfloat16",
        granularity="element",
    ),
    row(
        "TP + FSDP2", 4, "mixed precision",
        **BFLOAT16, sequence=False, dtype="bfloat16", mixed="bfloat16",
        storage="master_weights", state_dtype="float32", slowly=True,
    ),
]  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("case", params_of(FOLLOWED))
def test_bfloat16_steps_are_those_of_an_unsharded_twin_with_the_same_gradients(case, ran):
    found = ran(case)
    first, twin = found["ranks"][0], found["twin"]
    assert found["computed"] == {"torch.bfloat16"}
    for mine, its in found["injected"]:
        assert mine == its
    assert {mine for mine, _ in found["injected"]} == {True, False}
    for other in found["ranks"][1:]:
        torch.testing.assert_close(other, first, rtol=0.0, atol=0.0)
    exact = TOLERANCES["float32"]
    assert first["state"].keys() == twin["state"].keys()
    for name, state in twin["state"].items():
        assert "anchor" in state
        torch.testing.assert_close(first["state"][name], state, **exact)
        ours, start = first["params"][name], found["start"][name]
        assert not torch.equal(ours, start), name
        if "master" in state:
            # The step's float32 result, which agrees, rounded: the twin's own may have fallen to
            # the other side of the middle between two numbers.
            assert torch.equal(ours, first["state"][name]["master"].to(ours.dtype)), name
        else:
            torch.testing.assert_close(ours, twin["params"][name], **exact)


@pytest.mark.dist
@probe("no_gradient")
def test_a_rank_without_any_gradient_does_not_stop_the_others(case, ran):
    """Norms, clipping and draws are checked on the ranks; here, that all steps came to an end."""
    assert ran(case)["draw_index"] == 12


@pytest.mark.dist
@probe("counted")
def test_collectives_as_torch_counts_them(case, ran):
    found = ran(case)
    for name, counts in found.items():
        if name == "seconds":
            continue
        for injected, calls, counted, size in counts:
            wanted = name == "clipping" or injected
            # Three float64 squares.
            assert (calls, counted, size) == (wanted, wanted, 24 * wanted), name
        assert {injected for injected, *_ in counts} == {True, False}


@pytest.mark.dist
@probe("interleaved")
def test_a_shard_of_separate_pieces_is_refused_where_its_elements_have_to_be_found(case, ran):
    found = ran(case)
    assert "granularity='element' cannot number its elements" in found["refusals"][0]
    assert "several separate pieces" in found["refusals"][1]
    assert bool(found["stepped"].all())


@pytest.mark.dist
@probe("on_meta")
def test_an_anchor_needs_values_and_materialising_keeps_the_parameters(case, ran):
    found = ran(case)
    assert "is on the meta device and holds no values; materialise the model" in found["refusal"]
    assert all(found["kept"])


@pytest.mark.dist
@probe("memory", 2, slow)
def test_nothing_grows_over_many_steps_and_tasks(case, ran):
    sizes, tensors, specs = zip(*ran(case)["tasks"], strict=True)
    # Buffers of gloo and of the allocator settle during the first three tasks of ten.
    assert len(set(tensors[3:])) == 1, tensors
    assert len(set(specs[3:])) == 1, specs
    # Pages come and go a few at a time; 140 steps that each kept one would take half of this.
    assert sizes[-1] - sizes[3] < 140 * 2 * 4096, sizes
