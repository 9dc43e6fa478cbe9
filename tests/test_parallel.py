# SPDX-License-Identifier: BSD-3-Clause
"""Wrappers on several processes: DDP, ZeroRedundancyOptimizer, FSDP1, accelerate, the Trainer.

All of them for real, over gloo. Every case compares 50 guided, clipped steps with replay gradients
over the ranks with the same steps in one process on the joined batch; see parallel_worker.py. The
cases of several engines share one start of the processes, which costs more than all of them.
"""

from __future__ import annotations

import json

import pytest
import torch

import parallel_worker as worker
import ranks

pytest.importorskip("accelerate")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


def case(engine, function, *features, label="", **arguments):
    """A case: its engine's row of the compatibility table and the columns it proves."""
    name = f"{function}{label and ' '}{label}"
    marks = [pytest.mark.compat(engine, *features)] if features else []
    return pytest.param(name, marks=marks, id=name), (function, arguments)


VIEW = {"gradient_as_bucket_view": True}
DDP = [
    case("DDP", "ddp_trajectory", "trajectory", "clipping", "replay", "tied weights",
         "frozen parts"),
    case("DDP", "ddp_trajectory", "trajectory", "granularity element", "granularity tensor",
         label="static graph, float32", dtype=torch.float32, static_graph=True,
         options={"granularity": "element"}, **VIEW),
    case("DDP", "ddp_trajectory", "norm_scope tensor", "granularity tensor", label="per tensor",
         options={"norm_scope": "tensor", "granularity": "tensor"}),
    case("DDP", "ddp_single_bucket_of_one_tensor", "replay"),
    case("DDP", "ddp_accumulation", "replay", label="bucket views", **VIEW),
    case("DDP", "ddp_unused_parameters", "trajectory", label="bucket views", **VIEW),
    case("DDP", "ddp_resume", "resume", "resume on other ranks"),
    case("DDP", "ddp_trajectory", "anchor by name", label="named", named=True),
    case("DDP", "ddp_low_precision", "mixed precision", label="autocast"),
    case("DDP", "ddp_low_precision", "mixed precision", label="bfloat16", dtype=torch.bfloat16,
         master_weights=True, view=True),
]  # fmt: skip
ZERO = "ZeroRedundancyOptimizer"
SHARES = [
    case(ZERO, "share_trajectory", "trajectory", "clipping", "replay", "tied weights",
         "frozen parts"),
    case(ZERO, "share_trajectory", "granularity tensor", "replay", label="bucket views",
         granularity="tensor", view=True),
    case(ZERO, "share_trajectory", "granularity element", label="elements",
         granularity="element"),
    case(ZERO, "share_trajectory", "norm_scope tensor", label="norms per tensor, float32",
         norm_scope="tensor", dtype=torch.float32),
    case(ZERO, "share_of_nothing", "trajectory", "clipping"),
    case(ZERO, "share_with_groups", "trajectory"),
    case(ZERO, "share_resume", "resume", "resume on other ranks"),
    case(ZERO, "share_anchor", "anchor by name"),
    case(ZERO, "share_loss_scaling"),
    case(ZERO, "share_misuse"),
    case(ZERO, "share_low_precision", "mixed precision", label="autocast"),
    case(ZERO, "share_low_precision", "mixed precision", label="bfloat16", dtype=torch.bfloat16,
         master_weights=True, view=True),
]  # fmt: skip
RUNS = [
    case("FSDP1", "run_trajectory", "trajectory", "clipping", "replay", "tied weights",
         "frozen parts"),
    case("FSDP1", "run_trajectory", "granularity element", label="elements",
         granularity="element"),
    case("FSDP1", "run_clipping", "clipping"),
    case("FSDP1", "run_resume", "resume", label="full", full=True),
    case("FSDP1", "run_loss_scaling"),
    case("FSDP1", "run_misuse", "!anchor by name"),
    case("FSDP1", "run_low_precision", "mixed precision"),
]  # fmt: skip
FOUR = [
    case("DDP", "ddp_trajectory", "trajectory", "clipping", "replay", label="bucket views", **VIEW),
    case("DDP", "ddp_accumulation", "replay"),
    case("DDP", "ddp_unused_parameters", "trajectory"),
    case(ZERO, "share_of_nothing", "granularity tensor", label="unclipped", granularity="tensor",
         max_grad_norm=None),
    case("FSDP1", "run_trajectory", "trajectory", label="SHARD_GRAD_OP, float32",
         strategy="SHARD_GRAD_OP", dtype=torch.float32),
    case("DDP", "ddp_trajectory", "trajectory", label="on four"),
    case(ZERO, "share_trajectory", "trajectory", label="on four", granularity="tensor"),
    case("FSDP1", "run_trajectory", "granularity element", label="on four",
         granularity="element"),
    case("FSDP1", "run_trajectory", "trajectory", label="HYBRID_SHARD", strategy="HYBRID_SHARD",
         mesh=(2, 2)),
    case("FSDP1", "run_resume_elsewhere", "resume on other ranks", label="by two", world=2),
]  # fmt: skip
# Importance, alpha="auto", routes and merging, on two ranks and on four.
OTHER, OTHER_ON_FOUR = [], []
for engine, kind in (("DDP", "DDP"), (ZERO, "ZeRO"), ("FSDP1", "FSDP1")):
    OTHER += [
        case(engine, "other_guidance", "trajectory", label=f"{kind} importance", kind=kind,
             importance=0.5),
        case(engine, "other_guidance", "trajectory", "replay", label=f"{kind} auto", kind=kind,
             importance=1.0, alpha="auto"),
        case(engine, "other_guidance_merged", label=kind, kind=kind),
    ]  # fmt: skip
    OTHER_ON_FOUR += [
        case(engine, "other_guidance", "norm_scope tensor", label=f"{kind} per tensor",
             kind=kind, importance=0.5, alpha="auto", norm_scope="tensor"),
        case(engine, "other_guidance", "granularity element", label=f"{kind} elements",
             kind=kind, importance=1.0, granularity="element"),
        case(engine, "other_guidance", label=f"{kind} decoupled", kind=kind, importance=0.5,
             route="decoupled"),
        case(engine, "other_guidance", label=f"{kind} first moment", kind=kind, alpha="auto",
             route="first_moment"),
    ]  # fmt: skip
