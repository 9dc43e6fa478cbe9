# SPDX-License-Identifier: BSD-3-Clause
"""The methods of bench/methods/: the defining property of each, and that all of them resume.

Models are tiny and, but for resuming, in float64: 1e-12 then means nothing but rounding.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dgg

EXACT = 1e-12
NAMES = (
    "l2sp", "recadam", "ewc", "online_ewc", "agem", "spd", "sgp", "pegp", "doc", "coso",
    "perturb_and_merge", "neuron_fusion", "gradient_dropout", "powerpropagation", "loki", "grads",
    "extrapolation",
)  # fmt: skip
# Where the default is for models and learning rates of another size.
SMALL = {
    "recadam": {"strength": 10.0, "middle": 3.0},
    "doc": {"k_start": 2},
    "coso": {"threshold": 0.6},
    "sgp": {"threshold": 0.7},
    "pegp": {"threshold": 0.7},
    "loki": {"share": 0.3},
    "ewc": {"strength": 10.0},
}
IN, HIDDEN, CLASSES = 6, 8, 4

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Adapted(nn.Module):
    """A frozen linear layer with LoRA, whose parts are named as peft names them."""

    def __init__(self, inputs, outputs, rank=3):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def increment(self, x):
        return self.lora_B["default"](self.lora_A["default"](x))

    def forward(self, x):
        return self.base_layer(x) + self.increment(x)


class WithAdapters(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = Adapted(IN, HIDDEN), Adapted(HIDDEN, CLASSES)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.up_proj(x)))


class Bench:
    """A model, an optimizer and a method, trained as the loop of a study would."""

    def __init__(self, make, *, adapted=False, dtype=torch.float64, weight_decay=0.0, **hyper):
        torch.manual_seed(0)
        self.model = (WithAdapters() if adapted else Plain()).to(dtype)
        self.named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = dgg.AdamW(
            self.parameters, lr=1e-2, weight_decay=weight_decay, alpha=0.0, max_grad_norm=None
        )
        self.method = make(
            self.model, self.named, self.optimizer, self.loss_of, self.logits_of, **hyper
        )

    def logits_of(self, batch):
        return self.model(batch[0])

    def loss_of(self, batch):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def gradients(self, batch):
        self.optimizer.zero_grad()
        self.loss_of(batch).backward()

    def step(self, batch, memory=None):
        self.method.step(batch, memory, 1.0)

    def task(self, number, batches, steps=5, memory=None):
        self.method.begin_task(number)
        for k in range(steps):
            self.step(batches[k % len(batches)], memory)
        self.method.end_task(number, batches)

    def values(self):
        return [p.detach().clone() for p in self.parameters]


def data(task, count=3, items=7, dtype=torch.float64):
    """Batches of a task; every task has its own rule."""
    generator = torch.Generator().manual_seed(1000 + task)
    rule = torch.randn(IN, CLASSES, generator=generator, dtype=dtype)
    x = torch.randn(count, items, IN, generator=generator, dtype=dtype)
    return list(zip(x, (x @ rule).argmax(-1), strict=True))


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def largest(left, right):
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@pytest.fixture
def methods(bench):
    return bench("methods")


@pytest.fixture
def trained(methods):
    """Builds a bench that has finished task 0."""

    def build(name, **more):
        hyper = {**SMALL.get(name, {}), **more}
        it = Bench(methods.METHODS[name], **hyper)
        it.task(0, data(0))
        it.method.begin_task(1)
        return it

    return build


# -- all of them -----------------------------------------------------------------------------------


def test_the_registry_has_them_all(methods):
    assert tuple(methods.METHODS) == NAMES
    for make in methods.METHODS.values():
        page = inspect.getmodule(make).__doc__
        assert re.search(r"arXiv\s\d{4}\.\d{5}", page) and re.search(r"Against\sthe\spaper", page)


@pytest.mark.parametrize("name", NAMES)
def test_the_points_of_the_knob_are_accepted(methods, name):
    make = methods.METHODS[name]
    if name == "agem":  # it has no hyper-parameter
        assert make.knobs == {}
        return
    ((keyword, points),) = make.knobs.items()
    assert len(set(points)) == 4 and list(points) == sorted(points)
    for point in points:
        it = Bench(make, **{**SMALL.get(name, {}), keyword: point})
        it.task(0, data(0), steps=1)
        it.task(1, data(1), steps=1)
        assert all(p.isfinite().all() for p in it.parameters)


WRONG = [
    ("l2sp", {"strength": -1.0}), ("recadam", {"strength": -1}), ("recadam", {"rate": 0}),
    ("recadam", {"middle": -1}), ("ewc", {"strength": math.nan}), ("ewc", {"samples": 0}),
    ("ewc", {"coverage": 0}), ("online_ewc", {"decay": 1.5}), ("spd", {"strength": -0.1}),
    ("sgp", {"threshold": 0}), ("sgp", {"increment": -1}), ("sgp", {"scale": -1}),
    ("sgp", {"where": "moments"}), ("pegp", {"threshold": 1.1}), ("pegp", {"factors": "C"}),
    ("pegp", {"samples": 0}), ("doc", {"k_start": 0}), ("doc", {"k_add": -1}),
    ("doc", {"drift_eps": 0.2}), ("doc", {"add_eps": 2}), ("doc", {"amnesia": -1}),
    ("doc", {"max_drift": 2}), ("doc", {"drift_power": -1}), ("coso", {"threshold": 0}),
    ("coso", {"rank": 0}), ("coso", {"sketch_rank": 0}), ("coso", {"gap": 0}),
    ("perturb_and_merge", {"epsilon": -1}), ("perturb_and_merge", {"share": 2}),
    ("perturb_and_merge", {"fisher": "none"}), ("perturb_and_merge", {"seed": -1}),
    ("neuron_fusion", {"keep": 1.5}), ("neuron_fusion", {"scale": -1}),
    ("gradient_dropout", {"rate": 1}), ("gradient_dropout", {"noise": "salt"}),
    ("powerpropagation", {"power": 0.5}), ("powerpropagation", {"keep": -1}),
    ("loki", {"share": 0}), ("loki", {"points": 1}), ("loki", {"samples": 0}),
    ("loki", {"modules": "no such layer"}), ("grads", {"tail": 1}), ("grads", {"layers": ["no"]}),
    ("extrapolation", {"length": math.inf}), ("extrapolation", {"direction": "up"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hyper"), WRONG, ids=lambda x: str(x))
def test_a_wrong_hyper_parameter_is_named(methods, name, hyper):
    (keyword,) = hyper
    with pytest.raises(ValueError, match=rf"{methods.METHODS[name].__name__}: {keyword}\b"):
        Bench(methods.METHODS[name], **hyper)


def test_a_hyper_parameter_of_another_kind_is_named(methods):
    with pytest.raises(TypeError, match="L2SP: strength must be a number"):
        Bench(methods.METHODS["l2sp"], strength="much")
    with pytest.raises(TypeError, match="CoSO: rank must be a whole number"):
        Bench(methods.METHODS["coso"], rank=1.5)


def test_foreign_parameters_are_refused(methods):
    it = Bench(methods.Method)
    with pytest.raises(ValueError, match="the model has no parameter 'other'"):
        methods.Method(
            it.model, {"other": nn.Parameter(torch.ones(1))}, it.optimizer, it.loss_of, it.logits_of
        )


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("name", NAMES)
def test_training_resumes_to_the_last_bit(methods, name, adapted):
    hyper = SMALL.get(name, {})
    memory = data(9, count=1, dtype=torch.float32)[0]

    def begin():
        make = methods.METHODS[name]
        return Bench(make, adapted=adapted, dtype=torch.float32, **hyper)

    def task(it, number):
        it.task(number, data(number, dtype=torch.float32), memory=memory if number else None)

    through = begin()
    task(through, 0)
    task(through, 1)
    stored = io.BytesIO()
    torch.save(
        {
            "values": through.values(),
            "optimizer": through.optimizer.state_dict(),
            "method": through.method.state_dict(),
        },
        stored,
    )
    at_boundary = through.values()
    task(through, 2)
    task(through, 3)

    stored.seek(0)
    saved = torch.load(stored, weights_only=True)  # tensors and numbers only
    resumed = begin()
    assert not same(resumed.values(), saved["values"])
    resumed.method.put_back(saved["values"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.method.load_state_dict(saved["method"])
    task(resumed, 2)
    task(resumed, 3)
    assert same(resumed.values(), through.values())
    assert not same(resumed.values(), at_boundary)

    with pytest.raises(ValueError, match="keeps"):
        resumed.method.load_state_dict({**saved["method"], "stranger": 1})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "grads"])
def test_a_second_task_is_trained_differently(methods, name):
    plain, it = Bench(methods.Method), Bench(methods.METHODS[name], **SMALL.get(name, {}))
    for number in range(2):
        for one in (plain, it):
            one.task(number, data(number), memory=data(5, count=1)[0])
    assert largest(plain.values(), it.values()) > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_no_hook_is_left_on_a_layer(methods, name):
    it = Bench(methods.METHODS[name], **SMALL.get(name, {}))
    it.task(0, data(0))
    it.task(1, data(1))
    assert not [m for m in it.model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("name", ["sgp", "pegp", "loki", "doc"])
def test_layers_that_are_not_called_are_an_error(methods, name):
    it = Bench(methods.METHODS[name], **SMALL.get(name, {}))
    assert it.method.reads_modules == ("step" if name == "doc" else "boundary")
    model = it.model

    def by_hand(batch):
        hidden = torch.tanh(F.linear(batch[0], model.first.weight, model.first.bias))
        return F.linear(hidden, model.last.weight, model.last.bias)

    it.method.logits_of = by_hand
    it.method.loss_of = lambda batch: F.cross_entropy(by_hand(batch), batch[1])
    with pytest.raises(RuntimeError, match="did not call first"):
        it.task(0, data(0))
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# -- penalties -------------------------------------------------------------------------------------


def added_by(it, batch):
    """What edit_gradients adds to the gradients of a batch."""
    it.gradients(batch)
    before = [p.grad.clone() for p in it.parameters]
    it.method.edit_gradients(None)
    return [p.grad - g for p, g in zip(it.parameters, before, strict=True)]


def move(it, amount=0.1):
    torch.manual_seed(5)
    it.method.put_back([p + amount * torch.randn_like(p) for p in it.values()])


def test_l2sp_adds_the_gradient_of_its_penalty(trained):
    it = trained("l2sp", strength=0.3)
    anchor = it.values()
    move(it)
    squares = [(p - a).square().sum() for p, a in zip(it.parameters, anchor, strict=True)]
    penalty = 0.3 / 2 * sum(squares)
    assert penalty > 0
    expected = torch.autograd.grad(penalty, it.parameters)
    assert largest(added_by(it, data(1)[0]), expected) < EXACT


def brute_fisher(model, parameters, x):
    """Every item, every label: the squared gradient, times the probability of the label."""
    total = [torch.zeros_like(p) for p in parameters]
    for item in x:
        log_p = model(item[None]).log_softmax(-1)[0]
        for label in range(CLASSES):
            found = torch.autograd.grad(log_p[label], parameters, retain_graph=True)
            for sum_, g in zip(total, found, strict=True):
                sum_ += log_p[label].exp().detach() * g.square()
    return [sum_ / len(x) for sum_ in total]


def test_exact_fisher_is_the_expectation_over_labels(bench, methods):
    exact_fisher = bench("methods.fisher").exact_fisher
    it = Bench(methods.Method)
    batches = data(0)
    x = torch.cat([batch[0] for batch in batches])
    expected = brute_fisher(it.model, it.parameters, x)
    found = exact_fisher(it.logits_of, batches, it.parameters)
    assert largest(found, expected) < EXACT
    # So many items, in the middle of a batch.
    expected = brute_fisher(it.model, it.parameters, x[:9])
    found = exact_fisher(it.logits_of, batches, it.parameters, samples=9)
    assert largest(found, expected) < EXACT


def test_fisher_of_the_labels_that_matter_is_a_lower_bound(bench, methods):
    exact_fisher = bench("methods.fisher").exact_fisher
    it = Bench(methods.Method)
    it.task(0, data(0), steps=300)  # sure of itself
    exact = exact_fisher(it.logits_of, data(0), it.parameters)
    most = exact_fisher(it.logits_of, data(0), it.parameters, coverage=0.99)
    few = exact_fisher(it.logits_of, data(0), it.parameters, coverage=0.5)
    for a, b, c in zip(few, most, exact, strict=True):
        assert (a <= b + EXACT).all() and (b <= c + EXACT).all()
    total = [sum(f.sum().item() for f in found) for found in (few, most, exact)]
    assert 0.4 * total[2] < total[0] < 0.8 * total[2] < 0.97 * total[2] < total[1] < total[2]


def test_fisher_needs_data(bench, methods):
    it = Bench(methods.Method)
    with pytest.raises(ValueError, match="needs data"):
        bench("methods.fisher").exact_fisher(it.logits_of, [], it.parameters)


def test_ewc_adds_the_gradient_of_all_its_penalties(methods):
    it = Bench(methods.METHODS["ewc"], strength=3.0)
    known = []
    for number in range(2):
        it.task(number, data(number))
        x = torch.cat([batch[0] for batch in data(number)])
        known.append((it.values(), brute_fisher(it.model, it.parameters, x)))
    move(it)
    penalty = 0
    for anchor, fisher in known:
        for p, a, f in zip(it.parameters, anchor, fisher, strict=True):
            penalty = penalty + 3.0 / 2 * (f * (p - a).square()).sum()
    assert penalty > 0
    expected = torch.autograd.grad(penalty, it.parameters)
    assert largest(added_by(it, data(2)[0]), expected) < EXACT


def test_online_ewc_decays_its_fisher_matrix_around_the_last_end(methods):
    it = Bench(methods.METHODS["online_ewc"], strength=3.0, decay=0.7)
    fisher = [torch.zeros_like(p) for p in it.parameters]
    for number in range(2):
        it.task(number, data(number))
        x = torch.cat([batch[0] for batch in data(number)])
        new = brute_fisher(it.model, it.parameters, x)
        fisher = [0.7 * f + n for f, n in zip(fisher, new, strict=True)]
    anchor = it.values()
    move(it)
    expected = [
        3.0 * f * (p.detach() - a) for f, p, a in zip(fisher, it.parameters, anchor, strict=True)
    ]
    found = added_by(it, data(2)[0])
    assert largest(found, expected) < EXACT and max(x.abs().max() for x in found) > 1e-4


# -- rules of the step -----------------------------------------------------------------------------


def test_recadam_anneals_and_pulls_outside_the_preconditioner(trained, methods):
    it = trained("recadam", strength=20.0, rate=0.5, middle=3.0, weight_decay=0.3)
    weight = it.method.weight
    assert weight(3) == 0.5 and weight(3 - 5) == pytest.approx(1 / (1 + math.exp(2.5)), rel=EXACT)
    assert 0 < weight(1) < weight(2) < weight(30) < 1 and weight(-10_000) == 0.0
    # The same Adam beside it, which takes over where each step starts.
    beside = Bench(methods.Method, weight_decay=0.3)
    beside.optimizer.load_state_dict(copy.deepcopy(it.optimizer.state_dict()))
    anchor = it.values()
    for step in range(1, 6):
        old, batch = it.values(), data(1)[step % 3]
        beside.method.put_back(old)
        it.step(batch)
        beside.step(batch)
        lam = 1 / (1 + math.exp(-0.5 * (step - 3.0)))
        expected = [
            # Weight decay is no part of Adam's step: it stays whole.
            x * (1 - 1e-2 * 0.3)
            + lam * (adam - x * (1 - 1e-2 * 0.3))
            - 1e-2 * (1 - lam) * 20.0 * (x - a)
            for x, adam, a in zip(old, beside.values(), anchor, strict=True)
        ]
        assert largest(it.values(), expected) < EXACT
    assert largest(it.values(), beside.values()) > 1e-3


def test_recadam_refuses_a_pull_that_diverges(trained):
    it = trained("recadam", strength=5000.0)  # the paper's, at 500 times its learning rate
    with pytest.raises(ValueError, match="RecAdam: strength=5000 times lr=0.01 must be below 2"):
        it.step(data(1)[0])


def test_agem_removes_just_the_conflict(methods):
    it = Bench(methods.METHODS["agem"])
    dot = lambda a, b: sum((x * y).sum() for x, y in zip(a, b, strict=True)).item()  # noqa: E731
    it.gradients(data(0)[0])
    g = [p.grad.clone() for p in it.parameters]
    torch.manual_seed(3)
    noise = [torch.randn_like(x) for x in g]
    for sign in (1, -1):
        r = [sign * x + 0.02 * n for x, n in zip(g, noise, strict=True)]
        assert sign * dot(g, r) > 0
        it.gradients(data(0)[0])
        it.method.edit_gradients(r)
        found = [p.grad for p in it.parameters]
        if sign > 0:
            assert same(found, g)
        else:
            assert dot(found, r) >= -EXACT
            # The least change that does it: along r.
            ratio = dot(g, r) / dot(r, r)
            expected = [x - ratio * y for x, y in zip(g, r, strict=True)]
            assert largest(found, expected) < EXACT and largest(found, g) > 1e-3
    it.gradients(data(0)[0])
    it.method.edit_gradients(None)
    assert same([p.grad for p in it.parameters], g)


def test_spd_puts_a_tensor_back_on_its_radius(trained, methods):
    it = trained("spd", strength=1.0)
    anchor = it.values()
    beside = Bench(methods.Method)
    put_back = nearer = turned_away = 0
    for step in range(80):
        old = it.values()
        beside.method.put_back(old)
        beside.optimizer.load_state_dict(copy.deepcopy(it.optimizer.state_dict()))
        batch = data(1 if step < 30 else 0)[step % 3]  # away, and back again
        beside.step(batch)
        it.step(batch)
        for p, x, adam, a, q in zip(
            it.parameters, old, beside.values(), anchor, beside.parameters, strict=True
        ):
            before, after = (x - a).norm(), (adam - a).norm()
            turns_back = (q.grad * (x - a)).sum() > 0
            if turns_back and after > before:
                assert (p.detach() - a).norm().item() == pytest.approx(before.item(), rel=EXACT)
                put_back += 1
            else:
                assert torch.equal(p, adam)
                nearer += int(turns_back)
                turned_away += int(not turns_back)
    assert min(put_back, nearer, turned_away) > 10


@pytest.mark.parametrize("noise", ["bernoulli", "gaussian"])
def test_gradient_dropout_is_unbiased(methods, noise):
    rate, draws = 0.3, 4000
    it = Bench(methods.METHODS["gradient_dropout"], rate=rate, noise=noise)
    p = it.model.first.weight
    found = []
    for _ in range(draws):
        p.grad = torch.full_like(p, 2.0)
        it.method.edit_gradients(None)
        found.append(p.grad)
    found = torch.stack(found)
    count = found.numel()
    error = 2.0 * (rate / (1 - rate) / count) ** 0.5
    assert abs(found.mean().item() - 2.0) < 5 * error
    assert found.var().item() == pytest.approx(4.0 * rate / (1 - rate), rel=0.02)
    if noise == "bernoulli":
        assert set(found.unique().tolist()) == {0.0, 2.0 / (1 - rate)}
        share = (found == 0).double().mean().item()
        assert abs(share - rate) < 5 * (rate * (1 - rate) / count) ** 0.5


def test_powerpropagation_follows_the_chain_rule(methods):
    it = Bench(methods.METHODS["powerpropagation"], power=2.5, keep=0.0)
    weight, batch = it.model.first.weight, data(0)[0]
    root = it.method.roots["first.weight"].clone().requires_grad_()
    assert torch.allclose(root * root.abs() ** 1.5, weight, rtol=EXACT)
    others = {name: p.detach() for name, p in it.named.items()}
    others["first.weight"] = root * root.abs() ** 1.5
    logits = torch.func.functional_call(it.model, others, batch[0])
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, batch[1]), root)
    it.gradients(batch)
    theta = weight.grad.clone()
    it.method.edit_gradients(None)
    assert largest([weight.grad], [expected]) < EXACT < (theta - expected).abs().max()
    assert torch.equal(weight.detach(), root.detach())  # the optimizer steps φ
    it.optimizer.step()
    it.method.after_step()
    stepped = it.method.roots["first.weight"]
    assert torch.equal(weight.detach(), stepped * stepped.abs() ** 1.5)


def test_powerpropagation_at_one_is_plain_training(methods):
    it = Bench(methods.METHODS["powerpropagation"], power=1.0, keep=0.0)
    plain = Bench(methods.Method)
    for one in (it, plain):
        one.task(0, data(0))
        one.task(1, data(1))
    assert same(it.values(), plain.values())


def test_powerpropagation_freezes_the_largest_weights(methods):
    it = Bench(methods.METHODS["powerpropagation"], power=2.0, keep=0.25)
    it.task(0, data(0))
    weights = [it.named[name] for name in it.method.roots]
    frozen = torch.cat([mask.flatten() for mask in it.method.frozen.values()])
    sizes = torch.cat([w.detach().abs().flatten() for w in weights])
    assert frozen.sum() == int(0.25 * len(frozen))
    assert sizes[frozen].min() >= sizes[~frozen].max()
    before = [w.detach().clone() for w in weights]
    it.task(1, data(1), steps=3)
    now = torch.cat([w.detach().flatten() for w in weights])
    was = torch.cat([w.flatten() for w in before])
    assert torch.equal(now[frozen], was[frozen]) and (now != was)[~frozen].all()
    later = torch.cat([mask.flatten() for mask in it.method.frozen.values()])
    assert later.sum() == 2 * frozen.sum() and later[frozen].all()


def test_powerpropagation_leaves_tensors_of_zeros_plain(methods):
    it = Bench(methods.METHODS["powerpropagation"], adapted=True)
    assert all("lora_A" in name for name in it.method.roots) and len(it.method.roots) == 2
    before = it.model.up_proj.lora_B["default"].weight.detach().clone()
    it.task(0, data(0), steps=2)
    assert (it.model.up_proj.lora_B["default"].weight != before).all()


@pytest.mark.parametrize("direction", ["gradient", "noise", "displacement"])
def test_extrapolation_looks_from_a_point_ahead(methods, direction):
    it = Bench(methods.METHODS["extrapolation"], length=0.3, direction=direction)
    it.task(0, data(0))
    anchor = it.values()
    it.method.begin_task(1)
    for batch in data(1):
        last = [p.grad.clone() for p in it.parameters]  # behind the clipping, as it was stepped
        it.step(batch)
        if direction == "gradient":
            assert same(it.method.last, [p.grad for p in it.parameters])
        here = it.values()
        it.method.before_forward()
        there = it.values()
        moved = [(a - b) / 0.3 for a, b in zip(here, there, strict=True)]
        if direction == "gradient":
            zeta = [p.grad for p in it.parameters]
            assert largest(zeta, last) > 0
        elif direction == "displacement":
            zeta = [a - b for a, b in zip(here, anchor, strict=True)]
        else:
            zeta = moved
            assert 0.7 < torch.cat([z.flatten() for z in zeta]).std() < 1.3
        assert largest(moved, zeta) < EXACT and largest(here, there) > 1e-4
        it.method.after_forward()
        assert same(it.values(), here)


# -- projections -----------------------------------------------------------------------------------


def few_inputs(task, distinct=2):
    """Batches of so few inputs that no layer's old inputs fill its space."""
    x, y = data(task, count=1)[0]
    return [(x[:distinct], y[:distinct])]


