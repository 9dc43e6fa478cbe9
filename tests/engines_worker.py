# SPDX-License-Identifier: BSD-3-Clause
"""What every rank of tests/test_engines.py runs: models, torch's engines, training, probes.

A case is a dict: which model, which engine with which options, which optimizer. `train` runs it on
the ranks, `whole` unsharded in one process; both return the same named values.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import time
import traceback

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import dgg
import ranks
import training

STEPS, BOUNDARIES = 50, (5, 30)
VOCABULARY, RANK = 11, 5  # uneven on every number of ranks
SAMPLES = 12  # equal parts for 1, 2, 3 and 4 ranks, whose mean is the whole batch's
GRANULARITIES = ("step", "tensor", "element")


# -- models: name → (build, batch, loss) ----------------------------------------------------------


class Odd(nn.Module):
    """Tied embeddings, frozen parts; sizes that leave ranks with fewer elements or with none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 7)
        self.first, self.norm, self.second = nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 7)
        self.still = nn.Linear(7, 7)
        self.gate = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        hidden = self.norm(torch.tanh(self.first(x)))
        y = self.second(hidden) + self.still(x) * self.scale
        gate = self.gate(torch.cat([y, y.mean(dim=-1, keepdim=True)], dim=-1))
        return self.head(y * torch.sigmoid(gate))


def build_odd():
    model = Odd()
    model.still.requires_grad_(False)
    model.second.bias.requires_grad_(False)
    return model


def words(k: int, dtype) -> dict:
    return {"x": torch.randint(VOCABULARY, (SAMPLES, 4), generator=training.numbers_of(k))}


def next_word(model, batch):
    logits = model(batch["x"])
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        batch["x"][:, 1:].flatten(),
    )


class Block(nn.Module):
    """A transformer block whose layers take what tensor parallelism shards."""

    def __init__(self, width=18) -> None:
        super().__init__()
        # No bias on k: its gradient is zero up to rounding, which Adam would divide by itself.
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.RMSNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.out, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (
            z.unflatten(-1, (-1, 4)).transpose(1, 2) for z in (self.q(y), self.k(y), self.v(y))
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Words(nn.Module):
    """A block between an embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCABULARY, 16), Block()
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.block(self.embed(x)))


def build_words():
    model = Words()
    # Parts of all kinds: sharded by columns and by rows, replicated, only some of a layer.
    for frozen in ("v", "norm1"):
        model.block.get_submodule(frozen).requires_grad_(False)
    model.block.down.weight.requires_grad_(False)
    return model


def with_lora(model, **options):
    from peft import LoraConfig, get_peft_model

    layers = ["q", "v", "out", "up", "down"]
    return get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=10, target_modules=layers, **options)
    )


def build_lora_block():
    return with_lora(Block())


def build_lora_words():
    """All kinds at once: pairs, biases, one norm and the shared weight are trained."""
    model = with_lora(Words(), bias="lora_only")
    (words,) = (module for module in model.modules() if isinstance(module, Words))
    words.embed.requires_grad_(True)
    words.block.norm2.requires_grad_(True)
    return model


def vectors(k: int, dtype) -> dict:
    generator = training.numbers_of(k)
    return {name: training.normal(generator, SAMPLES, 4, 16, dtype=dtype) for name in "xy"}


def regression(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def _exact_norms(model):
    """Llama's norm computes in float32: replaced, so that float64 runs are float64 throughout."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                setattr(module, name, norm)
    return model


def build_tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=14, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = _exact_norms(LlamaForCausalLM(config))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


IMAGE = 10  # the word that stands for a patch of the image


def build_llava():
    from peft import LoraConfig, get_peft_model
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=8,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=12, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=11, max_position_embeddings=16, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = _exact_norms(LlavaForConditionalGeneration(config)).eval()
    targets = r".*language_model.*\.(q_proj|v_proj|up_proj|down_proj)"
    lora = LoraConfig(r=RANK, lora_alpha=10, lora_dropout=0.0, target_modules=targets)
    return get_peft_model(model, lora)


def pictures(k: int, dtype) -> dict:
    generator = training.numbers_of(k)
    text = torch.randint(IMAGE, (SAMPLES, 5), generator=generator)
    image = torch.full((SAMPLES, 4), IMAGE)
    pixels = training.normal(generator, SAMPLES, 3, 8, 8, dtype=dtype)
    return {"x": torch.cat([text[:, :1], image, text[:, 1:]], dim=1), "pixels": pixels}


def answer(model, batch):
    logits = model(input_ids=batch["x"], pixel_values=batch["pixels"]).logits
    return F.cross_entropy(logits[:, 4:-1].flatten(0, 1), batch["x"][:, 5:].flatten())


MODELS = {
    "odd": (build_odd, words, next_word),
    "block": (Block, vectors, regression),
    # Tensor parallelism itself wants equal parts.
    "wide block": (functools.partial(Block, 20), vectors, regression),
    "words block": (build_words, words, next_word),
    "lora block": (build_lora_block, vectors, regression),
    "lora words": (build_lora_words, words, next_word),
    "tied": (build_tied, words, next_word),
    "llava": (build_llava, pictures, answer),
}


def build(name: str, dtype) -> nn.Module:
    torch.manual_seed(7)
    return MODELS[name][0]().to(dtype)


# -- engines --------------------------------------------------------------------------------------


def blocks(model) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def units(model) -> list[nn.Module]:
    """The modules that a user would shard one by one."""
    if isinstance(model, Odd):
        return [model.first, model.second, model.gate]
    for block in blocks(model):
        return [block.up, block.down]
    return [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]


def fsdp_options(case) -> dict:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    options = {}
    if "reshard" in case:
        options["reshard_after_forward"] = case["reshard"]
    if "mixed" in case:
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=getattr(torch, case["mixed"]), reduce_dtype=torch.float32
        )
    if case.get("offload"):
        # Pinned memory needs an accelerator.
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    return options


