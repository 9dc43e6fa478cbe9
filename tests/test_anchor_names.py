# SPDX-License-Identifier: BSD-3-Clause
"""Anchors by name: whatever wrote a file and whatever wraps the model, each gets its own tensor.

Or there is an error, and nothing has changed. Every parameter has values of its own, so that a
wrong tensor cannot pass for the right one.
"""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dgg
from dgg import anchor
from dgg.anchor.names import plain

os.environ["HF_HUB_OFFLINE"] = "1"


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def refill(model):
    for p in model.parameters():
        if p.requires_grad and p.is_floating_point():
            p.data = torch.randn_like(p)


def values(model):
    return {n: p.detach().clone() for n, p in trained(model).items()}


def assert_right(opt, model, expected):
    for name, param in trained(model).items():
        assert torch.equal(opt.state[param]["anchor"], expected[name]), name


def refused(opt, source, error, says, **options):
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=says) as caught:
        opt.set_anchor(source, **options)
    assert not opt.state and opt.state_dict() == before
    return str(caught.value)


# -- peft ---------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(8, 8)
        self.weight = torch.nn.Linear(8, 8)  # a module of that name
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.weight(self.lin(x)))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(8, 8)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TARGETS = {"target_modules": ["lin", "weight"]}
KINDS = {
    "LoRA": ("LoraConfig", {"r": 2, "target_modules": ["lin", "embed"]}),
    "LoRA with a bias": ("LoraConfig", {"r": 2, "bias": "all", **TARGETS}),
    "LoRA with biases of its own": ("LoraConfig", {"r": 2, "lora_bias": True, **TARGETS}),
    "LoRA of a parameter": (
        "LoraConfig",
        {"r": 2, "target_modules": ["head"], "target_parameters": ["lin.weight"]},
    ),
    "whole modules": ("LoraConfig", {"r": 2, "modules_to_save": ["norm", "head"], **TARGETS}),
    "tokens": ("LoraConfig", {"r": 2, "trainable_token_indices": {"embed": [1, 2]}, **TARGETS}),
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True, **TARGETS}),
    "AdaLoRA": ("AdaLoraConfig", {"r": 2, "total_step": 10, **TARGETS}),
    "IA3": ("IA3Config", {"feedforward_modules": ["lin"], **TARGETS}),
    "LoHa": ("LoHaConfig", {"r": 2, **TARGETS}),
    "LoKr": ("LoKrConfig", {"r": 2, **TARGETS}),
    "VeRA": ("VeraConfig", {"r": 2, **TARGETS}),
    "OFT": ("OFTConfig", {"oft_block_size": 4, **TARGETS}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, **TARGETS}),
    "layer norms": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 2, "vector_length": 4, "num_vectors": 6, **TARGETS}),
    "token table": ("TrainableTokensConfig", {"target_modules": ["embed"], "token_indices": [1]}),
}


@pytest.fixture(scope="module")
def peft():
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("safetensors")
    return pytest.importorskip("peft")


def made(peft, kind, adapter="default"):
    name, options = KINDS[kind]
    if not hasattr(peft, name):
        pytest.skip(f"this peft has no {name}")
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net(), getattr(peft, name)(**options), adapter_name=adapter)
    refill(model)
    return model


