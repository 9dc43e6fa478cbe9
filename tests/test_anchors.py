# SPDX-License-Identifier: BSD-3-Clause
"""Anchors from files and for scripts that run a process per task: nothing is taken by mistake.

What is read is what save_pretrained, peft, the Trainer and torch.distributed.checkpoint write, and
of it only what is trained. Whatever is wrong with a file, the optimizer stays as it was.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import dgg
from dgg import anchor
from dgg.anchor import boundary

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file  # noqa: E402

import anchor_script  # noqa: E402
import anchor_worker as worker  # noqa: E402
import ranks  # noqa: E402

SCRIPT = pathlib.Path(anchor_script.__file__)


class Tied(torch.nn.Module):
    """Two layers of which one is used twice, a scalar, an empty parameter, one that is frozen."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Linear(4, 3, dtype=dtype)
        self.norm = torch.nn.LayerNorm(3, dtype=dtype)
        self.head = torch.nn.Linear(4, 3, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.scale = torch.nn.Parameter(torch.randn((), dtype=dtype))
        self.nothing = torch.nn.Parameter(torch.empty(0, 4, dtype=dtype))
        self.frozen = torch.nn.Linear(3, 3, dtype=dtype).requires_grad_(False)


def tensors_of(model):
    """What a file of the model has: tied weights once."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def anchors(opt, model):
    return {n: opt.state[p]["anchor"] for n, p in model.named_parameters() if p in opt.state}


def assert_anchored(opt, model, expected):
    found = anchors(opt, model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, value in found.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


@pytest.fixture
def reads(monkeypatch):
    """Names and sizes of what is read from safetensors files."""
    seen = []
    original = anchor.sources._Safetensors.read

    def read(self, name, param):
        values = original(self, name, param)
        seen.append((name, values.numel()))
        return values

    monkeypatch.setattr(anchor.sources._Safetensors, "read", read)
    return seen


# -- what can be read ----------------------------------------------------------------------------


def test_a_file_of_which_only_the_trained_is_read(tmp_path, reads):
    source, model = Tied(1), Tied(2)
    save_file({**tensors_of(source), "else": torch.ones(5)}, tmp_path / "model.safetensors")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        for params, options in ((model.parameters(), {"model": model}), (None, {})):
            opt = dgg.AdamW(params or list(model.named_parameters()), lr=0.1)
            opt.set_anchor(path, **options)
            assert_anchored(opt, model, tensors_of(source))
            assert sorted(n for n, _ in reads) == sorted(trained), "each once, no other"
            reads.clear()
    before = {n: a.data_ptr() for n, a in anchors(opt, model).items()}
    save_file(tensors_of(model), tmp_path / "model.safetensors")
    opt.set_anchor(tmp_path)
    assert_anchored(opt, model, tensors_of(model))
    assert before == {n: a.data_ptr() for n, a in anchors(opt, model).items()}, "one anchor ever"
    assert len(reads) == 2 * len(trained), "looked at before the former anchor is overwritten"
    assert opt.param_groups[0]["task_index"] == 2


def test_the_anchor_is_a_copy_of_the_file(tmp_path):
    model = Tied()
    save_file(tensors_of(model), tmp_path / "model.safetensors")
    opt = dgg.SGD(model.named_parameters(), lr=0.1)
    opt.set_anchor(tmp_path)
    expected = tensors_of(model)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:-64] + b"\xff" * 64)
    assert_anchored(opt, model, expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("anchor_dtype", [None, torch.bfloat16, torch.float32])
def test_dtypes(stored, anchor_dtype, tmp_path):
    source, model = Tied(1, stored), Tied(2)
    save_file(tensors_of(source), tmp_path / "model.safetensors")
    opt = dgg.AdamW(model.named_parameters(), anchor_dtype=anchor_dtype)
    opt.set_anchor(tmp_path)
    assert_anchored(opt, model, tensors_of(source))
    assert all(a.dtype == (anchor_dtype or torch.float32) for a in anchors(opt, model).values())


def test_complex_parameters(tmp_path):
    param = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    save_file({"p": torch.arange(3).to(torch.complex64)}, tmp_path / "p.safetensors")
    opt = dgg.AdamW([("p", param)])
    opt.set_anchor(tmp_path / "p.safetensors")
    assert torch.equal(opt.state[param]["anchor"], torch.arange(3).to(torch.complex64))


def test_guidance_of_another_optimizer(tmp_path):
    source, model = Tied(1), Tied(2)
    save_file(tensors_of(source), tmp_path / "model.safetensors")
    inner = torch.optim.NAdam(model.named_parameters())
    guide = dgg.Guidance(inner)
    guide.set_anchor(tmp_path, task=1)
    assert guide.param_groups[0]["task_index"] == 1
    expected = tensors_of(source)
    for number, (name, param) in enumerate(model.named_parameters()):
        found = guide.state_dict()["anchors"].get(number)
        assert (found is not None) == param.requires_grad
        assert found is None or torch.equal(found, expected[name])


def test_names_that_wrappers_change(tmp_path):
    """Of torch.compile and DDP, on either side; checkpoint wrappers and FSDP1's inside."""
    source = tensors_of(Tied(1))
    bare, compiled = Tied(2), torch.compile(Tied(2))
    wrapped = torch.nn.Module()
    wrapped.module = Tied(2)
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        save_file({prefix + n: x for n, x in source.items()}, tmp_path / "model.safetensors")
        for model in (bare, compiled, wrapped):
            inner = {compiled: compiled._orig_mod, wrapped: wrapped.module}.get(model, model)
            opt = dgg.AdamW(model.parameters())
            opt.set_anchor(tmp_path, model=model)
            assert_anchored(opt, inner, source)
            opt = dgg.AdamW(model.named_parameters())
            opt.set_anchor({prefix + n: x for n, x in source.items()})
            assert_anchored(opt, inner, source)
    inside = {"embed._checkpoint_wrapped_module.weight", "embed._fsdp_wrapped_module.weight"}
    assert all("embed.weight" in anchor.variants(name) for name in inside)


def test_two_tensors_of_one_name_are_neither():
    model = torch.nn.Linear(2, 1, bias=False)
    opt = dgg.AdamW(model.parameters())
    for weight in (torch.ones(1, 2), torch.zeros(1, 2)):
        both = {"module.weight": weight, "_orig_mod.weight": 1 - weight}
        says = "'weight', .* may have two tensors, '_orig_mod.weight' and 'module.weight'"
        with pytest.raises(ValueError, match=says):
            opt.set_anchor(both, model=model)
        assert not opt.state


@pytest.fixture(scope="module")
def library():
    """The transformers models of this file."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    text = {
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip

    def make(kind, seed):
        torch.manual_seed(seed)
        if kind == "llama":
            config = transformers.LlamaConfig(**text, tie_word_embeddings=True)
            return transformers.LlamaForCausalLM(config)
        vision = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4, projection_dim=16,
        )  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=transformers.LlamaConfig(**text), image_token_index=23
        )
        return transformers.LlavaForConditionalGeneration(config)

    return make


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("size", ["1GB", "6KB"])
def test_a_whole_model_of_transformers(kind, size, library, tmp_path, reads):
    """Tied embeddings, files of several shards, and LLaVA, whose files have other names."""
    source, model = library(kind, 1), library(kind, 2)
    source.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "6KB")
    for name, param in model.named_parameters():
        param.requires_grad_("embed_tokens" not in name or kind == "llama")
    paths = [tmp_path] + [tmp_path / "model.safetensors.index.json"] * (size == "6KB")
    for path in paths:
        reads.clear()
        opt = dgg.AdamW(model.parameters())
        opt.set_anchor(path, model=model)
        assert_anchored(opt, model, tensors_of(source))
        assert len(reads) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_adapters(kind, library, tmp_path):
    """peft's and transformers' own; a second adapter's name; a module trained as a whole."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])

    def train(model, adapter):
        torch.manual_seed(5)
        for name, param in model.named_parameters():
            param.requires_grad_(f".{adapter}." in name)
            if param.requires_grad:
                param.data.normal_()
        return model

    for adapter in ("default", "second"):
        source = train(peft.get_peft_model(library(kind, 1), config, adapter), adapter)
        folder = tmp_path / adapter
        source.save_pretrained(folder)
        folder = folder if adapter == "default" else folder / adapter
        loaded = peft.PeftModel.from_pretrained(
            library(kind, 1), folder, adapter_name="again", is_trainable=True
        )
        assert any("modules_to_save" in n for n, p in loaded.named_parameters() if p.requires_grad)
        opt = dgg.AdamW(loaded.parameters())
        opt.set_anchor(folder, model=loaded)
        now = {n.replace(".again.", f".{adapter}."): a for n, a in anchors(opt, loaded).items()}
        expected = {n: p.detach() for n, p in source.named_parameters() if p.requires_grad}
        assert now.keys() == expected.keys()
        for name, value in now.items():
            assert torch.equal(value, expected[name]), name

    # An adapter that lives in the model itself writes peft's names, too.
    inner = library(kind, 1)
    inner.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    train(inner, "default").save_pretrained(tmp_path / "inner")
    opt = dgg.AdamW(inner.parameters())
    opt.set_anchor(tmp_path / "inner", model=inner)
    assert_anchored(opt, inner, tensors_of(inner))


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_whole_model_into_peft(kind, library, tmp_path):
    """What peft trains besides factors: copies of modules, and weights that are made trainable."""
    import peft

    base = library(kind, 1)
    base.save_pretrained(tmp_path)
    expected = tensors_of(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = peft.get_peft_model(library(kind, 2), config)
    for name, param in model.named_parameters():
        whole = "modules_to_save" in name or "base_layer" in name or "up_proj" in name
        param.requires_grad_(whole)
    opt = dgg.AdamW(model.parameters())
    opt.set_anchor(tmp_path, model=model)
    found = anchors(opt, model)
    kinds = ("modules_to_save", "base_layer", "up_proj")
    assert all(any(kind in name for name in found) for kind in kinds)
    for name, value in found.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        assert torch.equal(value, expected[plain.replace(".modules_to_save.default.", ".")]), name


@pytest.mark.parametrize("nested", [False, True])
def test_a_distributed_checkpoint(nested, tmp_path):
    """Written by one process; those of several are below."""
    import torch.distributed.checkpoint as dcp

    source, model = Tied(1), Tied(2)
    saved = {"model": source.state_dict(), "step": 3} if nested else source.state_dict()
    dcp.save(saved, checkpoint_id=tmp_path / "saved")
    opt = dgg.AdamW(model.parameters(), anchor_dtype=torch.bfloat16)
    opt.set_anchor(tmp_path / "saved", model=model)
    assert_anchored(opt, model, tensors_of(source))
    # As accelerate and the Trainer put it into their folder.
    (tmp_path / "checkpoint").mkdir()
    shutil.copytree(tmp_path / "saved", tmp_path / "checkpoint" / "pytorch_model_fsdp_0")
    opt = dgg.AdamW(model.parameters())
    opt.set_anchor(tmp_path / "checkpoint", model=model)
    assert_anchored(opt, model, tensors_of(source))
    state = {"global_step": 3, "max_steps": 4}
    (tmp_path / "checkpoint" / "trainer_state.json").write_text(json.dumps(state))
    for path in (tmp_path / "checkpoint", tmp_path / "checkpoint" / "pytorch_model_fsdp_0"):
        with pytest.raises(ValueError, match=r"step 3 of 4"):
            opt.set_anchor(path, model=model)


# -- what cannot ---------------------------------------------------------------------------------


def edit_last(value):
    def edit(tensors):
        name = list(tensors)[-1]
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = value

    return edit


def replaced(value):
    def edit(tensors):
        tensors["norm.weight"] = value

    return edit


WRONG = {
    "nan": (edit_last(torch.nan), ValueError, "'scale' would not be finite"),
    "shape": (replaced(torch.ones(4)), ValueError, r"'norm.weight' has shape \(4,\).*\(3,\)"),
    "whole numbers": (replaced(torch.ones(3).int()), TypeError, r"'norm.weight' is I32.*float32"),
    "eight bits": (
        replaced(torch.ones(3).to(torch.float8_e4m3fn)), TypeError, "'norm.weight' is F8_E4M3",
    ),
    "complex": (replaced(torch.ones(3, dtype=torch.complex64)), TypeError, "is torch.complex64"),
    "too large": (
        replaced(torch.full((3,), 1e300, dtype=torch.float64)), ValueError, "overflow.*anchor_dt",
    ),
    "missing": (
        lambda tensors: tensors.pop("norm.weight"), KeyError,
        r"no tensor for 1 of 6.*'norm.weight'.*model.safetensors start with.*freeze",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("anchored", [False, True])
def test_nothing_changes_where_a_file_is_wrong(name, anchored, tmp_path):
    edit, error, says = WRONG[name]
    model = Tied()
    # The scalar last, so that all the others have been read when it is.
    order = [("scale", model.scale)]
    order = [(n, p) for n, p in model.named_parameters() if n != "scale"] + order
    tensors = {n: p.detach() + 1 for n, p in order}
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    inner = torch.optim.RMSprop(model.named_parameters())
    for opt in (dgg.AdamW(order), dgg.Guidance(inner)):
        if anchored:
            opt.set_anchor()
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises(error, match=says):
            opt.set_anchor(tmp_path, task=2 if anchored else 1)
        after = opt.state_dict()
        assert before["param_groups"] == after["param_groups"]
        entry = "state" if "state" in before else "anchors"
        assert before[entry].keys() == after[entry].keys()
        for key, value in before[entry].items():
            old, new = (x if isinstance(x, dict) else {"": x} for x in (value, after[entry][key]))
            assert old.keys() == new.keys()
            assert all(torch.equal(old[k], new[k]) for k in old)


def test_files_that_cannot_be_read(tmp_path):
    model = Tied()
    opt = dgg.AdamW(model.named_parameters())

    def refused(error, says, path=tmp_path):
        with pytest.raises(error, match=says):
            opt.set_anchor(path)
        assert not opt.state and opt.param_groups[0]["task_index"] == 0

    refused(FileNotFoundError, r"no anchor at .*nowhere.*save_pretrained", tmp_path / "nowhere")
    refused(FileNotFoundError, r"no anchor at .*no adapter_model.safetensors")
    whole = tensors_of(model)
    torch.save(whole, tmp_path / "pytorch_model.bin")
    says = r"pickled.*save_pretrained.*weights_only=True"
    refused(ValueError, says)
    refused(ValueError, r"no safetensors file.*weights_only=True", tmp_path / "pytorch_model.bin")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "zero_to_fp32.py").write_text("")
    refused(ValueError, r"DeepSpeed.*zero_to_fp32.py \. model --safe", tmp_path / "zero")
    (tmp_path / "zero" / "zero_to_fp32.py").unlink()
    (tmp_path / "zero" / "global_step7").mkdir()
    refused(ValueError, r"DeepSpeed.*zero_to_fp32.py", tmp_path / "zero")
    save_file(whole, tmp_path / "model.safetensors")
    cut = (tmp_path / "model.safetensors").read_bytes()[:-3]
    (tmp_path / "model.safetensors").write_bytes(cut)
    refused(ValueError, "no whole safetensors file.*save it again")
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        refused(ValueError, "no index of safetensors files")
    half = dict(list(whole.items())[:3])
    save_file(half, tmp_path / "first.safetensors")
    files = {n: "first.safetensors" if n in half else "second.safetensors" for n in whole}
    index.write_text(json.dumps({"weight_map": files}))
    refused(FileNotFoundError, "second.safetensors, which is not there; copy the whole")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole, "first.safetensors")}))
    refused(KeyError, "first.safetensors has no tensor .*copy the whole")