@pytest.mark.parametrize("where", ["step", "gradient"])
@pytest.mark.parametrize("name", ["sgp", "pegp"])
def test_projections_are_orthogonal_and_old_outputs_stay(methods, name, where):
    hyper = {"scaled": False} if name == "sgp" else {}
    it = Bench(methods.METHODS[name], threshold=1.0, where=where, **hyper)
    old, new = few_inputs(0), few_inputs(1)
    it.task(0, old, steps=20)
    before = it.model(old[0][0]).detach()
    values = it.values()
    it.method.begin_task(1)
    it.gradients(new[0])
    it.method.edit_gradients(None)
    if where == "gradient":
        for layer, module in (("first", it.model.first), ("last", it.model.last)):
            assert (module.weight.grad @ it.method.bases[layer]).abs().max() < EXACT
            assert module.weight.grad.abs().max() > 1e-3
        # To first order, whatever the gradients of biases, which stand still.
        tangents = {n: p.grad if n.endswith("weight") else 0 * p for n, p in it.named.items()}
        _, change = torch.func.jvp(
            lambda point: torch.func.functional_call(it.model, point, old[0][0]),
            ({n: p.detach() for n, p in it.named.items()},), (tangents,),
        )  # fmt: skip
        assert change.abs().max() < EXACT
    it.optimizer.step()
    it.method.after_step()
    if where == "step":
        for _ in range(20):
            it.step(new[0])
        for layer, module in (("first", it.model.first), ("last", it.model.last)):
            number = list(it.named).index(f"{layer}.weight")
            change = module.weight.detach() - values[number]
            assert (change @ it.method.bases[layer]).abs().max() < EXACT
            assert change.abs().max() > 1e-2
        assert (it.model(old[0][0]) - before).abs().max() < 1e-11
    for number, name_ in enumerate(it.named):
        if name_.endswith("bias"):
            assert torch.equal(it.parameters[number], values[number])


