# SPDX-License-Identifier: BSD-3-Clause
"""The recipes of docs/recipes.md, found by their headings, and the packages that they need."""

from __future__ import annotations

import importlib.util
import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "recipes.md"


def recipes(text: str) -> dict[str, str]:
    """Returns the page's blocks of Python by the heading that each stands under."""
    found: dict[str, str] = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        heading = part.splitlines()[0].strip()
        blocks = re.findall(r"^```(?:python|py)\n(.*?)^```", part, re.M | re.S)
        assert len(blocks) <= 1, f"two recipes under {heading!r}"
        found.update(dict.fromkeys([heading], *blocks) if blocks else {})
    return found


def recipe(heading: str) -> str:
    """Returns a recipe as it is printed, for frameworks that are given a file."""
    return recipes(PAGE.read_text())[heading]


def run_recipe(heading: str, names: dict) -> dict:
    """Executes a recipe as it is printed, with ``names`` given to it; returns all names."""
    exec(compile(recipe(heading), f"recipe {heading}", "exec"), names)
    return names


def need(package: str, engine: str) -> None:
    """Skips a file of tests where the package is not installed.

    One that is there and cannot be imported is a failure, not a reason to skip.
    """
    if importlib.util.find_spec(package) is None:
        pytest.skip(
            f"{package} is not installed here: make test-engines ENGINE={engine}",
            allow_module_level=True,
        )