def test_without_safetensors(tmp_path, monkeypatch):
    model = Tied()
    save_file(tensors_of(model), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        dgg.AdamW(model.named_parameters()).set_anchor(tmp_path)


def test_a_trainers_checkpoint_from_the_middle(tmp_path):
    model = Tied()
    save_file(tensors_of(model), tmp_path / "model.safetensors")
    opt = dgg.AdamW(model.named_parameters())
    says = r"middle of a training \(step 5 of 9\).*finished model.*load the tensors"
    for path in (tmp_path, tmp_path / "model.safetensors"):
        state = {"global_step": 5, "max_steps": 9}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match=says):
            opt.set_anchor(path)
        for text in ("", "[]", "{}", '{"global_step": null, "max_steps": 3}'):
            (tmp_path / "trainer_state.json").write_text(text)
            with pytest.raises(ValueError, match="cannot be read.*finished model"):
                opt.set_anchor(path)
        assert not opt.state
    for done in (9, 10):
        state = {"global_step": done, "max_steps": 9}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        opt.set_anchor(tmp_path)
    opt.set_anchor(load_file(tmp_path / "model.safetensors"))  # the tensors go in any case


# -- a process per task --------------------------------------------------------------------------


def groups(task, anchored):
    return [{"task_index": task, "anchored": anchored}, {"task_index": task, "anchored": 0}]


