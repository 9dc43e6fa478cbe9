# SPDX-License-Identifier: BSD-3-Clause
"""Faults that a review has found, each with the smallest program that shows it."""

import copy
import errno

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import dgg

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(model, opt, steps=2):
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        opt.step()


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))


# -- groups and checkpoints -----------------------------------------------------------------------


def test_a_group_that_was_taken_out_and_put_back_loads_again():
    """A layer is frozen for a while by taking its group out: anchors stay, the count does not."""
    model = two_layers()
    opt = dgg.AdamW([{"params": layer.parameters()} for layer in model], alpha=1.0)
    fit(model, opt)
    opt.set_anchor()
    opt.add_param_group(opt.param_groups.pop())
    fit(model, opt)
    assert opt.guidance_stats()["guided"] == 2
    again = dgg.AdamW([{"params": layer.parameters()} for layer in model], alpha=1.0)
    again.load_state_dict(opt.state_dict())  # ValueError: ... 0 anchored parameters, but 1 ...
    assert again.state[model[1].weight]["anchor"].equal(opt.state[model[1].weight]["anchor"])


def test_a_new_list_of_groups_is_the_one_that_set_anchor_marks():
    """Accelerate's wrapper sets it, too; set_anchor() goes on with the former list."""
    model = two_layers()
    opt = dgg.AdamW(model.parameters(), alpha=1.0)
    opt.param_groups = [dict(group) for group in opt.param_groups]
    fit(model, opt)
    opt.set_anchor()
    (group,) = opt.param_groups
    assert (group["task_index"], group["anchored"]) == (1, 2)
    dgg.AdamW(model.parameters(), alpha=1.0).load_state_dict(opt.state_dict())


def test_importance_counts_former_tasks_with_a_new_list_of_groups():
    model = two_layers()
    opt = dgg.AdamW(model.named_parameters(), alpha=1.0, importance=0.5)
    opt.param_groups = [dict(group) for group in opt.param_groups]
    sums = []
    for _ in range(2):
        fit(model, opt)
        sums.append(opt.importance_dict()["0.weight"].mean())
        opt.set_anchor()
    assert opt.param_groups[0]["importance_mean"] > 0
    assert sums[1] > 1.5 * sums[0]


def test_anchors_of_named_parameters_do_not_land_on_others():
    """Both sides have names, and say that the order differs."""
    model = two_layers()
    named = list(model.named_parameters())
    opt = dgg.AdamW(named, alpha=1.0)
    fit(model, opt)
    opt.set_anchor()
    again = dgg.AdamW(named[::-1], alpha=1.0)
    try:
        again.load_state_dict(opt.state_dict())
    except ValueError:
        return  # refused, with the names
    for param in model.parameters():
        assert torch.equal(again.state[param]["anchor"], opt.state[param]["anchor"])


def test_a_load_does_not_exchange_the_names_that_set_anchor_goes_by():
    """torch puts the checkpoint's names over the groups' own."""
    model = two_layers()
    named = list(model.named_parameters())
    opt = dgg.AdamW(named, alpha=1.0)
    fit(model, opt)
    again = dgg.AdamW(named[::-1], alpha=1.0)
    try:
        again.load_state_dict(opt.state_dict())
    except ValueError:
        return
    again.set_anchor(model.state_dict())
    for param in model.parameters():
        assert torch.equal(again.state[param]["anchor"], param)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("state_dtype", torch.float32), ("anchor_dtype", torch.float32),
        ("importance_dtype", torch.float32), ("anchor_device", "cpu"), ("backend", "reference"),
        ("master_weights", True), ("stochastic_rounding", True),
    ],
)  # fmt: skip
def test_a_group_with_an_option_that_groups_have_not_is_an_error(option, value):
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=option):
        dgg.AdamW([{"params": [param], option: value}])


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 5), ("anchor_dtype", torch.bfloat16), ("backend", "reference"),
     ("stochastic_rounding", True), ("master_weights", True)],
)  # fmt: skip
def test_an_attribute_that_no_step_reads_is_an_error(option, value):
    """As ``opt.alpha = 0.1`` is; a seed per task is what the documentation recommends."""
    opt = dgg.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(AttributeError):
        setattr(opt, option, value)


def test_a_copy_of_a_resumed_optimizer_keeps_its_anchor_as_well():
    model = two_layers()
    opt = dgg.AdamW(model.parameters())
    fit(model, opt)
    opt.set_anchor(task=1)
    fit(model, opt)
    resumed = dgg.AdamW(model.parameters())
    resumed.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="just resumed"):
        resumed.set_anchor()
    with pytest.raises(RuntimeError, match="just resumed"):
        copy.deepcopy(resumed).set_anchor()


def regrouped(opt_groups, again_groups, anchored):
    """Saves and loads with torch's helper, by name and so with any groups."""
    model, again_model = two_layers(), two_layers()
    opt = dgg.AdamW(opt_groups(model), alpha=1.0)
    fit(model, opt)
    if anchored:
        opt.set_anchor()
    again = dgg.AdamW(again_groups(again_model), alpha=1.0)
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, opt, options=options)
    set_optimizer_state_dict(again_model, again, copy.deepcopy(saved), options=options)
    for one, other in zip(model.parameters(), again_model.parameters(), strict=True):
        for name, value in opt.state[one].items():
            assert torch.equal(again.state[other][name], value)
    return again


