# SPDX-License-Identifier: BSD-3-Clause
"""DeepSpeed's ZeRO 1, 2 and 3 around dgg's optimizers: really run, on several gloo processes.

Every case runs 50 guided, clipped steps with three groups, uneven sizes, a frozen layer and, from
two ranks on, partitions that are all padding; it must agree with the same optimizer alone in one
process. The configurations are those of docs/.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import deepspeed_worker as worker
import ranks
from dgg import backends
from training import assert_close

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed (requirements/deepspeed.txt)", allow_module_level=True)

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.dist,
    # As the ranks have: with more threads 16-bit products are rounded elsewhere.
    pytest.mark.usefixtures("one_thread"),
]
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 128.0}}
OURS = {"gradient_clipping": 0.0}
SMALL = {"sub_group_size": 20}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def case(
    stage, *features, rule="adamw", world=2, dtype=None, options=None, zero=None, model="network",
    slowly=False, **changes,
):  # fmt: skip
    """A case with its marks for the compatibility table."""
    made = {
        "rule": rule, "options": options or {}, "dtype": dtype, "world": world, "model": model,
        "config": {"stage": stage, "zero": zero or {}, **changes},
    }  # fmt: skip
    name = "-".join(
        [f"zero{stage}", f"{world}ranks", rule, model]
        + [f"{k}={v}" for k, v in (options or {}).items()]
        + list(zero or {})
        + list(changes)
    )
    marks = [pytest.mark.compat(f"DeepSpeed ZeRO-{stage}", *features)] if features else []
    return pytest.param(made, id=name, marks=[*marks, *[pytest.mark.slow] * slowly])


ALL = (1, 2, 3)
CASES = [
    *(
        case(s, "trajectory", "clipping", "frozen parts", world=w, slowly=w == 3 or w == 1 != s)
        for w in ALL
        for s in ALL
    ),
    *(
        case(s, "granularity tensor", options={"granularity": "tensor"}, slowly=s == 1)
        for s in (1, 2)
    ),
    case(3, "granularity tensor", options={"granularity": "tensor"}, zero=SMALL, slowly=True),
    *(
        case(s, "granularity element", options={"granularity": "element"}, slowly=s != 2)
        for s in ALL
    ),
    *(
        case(s, "norm_scope tensor", options={"norm_scope": "tensor"}, slowly=s == 1)
        for s in (1, 2)
    ),
    case(
        3,
        "norm_scope tensor",
        options={"norm_scope": "tensor", "granularity": "element"},
        zero=SMALL,
    ),
    *(case(s, "clipping", options={"max_grad_norm": 0.5}, slowly=s != 2, **OURS) for s in ALL),
    case(2, rule="sgd", options={"granularity": "element", "backend": "reference"}),
    case(3, rule="sgd", options={"granularity": "tensor"}, zero=SMALL, slowly=True),
    case(2, options={"granularity": "element"}, zero={"round_robin_gradients": True}, slowly=True),
    case(3, options={"scaling": False}, slowly=True, **OURS),
    *(case(s, "CPU offload", zero=OFFLOAD, slowly=s == 1) for s in (1, 2)),
    case(3, "CPU offload", zero={**OFFLOAD, "offload_param": {"device": "cpu"}}),
    *(case(s, "mixed precision", dtype="bfloat16", slowly=s != 3, **BF16) for s in ALL),
    case(1, dtype="bfloat16", data_types={"grad_accum_dtype": "fp32"}, slowly=True, **BF16),
    *(case(s, "mixed precision", dtype="float16", slowly=s == 3, **FP16) for s in (2, 3)),
    *(case(s, "LoRA", "frozen parts", model="lora", slowly=s != 2) for s in ALL),
    *(case(s, "tied weights", model="tied", slowly=s != 2) for s in ALL),
    case(3, "meta init", model="zero.Init"),
    *(
        case(s, options={"importance": 0.5, "granularity": "element"}, slowly=s != 2, world=2)
        for s in ALL
    ),
    *(case(s, options={"importance": 1.0, "route": "decoupled"}, slowly=s == 1) for s in (1, 3)),
    case(2, options={"importance": 1.0, "norm_scope": "tensor"}),
    case(3, options={"importance": 0.5, "norm_scope": "tensor"}, zero=SMALL, slowly=True),
    case(3, options={"importance": 0.5}, zero=OFFLOAD, slowly=True),
    case(2, options={"importance": 0.5}, model="lora", slowly=True),
]
_ran: dict[int, dict] = {}


def spawn(function, world, folder, *arguments):
    ranks.run(function, world, world, str(folder), *arguments)


def _cased(item):
    return item.path.name == "test_deepspeed.py" and "one" in getattr(item, "fixturenames", ())


@pytest.fixture
def result(request, tmp_path_factory):
    """What the case left; the first test of a rank count runs all that are wanted in one start."""
    wanted = request.getfixturevalue("one")
    world = wanted["world"]
    if world not in _ran:
        every = [i.callspec.params.get("one") for i in request.session.items if _cased(i)]
        cases = [one for one in every if one["world"] == world]
        folder = tmp_path_factory.mktemp(f"{world} ranks")
        spawn(worker.run_cases, world, folder, cases)
        results = torch.load(folder / "results.pt")
        _ran[world] = {json.dumps(c): r for c, r in zip(cases, results, strict=True)}
    return _ran[world][json.dumps(wanted)]


assert_weights = functools.partial(assert_close, dtype=torch.float32)


@pytest.mark.parametrize("one", CASES)
def test_training_is_that_of_one_process(one, result):
    if one["dtype"] is not None:
        dtype = getattr(torch, one["dtype"])
        scale = 128.0 if dtype == torch.float16 else 1.0
        assert_weights(result["weights"], worker.alone_in_16_bits(dtype, 0.5, scale))
        return
    clip = one["config"].get("gradient_clipping", 0.5) or None
    options = {"max_grad_norm": clip, **one["options"]}
    model, _, expected = worker.alone(one["rule"], options, model=one["model"])
    assert_weights(result["weights"], list(model.parameters()))
    groups = 4 if "sub_group_size" in one["config"]["zero"] else 3
    measured = options.get("scaling", True)
    for (collectives, found), alone in zip(result["steps"], expected, strict=True):
        assert torch.equal(found["injected"], alone["injected"])
        most = groups if options.get("norm_scope") == "tensor" else 1
        wanted = most if bool(found["injected"]) and measured and one["world"] > 1 else 0
        assert collectives == wanted
        assert (found["scale"] == 0).all() == (alone["scale"] == 0).all()
        if found["distance"] is not None:
            torch.testing.assert_close(found["scale"], alone["scale"], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found["distance"], alone["distance"], rtol=1e-4, atol=1e-6)
    injected = [bool(found["injected"]) for _, found in result["steps"]]
    # Draws per step leave steps out; before the first anchor there is nothing to inject.
    assert not any(injected[: worker.BOUNDARIES[0]]) and any(injected)
    if options.get("granularity", "step") == "step":
        assert not all(injected[worker.BOUNDARIES[0] :])


RESUMED = [{"rule": "adamw", "options": {}, "config": {"stage": stage}} for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    spawn(worker.run_checkpoints, 2, folder, RESUMED)
    return folder


@pytest.mark.compat("DeepSpeed ZeRO-1", "resume")
@pytest.mark.compat("DeepSpeed ZeRO-2", "resume")
@pytest.mark.compat("DeepSpeed ZeRO-3", "resume")
def test_resumed_training_is_the_same_bit_for_bit(saved):
    # The ranks have compared them.
    assert len(torch.load(saved / "results.pt")) == len(RESUMED)


def convert(source, target):
    """Converts a checkpoint to DeepSpeed's universal format."""
    command = [
        sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal",
        "--input_folder", str(source), "--output_folder", str(target),
        "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state",
    ]  # fmt: skip
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def assert_needs_anchor(messages):
    for plain, universal in zip(messages[::2], messages[1::2], strict=True):
        assert plain != "loaded", plain
        assert "the resume lost them" in universal and "set_anchor(tensors)" in universal