def paper_sgp(inputs, energies, a):
    """SGP's bases and importance by singular value decompositions of the inputs, as written."""
    basis = importance = None
    for x, energy in zip(inputs, energies, strict=True):
        r = x.T
        if basis is None:
            u, s, _ = torch.linalg.svd(r, full_matrices=False)
            k = int((s.square().cumsum(0) < energy * s.square().sum()).sum()) + 1
            basis, sigma = u[:, :k], s[:k]
            importance = (a + 1) * sigma / (a * sigma + s[0])
            continue
        projected = basis @ (basis.T @ r)
        u_p, s_p, _ = torch.linalg.svd(projected, full_matrices=False)
        sigma_old = ((basis.T @ u_p).square() @ s_p.square()).sqrt()
        u, s, _ = torch.linalg.svd(r - projected, full_matrices=False)
        held = projected.square().sum() + s.square().cumsum(0)
        total = energy * r.square().sum()
        k = 0 if projected.square().sum() >= total else int((held < total).sum()) + 1
        sigma = torch.cat([sigma_old, s[:k]])
        new = (a + 1) * sigma / (a * sigma + sigma.max())
        new[: len(importance)] = (new[: len(importance)] + importance).clamp(0, 1)
        basis, importance = torch.cat([basis, u[:, :k]], 1), new
    return basis, importance


