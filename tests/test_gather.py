# SPDX-License-Identifier: BSD-3-Clause
"""Gradients taken up natively: as Python takes them up, or not at all."""

import ctypes
import gc
import weakref

import pytest
import torch

import dgg
from dgg import _dispatch, _gather

pytestmark = pytest.mark.skipif(
    _dispatch.unavailable("cpp", torch.device("cpu")) is not None,
    reason="the compiled library, which takes the gradients up, is not built here",
)

SHAPES = [(8,), (3, 5), (1,), (), (0, 4), (130,)]


def make_params(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def make_optimizer(params, **options):
    opt = dgg.AdamW(params, lr=0.1, alpha=1.0, max_grad_norm=1.0, backend="cpp", **options)
    opt.set_anchor()
    with torch.no_grad():
        for p in params:
            p.add_(0.5)
    opt.step()
    return opt


def is_native(opt):
    """Whether the next step's gradients are taken up natively; ends as if they had been used."""
    cache = opt._rows
    taken = cache is not None and cache.gather(opt)
    if taken:
        cache.all_rows[0]._gather.end(written=False, ahead=False)
        cache.all_rows[0]._gathered = False
    return taken


def everything(opt):
    return [x.clone() for p in opt.state for x in (p.detach(), *opt.state[p].values())]


def test_this_torch_is_known():
    # A later torch is not an error, only slower: then read the declarations and move _READ.
    assert _gather.load() is not None


def test_native_path_is_taken():
    assert is_native(make_optimizer(make_params()))


def _absent(params):
    params[1].grad = None


def _all_absent(params):
    for p in params:
        p.grad = None


def _transposed(params):
    params[1].grad = torch.arange(15.0).reshape(5, 3).t()


def _expanded(params):
    params[0].grad = torch.ones(()).expand(8)


def _negative(params):
    # The imaginary part of a conjugate is lazily negated.
    params[2].grad = torch.complex(torch.zeros(1), torch.full((1,), 3.0)).conj().imag
    assert params[2].grad.is_neg()


def _replaced(params):
    for p in params:
        p.grad = torch.full_like(p, 2.0)


def _offset(params):
    params[0].grad = torch.arange(20.0)[3:11]


CHANGES = [_absent, _all_absent, _transposed, _expanded, _negative, _replaced, _offset]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("look_ahead", [True, False])
def test_same_bits_as_in_python(monkeypatch, change, look_ahead):
    def run():
        params = make_params()
        opt = make_optimizer(params)
        found = []
        for step in range(5):
            if step == 1:
                change(params)
            if step == 3:
                _replaced(params)
            for group in opt.param_groups:
                group["alpha"] = 1.0 if look_ahead or step % 2 else 0.0
            opt.step()
            found += everything(opt)
        return found, [p._version for p in params], opt._rows._gathers

    native = run()
    monkeypatch.setattr(_gather, "load", lambda: None)
    python = run()
    assert (native[2], python[2]) == (True, False)
    assert native[1] == python[1]
    for a, b in zip(native[0], python[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", [_transposed, _expanded, _negative])
def test_unusual_gradients_are_left_to_python(change):
    params = make_params()
    opt = make_optimizer(params)
    change(params)
    assert not is_native(opt)
    _replaced(params)
    assert is_native(opt)


def test_sparse_gradient_is_named():
    params = make_params()
    opt = make_optimizer(params)
    params[0].grad = torch.ones(8).to_sparse()
    with pytest.raises(TypeError, match="parameter 0 of group 0.*sparse"):
        opt.step()


@pytest.mark.parametrize("move", ["share_memory_", "data", "order"])
def test_moved_memory_is_seen(move):
    params = make_params([(8,), (4, 4)])
    opt = make_optimizer(params)
    assert is_native(opt)
    if move == "share_memory_":
        opt.state[params[0]]["exp_avg"].share_memory_()
    elif move == "data":
        params[0].data = params[0].data.clone()
    else:
        params[1].data = params[1].data.t()
    assert not is_native(opt)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_another_parameter_of_one_equal_element_is_seen():
    # Lists of tensors are compared by identity, except for those that compare as equal.
    old = torch.nn.Parameter(torch.ones(1))
    old.grad = torch.ones(1)
    opt = make_optimizer([old])
    new = torch.nn.Parameter(old.detach().clone())
    new.grad = torch.ones(1)
    opt.param_groups[0]["params"][0] = new
    assert not is_native(opt)


@pytest.mark.parametrize("cls", [torch.nn.Parameter, torch.Tensor])
def test_subclass_is_left_to_python(cls):
    class Mine(cls):
        pass

    param = torch.ones(4).as_subclass(Mine).requires_grad_()
    param.grad = torch.ones(4)
    assert not is_native(make_optimizer([param]))


def test_gradients_are_let_go():
    params = make_params()
    opt = make_optimizer(params)
    opt.step()
    assert is_native(opt)
    seen = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(params)


def test_gradients_are_kept_until_the_end():
    params = make_params()
    opt = make_optimizer(params)
    assert opt._rows.gather(opt)
    seen = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    gc.collect()
    assert all(ref() is not None for ref in seen)
    opt._rows.all_rows[0]._gather.end(written=False, ahead=False)
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(params)


def test_change_behind_the_back_is_measured_again():
    params = make_params()
    opt = make_optimizer(params)
    opt.step()
    known = opt._rows.all_rows[0].distances.clone()
    assert [d >= 0 for d in known.tolist()] == [p.numel() > 0 for p in params]
    with torch.no_grad():
        params[1].add_(1)
    assert is_native(opt)
    expected = known.clone()
    expected[1] = -1
    assert torch.equal(opt._rows.all_rows[0].distances, expected)


def test_agreement_is_checked(monkeypatch):
    library = _gather.load()

    class Wrong:
        begin, end, possible = library.begin, library.end, library.possible

    assert _gather.agrees(Wrong)
    Wrong.begin = staticmethod(lambda *_: 0)
    assert not _gather.agrees(Wrong)

    def shifted(handle, count, addresses, *rest):
        found = library.begin(handle, count, addresses, *rest)
        ctypes.cast(addresses, ctypes.POINTER(ctypes.c_int64))[0] += 8
        return found

    Wrong.begin = staticmethod(shifted)
    assert not _gather.agrees(Wrong)
    Wrong.begin, Wrong.end = library.begin, staticmethod(lambda *_: 0)
    assert not _gather.agrees(Wrong)


@pytest.mark.parametrize("reason", ["later torch", "missing functions"])
def test_fallback(monkeypatch, reason):
    _gather.load.cache_clear()
    try:
        if reason == "later torch":
            monkeypatch.setattr(torch, "__version__", "2.99.0")
        else:
            monkeypatch.setattr(_gather, "agrees", lambda library: False)
        opt = make_optimizer(make_params())
        assert not opt._rows._gathers
        assert not is_native(opt)
    finally:
        monkeypatch.undo()
        _gather.load.cache_clear()


def test_hooks_of_a_subclass_run_once():
    class Mine(dgg.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    for cls in (dgg.AdamW, Mine):
        params = make_params()
        opt, calls = cls(params, backend="cpp"), []
        opt.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre"))
        opt.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))
        opt.step()
        assert calls == ["pre", "post"]