def saved(model, folder, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder if adapter == "default" else folder / adapter


@pytest.mark.parametrize("adapter", ["default", "0", "layers", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind, adapter, peft, tmp_path):
    """From what peft writes and from what it returns, called like a module or not."""
    model = made(peft, kind, adapter)
    expected = values(model)
    folder = saved(model, tmp_path, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    given = {name: x.clone() for name, x in given.items()}
    whole = {name: x.clone() for name, x in model.state_dict().items()}
    ranks = copy.deepcopy(getattr(model.peft_config[adapter], "rank_pattern", None))
    refill(model)
    for source in (folder, given, whole):
        for wrapped in (model, torch.compile(model)):
            opt = dgg.SGD([p for p in model.parameters() if p.requires_grad])
            opt.set_anchor(source, model=wrapped)
            assert_right(opt, model, expected)
    assert getattr(model.peft_config[adapter], "rank_pattern", None) == ranks


@pytest.mark.parametrize("kind", ["DoRA", "whole modules", "LoHa", "IA3"])
@pytest.mark.parametrize(
    "adapters", [("default", "second"), ("0", "layers"), ("layers", "lin"), ("lin", "1")]
)
def test_two_adapters(kind, adapters, peft, tmp_path):
    """Each was saved by a model that had it alone: of two, peft leaves out what is called alike."""
    first, second = adapters
    mine, folders = {}, {}
    for adapter in adapters:
        alone = made(peft, kind, adapter)
        mine[adapter], folders[adapter] = values(alone), saved(alone, tmp_path, adapter)
    model = made(peft, kind, first)
    model.add_adapter(second, model.peft_config[first])
    for adapter in adapters:
        model.set_adapter(adapter)
        opt = dgg.SGD([p for p in model.parameters() if p.requires_grad])
        opt.set_anchor(folders[adapter], model=model)
        assert_right(opt, model, mine[adapter])
        # One adapter begins where the other has ended, if that is asked for.
        other = first if adapter == second else second
        opt.set_anchor(folders[other], model=model)
        names = zip(mine[adapter], mine[other], strict=True)
        assert_right(opt, model, {n: mine[other][m] for n, m in names})
    # Both are trained: no file tells which of the two it is of.
    both = mine[first] | mine[second]
    for name, param in model.named_parameters():
        param.requires_grad_(name in both)
    opt = dgg.SGD([p for p in model.parameters() if p.requires_grad])
    refused(
        opt, folders[first], ValueError,
        r"would be the anchor of '.*', .* and of '.*', .*by their names in the model", model=model,
    )  # fmt: skip
    opt.set_anchor(model.state_dict(), model=model)
    assert_right(opt, model, values(model))


def test_adalora_with_fewer_ranks(peft, tmp_path):
    """What peft cuts when it writes is refused by its shape, not taken for something else."""
    model = made(peft, "AdaLoRA")
    config = model.peft_config["default"]
    pattern = {}
    for name, _ in model.named_parameters():
        if "lora_E" in name:
            key = name.removeprefix("base_model.").removeprefix("model.")
            pattern[key] = [True, False] * 6
    config.rank_pattern = dict(pattern)
    folder = saved(model, tmp_path, "default")
    ranks = copy.deepcopy(config.rank_pattern)
    opt = dgg.SGD([p for p in model.parameters() if p.requires_grad])
    refused(opt, folder, ValueError, "has shape .*same architecture", model=model)
    assert config.rank_pattern == ranks
    # Loaded again, the model has those ranks alone.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(Net(), folder, is_trainable=True)
    expected = values(again)
    refill(again)
    opt = dgg.SGD([p for p in again.parameters() if p.requires_grad])
    opt.set_anchor(folder, model=again)
    assert_right(opt, again, expected)


def test_adapters_without_a_peft_model(peft):
    """Injected into a model, which is wrapped in turn; peft's prefix is there or not."""
    config = peft.LoraConfig(r=2, use_dora=True, **TARGETS)
    model = peft.inject_adapter_in_model(config, Net(), adapter_name="layers")
    refill(model)
    expected = values(model)
    given = peft.get_peft_model_state_dict(model, adapter_name="layers")
    given = {name: x.clone() for name, x in given.items()}
    assert any(name.endswith("lora_magnitude_vector") for name in given)
    outer = torch.nn.Module()
    outer.net = model
    refill(model)
    for prefix in ("", "base_model.model.", "module."):
        for root in (model, outer):
            opt = dgg.SGD([p for p in model.parameters() if p.requires_grad])
            opt.set_anchor({prefix + n: x for n, x in given.items()}, model=root)
            assert_right(opt, model, expected)


def test_weights_of_the_base_model(peft):
    """Under the names it had before peft; a copy made by modules_to_save begins as they are."""
    base = Net()
    tensors = {n: torch.randn_like(p) for n, p in base.named_parameters()}
    config = peft.LoraConfig(r=2, modules_to_save=["norm"], **TARGETS)
    model = peft.get_peft_model(base, config, adapter_name="0")
    for name, param in model.named_parameters():
        whole = "base_layer" in name or "modules_to_save" in name or "head" in name
        param.requires_grad_(whole)
    expected = {}
    for name in trained(model):
        short = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        expected[name] = tensors[short.replace(".modules_to_save.0.", ".")]
    for prefix in ("", "model.", "module._orig_mod."):
        opt = dgg.SGD([p for p in model.parameters() if p.requires_grad])
        opt.set_anchor({prefix + n: x for n, x in tensors.items()}, model=model)
        assert_right(opt, model, expected)


@pytest.fixture(scope="module")
def language_model():
    transformers = pytest.importorskip("transformers")

    def make():
        torch.manual_seed(1)
        config = transformers.LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    return make


PROMPTS = {
    "prompt tuning": ("PromptTuningConfig", {}),
    "prefix tuning": ("PrefixTuningConfig", {}),
    "several tasks": ("MultitaskPromptTuningConfig", {"num_tasks": 2}),
}
COMPUTED = {
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    "p-tuning, LSTM": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
    ),
    "projected prefixes": (
        "PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 8},
    ),
}  # fmt: skip


def prompted(peft, base, name, options):
    config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    model = peft.get_peft_model(base, config)
    refill(model)
    return model


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts(kind, peft, language_model, tmp_path):
    model = prompted(peft, language_model(), *PROMPTS[kind])
    expected = values(model)
    folder = saved(model, tmp_path, "default")
    given = {n: x.clone() for n, x in peft.get_peft_model_state_dict(model).items()}
    whole = {n: x.clone() for n, x in model.state_dict().items()}
    refill(model)
    for source in (folder, given, whole):
        opt = dgg.SGD([p for p in model.parameters() if p.requires_grad])
        opt.set_anchor(source, model=model)
        assert_right(opt, model, expected)


@pytest.mark.parametrize("kind", COMPUTED)
def test_prompts_that_are_computed(kind, peft, language_model, tmp_path):
    """The file holds the outcome of the encoder, from which nobody gets back its parameters."""
    model = prompted(peft, language_model(), *COMPUTED[kind])
    folder = saved(model, tmp_path, "default")
    opt = dgg.SGD([p for p in model.parameters() if p.requires_grad])
    says = (
        r"peft writes the prompt embeddings that this encoder computes, not .*"
        r"set_anchor\(model.state_dict\(\), model=model\) or set_anchor\(\)"
    )
    for source in (folder, peft.get_peft_model_state_dict(model)):
        refused(opt, source, KeyError, says, model=model)
    expected = values(model)
    opt.set_anchor(model.state_dict(), model=model)
    assert_right(opt, model, expected)


# -- files with other names than the model ------------------------------------------------------


def test_experts_that_are_written_one_by_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    opt = dgg.AdamW(model.parameters())
    says = (
        r"no tensor for 2 of 12 .*experts.gate_up_proj.*load the weights into the model and call "
        r"set_anchor\(model.state_dict\(\), model=model\).*experts of a mixture"
    )
    refused(opt, tmp_path, KeyError, says, model=model)
    opt.set_anchor(model.state_dict(), model=model)
    # Without the experts among what is trained, the file serves.
    rest = [p for n, p in model.named_parameters() if "experts" not in n]
    opt = dgg.AdamW(rest)
    for name, param in model.named_parameters():
        param.requires_grad_("experts" not in name)
    opt.set_anchor(tmp_path, model=model)
    assert_right(opt, model, values(model))


# -- wrappers -----------------------------------------------------------------------------------


def nested(path, leaf):
    """A module with another in it, attribute by attribute."""
    for name in reversed(path):
        outer = torch.nn.Module()
        outer.add_module(name, leaf)
        leaf = outer
    return leaf


@pytest.mark.parametrize(
    ("written", "held"),
    [
        (["model"], []),  # a LightningModule's checkpoint
        (["model", "_orig_mod"], []),  # ... of a compiled model
        (["module", "model"], []),
        (["_forward_module", "model"], []),  # Fabric
        (["_orig_mod", "module", "model"], ["module"]),
        ([], ["model"]),  # into a LightningModule
        (["pretrained_model"], []),  # trl
        (["module"], ["pretrained_model"]),
        (["model", "model"], ["module"]),
        (["_fsdp_wrapped_module", "_checkpoint_wrapped_module"], ["module", "_orig_mod"]),
    ],
)
def test_words_before_names(written, held):
    net = Net()
    tensors = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    source = {".".join([*written, n]): x for n, x in tensors.items()}
    root = nested(held, net)
    for options in ({"model": root}, {}):
        params = root.parameters() if options else root.named_parameters()
        opt = dgg.SGD(params)
        opt.set_anchor(source, **options)
        assert_right(opt, net, tensors)


def test_a_value_head():
    """It writes the model inside as if there were no head, and the head beside it."""
    root = torch.nn.Module()
    root.pretrained_model, root.v_head = Net(), torch.nn.Linear(8, 1)
    tensors = {n: torch.randn_like(p) for n, p in root.named_parameters()}
    for root_or_ddp, before in ((root, ""), (nested(["module"], root), "module.")):
        source = {before + n.removeprefix("pretrained_model."): x for n, x in tensors.items()}
        opt = dgg.SGD(root.parameters())
        opt.set_anchor(source, model=root_or_ddp)
        assert_right(opt, root, tensors)


def test_ddp_within_a_model():
    """Where its class is known, its part of a name is no module's anywhere."""
    net = torch.nn.Module()
    net.tower = torch.nn.DataParallel(torch.nn.Linear(3, 3))
    net.module = torch.nn.Linear(3, 3)
    tensors = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    for source in (tensors, {n.replace("tower.module.", "tower."): x for n, x in tensors.items()}):
        opt = dgg.SGD(net.parameters())
        opt.set_anchor(source, model=net)
        assert_right(opt, net, tensors)


def test_names_that_contain_the_words():
    """Of modules that are really called so, among them those that hold reserved words."""
    net = torch.nn.Module()
    net.module, net.model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    net.module.module = torch.nn.Linear(2, 2)
    net.my_orig_mod, net.weight = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.randn(2, 2))
    tensors = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    for name, param in net.named_parameters():
        opt = dgg.SGD([param])
        opt.set_anchor(tensors, model=net)
        assert torch.equal(opt.state[param]["anchor"], tensors[name]), name
        # Without it there is none, whatever else begins or ends as its name does.
        opt = dgg.SGD([param])
        param.requires_grad_(True)
        rest = {n: x for n, x in tensors.items() if n != name}
        refused(opt, rest, KeyError, "no tensor for 1 of 1", model=net)
        # An optimizer that knows the names of all, of which one is trained.
        for p in net.parameters():
            p.requires_grad_(p is param)
        opt = dgg.SGD(net.named_parameters())
        opt.set_anchor(tensors)
        assert torch.equal(opt.state[param]["anchor"], tensors[name]), name
        net.requires_grad_(True)


def test_two_tensors_for_one_parameter():
    net = torch.nn.Linear(2, 2)
    mine, other = values(net), values(torch.nn.Linear(2, 2))
    opt = dgg.SGD(net.parameters())
    both = {**mine, **{f"model.{n}": x for n, x in other.items()}}
    says = "'weight', .*may have two tensors, 'weight' and 'model.weight', which differ"
    refused(opt, both, ValueError, says, model=net)
    # Of equal ones nobody needs to choose.
    opt.set_anchor({**mine, **{f"model.{n}": x.clone() for n, x in mine.items()}}, model=net)
    assert_right(opt, net, mine)
    # The optimizer knows less than the model: who asks is told what to pass.
    opt = dgg.SGD(net.named_parameters())
    refused(opt, both, ValueError, "pass model=, which tells whose they are")


@pytest.mark.parametrize("stored", ["mapping", "file"])
def test_tied_parameters(stored, tmp_path):
    """One parameter under two names, of which a source may have both, but not two tensors."""
    net = nested(["a"], torch.nn.Linear(2, 2, bias=False))
    net.b = net.a
    tensor = torch.randn(2, 2)
    for source in ({"a.weight": tensor}, {"b.weight": tensor}):
        opt = dgg.SGD(net.parameters())
        opt.set_anchor(source, model=net)
        assert_right(opt, net, {"a.weight": tensor})
    twice = {"a.weight": tensor, "b.weight": tensor.clone()}
    torn = {"a.weight": tensor, "b.weight": tensor + 1}
    if stored == "file":
        save_file = pytest.importorskip("safetensors.torch").save_file
        for name, source in (("twice", twice), ("torn", torn)):
            save_file(source, tmp_path / f"{name}.safetensors")
        twice, torn = tmp_path / "twice.safetensors", tmp_path / "torn.safetensors"
    opt = dgg.SGD(net.parameters())
    refused(opt, torn, ValueError, "may have two tensors.*'a.weight' and 'b.weight'", model=net)
    opt.set_anchor(twice, model=net)
    assert_right(opt, net, {"a.weight": tensor})


def test_names_of_parameters_are_nobody_elses():
    """The lists that checkpoints of optimizers are searched with."""
    net = torch.nn.Module()
    net.module, net.weight = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.randn(2))
    names = anchor.names_of_parameters(net)
    assert names[net.weight] == ["weight"]
    assert names[net.module.weight] == ["module.weight"]
    names = anchor.names_of_parameters(nested(["module", "_orig_mod"], net))
    assert names[net.weight] == ["module._orig_mod.weight", "module.weight", "weight"]
    assert "module.weight" not in names[net.module.weight]