def fully_shard(model, case, mesh) -> None:
    inner = [] if case.get("at once") else units(model)
    training.fully_shard(*inner, model, mesh=mesh, **fsdp_options(case))


def tensor_parallel(model, mesh, sequence: bool) -> None:
    """The usual plan; with ``sequence`` the norms work on parts of the sequence.

    A LoRA pair beside a layer sharded by columns is sharded by columns, both of them, and gives
    the layer's part of the columns; beside one sharded by rows A is sharded by rows as well.
    Between A and B all ranks have all of the few values.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInputOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    (block,) = blocks(model)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    where, every = Shard(1) if sequence else Replicate(), Replicate()
    plan = {}
    for name in ("q", "k", "v", "up", "out", "down"):
        rows = name in ("out", "down")
        layer = (
            RowwiseParallel(output_layouts=where) if rows else ColwiseParallel(input_layouts=where)
        )
        if not hasattr(block.get_submodule(name), "lora_A"):
            plan[name] = layer
            continue
        plan[f"{name}.base_layer"] = layer
        plan[f"{name}.lora_A.default"] = (
            RowwiseParallel(output_layouts=every)
            if rows
            else ColwiseParallel(input_layouts=where, output_layouts=every)
        )
        plan[f"{name}.lora_B.default"] = ColwiseParallel(
            input_layouts=every, output_layouts=where if rows else Shard(-1)
        )
    if sequence:
        plan |= {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
    parallelize_module(block, mesh, plan)
    if sequence:
        ends = PrepareModuleInputOutput(
            input_layouts=Replicate(), desired_input_layouts=where, use_local_input=True,
            output_layouts=where, desired_output_layouts=Replicate(), use_local_output=True,
        )  # fmt: skip
        parallelize_module(block, mesh, ends)
    for outer in (module for module in model.modules() if isinstance(module, Words)):
        words_plan = {
            "embed": RowwiseParallel(input_layouts=every),
            "head": ColwiseParallel(output_layouts=every),
        }
        parallelize_module(outer, mesh, words_plan)
        # Each of them made a parameter of its own, both sharded by words: shared again.
        assert outer.head.weight.placements == outer.embed.weight.placements == (Shard(0),)
        outer.head.weight = outer.embed.weight
    # What SequenceParallel makes is trainable, whatever it was made from.
    for name, p in model.named_parameters():
        p.requires_grad_(trainable[name])


def engine(case, model, world: int) -> tuple[int, int]:
    """Applies the engine of a case; returns this rank's part of the batch and the parts' number."""
    mesh, tensor_mesh = training.meshes_of(case["engine"], world)
    if tensor_mesh is not None:
        tensor_parallel(model, tensor_mesh, case["sequence"])
    if mesh is not None:
        fully_shard(model, case, mesh)
    if tensor_mesh is None:
        return dist.get_rank(), world
    return (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())


# -- training -------------------------------------------------------------------------------------


def optimizer_of(case, params):
    cls, defaults = training.OPTIMIZERS[case.get("optimizer", "adamw")]
    guidance = {
        **training.REPLAYED, "granularity": case.get("granularity", "step"),
        "norm_scope": case.get("scope", "global"),
        "max_grad_norm": 0.2 if case.get("clip", "inside") == "inside" else None,
    }  # fmt: skip
    guidance |= {name: case[name] for name in ("alpha", "importance", "route") if name in case}
    if "storage" in case:
        guidance[case["storage"]] = True
    if "state_dtype" in case:
        guidance["state_dtype"] = getattr(torch, case["state_dtype"])
    return cls(params, **defaults, **guidance)


def part_of(batch: dict, part: int, parts: int) -> dict:
    size = SAMPLES // parts
    return {name: x[part * size : (part + 1) * size] for name, x in batch.items()}


def fit(case, model, optimizer, backward, watch=contextlib.nullcontext) -> list:
    """Trains; returns what ``watch`` gave at every step, whether it injected, and the scale."""
    clips = case.get("clip", "inside") == "outside"
    seen = []
    for k in range(STEPS):
        if k in BOUNDARIES:
            optimizer.set_anchor()
        backward(model, k)
        if k % 3 == 1:
            with optimizer.replay():
                if case.get("alpha") == "auto":  # old examples that ask for the way back
                    backward(model, k, -0.4)
                else:
                    backward(model, 5000 + k)
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        with watch() as found:
            optimizer.step()
        optimizer.zero_grad()
        stats = optimizer.guidance_stats()
        seen.append((found, bool(stats["injected"]), stats["scale"]))
    return seen


def results(model, optimizer, *, probe=True) -> dict:
    """Named parameters, state, group numbers, and the elements that draws of a probe hit."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {"params": {n: training.whole(p) for n, p in named.items()}}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    found["frozen"] = {n: training.whole(p) for n, p in frozen.items()}
    found["state"] = training.whole_state(optimizer, named)
    group = optimizer.param_groups[0]
    found["numbers"] = {key: group[key] for key in ("draw_index", "task_index")}
    found["importance_mean"] = group["importance_mean"]
    if probe:
        found["masks"] = masks(named)
    return found


