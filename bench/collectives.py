# SPDX-License-Identifier: BSD-3-Clause
"""What a step sends: collectives counted in three ways that have to agree; for sharded.py."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

from variant import Variant


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives that pass the dispatcher, and the bytes each rank puts in.

    Sees what DTensor and functional collectives issue (``_c10d_functional``) and plain
    ``torch.distributed`` calls (``c10d``), each once. DTensor operations come here taken apart.
    """

    _SILENT = ("wait_tensor", "_wrap_tensor_autograd")

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, int] = {}
        self.bytes = self.asynchronous = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Notes a collective and lets it run."""
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = function.overloadpacket.__name__.rstrip("_")
        if function.namespace in ("c10d", "_c10d_functional") and name not in self._SILENT:
            name = {"allreduce": "all_reduce"}.get(name, name)
            # Left out where it is the default, which is True; functional ones are waited for.
            if function.namespace == "c10d" and bound(function, args, kwargs or {})["async_op"]:
                self.asynchronous += 1
            self.operations[name] = self.operations.get(name, 0) + 1
            inputs = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.bytes += sum(x.numel() * x.element_size() for x in inputs)
        return function(*args, **(kwargs or {}))


def bound(function, args, kwargs) -> dict[str, object]:
    """Returns an operator's arguments by name, the defaults of those left out included."""
    found = {}
    for place, argument in enumerate(function._schema.arguments):
        given = args[place] if place < len(args) else argument.default_value
        found[argument.name] = kwargs.get(argument.name, given)
    return found


def count_collectives(variant: Variant, group) -> list[dict[str, object]]:
    """Counts what each kind of step of a variant sends.

    Raises:
        RuntimeError: The three ways of counting disagree.
    """
    from torch.distributed.tensor.debug import CommDebugMode

    found = []
    for kind in sorted(variant.shares()):
        # The step before matters: it may start what this one waits for.
        variant.approach(kind)
        variant.ready()
        before = group._get_sequence_number_for_group()
        with CommDebugMode() as debug, CollectiveCounter() as counter:
            variant()
        issued = group._get_sequence_number_for_group() - before
        counted = sum(counter.operations.values())
        if not issued == counted == debug.get_total_counts():
            raise RuntimeError(
                f"{variant.name} ({variant.setting.name}): the process group issued {issued} "
                f"collectives a step, of which {counted} passed the dispatcher and CommDebugMode "
                f"saw {debug.get_total_counts()}"
            )
        found.append(
            {
                "injects": kind[0], "next_injects": kind[1], "share": float(variant.shares()[kind]),
                "count": counted, "asynchronous": counter.asynchronous, "bytes": counter.bytes,
                "operations": counter.operations,
            }
        )  # fmt: skip
    variant.seek(0)
    return found
