# SPDX-License-Identifier: BSD-3-Clause
"""dgg in the Hugging Face Trainer: a peft LoRA model over several tasks, for real, no downloads.

Run as a script, this file trains one task in a process of its own and dies in the middle of it.
"""

import copy
import json
import linecache
import logging
import os
import pathlib
import re
import subprocess
import sys
import types
import warnings

import pytest
import torch

import dgg

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402

from dgg.hf import GuidanceCallback, is_active  # noqa: E402
from language_tasks import counting as task_data  # noqa: E402
from language_tasks import llama as base_model  # noqa: E402

STEPS = 6
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("alpha", "expected"), [("auto", True), (0.2, True), (0, False)])
def test_is_active_knows_every_alpha(alpha, expected):
    param = torch.nn.Parameter(torch.ones(3))
    trainer = types.SimpleNamespace(optimizer=dgg.SGD([param], alpha=alpha))
    trainer.optimizer.set_anchor()
    assert not is_active(trainer)  # it has made no step
    param.grad = torch.ones(3)
    trainer.optimizer.step()
    assert is_active(trainer) == expected


def lora(base, seed=1, **options):
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1
    )
    return peft.get_peft_model(base, config, **options)


OPTIONS = {"lr": 1e-2, "alpha": 0.5, "seed": 3}


def trainer_for(
    model, data, out, callbacks, *, options=None, optimizer=dgg.AdamW,
    kind=transformers.Trainer, optimizers=(None, None), model_init=None, **over,
):  # fmt: skip
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
        **over,
    }
    chosen = None if optimizer is None else (optimizer, {**OPTIONS, **(options or {})})
    return kind(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=data,
        optimizer_cls_and_kwargs=chosen,
        optimizers=optimizers,
        eval_dataset=task_data(3, examples=4),
        callbacks=callbacks,
        model_init=model_init,
    )


