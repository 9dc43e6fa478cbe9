# SPDX-License-Identifier: BSD-3-Clause
"""A float64 model of one guided step, written from the specification and nothing else.

It shares no line with the library: its own Philox, its own draws, norms and scale, its own Adam and
SGD. Every number is a pair (value, error): the value is exact, the error bounds what arithmetic of
the library's precision may make of it, and follows each operation (a sum of large terms that
cancel has a large error, a product none to speak of). So no tolerance is chosen by hand. What is
stored is then rounded once more: `within` asks whether a stored number lies between the roundings
of value - error and value + error, which is sharp for 16 bits and for stochastic rounding, too
(rounding is monotonous, also with the words of a draw added).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

# -- Philox4x32-10 ------------------------------------------------------------------------------

_LOW = 0xFFFFFFFF
STREAM_TENSOR, STREAM_ELEMENT, STREAM_ROUNDING = 1, 1 << 31, (1 << 31) + (1 << 30)


def philox(seed: int, c0, c1, c2, c3):
    """Returns the four output words; counters are Python ints, or uint64 arrays of one shape."""
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _LOW, (a >> 32) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def step_word(seed: int, draw: int) -> int:
    return philox(seed, 0, 0, draw & _LOW, 0)[0]


def tensor_word(seed: int, draw: int, index: int) -> int:
    return philox(seed, 0, 0, draw & _LOW, STREAM_TENSOR + index)[0]


def element_words(seed: int, draw: int, index: int, count: int, stream=STREAM_ELEMENT):
    """Returns the words of elements 0 ... count - 1 as int64."""
    blocks = (count + 3) // 4
    if not blocks:
        return np.zeros(0, np.int64)
    number = np.arange(blocks, dtype=np.uint64)
    zero = np.zeros(blocks, np.uint64)
    words = philox(
        seed, number, zero, zero + np.uint64(draw & _LOW), zero + np.uint64(stream + index)
    )
    return np.stack(words, axis=1).reshape(-1)[:count].astype(np.int64)


def threshold(alpha: float) -> int:
    return int(np.floor(float(alpha) * 2.0**32))


# -- values as the specification sees them -------------------------------------------------------


def flat(x: torch.Tensor) -> np.ndarray:
    """Returns a tensor's values in row-major order as float64; complex ones as pairs of reals."""
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.resolve_neg().to(torch.float64, copy=True).reshape(-1).numpy()


def real_dtype(x: torch.Tensor) -> torch.dtype:
    return x.dtype.to_real()


def rounded(values: np.ndarray, dtype: torch.dtype, words: np.ndarray | None = None) -> np.ndarray:
    """Rounds to a storage dtype: to nearest, or by a draw's words (bfloat16)."""
    made = torch.from_numpy(np.ascontiguousarray(values))
    if words is None:
        return made.to(dtype).to(torch.float64).numpy()
    single = made.to(torch.float32)
    bits = single.view(torch.int32).to(torch.int64).numpy() & _LOW
    cut = ((bits + (words & 0xFFFF)) >> 16 << 16) & _LOW
    cut = cut.astype(np.uint32).view(np.float32).astype(np.float64)
    single = single.to(torch.float64).numpy()
    return np.where(np.isfinite(single), cut, single)


def within(actual, ball, dtype: torch.dtype, words: np.ndarray | None = None) -> np.ndarray:
    """Returns of every element whether it is what ``ball`` may become in ``dtype``.

    Where the exact value is inf or NaN, any of both will do: which one it is depends on the order
    of operations (torch's own kernels disagree). An infinite error stands for "cannot be told".
    """
    value, error = ball
    low, high = value - error, value + error
    good = (rounded(low, dtype, words) <= actual) & (actual <= rounded(high, dtype, words))
    strange = ~np.isfinite(value)
    if strange.any() or not np.isfinite(error).all():
        good = np.where(strange, ~np.isfinite(actual), good | ~np.isfinite(error))
    return good


