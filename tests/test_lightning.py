# SPDX-License-Identifier: BSD-3-Clause
"""Lightning and Fabric, really run: wrappers that imitate a class, clipping, replay."""

import pathlib
import re
import warnings

import pytest
import torch

import dgg

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
fabric = pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")


def data(seed=0):
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(seed))
    y = x.sum(dim=1, keepdim=True)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


class Module(pl.LightningModule):
    def __init__(self, cls, replays=False, manual=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.made = lambda: cls(self.parameters(), lr=0.05, **options)
        self.replays, self.automatic_optimization = replays, not manual

    def loss(self, batch):
        x, y = batch
        return (self.layer(x) - y).square().mean()

    def training_step(self, batch, _):
        if self.replays:
            with self.optimizers().replay():
                self.loss(next(iter(data(7)))).backward()
        loss = self.loss(batch)
        if not self.automatic_optimization:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
        return loss

    def on_train_epoch_end(self):
        opt = self.optimizers()
        if hasattr(opt, "set_anchor"):
            opt.set_anchor()

    def configure_optimizers(self):
        return self.made()


def train(module, **options):
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, barebones=False, **options,
    )  # fmt: skip
    trainer.fit(module, data())
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_trains_and_clips_as_torchs_does(precision, clip):
    runs = [
        train(Module(cls, **options), precision=precision, gradient_clip_val=clip)
        for cls, options in ((torch.optim.AdamW, {}), (dgg.AdamW, {"alpha": 0.0}))
    ]
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q)


def test_16_bits_with_fused_are_refused_with_clipping_as_torchs_are():
    for cls in (torch.optim.AdamW, dgg.AdamW):
        with pytest.raises(RuntimeError, match="clipping because it performs unscaling"):
            train(Module(cls, fused=True), precision="16-mixed", gradient_clip_val=0.5)


@pytest.mark.parametrize("manual", [False, True])
def test_replay_in_the_usual_loop_is_used(manual):
    """Its automatic loop zeroes gradients between training_step and the backward pass."""
    used = train(Module(dgg.SGD, replays=True, manual=manual))
    not_used = train(Module(dgg.SGD, replays=False, manual=manual))
    assert not torch.equal(used[0], not_used[0])
    # By hand: r of the step beside g.
    model, (x, y) = Module(dgg.SGD), next(iter(data(7)))
    opt = model.made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for batch in data():
                with opt.replay():
                    model.loss((x, y)).backward()
                opt.zero_grad()
                model.loss(batch).backward()
                opt.step()
            opt.set_anchor()
    for p, q in zip(used, model.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach())


def lightning_wrapper(opt):
    from pytorch_lightning.core.optimizer import LightningOptimizer

    return LightningOptimizer(opt)


def fabric_wrapper(opt):
    from lightning_fabric.wrappers import _FabricOptimizer

    return _FabricOptimizer(opt, fabric.Fabric(accelerator="cpu")._strategy)


@pytest.mark.parametrize("wrap", [lightning_wrapper, fabric_wrapper])
@pytest.mark.parametrize("cls", [dgg.AdamW, dgg.SGD])
def test_wrappers_that_imitate_the_class_hand_on(wrap, cls):
    """They are instances of a subclass without the optimizer's attributes."""
    param = torch.nn.Parameter(torch.ones(3))
    opt = cls([param], lr=0.1, alpha=1.0)
    wrapped = wrap(opt)
    assert isinstance(wrapped, cls) and dgg.unwrap(wrapped) is opt
    assert wrapped.state is opt.state
    for _ in range(2):
        param.grad = torch.ones(3)
        opt.step()
    wrapped.set_anchor()
    assert torch.equal(opt.state[param]["anchor"], param.detach()) and opt._cache is None
    with wrapped.replay():
        param.grad = torch.ones(3)
    wrapped.zero_grad()
    assert opt._replay and param.grad is None
    wrapped.clear_replay()
    assert not opt._replay
    param.grad = torch.ones(3)
    opt.step()
    opt.step()
    assert wrapped.guidance_stats()["injected"] and not wrapped.last_step_skipped
    assert not wrapped._step_supports_amp_scaling
    wrapped.load_state_dict(wrapped.state_dict())
    new = torch.nn.Parameter(torch.ones(2))
    wrapped.add_param_group({"params": [new]})
    assert opt.param_groups[1]["params"] == [new]
    wrapped.clear_anchor()
    assert "anchor" not in opt.state[param] and opt.param_groups[0]["anchored"] == 0
    assert set(vars(wrapped)) <= {"_optimizer", "_strategy", "_callbacks", "_on_before_step",
                                  "_on_after_step"}  # fmt: skip