def trainable(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def anchors(trainer):
    opt = dgg.unwrap(trainer.optimizer)
    return {
        n: opt.state[p]["anchor"]
        for n, p in trainer.model.named_parameters()
        if "anchor" in opt.state.get(p, ())
    }


def assert_same(left, right, path="state"):
    """Bit for bit, whatever the nesting."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for place, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}[{place}]")
    else:
        assert left == right, path


def assert_told(caplog, text):
    """A warning begins so, and is about the line of this file that trains."""
    (record,) = [r for r in caplog.records if r.getMessage().startswith(text)]
    assert (record.name, record.pathname, record.levelname) == ("dgg.hf", __file__, "WARNING")
    assert ".train(" in linecache.getline(__file__, record.lineno)


class Grab(transformers.TrainerCallback):
    """Keeps what a logger is given, and what holds when the training begins."""

    def __init__(self):
        self.entries = []
        self.start = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = trainable(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


class Die(transformers.TrainerCallback):
    """Ends the training in the middle, after a checkpoint."""

    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how()


def interrupt():
    raise KeyboardInterrupt


def second_task(root, **over):
    """Task 1 in a fresh process: base model, the adapter of task 0, the anchor from its files."""
    model = peft.PeftModel.from_pretrained(base_model(), root / "task0", is_trainable=True)
    callback = GuidanceCallback(task=1, anchor=root / "task0", alpha=[0.0, 0.6])
    extra = over.pop("callbacks", [])
    return trainer_for(
        model,
        task_data(3),
        over.pop("out", root / "task1"),
        [callback, *extra],
        save_strategy="steps",
        save_steps=3,
        **over,
    )


# -- two tasks, interruption, resume -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.compat("one process", "LoRA", "resume", "anchor by name")
def test_process_per_task_resumed_bit_for_bit(tmp_path):
    """A second process goes on from the first one's adapter, is killed, and a third resumes it."""
    first = trainer_for(lora(base_model()), task_data(1), tmp_path / "out0", [GuidanceCallback()])
    first.train()
    assert not is_active(first) and not anchors(first)
    first.model.save_pretrained(tmp_path / "task0")
    adapter = load_file(tmp_path / "task0" / "adapter_model.safetensors")

    straight = second_task(tmp_path, out=tmp_path / "straight")
    straight.train()
    assert is_active(straight)
    opt = dgg.unwrap(straight.optimizer)
    assert [g["task_index"] for g in opt.param_groups] == [1, 1]
    assert [g["alpha"] for g in opt.param_groups] == [0.6, 0.6]
    assert opt.param_groups[0]["draw_index"] == STEPS
    for name, anchor in anchors(straight).items():
        assert torch.equal(anchor, adapter[name.replace(".default", "")])

    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert killed.returncode == 9, killed.stderr[-3000:]
    checkpoint = tmp_path / "task1" / "checkpoint-3"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert all("anchor" in entry for entry in saved["state"].values())
    assert saved["param_groups"][0]["draw_index"] == 3

    resumed = second_task(tmp_path, out=tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(trainable(resumed.model), trainable(straight.model), "weights")
    assert_same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert_same(resumed.lr_scheduler.state_dict(), straight.lr_scheduler.state_dict())
    losses = [
        [e["loss"] for e in t.state.log_history if e["step"] > 4 and "loss" in e]
        for t in (resumed, straight)
    ]
    assert losses[0] == losses[1] and losses[0]
    # And the guidance was no no-op.
    plain = second_task(tmp_path, out=tmp_path / "plain", options={"strength": 0.0})
    plain.train()
    assert not is_active(plain)
    moved = trainable(plain.model)
    assert any(not torch.equal(p, moved[n]) for n, p in trainable(straight.model).items())


@pytest.mark.parametrize("restore", [False, True])
def test_one_process_resumed_bit_for_bit(tmp_path, restore):
    """Two tasks in one process with one callback; the second is interrupted and resumed anew."""

    def run(out, *, stop):
        model, guidance = lora(base_model()), GuidanceCallback(alpha={0: 0.3, 1: 0.6})
        trainer_for(model, task_data(1), out / "0", [guidance]).train()
        extra = [Die(4, interrupt)] if stop else []
        second = trainer_for(
            model, task_data(3), out / "1", [guidance, *extra], save_strategy="steps", save_steps=3
        )
        if not stop:
            second.train()
            return second
        with pytest.raises(KeyboardInterrupt):
            second.train()
        return None

    straight = run(tmp_path / "a", stop=False)
    run(tmp_path / "b", stop=True)
    # As a new process would: everything is built again and the callback knows nothing.
    fresh = GuidanceCallback(alpha={0: 0.3, 1: 0.6})
    resumed = trainer_for(
        lora(base_model()),
        task_data(3),
        tmp_path / "b" / "1",
        [fresh],
        save_strategy="steps",
        save_steps=3,
        restore_callback_states_from_checkpoint=restore,
    )
    resumed.train(resume_from_checkpoint=True)
    assert_same(trainable(resumed.model), trainable(straight.model), "weights")
    assert_same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert dgg.unwrap(resumed.optimizer).param_groups[0]["task_index"] == 1
    # The next task is number 2 and is anchored at its own start.
    with pytest.raises(ValueError, match="no value for task 2; add the key 2"):
        resumed.train()


def test_same_trainer_next_task(tmp_path):
    """train() again with other data: the same optimizer, a new anchor in the old one's memory."""
    grab = Grab()
    trainer = trainer_for(
        lora(base_model()),
        task_data(1),
        tmp_path,
        [GuidanceCallback(alpha=[0.0, 1.0, 0.5]), grab],
        max_steps=2,
    )
    trainer.train()
    opt = dgg.unwrap(trainer.optimizer)
    assert not anchors(trainer)
    places = None
    for task, (stride, alpha) in enumerate([(3, 1.0), (5, 0.5)], start=1):
        trainer.train_dataset = task_data(stride)
        trainer.train()
        assert dgg.unwrap(trainer.optimizer) is opt
        assert_same(anchors(trainer), grab.start, "anchor")
        assert opt.param_groups[0]["task_index"] == task
        assert opt.param_groups[0]["alpha"] == alpha
        now = [a.data_ptr() for a in anchors(trainer).values()]
        assert places in (None, now), "one anchor, ever"
        places = now
    assert opt.param_groups[0]["draw_index"] == 6
    with pytest.raises(ValueError, match="alpha=.* no value for task 3; give one alpha per task"):
        trainer.train()


@pytest.mark.parametrize("others", [0.2, 0.0])
def test_a_group_that_is_not_guided_stays_so(tmp_path, caplog, others):
    """Also after a task in which the callback has set all to 0; if all are 0, all are set."""
    model = lora(base_model())
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[:2], "alpha": 0.0}, {"params": trained[2:]}]
    opt = dgg.AdamW(groups, lr=1e-2, alpha=others, weight_decay=0.0)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    first = 0.0 if others else 0.5
    for task, alpha in enumerate((0.0, 0.5)):
        trainer = trainer_for(
            model, task_data(task), tmp_path, [GuidanceCallback([0.0, 0.5])], optimizer=None,
            optimizers=(opt, None), **saving,
        )  # fmt: skip
        trainer.train()
        assert [g["alpha"] for g in opt.param_groups] == [first if task else 0.0, alpha]
    again = dgg.AdamW(groups, lr=1e-2, alpha=others, weight_decay=0.0)
    resumed = trainer_for(
        model, task_data(1), tmp_path, [GuidanceCallback([0.0, 0.5], task=1)], optimizer=None,
        optimizers=(again, None), **saving,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [g["alpha"] for g in again.param_groups] == [first, 0.5]
    assert "not in force" not in caplog.text


def test_new_trainer_and_new_callback_per_task(tmp_path):
    """Nobody has to carry the callback from task to task: the model's trainings are counted."""
    model = lora(base_model())
    for task in range(3):
        grab = Grab()
        trainer = trainer_for(
            model, task_data(1 + task), tmp_path, [GuidanceCallback(), grab], max_steps=2
        )
        trainer.train()
        opt = dgg.unwrap(trainer.optimizer)
        assert opt.param_groups[0]["task_index"] == task
        assert opt.param_groups[0]["draw_index"] == 2
        assert_same(anchors(trainer), grab.start if task else {}, "anchor")
    # The merge workflow: another peft model around the same base.
    merged = lora(model.merge_and_unload(), seed=5)
    grab = Grab()
    trainer = trainer_for(merged, task_data(7), tmp_path, [GuidanceCallback(), grab], max_steps=2)
    trainer.train()
    assert_same(anchors(trainer), grab.start, "anchor")
    assert dgg.unwrap(trainer.optimizer).param_groups[0]["task_index"] == 3


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [
        (torch.nn.DataParallel, lambda: lora(base_model())),
        (lambda model: torch.compile(model, backend="eager"), base_model),
    ],
    ids=["DataParallel of peft's", "compile"],
)
def test_tasks_are_counted_by_the_model_inside_a_wrapper(wrap, inner, tmp_path):
    """A wrapper and a callback for every task."""
    model = inner()
    for task in range(2):
        trainer = trainer_for(
            wrap(model), task_data(1), tmp_path, [GuidanceCallback()], max_steps=1,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer.train()
        assert dgg.unwrap(trainer.optimizer).param_groups[0]["task_index"] == task
        assert is_active(trainer) == (task > 0)


def test_interrupted_training_keeps_its_anchor(tmp_path):
    guidance = GuidanceCallback(guide_first_task=True)
    grab, die = Grab(), Die(2, interrupt)
    trainer = trainer_for(lora(base_model()), task_data(1), tmp_path, [guidance, grab, die])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    start = grab.start
    trainer.remove_callback(die)
    trainer.train()
    assert_same(anchors(trainer), start, "anchor")
    assert any(not torch.equal(start[n], p) for n, p in grab.start.items()), "it had moved"
    assert dgg.unwrap(trainer.optimizer).param_groups[0]["task_index"] == 0


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("task", [0, 1])
def test_interrupted_training_with_new_trainer_warns(tmp_path, caplog, new, task):
    """Also with a new callback: in a notebook the cell with both is run again after an error."""
    model, guidance = lora(base_model()), GuidanceCallback(task=task)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, task_data(1), tmp_path, [guidance, Die(1, interrupt)]).train()
    if new:
        guidance = GuidanceCallback(task=task)
    trainer_for(model, task_data(1), tmp_path, [guidance], max_steps=1).train()
    assert_told(caplog, f"task {task} was begun before and did not reach its end")
    assert ("if this is the next one, pass task=1" in caplog.text) == (task == 0)
    # It has reached its end now: what follows, and the same number again, is no repetition.
    caplog.clear()
    for callback in (GuidanceCallback(), GuidanceCallback(task=task)):
        trainer_for(model, task_data(1), tmp_path, [callback], max_steps=1).train()
    assert not caplog.text