class Arithmetic:
    """Operations on (value, error) in a precision: float32, or float64 where parameters are."""

    def __init__(self, double: bool, extreme: bool) -> None:
        # The model's own float64 errs as much as the library's, hence a few units there.
        self.unit = 2.0**-50 if double else 2.0**-24
        self.least = 1e-300 if double else 2.0**-149
        self.top = np.finfo(np.float64 if double else np.float32).max
        # Only then can anything overflow, which costs a look at every intermediate result.
        self.extreme = extreme

    def _made(self, value, error):
        error = error + (self.unit * np.abs(value) + self.least)
        if self.extreme:
            size = np.abs(value)
            value = np.where(size - error > self.top, np.copysign(np.inf, value), value)
            error = np.where(
                np.isfinite(value), np.where(size + error > self.top, np.inf, error), 0.0
            )
        return value, error

    def add(self, a, b):
        return self._made(a[0] + b[0], a[1] + b[1])

    def sub(self, a, b):
        return self._made(a[0] - b[0], a[1] + b[1])

    def mul(self, a, b):
        return self._made(a[0] * b[0], np.abs(a[0]) * b[1] + np.abs(b[0]) * a[1] + a[1] * b[1])

    def div(self, a, b):
        value = a[0] / b[0]
        least = np.abs(b[0]) - b[1]
        error = np.where(least > 0, (a[1] + np.abs(value) * b[1]) / least, np.inf)
        if self.extreme:
            error = np.where(np.isinf(b[0]) & np.isfinite(a[0]), 0.0, error)
        return self._made(value, error)

    def sqrt(self, a):
        value = np.sqrt(a[0])
        error = np.where(a[0] > a[1], a[1] / np.where(value > 0, value, 1), np.sqrt(a[0] + a[1]))
        if self.extreme:
            error = np.where(np.isfinite(value), error, 0.0)
        return self._made(value, error)

    def constant(self, value):
        """A number that was computed in double precision and is rounded once."""
        value = np.asarray(value, dtype=np.float64)
        return value, self.unit * np.abs(value)

    def lerp(self, a, b, weight):
        """(1 - weight) a + weight b, whichever of the usual ways it is computed."""
        value = (1 - weight) * a[0] + weight * b[0]
        error = (1 - weight) * a[1] + weight * b[1]
        size = np.abs(a[0]) + np.abs(b[0])
        error = error + 2 * self.unit * (
            (1 - weight) * np.abs(a[0])
            + weight * np.abs(b[0])
            + np.minimum(weight, 1 - weight) * size
        )
        return self._made(value, error)


def exact(value: np.ndarray):
    return value, np.zeros_like(value)


def where(mask, a, b):
    return np.where(mask, a[0], b[0]), np.where(mask, a[1], b[1])


# -- task boundaries ----------------------------------------------------------------------------


@dataclass
class Moment:
    """What is known of a parameter at a task boundary; arrays are flat float64."""

    double: bool
    size: int
    square: np.ndarray | None  # exp_avg_sq, if a step was made
    beta2: float
    step: float
    former: np.ndarray | None  # F of the boundary before
    given: np.ndarray | None = None  # a sum that takes the place of the present one

    @property
    def known(self) -> bool:
        return any(x is not None for x in (self.square, self.former, self.given))

    def ops(self) -> Arithmetic:
        arrays = [x for x in (self.square, self.former, self.given) if x is not None and x.size]
        return Arithmetic(self.double, any(not np.abs(x).max() < 1e12 for x in arrays))

    def present(self):
        """The second moment of the present task, corrected for its beginning at 0."""
        if self.square is None:
            return exact(np.zeros(self.size))
        ops = self.ops()
        return ops.div(exact(self.square), ops.constant(1 - self.beta2**self.step))

    def total(self, mean: float):
        """The sum over all boundaries so far and the present task."""
        if self.given is not None:
            return exact(self.given)
        if self.former is None:
            return self.present()
        ops = self.ops()
        former = ops.mul(exact(self.former), ops.constant(mean))
        return former if self.square is None else ops.add(self.present(), former)


