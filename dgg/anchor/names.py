# SPDX-License-Identifier: BSD-3-Clause
"""Whose tensor is it? The names of parameters in files and state dicts, and in memory.

Wrappers (DDP, torch.compile, Lightning, ...) put words before names or into them, and peft leaves
the adapter's name out of what it writes. A source is therefore read in every way that could be
meant, each for all parameters at once; what two ways read differently is an error, never a guess.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

# What wrappers put into names, wherever it stands. No module of anyone's is called so.
_RESERVED = {
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
# What wrappers put before names, and what modules may be called all the same: DDP and engines,
# Lightning and nested checkpoints, trl's value heads, peft.
_WORDS = ("module.", "model.", "pretrained_model.", "base_model.model.")
_HEAD = "pretrained_model."


def plain(name: str) -> str:
    """Returns a name without what can only be a wrapper's."""
    return ".".join(part for part in name.split(".") if part not in _RESERVED)


def names_of_parameters(model: torch.nn.Module | None) -> dict[Tensor, list[str]]:
    """Returns all names of every parameter of ``model``, its own first, tied ones each of theirs.

    Besides the plain names: names without what wrappers add (``module.``, ``_orig_mod.``, those
    of FSDP and activation checkpointing), and those that peft gives an adapter's parameters, and
    trained copies of modules, in the files it writes. None is another parameter's own.
    """
    known = Known(model)
    owner: dict[str, int] = {}
    for number, own in enumerate(known.own):
        for name in own:
            owner.setdefault(name, number)
            owner.setdefault(plain(name), number)
    shared = min((_wrapped(names[0]) for names in known.forms["model"]), key=len, default="")
    found = {}
    for number, (param, own) in enumerate(zip(known.params, known.own, strict=True)):
        names = list(own)
        for forms in known.forms.values():
            for form in forms[number]:
                bare = form.removeprefix(shared)
                names += (form, bare)
                if len(known.forms) > 1:
                    names.append(f"base_model.model.{bare}")
        mine = [name for name in dict.fromkeys(names) if owner.get(name, number) == number]
        found[param] = mine
    return found


def variants(name: str) -> list[str]:
    """Returns the names a parameter may have in a checkpoint, its own first."""
    found = [name, plain(name)]
    found.append(found[-1].removeprefix(_wrapped(found[-1])))
    return list(dict.fromkeys(found))


def _wrapped(name: str) -> str:
    return "".join(heads([name], ("module.",))[-1])