OTHER += [
    case(ZERO, "other_guidance", label="one tensor", kind="ZeRO", build=worker.one_tensor,
         importance=0.5, alpha="auto"),
    case(ZERO, "other_guidance", label="per tensor", kind="ZeRO", build=worker.one_tensor,
         importance=0.5, alpha="auto", norm_scope="tensor"),
    case("FSDP1", "other_guidance", label="an empty rank", kind="FSDP1",
         build=worker.nearly_frozen, importance=0.5, alpha="auto"),
    case(ZERO, "other_guidance_resumed", "resume", "resume on other ranks"),
    case("FSDP1", "other_guidance_of_runs_resumed", "resume", full=True),
    case(ZERO, "share_statistics"),
    case(None, "other_guidance_misused"),
]  # fmt: skip
OTHER_ON_FOUR += [
    case(ZERO, "other_guidance", label="one tensor", kind="ZeRO", build=worker.one_tensor,
         importance=0.5, alpha="auto", norm_scope="tensor", max_grad_norm=None),
    case("FSDP1", "other_guidance", label="empty ranks", kind="FSDP1",
         build=worker.nearly_frozen, importance=1.0),
    case("FSDP1", "other_guidance", label="per tensor, an empty rank", kind="FSDP1",
         build=worker.nearly_frozen, importance=0.5, alpha="auto", norm_scope="tensor"),
    case(ZERO, "other_guidance_resumed", "resume", label="auto", alpha="auto"),
    case("FSDP1", "other_guidance_of_runs_resumed", "resume", label="sharded", full=False),
]  # fmt: skip
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}
ACCELERATE = [
    case("accelerate DDP", "accelerate_run", "trajectory", "clipping", "resume", "tied weights",
         "frozen parts", folder=""),
    case("accelerate FSDP2", "accelerate_run", "trajectory", "clipping", "resume",
         "tied weights", "frozen parts", label="FSDP2 sharded", folder="", plugin=SHARDED),
    case("accelerate FSDP2", "accelerate_anchor_before_prepare"),
]  # fmt: skip
# What needs peft or transformers, whose import takes longer than all of these.
LORA = ("LoRA", "frozen parts")
LIBRARIES = [
    case("DDP", "ddp_trajectory", *LORA, label="LoRA", build=worker.adapted),
    case(ZERO, "share_trajectory", *LORA, label="LoRA", build=worker.adapted),
    case("FSDP1", "run_trajectory", *LORA, label="LoRA", build=worker.adapted),
    case("accelerate DDP", "accelerate_trajectory", *LORA, label="DDP LoRA", build=worker.adapted),
    case("accelerate FSDP2", "accelerate_trajectory", *LORA, label="FSDP2 LoRA",
         build=worker.adapted, plugin=SHARDED),
    case("Trainer DDP", "trainer_beside", *LORA, label="LoRA", folder="",
         build=worker.adapted_language_model),
    case("Trainer DDP", "trainer_beside", "mixed precision", label="bf16", folder="", bf16=True),
    case("Trainer DDP", "trainer_beside", "anchor by name", label="named", folder="", named=True),
    case("Trainer DDP", "trainer_with_other_memories", folder=""),
    case("Trainer FSDP2", "trainer_beside", *LORA, label="FSDP2 LoRA", folder="", sharded={},
         build=worker.adapted_language_model),
]  # fmt: skip
# What a start of its own runs, with the slow tests.
KINDS = {
    "elements": (("granularity element",), {"granularity": "element"}),
    "tensors": (
        ("granularity tensor", "norm_scope tensor"),
        {"granularity": "tensor", "norm_scope": "tensor"},
    ),
}
MORE = [
    case("accelerate FSDP2", "accelerate_unguided", "resume", label=form, folder="",
         plugin={"state_dict_type": f"{form}_STATE_DICT"})
    for form in ("SHARDED", "FULL")
] + [
    case("FSDP1", "run_trajectory", "granularity tensor", label="made before",
         granularity="tensor", before=True),
    case("FSDP1", "run_trajectory", "norm_scope tensor", label="norms per tensor",
         norm_scope="tensor"),
    case("FSDP1", "run_trajectory", "trajectory", label="NO_SHARD", strategy="NO_SHARD"),
    case("FSDP1", "run_resume", "resume", label="sharded", full=False),
    case("FSDP1", "run_meta", "meta init"),
    case("FSDP1", "run_resume_elsewhere", "resume on other ranks", world=1),
    case("accelerate FSDP2", "accelerate_run", "trajectory", "resume", label="FSDP2 full",
         folder="", plugin={"state_dict_type": "FULL_STATE_DICT"}),
    case("accelerate FSDP2", "accelerate_trajectory", "meta init", label="FSDP2 meta",
         policy="meta", build=worker.within, plugin={**SHARDED, "cpu_ram_efficient_loading": True}),
    case("accelerate FSDP2", "accelerate_trajectory", "CPU offload", label="FSDP2 offload",
         policy="offload", plugin=SHARDED),
    case("Trainer FSDP2", "trainer_beside", "mixed precision", label="FSDP2 bf16", folder="",
         sharded={}, bf16=True),
    case("Trainer FSDP2", "trainer_beside", "anchor by name", label="FSDP2 named", folder="",
         sharded={}, named=True),
    case("Trainer FSDP2", "trainer_beside", "meta init", label="FSDP2 meta", folder="",
         sharded={"cpu_ram_efficient_loading": True}),
    case("Trainer DDP", "trainer_replays_under", "replay", label="static graph", folder="",
         accumulated=1,  # torch's no_sync() fails in a static graph, with and without replay
         ddp_static_graph=True, ddp_find_unused_parameters=False),
    case("Trainer DDP", "trainer_replays_under", "replay", label="small buckets", folder="",
         ddp_bucket_cap_mb=0.001, ddp_find_unused_parameters=False),
    case("Trainer DDP", "trainer_replays_under", "replay", label="every pass reduced", folder="",
         accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}}),
    case("Trainer FSDP2", "trainer_run", "resume", label="full", kept="Trainer FSDP2 full",
         sharded={"state_dict_type": "FULL_STATE_DICT"}),
]  # fmt: skip
ELSEWHERE = []
for engine, label, over in (
    ("accelerate DDP", "DDP", {}),
    ("accelerate FSDP2", "FSDP2", {"plugin": SHARDED}),
):
    ACCELERATE += [
        case(engine, "accelerate_trajectory", "trajectory", "clipping", "replay", label=label,
             **over),
        case(engine, "accelerate_trajectory", "anchor by name", label=f"{label} named", named=True,
             **over),
        case(engine, "accelerate_low_precision", "mixed precision", label=label, **over),
        case(engine, "accelerate_keep", label=label, kept=label, **over),
    ]  # fmt: skip
    MORE += [
        case(engine, "accelerate_trajectory", *features, label=f"{label} {kind}", **options, **over)
        for kind, (features, options) in KINDS.items()
    ]
    ELSEWHERE += [
        case(engine, "accelerate_resume_elsewhere", "resume on other ranks", label=label,
             kept=label, **over),
    ]  # fmt: skip