def importance(moments: list[Moment], mean: float):
    """Returns the mean of the sums over all elements, and F of every parameter: balls."""
    totals = [moment.total(mean) for moment in moments]
    count = max(1, sum(moment.size for moment in moments))
    value = sum(float(x.sum()) for x, _ in totals) / count
    error = sum(float(e.sum()) for _, e in totals) / count + 2.0**-52 * count * abs(value)
    made = []
    for moment, total in zip(moments, totals, strict=True):
        ops = moment.ops()
        made.append(ops.div(total, (np.float64(value), error + ops.constant(value)[1])))
    return (value, error), made


def share_of_task(parts, mean: float):
    """The a of merge_anchor("fisher"): <d, v d> / <d, (v + sum of v) d>; a ball.

    Args:
        parts: For each parameter its `Moment` and d, float64.
        mean: Of the boundary before.
    """
    top, bottom = np.zeros(2), np.zeros(2)
    for moment, d in parts:
        total, present = moment.total(mean), moment.present()
        squares = d * d
        bottom += np.dot(squares, total[0]), np.dot(squares, total[1])
        # What the present task adds to the sum is known as well as the sum is.
        top += np.dot(squares, present[0]), np.dot(squares, present[1] + total[1])
    if not bottom[0] > bottom[1]:
        return (1.0, 0.0) if not bottom.any() else (0.5, 0.5)
    value, error = _quotient(tuple(top), tuple(bottom))
    low, high = (min(1.0, max(0.0, x)) for x in (value - error, value + error))
    return (low + high) / 2, (high - low) / 2 + 2.0**-50


def merged(theta: np.ndarray, anchor: np.ndarray, share, ops: Arithmetic):
    """θ* + a (θ - θ*), a ball; ``share`` is a ball, too."""
    d = ops.sub(exact(theta), exact(anchor))
    return ops.add(exact(anchor), ops.mul(d, (np.float64(share[0]), share[1] + ops.unit)))


# -- one step -----------------------------------------------------------------------------------


@dataclass
class Row:
    """One parameter at one step; arrays are flat float64, what is stored and not yet rounded."""

    index: int  # j: its place over all groups
    group: int
    double: bool  # computed in float64
    theta: np.ndarray  # what is stepped: the master weight if there is one
    g: np.ndarray | None
    r: np.ndarray | None = None
    anchor: np.ndarray | None = None
    importance: np.ndarray | None = None  # F
    state: dict[str, np.ndarray] = field(default_factory=dict)
    step: float = 0.0
    first: bool = False  # SGD's buffer becomes G
    # Squared distance before somebody wrote into the weights behind autograd's back: the
    # documentation allows the norm (not the pull) to be the old one.
    stale: float | None = None

    @property
    def active(self) -> bool:
        return self.g is not None or self.r is not None


@dataclass
class Stepped:
    """What a step does: a ball for everything that it writes, by row and name."""

    rows: dict[int, dict[str, Any]]
    injected: bool
    pulled: int
    scale: Any = None  # ball, or of norm_scope "tensor" a ball by row
    grad_norm: Any = None
    distance: Any = None
    clip: Any = None
    # Of alpha="auto": "yes", "no" or, within the precision, "perhaps" by row; and its statistics.
    pulls: dict[int, str] | None = None
    alignment: Any = None
    pull: Any = None
    # By row, where the pull goes by another route: what the second moment is made of, and what the
    # parameter is moved by outside of the moments, less the learning rate.
    second: dict[int, Any] = field(default_factory=dict)
    shift: dict[int, Any] = field(default_factory=dict)


def _norm(parts, units):
    """A norm of balls: the error of the sum (float32 partials) on top of that of its terms."""
    square = sum(float(np.dot(v, v)) for v, _ in parts)
    error = sum(float(np.dot(e, e)) for _, e in parts)
    count = sum(v.size for v, _ in parts)
    value = np.sqrt(square)
    unit = max(units, default=2.0**-52)
    return value, np.sqrt(error) + value * (count + 8) * unit


