# SPDX-License-Identifier: BSD-3-Clause
"""Lightning and Fabric, really run: wrappers that imitate a class, clipping, replay."""

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