for engine, label, over in (
    ("Trainer DDP", "DDP", {}),
    ("Trainer FSDP2", "FSDP2", {"sharded": {}}),
):
    MORE += [
        case(engine, "trainer_beside", "tied weights", label=f"{label} tied", folder="",
             build=worker.tied_language_model, **over),
        case(engine, "trainer_beside", "frozen parts", label=f"{label} frozen", folder="",
             build=worker.frozen_language_model, **over),
    ] + [
        case(engine, "trainer_beside", *features, label=f"{label} {kind}", folder="",
             options=options, **over)
        for kind, (features, options) in KINDS.items()
    ]  # fmt: skip
    ELSEWHERE += [
        case(engine, "trainer_resume_elsewhere", "resume on other ranks", label=label,
             kept=engine, **over),
        case(engine, "trainer_resume_elsewhere", "replay", label=f"{label} replay",
             kept=f"{engine} replay", replay=True, **over),
    ]  # fmt: skip


def spawn(world, folder, cases):
    """Runs cases on ``world`` ranks; returns what went wrong in each, by rank."""
    error = None
    try:
        ranks.run(worker.run_cases, world, world, str(folder), cases)
    except (torch.multiprocessing.ProcessRaisedException,
            torch.multiprocessing.ProcessExitedException) as found:  # fmt: skip
        error = found
    outcomes = []
    for rank in range(world):
        file = folder / f"rank {rank}.json"
        outcomes.append(json.loads(file.read_text()) if file.exists() else {})
    found = {}
    for name in cases:
        by_rank = [outcome.get(name) for outcome in outcomes]
        wrong = [f"rank {rank}:\n{text}" for rank, text in enumerate(by_rank) if text]
        if not wrong and None in by_rank:
            wrong = [f"not run to its end on all ranks ({error}); see the case that failed"]
        found[name] = "\n".join(wrong)
    return found