@pytest.mark.slow
@pytest.mark.compat("DeepSpeed ZeRO-1", "!resume on other ranks", "anchor by name")
@pytest.mark.compat("DeepSpeed ZeRO-2", "!resume on other ranks", "anchor by name")
@pytest.mark.compat("DeepSpeed ZeRO-3", "!resume on other ranks", "anchor by name")
def test_other_rank_counts_need_the_anchor_named_again(saved, tmp_path):
    for number in range(len(RESUMED)):
        folder = saved / f"saved {number}"
        convert(folder / "middle", folder / "universal")
    spawn(worker.resume_on_others, 3, tmp_path, str(saved), RESUMED)
    found = torch.load(tmp_path / "results.pt")
    assert_needs_anchor(found["messages"])
    for mine, theirs in zip(found["weights"], torch.load(saved / "results.pt"), strict=True):
        assert_weights(mine, theirs["weights"])


# The last one leaves settings behind that DeepSpeed keeps for the whole process.
SEVERAL = [
    "run_misuses", "run_loss_scaling", "run_padding", "run_accumulation", "run_without_states",
    "run_importance",
]  # fmt: skip
SLOW = ["run_boundaries", "run_refusals"]


@pytest.fixture(scope="module")
def several(request, tmp_path_factory):
    """Runs what ``SEVERAL`` or ``SLOW`` names in one start, and tells how each of them ended."""
    names = {"several": SEVERAL, "slow": SLOW}[getattr(request, "param", "several")]
    folder, error = tmp_path_factory.mktemp("several"), None
    try:
        spawn(worker.run_several, 2, folder, names)
    except torch.multiprocessing.ProcessRaisedException as raised:
        error = raised

    def came_to_its_end(name):
        if not (folder / f"{name} done").exists():
            raise error
        return folder

    return came_to_its_end


