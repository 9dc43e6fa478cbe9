# SPDX-License-Identifier: BSD-3-Clause
"""Methods for wrappers that imitate the class of the optimizer inside them.

Lightning's and Fabric's wrappers become subclasses of the optimizer inside them, without its
attributes: a method that runs on the wrapper would set attributes there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Method = TypeVar("_Method", bound=Callable[..., Any])


class Imitable:
    """Base of the optimizers that such a wrapper may have inside."""


def imitable(method: _Method) -> _Method:
    """Returns a method that a wrapper passes on to the optimizer inside it."""

    @functools.wraps(method)
    def pass_on(self, *args, **kwargs):
        optimizer = self.__dict__.get("_optimizer")
        if isinstance(optimizer, Imitable):
            return pass_on(optimizer, *args, **kwargs)
        return method(self, *args, **kwargs)

    return cast(_Method, pass_on)