def test_sgp_weighs_bases_as_in_the_paper(methods):
    it = Bench(methods.METHODS["sgp"], threshold=0.6, increment=0.1, scale=1.0, samples=None)
    inputs = {"first": [], "last": []}
    for number in range(3):
        it.task(number, data(number))
        x = torch.cat([batch[0] for batch in data(number)])
        inputs["first"].append(x)
        inputs["last"].append(torch.tanh(it.model.first(x)).detach())
        for layer, found in inputs.items():
            basis, importance = paper_sgp(found, [0.6, 0.7, 0.8][: number + 1], 1.0)
            mine, weight = it.method.bases[layer], it.method.importance[layer]
            assert mine.shape == basis.shape and 0 < mine.shape[1] < len(mine)
            eye = torch.eye(mine.shape[1], dtype=mine.dtype)
            assert largest([mine.T @ mine], [eye]) < EXACT
            # Bases have a sign of their own, so the projections are compared.
            expected = basis @ torch.diag(importance) @ basis.T
            assert largest([mine @ torch.diag(weight) @ mine.T], [expected]) < 1e-10
            assert 0 < weight.min() < weight.max() <= 1 if number == 0 else weight.max() == 1
            g = torch.randn(5, len(mine), dtype=mine.dtype)
            assert largest([it.method.project(layer, g)], [g - g @ expected]) < 1e-10


