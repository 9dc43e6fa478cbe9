# SPDX-License-Identifier: BSD-3-Clause
"""A model of what a sharded optimizer step costs on 8 to 16,384 ranks; nothing here is measured.

    python bench/scaling.py bench/results/sharded-cpu-DATE.json --assume jitter=5e-5

sharded.py counts the collectives of a step and the time that a host needs for it; this file
computes from them, from the bytes of the arithmetic, and from stated assumptions about machines,
what the step would cost where nobody measured it:

    step = local + host + collectives + stragglers

- local: bytes of a rank's shard that the step reads and writes, over the memory's bandwidth;
- host: a straight line over the number of tensors, through the CPU times of two lists that
  sharded.py measured (their little arithmetic included, so rather too much);
- collectives: those that the step waits for; each a launch, and a tree or a ring of hops, whichever
  is faster, with a latency and a bandwidth per hop, other ones inside a node than between nodes;
- stragglers: by simulation. Between two meetings every rank is late by a random time, and the last
  one sets the pace. A collective that is waited for is a meeting more; the next forward pass, where
  all ranks meet in any case, is the last one. A collective that was started a step ahead is none.

The sum is what a step costs if the host does not run ahead of the device. Where it does, the larger
of the host's share and of all the rest remains: the results have both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence

import torch

from step_report import find, table

# Parameters and tensors of decoders of the Llama kind: 9 tensors a layer and 3 more.
SIZES = {
    "7B": (6_738_415_616, 32 * 9 + 3),
    "70B": (68_976_648_192, 80 * 9 + 3),
    "405B": (405_853_388_800, 126 * 9 + 3),
}
RANKS = (8, 64, 512, 4096, 16384)
ITEM = 4  # bytes of a float32
LABEL = "MODEL, not measured"


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """The machine of the model: round numbers, measured nowhere.

    Attributes:
        memory_bandwidth: Bytes per second of a rank's memory.
        memory: Bytes of a rank's memory; a run that needs more for its state alone is marked.
        ranks_per_node: Ranks that reach each other by the faster links.
        inside_latency: Seconds a hop inside a node takes.
        inside_bandwidth: Bytes per second of a hop inside a node.
        between_latency: Seconds a hop between nodes takes.
        between_bandwidth: Bytes per second of a hop between nodes.
        launch: Seconds that starting a collective takes.
        jitter: Mean of the exponential time by which a rank is late between two meetings.
        trials: Steps that are simulated.
    """

    memory_bandwidth: float = 2e12
    memory: float = 8e10
    ranks_per_node: float = 8
    inside_latency: float = 2e-6
    inside_bandwidth: float = 2e11
    between_latency: float = 8e-6
    between_bandwidth: float = 2.5e10
    launch: float = 1e-5
    jitter: float = 2e-5
    trials: float = 200

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (value >= 0 if name == "jitter" else value > 0) or math.isinf(value):
                raise ValueError(f"assumption {name} is {value}; it has to be a positive number")

    def lines(self) -> list[str]:
        """Returns the assumptions in words."""
        return [
            f"memory {self.memory_bandwidth / 1e12:g} TB/s and {self.memory / 1e9:g} GB a rank; "
            f"{self.ranks_per_node:g} ranks a node",
            f"hop inside a node {self.inside_latency * 1e6:g} µs and "
            f"{self.inside_bandwidth / 1e9:g} GB/s, between nodes "
            f"{self.between_latency * 1e6:g} µs and {self.between_bandwidth / 1e9:g} GB/s; "
            f"{self.launch * 1e6:g} µs to start a collective; the faster of tree and ring",
            f"a rank is late by {self.jitter * 1e6:g} µs on average (exponential) between two "
            f"meetings; mean of {self.trials:g} simulated steps",
            "float32 parameters, gradients, moments and anchor, all sharded evenly over all ranks",
        ]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of step of a method.

    Attributes:
        share: How often it occurs.
        arrays: Float32 arrays of the shard's size that it reads and writes.
        awaited: Collectives that the step waits for.
        ahead: Collectives that are started in it and waited for in the next one.
        fixed_bytes: Bytes that a rank puts into an awaited one, whatever the number of tensors.
        tensor_bytes: And for every tensor.
    """

    share: float
    arrays: float
    awaited: int
    ahead: int
    fixed_bytes: float
    tensor_bytes: float


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to take a step.

    Attributes:
        name: As the tables call it.
        setting: As the tables call it.
        kinds: Its kinds of steps.
        host_fixed: Seconds of the host for a step.
        host_tensor: And for every tensor.
        state_arrays: Arrays of the shard's size that are kept: θ, g, m, v, θ*.
    """

    name: str
    setting: str
    kinds: tuple[Kind, ...]
    host_fixed: float
    host_tensor: float
    state_arrays: int


def arrays(name: str, *, clips: bool, injects: bool, next_injects: bool) -> float:
    """Returns the arrays of the shard's size that a step of AdamW reads and writes.

    All read θ, g, m, v and write θ, m, v: 7. The norm of g is 1 more.
    """
    if name == "dgg cpp":
        # The anchor is read to be injected, and to measure the distance ahead.
        return 7.0 + (clips or injects) + (injects or next_injects)
    clipping = 3.0 if clips else 0.0  # norm 1; scaling in place 2
    if name == "torch fused":
        return 7.0 + clipping
    if name == "foreach guidance":
        # d 3, its norm 1, scaled in place 2, added to g 3.
        return 7.0 + clipping + (9.0 if injects else 0.0)
    if name == "by hand on shards":
        # d 3, its norm 1, added to g 3.
        return 7.0 + clipping + (7.0 if injects else 0.0)
    raise ValueError(f"no account of the arrays of {name!r}")


MODELLED = (
    ("dgg cpp", "plain"),
    ("dgg cpp", "clipped"),
    ("dgg cpp", "guided"),
    ("dgg cpp", "alpha=0.2"),
    ("torch fused", "plain"),
    ("torch fused", "clipped"),
    ("foreach guidance", "guided"),
    ("by hand on shards", "guided"),
)


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns offset and slope of the line through two points, neither negative."""
    slope = max(0.0, (y[1] - y[0]) / (x[1] - x[0]))
    return max(0.0, y[0] - slope * x[0]), slope


