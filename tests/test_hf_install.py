# SPDX-License-Identifier: BSD-3-Clause
"""`dgg.hf.install`: every Trainer of the process is guided, with its own arguments in force."""

import pytest
import torch

import dgg

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def install(monkeypatch):
    monkeypatch.delenv("DGG_TASK", raising=False)
    made = []

    def make(*args, **options):
        made.append(dgg.hf.install(*args, **options))
        return made[-1]

    yield make
    for handle in made:
        handle.remove()


def model():
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


def trainer(tmp_path, net, *, kind=transformers.Trainer, given=None, **arguments):
    """A Trainer as a framework makes it: no optimizer, no callback, if none is ``given``."""
    rows = [{"input_ids": torch.tensor([1, 2 + k % 8]), "labels": k % 2} for k in range(32)]
    arguments = {"learning_rate": 3e-3, "max_steps": 4, "logging_steps": 1, **arguments}
    return kind(
        net,
        transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            **arguments,
        ),
        train_dataset=rows, **(given or {}),
    )  # fmt: skip


def test_every_trainer_is_guided(install, tmp_path):
    handle, net = install(alpha=1.0, importance=0.5), model()
    for number in range(2):
        made = trainer(tmp_path / str(number), net, adam_beta2=0.95, weight_decay=0.1)
        before = [p.detach().clone() for p in net.parameters()]
        made.train()
        opt = dgg.unwrap(made.optimizer)
        assert type(opt) is dgg.AdamW
        assert dgg.hf.is_active(made) == (number == 1)
        groups = opt.param_groups
        assert {g["weight_decay"] for g in groups} == {0.1, 0.0}
        assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["initial_lr"] == 3e-3
        assert (groups[0]["importance"], groups[0]["task_index"]) == (0.5, number)
        if number:
            anchors = {p: opt.state[p]["anchor"] for p in net.parameters()}
            for p, former in zip(net.parameters(), before, strict=True):
                torch.testing.assert_close(anchors[p], former)
            logs = [e for e in made.state.log_history if "guidance/injected" in e]
            assert logs and all(e["guidance/injected"] == 1 for e in logs[1:])
    assert sum(c is handle.callback for c in made.callback_handler.callbacks) == 1


def test_task_from_the_environment(install, tmp_path, monkeypatch):
    monkeypatch.setenv("DGG_TASK", "2")
    install({2: 0.4})
    made = trainer(tmp_path, model())
    made.train()
    (group, *_) = dgg.unwrap(made.optimizer).param_groups
    assert (group["task_index"], group["alpha"]) == (2, 0.4) and dgg.hf.is_active(made)
    # Said in the call, it does not depend on the environment.
    install(0.3, task=1)
    again = trainer(tmp_path, model())
    again.train()
    assert dgg.unwrap(again.optimizer).param_groups[0]["task_index"] == 1
    # The second call took the place of the first.
    guides = [c for c in again.callback_handler.callbacks if type(c).__name__ == "GuidanceCallback"]
    assert len(guides) == 1


def test_sgd_and_a_way_back(install, tmp_path):
    former = transformers.Trainer.__init__
    handle = install(0.2, optimizer=dgg.SGD, momentum=0.9)
    made = trainer(tmp_path, model(), optim="sgd")
    made.train()
    assert type(dgg.unwrap(made.optimizer)) is dgg.SGD
    handle.remove()
    handle.remove()
    assert transformers.Trainer.__init__ is former
    made = trainer(tmp_path, model())
    made.train()
    assert isinstance(made.optimizer.optimizer, torch.optim.AdamW)
    assert not isinstance(made.optimizer.optimizer, dgg.AdamW)


def test_trainers_made_before_and_after_are_as_they_were(install, tmp_path):
    before = trainer(tmp_path / "0", model())
    handle = install(0.2)
    during = trainer(tmp_path / "1", model())
    handle.remove()
    after = trainer(tmp_path / "2", model())
    for made, guided in ((before, False), (during, True), (after, False)):
        made.train()
        assert isinstance(made.optimizer.optimizer, dgg.AdamW) == guided
        assert (handle.callback in made.callback_handler.callbacks) == guided


def alphas(made):
    made.train()
    return {group["alpha"] for group in dgg.unwrap(made.optimizer).param_groups}