def test_pegp_keeps_the_adapters_answers_to_old_inputs(methods):
    it = Bench(methods.METHODS["pegp"], adapted=True, threshold=1.0)
    old, new = few_inputs(0), few_inputs(1)
    it.task(0, old, steps=20)
    x = old[0][0]
    before = it.model.up_proj.increment(x).detach()
    first, second = (getattr(it.model.up_proj, n)["default"].weight for n in ("lora_A", "lora_B"))
    a, b = first.detach().clone(), second.detach().clone()
    it.task(1, new, steps=20)
    assert (it.model.up_proj.increment(x) - before).abs().max() < 1e-11 < before.abs().max()
    assert ((first.detach() - a) @ x.T).abs().max() < EXACT
    assert ((second.detach() - b) @ (a @ x.T)).abs().max() < EXACT
    assert (first != a).any() and (second != b).any()
    assert (it.model.up_proj.increment(new[0][0])).abs().max() > 1e-2


def test_pegp_has_the_principal_directions_of_all_old_inputs(methods):
    it = Bench(methods.METHODS["pegp"], threshold=0.8)
    for number in range(3):
        it.task(number, data(number))
        x = torch.cat([batch[0] for old in range(number + 1) for batch in data(old)])
        u, s, _ = torch.linalg.svd(x.T, full_matrices=False)
        k = int((s.square().cumsum(0) < 0.8 * s.square().sum()).sum()) + 1
        basis = it.method.bases["first"]
        assert basis.shape == (IN, k) and 0 < k < IN
        assert largest([basis @ basis.T], [u[:, :k] @ u[:, :k].T]) < 1e-10


