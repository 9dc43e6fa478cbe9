# SPDX-License-Identifier: BSD-3-Clause
"""The names of parameters in memory, in state dicts and in files.

Wrappers (DDP, torch.compile, Lightning, ...) put words before names or into them, and peft leaves
the adapter's name out of the names in its files. `readings` tries all ways to read a source.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Parts that wrappers put anywhere into names, and that no other module has as its name.
RESERVED = {
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
# Words that wrappers put before names, but that may also be names of modules: of DDP and engines,
# Lightning and nested checkpoints, trl's value heads, peft.
_WORDS = ("module.", "model.", "pretrained_model.", "base_model.model.")
_HEAD = "pretrained_model."


def plain(name: str) -> str:
    """Returns a name without the reserved parts of wrappers."""
    return ".".join(part for part in name.split(".") if part not in RESERVED)


def names_of_parameters(model: torch.nn.Module | None) -> dict[Tensor, list[str]]:
    """Returns all names of every parameter of ``model``, those in the model first.

    They are the names in the model (of a tied parameter all of them), names without the words of
    wrappers (``module.``, ``_orig_mod.``, those of FSDP and activation checkpointing), and the
    names of an adapter's parameters and of trained copies of modules in peft's files. No name of
    one parameter is in the model the name of another.
    """
    model_names = ModelNames(model)
    owner: dict[str, int] = {}
    for number, in_model in enumerate(model_names.in_model):
        for name in in_model:
            owner.setdefault(name, number)
            owner.setdefault(plain(name), number)
    shared = min((_wrapped(forms[0]) for forms in model_names.forms["model"]), key=len, default="")
    names_of = {}
    for number, param in enumerate(model_names.params):
        names = list(model_names.in_model[number])
        for forms in model_names.forms.values():
            for form in forms[number]:
                bare = form.removeprefix(shared)
                names += (form, bare)
                if len(model_names.forms) > 1:
                    names.append(f"base_model.model.{bare}")
        names_of[param] = [n for n in dict.fromkeys(names) if owner.get(n, number) == number]
    return names_of


def variants(name: str) -> list[str]:
    """Returns the names a parameter may have in a checkpoint, ``name`` first."""
    bare = plain(name)
    return list(dict.fromkeys([name, bare, bare.removeprefix(_wrapped(bare))]))


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


class ModelNames:
    """The parameters of a model, and their names in the files of different writers.

    Attributes:
        params: The parameters, each once.
        in_model: For each its names in the model.
        forms: Writer of a file (the model, peft for an adapter, a value head, the base model
            without peft) → for each parameter its names there, without reserved parts.
        computed: Number of a parameter that peft does not write → why not.
    """

    def __init__(self, model: torch.nn.Module | None) -> None:
        numbers: dict[Tensor, int] = {}
        self.in_model: list[list[str]] = []
        self.computed: dict[int, str] = {}
        self._number: dict[str, int] = {}
        named = () if model is None else model.named_parameters(remove_duplicate=False)
        for name, param in named:
            number = numbers.setdefault(param, len(numbers))
            if number == len(self.in_model):
                self.in_model.append([])
            self.in_model[number].append(name)
            self._number[name] = self._number[plain(name)] = number
        self.params = list(numbers)
        self.forms: dict[str, list[tuple[str, ...]]] = {}
        self.words: tuple[str, ...] = _WORDS
        wrapped = () if model is None else _paths_of_engines(model)
        self._add("model", plain, lambda name: plain(_without_engines(name, wrapped)))
        if model is not None:
            _add_peft(self, model)
        if any(_HEAD in name for name in self._number):
            self._add("value head", lambda name: _without_head(plain(name)))

    def _add(self, kind: str, *ways: Callable[[str], str | None]) -> None:
        self.forms[kind] = [
            tuple(dict.fromkeys(form for name in in_model for way in ways if (form := way(name))))
            for in_model in self.in_model
        ]

    def number(self, name: str) -> int:
        """Returns the number of the parameter of that name, a new one if there is none."""
        for known_name in (name, plain(name)):
            if known_name in self._number:
                return self._number[known_name]
        self._number[name] = len(self.in_model)
        self.in_model.append([name])
        for forms in self.forms.values():
            forms.append((plain(name),))
        return self._number[name]


def _paths_of_engines(model: torch.nn.Module) -> set[str]:
    """Returns where in a model DDP and DataParallel are; they add ``module`` to names."""
    classes = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    return {path for path, module in model.named_modules() if isinstance(module, classes)}


def _without_engines(name: str, paths: Collection[str]) -> str:
    parts = name.split(".")
    return ".".join(
        part for i, part in enumerate(parts) if part != "module" or ".".join(parts[:i]) not in paths
    )


def _without_head(name: str) -> str:
    """Returns the name in the files of a value head, which leave its own part out."""
    words = _wrapped(name)
    return words + name[len(words) :].removeprefix(_HEAD)


def _add_peft(model_names: ModelNames, model: torch.nn.Module) -> None:
    """Adds the names of parameters in the files of each adapter, and in the model without peft."""
    if "peft" not in sys.modules:
        return
    roots = list(_peft_models(model))
    if not roots:
        return
    model_names.words += tuple(f"{plain(path)}." for path, _ in roots if plain(path))
    adapters = dict.fromkeys(a for _, root in roots for a in root.peft_config)
    for adapter in adapters:
        saved: dict[str, str] = {}
        for path, root in roots:
            if adapter in root.peft_config:
                names, computed = _saved_by_peft(root, adapter)
                start = f"{path}." if path else ""
                saved.update((start + name, start + key) for name, key in names.items())
                for name, reason in computed.items():
                    model_names.computed[model_names.number(start + name)] = reason
        model_names._add(f"adapter {adapter!r}", functools.partial(_in_adapter, saved))
    for path, root in roots:
        model_names._add(f"base of {path!r}", _base_names(path, root))


def _in_adapter(saved: Mapping[str, str], name: str) -> str:
    return plain(saved.get(name, name))


def _peft_models(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the paths of the outermost modules with adapters, and the modules."""
    outer_paths: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in outer_paths):
            continue
        # Of the module itself: wrappers pass attributes of the module inside on.
        has_config = "peft_config" in vars(module) or hasattr(type(module), "peft_config")
        if has_config and isinstance(module.peft_config, Mapping) and module.peft_config:
            outer_paths.append(f"{path}." if path else "")
            yield path, module