def methods(small: dict, large: dict) -> list[Method]:
    """Returns the methods of the model, from the counts and host times of two cases.

    Args:
        small: Case of sharded.py with few tensors.
        large: Case with more tensors, on as many ranks.
    """
    found = []
    tensors = small["tensors"], large["tensors"]
    for name, setting in MODELLED:
        pair = [find(case, name, setting) for case in (small, large)]
        if None in pair:
            continue
        kinds = []
        for one, other in zip(*(entry["collectives"] for entry in pair), strict=True):
            if one["count"] != other["count"]:
                raise ValueError(
                    f"{name} ({setting}) has {one['count']} collectives with {tensors[0]} tensors "
                    f"and {other['count']} with {tensors[1]}: the model knows no such method"
                )
            each = [c["bytes"] / max(c["count"], 1) for c in (one, other)]
            fixed, per_tensor = _line(tensors, each)
            kinds.append(
                Kind(
                    one["share"],
                    arrays(
                        name, clips=setting != "plain", injects=one["injects"],
                        next_injects=one["next_injects"],
                    ),
                    one["count"] - one["asynchronous"], one["asynchronous"], fixed, per_tensor,
                )
            )  # fmt: skip
        host = _line(tensors, [entry["cpu_seconds"] for entry in pair])
        guided = setting not in ("plain", "clipped")
        method = Method(name, setting, tuple(kinds), *host, 5 if guided else 4)
        found.append(method)
        if (name, setting) == ("dgg cpp", "guided"):
            found.extend(_otherwise(method))
    return found


def _otherwise(method: Method) -> list[Method]:
    """Returns our guided step with ‖d‖ in a collective of its own: hidden, and waited for."""
    (kind,) = method.kinds
    found = []
    for words, awaited, ahead in (("‖d‖ sent ahead", 1, 1), ("‖d‖ waited for apart", 2, 0)):
        if (awaited, ahead) != (kind.awaited, kind.ahead):
            other = dataclasses.replace(kind, awaited=awaited, ahead=ahead)
            found.append(
                dataclasses.replace(method, setting=f"{method.setting}, {words}", kinds=(other,))
            )
    return found


