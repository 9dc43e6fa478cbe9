# SPDX-License-Identifier: BSD-3-Clause
"""Gradients taken up natively: as Python takes them up, or not at all."""

import ctypes
import gc
import weakref

import pytest
import torch

import dgg
from dgg import backends
from dgg.backends import native as native_functions

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpp", torch.device("cpu")) is not None,
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


def is_native(opt, odd=()):
    """Whether the next step's gradients are taken up natively, but for the odd rows."""
    cache = opt._cache
    taken = cache is not None and cache.take_native_gradients(
        opt, opt.param_groups, [], elementwise=False
    )
    if taken:
        assert list(cache.all_rows[0]._native.odd()) == list(odd)
        cache.abandon()
    return taken


def everything(opt):
    return [x.clone() for p in opt.state for x in (p.detach(), *opt.state[p].values())]


def test_this_torch_is_known():
    # A later torch is not an error, only slower: then read the declarations and move _READ.
    assert native_functions.load() is not None


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
        return found, [p._version for p in params], opt._cache._native

    native = run()
    monkeypatch.setattr(native_functions, "load", lambda: None)
    python = run()
    assert (native[2], python[2]) == (True, False)
    assert native[1] == python[1]
    for a, b in zip(native[0], python[0], strict=True):
        assert torch.equal(a, b)


def _all_negative(params):
    params[0].grad = torch._neg_view(torch.arange(8.0))
    assert params[0].grad.is_contiguous() and params[0].grad.is_neg()


@pytest.mark.parametrize(
    "change, row", [(_transposed, 1), (_expanded, 0), (_negative, 2), (_all_negative, 0)]
)
def test_only_odd_gradients_are_left_to_python(change, row):
    params = make_params()
    opt = make_optimizer(params)
    change(params)
    assert is_native(opt, odd=[row])
    _replaced(params)
    assert is_native(opt)


@pytest.mark.parametrize("native", [True, False])
def test_lazily_negated_gradients_have_their_sign(monkeypatch, native):
    """Contiguous ones, of more than one element: a kernel would see what is behind the view."""
    if not native:
        monkeypatch.setattr(native_functions, "load", lambda: None)
    found = []
    for lazy in (True, False):
        params = make_params()
        opt = make_optimizer(params)
        for p in params:
            grad = torch._neg_view(p.grad.clone())
            p.grad = grad if lazy else grad.resolve_neg()
        with opt.replay():
            for p in params:
                grad = torch._neg_view(torch.ones_like(p))
                p.grad = grad if lazy else grad.resolve_neg()
        opt.step()
        found.append(everything(opt))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_lazily_conjugated_gradients_are_taken(backend):
    found = []
    for lazy in (True, False):
        param = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        opt = dgg.AdamW([param], lr=0.1, backend=backend)
        for _ in range(2):
            grad = torch.tensor([2 - 1j, 1 + 1j]).conj()
            param.grad = grad if lazy else grad.resolve_conj()
            opt.step()
        guidance = dgg.Guidance(torch.optim.SGD([param], lr=0.1), max_grad_norm=0.5)
        param.grad = torch.tensor([2 - 1j, 1 + 1j]).conj() if lazy else grad.resolve_conj()
        guidance.optimizer.step()
        found.append(param.detach().clone())
    assert torch.equal(*found)


def _channels_last(params):
    params[0].grad = params[0].grad.to(memory_format=torch.channels_last)


ORDERS = ["channels_last", "channels_last, contiguous gradient", "channels_last, per element"]


@pytest.mark.parametrize("kind", [*ORDERS, "double gradient", "replay", "some replays"])
def test_few_odd_rows_do_not_send_the_others_through_python(kind):
    """One parameter in another order, a gradient of another dtype, replay gradients."""
    params = make_params([(2, 3, 4, 4), *SHAPES])
    if kind in ORDERS:
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
    opt = make_optimizer(params)
    replays, odd = [], []
    if kind in ORDERS and "contiguous" not in kind:
        _channels_last(params)
    if kind in ORDERS[1:]:
        odd = [0]
    if kind == "double gradient":
        params[2].grad, params[3].grad = torch.ones(3, 5), None
        params[2].grad = params[2].grad.to(torch.float32)
        params[3].grad_dtype = None
        params[3].grad = torch.ones(1, dtype=torch.float64)
        odd = [3]
    if "replay" in kind:
        replays = [torch.ones_like(p) for p in params]
    if kind == "some replays":
        replays[1] = replays[4] = None
        params[2].grad = params[4].grad = None
    cache = opt._cache
    assert cache.take_native_gradients(
        opt, opt.param_groups, replays, elementwise="per element" in kind
    )
    rows = cache.all_rows[0]
    assert list(rows._native.odd()) == odd
    grads = [0 if p.grad is None else p.grad.data_ptr() or 1 for p in params]
    # What is staged is worked on as a copy.
    copied = odd if kind in ORDERS and "per element" in kind else []
    found = rows._grad_addresses.tolist()
    assert [found[i] == grads[i] for i in range(len(grads))] == [
        i not in copied for i in range(len(grads))
    ]
    expected = [0 if r is None else r.data_ptr() or 1 for r in replays]
    assert rows._replay_addresses.tolist() == expected
    cache.abandon()