TABLE = [
    # task, (task_index, anchored, steps), given → what happens
    (0, (0, 0, 0), False, False),  # nothing to protect
    (0, (0, 0, 5), False, False),  # resumed in the first task
    (0, (0, 2, 5), False, False),  # ... which is guided
    (0, (0, 0, 0), True, True),
    (0, (0, 2, 5), True, False),
    (0, (1, 2, 9), False, r"in task 1, beyond it.*new optimizer"),
    (1, (0, 0, 0), False, True),  # a new optimizer
    (3, (0, 0, 0), False, True),
    (3, (0, 0, 0), True, True),
    (1, (0, 0, 9), False, True),  # carried over
    (2, (1, 2, 9), False, True),
    (2, (1, 2, 9), True, True),
    (2, (2, 2, 9), False, False),  # in the middle of it
    (2, (2, 2, 9), True, False),
    (2, (2, 0, 9), False, r"in task 2 already and has no anchor.*end_of_task_1"),
    (2, (2, 0, 9), True, True),
    (2, (3, 2, 9), False, r"in task 3, beyond it.*checkpoint of task 2.*end of task 1"),
    (2, (3, 2, 9), True, r"in task 3, beyond it"),
    (2, (0, 0, 9), False, r"in task 0, so task 1 would be left out.*end of task 1"),
    (2, (0, 0, 9), True, r"would be left out"),
    (3, (1, 2, 0), False, r"would be left out"),
    (-1, (0, 0, 0), False, r"task_index=-1"),
    (True, (0, 0, 0), False, r"must be an int"),
    (1.0, (0, 0, 0), False, r"must be an int"),
]