def masks(named: dict) -> dict:
    """The draws of every element: it is pulled from 1 to its anchor 0 where b = 1, else stays.

    Returns:
        A number by name and element whose bit 4 · granularity + draw tells that draw.
    """
    params = list(named.values())
    shards = [getattr(p, "_local_tensor", p) for p in params]
    hits = [torch.zeros_like(p, requires_grad=False) for p in params]
    for place, granularity in enumerate(GRANULARITIES):
        probe = dgg.SGD(
            params, lr=1.0, alpha=0.5, scaling=False, granularity=granularity, seed=2**40 + 5
        )
        with torch.no_grad():
            for shard in shards:
                shard.fill_(0.0)
            probe.set_anchor()
            for draw in range(4):
                for p, shard in zip(params, shards, strict=True):
                    shard.fill_(1.0)
                    p.grad = torch.zeros_like(p)
                probe.step()
                for hit, shard in zip(hits, shards, strict=True):
                    getattr(hit, "_local_tensor", hit).add_(
                        (shard == 0.0).to(shard.dtype), alpha=2.0 ** (4 * place + draw)
                    )
    for p in params:
        p.grad = None
    return {name: training.whole(hit) for name, hit in zip(named, hits, strict=True)}


@functools.cache
def _whole(items) -> dict:
    case = dict(items)
    dtype = getattr(torch, case.get("dtype", "float64"))
    model = build(case["model"], dtype)
    _, batch, loss = MODELS[case["model"]]

    def backward(model, k, weight=1.0):
        if "mixed" not in case:
            (loss(model, batch(k, dtype)) * weight).backward()
            return
        # What FSDP does: rounded copies, each part's gradients summed in float32.
        low, parts = getattr(torch, case["mixed"]), case["parts"]
        for part in range(parts):
            rounded = {n: p.to(low) for n, p in model.named_parameters()}

            def call(x, rounded=rounded):
                return torch.func.functional_call(model, rounded, (x,))

            (loss(call, part_of(batch(k, dtype), part, parts)) * (weight / parts)).backward()

    optimizer = optimizer_of(case, model.parameters())
    scales = [scale for *_, scale in fit(case, model, optimizer, backward)]
    return {**results(model, optimizer), "scales": scales}


