# SPDX-License-Identifier: BSD-3-Clause
"""What holds after two tasks of any framework that trains with a Trainer."""

from __future__ import annotations

import torch

import dgg

STEPS, SAVED, BOUND = 6, 3, 0.05


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


def assert_second_task(trainer, start: dict[str, torch.Tensor]) -> None:
    """Every step was guided, towards ``start``, by gradients that were clipped."""
    opt = dgg.unwrap(trainer.optimizer)
    assert type(opt) is dgg.AdamW and dgg.hf.is_active(trainer)
    group = opt.param_groups[0]
    assert (group["task_index"], group["draw_index"]) == (1, STEPS)
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert named.keys() == start.keys()
    for name, p in named.items():
        assert torch.equal(opt.state[p]["anchor"], start[name]), name
        assert opt.state[p]["step"] == STEPS, name
    entries = [e for e in trainer.state.log_history if "guidance/injected" in e]
    assert entries and all(e["guidance/injected"] == 1 for e in entries)
    assert all(e["guidance/grad_norm"] <= BOUND * 1.0001 for e in entries)
    norms = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
    assert norms and min(norms) > BOUND, "nothing was clipped"


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