def _ratio_to_one(top, bottom, unit):
    """min(1, top / bottom) of scalar balls."""
    value = top[0] / bottom[0]
    least = bottom[0] - bottom[1]
    error = (top[1] + value * bottom[1]) / least if least > 0 else np.inf
    error += 4 * unit * value
    return (1.0, max(0.0, 1.0 - (value - error))) if value >= 1 else (value, error)


def difference(row: Row, ops: Arithmetic, weight: float):
    """Equation (3): u of a row with an anchor; ``weight`` is the option ``importance``."""
    value, error = ops.sub(exact(row.theta), exact(row.anchor))
    d = value, np.where(value == 0, 0.0, error)  # equal numbers differ by nothing
    if not weight:
        return d
    factor = ops.add(ops.constant(1 - weight), ops.mul(ops.constant(weight), exact(row.importance)))
    value, error = ops.mul(d, factor)
    return value, np.where((d[0] == 0) & np.isfinite(value), 0.0, error)


def guide(rows: list[Row], groups: list[dict], wide: dict, divisor: float = 1.0):
    """Equations (1) to (5) and (7): returns (G by row, Stepped without the base optimizer's part).

    A group whose ``alpha`` is ``"auto"`` is guided by (7).
    """
    active = [row for row in rows if row.active]
    guided = [row for row in active if row.anchor is not None]
    weight = float(wide["replay_weight"])
    h, g, d, plain_r, arithmetic = {}, {}, {}, {}, {}
    for row in active:
        given = [x for x in (row.g, row.r, row.theta) if x is not None and x.size]
        extreme = any(not np.abs(x).max() < 1e12 for x in given)
        ops = arithmetic[row.index] = Arithmetic(row.double, extreme)
        scaled = ops.constant(divisor)
        if row.g is not None:
            g[row.index] = exact(row.g) if divisor == 1 else ops.div(exact(row.g), scaled)
            h[row.index] = g[row.index]
        if row.r is not None:
            plain_r[row.index] = exact(row.r) if divisor == 1 else ops.div(exact(row.r), scaled)
            r = exact(row.r) if weight == 1 else ops.mul(exact(row.r), ops.constant(weight))
            r = r if divisor == 1 else ops.div(r, scaled)
            h[row.index] = r if row.g is None else ops.add(h[row.index], r)
        if row.anchor is not None:
            d[row.index] = difference(row, ops, float(wide.get("importance", 0.0)))

    limits = [
        0 if not float(group["strength"]) > 0 or group["alpha"] == "auto"
        else threshold(group["alpha"])
        for group in groups
    ]  # fmt: skip
    seed, draw = wide["seed"], wide["draw_index"]
    masks = {}
    for row in guided:
        limit, count = limits[row.group], row.theta.size
        if not limit:
            continue
        if wide["granularity"] == "step":
            hit = step_word(seed, draw) < limit
        elif wide["granularity"] == "tensor":
            hit = tensor_word(seed, draw, row.index) < limit
        else:
            hit = True
            masks[row.index] = element_words(seed, draw, row.index, count) < limit
        if hit:
            masks.setdefault(row.index, np.ones(count, bool))
    made = Stepped({}, injected=bool(masks), pulled=len(masks))

    def units(chosen):
        return [arithmetic[row.index].unit for row in chosen]

    clip = (1.0, 0.0)
    if wide["max_grad_norm"] is not None:
        total = _norm([h[row.index] for row in active], units(active))
        clip = _clip(float(wide["max_grad_norm"]), total, max(units(active), default=2.0**-52))
        made.clip = clip
    scales = {}
    if masks and wide["scaling"]:
        made.grad_norm = _norm([g[row.index] for row in guided if row.index in g], units(guided))
        made.distance = _distance(guided, d, units(guided))
        if wide["norm_scope"] == "tensor":
            for row in guided:
                norm = _norm([g[row.index]] if row.index in g else [], units([row]))
                scales[row.index] = _scale(clip, norm, _distance([row], d, units([row])))
            made.scale = scales
        else:
            one = _scale(clip, made.grad_norm, made.distance)
            scales = {row.index: one for row in guided}
            made.scale = one
    elif masks:
        scales = {row.index: (1.0, 0.0) for row in guided}
        made.scale = scales if wide["norm_scope"] == "tensor" else (1.0, 0.0)

    automatic = [group["alpha"] == "auto" for group in groups]
    pulling = [auto and float(g["strength"]) > 0 for auto, g in zip(automatic, groups, strict=True)]
    replayed = any(row.r is not None for row in rows)
    if replayed and any(pulling) and any(row.anchor is not None for row in rows):
        chosen = [row for row in guided if pulling[row.group]]
        pairs = zip(automatic, groups, strict=True)
        ascends = any(auto and group.get("maximize", False) for auto, group in pairs)
        scales = _guard(chosen, (h, d, plain_r), clip, wide, ascends, arithmetic, made)
        masks = {
            row.index: np.ones(row.theta.size, bool)
            for row in chosen
            if made.pulls[row.index] != "no"
        }
        made.injected, made.pulled = bool(masks), len(masks)

    total = {}
    for row in active:
        ops = arithmetic[row.index]
        ops.extreme = ops.extreme or not np.isfinite(clip[0])
        c = (np.float64(clip[0]), clip[1] + ops.unit * clip[0] + ops.least)
        G = h[row.index] if clip == (1.0, 0.0) else ops.mul(h[row.index], c)
        if groups[row.group].get("maximize", False):
            # A foreign optimizer negates what it is given, so the pull is negated instead.
            G = (-G[0], G[1]) if not wide.get("foreign") else G
        if row.index in masks:
            strength = float(groups[row.group]["strength"])
            value, error = scales[row.index]
            value, error = strength * value, strength * error
            pull = ops.mul(d[row.index], (value, error + 2 * ops.unit * value + ops.least))
            if value == 0 and not error:  # nothing pulls, be it times inf
                pull = np.zeros_like(pull[0]), np.zeros_like(pull[1])
            if wide.get("foreign") and groups[row.group].get("maximize", False):
                pull = -pull[0], pull[1]
            plain, route = G, wide.get("route", "gradient")
            if route == "decoupled":
                none = np.zeros_like(pull[0]), np.zeros_like(pull[1])
                made.shift[row.index] = where(masks[row.index], pull, none)
            else:
                G = where(masks[row.index], ops.add(G, pull), G)
            if route == "first_moment":
                made.second[row.index] = plain
        total[row.index] = G
        made.rows[row.index] = {"G": G}
    return total, made