def outcomes_of(cases, world):
    @pytest.fixture(scope="module")
    def outcomes(tmp_path_factory):
        named = {param.values[0]: arguments for param, arguments in cases}
        assert len(named) == len(cases)
        return spawn(world, tmp_path_factory.mktemp("ranks"), named)

    return outcomes


def params_of(cases):
    return pytest.mark.parametrize("name", [param for param, _ in cases])


two = outcomes_of(DDP + SHARES + RUNS + OTHER, 2)
four = outcomes_of(FOUR + OTHER_ON_FOUR, 4)
one = outcomes_of(ELSEWHERE, 1)
more = outcomes_of(MORE, 2)


@params_of(DDP)
def test_distributed_data_parallel(name, two):
    assert not two[name], two[name]


@params_of(SHARES)
def test_zero_redundancy_optimizer(name, two):
    assert not two[name], two[name]


@params_of(RUNS)
def test_fsdp1(name, two):
    assert not two[name], two[name]


@params_of(OTHER)
def test_importance_and_the_strength_without_a_search(name, two):
    assert not two[name], two[name]


@pytest.mark.slow
@params_of(FOUR + OTHER_ON_FOUR)
def test_on_four_ranks(name, four):
    assert not four[name], four[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("trained")
    cases = {
        "DDP": ("trainer_run", {"kept": "Trainer DDP"}),
        "FSDP2": ("trainer_run", {"kept": "Trainer FSDP2", "sharded": {}}),
    }
    cases |= {
        f"{name} replay": (run, {**given, "kept": f"{given['kept']} replay", "replay": True})
        for name, (run, given) in cases.items()
    }
    cases |= {param.values[0]: arguments for param, arguments in ACCELERATE + LIBRARIES}
    return folder, spawn(2, folder, cases)


@params_of(ACCELERATE)
def test_accelerate(name, trained):
    assert not trained[1][name], trained[1][name]


@pytest.mark.slow
@params_of(ELSEWHERE)
def test_on_other_ranks(name, trained, one):
    """What two ranks have saved in the middle of a task is resumed by one."""
    assert not one[name], one[name]


@params_of(LIBRARIES)
def test_with_libraries(name, trained):
    assert not trained[1][name], trained[1][name]


@pytest.mark.slow
@params_of(MORE)
def test_more_of_accelerate_and_the_trainer(name, more):
    assert not more[name], more[name]


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """The weights that the Trainer's two tasks end with on one rank, without and with replay."""
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            for replay in (False, True):
                folder = str(tmp_path_factory.mktemp("one"))
                trainer, _ = worker.two_tasks(folder, 1, replay=replay)
                found.append(trainer.model.state_dict())
    finally:
        torch.set_num_threads(threads)
    assert any(not torch.equal(x, y) for x, y in zip(*map(dict.values, found), strict=True))
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name + replay * " replay",
            marks=pytest.mark.compat(
                f"Trainer {name}", "trajectory", "clipping", "resume", *["replay"] * replay
            ),
        )
        for name in ("DDP", "FSDP2")
        for replay in (False, True)
    ],
)
def test_trainer(name, trained, in_one_process):
    """Two tasks over two ranks: killed and resumed bit for bit, and the same as in one process."""
    folder, outcome = trained
    assert not outcome[name], outcome[name]
    found = torch.load(folder.parent / "kept" / f"Trainer {name}" / "weights.pt")
    expected = in_one_process["replay" in name]
    assert found.keys() <= expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)
