# SPDX-License-Identifier: BSD-3-Clause
"""The ways to read the names of a source, and the choice of one: whose tensor is it?

A source is read in every way that could be meant, each for all parameters at once. If two ways give
a parameter different tensors, it is an error: nothing is guessed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dgg.anchor.names import ModelNames, heads, plain


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


@dataclass(eq=False)
class Missing(Exception):
    """No reading has a tensor for some parameters.

    Attributes:
        places: Their places in the list of wanted parameters.
        reasons: Reasons, where they are known.
    """

    places: list[int]
    reasons: list[str]


@dataclass(eq=False)
class Two(Exception):
    """Two names in the source for the parameter at ``place``, of tensors that differ."""

    place: int
    first: str
    second: str


@dataclass(eq=False)
class Shared(Exception):
    """One name in the source for the parameters at two ``places``."""

    places: tuple[int, int]
    name: str


def find(
    stored: Iterable[str], wanted: Sequence[Sequence[str]], model: torch.nn.Module | None,
    others: Iterable[str], equal: Callable[[int, str, str], bool], words: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Finds the name of every parameter's tensor in a source.

    Args:
        stored: Names in the source.
        wanted: For each parameter its names, that in the model first.
        model: The model that has them, if known.
        others: Names of parameters that are in the model but not wanted.
        equal: Whether two names in the source are of equal tensors, for the parameter at a place.
        words: What else may stand before the names in the source.

    Raises:
        Missing: There is none for some parameters.
        Two: Some parameter may have either of two tensors.
        Shared: Some tensor may be either of two parameters'.
    """
    model_names = ModelNames(model)
    numbers = [model_names.number(names[0]) if names else None for names in wanted]
    for name in others:
        model_names.number(name)
    named = [number for number in numbers if number is not None]
    texts = [name for name in stored if isinstance(name, str)]
    as_stored: dict[str, list[str]] = {}
    for name in texts:
        as_stored.setdefault(plain(name), []).append(name)
    tried: list[Reading] = []
    for renamed in (False, True):
        view = renamed_by_transformers(texts, model) if renamed else as_stored
        undisputed, doubtful = readings(view, model_names, named, (*model_names.words, *words))
        complete, rivals = (
            [r for r in some if all(n is not None and r.of[n] for n in numbers)]
            for some in (undisputed, doubtful)
        )
        if complete:
            return _agreed(sorted(complete, key=lambda r: r.cost) + rivals, named, equal)
        tried += undisputed
    raise _best_error(tried, numbers, model_names)


def _agreed(
    complete: Sequence[Reading], numbers: Sequence[int], equal: Callable[[int, str, str], bool]
) -> list[str]:
    """Returns the names in the first reading, if all readings have the same tensors."""
    result: list[str] = []
    first_place_of: dict[str, int] = {}
    for place, number in enumerate(numbers):
        names = list(dict.fromkeys(name for reading in complete for name in reading.of[number]))
        for name in names[1:]:
            if not equal(place, names[0], name):
                raise Two(place, names[0], name)
        first_place = first_place_of.setdefault(names[0], place)
        if numbers[first_place] != number:
            raise Shared((first_place, place), names[0])
        result.append(names[0])
    return result


def _best_error(
    tried: Sequence[Reading], numbers: Sequence[int | None], model_names: ModelNames
) -> Exception:
    """Returns the error of the reading that finds most parameters."""

    def missing(reading: Reading) -> list[int]:
        return [i for i, n in enumerate(numbers) if n is None or not reading.of[n]]

    if not tried:
        places = list(range(len(numbers)))
    else:
        best = min(tried, key=lambda reading: (len(missing(reading)), reading.cost))
        places = missing(best)
        for place in places:
            number = numbers[place]
            for other in tried:
                for name in () if number is None else other.of[number]:
                    owner = next((n for n in best.owners.get(name, ()) if n in numbers), None)
                    if owner is not None and other.kind != best.kind:
                        return Shared((numbers.index(owner), place), name)
    known = [number for place in places if (number := numbers[place]) is not None]
    reasons = dict.fromkeys(model_names.computed.get(number) for number in known)
    return Missing(places, [reason for reason in reasons if reason])