def _product(rows, xs, ys, arithmetic):
    """A sum of products of balls over rows, of which some may have none."""
    value, error, size, count, unit, least = 0.0, 0.0, 0.0, 0, 2.0**-52, 0.0
    for row in rows:
        if row.index not in xs or row.index not in ys:
            continue
        x, y = xs[row.index], ys[row.index]
        value += float(np.dot(x[0], y[0]))
        size += float(np.dot(np.abs(x[0]), np.abs(y[0])))
        error += float(np.dot(np.abs(x[0]), y[1]) + np.dot(x[1], np.abs(y[0]) + y[1]))
        ops = arithmetic[row.index]
        count, unit = count + row.theta.size, max(unit, ops.unit)
        # What is too small for the precision is lost, but of two numbers alone.
        least += ops.least * np.count_nonzero((np.abs(x[0]) + x[1]) * (np.abs(y[0]) + y[1]))
    return value, error + size * (count + 8) * unit + least


def _guard(rows, vectors, clip, wide, ascends: bool, arithmetic, made: Stepped) -> dict:
    """Equation (7): the ball of a / strength by row; fills in the statistics.

    Args:
        rows: The guided rows that have a gradient.
        vectors: h, u and r by row.
        clip: The ball of c.
        wide: Options of the whole optimizer.
        ascends: The objective is maximized.
        arithmetic: By row.
        made: What the statistics go into.
    """
    h, u, r = vectors

    def sums(chosen):
        units = [arithmetic[row.index].unit for row in chosen]
        head = _norm([h[row.index] for row in chosen], units)
        pull = _norm([u[row.index] for row in chosen], units)
        conflict = _product(chosen, h, r, arithmetic)
        back = _product(chosen, u, r, arithmetic)
        if ascends:
            back = -back[0], back[1]
        return head, pull, conflict, back

    whole = sums(rows)
    head, pull, conflict, _ = whole
    units = [arithmetic[row.index].unit for row in rows]
    length = _norm([r[row.index] for row in rows if row.index in r], units)
    made.grad_norm, made.distance = head, pull
    if wide["norm_scope"] == "tensor":
        balls = {row.index: _strength(clip, *sums([row])) for row in rows}
        made.scale = {i: ball for i, (ball, _) in balls.items()}
    else:
        one = _strength(clip, *whole)
        balls = {row.index: one for row in rows}
        made.scale = one[0]
    made.pulls = {i: sure for i, (_, sure) in balls.items()}
    made.alignment = _quotient(conflict, (head[0] * length[0], head[0] * length[1]
                                          + head[1] * length[0] + head[1] * length[1]))  # fmt: skip
    lengths = []
    for row in rows:
        (a, wrong), _ = balls[row.index]
        value, error = _norm([u[row.index]], [arithmetic[row.index].unit])
        lengths.append((a * value if a else 0.0, a * error + wrong * (value + error)))
    value = np.sqrt(sum(x * x for x, _ in lengths))
    made.pull = _quotient((value, np.sqrt(sum(e * e for _, e in lengths))), head)
    return {i: ball for i, (ball, _) in balls.items()}