@pytest.mark.parametrize(("task", "state", "given", "expected"), TABLE)
def test_which_task_begins(task, state, given, expected):
    present, anchored, steps = state
    if isinstance(expected, str):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=expected):
            boundary.begins_task(task, groups(present, anchored), steps, has_source=given)
    else:
        found = boundary.begins_task(task, groups(present, anchored), steps, has_source=given)
        assert found is expected


def made(kind, model):
    if kind == "guidance":
        inner = torch.optim.RMSprop(model.named_parameters(), lr=0.1)
        return dgg.Guidance(inner, alpha=1.0), inner
    opt = dgg.SGD(model.named_parameters(), lr=0.1, alpha=1.0)
    return opt, opt


def stepped(model, opt, steps=2):
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        opt.step()


def state_of(guide, model):
    if isinstance(guide, dgg.Guidance):
        return {p: entry["anchor"] for p, entry in guide.state.items()}
    return {p: guide.state[p]["anchor"] for p in model.parameters() if "anchor" in guide.state[p]}


@pytest.mark.parametrize("kind", ["optimizer", "guidance"])
def test_tasks_in_one_process(kind):
    """Every call may be made twice: the second is the one of a resumed run."""
    model = Tied()
    guide, opt = made(kind, model)
    for task in range(4):
        start = tensors_of(model)
        for again in range(2):
            guide.set_anchor(task=task)
            assert guide.param_groups[0]["task_index"] == task
            found = state_of(guide, model)
            assert bool(found) == (task > 0)
            for name, p in model.named_parameters():
                if p in found:
                    assert torch.equal(found[p], start[name]), "θ before the task"
            if not again:
                stepped(model, opt)
    with pytest.raises(ValueError, match="beyond it"):
        guide.set_anchor(task=2)
    with pytest.raises(ValueError, match="left out"):
        guide.set_anchor(task=5)


