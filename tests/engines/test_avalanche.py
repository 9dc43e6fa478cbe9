# SPDX-License-Identifier: BSD-3-Clause
"""dgg in Avalanche: new classes, a head that grows, resumed between two experiences."""

from __future__ import annotations

import pytest
import torch

import dgg
from cpu_torchvision import import_torchvision
from recipes import need, run_recipe

need("avalanche", "avalanche")
DECLARED = import_torchvision()
from avalanche.benchmarks import nc_benchmark  # noqa: E402
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint  # noqa: E402
from avalanche.models import IncrementalClassifier  # noqa: E402
from avalanche.training import Naive  # noqa: E402
from avalanche.training.plugins import SupervisedPlugin  # noqa: E402

CLASSES, EXPERIENCES, STEPS = 6, 3, 16
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(torch.nn.Module):
    """A classifier that gets two rows with every experience."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(8, 16)
        self.head = IncrementalClassifier(16, initial_out_features=2)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


class Guide(SupervisedPlugin):
    """The recipe's, where dill can find it."""

    def before_training_exp(self, strategy, **kwargs):
        strategy.optimizer.set_anchor(task=strategy.experience.current_experience)


@pytest.fixture
def scenario():
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(96) % CLASSES
    x = torch.randn(96, 8, generator=rng) + 3 * torch.randn(CLASSES, 8, generator=rng)[y]
    data = torch.utils.data.TensorDataset(x, y)
    data.targets = y.tolist()
    return nc_benchmark(
        data, data, EXPERIENCES, task_labels=False, fixed_class_order=[*range(CLASSES)]
    )


def strategy():
    torch.manual_seed(0)
    model = Net()
    opt = dgg.AdamW(model.parameters(), lr=1e-2, alpha=0.5, max_grad_norm=0.2, importance=0.5)
    return Naive(
        model=model, optimizer=opt, train_mb_size=4, train_epochs=2, plugins=[Guide()],
        evaluator=None,
    )  # fmt: skip


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(trained, experience, **more):
    torch.manual_seed(experience.current_experience)  # of the shuffling and the new rows
    trained.train(experience, **more)


def test_the_recipe(scenario):
    model = Net()
    names = run_recipe("Avalanche", {"dgg": dgg, "model": model, "benchmark": scenario})
    opt = names["strategy"].optimizer
    assert type(opt) is dgg.AdamW and opt.param_groups[0]["max_grad_norm"] is not None
    assert opt.param_groups[0]["task_index"] == EXPERIENCES - 1
    assert all("anchor" in opt.state[p] for p in model.parameters())


@pytest.mark.parametrize("reset", [False, True], ids=["moments kept", "moments reset"])
def test_a_head_that_grows(scenario, reset):
    """Old rows have the anchor that they ended with, new ones that which they began with."""
    trained = strategy()
    opt = trained.optimizer
    if reset:  # Avalanche drops all state, of which importance would be made
        opt.param_groups[0]["importance"] = 0.0
    for number, experience in enumerate(scenario.train_stream):
        ended, seen = weights(trained.model), []
        hook = opt.register_step_post_hook(
            lambda opt, *_, seen=seen: seen.append(
                {k: opt.guidance_stats()[k] for k in ("injected", "clip")}
            )
        )
        train(trained, experience, reset_optimizer_state=reset)
        hook.remove()
        assert len(seen) == STEPS and min(step["clip"] for step in seen) < 1
        injected = sum(bool(step["injected"]) for step in seen)
        assert (0 < injected < STEPS) if number else injected == 0
        assert opt.param_groups[0]["task_index"] == number
        assert trained.model.head.classifier.out_features == 2 * (number + 1)
        if number:
            for name, p in trained.model.named_parameters():
                anchor = opt.state[p]["anchor"]
                assert anchor.shape == p.shape
                assert torch.equal(anchor[: len(ended[name])], ended[name]), name


def test_resumed_between_experiences(scenario, tmp_path):
    """Avalanche saves between experiences alone; the next is trained bit for bit."""
    whole = strategy()
    for experience in scenario.train_stream:
        train(whole, experience)
        if experience.current_experience == 1:
            save_checkpoint(whole, tmp_path / "saved.pkl")
    again, first = maybe_load_checkpoint(strategy(), tmp_path / "saved.pkl")
    assert first == 2 and again is not whole
    for experience in scenario.train_stream[first:]:
        train(again, experience)
    assert again.optimizer.param_groups[0]["draw_index"] == EXPERIENCES * STEPS
    for name, p in again.model.named_parameters():
        ours = dict(whole.model.named_parameters())[name]
        assert torch.equal(p, ours), name
        for key in ("anchor", "importance", "exp_avg"):
            mine, theirs = again.optimizer.state[p][key], whole.optimizer.state[ours][key]
            assert torch.equal(mine, theirs), (name, key)