def test_swapped_parameters_are_seen():
    params = make_params()
    opt = make_optimizer(params)
    other = torch.nn.Parameter(torch.full((8,), 3.0))
    params[0].grad = None
    torch.utils.swap_tensors(params[0], other)
    params[0].grad = torch.ones(8)
    assert not is_native(opt)
    opt.step()
    assert not torch.equal(params[0], torch.full((8,), 3.0))


@pytest.mark.parametrize("native", [True, False])
def test_nothing_of_a_parameter_is_kept_between_steps(monkeypatch, native):
    """Neither the tensor, which swap_tensors wants for itself, nor memory that was exchanged."""
    if not native:
        monkeypatch.setattr(native_functions, "load", lambda: None)
    params = make_params()
    opt = make_optimizer(params)
    opt.step()
    memory = weakref.ref(params[0].untyped_storage())
    seen = torch._C._storage_Use_Count(params[0].untyped_storage()._cdata)
    fresh = torch.nn.Parameter(torch.ones(8))
    fresh_count = torch._C._storage_Use_Count(fresh.untyped_storage()._cdata)
    assert seen == fresh_count
    del memory
    opt.zero_grad()
    for p in params:
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("entry", ["exp_avg", "anchor"])
def test_state_exchanged_through_a_kept_entry_is_seen_at_the_next_step(monkeypatch, native, entry):
    if not native:
        monkeypatch.setattr(native_functions, "load", lambda: None)
    found = []
    for kept in (True, False):
        params = make_params()
        opt = make_optimizer(params)
        held = opt.state[params[0]]
        opt.step()
        opt.step()
        (held if kept else opt.state[params[0]])[entry] = torch.full((8,), 0.25)
        opt.step()
        found.append(everything(opt))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("native", [True, False])
def test_anchor_written_through_a_kept_reference_is_seen_at_the_next_step(monkeypatch, native):
    if not native:
        monkeypatch.setattr(native_functions, "load", lambda: None)
    found = []
    for kept in (True, False):
        params = make_params()
        opt = make_optimizer(params)
        anchor = opt.state[params[0]]["anchor"]
        opt.step()
        opt.step()
        (anchor if kept else opt.state[params[0]]["anchor"]).add_(2)
        opt.step()
        found.append([opt.guidance_stats()["distance"], *everything(opt)])
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


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
    assert opt._cache.take_native_gradients(opt, opt.param_groups, [], elementwise=False)
    seen = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    gc.collect()
    assert all(ref() is not None for ref in seen)
    opt._cache.abandon()
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(params)


def test_change_behind_the_back_is_measured_again():
    params = make_params()
    opt = make_optimizer(params)
    opt.step()
    known = opt._cache.all_rows[0].distances.clone()
    assert [d >= 0 for d in known.tolist()] == [p.numel() > 0 for p in params]
    with torch.no_grad():
        params[1].add_(1)
    assert is_native(opt)
    expected = known.clone()
    expected[1] = -1
    assert torch.equal(opt._cache.all_rows[0].distances, expected)


def test_agreement_is_checked(monkeypatch):
    library = native_functions.load()

    class Wrong:
        pass

    for name, function in vars(library).items():
        setattr(Wrong, name, staticmethod(function))
    assert native_functions.agrees(Wrong)

    def shifted(fields, *rest):
        found = library.begin(fields, *rest)
        words = ctypes.POINTER(ctypes.c_int64)
        ctypes.cast(ctypes.cast(fields, words)[2], words)[0] += 8  # the first gradient's address
        return found

    wrong = {"begin": [lambda *_: 0, shifted], "end": [lambda *_: 0]}
    wrong |= {name: [lambda *_: 0, lambda *_: 1] for name in ("unmoved", "same_dicts")}
    for name, functions in wrong.items():
        for function in functions:
            setattr(Wrong, name, staticmethod(function))
            assert not native_functions.agrees(Wrong), name
        setattr(Wrong, name, staticmethod(getattr(library, name)))
    assert native_functions.agrees(Wrong)