def _saved_by_peft(root: Any, adapter: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns name in memory → name in peft's files, and name in memory → why it is in no file.

    Each kind of adapter has rules of its own. So peft is called with a stand-in for every
    parameter, which is recognised in the result.
    """
    config = root.peft_config[adapter]
    if getattr(config, "is_prompt_learning", False):
        return _saved_prompt(root, adapter, str(getattr(config, "peft_type", "")))
    from peft import get_peft_model_state_dict

    if len(root.peft_config) > 1:
        root = _Alone(root, adapter)
    # They have no memory, and peft neither gathers nor moves them.
    stand_ins = {
        name: torch.zeros((), dtype=param.dtype, device="cpu").expand(param.shape)
        for name, param in root.named_parameters(remove_duplicate=False)
    }
    buffers = dict(root.named_buffers(remove_duplicate=False))
    name_of = {id(x): name for name, x in stand_ins.items()}
    # AdaLoRA would cut the tensors to the ranks it is going to keep.
    ranks = getattr(config, "rank_pattern", None)
    cuts = str(getattr(config, "peft_type", "")).endswith("ADALORA") and ranks is not None
    try:
        if cuts:
            config.rank_pattern = None
        # Not "auto", which may ask the network whether embeddings have grown. Their names are those
        # in the model.
        written = get_peft_model_state_dict(
            root, {**buffers, **stand_ins}, adapter, save_embedding_layers=False
        )
    except Exception:
        return {}, {}  # the names in memory remain
    finally:
        if cuts:
            config.rank_pattern = ranks
    return {name_of[id(x)]: key for key, x in written.items() if id(x) in name_of}, {}


class _Alone:
    """A model that shows peft one of its adapters only.

    Otherwise peft leaves out every parameter in whose name another adapter's name occurs.
    """

    def __init__(self, root: Any, adapter: str) -> None:
        self._root = root
        self.peft_config = {adapter: root.peft_config[adapter]}

    def __getattr__(self, name: str):
        return getattr(self._root, name)


def _saved_prompt(root: torch.nn.Module, adapter: str, kind: str):
    start = f"prompt_encoder.{adapter}."
    names = [n for n, _ in root.named_parameters(remove_duplicate=False) if n.startswith(start)]
    if len(names) == 1:  # the embeddings themselves, of prompt tuning and of prefix tuning
        return {names[0]: "prompt_embeddings"}, {}
    if kind.endswith("MULTITASK_PROMPT_TUNING"):
        short = {name: name.removeprefix(start) for name in names}
        return {n: k.replace("embedding.weight", "prompt_embeddings") for n, k in short.items()}, {}
    reason = (
        "peft writes the prompt embeddings that this encoder computes, not the encoder's own "
        "parameters, and they cannot be told from those"
    )
    return {}, dict.fromkeys(names, reason)


def _base_names(path: str, root: Any) -> Callable[[str], str | None]:
    """Returns name of a parameter → its name in the model without peft, None if peft added it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    before = f"{path}." if path else ""
    outer: tuple[str, ...] = ()
    if type(root).__module__.startswith("peft."):
        prompts = any(getattr(c, "is_prompt_learning", False) for c in root.peft_config.values())
        outer = ("base_model",) if prompts else ("base_model", "model")
    skips_in: dict[str, dict[str, int]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer):
            skips_in[name] = {"base_layer": 1}
        elif isinstance(module, ModulesToSaveWrapper):
            skips_in[name] = {"original_module": 1, "modules_to_save": 2}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            skips_in[name] = {"original_module": 1, "token_adapter": 1}

    def in_base(name: str) -> str | None:
        if not name.startswith(before):
            return plain(name)
        parts = name[len(before) :].split(".")
        at = len(outer)
        if tuple(part for part in parts if part not in RESERVED)[:at] != outer:
            return None
        while at and tuple(p for p in parts[:at] if p not in RESERVED) != outer:
            at += 1
        kept = []
        while at < len(parts):
            skips = skips_in.get(".".join(parts[:at]))
            if skips is None or parts[at] in RESERVED:
                kept.append(parts[at])
                at += 1
            elif parts[at] in skips:
                at += skips[parts[at]]
            else:
                return None
        return plain(before + ".".join(kept))

    return in_base