# What decides the unsharded run; the rest of a case says how it is sharded.
DECIDES = (
    "model dtype optimizer granularity scope clip mixed parts storage state_dtype alpha importance "
    "route"
).split()


def whole(case) -> dict:
    """The unsharded run."""
    return _whole(tuple((key, case[key]) for key in DECIDES if key in case))


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts collectives and DTensor operations of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives, self.dtensor = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.collectives += function.namespace.startswith(("c10d", "_c10d"))
        from torch.distributed.tensor import DTensor

        leaves = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        if any(isinstance(x, DTensor) for x in leaves):
            self.dtensor.append(str(function))
        return function(*args, **(kwargs or {}))


def prepare(case, world):
    """Returns the model in its engine, the optimizer, and this rank's part of the batches."""
    dtype = getattr(torch, case.get("dtype", "float64"))
    made = case.get("made", "after")
    if made.startswith("meta"):
        values = build(case["model"], dtype).state_dict()
        with torch.device("meta"):
            model = build(case["model"], dtype)
    else:
        model = build(case["model"], dtype)
    optimizer = optimizer_of(case, model.parameters()) if made == "before" else None
    part, parts = engine(case, model, world)
    if made == "meta before":
        optimizer = optimizer_of(case, model.parameters())
    if made.startswith("meta"):
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
        )

        model.to_empty(device="cpu")
        if case["engine"] != "FSDP2":
            # torch cannot distribute whole tensors over strided shards.
            source = build(case["model"], dtype)
            engine(case, source, world)
            for p, q in zip(model.parameters(), source.parameters(), strict=True):
                p._local_tensor.copy_(q._local_tensor)
        else:
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(model, values, options=options)
    if optimizer is None:
        optimizer = optimizer_of(case, model.parameters())
    elif made in ("before", "meta before"):
        # What accelerate does: the parameters are exchanged under the optimizer.
        optimizer.param_groups[0]["params"][:] = list(model.parameters())
    return model, optimizer, part, parts


def train(case, world) -> dict:
    """Runs a case on the ranks."""
    dtype = getattr(torch, case.get("dtype", "float64"))
    _, batch, loss = MODELS[case["model"]]
    model, optimizer, part, parts = prepare(case, world)
    # Draws must not come from torch's generator: every rank has another one from here on.
    torch.manual_seed(12345 + dist.get_rank())

    def backward(model, k, weight=1.0):
        (loss(model, part_of(batch(k, dtype), part, parts)) * weight).backward()

    seen = fit(case, model, optimizer, backward, Watch)
    params = [p for p in model.parameters() if p.requires_grad]
    meshes = {p.device_mesh for p in params if hasattr(p, "device_mesh")}
    placements = {
        n: str(p.placements) for n, p in model.named_parameters() if hasattr(p, "placements")
    }
    return {
        **results(model, optimizer),
        "meshes": len(meshes),
        "steps": [(w.collectives, w.dtensor, injected) for w, injected, _ in seen],
        "scales": [scale for *_, scale in seen],
        "placements": placements,
    }


# -- probes of their own --------------------------------------------------------------------------