def _quotient(top, bottom):
    """A quotient of scalar balls that is 0 where the divisor is."""
    if bottom[0] == 0:
        return 0.0, 0.0
    value, least = top[0] / bottom[0], bottom[0] - bottom[1]
    return value, (top[1] + abs(value) * bottom[1]) / least if least > 0 else np.inf


def _strength(clip, head, pull, conflict, back):
    """Equation (7) of its sums: (the ball of a / strength, whether it pulls at all)."""
    numbers = (*clip, *head, *pull, *conflict, *back)
    if not all(np.isfinite(x) for x in (head[0], pull[0], conflict[0], back[0], clip[0])):
        return (0.0, 0.0), "no"
    if not all(np.isfinite(numbers)):
        return (0.0, np.inf), "perhaps"
    if conflict[0] >= conflict[1] or -back[0] >= back[1] or pull[0] == 0:
        return (0.0, 0.0), "no"

    def least(c, toward, away, longest, shortest):
        enough = c * toward / away if away > 0 else np.inf
        return min(enough, c * longest / shortest if shortest > 0 else np.inf)

    sure = conflict[0] < -conflict[1] and back[0] > back[1] and clip[0] > clip[1]
    low, high = 0.0, least(
        clip[0] + clip[1], conflict[1] - conflict[0], back[0] - back[1], head[0] + head[1],
        pull[0] - pull[1],
    )  # fmt: skip
    if sure:
        low = least(
            clip[0] - clip[1], -conflict[0] - conflict[1], back[0] + back[1],
            max(head[0] - head[1], 0.0), pull[0] + pull[1],
        )  # fmt: skip
    if high == 0:
        return (0.0, 0.0), "no"
    if not np.isfinite(high):
        return (0.0, np.inf), "perhaps"
    value = (low + high) / 2
    return (value, value - low + 2.0**-50 * value), "yes" if low > 0 else "perhaps"


