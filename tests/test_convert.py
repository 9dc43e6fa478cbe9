# SPDX-License-Identifier: BSD-3-Clause
"""The state of other libraries' Adam, taken over: dgg goes on where they stopped.

bitsandbytes and torchao are no requirement of ours: with them installed (`pip install --no-deps
bitsandbytes torchao`) their own optimizers train; without, imitations of them, marked as such, that
keep the same keys, types and numbers. DeepSpeed's optimizers are its own, with the arithmetic of
their compiled operators written out. apex is imitated.
"""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch

import dgg

SHAPES = [(64, 96), (5,), (3, 4), ()]
STEPS = 5


def weights(shapes=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in (SHAPES if shapes is None else shapes)
    ]


def gradients(params, step):
    generator = torch.Generator().manual_seed(1 + step)
    for p in params:
        # Away from 0, so that no second moment is lost in the shadow of its block's largest.
        drawn = torch.randn(p.shape, generator=generator)
        p.grad = (drawn.sign() * (0.5 + drawn.abs())).to(p.dtype)


def train(optimizer, params, steps):
    for step in steps:
        gradients(params, step)
        optimizer.step()


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def adamw(params, **options):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0, **options)


# -- imitations -------------------------------------------------------------------------------


class BitsAndBytes(torch.optim.Optimizer):
    """Imitation of bitsandbytes' AdamW and AdamW8bit (0.50): keys, types and a GPU's arithmetic.

    Their state dict hides the state from FSDP; former versions' did not. Its map of 256 values
    is not theirs, but travels in the state as theirs does.
    """

    def __init__(self, params, lr, *, bits, block=256, hidden=True, weight_decay=0.0):
        defaults = {
            "lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay,
            "alpha": 0.0, "t_alpha": None, "t_beta3": None,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.bits, self.block, self.hidden = bits, block, hidden
        ramp = torch.linspace(0, 1, 256) ** 2
        self.qmaps = {"1": torch.linspace(-1, 1, 256), "2": ramp}

    def quantise(self, x, which):
        flat = x.reshape(-1)
        blocks = -(-flat.numel() // self.block)
        padded = torch.nn.functional.pad(flat, (0, blocks * self.block - flat.numel()))
        absmax = padded.view(blocks, -1).abs().amax(1)
        scaled = (padded.view(blocks, -1) / absmax.clamp_min(1e-30)[:, None]).reshape(-1)
        codes = (scaled[: flat.numel(), None] - self.qmaps[which]).abs().argmin(1)
        return codes.to(torch.uint8).reshape(x.shape), absmax

    def values(self, state, which):
        if state[f"state{which}"].dtype != torch.uint8:
            return state[f"state{which}"]
        flat = self.qmaps[which][state[f"state{which}"].long().reshape(-1)]
        scale = state[f"absmax{which}"].repeat_interleave(self.block)[: flat.numel()]
        return (flat * scale).reshape(state[f"state{which}"].shape)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                narrow = self.bits == 8 and p.numel() >= 4096
                before = [
                    self.values(state, n) if f"state{n}" in state else torch.zeros(p.shape)
                    for n in "12"
                ]
                beta1, beta2 = group["betas"]
                m = before[0] * beta1 + (1 - beta1) * p.grad
                v = before[1] * beta2 + (1 - beta2) * p.grad * p.grad
                root = math.sqrt(1 - beta2 ** state["step"])
                rate = group["lr"] * root / (1 - beta1 ** state["step"])
                p.sub_(rate * m / (v.sqrt() + group["eps"] * root))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                for name, x in (("1", m), ("2", v)):
                    if narrow:
                        state[f"state{name}"], state[f"absmax{name}"] = self.quantise(x, name)
                        state[f"qmap{name}"] = self.qmaps[name]
                    else:
                        state[f"state{name}"] = x.clone()

    def state_dict(self):
        found = super().state_dict()
        if self.hidden:
            found["state"] = {
                number: {
                    "step": entry["step"],
                    "__bnb_optimizer_quant_state__": {
                        k: v for k, v in entry.items() if k != "step"
                    },
                }
                for number, entry in found["state"].items()
            }
        return found


class Quantised(torch.Tensor):
    """Imitation of torchao's OptimState8bit: codes and scales within, a float tensor outside."""

    @staticmethod
    def __new__(cls, codes, scale, qmap):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, device=codes.device, dtype=torch.float32
        )

    def __init__(self, codes, scale, qmap):
        self.codes, self.scale, self.qmap = codes, scale, qmap

    def __tensor_flatten__(self):
        return ["codes", "scale", "qmap"], []

    @classmethod
    def __tensor_unflatten__(cls, tensors, *_):
        return cls(tensors["codes"], tensors["scale"], tensors["qmap"])

    def __repr__(self):
        return "Quantised(...)"

    def dequantize(self, output_dtype=None):
        rows = self.qmap[self.codes.long()].view(self.scale.numel(), -1) * self.scale[:, None]
        return rows.view(self.codes.shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func}; torchao's can hardly be copied, either")


class Torchao(BitsAndBytes):
    """Imitation of torchao's AdamW8bit (0.18): a tensor as lr, tensors as steps."""

    def __init__(self, params, lr):
        super().__init__(params, lr, bits=8, hidden=False)

    def state_dict(self):
        found = super().state_dict()
        keep = ("lr", "betas", "eps", "weight_decay", "params")
        found["param_groups"] = [
            {**{k: g[k] for k in keep}, "lr": torch.tensor(g["lr"]), "amsgrad": False}
            for g in found["param_groups"]
        ]
        state = {}
        for number, entry in found["state"].items():
            names = (("exp_avg", "1"), ("exp_avg_sq", "2"))
            state[number] = {"step": torch.tensor(float(entry["step"]))}
            for name, n in names:
                x = entry[f"state{n}"]
                if x.dtype == torch.uint8:
                    x = Quantised(x, entry[f"absmax{n}"], self.qmaps[n])
                state[number][name] = x
        return {**found, "state": state}


class Apex(torch.optim.AdamW):
    """Imitation of apex' FusedAdam: the step in the group, moments in float32."""

    def state_dict(self):
        found = super().state_dict()
        found["state"] = {
            n: {k: x for k, x in entry.items() if k != "step"}
            for n, entry in found["state"].items()
        }
        for group in found["param_groups"]:
            steps = [self.state[p]["step"] for g in self.param_groups for p in g["params"]]
            keep = ("lr", "betas", "eps", "weight_decay", "params")
            kept = {k: group[k] for k in keep}
            group.clear()
            group.update(kept, bias_correction=True, step=int(max(steps)))
        return found


def adam_step(p, g, m, v, lr, beta1, beta2, eps, step, decay):
    """One step of AdamW, as the operators of apex and DeepSpeed make it."""
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p
    p.sub_(update, alpha=lr)


def deepspeed_fused(params, monkeypatch, **options):
    """DeepSpeed's FusedAdam, whose operator is compiled for a GPU alone."""
    fused_adam = pytest.importorskip("deepspeed.ops.adam.fused_adam", reason="no DeepSpeed here")

    class Operator:
        @staticmethod
        def multi_tensor_adam(chunk, skip, lists, lr, b1, b2, eps, step, mode, correct, decay):
            for g, p, m, v in zip(*lists, strict=True):
                adam_step(p, g, m, v, lr, b1, b2, eps, step, decay)

    builder = type("Builder", (), {"load": lambda self: Operator})
    monkeypatch.setattr(fused_adam, "FusedAdamBuilder", builder)
    accelerator = type("Accelerator", (), {"IntTensor": torch.IntTensor})
    monkeypatch.setattr(fused_adam, "get_accelerator", accelerator)
    return fused_adam.FusedAdam(params, lr=1e-2, **options)


def deepspeed_cpu(params, monkeypatch, **options):
    """DeepSpeed's CPUAdam, without its compiled operator."""
    cpu_adam = pytest.importorskip("deepspeed.ops.adam.cpu_adam", reason="no DeepSpeed here")

    class Operator:
        @staticmethod
        def create_adam(*_):
            pass

        destroy_adam = create_adam

        @staticmethod
        def adam_update(number, step, lr, b1, b2, eps, decay, correct, p, g, m, v):
            adam_step(p, g, m, v, lr, b1, b2, eps, step, decay)

    builder = type("Builder", (), {"load": lambda self: Operator})
    monkeypatch.setattr(cpu_adam, "CPUAdamBuilder", builder)
    return cpu_adam.DeepSpeedCPUAdam(params, lr=1e-2, weight_decay=0.0, **options)


def real(module, name, **options):
    """An optimizer of bitsandbytes or torchao, if it is installed."""
    package = module.split(".")[0]
    reason = f"{package} is not installed; an imitation of it is tested"
    if importlib.util.find_spec(package) is None:
        pytest.skip(reason)
    made = getattr(pytest.importorskip(module, reason=reason), name)
    return lambda params, _: made(params, lr=1e-2, weight_decay=0.0, **options)


FOREIGN = {
    # name: (maker, whether its moments are quantised)
    "bitsandbytes, imitated": (lambda p, _: BitsAndBytes(p, 1e-2, bits=32), False),
    "former bitsandbytes, imitated": (
        lambda p, _: BitsAndBytes(p, 1e-2, bits=32, hidden=False), False,
    ),
    "bitsandbytes 8 bit, imitated": (lambda p, _: BitsAndBytes(p, 1e-2, bits=8), True),
    "blocks of 2048, imitated": (
        lambda p, _: BitsAndBytes(p, 1e-2, bits=8, block=2048, hidden=False), True,
    ),
    "torchao 8 bit, imitated": (lambda p, _: Torchao(p, 1e-2), True),
    "apex, imitated": (lambda p, _: Apex(p, lr=1e-2, weight_decay=0.0), False),
    "DeepSpeed": (deepspeed_fused, False),
    "DeepSpeed on the CPU": (deepspeed_cpu, False),
    **{
        f"bitsandbytes {name}": (("bitsandbytes.optim", name), "8bit" in name)
        for name in ("AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "Adam8bit")
    },
    **{
        f"torchao {name}": (("torchao.optim", name), True)
        for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")
    },
}  # fmt: skip


@pytest.fixture
def foreign(request, monkeypatch):
    """A maker of the named optimizer; torchao's compiled steps run eagerly, to save the time."""
    maker, narrow = FOREIGN[request.param]
    if isinstance(maker, tuple):
        maker = real(*maker)
        if "torchao" in request.param:
            monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return (lambda params: maker(params, monkeypatch)), narrow


EVERY = pytest.mark.parametrize("foreign", FOREIGN, indirect=True)


# -- going on -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_next_step_is_the_same(foreign, decay):
    """From the same moments: quantised ones are rounded only after they were used."""
    make, _ = foreign
    params = weights()
    other = make(params)
    other.param_groups[0]["weight_decay"] = decay
    train(other, params, range(STEPS))
    mine = copies(params)
    opt = dgg.AdamW(mine, lr=0.5, weight_decay=0.3, eps=0.1)
    opt.load_state_dict(dgg.convert_state_dict(other.state_dict(), opt))
    group = opt.param_groups[0]
    assert group["lr"] == pytest.approx(1e-2) and group["weight_decay"] == decay
    assert group["eps"] == 1e-8 and tuple(group["betas"]) == (0.9, 0.999)
    train(other, params, [STEPS])
    train(opt, mine, [STEPS])
    for theirs, ours in zip(params, mine, strict=True):
        # A few roundings of float32 in numbers of about 1; what is decayed after the update, as
        # bitsandbytes does on a GPU, is off by lr · weight_decay of an update of no more than 2 lr.
        late = 2 * 1e-2**2 * decay if isinstance(other, BitsAndBytes) else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 + late)
        assert opt.state[ours]["step"] == STEPS + 1


@EVERY
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_as_if_it_had_been_torchs_adamw_all_along(foreign):
    """In 32 bits the whole way; of quantised moments each is within its quantiser's error."""
    make, narrow = foreign
    params, reference = weights(), weights()
    other, torchs = make(params), adamw(reference)
    largest = {}
    for step in range(STEPS):
        train(other, params, [step])
        train(torchs, reference, [step])
        for number, entry in torchs.state_dict()["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                top = entry[key].abs().max().item()
                largest[number, key] = max(top, largest.get((number, key), 0.0))
    mine = copies(params)
    opt = dgg.AdamW(mine, lr=0.5)
    found = dgg.convert_state_dict(other.state_dict(), opt)
    expected = torchs.state_dict()["state"]
    for number, entry in found["state"].items():
        wide = not narrow or math.prod(SHAPES[number]) < 4096
        for key in ("exp_avg", "exp_avg_sq"):
            # Half the widest gap between two of 16 codes in [-1, 1] (0.15) or 256 (0.004), times
            # the largest there was, once a step.
            share = 0.16 if "4bit" in str(type(other)) else 0.02
            bound = 1e-6 if wide else STEPS * share * largest[number, key]
            error = (entry[key] - expected[number][key]).abs().max().item()
            assert error <= bound, (number, key, error, bound)
    if narrow:
        return
    opt.load_state_dict(found)
    more = range(STEPS, 2 * STEPS)
    train(opt, mine, more)
    train(torchs, reference, more)
    for ours, theirs in zip(mine, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


def test_bitsandbytes_own_numbers():
    """What comes out of 8 bits is bit for bit what bitsandbytes itself dequantises."""
    bitsandbytes = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed; an imitation of it is tested"
    )
    params = weights([(70, 61), (4096,)])
    other = bitsandbytes.optim.AdamW8bit(params, lr=1e-2)
    train(other, params, range(3))
    saved = other.state_dict()
    found = dgg.convert_state_dict(saved, dgg.AdamW(params))
    for number in range(2):
        entry = saved["state"][number]["__bnb_optimizer_quant_state__"]
        for key, n in (("exp_avg", "1"), ("exp_avg_sq", "2")):
            expected = bitsandbytes.functional.dequantize_blockwise(
                entry[f"state{n}"], absmax=entry[f"absmax{n}"], code=entry[f"qmap{n}"],
                blocksize=256,
            )  # fmt: skip
            assert torch.equal(found["state"][number][key], expected)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("block", [256, 2048])
def test_blocks_of_any_size(size, block, monkeypatch):
    """The last block is short; pieces of a large tensor are put together."""
    monkeypatch.setattr("dgg.checkpoint.convert._PIECE", 2048)
    generator = torch.Generator().manual_seed(size)
    codes = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-size // block), generator=generator)
    qmap = torch.sort(torch.rand(256, generator=generator)).values
    entry = {"step": 1, "state1": codes, "state2": codes, "qmap1": qmap, "qmap2": qmap}
    entry |= {"absmax1": absmax, "absmax2": absmax}
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    opt = dgg.AdamW([torch.nn.Parameter(torch.zeros(size))])
    found = dgg.convert_state_dict({"state": {0: entry}, "param_groups": [group]}, opt)
    expected = [qmap[c] * absmax[i // block] for i, c in enumerate(codes.tolist())]
    assert torch.equal(found["state"][0]["exp_avg"], torch.stack(expected))


def test_guidance_begins_with_the_converted_state():
    params = weights()
    other = BitsAndBytes(params, 1e-2, bits=8)
    train(other, params, range(STEPS))
    opt = dgg.AdamW(params, alpha=1.0, strength=0.3, max_grad_norm=2.0, seed=7)
    opt.load_state_dict(dgg.convert_state_dict(other.state_dict(), opt))
    group = opt.param_groups[0]
    assert (group["alpha"], group["strength"], group["seed"]) == (1.0, 0.3, 7)  # not AdEMAMix'
    assert group["max_grad_norm"] == 2.0 and group["decoupled_weight_decay"]
    opt.set_anchor()
    train(opt, params, range(STEPS, STEPS + 2))
    assert opt.guidance_stats()["injected"].all()
    again = dgg.AdamW(copies(params))
    again.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_weights_of_16_bits(state_dtype):
    params = weights(dtype=torch.bfloat16)
    other = BitsAndBytes([p.detach().float().requires_grad_() for p in params], 1e-2, bits=8)
    train(other, other.param_groups[0]["params"], range(STEPS))
    opt = dgg.AdamW(params, state_dtype=state_dtype)
    found = dgg.convert_state_dict(other.state_dict(), opt)
    assert all(e["exp_avg"].dtype == torch.float32 for e in found["state"].values())
    opt.load_state_dict(found)
    kept = state_dtype or torch.bfloat16
    for number, p in enumerate(params):
        expected = found["state"][number]["exp_avg"].to(kept)
        assert torch.equal(opt.state[p]["exp_avg"], expected)


# -- groups and copies --------------------------------------------------------------------------


def shared(left, right):
    """Whether two nested states have memory in common."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if type(left) is not torch.Tensor or type(right) is not torch.Tensor:
            return False  # it keeps its values elsewhere
        return left.numel() > 0 and left.data_ptr() == right.data_ptr()
    if isinstance(left, dict):
        return any(shared(left[k], right[k]) for k in left.keys() & right.keys())
    if isinstance(left, (list, tuple)):
        return any(map(shared, left, right))
    return False


def assert_equal(left, right):
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert type(left) is type(right) and len(left) == len(right)
        for x, y in zip(left, right, strict=True):
            assert_equal(x, y)
    else:
        assert type(left) is type(right) and left == right


@EVERY
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_nothing_given_changes_and_twice_is_once(foreign):
    make, _ = foreign
    params = weights()
    other = make(params)
    train(other, params, range(2))
    saved = other.state_dict()

    def numbers(x):
        if isinstance(x, torch.Tensor):
            whole = x.dequantize() if type(x) is not torch.Tensor else x
            return whole.clone()
        if isinstance(x, dict):
            return {k: numbers(v) for k, v in x.items()}
        return [numbers(v) for v in x] if isinstance(x, (list, tuple)) else x

    before = numbers(saved)
    opt = dgg.AdamW(copies(params))
    mine = copy.deepcopy(opt.state_dict())
    found = dgg.convert_state_dict(saved, opt)
    assert_equal(numbers(saved), before)
    assert_equal(opt.state_dict(), mine)
    assert not shared(found["state"], saved["state"])
    again = dgg.convert_state_dict(found, opt)
    assert_equal(again, found)
    assert not shared(again, found)
    for entry in found["state"].values():
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(type(x) is torch.Tensor for x in entry.values())


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.Adam(p, amsgrad=True),
        dgg.AdamW,
        lambda p: dgg.Adam(p, amsgrad=True, weight_decay=0.1),
    ],
)
def test_a_copy_of_what_needs_no_conversion(make):
    params = weights()
    opt = make(params)
    train(opt, params, range(2))
    if hasattr(opt, "set_anchor"):
        opt.set_anchor()
        train(opt, params, [2])
    saved = opt.state_dict()
    found = dgg.convert_state_dict(saved, opt)
    assert_equal(found, saved)
    assert not shared(found, saved)
    # Before the first step as well.
    fresh = make(weights())
    assert_equal(dgg.convert_state_dict(fresh.state_dict(), fresh), fresh.state_dict())


def test_groups():
    """Each its own settings; those of schedulers and of users come along; numbers are numbers."""
    numpy = pytest.importorskip("numpy")
    params = weights()
    other = BitsAndBytes([{"params": params[:1], "lr": 0.3}, {"params": params[1:]}], 1e-2, bits=8)
    train(other, params, range(2))
    saved = other.state_dict()
    saved["state"][0]["step"] = numpy.int64(2)
    saved["param_groups"][0] |= {
        "initial_lr": numpy.float64(0.5), "name": "first", "weight_decay": numpy.float32(0.25),
        "betas": [numpy.float64(0.8), 0.99], "lr": numpy.array(0.3),
    }  # fmt: skip
    mine = copies(params)
    opt = dgg.Adam(
        [{"params": mine[:1], "alpha": 0.7}, {"params": mine[1:]}], amsgrad=False, maximize=True
    )
    found = dgg.convert_state_dict(saved, opt)
    first, second = found["param_groups"]
    assert first["lr"] == 0.3 and second["lr"] == 1e-2
    assert (first["initial_lr"], first["name"], first["weight_decay"]) == (0.5, "first", 0.25)
    assert (first["alpha"], second["alpha"], first["betas"]) == (0.7, 0.2, (0.8, 0.99))
    assert first["maximize"] and second["maximize"] and not first["decoupled_weight_decay"]
    assert (first["params"], second["params"]) == ([0], [1, 2, 3])
    plain = (int, float, bool, str, type(None), tuple, list)
    assert all(type(x) in plain for g in (first, second) for x in g.values())
    assert all(type(x) is float for x in first["betas"])
    assert not {"t_alpha", "t_beta3", "step", "bias_correction"} & first.keys()
    opt.load_state_dict(found)
    assert opt.state[mine[0]]["step"] == 2


def test_parameters_without_state():
    """Such as had no gradient, or all of them: nothing is made up."""
    params = weights()
    other = BitsAndBytes(params, 1e-2, bits=8)
    opt = dgg.AdamW(copies(params))
    found = dgg.convert_state_dict(other.state_dict(), opt)
    assert found["state"] == {} and found["param_groups"][0]["lr"] == 1e-2
    opt.load_state_dict(found)
    assert not opt.state
    train(other, params, range(2))
    saved = other.state_dict()
    del saved["state"][1]
    found = dgg.convert_state_dict(saved, opt)
    assert sorted(found["state"]) == [0, 2, 3]
    opt.load_state_dict(found)


def test_amsgrad_comes_with_its_moment():
    params = weights()
    other = adamw(params, amsgrad=True)
    train(other, params, range(2))
    saved = other.state_dict()
    for group in saved["param_groups"]:  # as torchao's groups are
        for name in set(group) - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params"}:
            del group[name]
    opt = dgg.AdamW(copies(params))
    found = dgg.convert_state_dict(saved, opt)
    assert found["param_groups"][0]["amsgrad"] is True
    assert_equal(found["state"], saved["state"])


def test_deepspeed_counts_with_the_last_parameter(monkeypatch):
    """The others' steps stay 0 although they were stepped; that of the last one is theirs, too."""
    params = weights()
    other = deepspeed_fused(params, monkeypatch)
    train(other, params, range(3))
    saved = other.state_dict()
    steps = [entry["step"] for entry in saved["state"].values()]
    assert steps == [0, 0, 0, 3], "DeepSpeed counts otherwise by now"
    found = dgg.convert_state_dict(saved, dgg.AdamW(copies(params)))
    assert all(entry["step"] == 3 for entry in found["state"].values())
    # Of two dtypes the count is one of both.
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].half()
    with pytest.raises(ValueError, match=r"group 0 has the steps \[0, 3\].*set step of all"):
        dgg.convert_state_dict(saved, dgg.AdamW(copies(params)))


def test_shards_of_torchao():
    """DTensors around quantised tensors: the placement stays, the values come out."""
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = weights([(64, 96)])
        params = [torch.nn.Parameter(distribute_tensor(plain[0].detach(), mesh, [Shard(0)]))]
        other = optim.AdamW8bit(params, lr=1e-2)
        moments = other._new_buffer(params[0], True), other._new_buffer(params[0], False)
        for x, value in zip(moments, (0.3, 0.7), strict=True):
            x.to_local().copy_(torch.full((64, 96), value))
        other.state[params[0]] = dict(
            zip(("step", "exp_avg", "exp_avg_sq"), (torch.tensor(4.0), *moments), strict=True)
        )
        opt = dgg.AdamW(params)
        found = dgg.convert_state_dict(other.state_dict(), opt)
        opt.load_state_dict(found)
        for key, value in (("exp_avg", 0.3), ("exp_avg_sq", 0.7)):
            kept = opt.state[params[0]][key]
            assert isinstance(kept, DTensor) and kept.placements == (Shard(0),)
            assert torch.equal(kept.to_local(), torch.full((64, 96), value))
    finally:
        dist.destroy_process_group()


# -- refused ------------------------------------------------------------------------------------


def bits(number=8):
    params = weights()
    other = BitsAndBytes(params, 1e-2, bits=number, hidden=False)
    train(other, params, range(2))
    return other.state_dict()


def edited(path, value):
    def edit(saved):
        here = saved
        for key in path[:-1]:
            here = here[key]
        if value is DROP:
            del here[path[-1]]
        else:
            here[path[-1]] = value

    return edit


DROP = object()
NAN = torch.full((5,), torch.nan)
ENTRY = ("state", 1)
WRONG = {
    "no state": (edited(("state",), DROP), KeyError, "not state and param_groups"),
    "a list": (edited(("state",), []), TypeError, "state is a list"),
    "no params": (
        edited(("param_groups", 0, "params"), DROP), TypeError, "group 0 .* no dict with a list of",
    ),
    "a group that is none": (
        edited(("param_groups", 0), 3), TypeError, "group 0 .* no dict with a list of params",
    ),
    "fewer": (
        edited(("param_groups", 0, "params"), [0, 1]), ValueError,
        r"hold \[2\] .*optimizer's \[4\]",
    ),
    "twice": (edited(("param_groups", 0, "params"), [0, 1, 1, 2]), ValueError, "twice"),
    "a stranger": (
        edited(("state", 9), {"step": 1}), ValueError, "state of 9 and 0 more, which its groups",
    ),
    "entry": (edited(ENTRY, 3), TypeError, "state of parameter 1 of group 0 is a int"),
    "shape": (
        edited((*ENTRY, "state2"), torch.ones(6)), ValueError,
        r"state2 of parameter 1 of group 0 has shape \(6,\), the parameter has \(5,\)",
    ),
    "nan": (edited((*ENTRY, "state1"), NAN), ValueError, "exp_avg of parameter 1 .*inf or NaN"),
    "negative": (
        edited((*ENTRY, "state2"), -torch.ones(5)), ValueError, "exp_avg_sq .*negative",
    ),
    "whole numbers": (
        edited((*ENTRY, "state1"), torch.ones(5).long()), TypeError, "exp_avg of .*torch.int64",
    ),
    "no tensor": (edited((*ENTRY, "state1"), 3.0), TypeError, "state1 of .* is a float"),
    "meta": (
        edited((*ENTRY, "state1"), torch.ones(5, device="meta")), ValueError, "meta device",
    ),
    "no step": (edited((*ENTRY, "step"), DROP), KeyError, "parameter 1 of group 0 has no step"),
    "half a step": (edited((*ENTRY, "step"), 1.5), ValueError, r"step of .* is 1.5"),
    "a step of text": (edited((*ENTRY, "step"), "1"), TypeError, "step of .* is a str"),
    "no map": (edited(("state", 0, "qmap2"), DROP), KeyError, r"state2 .*\['qmap2'\] are missing"),
    "blocks": (
        edited(("state", 0, "absmax1"), torch.ones(7)), ValueError,
        "absmax1 of parameter 0 .* 7 blocks for 6144 elements",
    ),
    "a short map": (edited(("state", 0, "qmap1"), torch.ones(16)), ValueError, "16 values"),
    "a map of nan": (
        edited(("state", 0, "absmax2"), torch.full((24,), torch.inf)), ValueError, "absmax2 .*inf",
    ),
    "another order": (
        edited(("state", 0, "state1"), torch.zeros(96, 64, dtype=torch.uint8).t()), ValueError,
        "state1 of parameter 0 .*not contiguous",
    ),
    "former 8 bits": (edited((*ENTRY, "max1"), torch.ones(1)), ValueError, "one scale per tensor"),
    "LAMB": (
        edited((*ENTRY, "unorm_vec"), torch.ones(1)), ValueError, "unorm_vec.*dgg.Guidance",
    ),
    "Lion": (edited((*ENTRY, "state2"), DROP), ValueError, r"\['state1', 'step'\].*Lion"),
    "AdEMAMix": (
        edited(("param_groups", 0, "betas"), (0.9, 0.99, 0.999)), ValueError, "not Adam's two",
    ),
    "AdEMAMix with a schedule": (edited(("param_groups", 0, "t_alpha"), 9), ValueError, "AdEMAMix"),
    "lr": (edited(("param_groups", 0, "lr"), -1.0), ValueError, "group 0 has lr=-1.0"),
    "lr of text": (edited(("param_groups", 0, "lr"), "1"), TypeError, "group 0 has lr='1'"),
    "beta": (edited(("param_groups", 0, "betas"), (1.0, 0.9)), ValueError, r"betas\[0\]=1.0"),
    "no correction": (
        edited(("param_groups", 0, "bias_correction"), False), ValueError, "bias_correction=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name):
    edit, error, says = WRONG[name]
    saved = bits()
    edit(saved)
    opt = dgg.AdamW(weights())
    with pytest.raises(error, match=says):
        dgg.convert_state_dict(saved, opt)
    assert not opt.state


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.Adamax(p), "exp_inf"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.Adafactor(p), "row_var"),
        (lambda p: torch.optim.NAdam(p), "mu_product"),
        (lambda p: torch.optim.RMSprop(p), "square_avg"),
        (lambda p: torch.optim.Adagrad(p), "sum"),
        (lambda p: dgg.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
    ],
)
def test_other_optimizers(make, key):
    params = weights()
    other = make(params)
    train(other, params, range(1))
    with pytest.raises(ValueError, match=rf"parameter 0 of group 0 has .*'{key}'.*guide it with"):
        dgg.convert_state_dict(other.state_dict(), dgg.AdamW(weights()))


@pytest.mark.parametrize("name", ["Lion", "LAMB", "AdEMAMix", "AdEMAMix8bit", "RMSprop"])
def test_other_optimizers_of_bitsandbytes(name):
    make = real("bitsandbytes.optim", name)
    params = weights()
    other = make(params, None)
    train(other, params, range(1))
    with pytest.raises(ValueError, match=r"(parameter 0 of )?group 0 has .*guide it with"):
        dgg.convert_state_dict(other.state_dict(), dgg.AdamW(weights()))


def test_names_in_another_order():
    params = weights([(3,), (3,)])
    other = adamw([("b", params[0]), ("a", params[1])])
    train(other, params, range(1))
    opt = dgg.AdamW([("a", params[1]), ("b", params[0])])
    says = "parameter 0 of group 0 is 'b' in the state dict and 'a' in the optimizer"
    with pytest.raises(ValueError, match=says):
        dgg.convert_state_dict(other.state_dict(), opt)
    saved = other.state_dict()
    del saved["param_groups"][0]["param_names"]
    saved["param_groups"][0]["params"] = ["b", "a"]  # as FSDP's full state dicts have it
    saved["state"] = {"b": saved["state"][0], "a": saved["state"][1]}
    with pytest.raises(ValueError, match=says):
        dgg.convert_state_dict(saved, opt)
    with pytest.raises(ValueError, match=r"parameter 0 \('a'\) of group 0 has shape"):
        saved = bits(32)
        saved["param_groups"][0]["params"] = [0, 1]
        saved["state"] = {n: saved["state"][n] for n in (0, 1)}
        dgg.convert_state_dict(saved, opt)


def test_what_no_group_names_and_holds_nothing_is_left_out():
    """As load_state_dict() has it: hooks put such there."""
    saved = bits()
    expected = dgg.convert_state_dict(saved, dgg.AdamW(weights()))
    saved["state"] |= {9: {}, "seen": 1}
    found = dgg.convert_state_dict(saved, dgg.AdamW(weights()))
    assert found["state"].keys() == expected["state"].keys() == set(range(len(SHAPES)))


def test_what_is_no_optimizer():
    saved = bits()
    with pytest.raises(TypeError, match="not Linear; of a wrapper pass dgg.unwrap"):
        dgg.convert_state_dict(saved, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="SGD does not have the two moments"):
        dgg.convert_state_dict(saved, dgg.SGD(weights(), lr=0.1))
    with pytest.raises(TypeError, match=r"convert_state_dict\(\) .*, not str; torch.load the"):
        dgg.convert_state_dict("optimizer.pt", dgg.AdamW(weights()))
    with pytest.raises(KeyError, match=r"it has \['base_optimizer_state'\].*ZeRO"):
        dgg.convert_state_dict({"base_optimizer_state": {}}, dgg.AdamW(weights()))
    with pytest.raises(ValueError, match="needs; build the optimizer with amsgrad=False"):
        dgg.convert_state_dict(saved, dgg.AdamW(weights(), amsgrad=True))