def test_fabric_trains():
    run = fabric.Fabric(accelerator="cpu")
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    model, opt = run.setup(model, dgg.AdamW(model.parameters(), lr=0.05, alpha=1.0))
    for _ in range(2):
        for x, y in data():
            opt.zero_grad()
            run.backward((model(x) - y).square().mean())
            opt.step()
        opt.set_anchor()
    assert dgg.unwrap(opt).param_groups[0]["task_index"] == 2


def test_fabric_clips_accumulates_and_resumes(tmp_path):
    """Two batches a step, two tasks; saved in the middle of the second and gone on bit for bit."""
    norms = []

    def begin():
        run = fabric.Fabric(accelerator="cpu")
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        return run, *run.setup(model, dgg.AdamW(model.parameters(), lr=0.05, alpha=0.5))

    def train(run, model, opt, task):
        for place, (x, y) in enumerate(data(task)):
            run.backward((model(x) - y).square().mean() / 2)
            if place % 2:
                norms.append(run.clip_gradients(model, opt, max_norm=0.05))
                opt.step()
                opt.zero_grad()

    run, model, opt = begin()
    train(run, model, opt, 0)
    opt.set_anchor(task=1)
    train(run, model, opt, 1)
    run.save(tmp_path / "state", {"model": model, "optimizer": opt})
    train(run, model, opt, 2)
    assert dgg.unwrap(opt).param_groups[0]["draw_index"] == 6 and min(norms) > 0.05

    run, again, resumed = begin()
    run.load(tmp_path / "state", {"model": again, "optimizer": resumed})
    resumed.set_anchor(task=1)
    train(run, again, resumed, 2)
    assert dgg.unwrap(resumed).param_groups[0]["draw_index"] == 6
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("number", [0, 1])
def test_the_recipes(number, tmp_path, monkeypatch):
    """The blocks of docs/recipes.md run as printed."""
    page = pathlib.Path(__file__).parents[1] / "docs" / "recipes.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)[number]
    monkeypatch.chdir(tmp_path)
    module = Module(dgg.AdamW, alpha=1.0)
    module.on_train_epoch_end = lambda: None
    names = {
        "dgg": dgg, "tasks": [data(0), data(1)], "module": module, "model": torch.nn.Linear(3, 1),
        "loss": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
    }  # fmt: skip
    exec(code, names)
    opt = dgg.unwrap(names["optimizer"] if number else names["trainer"].optimizers[0])
    assert opt.param_groups[0]["task_index"] == 1
    assert "anchor of 2 tensors" in opt.summary() and "4 steps since the anchor" in opt.summary()


# -- the callback ---------------------------------------------------------------------------------


class Plain(Module):
    """A module that knows nothing of guidance."""

    def on_train_epoch_end(self):
        pass


class Seen(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.entries = []

    def log_metrics(self, metrics, step=None):
        self.entries.append(metrics)


def fit(module, callbacks, seed, epochs=2, logger=False, **options):
    resumed = {"ckpt_path": options.pop("ckpt_path")} if "ckpt_path" in options else {}
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=logger, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module, data(seed), **resumed)
    return trainer