def _clip(bound: float, total, unit: float):
    if not np.isfinite(total[0]):
        return (np.nan, 0.0) if np.isnan(total[0]) else (0.0, 0.0)
    value = bound / (total[0] + 1e-6)
    # Of a total that is nothing but its error the quotient is bound / 1e-6 at most.
    low = bound / (total[0] + total[1] + 1e-6)
    high = bound / (max(total[0] - total[1], 0.0) + 1e-6)
    low, high = min(1.0, low * (1 - 4 * unit)), min(1.0, high * (1 + 4 * unit))
    value = min(1.0, value)
    return value, max(value - low, high - value)


def _distance(rows, d, units):
    norm = _norm([d[row.index] for row in rows], units)
    stale = [row for row in rows if row.stale is not None]
    if not stale:
        return norm
    if not all(np.isfinite(row.stale) for row in stale):
        return norm[0], np.inf  # cannot be told
    # Somewhere between the norms with and without what was changed unseen.
    now = [float(np.dot(d[row.index][0], d[row.index][0])) for row in rows]
    low = np.sqrt(
        sum(min(x, x if row.stale is None else row.stale) for x, row in zip(now, rows, strict=True))
    )
    high = np.sqrt(
        sum(max(x, x if row.stale is None else row.stale) for x, row in zip(now, rows, strict=True))
    )
    return (low + high) / 2, (high - low) / 2 + norm[1] + (high - low) * 1e-5


def _scale(clip, grad, distance):
    """Equation (4) without the strength; 0 where a norm is 0 or not finite."""
    if not (np.isfinite(grad[0]) and np.isfinite(distance[0]) and np.isfinite(clip[0])):
        return 0.0, 0.0
    if grad[0] == 0 or (distance[0] == 0 and distance[1] == 0):
        return 0.0, 0.0
    if distance[0] <= distance[1]:
        return 0.5, 0.5  # 0 or anything: a distance that may be the old one
    top = clip[0] * grad[0], clip[0] * grad[1] + clip[1] * grad[0]
    return _ratio_to_one(top, distance, 2.0**-24)


def step(
    kind: str, rows: list[Row], groups: list[dict], wide: dict, divisor: float = 1.0
) -> Stepped:
    """A whole step: guidance, then Adam ("adam") or SGD ("sgd") of every row with a gradient."""
    total, made = guide(rows, groups, wide, divisor)
    for double in (False, True):
        chosen = [row for row in rows if row.active and row.double == double]
        if chosen:
            _base(kind, chosen, groups, total, made)
    return made


def base(kind: str, rows: list[Row], groups: list[dict]) -> Stepped:
    """Adam or SGD on gradients that are G already."""
    made = Stepped({row.index: {} for row in rows if row.active}, False, 0)
    total = {
        row.index: exact(-row.g if groups[row.group].get("maximize") else row.g)
        for row in rows
        if row.active
    }
    for double in (False, True):
        chosen = [row for row in rows if row.active and row.double == double]
        if chosen:
            _base(kind, chosen, groups, total, made)
    return made