@pytest.mark.parametrize(("factors", "free"), [("A", "lora_B"), ("B", "lora_A")])
def test_pegp_projects_the_factors_it_is_told_to(methods, factors, free):
    it = Bench(methods.METHODS["pegp"], adapted=True, factors=factors)
    it.task(0, data(0))
    assert it.method.bases and not [name for name in it.method.bases if free in name]


def test_coso_leaves_old_directions_alone(methods):
    it = Bench(methods.METHODS["coso"], threshold=0.8, rank=2, sketch_rank=5)
    # The head has 4 rows, fewer than a sketch has columns: its other side is projected.
    assert it.method.sides == {"first.weight": False, "last.weight": True}
    widths, old = [], {}
    for number in range(3):
        before = it.values()
        it.task(number, data(number), steps=6)
        for basis in it.method.bases.values():
            eye = torch.eye(basis.shape[1], dtype=basis.dtype)
            assert largest([basis.T @ basis], [eye]) < EXACT
        for name, basis in old.items():
            change = it.named[name].detach() - before[list(it.named).index(name)]
            along = change @ basis if it.method.sides[name] else basis.T @ change
            assert along.abs().max() < EXACT < change.abs().max()
            assert torch.equal(it.method.bases[name][:, : basis.shape[1]], basis)
        old = dict(it.method.bases)
        widths.append(old["first.weight"].shape[1])
    assert 0 < widths[0] < widths[1] < HIDDEN
    it.gradients(data(3)[0])
    it.method.edit_gradients(None)
    g = it.model.first.weight.grad
    assert (old["first.weight"].T @ g).abs().max() < EXACT < g.abs().max()


def test_frequent_directions_keep_their_bound(bench, methods):
    shrink = bench("methods.coso").shrink
    torch.manual_seed(0)
    columns = torch.randn(12, 60, dtype=torch.float64) * torch.logspace(0, -2, 12)[:, None]
    rank = 5
    u, s, _ = torch.linalg.svd(columns)
    squares = (s[:rank].square() - s[rank].square()).clamp(min=0)
    sketch = shrink(columns, rank)
    expected = u[:, :rank] @ torch.diag(squares) @ u[:, :rank].T
    assert largest([sketch @ sketch.T], [expected]) < 1e-10
    sketch = columns[:, :0]
    for part in columns.split(4, 1):
        sketch = shrink(torch.cat([sketch, part], 1), rank)
    gap = torch.linalg.eigvalsh(columns @ columns.T - sketch @ sketch.T)
    assert sketch.shape == (12, rank)
    assert gap.min() > -1e-10
    assert 1e-6 < gap.max() <= columns.square().sum() / (rank + 1)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_doc_measures_what_a_step_would_change(methods, adapted):
    it = Bench(methods.METHODS["doc"], adapted=adapted, k_start=2)
    it.task(0, data(0), steps=3)
    batch = data(1)[0]
    it.method.before_forward()
    it.optimizer.zero_grad()
    it.loss_of(batch).backward()
    it.method.after_forward()
    h = it.method.increment()
    # The outputs' derivative along the gradients, with the inputs of each layer held at their mean.
    first = it.model.up_proj if adapted else it.model.first
    last = it.model.down_proj if adapted else it.model.last
    x = batch[0].mean(0)
    hidden = torch.tanh(first(batch[0])).mean(0).detach()
    parts = []
    for module, inputs in ((first, x), (last, hidden)):
        own = {n: p for n, p in module.named_parameters() if p.requires_grad}
        _, change = torch.func.jvp(
            lambda point, m=module, i=inputs: torch.func.functional_call(m, point, i),
            ({n: p.detach() for n, p in own.items()},), ({n: p.grad for n, p in own.items()},),
        )  # fmt: skip
        parts.append(change)
    assert largest([h], [torch.cat(parts)]) < EXACT < h.abs().max()


@pytest.mark.parametrize("cosines", [[[0.5, -0.5]], [[0.5, 0.5], [-0.5, -0.5]]])
def test_doc_removes_old_components_and_no_others(methods, cosines):
    it = Bench(methods.METHODS["doc"], k_start=2, max_drift=0.0)
    it.task(0, data(0), steps=6)
    method = it.method
    method.begin_task(1)
    assert method.historical == len(method.components) == 2
    method.cosines = cosines  # of one task that agrees with h or not, or of two at odds
    seen = set()
    for step in range(12):
        method.before_forward()
        it.gradients(data(1)[step % 3])
        method.after_forward()
        g = [p.grad.clone() for p in it.parameters]
        old = method.components[: method.historical].clone()
        signs = (old @ method.increment()).sign().tolist()
        gone = [i for i, sign in enumerate(signs) if len(cosines) == 2 or sign != (1, -1)[i]]
        method.edit_gradients(None)
        widths = [HIDDEN, CLASSES]
        for layer, part in zip(("first", "last"), old.split(widths, 1), strict=True):
            weight, bias = it.named[f"{layer}.weight"], it.named[f"{layer}.bias"]
            for i in gone:
                assert (part[i] @ weight.grad).abs().max() < EXACT
                assert (part[i] @ bias.grad).abs() < EXACT
        if not gone:
            assert same([p.grad for p in it.parameters], g)
        else:
            assert largest([p.grad for p in it.parameters], g) > 1e-6
        seen.update(gone)
        it.optimizer.step()
        it.method.after_step()
    assert seen