@pytest.mark.parametrize("way", ["class", "object"])
def test_an_optimizer_that_a_trainer_is_given_keeps_its_alpha(install, tmp_path, way):
    install(0.5, task=1)
    net = model()
    given = (
        {"optimizer_cls_and_kwargs": (dgg.AdamW, {"alpha": 0.3})}
        if way == "class"
        else {"optimizers": (dgg.AdamW(net.parameters(), alpha=0.3), None)}
    )
    made = trainer(tmp_path, net, given=given)
    assert alphas(made) == {0.3} and dgg.hf.is_active(made)
    assert dgg.unwrap(made.optimizer).param_groups[0]["task_index"] == 1
    assert alphas(trainer(tmp_path, model())) == {0.5}


@pytest.mark.parametrize(("own", "expected"), [(0.7, 0.7), (None, 0.5)])
def test_a_callback_that_a_trainer_is_given_is_the_only_one(install, tmp_path, own, expected):
    handle = install(alpha=0.5)
    callback = dgg.hf.GuidanceCallback(own, task=1)
    made = trainer(tmp_path, model(), given={"callbacks": [callback]})
    assert alphas(made) == {expected} and dgg.hf.is_active(made)
    guides = [c for c in made.callback_handler.callbacks if isinstance(c, type(callback))]
    assert guides == [callback] and handle.callback is not callback


def test_what_others_have_put_in_after_it_stays(install, tmp_path, monkeypatch):
    """As unsloth does; a second install() takes out the first one."""
    monkeypatch.setattr(transformers.Trainer, "__init__", transformers.Trainer.__init__)
    first, called = install(0.2), []
    ours = transformers.Trainer.__init__

    def theirs(self, *args, **kwargs):
        called.append(True)
        ours(self, *args, **kwargs)

    transformers.Trainer.__init__ = theirs
    second = install(0.4)
    made = trainer(tmp_path, model())
    guides = [c for c in made.callback_handler.callbacks if type(c) is type(second.callback)]
    assert called and guides == [second.callback]
    second.remove()
    assert transformers.Trainer.__init__ is theirs
    first.remove()
    made = trainer(tmp_path, model())
    assert len(called) == 2
    assert not any(type(c) is type(second.callback) for c in made.callback_handler.callbacks)


class TrainsMore(transformers.Trainer):
    """As sentence-transformers' Trainer: the loss has parameters, a pattern a learning rate."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = torch.nn.Parameter(torch.tensor([2.0]))

    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs) * self.scale.square().sum()

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        cls, options = super().get_optimizer_cls_and_kwargs(args, model)
        body = [p for name, p in model.named_parameters() if "score" not in name]
        groups = [{"params": [*body, self.scale]}, {"params": [model.score.weight], "lr": 0.05}]
        return cls, {**options, "optimizer_dict": groups}


def test_a_trainer_that_adds_to_what_is_trained(install, tmp_path):
    """Neither its parameters nor its learning rates are left out, in a guided task as well."""
    install(1.0, seed=3)
    net = model()
    for number in range(2):
        made = trainer(tmp_path / str(number), net, kind=TrainsMore, lr_scheduler_type="constant")
        made.train()
        opt = dgg.unwrap(made.optimizer)
        assert type(opt) is dgg.AdamW and opt.param_groups[0]["betas"] == (0.9, 0.999)
        assert [group["lr"] for group in opt.param_groups] == [3e-3, 0.05]
        assert made.scale.item() != 2.0
        assert ("anchor" in opt.state[made.scale]) == dgg.hf.is_active(made) == (number == 1)
    # Who asks the class, as some frameworks do, is told what transformers takes.
    cls, _ = transformers.Trainer.get_optimizer_cls_and_kwargs(made.args)
    assert cls is torch.optim.AdamW


def test_what_is_neither_in_the_model_nor_used_raises(install, tmp_path):
    """A parameter that the model no longer has, beside others that it still trains."""
    install(0.2)

    class HoldsMore(TrainsMore):
        def compute_loss(self, model, inputs, **kwargs):
            return transformers.Trainer.compute_loss(self, model, inputs)

    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match="In the optimizer but removed from the model or frozen: "):
        trainer(tmp_path, net, kind=HoldsMore).train()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_losses_that_take_turns_are_no_fault(install, tmp_path):
    """Not all of their parameters have a gradient in the first step, and one may be frozen."""
    install(0.2)

    class TakesTurns(TrainsMore):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scales = [torch.nn.Parameter(torch.tensor([2.0])) for _ in range(2)]
            self.scale, self.losses = torch.nn.Parameter(torch.ones(1), requires_grad=False), 0

        def compute_loss(self, model, inputs, **kwargs):
            scale = self.scales[self.losses % 2]
            self.losses += 1
            loss = transformers.Trainer.compute_loss(self, model, inputs)
            return loss * scale.square().sum()

        def get_optimizer_cls_and_kwargs(self, args, model=None):
            cls, options = super().get_optimizer_cls_and_kwargs(args, model)
            options["optimizer_dict"][0]["params"] += self.scales
            return cls, options

    made = trainer(tmp_path, model(), kind=TakesTurns)
    made.train()
    assert all(scale.item() != 2.0 for scale in made.scales) and made.scale.item() == 1.0


@pytest.mark.parametrize("frozen", [False, True])
def test_losses_of_which_the_first_batch_uses_none(install, tmp_path, frozen):
    """The Trainer holds a loss for each data set, as sentence-transformers' does."""
    install(0.2, task=1)

    class HasLosses(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.losses = {"plain": torch.nn.Identity(), "trained": torch.nn.Linear(1, 1)}
            self.last = "trained" if frozen else "plain"

        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs)
            used, self.last = self.losses[self.last], "trained"
            return used(loss.reshape(1)).square().sum()

        def get_optimizer_cls_and_kwargs(self, args, model=None):
            cls, options = super().get_optimizer_cls_and_kwargs(args, model)
            params = [p for m in (model, *self.losses.values()) for p in m.parameters()]
            return cls, {**options, "optimizer_dict": [{"params": params}]}

    net = model().requires_grad_(not frozen)
    made = trainer(tmp_path, net, kind=HasLosses)
    before = made.losses["trained"].weight.item()
    made.train()
    assert made.losses["trained"].weight.item() != before and dgg.hf.is_active(made)