def test_a_training_that_made_no_step_was_not_begun(tmp_path, caplog):
    """The weights are still those of the end of the former task."""
    model = lora(base_model())
    trainer_for(model, task_data(1), tmp_path, [GuidanceCallback()], max_steps=1).train()
    with pytest.raises(ValueError, match="batch"):
        trainer_for(model, [{"text": 1}], tmp_path, [GuidanceCallback()]).train()
    trainer_for(model, task_data(1), tmp_path, [GuidanceCallback()], max_steps=1).train()
    assert not caplog.text


def test_an_anchor_of_a_former_task_is_not_that_of_a_task_that_was_interrupted(tmp_path):
    """The task is begun anew with an optimizer that was not there when it was interrupted."""
    model, callback = lora(base_model()), GuidanceCallback(task=1)
    over = {"max_steps": 2, "warmup_steps": 0}
    former = trainer_for(model, task_data(1), tmp_path, [callback], **over)
    former.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, task_data(1), tmp_path, [callback, Die(1, interrupt)], **over).train()
    start = trainable(model)
    former.train()
    assert_same(anchors(former), start, "anchor")
    assert dgg.unwrap(former.optimizer).param_groups[0]["task_index"] == 2


def test_a_task_that_is_said_is_the_one_from_which_is_counted(tmp_path):
    """The same model object, set back for another seed."""
    model = lora(base_model())
    for _ in range(2):
        for number, callback in enumerate((GuidanceCallback(task=0), GuidanceCallback())):
            trainer = trainer_for(model, task_data(1), tmp_path, [callback], max_steps=1)
            trainer.train()
            assert dgg.unwrap(trainer.optimizer).param_groups[0]["task_index"] == number


@pytest.mark.parametrize("task", [None, 1])
def test_the_trials_of_a_search_are_one_task(tmp_path, monkeypatch, caplog, task):
    """Also after one that was pruned; the training after the search is that task, too."""
    monkeypatch.setattr("transformers.integrations.integration_utils.hp_params", dict)
    callback, pruned = GuidanceCallback(task=task), Die(1, interrupt)
    trainer = trainer_for(None, task_data(1), tmp_path, [callback], model_init=lambda: base_model())
    monkeypatch.setattr(trainer, "_hp_search_setup", lambda trial: None)
    for trial in ({"trial": 1}, {"trial": 2}, {"trial": 3}, None):
        if trial == {"trial": 2}:
            trainer.add_callback(pruned)
            with pytest.raises(KeyboardInterrupt):
                trainer.train(trial=trial)
            trainer.remove_callback(pruned)
        else:
            trainer.train(trial=trial)
        assert dgg.unwrap(trainer.optimizer).param_groups[0]["task_index"] == (task or 0)
        assert is_active(trainer) == (task == 1)
    assert "begun before" not in caplog.text


def test_anchor_given_as_tensors_and_full_model(tmp_path):
    """No peft: the anchor comes from model.safetensors, or from a state dict."""
    base_model().save_pretrained(tmp_path / "before")
    tensors = {n: p.detach().clone() + 1 for n, p in base_model().named_parameters()}
    for given, offset in ((tmp_path / "before", 0), (tensors, 1)):
        trainer = trainer_for(
            base_model(), task_data(1), tmp_path, [GuidanceCallback(anchor=given)], max_steps=1
        )
        trainer.train()
        found = anchors(trainer)
        assert len(found) == len(list(trainer.model.parameters()))
        for name, param in base_model().named_parameters():
            assert torch.equal(found[name], param.detach() + offset)


