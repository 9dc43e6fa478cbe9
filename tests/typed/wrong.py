# SPDX-License-Identifier: BSD-3-Clause
"""Usual mistakes: a type checker must complain of every line marked so, and of no other."""

from __future__ import annotations

from torch import nn

import dgg


def mistakes(model: nn.Module, opt: dgg.AdamW, guidance: dgg.Guidance) -> None:
    """Each of them in a line of its own."""
    params = list(model.parameters())
    dgg.AdamW(params, alpha="0.2")  # wrong
    dgg.AdamW(params, alpha=None)  # wrong
    dgg.AdamW(params, lr="1e-3")  # wrong
    dgg.AdamW(params, betas=0.9)  # wrong
    dgg.AdamW(params, granularity="tensors")  # wrong
    dgg.AdamW(params, norm_scope="locals")  # wrong
    dgg.AdamW(params, backend="cuda12")  # wrong
    dgg.AdamW(params, route="second")  # wrong
    dgg.AdamW(params, alhpa=0.2)  # wrong
    dgg.AdamW(params, process_group="WORLD")  # wrong
    dgg.AdamW(model)  # wrong
    dgg.AdamW(model.state_dict())  # wrong
    dgg.SGD(nn.Sequential(model))  # wrong
    dgg.SGD(params, momentum="0.9")  # wrong
    dgg.Guidance(model)  # wrong
    opt.alpha = 0.1  # wrong
    guidance.alpha = 0.1  # wrong
    opt.set_anchor([0.1])  # wrong
    opt.set_anchor(task="1")  # wrong
    opt.merge_anchor("median")  # wrong
    opt.step(3)  # wrong
    opt.set_anchr()  # wrong
    dgg.ReplayBuffer("100")  # wrong
    dgg.metrics.AccuracyMatrix(0.5)  # wrong
    dgg.hf.GuidanceCallbak()  # wrong
    dgg.hf.GuidanceCallback(alpha="0.2")  # wrong
    dgg.AdmW(params)  # wrong