def followed(world, **case) -> dict:
    """An unsharded twin follows, fed with the whole of the gradients that the shards are fed with.

    In bfloat16 the ranks' partial sums are rounded one by one, unlike the sums of an unsharded
    run, so two runs with gradients of their own do not agree to the last bits; their steps do.
    """
    dtype = getattr(torch, case.get("dtype", "float64"))
    _, batch, loss = MODELS[case["model"]]
    model, optimizer, part, parts = prepare(case, world)
    named = dict(model.named_parameters())
    start = {name: training.whole(p) for name, p in named.items()}
    copies = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    twin = optimizer_of(case, copies.values())
    torch.manual_seed(12345 + dist.get_rank())
    computed, injected = set(), []
    (block,) = blocks(model)
    block.up.register_forward_hook(lambda *found: computed.add(str(found[-1].dtype)))

    def backward(k):
        """Leaves gradients, and the twin its own, wherever a replay() block puts them."""
        loss(model, part_of(batch(k, dtype), part, parts)).backward()
        for name, p in named.items():
            assert copies[name].grad is None
            copies[name].grad = training.whole(p.grad)

    # Nothing adds up between two runs that take the same gradients: fewer steps show the same.
    both = optimizer, twin

    def note():
        injected.append([bool(one.guidance_stats()["injected"]) for one in both])

    for k in training.steps(range(20), *both, boundaries=(2, 10), after=note):
        backward(k)
        if k % 3 == 1:
            with optimizer.replay(), twin.replay():
                backward(5000 + k)
    found = results(model, optimizer, probe=False)
    ranks = [None] * world
    dist.all_gather_object(ranks, found)
    followed_by = {
        "params": {name: training.whole(p) for name, p in copies.items()},
        "state": training.whole_state(twin, copies),
    }
    return {
        "ranks": ranks, "twin": followed_by, "start": start,
        "computed": computed, "injected": injected,
    }  # fmt: skip


def no_gradient(world) -> dict:
    """One rank has no gradient at all on injecting and clipping steps; the others go on."""
    case = {"model": "odd", "engine": "FSDP2"}
    model, optimizer, part, parts = prepare(case, world)
    _, batch, loss = MODELS["odd"]
    params = [p for p in model.parameters() if p.requires_grad]
    checked = 0
    for k in range(12):
        if k == 2:
            optimizer.set_anchor()
        loss(model, part_of(batch(k, torch.float64), part, parts)).backward()
        absent = k % 2 == 1 and dist.get_rank() == world - 1
        grads = [p.grad._local_tensor.clone() for p in params]
        before = [p._local_tensor.clone() for p in params]
        if absent:
            for p in params:
                p.grad = None
        square = sum(0.0 if absent else g.square().sum() for g in grads) + torch.zeros(
            (), dtype=torch.float64
        )
        dist.all_reduce(square)
        optimizer.step()
        stats = optimizer.guidance_stats()
        clip = min(1.0, 0.2 / (float(square.sqrt()) + 1e-6))
        assert abs(float(stats["clip"]) - clip) < 1e-6, (k, stats["clip"], clip)
        if stats["grad_norm"] is not None:  # measured where it was drawn, on all ranks
            assert abs(float(stats["grad_norm"]) - float(square.sqrt())) < 1e-6
            checked += k % 2
        same = [torch.equal(p._local_tensor, x) for p, x in zip(params, before, strict=True)]
        filled = [x.numel() > 0 for x in before]
        assert not any(s != absent for s, f in zip(same, filled, strict=True) if f), (k, same)
        optimizer.zero_grad()
    assert checked >= 2, "too few of these steps injected"
    return {"draw_index": optimizer.param_groups[0]["draw_index"]}