def test_anchor_from_the_trainers_own_checkpoint(tmp_path):
    """The last checkpoint of a training is as good as the finished model, one before is refused."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer_for(lora(base_model()), task_data(1), tmp_path, [], **saving)
    first.train()
    for step in (3, STEPS):
        checkpoint = tmp_path / f"checkpoint-{step}"
        model = lora(base_model(), seed=5)
        callback = GuidanceCallback(task=1, anchor=checkpoint)
        second = trainer_for(model, task_data(3), tmp_path / "second", [callback], max_steps=1)
        if step < STEPS:
            with pytest.raises(ValueError, match=r"middle of a training \(step 3 of 6\).*finished"):
                second.train()
            assert not anchors(second)
            assert dgg.unwrap(second.optimizer).param_groups[0]["task_index"] == 0
        else:
            second.train()
            assert_same(anchors(second), trainable(first.model), "anchor")
            assert dgg.unwrap(second.optimizer).param_groups[0]["task_index"] == 1


GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "huggingface.md"


def test_the_guide_is_true(tmp_path, monkeypatch):
    """Runs every example of docs/huggingface.md in order, and counts the lines of the diff."""
    monkeypatch.chdir(tmp_path)
    text = GUIDE.read_text()
    diff = re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in diff.splitlines() if line[0] in "+-"]) <= 4
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 6
    names = {
        "dgg": dgg,
        "Trainer": transformers.Trainer,
        "TrainingArguments": transformers.TrainingArguments,
        "PeftModel": peft.PeftModel,
        "get_peft_model": peft.get_peft_model,
        "config": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "tasks": [task_data(1, 8), task_data(3, 8)],
        "arguments": {"use_cpu": True, "report_to": [], "num_train_epochs": 1,
                      "save_strategy": "no", "disable_tqdm": True},
    }  # fmt: skip
    for example in examples:
        names["model"], names["base"] = lora(base_model()), base_model()
        if "from_pretrained" in example:
            names["model"].save_pretrained("adapters/0")
        if "importance.safetensors" in example:  # what the process before has left
            trainer_for(
                names["model"], task_data(0), "out/process-0", [GuidanceCallback()],
                options={"importance": 0.5},
            ).train()  # fmt: skip
        exec(example, names)
        assert is_active(names["trainer"])
        if "replay_buffer" in example:
            assert names["memory"].tasks == (0, 1) and len(names["memory"]) == 16
            assert isinstance(names["trainer"], dgg.hf.ReplayTrainer)
        opt = dgg.unwrap(names["trainer"].optimizer)
        assert opt.param_groups[0]["task_index"] == 1
        held = {id(p) for p, state in opt.state.items() if "anchor" in state}
        moving = [(n, p) for n, p in names["model"].named_parameters() if p.requires_grad]
        assert held == {id(p) for _, p in moving}
        for name, param in moving:
            if "stack" in example:
                assert ".task1." in name
            if "lora_B" in name and ("stack" in example or "merge" in example):
                assert not opt.state[param]["anchor"].any(), "towards no change at all"
    assert pathlib.Path("adapters/1/adapter_model.safetensors").is_file()


def test_a_trainer_that_a_configuration_makes(tmp_path, monkeypatch, request):
    """The last example of the guide: a framework's Trainer, which is given no optimizer."""
    monkeypatch.setenv("DGG_TASK", "1")
    made, install = [], dgg.hf.install
    monkeypatch.setattr(dgg.hf, "install", lambda **options: made.append(install(**options)))
    request.addfinalizer(lambda: made[0].remove())
    *_, example = re.findall(r"```py\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert "dgg.hf.install(alpha=0.2)" in example
    exec(example, {})
    model = lora(base_model())
    before = trainable(model)
    settings = {"learning_rate": 3e-3, "adam_beta2": 0.95, "lr_scheduler_type": "constant"}
    trainer = trainer_for(model, task_data(3), tmp_path, None, optimizer=None, **settings)
    trainer.train()
    assert is_active(trainer)
    (group, _) = dgg.unwrap(trainer.optimizer).param_groups
    assert (group["betas"], group["alpha"], group["task_index"]) == ((0.9, 0.95), 0.2, 1)
    assert group["initial_lr"] == 3e-3
    assert_same(anchors(trainer), before)


# -- another optimizer, under dgg.Guidance ---------------------------------------------------------


def guided_trainer(model, data, out, callbacks, name, **over):
    """A Trainer that makes its optimizer itself, which is guided before the training begins."""
    trainer = trainer_for(model, data, out, callbacks, optimizer=None, optim=name,
                          learning_rate=1e-2, **over)  # fmt: skip
    return trainer, dgg.Guidance(trainer.create_optimizer(), alpha=0.2, seed=3)


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_another_optimizer_resumed_bit_for_bit(tmp_path, name):
    """Two tasks; the second dies after a checkpoint and is resumed with everything new."""
    saves = {"save_strategy": "steps", "save_steps": 3}

    def run(out, *extra):
        model, callback = lora(base_model()), GuidanceCallback(alpha={0: 0.3, 1: 0.6})
        guided_trainer(model, task_data(1), out / "0", [callback], name)[0].train()
        before = trainable(model)
        second, guidance = guided_trainer(
            model, task_data(3), out / "1", [callback, *extra], name, **saves
        )
        second.train()
        return second, guidance, before

    straight, guidance, before = run(tmp_path / "a")
    assert is_active(straight) and guidance._count_anchors() == len(before)
    for n, p in straight.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(guidance.state[p]["anchor"], before[n]), n
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", Die(4, interrupt))
    resumed, guidance = guided_trainer(
        lora(base_model()), task_data(3), tmp_path / "b" / "1",
        [GuidanceCallback(alpha={0: 0.3, 1: 0.6})], name, **saves,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=True)
    assert_same(trainable(resumed.model), trainable(straight.model), "weights")
    assert_same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    kept = resumed.optimizer.state_dict()["dgg_guidance"]
    (group, *_) = kept["param_groups"]
    assert (group["alpha"], group["task_index"], group["draw_index"]) == (0.6, 1, STEPS)
    last = resumed.state.log_history[-1]
    assert last["guidance/task"] == 1 and last["guidance/injected"] > 0
    # And the guidance was no no-op.
    model = lora(base_model())
    plain, _ = guided_trainer(model, task_data(1), tmp_path / "p0", [], name)
    plain.train()
    plain, _ = guided_trainer(model, task_data(3), tmp_path / "p1", [], name)
    plain.train()
    assert "dgg_guidance" not in plain.optimizer.state_dict()
    moved = trainable(model)
    assert any(not torch.equal(p, moved[n]) for n, p in trainable(straight.model).items())


def test_an_optimizer_handed_over_goes_from_task_to_task(tmp_path):
    """One optimizer, one guidance, one Trainer: every call of train() is a task."""
    model = lora(base_model())
    opt = torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    guidance = dgg.Guidance(opt, alpha=1.0)
    callback = GuidanceCallback()
    trainer = trainer_for(model, task_data(1), tmp_path, [callback], optimizer=None)
    trainer.optimizer = opt
    for task in range(3):
        before = trainable(model)
        trainer.train()
        assert guidance.param_groups[0]["task_index"] == task == callback._task
        anchors = {n: guidance.state[p].get("anchor") for n, p in model.named_parameters()
                   if p.requires_grad}  # fmt: skip
        if task:
            assert_same(anchors, before)
        else:
            assert set(anchors.values()) == {None}
    assert is_active(trainer)
    assert "Guidance(RMSprop)" in callback._describe(guidance)


def test_the_guide_to_another_optimizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```py\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (example,) = [text for text in examples if "dgg.Guidance(" in text]
    names = {
        "dgg": dgg, "Trainer": transformers.Trainer, "model": lora(base_model()),
        "TrainingArguments": transformers.TrainingArguments, "task": task_data(3, 8),
        "arguments": {"use_cpu": True, "report_to": [], "num_train_epochs": 1,
                      "save_strategy": "no", "disable_tqdm": True},
    }  # fmt: skip
    before = trainable(names["model"])
    exec(example, names)
    opt = names["trainer"].optimizer.optimizer
    assert type(opt).__name__ == "Adafactor" and is_active(names["trainer"])
    saved = opt.state_dict()["dgg_guidance"]
    assert len(saved["anchors"]) == len(before)


def test_engines_whose_checkpoints_lose_a_guidance_are_refused():
    model = torch.nn.Linear(2, 2)
    opt = torch.optim.RMSprop(model.parameters())
    dgg.Guidance(opt)
    for engine in ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {"fsdp": "full_shard"}):
        with pytest.raises(RuntimeError, match="dgg.Guidance under DeepSpeed or FSDP, whose check"):
            GuidanceCallback().on_train_begin(
                types.SimpleNamespace(**engine), None, None, model=model, optimizer=opt
            )
    with pytest.raises(TypeError, match="RMSprop is no dgg optimizer but guided by a dgg.Guidance"):
        dgg.unwrap(opt)


def test_a_checkpoint_of_another_guidance_changes_nothing():
    """The guidance's part is checked before the optimizer has loaded its own."""

    def made(size):
        opt = torch.optim.RMSprop([torch.nn.Parameter(torch.ones(size))], lr=0.1)
        guidance = dgg.Guidance(opt, alpha=1.0)
        guidance._carried = True
        guidance.set_anchor()
        (p,) = opt.param_groups[0]["params"]
        p.grad = torch.ones(size)
        opt.step()
        return opt, guidance, p

    opt, guidance, p = made(3)
    saved, before = copy.deepcopy(opt.state_dict()), opt.state[p]["square_avg"].clone()
    wrong = {**saved, "dgg_guidance": made(4)[0].state_dict()["dgg_guidance"]}
    p.grad = torch.full((3,), 2.0)
    opt.step()
    state, draws = opt.state[p]["square_avg"].clone(), guidance.param_groups[0]["draw_index"]
    assert draws == 2 and not torch.equal(state, before)
    with pytest.raises(ValueError, match="shape"):
        opt.load_state_dict(wrong)
    assert torch.equal(opt.state[p]["square_avg"], state)
    assert guidance.param_groups[0]["draw_index"] == draws
    opt.load_state_dict(saved)
    assert guidance.param_groups[0]["draw_index"] == 1
    assert torch.equal(opt.state[p]["square_avg"], before)
    guidance.remove()
    assert "dgg_guidance" not in opt.state_dict()
    dgg.Guidance(opt)


class Makes(transformers.Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = of_trained(self.model)
        return self.optimizer


class Names(transformers.Trainer):
    def get_optimizer_cls_and_kwargs(self, args, model=None):
        return dgg.AdamW, dict(OPTIONS)


def of_trained(model):
    # The Trainer puts 0 into every group, for its weight_decay.
    trained = [p for p in model.parameters() if p.requires_grad]
    return dgg.AdamW(trained, weight_decay=0.0, **OPTIONS)


WAYS = {
    "optimizer_cls_and_kwargs=": lambda model: {},
    "optimizers=": lambda model: {"optimizer": None, "optimizers": (of_trained(model), None)},
    "create_optimizer": lambda model: {"optimizer": None, "kind": Makes},
    "get_optimizer_cls_and_kwargs": lambda model: {"optimizer": None, "kind": Names},
}


def two_tasks_by(way, root):
    """Trains two tasks, the second once more from its middle; returns its Trainer."""

    def task(number, model, out, resume=None, **over):
        data, guide = task_data((1, 3)[number]), GuidanceCallback(task=number)
        trainer = trainer_for(model, data, out, [guide], **WAYS[way](model), **over)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    saving = {"save_strategy": "steps", "save_steps": 3}
    first = task(0, lora(base_model()), root / "0")
    assert not is_active(first)
    start = trainable(first.model)
    second = task(1, first.model, root / "1", **saving)
    assert is_active(second)
    assert_same(anchors(second), start, "anchor")
    again = task(1, lora(base_model()), root / "2", str(root / "1" / "checkpoint-3"), **saving)
    assert_same(trainable(again.model), trainable(second.model), "weights")
    return second


@pytest.fixture(scope="module")
def by_its_class(tmp_path_factory):
    return trainable(
        two_tasks_by("optimizer_cls_and_kwargs=", tmp_path_factory.mktemp("way")).model
    )


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_every_way_to_give_the_optimizer(way, tmp_path, by_its_class):
    """Two tasks, clipped and accumulated, resumed bit for bit; the same result by every way."""
    ended = trainable(two_tasks_by(way, tmp_path).model)
    assert ended.keys() == by_its_class.keys()
    for name, p in ended.items():
        torch.testing.assert_close(p, by_its_class[name], rtol=1e-5, atol=1e-6, msg=name)


# -- clipping -------------------------------------------------------------------------------------


def batches(data, accumulation=2, size=4):
    place = 0
    while True:
        micro = []
        for _ in range(accumulation):
            rows = data[place : place + size]
            micro.append({k: torch.stack([r[k] for r in rows]) for k in rows[0]})
            place += size
        yield micro


def by_hand(model, opt, *, clip_first):
    """The Trainer's order: accumulate, clip, step, zero; the loss is a mean over all tokens."""
    model.train()
    for _, micro in zip(range(STEPS), batches(task_data(3)), strict=False):
        tokens = sum(m["labels"][:, 1:].numel() for m in micro)
        for inputs in micro:
            model(**inputs, num_items_in_batch=torch.tensor(tokens)).loss.backward()
        if clip_first:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        opt.step()
        opt.zero_grad()


def test_trainer_clips_before_the_step(tmp_path):
    """The guided step sees clipped gradients; clipping in the optimizer comes to the same."""

    def model():
        made = lora(base_model())
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return made

    def trained(out, **over):
        over = {"max_grad_norm": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0, **over}
        trainer = trainer_for(
            model(),
            task_data(3),
            out,
            [GuidanceCallback(guide_first_task=True)],
            train_sampling_strategy="sequential",
            **over,
        )
        trainer.train()
        return trainer

    hand = model()
    opt = dgg.AdamW([p for p in hand.parameters() if p.requires_grad], weight_decay=0.0, **OPTIONS)
    opt.set_anchor()
    by_hand(hand, opt, clip_first=True)
    first = trained(tmp_path / "a")
    assert_same(trainable(first.model), trainable(hand), "weights")
    # The Trainer's two groups, with and without decay, are one whole; LoRA leaves the second empty.
    groups = dgg.unwrap(first.optimizer).param_groups
    assert [len(group["params"]) for group in groups] == [8, 0]

    folded = trained(tmp_path / "b", max_grad_norm=0.0, options={"max_grad_norm": 0.05})
    for name, param in trainable(folded.model).items():
        torch.testing.assert_close(param, trainable(hand)[name], rtol=1e-4, atol=1e-6)
    clips = [e["guidance/clip"] for e in folded.state.log_history]
    assert all(0 < c < 1 for c in clips)
    assert not any("guidance/clip" in e for e in first.state.log_history)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_ends_that_peft_trains(tie):
    """Tied, they are one parameter, one update, one anchor; else two, which then part."""
    base = base_model()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, that they are tied
        model = peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
                ensure_weight_tying=tie,
            ),
        )  # fmt: skip
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (ends[0] is ends[1]) == tie
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = dgg.AdamW(trained, **OPTIONS)
    assert len(opt.param_groups[0]["params"]) == 4 + 2 - tie
    row = task_data(1)[0]["input_ids"][None]
    model(input_ids=row, labels=row).loss.backward()
    opt.set_anchor()
    opt.step()
    assert torch.equal(*ends) == tie
    assert all(opt.state[p]["step"] == 1 and "anchor" in opt.state[p] for p in trained)


# -- logging --------------------------------------------------------------------------------------


class Report(Grab):
    """Stands before the guidance, as TensorBoard's and W&B's callbacks do."""


def test_logs_reach_everyone(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dgg.hf")
    report, late = Report(), Grab()
    trainer = trainer_for(
        lora(base_model()),
        task_data(1),
        tmp_path,
        [report, GuidanceCallback(guide_first_task=True), late],
        options={"max_grad_norm": 0.3},
        max_steps=10,
        eval_strategy="steps",
        eval_steps=5,
    )
    opt_stats = []

    class Watch(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            stats = dgg.unwrap(optimizer).guidance_stats()
            opt_stats.append({k: None if v is None else v.item() for k, v in stats.items()})

        def on_step_end(self, args, state, control, model=None, **kwargs):
            # What a callback did with gradients here would do nothing: they are gone.
            assert all(p.grad is None for p in model.parameters())

    trainer.add_callback(Watch())
    result = trainer.train()
    history = trainer.state.log_history
    steps = [e for e in history if "loss" in e]
    assert len(steps) == 5
    assert any(s["injected"] for s in opt_stats) and not all(s["injected"] for s in opt_stats)
    for place, entry in enumerate(steps):
        window = opt_stats[2 * place : 2 * place + 2]
        injected = [s for s in window if s["injected"]]
        assert entry["guidance/injected"] == len(injected) / 2
        assert entry["guidance/task"] == 0
        assert entry["guidance/clip"] == pytest.approx(sum(s["clip"] for s in window) / 2)
        for name in ("scale", "distance", "grad_norm"):
            if injected:
                mean = sum(s[name] for s in injected) / len(injected)
                assert entry[f"guidance/{name}"] == pytest.approx(mean)
            else:
                assert f"guidance/{name}" not in entry
    evaluations = [e for e in history if "eval_loss" in e]
    assert evaluations and not any("guidance/injected" in e for e in evaluations)
    # The summary is of the whole training, and is what train() returns.
    share = sum(s["injected"] for s in opt_stats) / 10
    assert history[-1]["guidance/injected"] == pytest.approx(share)
    assert result.metrics["guidance/injected"] == pytest.approx(share)
    # Reporting callbacks are called before the user's, and still see it.
    for seen in (report, late):
        assert [e.get("guidance/injected") for e in seen.entries] == [
            e.get("guidance/injected") for e in history
        ]
    lines = [r.message for r in caplog.records if "backend" in r.message]
    assert len(lines) == 1
    assert "dgg.AdamW (backend " in lines[0] and "anchor of 8 tensors" in lines[0]
    json.dumps(history)


def test_learning_rate_of_the_arguments_is_not_used(tmp_path, caplog):
    trainer = trainer_for(
        lora(base_model()), task_data(1), tmp_path, [GuidanceCallback()], max_steps=1,
        learning_rate=3e-4,
    )  # fmt: skip
    trainer.train()
    assert_told(caplog, "learning_rate=0.0003 of TrainingArguments is not used")
    assert "here 0.01" in caplog.text


# -- what must not go unnoticed -------------------------------------------------------------------


def test_other_optimizer_raises(tmp_path):
    trainer = trainer_for(
        lora(base_model()), task_data(1), tmp_path, [GuidanceCallback()], optimizer=None
    )
    with pytest.raises(TypeError, match="no dgg optimizer in the Trainer.*optimizer_cls_and_kwarg"):
        trainer.train()
    assert not is_active(trainer)


def test_new_adapter_raises_with_names(tmp_path):
    """set_adapter: the optimizer would go on with the old adapter, which nobody uses."""
    model = lora(base_model())
    trainer = trainer_for(model, task_data(1), tmp_path, [GuidanceCallback()], max_steps=1)
    trainer.train()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    before = trainable(model)
    with pytest.raises(ValueError, match=r"lora_A\.other\.weight.*lora_A\.default\.weight"):
        trainer.train()
    assert_same(trainable(model), before, "weights")
    assert not anchors(trainer)
    # The remedy of the message: another optimizer. This is the stack workflow.
    trainer.optimizer = None
    trainer.train()
    assert set(anchors(trainer)) == set(before)


def test_merged_adapter_raises_with_names(tmp_path):
    model = lora(base_model())
    trainer = trainer_for(model, task_data(1), tmp_path, [GuidanceCallback()], max_steps=1)
    trainer.train()
    model.merge_and_unload()
    with pytest.raises(ValueError, match=r"removed from the model or frozen: \S+lora_A\.default"):
        trainer.train()


def test_frozen_on_purpose_is_allowed(tmp_path):
    model = lora(base_model())
    trainer = trainer_for(model, task_data(1), tmp_path, [GuidanceCallback()], max_steps=2)
    trainer.train()
    for name, param in model.named_parameters():
        if "layers.0" in name:
            param.requires_grad_(False)
    trainer.train()
    assert is_active(trainer)


def test_adapter_that_is_not_used_raises(tmp_path):
    """Trainable and in the optimizer, but the forward pass goes round it."""
    model = lora(base_model())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, param in model.named_parameters():
        param.requires_grad_(".other." in name)
    model.enable_input_require_grads()
    trainer = trainer_for(model, task_data(1), tmp_path, [GuidanceCallback()], max_steps=1)
    with pytest.raises(RuntimeError, match=r"none of .* has a gradient .*lora_A\.other"):
        trainer.train()


@pytest.fixture
def halfway(tmp_path):
    """Arguments to resume a guided task at its third step."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    callback = GuidanceCallback(task=1)
    trainer_for(
        lora(base_model()), task_data(3), tmp_path, [callback], max_steps=3, **saving
    ).train()
    return lambda callback, **over: trainer_for(
        lora(base_model()), task_data(3), tmp_path, [callback], **saving, **over
    )


def test_resume_without_optimizer_state_raises(tmp_path, halfway):
    """save_only_model, or a lost file: the weights of now are not those the task began with."""
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "optimizer.pt").unlink()
    for callback in (GuidanceCallback(), GuidanceCallback(task=1)):
        with pytest.raises(RuntimeError, match="middle of task 1.*no anchor.*optimizer.pt"):
            halfway(callback).train(resume_from_checkpoint=str(checkpoint))
    # The previous task's weights given by hand are as good.
    lora(base_model()).save_pretrained(tmp_path / "task0")
    trainer = halfway(GuidanceCallback(anchor=tmp_path / "task0"))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert is_active(trainer)
    assert dgg.unwrap(trainer.optimizer).param_groups[0]["task_index"] == 1


def test_resume_with_stripped_anchors_raises(tmp_path, halfway):
    path = tmp_path / "checkpoint-3" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    for entry in saved["state"].values():
        del entry["anchor"]
    torch.save(saved, path)
    with pytest.raises(RuntimeError, match="lost"):
        halfway(GuidanceCallback()).train(resume_from_checkpoint=True)


def test_resume_of_a_checkpoint_without_the_callback(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer_for(lora(base_model()), task_data(1), tmp_path, [], max_steps=1, **saving).train()
    guided = GuidanceCallback(guide_first_task=True)
    trainer = trainer_for(lora(base_model()), task_data(1), tmp_path, [guided], **saving)
    with pytest.raises(RuntimeError, match="no anchor"):
        trainer.train(resume_from_checkpoint=True)
    # An unguided task needs none, and its checkpoints can be written.
    trainer = trainer_for(
        lora(base_model()), task_data(1), tmp_path, [GuidanceCallback()], max_steps=2, **saving
    )
    trainer.train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["GuidanceCallback"]["attributes"] == {
        "_task": 0,
        "_guided": False,
    }


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("task", [0, 2])
def test_resume_of_another_task_raises(tmp_path, halfway, task, known):
    """Also if only the optimizer knows the number: the callback's state is not in the file."""
    if not known:
        path = tmp_path / "checkpoint-3" / "trainer_state.json"
        state = json.loads(path.read_text())
        del state["stateful_callbacks"]["GuidanceCallback"]
        path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"written in task 1 .*task={task}.*output_dir"):
        halfway(GuidanceCallback(task=task)).train(resume_from_checkpoint=True)


def test_a_first_task_that_was_not_guided_is_not_silently_resumed_as_one_that_is(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1}
    model = lora(base_model())
    anchor = trainable(model)
    trainer_for(
        model, task_data(1), tmp_path, [GuidanceCallback()], max_steps=2, **saving
    ).train()  # fmt: skip
    for name, arguments in (
        ("guide_first_task=True", {"guide_first_task": True}), ("anchor=", {"anchor": anchor})
    ):  # fmt: skip
        caplog.clear()
        trainer = trainer_for(
            lora(base_model()), task_data(1), tmp_path, [GuidanceCallback(**arguments)],
            max_steps=2, **saving,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert_told(caplog, f"{name} of this callback is not in force: task 0 was resumed")
        assert not is_active(trainer)


def test_resume_of_a_task_that_has_ended_warns(tmp_path, caplog):
    trainer = trainer_for(
        lora(base_model()), task_data(1), tmp_path, [GuidanceCallback()], max_steps=2,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_told(caplog, "the checkpoint was written in task 0, which came to its end already")


def test_a_warning_of_the_step_is_about_the_line_that_trains(tmp_path):
    model = lora(base_model().to(torch.bfloat16), autocast_adapter_dtype=False)
    trainer = trainer_for(model, task_data(1), tmp_path, [GuidanceCallback()], max_steps=1)
    lost = "16-bit weights lose small updates"
    with pytest.warns(UserWarning, match=lost) as heard:
        trainer.train()
    (told,) = [warning for warning in heard if lost in str(warning.message)]
    assert told.filename == __file__
    assert ".train(" in linecache.getline(__file__, told.lineno)


def test_resume_with_another_alpha_warns(tmp_path, halfway, caplog):
    trainer = halfway(GuidanceCallback(alpha=0.9), max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert_told(caplog, "alpha=0.9 of this callback is not in force")
    assert dgg.unwrap(trainer.optimizer).param_groups[0]["alpha"] == OPTIONS["alpha"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"alpha": 1.5}, ValueError, r"alpha=1.5 must lie in \[0, 1\]"),
        ({"alpha": [0.1, -1]}, ValueError, "alpha=-1"),
        ({"alpha": {"one": 0.1}}, TypeError, "must map task numbers"),
        ({"alpha": "0.2"}, TypeError, "alpha='0.2' must be a number"),
        ({"task": -1}, ValueError, "task_index=-1"),
        ({"anchor": 3}, TypeError, "named tensors or the path"),
        ({"guide_first_task": 1}, TypeError, "guide_first_task=1 must be True or False"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        GuidanceCallback(**arguments)


def test_anchor_path_without_files(tmp_path):
    callback = GuidanceCallback(anchor=tmp_path / "nowhere")
    trainer = trainer_for(lora(base_model()), task_data(1), tmp_path, [callback])
    with pytest.raises(FileNotFoundError, match="nowhere.*save_pretrained"):
        trainer.train()


def test_import_is_lazy():
    code = "import sys, dgg; assert 'transformers' not in sys.modules; print(dgg.__all__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    second_task(pathlib.Path(sys.argv[1]), callbacks=[Die(4, lambda: os._exit(9))]).train()


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    for alpha, expected in (
        (np.float32(0.25), 0.25),
        (np.array(0.5), 0.5),
        (np.array([0.5, 0.25]), [0.5, 0.25]),
        ([np.float64(0.5)], [0.5]),
        ({np.int64(1): np.float32(0.5)}, {1: 0.5}),
    ):
        callback = GuidanceCallback(alpha=alpha, task=np.int64(2))
        assert callback.alpha == expected and json.loads(json.dumps(callback.first_task)) == 2


# Importance, and alpha="auto", from task to task

WEIGHED = {"alpha": 1.0, "importance": 0.5}


def importances(trainer):
    opt = dgg.unwrap(trainer.optimizer)
    return {
        n: opt.state[p]["importance"]
        for n, p in trainer.model.named_parameters()
        if "importance" in opt.state.get(p, ())
    }


@pytest.mark.parametrize("how", ["new Trainer", "folder of the anchor", "argument"])
def test_importance_goes_from_task_to_task(tmp_path, how, monkeypatch):
    from dgg.hf import importance

    model = lora(base_model())
    out = tmp_path / "first"
    # In the first task there is nothing to protect, and nothing to weigh.
    first = trainer_for(model, task_data(0), out, [GuidanceCallback()], options=WEIGHED)
    first.train()
    sums = dgg.unwrap(first.optimizer).importance_dict(model=model)
    assert not importances(first)
    saved = load_file(out / "importance.safetensors")
    assert all(torch.equal(saved[name], total) for name, total in sums.items())
    if how == "new Trainer":
        callback = GuidanceCallback()
    else:
        monkeypatch.setattr(importance, "_sums", {})  # as in another process
        model.save_pretrained(out)
        more = {"importance": sums} if how == "argument" else {"anchor": out}
        callback = GuidanceCallback(task=1, **more)
    second = trainer_for(model, task_data(1), tmp_path / "second", [callback], options=WEIGHED)
    second.train()
    mean = torch.cat([x.reshape(-1) for x in sums.values()]).mean()
    found = importances(second)
    assert found.keys() == trainable(model).keys()
    assert_close = torch.testing.assert_close
    for name, p in model.named_parameters():
        if p.requires_grad:
            (key,) = [key for key in sums if key in (name, name.replace(".default", ""))]
            assert_close(found[name], sums[key] / mean)
    # The third adds its own second moments to the sums of both.
    opt = dgg.unwrap(second.optimizer)
    together = opt.importance_dict(model=model)
    assert all((together[key] >= sums[key]).all() for key in sums)
    assert any((together[key] > sums[key]).any() for key in sums)


def test_a_new_process_without_the_importance_says_what_to_pass(tmp_path, monkeypatch):
    from dgg.hf import importance

    monkeypatch.setattr(importance, "_sums", {})
    model = lora(base_model())
    trainer = trainer_for(
        model, task_data(1), tmp_path, [GuidanceCallback(task=1)], options=WEIGHED
    )
    before = trainable(model)
    with pytest.raises(RuntimeError, match=r"GuidanceCallback\(importance=...\)"):
        trainer.train()
    assert_same(before, trainable(model))
    with pytest.raises(TypeError, match="importance= must be what importance_dict"):
        GuidanceCallback(importance=3)


def test_importance_that_cannot_be_carried_is_told(tmp_path, caplog, monkeypatch):
    def refused(self, model):
        raise RuntimeError("flat partitions")

    monkeypatch.setattr(dgg.AdamW, "importance_dict", refused)  # as under DeepSpeed
    model = lora(base_model())
    trainer_for(model, task_data(0), tmp_path, [GuidanceCallback()], options=WEIGHED).train()
    assert_told(caplog, "the importance of this training is not carried to the next one: flat")
    assert not (tmp_path / "importance.safetensors").exists()


@pytest.mark.parametrize("name", ["importance.safetensors", ".importance.safetensors.part"])
def test_importance_that_cannot_be_written_loses_neither_count_nor_sums(tmp_path, caplog, name):
    """A full disk, or a folder that only others may write into."""
    (tmp_path / "0" / name / "in the way").mkdir(parents=True)
    model = lora(base_model())
    for task in range(2):
        callback = GuidanceCallback()
        trainer = trainer_for(
            model, task_data(task), tmp_path / str(task), [callback], options=WEIGHED, max_steps=2
        )
        trainer.train()
    assert_told(caplog, "importance.safetensors was not written into ")
    assert importances(trainer) and is_active(trainer)
    assert dgg.unwrap(trainer.optimizer).param_groups[0]["task_index"] == 1
    assert [path.name for path in (tmp_path / "0").iterdir()] == [name]
    assert load_file(tmp_path / "1" / "importance.safetensors")


def test_auto_of_the_callback_is_logged(tmp_path, caplog):
    model = lora(base_model())
    buffer = dgg.ReplayBuffer(per_task=4, seed=0)
    data = task_data(0)
    buffer.add_task([data[i] for i in range(4)])
    trainer = dgg.hf.ReplayTrainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=STEPS,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            max_grad_norm=0.5,
        ),
        train_dataset=task_data(1),
        optimizer_cls_and_kwargs=(dgg.AdamW, {"lr": 1e-2}),
        callbacks=[GuidanceCallback("auto", task=1)],
        replay_buffer=buffer,
        replay_ratio=0.5,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="dgg.hf"):
        trainer.train()
    assert "alpha auto, anchor of" in caplog.text
    entries = [entry for entry in trainer.state.log_history if "guidance/pull" in entry]
    assert len(entries) > STEPS
    assert all(-1 <= entry["guidance/alignment"] <= 1 for entry in entries)
    assert all(entry["guidance/pull"] >= 0 for entry in entries)