def optimizer_of(trainer):
    return dgg.unwrap(trainer.optimizers[0])


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"alpha": 1.0, "importance": 0.5}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_callback_makes_a_call_of_fit_a_task(options, precision):
    import dgg.lightning

    assert issubclass(dgg.lightning.GuidanceCallback, pl.Callback)
    module, guide = Plain(dgg.AdamW, **options), dgg.lightning.GuidanceCallback()
    more = {"precision": precision, "gradient_clip_val": 0.5}
    for number in range(3):
        before = [p.detach().clone() for p in module.parameters()]
        trainer = fit(module, [guide], number, **more)
        opt, weight = optimizer_of(trainer), module.layer.weight
        assert guide.task == number + 1 and opt.param_groups[0]["task_index"] == number
        if not number:
            assert "anchor" not in opt.state[weight]
            continue
        for p, former in zip(module.parameters(), before, strict=True):
            torch.testing.assert_close(opt.state[p]["anchor"], former)
        assert ("importance" in opt.state[weight]) == ("importance" in options)
        # The same by hand.
        if number == 1:
            twin = Plain(dgg.AdamW, **options)
            first = fit(twin, [], 0, **more)
            sums = None
            if "importance" in options:
                sums = optimizer_of(first).importance_dict(model=twin)

            class ByHand(pl.Callback):
                def on_train_start(self, trainer, module, sums=sums):
                    given = {} if sums is None else {"importance": sums, "model": module}
                    optimizer_of(trainer).set_anchor(task=1, **given)

            fit(twin, [ByHand()], 1, **more)
            for p, q in zip(module.parameters(), twin.parameters(), strict=True):
                assert torch.equal(p, q)


def test_accumulated_and_clipped_as_by_hand():
    """Two batches a step: one norm, one draw and one pull, in two tasks."""
    import dgg.lightning

    module, guide = Plain(dgg.AdamW, alpha=1.0), dgg.lightning.GuidanceCallback()
    twin, norms = Plain(dgg.AdamW, alpha=1.0), []
    for number in range(2):
        more = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
        opt, alone = optimizer_of(fit(module, [guide], number, **more)), twin.made()
        alone.set_anchor(task=number)
        for place, batch in enumerate([*data(number), *data(number)]):
            (twin.loss(batch) / 2).backward()
            if place % 2:
                norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05))
                alone.step()
                alone.zero_grad()
        assert opt.param_groups[0]["draw_index"] == 4
        assert opt.param_groups[0]["anchored"] == 2 * number
    assert min(norms) > 0.05
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"alpha": 0.5, "importance": 1.0}])
def test_resumed_in_the_middle_of_a_task(tmp_path, options):
    import dgg.lightning

    def first_task():
        module, guide = Plain(dgg.AdamW, **options), dgg.lightning.GuidanceCallback()
        fit(module, [guide], 0)
        return module, guide

    module, guide = first_task()
    whole = optimizer_of(fit(module, [guide], 1))
    killed, guide = first_task()
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    fit(killed, [guide, save], 1, epochs=1, enable_checkpointing=True)
    # Another process: fresh objects, everything from the checkpoint.
    again, guide = Plain(dgg.AdamW, **options), dgg.lightning.GuidanceCallback()
    trainer = fit(again, [guide], 1, ckpt_path=str(tmp_path / "last.ckpt"))
    opt = optimizer_of(trainer)
    assert guide.task == 2 and opt.param_groups[0]["task_index"] == 1
    for p, q in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(whole.state[p]["anchor"], opt.state[q]["anchor"])


class Foreign(Plain):
    """Makes an optimizer of torch's and its guidance."""

    def configure_optimizers(self):
        opt = torch.optim.NAdam(self.parameters(), lr=0.05)
        self.guidance = dgg.Guidance(opt, alpha=0.5, importance=self.importance)
        return opt