def heads(names: Iterable[str], words: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns every run of words that some of the names begin with, the empty one first."""
    heads: dict[str, tuple[str, ...]] = {"": ()}
    for name in names:
        runs: list[tuple[str, ...]] = [()]
        for run in runs:  # grows
            start = "".join(run)
            runs += [(*run, word) for word in words if name.startswith(start + word)]
            heads.setdefault(start, run)
    return sorted(heads.values(), key=len)


class Known:
    """The parameters of a model, and what each is called by those who write files.

    Attributes:
        params: The parameters, each once.
        own: For each the names it has in the model.
        forms: Who writes (the model, peft for an adapter, a value head, the base model without
            peft) → for each parameter the names it has there, without reserved parts.
        computed: Number of a parameter that peft does not write → what it writes instead.
    """

    def __init__(self, model: torch.nn.Module | None) -> None:
        numbers: dict[Tensor, int] = {}
        self.own: list[list[str]] = []
        self.computed: dict[int, str] = {}
        self._number: dict[str, int] = {}
        every = () if model is None else model.named_parameters(remove_duplicate=False)
        for name, param in every:
            number = numbers.setdefault(param, len(numbers))
            if number == len(self.own):
                self.own.append([])
            self.own[number].append(name)
            self._number[name] = self._number[plain(name)] = number
        self.params = list(numbers)
        self.forms: dict[str, list[tuple[str, ...]]] = {}
        self.words: tuple[str, ...] = _WORDS
        inner = {} if model is None else _engines(model)
        self._add("model", lambda name: (plain(name), plain(_without(name, inner))))
        if model is not None:
            _add_peft(self, model)
        if any(_HEAD in name for name in self._number):
            self._add("value head", lambda name: (_without_head(plain(name)),))

    def _add(self, kind: str, names: Callable[[str], Iterable[str | None]]) -> None:
        self.forms[kind] = [
            tuple(dict.fromkeys(form for name in own for form in names(name) if form))
            for own in self.own
        ]

    def number(self, name: str) -> int:
        """Returns the number of the parameter of that name, a new one if there is none."""
        found = self._number.get(name)
        found = self._number.get(plain(name)) if found is None else found
        if found is None:
            found = self._number[name] = len(self.own)
            self.own.append([name])
            for forms in self.forms.values():
                forms.append((plain(name),))
        return found


def _without(name: str, paths: Mapping[str, str]) -> str:
    """Returns a name without the parts that lead into the modules inside of engines."""
    parts = name.split(".")
    kept = [
        part for i, part in enumerate(parts) if paths.get(".".join(parts[:i])) != part
    ]  # fmt: skip
    return ".".join(kept)


def _engines(model: torch.nn.Module) -> dict[str, str]:
    """Returns the attribute in which DDP and DataParallel, at a path, keep what they wrap."""
    classes = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    return {path: "module" for path, m in model.named_modules() if isinstance(m, classes)}


def _without_head(name: str) -> str | None:
    """Returns the name in what a value head writes, which leaves its own part out."""
    before = _wrapped(name)
    return before + name[len(before) :].removeprefix(_HEAD)


# -- peft ---------------------------------------------------------------------------------------


def _add_peft(known: Known, model: torch.nn.Module) -> None:
    """Adds what peft calls the parameters: per adapter in its files, and without it."""
    if "peft" not in sys.modules:
        return
    roots = list(_peft_models(model))
    if not roots:
        return
    known.words += tuple(f"{plain(path)}." for path, _ in roots if plain(path))
    adapters = dict.fromkeys(a for _, root in roots for a in root.peft_config)
    for adapter in adapters:
        saved: dict[str, str] = {}
        for path, root in roots:
            if adapter in root.peft_config:
                names, computed = _saved_by_peft(root, adapter)
                before = f"{path}." if path else ""
                saved.update((before + name, before + key) for name, key in names.items())
                known.computed.update((known.number(before + n), t) for n, t in computed.items())
        known._add(
            f"adapter {adapter!r}", lambda name, saved=saved: (plain(saved.get(name, name)),)
        )
    for path, root in roots:
        bare = _BaseNames(path, root)
        known._add(f"base of {path!r}", lambda name, bare=bare: (bare(name),))


def _peft_models(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields the outermost modules with adapters, and where they are."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in inside):
            continue
        # Not what wrappers pass on from the module inside.
        here = "peft_config" in vars(module) or hasattr(type(module), "peft_config")
        if here and isinstance(module.peft_config, Mapping) and module.peft_config:
            inside.append(f"{path}." if path else "")
            yield path, module


def _saved_by_peft(root: torch.nn.Module, adapter: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns what peft itself calls an adapter's parameters when it writes them.

    Each kind of adapter has rules of its own, so peft is asked, with something in the place of
    every parameter that tells which one it is.

    Returns:
        Name in memory → name in files; name in memory of what is not written → the reason.
    """
    config = root.peft_config[adapter]
    if getattr(config, "is_prompt_learning", False):
        return _saved_prompt(root, adapter, str(getattr(config, "peft_type", "")))
    from peft import get_peft_model_state_dict

    if len(root.peft_config) > 1:
        root = _Alone(root, adapter)
    stand_ins: dict[str, Tensor] = {}
    for name, param in root.named_parameters(remove_duplicate=False):
        # Without memory, and neither gathered nor moved as the parameter might be.
        stand_ins[name] = torch.zeros((), dtype=param.dtype, device="cpu").expand(param.shape)
    buffers = dict(root.named_buffers(remove_duplicate=False))
    of = {id(x): name for name, x in stand_ins.items()}
    # AdaLoRA would cut the tensors to the ranks it is going to keep.
    ranks = getattr(config, "rank_pattern", None)
    cuts = str(getattr(config, "peft_type", "")).endswith("ADALORA") and ranks is not None
    try:
        if cuts:
            config.rank_pattern = None
        # Not "auto", which may ask the network whether embeddings have grown: their names are
        # the model's own.
        written = get_peft_model_state_dict(
            root, {**buffers, **stand_ins}, adapter, save_embedding_layers=False
        )
    except Exception:
        return {}, {}  # there are still the names in memory
    finally:
        if cuts:
            config.rank_pattern = ranks
    return {of[id(x)]: key for key, x in written.items() if id(x) in of}, {}


class _Alone:
    """A model as if it had one adapter only.

    Of several, peft leaves out every parameter in whose name another adapter's occurs.
    """

    def __init__(self, root: torch.nn.Module, adapter: str) -> None:
        self._root = root
        self.peft_config = {adapter: root.peft_config[adapter]}

    def __getattr__(self, name: str):
        return getattr(self._root, name)


def _saved_prompt(root: torch.nn.Module, adapter: str, kind: str):
    before = f"prompt_encoder.{adapter}."
    names = [n for n, _ in root.named_parameters(remove_duplicate=False) if n.startswith(before)]
    if len(names) == 1:  # the embeddings themselves, of prompt tuning and of prefix tuning
        return {names[0]: "prompt_embeddings"}, {}
    if kind.endswith("MULTITASK_PROMPT_TUNING"):
        short = {name: name.removeprefix(before) for name in names}
        return {n: k.replace("embedding.weight", "prompt_embeddings") for n, k in short.items()}, {}
    reason = (
        "peft writes the prompt embeddings that this encoder computes, not the encoder's own "
        "parameters, and they cannot be told from those"
    )
    return {}, dict.fromkeys(names, reason)


class _BaseNames:
    """Names that parameters have in the model without peft; of what peft adds None."""

    def __init__(self, path: str, root: torch.nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        self._before = f"{path}." if path else ""
        self._outer = ()
        if type(root).__module__.startswith("peft."):
            prompts = any(
                getattr(c, "is_prompt_learning", False) for c in root.peft_config.values()
            )
            self._outer = ("base_model",) if prompts else ("base_model", "model")
        self._skips: dict[str, dict[str, int]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            if isinstance(module, BaseTunerLayer):
                self._skips[name] = {"base_layer": 1}
            elif isinstance(module, ModulesToSaveWrapper):
                self._skips[name] = {"original_module": 1, "modules_to_save": 2}
            elif isinstance(module, AuxiliaryTrainingWrapper):
                self._skips[name] = {"original_module": 1, "token_adapter": 1}

    def __call__(self, name: str) -> str | None:
        if not name.startswith(self._before):
            return plain(name)
        parts = name[len(self._before) :].split(".")
        at = len(self._outer)
        if tuple(part for part in parts if part not in _RESERVED)[:at] != self._outer:
            return None
        while at and tuple(p for p in parts[:at] if p not in _RESERVED) != self._outer:
            at += 1
        kept = []
        while at < len(parts):
            skips = self._skips.get(".".join(parts[:at]))
            if skips is None or parts[at] in _RESERVED:
                kept.append(parts[at])
                at += 1
            elif parts[at] in skips:
                at += skips[parts[at]]
            else:
                return None
        return plain(self._before + ".".join(kept))