def test_doc_keeps_what_all_tasks_pull_the_same_way(methods):
    it = Bench(methods.METHODS["doc"], k_start=2)
    it.task(0, data(0), steps=6)
    it.method.begin_task(1)
    h = it.method.components[0] - it.method.components[1]
    up, down = (it.method.components @ h).sign().tolist()
    assert (up, down) == (1, -1)
    it.method.cosines = [[0.5, 0.5]]
    assert it.method._removed(h) == [1]
    it.method.cosines = [[0.5, -0.5]]
    assert it.method._removed(h) == []
    it.method.cosines = [[0.5, -0.5], [-0.5, -0.5]]
    assert it.method._removed(h) == [0]


def test_doc_finds_principal_components(methods):
    """Fed with directions of a known covariance, its components are the leading eigenvectors."""
    it = Bench(methods.METHODS["doc"], k_start=2, amnesia=0.0, drift_eps=0.0, max_drift=0.0)
    torch.manual_seed(0)
    size = HIDDEN + CLASSES
    axes = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    for _ in range(3000):
        strength = torch.randn(2, dtype=torch.float64) * torch.tensor([2.0, 1.0])
        it.method._track(axes[:, :2] @ strength)
    found = F.normalize(it.method.components, dim=1)
    assert len(found) == 2 and it.method.counts[0] == 3000
    assert (found @ axes[:, :2]).abs().diag().min() > 0.99
    assert (found[0] @ found[1]).abs() < 0.1


# -- boundaries ------------------------------------------------------------------------------------


def test_perturb_and_merge_ends_at_the_minimum_of_the_quadratics(bench, methods):
    merge_coefficient = bench("methods.perturb_and_merge").merge_coefficient
    torch.manual_seed(0)
    inside = 0
    for _ in range(20):
        start, end, *optima = (torch.randn(9, dtype=torch.float64) for _ in range(4))
        optima.append(end)
        fishers = [torch.rand(9, dtype=torch.float64) for _ in optima]
        alpha = merge_coefficient(
            [start], [end], [sum(fishers)],
            [sum(f * o for f, o in zip(fishers, optima, strict=True))],
        )  # fmt: skip
        grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
        points = start + grid[:, None] * (end - start)
        loss = sum(
            0.5 * (f * (points - o).square()).sum(1) for f, o in zip(fishers, optima, strict=True)
        )
        assert abs(alpha - grid[loss.argmin()].item()) <= 0.5 / 20000 + EXACT
        inside += 0 < alpha < 1
    assert 0 < inside < 20  # both the formula and its bounds


def test_perturb_and_merge_of_equal_fishers_is_the_running_mean(methods):
    it = Bench(methods.METHODS["perturb_and_merge"], fisher="equal", epsilon=0.0)
    ends = []
    for number in range(3):
        it.method.begin_task(number)
        for batch in data(number):
            it.step(batch)
        ends.append(it.values())
        it.method.end_task(number, data(number))
        mean = [torch.stack(parts).mean(0) for parts in zip(*ends, strict=True)]
        assert largest(it.values(), mean) < EXACT
    assert it.method.alphas == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-10)
    assert largest(ends[0], ends[2]) > 1e-3


def test_perturb_and_merge_uses_the_exact_fisher_matrices(methods):
    it = Bench(methods.METHODS["perturb_and_merge"], epsilon=0.0)
    known = []
    for number in range(2):
        start = it.values()
        it.method.begin_task(number)
        for batch in data(number) * 3:
            it.step(batch)
        x = torch.cat([batch[0] for batch in data(number)])
        known.append((it.values(), brute_fisher(it.model, it.parameters, x)))
        it.method.end_task(number, data(number))
    # Card 4's shorter form: the old task stands at its optimum, as there was but one.
    delta = [b - a for a, b in zip(start, known[1][0], strict=True)]
    square = [
        sum((f * d.square()).sum().item() for f, d in zip(fisher, delta, strict=True))
        for _, fisher in known
    ]
    alpha = square[1] / sum(square)
    assert 0.01 < alpha < 0.99 and it.method.alphas[1] == pytest.approx(alpha, rel=1e-10)
    expected = [a + alpha * d for a, d in zip(start, delta, strict=True)]
    assert largest(it.values(), expected) < EXACT


def test_perturb_and_merge_perturbs_along_the_way(methods):
    it = Bench(methods.METHODS["perturb_and_merge"], epsilon=0.2, share=0.6, seed=3)
    it.method.before_forward()
    start = it.values()
    it.method.after_forward()
    assert same(start, it.values())  # the first task is not perturbed
    it.task(0, data(0))
    merged = it.values()
    it.method.begin_task(1)
    for batch in data(1):
        it.step(batch)
    here = it.values()
    way = [a - b for a, b in zip(here, merged, strict=True)]
    seen = []
    for _ in range(300):
        it.method.before_forward()
        there = it.values()
        factors = [
            c
            for c in (-0.2, 0.0, 0.2)
            if largest(there, [h + c * w for h, w in zip(here, way, strict=True)]) < EXACT
        ]
        seen.extend(factors)
        it.method.after_forward()
        assert same(it.values(), here)
    assert len(seen) == 300
    for factor, share in ((-0.2, 0.3), (0.0, 0.4), (0.2, 0.3)):
        assert abs(seen.count(factor) / 300 - share) < 5 * (share * (1 - share) / 300) ** 0.5