@pytest.mark.parametrize("kind", ["optimizer", "guidance"])
def test_a_resumed_anchor_is_not_replaced(kind):
    model = Tied()
    guide, opt = made(kind, model)
    stepped(model, opt)
    guide.set_anchor()
    stepped(model, opt)
    saved = copy.deepcopy(guide.state_dict())
    theta = list(state_of(guide, model).values())

    again, opt = made(kind, model)
    for _ in range(2):  # loading twice changes nothing
        again.load_state_dict(copy.deepcopy(saved))
        with pytest.raises(
            RuntimeError, match=r"resumed in task 1, after 4 steps.*set_anchor\(task=1"
        ):
            again.set_anchor()
    again.set_anchor(task=1)
    found = list(state_of(again, model).values())
    assert all(torch.equal(x, y) for x, y in zip(found, theta, strict=True))
    assert again.param_groups[0]["task_index"] == 1
    # What is named is taken; what was dropped can be set; after a step it is a boundary.
    again.set_anchor(tensors_of(model))
    again.load_state_dict(copy.deepcopy(saved))
    again.clear_anchor()
    again.set_anchor()
    again.load_state_dict(copy.deepcopy(saved))
    stepped(model, opt, 1)
    again.set_anchor()
    assert again.param_groups[0]["task_index"] == 2
    # An optimizer at work may go back to its best state and end the task there.
    again.load_state_dict(copy.deepcopy(saved))
    again.set_anchor()
    # And a new one may go on to the next task.
    last, _ = made(kind, model)
    last.load_state_dict(copy.deepcopy(saved))
    last.set_anchor(task=2)
    assert last.param_groups[0]["task_index"] == 2


