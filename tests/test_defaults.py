# SPDX-License-Identifier: BSD-3-Clause
"""Nothing of the package depends on torch.set_default_device() or set_default_dtype().

- The same training, bit for bit, under both changed: every optimizer and backend, guided, clipped,
  with replay gradients, loaded, anchored from tensors and files. "meta" stands for a GPU as the
  default device: memory that nobody here can read.
- Every call that makes a tensor says where it is to lie, and of which dtype.
"""

from __future__ import annotations

import ast
import copy
import pathlib

import pytest
import torch
from safetensors.torch import save_file

import dgg
from cases import BF16, F32, F64
from dgg import backends
from dgg.backends import native

CPU = torch.device("cpu")
SHAPES = [(7, 5), (0,), (), (300,)]
KINDS = {
    "adamw": (dgg.AdamW, {"lr": 3e-3, "weight_decay": 0.1, "amsgrad": True}),
    "adam": (dgg.Adam, {"lr": 3e-3, "weight_decay": 0.1}),
    "sgd": (dgg.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
}
GUIDANCE = {
    "step": {"alpha": 0.6, "max_grad_norm": 1.0},
    "tensor": {"alpha": 0.6, "granularity": "tensor", "norm_scope": "tensor"},
    "element": {"alpha": 0.4, "granularity": "element", "strength": 0.7, "max_grad_norm": 2.0},
}


@pytest.fixture
def defaults():
    """Changes the defaults; they come back."""

    def change(device, dtype):
        native.load.cache_clear()
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(F32)
    native.load.cache_clear()


def missing(backend):
    reason = backends.unavailable(backend, CPU)
    return [] if reason is None else [pytest.mark.skip(reason=reason)]


BACKENDS = [pytest.param(b, marks=missing(b)) for b in ("reference", "cpp", "triton")]


class Training:
    """A training whose own tensors do not depend on the defaults either."""

    def __init__(self, build, dtype=F32):
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.params = [torch.nn.Parameter(self.random(shape).to(dtype)) for shape in SHAPES]
        self.optimizer, self.guide = build(self.params)
        self.step_number = 0

    def random(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=F64, device="cpu").float()

    def step(self, replay=False):
        for p in self.params:
            p.grad = self.random(p.shape).to(p.dtype)
        if replay:
            with self.guide.replay():
                for p in self.params[:-1]:
                    p.grad = self.random(p.shape).to(p.dtype)
        if self.step_number == 3:
            self.params[1].grad = None
        self.optimizer.step()
        self.step_number += 1

    def run(self, folder):
        self.step()
        self.guide.set_anchor()
        self.step()
        self.step(replay=True)
        self.step()
        saved = [copy.deepcopy(x.state_dict()) for x in {self.optimizer, self.guide}]
        for each in {self.optimizer, self.guide}:
            each.load_state_dict(saved.pop(0))
        self.step()
        names = {str(number): self.random(p.shape) for number, p in enumerate(self.params)}
        model = torch.nn.Module()
        for number, p in enumerate(self.params):
            model.register_parameter(str(number), p)
        self.guide.set_anchor(names, model=model)
        self.step()
        save_file(names, folder / "model.safetensors")
        self.guide.set_anchor(str(folder / "model.safetensors"), model=model)
        for _ in range(2):
            self.step()
        stats = self.guide.guidance_stats()
        found = [*self.params, *(x for x in stats.values() if x is not None)]
        for entry in self.optimizer.state.values():
            found += [x for x in entry.values() if x is not None]
        return [x.detach() for x in found]


def assert_the_same(build, defaults, folder, dtype=F32):
    expected = Training(build, dtype).run(folder)
    defaults("meta", F64)
    found = Training(build, dtype).run(folder)
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.device == CPU and x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_the_same_bit_for_bit(backend, kind, guidance, defaults, tmp_path):
    if backend == "triton" and (kind == "adam" or guidance == "tensor"):
        pytest.skip("the interpreter is slow, and the host side that of the others")
    cls, options = KINDS[kind]

    def build(params):
        made = cls(params, backend=backend, seed=5, **options, **GUIDANCE[guidance])
        return made, made

    assert_the_same(build, defaults, tmp_path)


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_of_other_optimizers(backend, guidance, defaults, tmp_path):
    def build(params):
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        return optimizer, dgg.Guidance(optimizer, backend=backend, seed=5, **GUIDANCE[guidance])

    assert_the_same(build, defaults, tmp_path)


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize(
    "options", [{"master_weights": True}, {"stochastic_rounding": True}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits(backend, options, defaults, tmp_path):
    def build(params):
        made = dgg.AdamW(params, backend=backend, seed=5, alpha=0.5, **options)
        return made, made

    assert_the_same(build, defaults, tmp_path, BF16)


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize("backend", [BACKENDS[-1]])
def test_captured_steps(backend, defaults, tmp_path):
    def build(params):
        made = dgg.AdamW(params, backend=backend, capturable=True, seed=5, **GUIDANCE["step"])
        return made, made

    assert_the_same(build, defaults, tmp_path)


def test_parameters_are_watched_natively_all_the_same(defaults):
    """What is found out about torch at the first step is found out under any default."""
    before = native.load() is not None
    defaults("meta", F64)
    assert (native.load() is not None) == before


# -- the source -----------------------------------------------------------------------------------

# Those that look at the default device; the dtype is the default one unless it is given.
MAKERS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "ones",
    "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
# Of integers and booleans the dtype follows from the values.
WHOLE = {"tensor", "arange", "randint", "randperm", "as_tensor", "asarray"}
ROOT = pathlib.Path(dgg.__file__).parent


def calls(tree):
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            yield node


@pytest.mark.parametrize(
    "path", [p for p in sorted(ROOT.rglob("*.py")) if p.name != "native.py"], ids=lambda p: p.stem
)
def test_every_tensor_is_made_for_a_device_and_of_a_dtype(path):
    tree = ast.parse(path.read_text())
    for call in calls(tree):
        if call.func.attr not in MAKERS:
            continue
        given = {keyword.arg for keyword in call.keywords}
        where = f"{path.name}:{call.lineno}: torch.{call.func.attr}"
        # A tensor that is given keeps its device.
        assert "device" in given or call.func.attr == "as_tensor", f"{where} needs device="
        assert "dtype" in given or call.func.attr in WHOLE, f"{where} needs dtype="
