# SPDX-License-Identifier: BSD-3-Clause
"""Whose tensor is it? The names of parameters in files and state dicts, and in memory.

Wrappers (DDP, torch.compile, Lightning, ...) put words before names or into them, and peft leaves
the adapter's name out of what it writes. A source is therefore read in every way that could be
meant, each for all parameters at once; what two ways read differently is an error, never a guess.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

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
    return "".join(_heads([name], ("module.",))[-1])


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


# -- finding ------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """One way to read the names of a source.

    Attributes:
        kind: Whose names they are taken for.
        cost: Number of changes: words that are taken off or put before, names peft or others give.
        of: For each parameter the names in the source that are its own.
        owners: Name in the source → numbers of its parameters.
    """

    kind: str
    cost: int
    of: list[list[str]]
    owners: dict[str, set[int]]

    def denies(self, other: Reading, wanted: Sequence[int]) -> bool:
        """Returns whether what ``other`` takes for a parameter is somebody else's here."""
        if self is other or self.kind not in ("model", other.kind):
            return False  # two adapters, say, whose files have the same names
        return any(
            self.owners.get(name, set()) - {number}
            for number in wanted
            for name in other.of[number]
            if name not in self.of[number]
        )


def _heads(names: Iterable[str], words: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns every run of words that some of the names begin with, the empty one first."""
    heads: dict[str, tuple[str, ...]] = {"": ()}
    for name in names:
        runs: list[tuple[str, ...]] = [()]
        for run in runs:  # grows
            start = "".join(run)
            runs += [(*run, word) for word in words if name.startswith(start + word)]
            heads.setdefault(start, run)
    return sorted(heads.values(), key=len)


def readings(
    stored: Mapping[str, Sequence[str]], known: Known, wanted: Sequence[int], words: Sequence[str]
) -> tuple[list[Reading], list[Reading]]:
    """Returns the ways to read a source: those that stand, and those that may be right, too.

    Args:
        stored: Name without reserved parts → the names in the source.
        known: The parameters.
        wanted: Numbers of those that are to be found.
        words: What may stand before the names.
    """
    found: list[Reading] = []
    before = _heads(stored, words)
    for kind, forms in known.forms.items():
        if kind != "model" and all(forms[n] == known.forms["model"][n] for n in wanted):
            continue
        for mine in _heads((form for n in wanted for form in forms[n]), words):
            for theirs in before:
                if mine and theirs and mine[-1] == theirs[-1]:
                    continue  # the same with less
                reading = _read(stored, forms, kind, mine, theirs)
                if reading.owners:
                    found.append(reading)
    standing, doubtful = [], []
    for reading in found:
        if not any(reading.of[number] for number in wanted):
            continue
        others = [other for other in found if other.denies(reading, wanted)]
        # One that knows whose every name is that the other knows, and more, need not heed it, nor
        # need one that goes by the parameters' own names.
        others = [other for other in others if not other.owners.keys() < reading.owners.keys()]
        if not others or not reading.cost:
            standing.append(reading)
        elif not any(
            other.owners.keys() >= reading.owners.keys()
            or (not other.cost and all(other.of[number] for number in wanted))
            for other in others
        ):
            doubtful.append(reading)
    return standing, doubtful


def _read(stored, forms, kind, mine, theirs) -> Reading:
    start, put = "".join(mine), "".join(theirs)
    of: list[list[str]] = []
    owners: dict[str, set[int]] = {}
    for number, names in enumerate(forms):
        here: list[str] = []
        for name in names:
            if name.startswith(start):
                here += stored.get(put + name[len(start) :], ())
        here = list(dict.fromkeys(here))
        of.append(here)
        for name in here:
            owners.setdefault(name, set()).add(number)
    return Reading(kind, len(mine) + len(theirs) + (kind != "model"), of, owners)


def renamed_by_transformers(
    stored: Sequence[str], model: torch.nn.Module | None
) -> dict[str, list[str]]:
    """Returns the names in memory of what transformers writes under others (LLaVA's, say)."""
    if model is None or "transformers" not in sys.modules:
        return {}
    inner = next((m for m in model.modules() if hasattr(type(m), "base_model_prefix")), None)
    if inner is None:
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # an older one, which keeps the names of most models
        return {}
    every = get_model_conversion_mapping(inner)
    # Those that compute (merge experts, say) are not for us: such names stay missing.
    renamings = [each for each in every if isinstance(each, WeightRenaming)]
    found: dict[str, list[str]] = {}
    for name in stored:
        found.setdefault(plain(rename_source_key(name, renamings, [])[0]), []).append(name)
    return found


class Missing(Exception):
    """What no reading finds.

    Attributes:
        places: Places in the list of what was wanted.
        reasons: Why, of those of which more is known.
    """

    def __init__(self, places: list[int], reasons: list[str]) -> None:
        super().__init__(places)
        self.places, self.reasons = places, reasons


class Two(Exception):
    """Two names in the source for the parameter at ``place``, of tensors that differ."""

    def __init__(self, place: int, first: str, second: str) -> None:
        super().__init__(place, first, second)
        self.place, self.first, self.second = place, first, second


class Shared(Exception):
    """One name in the source for the parameters at two ``places``."""

    def __init__(self, places: tuple[int, int], name: str) -> None:
        super().__init__(places, name)
        self.places, self.name = places, name


def find(
    stored: Iterable[str],
    wanted: Sequence[Sequence[str]],
    model: torch.nn.Module | None,
    others: Iterable[str],
    same: Callable[[int, str, str], bool],
    words: Sequence[str] = (),
) -> list[str]:
    """Finds the name of every parameter's tensor in a source.

    Args:
        stored: Names in the source.
        wanted: For each parameter its names, its own first.
        model: The model that has them, if known.
        others: Names of parameters that are not wanted but known all the same.
        same: Whether two names in the source are of equal tensors, for the parameter at a place.
        words: What else may stand before the names in the source.

    Raises:
        Missing: There is none for some parameters.
        Two: Some parameter may have either of two tensors.
        Shared: Some tensor may be either of two parameters'.
    """
    known = Known(model)
    numbers = [known.number(names[0]) if names else None for names in wanted]
    for name in others:
        known.number(name)
    there = [number for number in numbers if number is not None]
    every = [name for name in stored if isinstance(name, str)]
    views: list[dict[str, list[str]]] = [{}]
    for name in every:
        views[0].setdefault(plain(name), []).append(name)
    tried: list[Reading] = []
    for view in range(2):
        if view == 1:
            views.append(renamed_by_transformers(every, model))
        standing, doubtful = readings(views[view], known, there, (*known.words, *words))
        whole, rivals = (
            [r for r in some if all(n is not None and r.of[n] for n in numbers)]
            for some in (standing, doubtful)
        )
        if whole:
            return _agreed(sorted(whole, key=lambda r: r.cost) + rivals, numbers, same)
        tried += standing
    raise _shortest(tried, numbers, known)


def _agreed(
    whole: Sequence[Reading],
    numbers: Sequence[int],
    same: Callable[[int, str, str], bool],
) -> list[str]:
    """Returns the names in the first reading, if all are of the same tensors."""
    found: list[str] = []
    taken: dict[str, int] = {}
    for place, number in enumerate(numbers):
        names = list(dict.fromkeys(name for reading in whole for name in reading.of[number]))
        for name in names[1:]:
            if not same(place, names[0], name):
                raise Two(place, names[0], name)
        before = taken.setdefault(names[0], place)
        if numbers[before] != number:
            raise Shared((before, place), names[0])
        found.append(names[0])
    return found


def _shortest(tried: Sequence[Reading], numbers: Sequence[int | None], known: Known) -> Exception:
    """Returns the error of the reading that finds most."""

    def missing(reading: Reading) -> list[int]:
        return [i for i, n in enumerate(numbers) if n is None or not reading.of[n]]

    if not tried:
        places = list(range(len(numbers)))
    else:
        best = min(tried, key=lambda reading: (len(missing(reading)), reading.cost))
        places = missing(best)
        for place in places:
            for other in tried:
                for name in other.of[numbers[place]] if numbers[place] is not None else ():
                    owner = next((n for n in best.owners.get(name, ()) if n in numbers), None)
                    if owner is not None and other.kind != best.kind:
                        return Shared((numbers.index(owner), place), name)
    found = {known.computed.get(numbers[place]): None for place in places}
    return Missing(places, [reason for reason in found if reason])