@pytest.mark.parametrize("importance", [0.0, 1.0])
def test_another_optimizer_resumed_in_the_middle_of_a_task(tmp_path, importance):
    import dgg.lightning

    def made():
        module = Foreign(None)
        module.importance = importance
        return module, dgg.lightning.GuidanceCallback()

    def first_task():
        module, guide = made()
        fit(module, [guide], 0)
        assert not module.guidance._count_anchors() and guide.task == 1
        return module, guide

    module, guide = first_task()
    before = [p.detach().clone() for p in module.parameters()]
    seen = Seen()
    fit(module, [guide], 1, logger=seen, log_every_n_steps=2)
    for p, former in zip(module.parameters(), before, strict=True):
        assert torch.equal(module.guidance.state[p]["anchor"], former)
    assert any(e.get("guidance/anchored") == 2 for e in seen.entries)
    killed, guide = first_task()
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    fit(killed, [guide, save], 1, epochs=1, enable_checkpointing=True)
    again, guide = made()
    fit(again, [guide], 1, ckpt_path=str(tmp_path / "last.ckpt"))
    (first, *_), (second, *_) = module.guidance.param_groups, again.guidance.param_groups
    assert guide.task == 2 and first == second and second["task_index"] == 1
    assert second["draw_index"] == 8
    for p, q in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        ours, theirs = module.guidance.state[p], again.guidance.state[q]
        assert (
            ours.keys() == theirs.keys() == ({"anchor", "importance"} if importance else {"anchor"})
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_that_lost_the_guidance_is_no_new_task(tmp_path):
    """As of optimizers that save or load their state without torch's hooks."""
    import dgg.lightning

    def made():
        module = Foreign(None)
        module.importance = 0.0
        return module, dgg.lightning.GuidanceCallback()

    module, guide = made()
    fit(module, [guide], 0)
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    fit(module, [guide, save], 1, epochs=1, enable_checkpointing=True)
    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["optimizer_states"][0].pop("dgg_guidance")["anchors"]
    torch.save(checkpoint, path)
    again, guide = made()
    with pytest.raises(RuntimeError, match="middle of task 1.*checkpoint has brought no anchor"):
        fit(again, [guide], 1, ckpt_path=str(path))
    assert not again.guidance._count_anchors()


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"alpha": 0.5, "importance": 1.0}])
def test_resumed_at_the_end_of_a_task(tmp_path, options):
    """Nothing is trained then, and neither on_train_start nor on_train_end is called."""
    import dgg.lightning

    module, guide = Plain(dgg.AdamW, **options), dgg.lightning.GuidanceCallback()
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    fit(module, [guide, save], 0, enable_checkpointing=True)
    fit(module, [guide], 1)
    again, guide = Plain(dgg.AdamW, **options), dgg.lightning.GuidanceCallback()
    fit(again, [guide], 0, ckpt_path=str(tmp_path / "last.ckpt"))
    assert guide.task == 1
    opt = optimizer_of(fit(again, [guide], 1))
    assert (guide.task, opt.param_groups[0]["task_index"], opt.param_groups[0]["anchored"]) == (
        2, 1, 2
    )  # fmt: skip
    for p, q in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_task_that_was_saved_after_its_end_counts_once(tmp_path):
    """Fitted again from that file nothing is trained, and the task was counted already."""
    import dgg.lightning

    module, guide = Plain(dgg.AdamW, alpha=0.5), dgg.lightning.GuidanceCallback()
    fit(module, [guide], 0).save_checkpoint(tmp_path / "end.ckpt")
    again, guide = Plain(dgg.AdamW, alpha=0.5), dgg.lightning.GuidanceCallback()
    fit(again, [guide], 0, ckpt_path=tmp_path / "end.ckpt")
    assert guide.task == 1
    opt = optimizer_of(fit(again, [guide], 1))
    assert (opt.param_groups[0]["task_index"], opt.param_groups[0]["anchored"]) == (1, 2)