@pytest.mark.parametrize("kind", ["optimizer", "guidance"])
def test_a_state_of_an_earlier_task_is_loaded_before(kind):
    """Afterwards its anchor would silently take the place of the one that was just set."""
    model = Tied()
    guide, opt = made(kind, model)
    saved = {}
    for task in (1, 2):
        guide.set_anchor(task=task)
        stepped(model, opt)
        saved[task] = copy.deepcopy(guide.state_dict())
    late, _ = made(kind, model)
    late.set_anchor(task=2)
    theta = {p: x.clone() for p, x in state_of(late, model).items()}
    with pytest.raises(
        ValueError, match=r"state of task 1 is loaded.*then call set_anchor\(task=2"
    ):
        late.load_state_dict(copy.deepcopy(saved[1]))
    assert all(torch.equal(x, theta[p]) for p, x in state_of(late, model).items())
    assert late.param_groups[0]["task_index"] == 2 and late.param_groups[0]["draw_index"] == 0
    # One of the same task is what resuming means; without a number it is a template.
    late.load_state_dict(copy.deepcopy(saved[2]))
    other, _ = made(kind, model)
    other.set_anchor()
    other.set_anchor()
    other.load_state_dict(copy.deepcopy(saved[1]))
    assert other.param_groups[0]["task_index"] == 1


def test_a_lost_anchor_is_named_or_an_error(tmp_path):
    source, model = Tied(1), Tied(2)
    opt = dgg.AdamW(model.named_parameters())
    opt.set_anchor(task=1)
    stepped(model, opt)
    opt.clear_anchor()
    with pytest.raises(RuntimeError, match=r"in task 1 already and has no anchor"):
        opt.set_anchor(task=1)
    save_file(tensors_of(source), tmp_path / "model.safetensors")
    opt.set_anchor(tmp_path, task=1)
    assert_anchored(opt, model, tensors_of(source))


def script(folder, task, *options):
    """Runs the script as a user does."""
    return subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(folder), str(task), *options],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server():
    """Makes processes that need not import torch anew: a dozen of them would take a minute."""
    return ranks.server()


def process(server, *arguments, dies=False):
    """Runs the script in a process of its own."""
    one = server.Process(target=anchor_script.main, args=([str(a) for a in arguments],))
    one.start()
    one.join(120)
    assert one.exitcode == (-9 if dies else 0), "its traceback stands above"


def results(folder, task):
    here = folder / f"task{task}"
    return load_file(here / "model.safetensors"), torch.load(here / "optimizer.pt")


