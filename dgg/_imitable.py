# SPDX-License-Identifier: BSD-3-Clause
"""Methods for wrappers that imitate the class of the optimizer inside them.

Lightning's and Fabric's wrappers become subclasses of what they wrap, without its attributes: what
a method sets would be set on the wrapper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Imitable:
    """Base of the optimizers of ours that may be inside."""


def imitable(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that a wrapper which imitates the class hands on to the optimizer inside."""

    @functools.wraps(method)
    def handed_on(self, *args, **kwargs):
        inside = self.__dict__.get("_optimizer")
        if isinstance(inside, Imitable):
            return handed_on(inside, *args, **kwargs)
        return method(self, *args, **kwargs)

    return handed_on
