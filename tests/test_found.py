# SPDX-License-Identifier: BSD-3-Clause
"""Faults that a review has found, each with the smallest program that shows it."""

import math
import warnings

import pytest
import torch

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


# -- gradients --------------------------------------------------------------------------------


def test_replay_gives_back_the_gradient_that_is_a_view_of_a_flat_buffer():
    """Who zeroes the flat buffer would zero nothing any more."""
    model = torch.nn.Linear(4, 3)
    opt = dgg.AdamW(model.parameters())
    flat = torch.zeros(15)
    model.weight.grad, model.bias.grad = flat[:12].view(3, 4), flat[12:]
    with opt.replay():
        model(torch.ones(2, 4)).sum().backward()
    model(torch.ones(2, 4)).sum().backward()
    assert torch.equal(flat[:12].view(3, 4), model.weight.grad)
    flat.zero_()
    assert not model.weight.grad.any()


def test_guidance_edits_a_gradient_that_two_parameters_share_once():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = torch.optim.SGD(params, lr=1.0)
    dgg.Guidance(opt, max_grad_norm=0.1)
    shared = torch.ones(3)
    for param in params:
        param.grad = shared
    opt.step()
    expected = torch.full((3,), 1 - 0.1 / math.sqrt(6))
    torch.testing.assert_close(params[0].detach(), expected)


def test_every_look_of_a_step_has_the_replay_gradients():
    """LBFGS looks several times a step; from the second look on it minimised something else."""
    model = torch.nn.Linear(4, 1, bias=False)
    opt = torch.optim.LBFGS(model.parameters(), max_iter=3, lr=0.1)
    guidance = dgg.Guidance(opt, alpha=0.0)
    opt_step, seen = guidance._edit, []

    def look():
        opt_step()
        seen.append(model.weight.grad.clone())

    guidance._edit = look

    def closure():
        opt.zero_grad()
        loss = model(torch.zeros(1, 4)).sum()  # its gradient is 0
        loss.backward()
        return loss

    with guidance.replay():
        model(torch.ones(1, 4)).sum().backward()
    opt.step(closure)
    assert len(seen) > 1
    assert all(torch.equal(grad, torch.ones(1, 4)) for grad in seen)


def test_guidance_names_what_is_wrong_when_a_group_has_gone():
    layers = two_layers()
    opt = torch.optim.SGD([{"params": layer.parameters()} for layer in layers], lr=0.1)
    dgg.Guidance(opt, alpha=1.0)
    opt.param_groups.pop()
    try:
        fit(layers, opt)
    except (RuntimeError, ValueError) as error:
        assert "group" in str(error), error


def test_a_guidance_that_was_removed_sets_no_anchor_that_nobody_reads():
    param = torch.nn.Parameter(torch.ones(3))
    guidance = dgg.Guidance(torch.optim.SGD([param], lr=0.1))
    guidance.remove()
    with pytest.raises(RuntimeError, match="remove"):
        guidance.set_anchor()


def test_guidance_does_not_add_the_replay_gradients_of_a_step_that_was_left_out():
    """dgg's own optimizers drop them at the second zero_grad(), and warn."""
    gradients = []
    for own in (True, False):
        model = torch.nn.Linear(4, 1, bias=False)
        cls = dgg.SGD if own else torch.optim.SGD
        opt = cls(model.parameters(), lr=1.0)
        guide = opt if own else dgg.Guidance(opt, alpha=0.0)
        before = model.weight.detach().clone()
        for steps in (False, True):
            opt.zero_grad()
            with guide.replay():
                model(torch.ones(1, 4)).sum().backward()
            if not steps:
                opt.zero_grad()  # the loss was not finite: this batch is left out
                continue
            model(torch.zeros(1, 4)).sum().backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opt.step()
        gradients.append(before - model.weight.detach())
    torch.testing.assert_close(*gradients)


# -- Lightning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 10])
def test_the_guidance_of_two_optimizers_is_logged(every):
    """Lightning's step goes up by two a batch then, and is never one below an even number."""
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    from pytorch_lightning.loggers.logger import Logger

    import dgg.lightning

    class Seen(Logger):
        name, version = "seen", 0

        def __init__(self):
            super().__init__()
            self.names = set()

        def log_hyperparams(self, *args, **kwargs):
            pass

        def log_metrics(self, metrics, step=None):
            self.names |= metrics.keys()

    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(2))
            self.automatic_optimization = False

        def training_step(self, batch, _):
            for opt, layer in zip(self.optimizers(), self.layers, strict=True):
                opt.zero_grad()
                self.manual_backward(layer(batch).square().mean())
                opt.step()
            self.log("one", 1.0)

        def configure_optimizers(self):
            return [dgg.AdamW(layer.parameters(), lr=1e-2) for layer in self.layers]

    seen = Seen()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(
            max_epochs=1, logger=seen, log_every_n_steps=every, accelerator="cpu",
            callbacks=[dgg.lightning.GuidanceCallback(task=1)], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(Two(), torch.utils.data.DataLoader(torch.randn(40, 4)))  # fmt: skip
    assert "one" in seen.names
    assert any(name.startswith("guidance/injected") for name in seen.names)


@pytest.fixture
def lightning(tmp_path):
    """Returns a function that fits a new module and returns its Trainer and its optimizer."""
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

    class One(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, _):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            self.made = dgg.AdamW(self.parameters(), lr=1e-2)
            return self.made

    def fit(guide, epochs=1, ckpt_path=None):
        module = One()
        trainer = pl.Trainer(
            max_epochs=epochs, logger=False, accelerator="cpu", callbacks=[guide],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 4)), ckpt_path=ckpt_path)
        return trainer, module.made

    return fit


def test_a_checkpoint_of_another_task_than_the_one_that_is_said_is_refused(lightning, tmp_path):
    """In the Trainer it is an error; here task=5 is silently task 1."""
    import dgg.lightning

    path = tmp_path / "end.ckpt"
    lightning(dgg.lightning.GuidanceCallback())[0].save_checkpoint(path)
    with pytest.raises(ValueError, match="task"):
        lightning(dgg.lightning.GuidanceCallback(task=5), epochs=2, ckpt_path=path)


def test_a_task_that_was_saved_after_its_end_counts_once(lightning, tmp_path):
    """Fitted again from that file nothing is trained, and the task was counted already."""
    import dgg.lightning

    path = tmp_path / "end.ckpt"
    lightning(dgg.lightning.GuidanceCallback())[0].save_checkpoint(path)
    guide = dgg.lightning.GuidanceCallback()
    lightning(guide, ckpt_path=path)
    assert guide.task == 1
    _, opt = lightning(guide)
    assert opt.param_groups[0]["task_index"] == 1