def test_neuron_fusion_keeps_the_rows_that_moved_most(methods):
    it = Bench(methods.METHODS["neuron_fusion"], keep=0.25)
    it.task(0, data(0))
    anchor = dict(zip(it.named, it.values(), strict=True))
    it.method.begin_task(1)
    for batch in data(1):
        it.step(batch)
    tuned = dict(zip(it.named, it.values(), strict=True))
    it.method.end_task(1, data(1))
    for layer, rows in (("first", HIDDEN), ("last", CLASSES)):
        moved = (tuned[f"{layer}.weight"] - anchor[f"{layer}.weight"]).norm(dim=1)
        kept = moved >= moved.sort(descending=True).values[rows // 4 - 1]
        assert kept.sum() == rows // 4
        for part in ("weight", "bias"):
            name = f"{layer}.{part}"
            assert torch.equal(it.named[name].detach()[kept], tuned[name][kept])
            assert torch.equal(it.named[name].detach()[~kept], anchor[name][~kept])
            assert not torch.equal(tuned[name][~kept], anchor[name][~kept])


def test_neuron_fusion_scales_what_it_keeps(methods):
    it = Bench(methods.METHODS["neuron_fusion"], keep=1.0, scale=1.5)
    it.task(0, data(0))
    anchor = it.values()
    it.method.begin_task(1)
    it.step(data(1)[0])
    tuned = it.values()
    it.method.end_task(1, data(1))
    expected = [a + 1.5 * (t - a) for a, t in zip(anchor, tuned, strict=True)]
    assert largest(it.values(), expected) < EXACT


# -- selection -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_loki_moves_selected_rows_alone(methods, adapted):
    it = Bench(methods.METHODS["loki"], adapted=adapted, share=0.5)
    it.task(0, data(0))
    before = dict(zip(it.named, it.values(), strict=True))
    # Where layers are called down_proj, these; else all.
    expected = {"down_proj.lora_B.default"} if adapted else {"first", "last"}
    assert it.method.layers.keys() == expected
    chosen = {}
    for name, layer in it.method.layers.items():
        chosen[layer.weight] = chosen[layer.bias] = it.method.selected(name)
    marks = dict(it.method.marks)
    it.task(1, data(1), steps=4)
    for name in expected:
        assert (it.method.marks[name] >= marks[name]).all()
        assert it.method.marks[name].sum() == 2 * marks[name].sum()
    for name, p in it.named.items():
        rows = chosen.get(name, torch.zeros(len(p), dtype=torch.bool))
        assert torch.equal(p.detach()[~rows], before[name][~rows])
        assert (p.detach()[rows] != before[name][rows]).all()
        if name in chosen:
            assert rows.sum() == len(p) // 2


def test_lokis_attributions_are_complete(methods):
    """Integrated gradients of a layer add up to what its output does to the probability."""
    it = Bench(methods.METHODS["loki"], points=400)
    batch = data(0)[0]
    answers = it.model(batch[0]).argmax(-1)
    now = it.model(batch[0]).softmax(-1).gather(1, answers[:, None])[:, 0]
    without = it.model.last(torch.zeros(len(answers), HIDDEN, dtype=torch.float64))
    then = without.softmax(-1).gather(1, answers[:, None])[:, 0]
    found = it.method.attribute("first", batch)
    assert found.shape == (len(answers), HIDDEN)
    assert largest([found.sum(1)], [(now - then).detach()]) < 1e-5 < (now - then).abs().max()


def test_loki_marks_what_is_attributed_least(methods):
    it = Bench(methods.METHODS["loki"], share=0.25, samples=None)
    it.method.end_task(0, data(0))
    counts = torch.zeros(HIDDEN, dtype=torch.int64)
    for batch in data(0):
        for row in it.method.attribute("first", batch):
            counts[row.argsort()[:2]] += 1
    assert torch.equal(it.method.marks["first"], counts) and counts.sum() == 2 * 21
    chosen = it.method.selected("first")
    assert chosen.sum() == 2 and counts[chosen].min() >= counts[~chosen].max()


def test_grads_scores_are_gradient_norms(methods):
    it = Bench(methods.METHODS["grads"])
    assert it.method.layers == ["first.weight", "last.weight"]
    x, y = data(0)[0]
    ones = [(x[k : k + 1], y[k : k + 1]) for k in range(len(x))]
    norms = []
    for one in ones:
        it.gradients(one)
        norms.append([it.model.first.weight.grad.norm(), it.model.last.weight.grad.norm()])
    table = torch.tensor(norms, dtype=torch.float64)
    expected = (table / table.mean(0)).sum(1)
    assert largest([it.method.scores(ones)], [expected]) < EXACT < expected.std()
    chosen = it.method.choose(ones, None, 3)
    assert chosen == it.method.choose(ones, expected, 3) and len(set(chosen)) == 3


def test_grads_picks_the_largest_that_are_not_rare(methods):
    it = Bench(methods.METHODS["grads"], tail=0.1)
    # 18 examples between 1 and 2, of which the largest are wanted; two far off, which are not.
    scores = torch.cat([torch.linspace(1, 2, 18), torch.tensor([9.0, 40.0])]).double()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    scores = scores[order]
    wanted = sorted(int((order == place).nonzero()) for place in (13, 14, 15, 16, 17))
    assert it.method.choose([None] * 20, scores, 5) == wanted
    # Where all are needed, none is left out; of equals the first ones are taken.
    assert it.method.choose([None] * 20, scores, 25) == list(range(20))
    assert it.method.choose([None] * 20, scores, 0) == []
    assert len(it.method.choose([None] * 20, torch.ones(20), 4)) == 4
    density = it.method.density(scores)
    assert set(density.argsort()[:2].tolist()) == {int((order == k).nonzero()) for k in (18, 19)}
    grid = torch.linspace(-60, 110, 20001, dtype=torch.float64)
    width = scores.std() * 20**-0.2
    z = (grid[:, None] - scores[None]) / width
    curve = torch.exp(-z.square() / 2).mean(1) / (width * math.sqrt(2 * math.pi))
    assert torch.trapezoid(curve, grid).item() == pytest.approx(1, abs=1e-6)
    near = (grid[:, None] - scores[None]).abs().argmin(0)
    assert torch.allclose(density, curve[near], rtol=0.02)