def _base(kind, rows, groups, total, made) -> None:
    # All rows of a precision at once: numpy's cost is per call, not per element.
    sizes = [row.theta.size for row in rows]

    def spread(values):
        return np.repeat(np.asarray(values, np.float64), sizes)

    def each(name, default=0.0):
        return spread([float(groups[row.group].get(name, default)) for row in rows])

    def joined(name):
        return exact(
            np.concatenate(
                [row.state.get(name, np.zeros(n)) for row, n in zip(rows, sizes, strict=True)]
            )
        )

    theta = exact(np.concatenate([row.theta for row in rows]))

    def balls(by_row, otherwise):
        return tuple(
            np.concatenate([by_row.get(row.index, otherwise(row))[part] for row in rows])
            for part in (0, 1)
        )

    G = balls(total, lambda row: None)
    second = balls(made.second, lambda row: total[row.index])
    shift = balls(made.shift, lambda row: exact(np.zeros_like(row.theta)))
    held = [theta[0], G[0], *(x for row in rows for x in row.state.values())]
    lr, decay = each("lr"), each("weight_decay")
    extreme = any(x.size and not np.abs(x).max() < 1e12 for x in (*held, lr, decay))
    ops = Arithmetic(rows[0].double, extreme)
    decoupled = each("decoupled").astype(bool)
    out = {}
    if kind == "adam":
        shrunk = ops.mul(theta, ops.constant(1 - lr * decay))
        added = ops.add(G, ops.mul(ops.constant(decay), theta))
        theta = where(decoupled & (decay != 0), shrunk, theta)
        G = where(~decoupled & (decay != 0), added, G)
        added = ops.add(second, ops.mul(ops.constant(decay), exact(held[0])))
        second = where(~decoupled & (decay != 0), added, second)
        beta1 = spread([float(groups[row.group]["betas"][0]) for row in rows])
        beta2 = spread([float(groups[row.group]["betas"][1]) for row in rows])
        k = spread([row.step + 1 for row in rows])
        m = ops.lerp(joined("exp_avg"), G, 1 - beta1)
        new = ops.mul(ops.mul(ops.constant(1 - beta2), second), second)
        if extreme:
            # (1 - β2) G² overflows or not by the order of its factors.
            again = ops.mul(ops.constant(1 - beta2), ops.mul(second, second))
            differ = np.isfinite(new[0]) != np.isfinite(again[0])
            new = new[0], np.where(differ, np.inf, new[1])
        v = ops.add(ops.mul(joined("exp_avg_sq"), ops.constant(beta2)), new)
        amsgrad = each("amsgrad").astype(bool)
        largest = v
        if amsgrad.any():
            former = joined("max_exp_avg_sq")
            value = np.maximum(former[0], v[0])
            # The larger of two: as far off as the one that may vary.
            largest = where(amsgrad, (value, np.where(np.isfinite(value), v[1], 0.0)), v)
            out["max_exp_avg_sq"] = largest
        root = ops.div(ops.sqrt(largest), ops.constant(np.sqrt(1 - beta2**k)))
        denominator = ops.add(root, ops.constant(each("eps")))
        rate = ops.constant(lr / (1 - beta1**k))
        moved = ops.div(ops.mul(rate, m), denominator)
        other = ops.mul(rate, ops.div(m, denominator)) if extreme else moved
        if made.shift:
            theta = ops.sub(theta, ops.mul(ops.constant(lr), shift))
        theta = ops.sub(theta, moved)
        if extreme:
            differ = np.isfinite(moved[0]) != np.isfinite(other[0])
            theta = theta[0], np.where(differ, np.inf, theta[1])
        out.update(exp_avg=m, exp_avg_sq=v, theta=theta)
    else:
        G = where(decay != 0, ops.add(G, ops.mul(ops.constant(decay), theta)), G)
        momentum, dampening = each("momentum"), each("dampening")
        used = momentum != 0
        first = spread([row.first for row in rows]).astype(bool)
        buffer = ops.add(
            ops.mul(joined("momentum_buffer"), ops.constant(momentum)),
            ops.mul(ops.constant(1 - dampening), G),
        )
        buffer = where(first, G, buffer)
        nesterov = each("nesterov").astype(bool)
        ahead = ops.add(G, ops.mul(ops.constant(momentum), buffer))
        G = where(used, where(nesterov, ahead, buffer), G)
        out["momentum_buffer"] = buffer
        if made.shift:
            theta = ops.sub(theta, ops.mul(ops.constant(lr), shift))
        out["theta"] = ops.sub(theta, ops.mul(ops.constant(lr), G))
    start = 0
    for row, size in zip(rows, sizes, strict=True):
        for name, (value, error) in out.items():
            made.rows[row.index][name] = value[start : start + size], error[start : start + size]
        made.rows[row.index]["step"] = row.step + 1
        start += size