def counted(world) -> dict:
    """What CommDebugMode and a wrapped all_reduce count in steps that need norms or do not."""
    from torch.distributed.tensor.debug import CommDebugMode

    found, original = {}, dist.all_reduce
    for name, clip in (("clipping", "inside"), ("not clipping", "outside")):
        case = {"model": "odd", "engine": "FSDP2", "clip": clip}
        model, optimizer, part, parts = prepare(case, world)
        _, batch, loss = MODELS["odd"]
        counts = []
        for k in range(24):
            if k == 3:
                optimizer.set_anchor()
            loss(model, part_of(batch(k, torch.float64), part, parts)).backward()
            calls = []

            def counting(*args, calls=calls, **kwargs):
                calls.append(args[0].numel() * args[0].element_size())
                return original(*args, **kwargs)

            dist.all_reduce = counting
            try:
                with CommDebugMode() as mode:
                    optimizer.step()
            finally:
                dist.all_reduce = original
            injected = bool(optimizer.guidance_stats()["injected"])
            counts.append((injected, len(calls), mode.get_total_counts(), sum(calls)))
            optimizer.zero_grad()
        found[name] = counts
    return found


def on_meta(world) -> dict:
    """An anchor needs values; materialising exchanges the parameters or keeps them."""
    case = {"model": "odd", "engine": "FSDP2"}
    with torch.device("meta"):
        model = build("odd", torch.float64)
    engine(case, model, world)
    optimizer = optimizer_of(case, model.parameters())
    try:
        optimizer.set_anchor()
    except ValueError as error:
        refusal = str(error)
    model.to_empty(device="cpu")
    mine = optimizer.param_groups[0]["params"]
    kept = [a is b for a, b in zip(mine, model.parameters(), strict=True)]
    return {"refusal": refusal, "kept": kept}


def _rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(world) -> dict:
    """200 steps over 10 tasks: resident memory, live tensors and specs at the end of each."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    case = {"model": "block", "engine": "FSDP2", "granularity": "element", "at once": True}
    model, optimizer, part, parts = prepare(case, world)
    _, batch, loss = MODELS["block"]
    found = []
    for task in range(10):
        for step in training.steps(range(20), optimizer):
            k = 20 * task + step
            loss(model, part_of(batch(k, torch.float64), part, parts)).backward()
            if step % 4 == 1:
                with optimizer.replay():
                    loss(model, part_of(batch(k + 7, torch.float64), part, parts)).backward()
        optimizer.set_anchor()
        optimizer.guidance_stats()
        gc.collect()
        live = gc.get_objects()
        tensors = sum(issubclass(type(x), torch.Tensor) for x in live)
        specs = sum(issubclass(type(x), DTensorSpec) for x in live)
        del live
        found.append((_rss(), tensors, specs))
    return {"tasks": found}


def interleaved(world) -> dict:
    """A shard of separate pieces has no place for draws per element, nor a box in the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(float(4 * world))
    placed = distribute_tensor(whole, mesh, [_StridedShard(0, split_factor=2)])
    param = nn.Parameter(placed)
    refusals = []
    param.grad = torch.ones_like(param)
    for call in (
        dgg.AdamW([param], granularity="element").step,
        lambda: dgg.AdamW([("w", param)]).set_anchor({"w": whole}),
    ):
        try:
            call()
        except ValueError as error:
            refusals.append(str(error))
    # What needs neither goes on.
    optimizer = dgg.SGD([param], lr=1.0, alpha=1.0, scaling=False)
    optimizer.set_anchor()
    optimizer.step()
    return {"refusals": refusals, "stepped": training.whole(param) == whole - 1.0}


PROBES = {
    "no_gradient": no_gradient,
    "counted": counted,
    "interleaved": interleaved,
    "on_meta": on_meta,
    "memory": memory,
    "followed": followed,
}


@ranks.in_group
def run(rank: int, world: int, folder: str, cases: dict[str, dict]) -> None:
    """Runs all cases of a world size; rank 0 leaves results, or what went wrong, by name."""
    done = {}
    for name, case in cases.items():
        begun = time.process_time()
        try:
            options = {key: value for key, value in case.items() if key != "probe"}
            probe = PROBES.get(case.get("probe"))
            found = probe(world, **options) if probe else train(case, world)
        except Exception:
            found = {"error": traceback.format_exc()}
        errors = [None] * world
        dist.all_gather_object(errors, found.get("error"))
        failed = [f"rank {r}: {e}" for r, e in enumerate(errors) if e]
        done[name] = {"error": "\n".join(failed)} if failed else found
        done[name]["seconds"] = time.process_time() - begun
    if rank == 0:
        torch.save(done, os.path.join(folder, "results.pt"))