# -- any tree, any wrapper ----------------------------------------------------------------------

PARTS = ["module", "model", "x", "pretrained_model", "base_model", "base_layer"]
WORDS = ["module", "model", "pretrained_model", "_orig_mod", "_forward_module"]
RESERVED = ["_orig_mod", "_checkpoint_wrapped_module"]


@st.composite
def trees(draw):
    """A tree of modules by the names of its parameters, in few and confusing modules."""
    few = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3, unique=True))
    folders = st.lists(st.sampled_from(few), max_size=3)
    leaves = st.sampled_from(["weight", "bias"])
    return sorted(
        draw(
            st.lists(
                st.builds(lambda path, leaf: (*path, leaf), folders, leaves),
                min_size=1, max_size=6, unique=True,
            )
        )
    )  # fmt: skip


def grown(paths):
    root = torch.nn.Module()
    for number, path in enumerate(paths):
        here = root
        for part in path[:-1]:
            if part not in here._modules:
                here.add_module(part, torch.nn.Module())
            here = here._modules[part]
        here.register_parameter(path[-1], torch.nn.Parameter(torch.full((2,), 100.0 + number)))
    return root


@given(data=st.data(), paths=trees())
@settings(
    max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_the_right_tensor_or_an_error(data, paths):
    net = grown(paths)
    names = list(dict(net.named_parameters()))
    train = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True), "trained")
    tensors = {n: torch.full((2,), float(i)) for i, n in enumerate(names)}
    for name, param in net.named_parameters():
        param.requires_grad_(name in train)
    # Who wrote the file, and whether all of it is there, or more than that.
    written = data.draw(st.lists(st.sampled_from(WORDS), max_size=2), "written")
    reserved = data.draw(st.sampled_from(["", *RESERVED]), "within")
    source, own = {}, {}
    for name in names:
        parts = name.split(".")
        here = [*parts[:-1], reserved, parts[-1]] if reserved and len(parts) > 1 else parts
        own[name] = ".".join([*written, *here])
        source[own[name]] = tensors[name]
    change = data.draw(st.sampled_from(["none", "less", "more"]), "change")
    if change == "less":
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True), "out"):
            source.pop(own[name], None)
    elif change == "more":
        before = st.lists(st.sampled_from([*PARTS, *WORDS]), max_size=2)
        for path in data.draw(st.lists(before, max_size=3), "more"):
            decoy = data.draw(st.sampled_from([*names, "weight"]), "like")
            source.setdefault(".".join([*path, decoy]), torch.full((2,), -1.0))
    held = data.draw(st.lists(st.sampled_from(WORDS), max_size=2), "held")
    root = nested(held, net)
    if data.draw(st.booleans(), "model="):
        opt, options = dgg.SGD(net.parameters()), {"model": root}
    else:
        opt, options = dgg.SGD(root.named_parameters()), {}
    prefix = "".join(f"{part}." for part in held)
    try:
        opt.set_anchor(source, **options)
    except (KeyError, ValueError):
        assert not opt.state and opt.param_groups[0]["anchored"] == 0
        mine = change == "none" and not written and not held
        assert not mine, "of the model's own state dict nothing is in doubt"
        return
    for name in train:
        found = opt.state[net.get_parameter(name)]["anchor"]
        # A source that has a parameter's very own name is taken at its word.
        mine = plain(prefix + name)
        literal = [x for n, x in source.items() if plain(n) == mine]
        assert any(torch.equal(found, x) for x in [tensors[name], *literal]), name