def one_group(model):
    return list(model.parameters())


def two_groups(model):
    return [{"params": layer.parameters()} for layer in model]


def test_a_distributed_checkpoint_of_two_groups_loads_into_one():
    """The remedy in the error, prepare_for_load(), does not help."""
    again = regrouped(two_groups, one_group, anchored=True)
    assert again.param_groups[0]["anchored"] == 2


@pytest.mark.parametrize("anchored", [False, True])
def test_a_distributed_checkpoint_of_one_group_loads_into_two(anchored):
    """torch.optim.AdamW loads it; without an anchor there is not even guidance in it."""
    again = regrouped(one_group, two_groups, anchored)
    assert [group["anchored"] for group in again.param_groups] == [anchored] * 2


# -- the Trainer ----------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x, labels=None, **_):
        y = self.layer(x).squeeze(-1)
        return {"loss": (y - labels).square().mean(), "logits": y}


def examples(count=4):
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 5, generator=rng)
    return [{"x": row[:4], "labels": row[4]} for row in rows]


OURS = (dgg.AdamW, {"lr": 1e-2, "alpha": 0.3})


def trainer_of(folder, model=None, *, cls=None, options=None, **arguments):
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", label_names=["labels"],
        remove_unused_columns=False, **(options or {}),
    )  # fmt: skip
    arguments.setdefault("optimizer_cls_and_kwargs", OURS)
    return (cls or transformers.Trainer)(
        Net() if model is None and "model_init" not in arguments else model, args,
        train_dataset=examples(), **arguments,
    )  # fmt: skip


def group_of(trainer):
    return dgg.unwrap(trainer.optimizer).param_groups[0]


def task_and_anchors(trainer):
    groups = dgg.unwrap(trainer.optimizer).param_groups
    return groups[0]["task_index"], sum(group["anchored"] for group in groups)


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["DataParallel", "compile"],
)  # fmt: skip
def test_tasks_are_counted_by_the_model_inside_a_wrapper(wrap, tmp_path):
    """A wrapper and a callback for every task: all tasks but the first are silently not guided."""
    model, tasks = Net(), []
    for number in range(2):
        trainer = trainer_of(
            tmp_path / str(number), wrap(model), callbacks=[dgg.hf.GuidanceCallback()]
        )
        trainer.train()
        tasks.append(task_and_anchors(trainer))
    assert tasks == [(0, 0), (1, 2)]


def test_the_trials_of_a_search_are_one_task(tmp_path, monkeypatch):
    """The second trial is guided, towards the weights that it begins with."""
    monkeypatch.setattr(transformers.integrations.integration_utils, "hp_params", dict)
    monkeypatch.setattr(transformers.integrations, "hp_params", dict, raising=False)
    trainer = trainer_of(
        tmp_path, model_init=lambda trial=None: Net(), callbacks=[dgg.hf.GuidanceCallback()]
    )
    monkeypatch.setattr(trainer, "_hp_search_setup", lambda trial: None)
    tasks = []
    for _ in range(3):
        trainer.train(trial={"trial": 1})
        tasks.append(task_and_anchors(trainer))
    assert tasks == [(0, 0)] * 3


def test_a_task_that_is_said_is_the_one_from_which_is_counted(tmp_path):
    """The same model object, set back for another seed: the second series is 0, 3, 4."""
    model, series = Net(), []
    for _ in range(2):
        guide, tasks = dgg.hf.GuidanceCallback(task=0), []
        for number in range(2):
            trainer = trainer_of(tmp_path / str(number), model, callbacks=[guide])
            trainer.train()
            tasks.append(group_of(trainer)["task_index"])
        series.append(tasks)
    assert series == [[0, 1], [0, 1]]