def test_places_that_are_not_clear_are_not_used(monkeypatch):
    assert native_functions._places() is not None
    monkeypatch.setattr(native_functions, "_words", lambda address, count: [0] * count)
    assert native_functions._places() is None


@pytest.mark.parametrize("reason", ["later torch", "missing functions"])
def test_fallback(monkeypatch, reason):
    native_functions.load.cache_clear()
    try:
        if reason == "later torch":
            monkeypatch.setattr(torch, "__version__", "2.99.0")
        else:
            monkeypatch.setattr(native_functions, "agrees", lambda library: False)
        opt = make_optimizer(make_params())
        assert not opt._cache._native
        assert not is_native(opt)
    finally:
        monkeypatch.undo()
        native_functions.load.cache_clear()


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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_guidance_writes_into_lazy_gradients(backend, dtype):
    """G must arrive in what the other optimizer reads, not in a copy of it."""
    found = []
    for lazy in (True, False):
        param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        opt = torch.optim.SGD([param], lr=1.0)
        guidance = dgg.Guidance(opt, alpha=1.0, scaling=False, strength=0.5, backend=backend)
        guidance.set_anchor(
            {"p": torch.zeros(3, dtype=dtype)}, model=torch.nn.ParameterDict({"p": param})
        )
        grad = torch.tensor([1.0, -2.0, 3.0]).to(dtype)
        grad = (grad * (1 + 1j)).conj() if dtype.is_complex else torch._neg_view(grad)
        param.grad = grad if lazy else grad.resolve_conj().resolve_neg().clone()
        opt.step()
        found.append((param.grad.resolve_conj().resolve_neg(), param.detach().clone()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found[0][1], torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("layout", ["transposed", "channels last"])
def test_stochastic_rounding_has_the_words_of_its_elements(layout):
    """Whatever the order in memory: element i is the i-th of the row-major parameter."""
    found = []
    for backend in ("cpp", "reference"):
        torch.manual_seed(0)
        like = torch.randn(3, 2, 4, 5) if layout == "channels last" else torch.randn(33, 40)

        def laid(x):
            if layout == "channels last":
                return x.to(torch.bfloat16).to(memory_format=torch.channels_last)
            return x.to(torch.bfloat16).t()

        param = torch.nn.Parameter(laid(like))
        opt = dgg.SGD([param], lr=0.01, stochastic_rounding=True, backend=backend)
        for _ in range(3):
            param.grad = laid(torch.ones_like(like))
            opt.step()
        found.append(param.detach().clone())
    assert torch.equal(*found)


def test_a_parameter_that_becomes_a_lazy_view_of_its_memory_is_refused():
    param = torch.nn.Parameter(torch.ones(4))
    opt = dgg.SGD([param], lr=0.5, backend="cpp")
    for _ in range(2):
        param.grad = torch.zeros(4)
        opt.step()
    param.data = torch._neg_view(param.data)
    param.grad = torch.ones(4)
    with pytest.raises(ValueError, match="lazily negated"):
        opt.step()


@pytest.mark.parametrize("native", [True, False])
def test_a_view_of_the_same_memory_in_another_order_is_seen(monkeypatch, native):
    """From one order that is not row-major to another one: address and size stay."""
    if not native:
        monkeypatch.setattr(native_functions, "load", lambda: None)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(3, 3, 3, generator=generator)
    found = []
    for cls, options in ((torch.optim.AdamW, {}), (dgg.AdamW, {"backend": "cpp"})):
        generator.manual_seed(3)
        param = torch.nn.Parameter(start.clone().permute(2, 1, 0))
        opt = cls([param], lr=0.1, **options)
        for step in range(5):
            if step == 3:
                param.data = param.data.permute(1, 0, 2)
                assert not param.is_contiguous()
            values = torch.randn(3, 3, 3, generator=generator)
            param.grad = torch.empty_like(param).copy_(values)
            opt.step()
        found.append(param.detach().clone())
    torch.testing.assert_close(*found)