@pytest.mark.compat("DeepSpeed ZeRO-1", "!replay", "anchor by name")
@pytest.mark.compat("DeepSpeed ZeRO-2", "!replay", "anchor by name")
@pytest.mark.compat("DeepSpeed ZeRO-3", "!replay", "anchor by name")
def test_misuses_are_refused_with_the_remedy(several):
    several("run_misuses")


def test_skipped_steps_draw_nothing_and_norms_are_of_what_is_handed_over(several):
    several("run_loss_scaling")


def test_accumulated_passes_are_one_step(several):
    several("run_accumulation")


@pytest.mark.slow
@pytest.mark.parametrize("several", ["slow"], indirect=True)
def test_many_tasks_grow_nothing_and_a_new_engine_takes_a_new_optimizer(several):
    several("run_boundaries")


def test_weights_without_state_and_state_before_the_engine(several):
    several("run_without_states")


@pytest.mark.slow
@pytest.mark.parametrize("several", ["slow"], indirect=True)
def test_what_is_not_supported_is_refused_before_anything_is_changed(several):
    several("run_refusals")


def test_padding_counts_nowhere(several):
    folder = several("run_padding")
    model, _, _ = worker.alone(clip=0.5, last=14)
    assert_weights(torch.load(folder / "padding.pt"), list(model.parameters()))


def test_importance_goes_through_tasks_and_checkpoints(several):
    several("run_importance")


ACCELERATE = [
    (
        "zero2",
        {"stage": 2, "resumed": True},
        ["trajectory", "clipping", "frozen parts", "resume", "!replay"],
    ),
    (
        "zero3",
        {"stage": 3, "resumed": True},
        ["trajectory", "clipping", "frozen parts", "resume", "!replay"],
    ),
    ("zero2-bf16", {"stage": 2, "precision": "bf16"}, ["mixed precision"]),
    ("zero3-bf16", {"stage": 3, "precision": "bf16"}, ["mixed precision"]),
    ("zero2-lora", {"stage": 2, "model": "lora"}, ["LoRA"]),
    ("zero3-tied", {"stage": 3, "model": "tied"}, ["tied weights"]),
    ("zero3-init", {"stage": 3, "model": "zero.Init"}, ["meta init"]),
    ("zero2-tensor", {"stage": 2, "options": {"granularity": "tensor"}}, ["granularity tensor"]),
    ("zero3-element", {"stage": 3, "options": {"granularity": "element"}}, ["granularity element"]),
    ("zero3-norms", {"stage": 3, "options": {"norm_scope": "tensor"}}, ["norm_scope tensor"]),
    ("zero2-offload", {"stage": 2, "zero": OFFLOAD}, ["CPU offload"]),
    ("zero3-named", {"stage": 3, "named": True}, ["anchor by name"]),
]
PLAIN = {
    "precision": "no", "model": "network", "resumed": False, "options": {}, "zero": {},
    "named": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("accelerate")
    spawn(worker.run_accelerate, 2, folder, [{**PLAIN, **c} for _, c, _ in ACCELERATE])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(i, id=name, marks=pytest.mark.compat("accelerate DeepSpeed", *features))
        for i, (name, _, features) in enumerate(ACCELERATE)
    ],
)
def test_accelerate(number, accelerated):
    one = {**PLAIN, **ACCELERATE[number][1]}
    if one["precision"] == "bf16":
        expected = worker.alone_in_16_bits(torch.bfloat16, 0.5)
    else:
        options, tiny = one["options"], not one["resumed"]
        made = worker.alone(options=options, clip=0.5, model=one["model"], tiny=tiny)[0]
        expected = list(made.parameters())
    assert_weights(torch.load(accelerated / "results.pt")[number], expected)


