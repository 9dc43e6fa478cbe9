# SPDX-License-Identifier: BSD-3-Clause
"""How hyper-parameters are chosen: the same number of points for every family, by one rule.

A family has axes (ladders of values) and start points. When these have been tried, the untried
neighbours of the best point follow, then those of the second best, and so on, until the budget is
used. So the chosen point has been compared with what lies beside it wherever the budget allows,
and `Chosen.interior` says whether it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Point = tuple[int, ...]  # a place on the ladder of every axis


@dataclass(frozen=True)
class Family:
    """What is tuned together."""

    name: str  # as it stands in file names
    axes: dict[str, tuple[float, ...]]  # the ladder of values of every hyper-parameter, in order
    start: tuple[Point, ...]  # the first points, as places on the ladders

    def __post_init__(self) -> None:
        if len(set(self.start)) != len(self.start):
            raise ValueError(f"{self.name}: a start point stands there twice")
        for point in self.start:
            self.values(point)

    def values(self, point: Point) -> dict[str, float]:
        """The hyper-parameters of a point."""
        if len(point) != len(self.axes) or min(point) < 0:
            raise ValueError(f"{self.name} has no point {point}")
        return {name: ladder[k] for (name, ladder), k in zip(self.axes.items(), point, strict=True)}

    def neighbours(self, point: Point) -> list[Point]:
        """One step along one ladder, down first, axis by axis."""
        found = []
        for axis, ladder in enumerate(self.axes.values()):
            for place in (point[axis] - 1, point[axis] + 1):
                if 0 <= place < len(ladder):
                    found.append((*point[:axis], place, *point[axis + 1 :]))
        return found


def label(values: Mapping[str, float]) -> str:
    """A point as it stands in file names."""
    return "-".join(f"{name}{value:g}" for name, value in values.items())


def ranked(scores: Mapping[Point, float]) -> list[Point]:
    """Points from the best on; equal ones in their order on the ladders."""
    return sorted(scores, key=lambda point: (-scores[point], point))


def next_points(family: Family, scores: Mapping[Point, float], budget: int) -> list[Point]:
    """What to try next, all at once; nothing when the budget is used."""
    room = budget - len(scores)
    first = [point for point in family.start if point not in scores]
    if first or room <= 0:
        return first[: max(room, 0)]
    for point in ranked(scores):
        new = [other for other in family.neighbours(point) if other not in scores]
        if new:
            return new[:room]
    return []


def walk(
    family: Family, budget: int, score: Callable[[dict[str, float]], float | None]
) -> dict[Point, float]:
    """Search until the budget is used, or `score` of some values is None; returns the scores."""
    scores: dict[Point, float] = {}
    while points := next_points(family, scores, budget):
        for point in points:
            if (found := score(family.values(point))) is None:
                return scores
            scores[point] = found
    return scores


@dataclass(frozen=True)
class Chosen:
    """The best point, and whether all its neighbours were tried."""

    values: dict[str, float]
    score: float
    interior: bool
    tried: int


def choose(family: Family, scores: Mapping[Point, float]) -> Chosen:
    """The best point of those tried.

    Raises:
        ValueError: nothing was tried.
    """
    if not scores:
        raise ValueError(f"{family.name}: no point was tried")
    best = ranked(scores)[0]
    beside = family.neighbours(best)
    ends = [k in (0, len(ladder) - 1) for k, ladder in zip(best, family.axes.values(), strict=True)]
    interior = all(other in scores for other in beside) and not any(ends)
    return Chosen(family.values(best), scores[best], interior, len(scores))