def test_arguments_are_read_when_the_optimizer_is_made(install, tmp_path):
    """A search sets them on a Trainer that is there."""
    install(0.2)
    made = trainer(tmp_path, model())
    made.args.learning_rate, made.args.adam_beta1 = 0.5, 0.7
    (group, *_) = made.create_optimizer().param_groups
    assert group["lr"] == 0.5 and group["betas"] == (0.7, 0.999)


def test_what_the_arguments_ask_for_is_never_ignored(install, tmp_path):
    install(0.2)
    with pytest.raises(ValueError, match="optim='adafactor' .* Set optim='adamw_torch'"):
        trainer(tmp_path, model(), optim="adafactor").train()
    with pytest.raises(ValueError, match="optim='sgd' .* Set optim='adamw_torch'"):
        trainer(tmp_path, model(), optim="sgd")
    with pytest.raises(ValueError, match="optim_args='x=1' is not read"):
        trainer(tmp_path, model(), optim_args="x=1").train()
    # An optimizer that a Trainer was given stays, and the callback says that it is not guided.
    net = model()
    made = trainer(tmp_path, net)
    made.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="dgg"):
        made.train()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"alpha": 20}, ValueError, "alpha"),
        ({"optimizer": torch.optim.AdamW}, TypeError, "must be dgg.AdamW"),
        ({"optimizer": "adamw"}, TypeError, "must be dgg.AdamW"),
        ({"importnace": 0.5}, TypeError, "importnace"),
        ({"importance": 7}, ValueError, "importance"),
        ({"params": []}, TypeError, "leave them out"),
        ({"weight_decay": 0.1}, TypeError, "set it there"),
        ({"task": -1}, ValueError, "task"),
    ],
)
def test_errors_change_nothing(install, arguments, error, text):
    former = transformers.Trainer.__init__
    with pytest.raises(error, match=text):
        install(**{"alpha": 0.2, **arguments})
    assert transformers.Trainer.__init__ is former


@pytest.mark.parametrize("value", ["two", "-1", "", "1.5"])
def test_a_task_that_is_no_number(install, monkeypatch, value):
    monkeypatch.setenv("DGG_TASK", value)
    with pytest.raises(ValueError, match="DGG_TASK=.* must be the number of the task"):
        install(0.2)