def all_reduce(ranks: int, size: float, given: Assumptions) -> float:
    """Returns the seconds of an all-reduce, every rank on time.

    Args:
        ranks: How many take part.
        size: Bytes every rank puts in.
        given: The machine.
    """
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / given.ranks_per_node)
    inside = given.inside_latency + size / given.inside_bandwidth
    between = given.between_latency + size / given.between_bandwidth
    # Up the tree and down again, first within the nodes.
    depth = math.ceil(math.log2(min(ranks, given.ranks_per_node)))
    tree = 2 * (depth * inside + math.ceil(math.log2(nodes)) * between)
    # Every step of a ring waits for its slowest link.
    latency, bandwidth = (
        (given.between_latency, given.between_bandwidth)
        if nodes > 1
        else (given.inside_latency, given.inside_bandwidth)
    )
    ring = 2 * (ranks - 1) * (latency + size / ranks / bandwidth)
    return given.launch + min(tree, ring)


def stragglers(ranks: int, meetings: int, given: Assumptions) -> float:
    """Returns by how much a step is longer because ranks are late, the mean of simulated steps.

    Args:
        ranks: How many there are.
        meetings: How often all of them meet, the end of the step included.
        given: The machine.
    """
    generator = torch.Generator().manual_seed(0)
    trials = int(given.trials)
    clocks = torch.zeros(trials, 1, dtype=torch.float64)
    for _ in range(meetings):
        late = torch.empty(trials, ranks, dtype=torch.float64)
        late.exponential_(generator=generator)
        clocks = (clocks + late * given.jitter).amax(dim=1, keepdim=True)
    return float(clocks.mean())


def cost(
    method: Method, parameters: int, tensors: int, ranks: int, given: Assumptions, late=stragglers
) -> dict[str, float]:
    """Returns the parts of a step's seconds.

    Args:
        method: How the step is taken.
        parameters: Elements of the model.
        tensors: Its tensors.
        ranks: Over how many it is sharded.
        given: The machine.
        late: (ranks, meetings, given) → seconds.
    """
    local = collectives = waiting = 0.0
    for kind in method.kinds:
        size = kind.fixed_bytes + kind.tensor_bytes * tensors
        local += kind.share * kind.arrays * ITEM * parameters / ranks / given.memory_bandwidth
        collectives += kind.share * kind.awaited * all_reduce(ranks, size, given)
        # What is sent ahead still has to be started.
        collectives += kind.share * kind.ahead * given.launch
        waiting += kind.share * late(ranks, kind.awaited + 1, given)
    host = method.host_fixed + method.host_tensor * tensors
    rest = local + collectives + waiting
    return {
        "local": local, "host": host, "collectives": collectives, "stragglers": waiting,
        "total": rest + host, "total_host_ahead": max(host, rest),
    }  # fmt: skip


def model(
    cases: Sequence[dict], *, quick: bool = False, given: Assumptions | None = None
) -> dict[str, object]:
    """Computes the model from the cases of sharded.py.

    Args:
        cases: Its cases; two lists of many small tensors on as many ranks are needed.
        quick: Few ranks, for tests.
        given: The machine; None takes the defaults.

    Returns:
        The assumptions, the methods and a row for every size, number of ranks and method; only
        ``missing``, the reason, if the cases do not suffice.
    """
    given = given or Assumptions()
    pair = _two_lists(cases)
    if pair is None:
        return {"missing": "it needs two lists of small tensors on the same number of ranks"}
    used = methods(*pair)
    lateness: dict[tuple[int, int], float] = {}

    def late(ranks: int, meetings: int, given: Assumptions) -> float:
        if (ranks, meetings) not in lateness:
            lateness[ranks, meetings] = stragglers(ranks, meetings, given)
        return lateness[ranks, meetings]

    rows = [
        {
            "label": LABEL, "model": size, "parameters": parameters, "tensors": tensors,
            "ranks": ranks, "name": method.name, "setting": method.setting,
            "fits": method.state_arrays * ITEM * parameters / ranks <= given.memory,
            **cost(method, parameters, tensors, ranks, given, late),
        }
        for size, (parameters, tensors) in SIZES.items()
        for ranks in (RANKS[:2] if quick else RANKS)
        for method in used
    ]  # fmt: skip
    return {
        "label": LABEL,
        "assumptions": dataclasses.asdict(given),
        "host_from": [case["case"] for case in pair],
        "methods": [dataclasses.asdict(method) for method in used],
        "rows": rows,
    }


