# SPDX-License-Identifier: BSD-3-Clause
"""The ways to read the names of a source, and the choice of one: whose tensor is it?

A source is read in every way that could be meant, each for all parameters at once. If two ways give
a parameter different tensors, it is an error: nothing is guessed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from dgg import sharding
from dgg.anchor.memory import is_alias
from dgg.anchor.names import ModelNames, heads, plain
from dgg.anchor.sources import Stored


class Reading(NamedTuple):
    """One way to read the names of a source.

    Attributes:
        kind: Writer of the source, a key of `ModelNames.forms`.
        cost: Number of changes to the model's names: words removed or added, another writer.
        of: For each parameter its names in the source.
        owners: Name in the source → numbers of its parameters.
    """

    kind: str
    cost: int
    of: list[list[str]]
    owners: dict[str, set[int]]

    def denies(self, other: Reading, wanted: Sequence[int]) -> bool:
        """Returns whether a tensor that ``other`` gives to a parameter is another one's here."""
        if self is other or self.kind not in ("model", other.kind):
            return False  # of two adapters, say, whose files have the same names
        return any(
            self.owners.get(name, set()) - {number}
            for number in wanted
            for name in other.of[number]
            if name not in self.of[number]
        )


def readings(
    stored: Mapping[str, Sequence[str]], model_names: ModelNames, wanted: Sequence[int],
    words: Sequence[str],
) -> tuple[list[Reading], list[Reading]]:  # fmt: skip
    """Returns the ways to read a source: those that no other denies, and those that may be right.

    Args:
        stored: Name without reserved parts → the names in the source.
        model_names: The parameters.
        wanted: Numbers of the parameters to be found.
        words: Words that may stand before the names.
    """
    possible: list[Reading] = []
    heads_in_source = heads(stored, words)
    for kind, forms in model_names.forms.items():
        if kind != "model" and all(forms[n] == model_names.forms["model"][n] for n in wanted):
            continue
        for head in heads((form for n in wanted for form in forms[n]), words):
            for source_head in heads_in_source:
                if head and source_head and head[-1] == source_head[-1]:
                    continue  # the same as without these two words
                reading = _read(stored, forms, kind, head, source_head)
                if reading.owners:
                    possible.append(reading)
    undisputed, doubtful = [], []
    for reading in possible:
        if not any(reading.of[number] for number in wanted):
            continue
        rivals = [other for other in possible if other.denies(reading, wanted)]
        # A rival does not count if it has an owner for fewer names and for no other. And none
        # counts against the names in the model.
        rivals = [rival for rival in rivals if not rival.owners.keys() < reading.owners.keys()]
        if not rivals or not reading.cost:
            undisputed.append(reading)
        elif not any(
            rival.owners.keys() >= reading.owners.keys()
            or (not rival.cost and all(rival.of[number] for number in wanted))
            for rival in rivals
        ):
            doubtful.append(reading)
    return undisputed, doubtful


def _read(stored, forms, kind, head, source_head) -> Reading:
    """Returns the reading in which ``head`` of the model's names is ``source_head`` there."""
    start, source_start = "".join(head), "".join(source_head)
    of: list[list[str]] = []
    owners: dict[str, set[int]] = {}
    for number, names in enumerate(forms):
        tails = [name[len(start) :] for name in names if name.startswith(start)]
        of.append(list(dict.fromkeys(x for t in tails for x in stored.get(source_start + t, ()))))
        for name in of[-1]:
            owners.setdefault(name, set()).add(number)
    return Reading(kind, len(head) + len(source_head) + (kind != "model"), of, owners)


def renamed_by_transformers(
    stored: Sequence[str], model: torch.nn.Module | None
) -> dict[str, list[str]]:
    """Returns names in memory → names in files, where transformers renames (LLaVA's, say)."""
    if model is None or "transformers" not in sys.modules:
        return {}
    inner: Any = next((m for m in model.modules() if hasattr(type(m), "base_model_prefix")), None)
    if inner is None:
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # an older one, which keeps the names of most models
        return {}
    conversions = get_model_conversion_mapping(inner)
    # Other conversions compute (merge experts, say): names of their results stay missing.
    renamings = [x for x in conversions if isinstance(x, WeightRenaming)]
    in_files: dict[str, list[str]] = {}
    for name in stored:
        in_files.setdefault(plain(rename_source_key(name, renamings, [])[0]), []).append(name)
    return in_files


