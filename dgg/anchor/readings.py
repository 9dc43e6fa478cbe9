# SPDX-License-Identifier: BSD-3-Clause
"""Whose tensor is it? The ways to read the names of a source, and the one that is meant.

A source is read in every way that could be meant, each for all parameters at once; what two ways
read differently is an error, never a guess.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from dgg.anchor.names import Known, heads, plain


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
    before = heads(stored, words)
    for kind, forms in known.forms.items():
        if kind != "model" and all(forms[n] == known.forms["model"][n] for n in wanted):
            continue
        for mine in heads((form for n in wanted for form in forms[n]), words):
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
    stored: Iterable[str], wanted: Sequence[Sequence[str]], model: torch.nn.Module | None,
    others: Iterable[str], same: Callable[[int, str, str], bool], words: Sequence[str] = (),
) -> list[str]:  # fmt: skip
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
    whole: Sequence[Reading], numbers: Sequence[int], same: Callable[[int, str, str], bool]
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