def test_a_training_that_failed_is_told_also_by_a_new_callback(tmp_path, caplog):
    """In a notebook: the cell with Trainer and callback is run again after an error."""

    class Fails(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step:
                raise RuntimeError("boom")
            return super().training_step(*args, **kwargs)

    model = Net()
    trainer_of(tmp_path / "0", model, callbacks=[dgg.hf.GuidanceCallback()]).train()
    with pytest.raises(RuntimeError, match="boom"):
        trainer_of(tmp_path / "1", model, cls=Fails, callbacks=[dgg.hf.GuidanceCallback()]).train()
    trainer_of(tmp_path / "1", model, callbacks=[dgg.hf.GuidanceCallback()]).train()
    assert "did not reach its end" in caplog.text


def test_a_full_disk_at_the_end_of_a_training_loses_no_count(tmp_path, monkeypatch):
    """The next Trainer takes its task for the first one, which is not guided."""
    import safetensors.torch

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, ours = Net(), (dgg.AdamW, {"lr": 1e-2, "importance": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        trainer = trainer_of(
            tmp_path / "0", model, optimizer_cls_and_kwargs=ours,
            callbacks=[dgg.hf.GuidanceCallback()],
        )  # fmt: skip
        try:
            trainer.train()
        except OSError:
            pass  # a warning would do: the sums are kept for the next Trainer
    trainer = trainer_of(
        tmp_path / "1", model, optimizer_cls_and_kwargs=ours,
        callbacks=[dgg.hf.GuidanceCallback()],
    )  # fmt: skip
    trainer.train()
    assert task_and_anchors(trainer) == (1, 2)


def test_install_keeps_the_alpha_of_an_optimizer_that_a_trainer_is_given(tmp_path, trainers):
    """ "Trainers that are given an optimizer of their own keep it" - but not its alpha."""
    handle = dgg.hf.install()
    try:
        trainer = trainer_of(tmp_path)
        trainer.train()
    finally:
        handle.remove()
    assert group_of(trainer)["alpha"] == 0.3


def test_install_and_a_callback_of_ones_own_do_not_both_set_alpha(tmp_path, trainers):
    handle = dgg.hf.install(alpha=0.5)
    try:
        trainer = trainer_of(
            tmp_path, optimizer_cls_and_kwargs=None, callbacks=[dgg.hf.GuidanceCallback(0.7)]
        )
        trainer.train()
    finally:
        handle.remove()
    assert group_of(trainer)["alpha"] == 0.7


def test_install_leaves_what_others_have_put_in_after_it(trainers):
    """As unsloth does; a second install() calls the first one's remove()."""
    handle, called = dgg.hf.install(), []
    ours = transformers.Trainer.__init__

    def theirs(self, *args, **kwargs):
        called.append(True)
        ours(self, *args, **kwargs)

    transformers.Trainer.__init__ = theirs
    handle.remove()
    trainer_of("unused")
    assert called


def test_a_group_that_is_not_guided_stays_so_under_the_callback(tmp_path):
    model = Net()
    groups = [{"params": [model.layer.weight], "alpha": 0.0}, {"params": [model.layer.bias]}]
    opt = dgg.AdamW(groups, lr=1e-2, alpha=0.2)
    trainer_of(
        tmp_path, model, optimizer_cls_and_kwargs=None, optimizers=(opt, None),
        callbacks=[dgg.hf.GuidanceCallback(0.5, task=1)],
    ).train()  # fmt: skip
    assert [group["alpha"] for group in opt.param_groups] == [0.0, 0.5]


def memory():
    buffer = dgg.ReplayBuffer(4, seed=0)
    buffer.add_task(examples())
    return buffer


def test_of_two_bounds_the_smaller_one_holds_also_if_it_was_set_in_the_groups(tmp_path):
    model = Net()
    opt = dgg.AdamW(model.parameters(), lr=1e-2)
    for group in opt.param_groups:
        group["max_grad_norm"] = 1e-3
    trainer_of(
        tmp_path, model, cls=dgg.hf.ReplayTrainer, optimizer_cls_and_kwargs=None,
        optimizers=(opt, None), replay_buffer=memory(), callbacks=[dgg.hf.GuidanceCallback(task=1)],
        options={"max_grad_norm": 1.0},
    ).train()  # fmt: skip
    assert opt.param_groups[0]["max_grad_norm"] == 1e-3


@pytest.mark.parametrize("left", ["zeros", "half", "nothing"])
def test_a_damaged_memory_is_named_and_not_taken_for_unknown_types(left, tmp_path):
    def made(buffer):
        return trainer_of(
            tmp_path, cls=dgg.hf.ReplayTrainer, replay_buffer=buffer,
            callbacks=[dgg.hf.GuidanceCallback(task=1)],
        )  # fmt: skip

    trainer = made(memory())
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.train()
    path = tmp_path / "checkpoint-1" / "replay_buffer.pt"
    whole = path.read_bytes()
    path.write_bytes(
        {"zeros": bytes(len(whole)), "half": whole[: len(whole) // 2], "nothing": b""}[left]
    )
    with pytest.raises(RuntimeError, match=r"replay_buffer\.pt") as caught:
        made(dgg.ReplayBuffer(4)).train(resume_from_checkpoint=str(path.parent))
    assert "add_safe_globals" not in str(caught.value)


def saved_then_resumed(tmp_path, first, then):
    """Trains with one callback, and resumes after the first step with another."""
    trainer = trainer_of(tmp_path, callbacks=[first])
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.train()
    trainer_of(tmp_path, callbacks=[then]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )


def test_a_checkpoint_of_a_later_task_is_refused(tmp_path):
    """The class says: ValueError if ``task`` is not the checkpoint's. An earlier one is refused."""
    callback = dgg.hf.GuidanceCallback
    with pytest.raises(ValueError, match="task"):
        saved_then_resumed(tmp_path, callback(task=3), callback(task=2))


def test_a_first_task_that_was_not_guided_is_not_silently_resumed_as_one_that_is(tmp_path, caplog):
    """As another alpha is told, which is not in force."""
    callback = dgg.hf.GuidanceCallback
    saved_then_resumed(tmp_path, callback(), callback(guide_first_task=True))
    assert "guide_first_task" in caplog.text
