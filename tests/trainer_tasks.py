# SPDX-License-Identifier: BSD-3-Clause
"""What holds after two tasks of any framework that trains with a Trainer."""

from __future__ import annotations

import torch

import dgg

# With the recipes' alpha of 0.2 steps are guided before and after the checkpoint.
STEPS, SAVED, BOUND = 16, 8, 0.02


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a copy of what a model trains, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_first_task(trainer, plain) -> None:
    """The first task is not guided: the framework's own AdamW, to rounding.

    So learning rate, betas, eps, decay, clipping and accumulation are those of the framework.
    """
    opt = dgg.unwrap(trainer.optimizer)
    assert type(opt) is dgg.AdamW and not dgg.hf.is_active(trainer)
    theirs = getattr(plain.optimizer, "optimizer", plain.optimizer)  # inside accelerate's wrapper
    assert isinstance(theirs, torch.optim.AdamW) and not isinstance(theirs, dgg.AdamW)
    assert opt.param_groups[0]["draw_index"] == STEPS
    ended, expected = trained(trainer.model), trained(plain.model)
    assert ended.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(ended[name], p, rtol=1e-4, atol=1e-5, msg=name)


def guided_steps(alpha, seed: int) -> list[int]:
    """Returns the numbers of the steps that an optimizer of these options guides, from 1."""
    param, numbers = torch.nn.Parameter(torch.ones(3)), []
    opt = dgg.AdamW([param], alpha=alpha, seed=seed)
    opt.set_anchor(task=1)
    for number in range(1, STEPS + 1):
        param.grad = torch.ones(3)
        opt.step()
        if opt.guidance_stats()["injected"]:
            numbers.append(number)
    assert numbers[0] <= SAVED < numbers[-1]
    return numbers


def assert_second_task(trainer, start: dict[str, torch.Tensor]) -> None:
    """The steps that were drawn were guided, towards ``start``, by gradients that were clipped."""
    opt = dgg.unwrap(trainer.optimizer)
    assert type(opt) is dgg.AdamW and dgg.hf.is_active(trainer)
    group = opt.param_groups[0]
    assert (group["task_index"], group["draw_index"]) == (1, STEPS)
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert named.keys() == start.keys()
    for name, p in named.items():
        assert torch.equal(opt.state[p]["anchor"], start[name]), name
        assert opt.state[p]["step"] == STEPS, name
    steps = [e for e in trainer.state.log_history if "guidance/injected" in e and "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
    guided = [e for e in steps if e["guidance/injected"] == 1]
    assert [e["step"] for e in guided] == guided_steps(group["alpha"], group["seed"])
    assert all(e["guidance/grad_norm"] <= BOUND * 1.0001 for e in guided)
    assert min(e["grad_norm"] for e in steps) > BOUND, "not every step was clipped"


def assert_resumed(again, straight) -> None:
    """The training that was resumed in its middle ended bit for bit as the other."""
    assert again.state.global_step == straight.state.global_step == STEPS
    ended, expected = trained(again.model), trained(straight.model)
    assert ended.keys() == expected.keys()
    for name, p in expected.items():
        assert torch.equal(ended[name], p), name
    states = [
        {
            n: dgg.unwrap(t.optimizer).state[p]
            for n, p in t.model.named_parameters()
            if p.requires_grad
        }
        for t in (again, straight)
    ]
    for name, entry in states[1].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(states[0][name][key]), torch.as_tensor(value)), name