def assert_same_results(left, right, task):
    (weights, state), (others, other) = results(left, task), results(right, task)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert state["param_groups"] == other["param_groups"]
    assert state["param_groups"][0]["task_index"] == task
    for number, entry in state["state"].items():
        assert ("anchor" in entry) == (task > 0)
        assert entry.keys() == other["state"][number].keys()
        assert all(torch.equal(entry[k], other["state"][number][k]) for k in entry)
    if task:
        before = list(results(left, task - 1)[0].values())
        theta = [entry["anchor"] for entry in state["state"].values()]
        assert sorted(x.sum().item() for x in before) == sorted(x.sum().item() for x in theta)


@pytest.mark.compat("one process", "resume", "anchor by name")
def test_scripts_of_a_process_per_task_are_killed_and_resumed(tmp_path, server):
    """Bit for bit as if nothing had happened; with and without the optimizer's state carried on."""
    first, whole = tmp_path / "first", tmp_path / "whole"
    first.mkdir()
    whole.mkdir()
    assert script(first, 0, "--die-at", "7").returncode == -9
    done = script(first, 0)
    assert done.returncode == 0, done.stderr
    process(server, whole, 0)
    assert_same_results(first, whole, 0)
    for carry in ([], ["--carry"]):
        straight = shutil.copytree(whole, tmp_path / f"straight{carry}")
        killed = shutil.copytree(first, tmp_path / f"killed{carry}")
        for task in (1, 2):
            process(server, straight, task, *carry)
            # The anchor of a file and that of the weights a task begins with are the same.
            named = [] if carry else ["--by-path"]
            process(server, killed, task, *carry, *named, "--die-at", 6, dies=True)
            assert (killed / f"task{task}" / "checkpoint.pt").exists()
            assert not (killed / f"task{task}" / "model.safetensors").exists()
            process(server, killed, task, *carry, *named)
            assert_same_results(killed, straight, task)
        steps = results(straight, 2)[1]["param_groups"][0]["draw_index"]
        assert steps == (30 if carry else 10)
    # The optimizer's state is not without effect, and the wrong one is told from the right one.
    weights = [results(tmp_path / f"straight{c}", 2)[0] for c in ([], ["--carry"])]
    assert any(not torch.equal(x, y) for x, y in zip(*map(dict.values, weights), strict=True))
    shutil.copy(straight / "task2" / "optimizer.pt", straight / "task0" / "optimizer.pt")
    (straight / "task1" / "checkpoint.pt").unlink()
    done = script(straight, 1, "--carry")
    assert done.returncode == 1 and "this optimizer is in task 2, beyond it" in done.stderr


# -- shards --------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("world", "engines"),
    [
        pytest.param(
            2, ("FSDP2", "TP"),
            marks=[
                pytest.mark.compat("FSDP2", "anchor by name"),
                pytest.mark.compat("TP", "anchor by name"),
            ],
        ),
        pytest.param(
            4, ("HSDP", "TP + FSDP2"),
            marks=[
                pytest.mark.compat("HSDP", "anchor by name"),
                pytest.mark.compat("TP + FSDP2", "anchor by name"),
            ],
        ),
    ],
)  # fmt: skip
def test_shards_read_their_own_part(world, engines, tmp_path, server):
    """From safetensors, one file or several, and from a distributed checkpoint."""
    source = worker.network(1)
    worker.save_sharded(source, tmp_path / "shards")
    (tmp_path / "file").mkdir()
    save_file(tensors_of(source), tmp_path / "file" / "model.safetensors")
    broken = {**tensors_of(source), "last.bias": torch.full((5,), torch.nan)}
    (tmp_path / "broken").mkdir()
    save_file(broken, tmp_path / "broken" / "model.safetensors")
    ranks.run(worker.run, world, world, str(tmp_path), engines)
    for engine in engines:
        for rank in range(world):
            found = torch.load(tmp_path / f"{engine} {rank}.pt")
            for path in ("file", "shards", "saved"):
                for name, value in found[path].items():
                    assert torch.equal(value, source.get_parameter(name)), (engine, path, name)
            assert found["file"].keys() == {n for n, _ in source.named_parameters()}
            if engine != "TP":
                whole = sum(p.numel() for p in source.parameters())
                assert found["read"] < 0.7 * whole, "of every tensor its shard alone"