def _two_lists(cases: Sequence[dict]) -> tuple[dict, dict] | None:
    """Returns two cases to take host times from: on two ranks if there are such."""
    small = [case for case in cases if case["elements"] / case["tensors"] < 1e5]
    # One rank has no collectives to count, and more than two may wait for cores.
    for ranks in sorted({c["ranks"] for c in small}, key=lambda r: (r != 2, r == 1, r)):
        found = sorted((c for c in small if c["ranks"] == ranks), key=lambda c: c["tensors"])
        if ranks > 1 and len(found) > 1 and found[0]["tensors"] < found[-1]["tensors"]:
            return found[0], found[-1]
    return None


def page(results: dict[str, object], *, markdown: bool) -> str:
    """Returns the assumptions and the tables of `model`."""
    if "missing" in results:
        return f"no model of more ranks: {results['missing']}\n"
    given = Assumptions(**results["assumptions"])
    rows = results["rows"]
    ranks = sorted({row["ranks"] for row in rows})
    lines = [f"### {LABEL}: a step on many ranks\n" if markdown else f"{LABEL}: many ranks"]
    mark = "- " if markdown else "  "
    lines += [f"{mark}assumed: {line}" for line in given.lines()]
    lines.append(
        f"{mark}taken from the measurement: collectives and their bytes as counted, and the "
        f"host's CPU time, a line through {' and '.join(results['host_from'])}"
    )
    lines.append(
        f"{mark}the host does not run ahead: local + host + collectives + stragglers; * the state "
        "does not fit into the memory\n"
    )
    for size in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == size]
        cells = [("model ms", "setting", *(f"{n:,} ranks" for n in ranks))]
        for name, setting in dict.fromkeys((row["name"], row["setting"]) for row in own):
            found = [r for r in own if (r["name"], r["setting"]) == (name, setting)]
            cells.append((name, setting, *map(_cell, found)))
        lines += [
            f"{LABEL}: {size}, {own[0]['parameters']:,} parameters in {own[0]['tensors']} tensors"
            + ("\n" if markdown else ""),
            table(cells, markdown=markdown) + "\n",
        ]
    parts = [("model ms", "setting", "local", "host", "collectives", "stragglers", "sum", "ahead")]
    size, most = next(iter(SIZES)), ranks[-1]
    for row in rows:
        if (row["model"], row["ranks"]) == (size, most):
            names = ("local", "host", "collectives", "stragglers", "total", "total_host_ahead")
            parts.append(
                (row["name"], row["setting"], *(f"{row[name] * 1e3:.3f}" for name in names))
            )
    lines += [
        f"{LABEL}: the parts, {size} on {most:,} ranks; ahead: where the host runs ahead"
        + ("\n" if markdown else ""),
        table(parts, markdown=markdown),
    ]
    return "\n".join(lines) + "\n"


def _cell(row: dict) -> str:
    return f"{row['total'] * 1e3:.2f}{'' if row['fits'] else ' *'}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the model of a result file of sharded.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, help="JSON of sharded.py")
    parser.add_argument(
        "--assume", nargs="+", default=[], metavar="NAME=VALUE",
        help=f"{', '.join(field.name for field in dataclasses.fields(Assumptions))}",
    )  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    options = parser.parse_args(arguments)
    try:
        pairs = (text.partition("=")[::2] for text in options.assume)
        given = Assumptions(**{name: float(value) for name, value in pairs})
    except (TypeError, ValueError) as error:
        parser.error(f"--assume: {error}")
    cases = json.loads(options.results.read_text(encoding="utf-8"))["cases"]
    print(page(model(cases, given=given), markdown=options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