def find_names(
    stored: Mapping[str, Any], candidates: Sequence[Sequence[str]], labels: Sequence[str],
    model: torch.nn.Module | None = None, params: Sequence[Tensor] | None = None,
    others: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Finds the name of the tensor in a source that is each parameter's.

    Args:
        stored: Named tensors, or a file's.
        candidates: For each parameter the names it may have there, that in the model first.
        labels: For each parameter its name in errors.
        model: The model the parameters belong to, if known.
        params: The parameters; of a sharded one a rank compares its own part only.
        others: Names of parameters that get no anchor, but may have a tensor there.

    Raises:
        KeyError: A parameter has no tensor.
        ValueError: A parameter may have two different tensors, or two parameters the same.
    """
    where = f" in {stored.path}" if isinstance(stored, Stored) else ""

    def called(place: int) -> str:
        name = candidates[place][0] if candidates[place] else ""
        return labels[place] if repr(name) in labels[place] else f"{name!r}, {labels[place]}"

    def check_same(place: int, left: str, right: str) -> None:
        if not _same(stored, left, right, None if params is None else params[place]):
            raise ValueError(
                f"{called(place)}, may have two tensors{where}, {left!r} and {right!r}, "
                "which differ: leave out the one that is not meant"
                + ("" if model is not None else ", or pass model=, which tells whose they are")
            )

    def refuse_shared(first: int, second: int, name: str) -> NoReturn:
        raise ValueError(
            f"the tensor {name!r}{where} would be the anchor of {called(first)} and of "
            f"{called(second)}: pass the tensors by their names in the model "
            "(set_anchor(model.state_dict(), model=model)), or freeze one of the two"
        )

    model_names = ModelNames(model)
    numbers = [model_names.number(names[0]) if names else None for names in candidates]
    for name in others:
        model_names.number(name)
    named = [number for number in numbers if number is not None]
    words = (*model_names.words, *(stored.words if isinstance(stored, Stored) else ()))
    texts = [name for name in stored if isinstance(name, str)]
    as_stored: dict[str, list[str]] = {}
    for name in texts:
        as_stored.setdefault(plain(name), []).append(name)
    tried: list[Reading] = []
    for renamed in (False, True):
        view = renamed_by_transformers(texts, model) if renamed else as_stored
        undisputed, doubtful = readings(view, model_names, named, words)
        complete, rivals = (
            [r for r in some if all(n is not None and r.of[n] for n in numbers)]
            for some in (undisputed, doubtful)
        )
        if complete:
            agreeing = sorted(complete, key=lambda r: r.cost) + rivals
            return _agreed(agreeing, named, check_same, refuse_shared)
        tried += undisputed
    missing = _missing(tried, numbers, refuse_shared)
    shown = "; ".join(map(called, missing[:5])) + ("; ..." if len(missing) > 5 else "")
    have = ", ".join(map(str, list(stored)[:3])) or "nothing"
    computed = model_names.computed
    reasons = dict.fromkeys(computed[n] for place in missing if (n := numbers[place]) in computed)
    why = "".join(f"{reason}. " for reason in reasons)
    ask = "" if model is not None else "pass model= if it is wrapped or peft's, "
    raise KeyError(
        f"no tensor for {len(missing)} of {len(labels)} trainable parameters: {shown}; the "
        f"names given{where} start with: {have}. {why}Pass the state dict of the same model or "
        f"adapter, {ask}or load the weights into the model and call "
        "set_anchor(model.state_dict(), model=model) or set_anchor() (the way for what is stored "
        "in another form than in the model, as the experts of a mixture are), or freeze "
        "(requires_grad_(False)) what has no anchor"
    )


def _agreed(
    complete: Sequence[Reading], numbers: Sequence[int],
    check_same: Callable[[int, str, str], None], refuse_shared: Callable[[int, int, str], NoReturn],
) -> list[str]:  # fmt: skip
    """Returns the names in the first reading, if all readings have the same tensors."""
    result: list[str] = []
    first_place_of: dict[str, int] = {}
    for place, number in enumerate(numbers):
        names = list(dict.fromkeys(name for reading in complete for name in reading.of[number]))
        for name in names[1:]:
            check_same(place, names[0], name)
        first_place = first_place_of.setdefault(names[0], place)
        if numbers[first_place] != number:
            refuse_shared(first_place, place, names[0])
        result.append(names[0])
    return result


def _missing(
    tried: Sequence[Reading], numbers: Sequence[int | None],
    refuse_shared: Callable[[int, int, str], NoReturn],
) -> list[int]:  # fmt: skip
    """Returns the places without a tensor in the reading that finds most parameters."""
    if not tried:
        return list(range(len(numbers)))

    def missing(reading: Reading) -> list[int]:
        return [i for i, n in enumerate(numbers) if n is None or not reading.of[n]]

    best = min(tried, key=lambda reading: (len(missing(reading)), reading.cost))
    for place in missing(best):
        number = numbers[place]
        for other in tried:
            for name in () if number is None else other.of[number]:
                owner = next((n for n in best.owners.get(name, ()) if n in numbers), None)
                if owner is not None and other.kind != best.kind:
                    refuse_shared(numbers.index(owner), place, name)
    return missing(best)


def _same(stored: Mapping[str, Any], left: str, right: str, param: Tensor | None) -> bool:
    """Returns whether two tensors of a source are equal; of a sharded parameter's this part."""
    read = stored.__getitem__
    if isinstance(stored, Stored):
        shape, dtype = stored.kind(left)
        if stored.kind(right) != (shape, dtype) or not isinstance(dtype, torch.dtype):
            return False
        if param is not None and tuple(param.shape) == shape:
            read = functools.partial(stored.read, param=param)
    x, y = read(left), read(right)
    if x is y:
        return True
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.shape != y.shape:
        return False
    x, y = sharding.local(x.detach()), sharding.local(y.detach())
    alike = x.dtype == y.dtype and x.device == y.device and x.layout == y.layout
    if is_alias(x, y):
        return alike and x.stride() == y.stride()
    return alike and x.device.type != "meta" and torch.equal(x, y)