@pytest.mark.slow
@pytest.mark.compat("accelerate DeepSpeed", "!resume on other ranks", "anchor by name")
def test_accelerate_on_other_rank_counts_needs_the_anchor_named_again(accelerated, tmp_path):
    cases = [{**PLAIN, **c} for _, c, _ in ACCELERATE if c.get("resumed")]
    for number in range(len(cases)):
        saved, made = accelerated / f"saved {number}", accelerated / f"universal {number}"
        convert(saved / "pytorch_model", made / "pytorch_model")
    spawn(worker.resume_accelerate_on_others, 3, tmp_path, str(accelerated), cases)
    found = torch.load(tmp_path / "results.pt")
    assert_needs_anchor(found["messages"])
    expected = list(worker.alone(clip=0.5, last=14, tiny=False)[0].parameters())
    for mine in found["weights"]:
        assert_weights(mine, expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns where the ranks' results are, with adapters or not, and what one process has."""
    pytest.importorskip("transformers")

    @functools.cache
    def run(adapters):
        folder = tmp_path_factory.mktemp("trainers")
        spawn(worker.run_trainer, 2, folder, adapters)
        return folder, worker.two_tasks(str(folder / "alone"), None, 8, adapters)[0]

    return run


BOTH = ("trajectory", "clipping", "resume", "!replay")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "adapters",
    [
        pytest.param(
            False, id="all", marks=pytest.mark.compat("Trainer DeepSpeed", *BOTH, "tied weights")
        ),
        pytest.param(
            True,
            id="lora",
            marks=[
                pytest.mark.compat("Trainer DeepSpeed", *BOTH, "LoRA", "frozen parts"),
                pytest.mark.slow,
            ],
        ),
    ],
)
def test_trainer(stage, adapters, trained):
    folder, (weights, log_alone) = trained(adapters)
    (through, log), (resumed, _), said = torch.load(folder / f"results {stage}.pt")
    assert_weights(list(through.values()), [weights[name] for name in through])
    assert all(torch.equal(resumed[name], x) for name, x in through.items())
    for key in ("guidance/injected", "guidance/scale", "guidance/distance", "guidance/task"):
        mine = [entry[key] for entry in log if key in entry]
        assert mine == pytest.approx([e[key] for e in log_alone if key in e], rel=1e-4), key
    assert {entry["guidance/task"] for entry in log} == {1}
    # Once in each of the trainings: what is at work, though ZeRO-3's groups are empty then.
    lines = [line for line in said if "(backend " in line]
    backend = backends.choose(None, torch.device("cpu"))
    assert all(line.startswith(f"dgg.AdamW (backend {backend}), alpha ") for line in lines)
    assert all("task " in line for line in lines)
    assert ["partitions of this rank" in line for line in lines] == [False, True, True, True]


TRAINED = [
    ("zero2-tensor", {"stage": 2, "options": {"granularity": "tensor"}}, ["granularity tensor"]),
    ("zero3-element", {"stage": 3, "options": {"granularity": "element"}}, ["granularity element"]),
    ("zero3-norms", {"stage": 3, "options": {"norm_scope": "tensor"}}, ["norm_scope tensor"]),
    ("zero2-offload", {"stage": 2, "zero": OFFLOAD}, ["CPU offload"]),
    ("zero3-init", {"stage": 3, "init": True}, ["meta init"]),
    ("zero3-named", {"stage": 3, "named": True}, ["anchor by name"]),
    ("zero2-bf16", {"stage": 2, "mixed": True}, ["mixed precision"]),
    ("zero3-bf16", {"stage": 3, "mixed": True}, ["mixed precision"]),
]
USUAL = {"options": {}, "zero": {}, "init": False, "named": False, "mixed": False}


@pytest.fixture(scope="module")
def trained_cases(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("trainer cases")
    spawn(worker.run_trainer_cases, 2, folder, [{**USUAL, **c} for _, c, _ in TRAINED])
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(i, id=name, marks=pytest.mark.compat("Trainer DeepSpeed", *features))
        for i, (name, _, features) in enumerate(TRAINED)
    ],
)
def test_trainer_options(number, trained_cases, tmp_path):
    one = {**USUAL, **TRAINED[number][1]}
    if one["mixed"]:
        # The ranks have compared it with DeepSpeed's engine, bit for bit.
        assert trained_cases[number] is None
        return
    weights, log = trained_cases[number]
    expected, log_alone = worker.one_task(str(tmp_path), one, None, 8)
    assert_weights(list(weights.values()), [expected[name] for name in weights])
    for key in ("guidance/injected", "guidance/scale", "guidance/distance"):
        mine = [entry[key] for entry in log if key in entry]
        assert mine == pytest.approx([e[key] for e in log_alone if key in e], rel=1e-4), key
    assert any(entry.get("guidance/injected") for entry in log)


@pytest.mark.slow
@pytest.mark.compat("Trainer DeepSpeed", "!resume on other ranks")
def test_a_trainer_on_other_rank_counts_is_refused(trained, tmp_path):
    spawn(worker.resume_trainer_on_others, 3, tmp_path, str(trained(False)[0]))
    for message in torch.load(tmp_path / "messages.pt"):
        assert "world size" in message or "size mismatch" in message, message


def test_an_optimizer_block_for_the_trainer_is_an_error_that_names_it(trained):
    message, steps = torch.load(trained(False)[0] / "block.pt")
    assert "'optimizer' block in a DeepSpeed configuration" in message
    assert "remove the block" in message and steps == 0