def test_a_test_of_a_checkpoint_does_not_go_back_to_its_task(tmp_path):
    """Lightning loads it into the callbacks, too."""
    import dgg.lightning

    class Tested(Plain):
        def test_step(self, batch, _):
            pass

    module, guide = Tested(dgg.AdamW, alpha=0.5), dgg.lightning.GuidanceCallback(task=0)
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    trainer = fit(module, [guide, save], 0, enable_checkpointing=True)
    trainer.test(module, data(0), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    opt = optimizer_of(fit(module, [guide], 1))
    assert (opt.param_groups[0]["task_index"], opt.param_groups[0]["anchored"]) == (1, 2)


def test_a_checkpoint_of_another_task_than_the_one_that_is_said_is_refused(tmp_path):
    import dgg.lightning

    def resumed(path, epochs=2, **said):
        guide = dgg.lightning.GuidanceCallback(**said)
        trainer = fit(Plain(dgg.AdamW), [guide], 0, epochs=epochs, ckpt_path=path)
        return optimizer_of(trainer).param_groups[0]["task_index"]

    middle, end = tmp_path / "last.ckpt", tmp_path / "end.ckpt"
    save = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    callbacks = [dgg.lightning.GuidanceCallback(task=2), save]
    trainer = fit(Plain(dgg.AdamW), callbacks, 0, epochs=1, enable_checkpointing=True)
    trainer.save_checkpoint(end)
    for task in (0, 1, 3):
        with pytest.raises(
            ValueError, match=rf"written in task 2 and .*task={task}\).*weights alo"
        ):
            resumed(middle, task=task)
    assert resumed(middle, task=2) == resumed(middle) == 2
    with pytest.raises(ValueError, match=r"written in task 3 and .*task=2\)"):
        resumed(end, task=2)
    assert resumed(end, task=3) == resumed(end) == 3


def test_a_task_that_failed_is_told(recwarn):
    import dgg.lightning

    class Fails(Plain):
        fail = False

        def training_step(self, batch, index):
            if self.fail and index == 2:
                raise OverflowError
            return super().training_step(batch, index)

    module, guide = Fails(dgg.AdamW, alpha=0.5), dgg.lightning.GuidanceCallback()
    fit(module, [guide], 0)
    module.fail = True
    with pytest.raises(OverflowError):
        fit(module, [guide], 1)
    assert guide.task == 1
    module.fail = False
    with pytest.warns(UserWarning, match="task 1 was begun before and did not reach its end"):
        fit(module, [guide], 1)
    assert guide.task == 2
    fit(module, [guide], 2, fast_dev_run=True)
    assert guide.task == 2


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("every", [2, 4])
def test_the_callback_logs(every, accumulated, monkeypatch):
    """Of all steps since it logged before, the last one included."""
    import dgg.lightning

    log, steps = dgg.AdamW.guidance_log, []
    monkeypatch.setattr(
        dgg.AdamW, "guidance_log",
        lambda self: steps.append(self.param_groups[0]["draw_index"]) or log(self),
    )  # fmt: skip
    module, guide = Plain(dgg.AdamW, alpha=1.0), dgg.lightning.GuidanceCallback(task=1)
    seen, more = Seen(), {"accumulate_grad_batches": accumulated}
    fit(module, [guide], 0, epochs=2 * accumulated, logger=seen, log_every_n_steps=every, **more)
    assert steps == list(range(every, 9, every))
    entries = [e for e in seen.entries if "guidance/injected" in e]
    assert len(entries) == len(steps) and {e["guidance/task"] for e in entries} == {1}
    assert all(e["guidance/injected"] == 1 and e["guidance/anchored"] == 2 for e in entries)


class Two(Plain):
    """Steps two optimizers a batch, which Lightning counts as two steps."""

    def __init__(self):
        super().__init__(None, manual=True)
        self.second = torch.nn.Linear(3, 1)

    def training_step(self, batch, _):
        for opt, layer in zip(self.optimizers(), (self.layer, self.second), strict=True):
            opt.zero_grad()
            self.manual_backward(layer(batch[0]).square().mean())
            opt.step()

    def configure_optimizers(self):
        return [dgg.AdamW(x.parameters(), lr=0.01) for x in (self.layer, self.second)]


@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_guidance_of_two_optimizers_is_logged(every):
    import dgg.lightning

    seen = Seen()
    fit(Two(), [dgg.lightning.GuidanceCallback(task=1)], 0, logger=seen, log_every_n_steps=every)
    entries = [e for e in seen.entries if "guidance/injected/0" in e]
    assert len(entries) == 8 // every and all("guidance/injected/1" in e for e in entries)


def test_the_callback_needs_an_optimizer_of_dgg():
    import dgg.lightning

    module = Plain(torch.optim.AdamW)
    with pytest.raises(TypeError, match="returned AdamW, none of dgg's: return dgg.AdamW"):
        fit(module, [dgg.lightning.GuidanceCallback()], 0)
    with pytest.raises(ValueError, match="task"):
        dgg.lightning.GuidanceCallback(task=-1)
    with pytest.raises(TypeError, match="task"):
        dgg.lightning.GuidanceCallback(task="1")
