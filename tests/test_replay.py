# SPDX-License-Identifier: BSD-3-Clause
"""dgg.ReplayBuffer: what is kept, what is dealt, and that a resumed buffer has the same future."""

from __future__ import annotations

import copy
import io
import json
import random
from collections import Counter

import pytest
import torch

from dgg.replay import ReplayBuffer


def test_a_fixed_number_of_each_task():
    buffer = ReplayBuffer(5, seed=1)
    assert buffer.add_task(range(100), "a") == 5
    assert buffer.add_task(range(100, 103), "b") == 3  # all there are
    assert buffer.add_task(iter(range(200, 300)), "c") == 5  # no len(): the reservoir
    assert len(buffer) == 13
    assert buffer.tasks == ("a", "b", "c")
    assert len(set(buffer.examples("a"))) == 5
    assert set(buffer.examples("a")) <= set(range(100))
    assert sorted(buffer.examples("b")) == [100, 101, 102]
    assert set(buffer.examples("c")) <= set(range(200, 300))
    assert list(buffer) == buffer.examples("a") + buffer.examples("b") + buffer.examples("c")
    assert "b" in buffer
    assert "d" not in buffer
    assert "'b': 3" in repr(buffer)


def test_default_names_are_numbers():
    buffer = ReplayBuffer(2)
    buffer.add_task("abc")
    buffer.add_task("def")
    assert buffer.tasks == (0, 1)


def test_seeded_and_apart_from_global_generators():
    def contents(seed):
        buffer = ReplayBuffer(10, seed=seed)
        buffer.add_task(range(1000))
        return buffer.examples(0), buffer.sample(25)

    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    first = contents(3)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(6)
    assert contents(3) == first
    assert contents(4) != first


@pytest.mark.parametrize("streamed", [False, True])
def test_every_example_has_the_same_chance(streamed):
    """Chi-square over 4,000 buffers that keep 3 of 12 examples."""
    counts = Counter()
    for seed in range(4000):
        buffer = ReplayBuffer(3, seed=seed)
        buffer.add_task(iter(range(12)) if streamed else range(12))
        counts.update(buffer.examples(0))
    expected = 4000 * 3 / 12
    statistic = sum((counts[k] - expected) ** 2 / expected for k in range(12))
    assert statistic < 31.3  # 0.1 % point of chi-square with 11 degrees of freedom


def test_reservoir_reports_what_it_keeps():
    buffer = ReplayBuffer(2, seed=0)
    kept = [buffer.add(k, "stream") for k in range(50)]
    assert kept[:2] == [True, True]
    assert not all(kept)
    assert len(buffer) == 2


def test_only_what_is_kept_is_read():
    class Slow:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 10_000

        def __getitem__(self, k):
            self.read.append(k)
            return k

    data = Slow()
    ReplayBuffer(4).add_task(data)
    assert len(data.read) == 4


def test_the_deck_goes_round():
    """Nothing comes a second time before everything came once."""
    buffer = ReplayBuffer(4, seed=2)
    buffer.add_task(range(4))
    buffer.add_task(range(10, 14))
    dealt = buffer.sample(24)
    for start in (0, 8, 16):
        assert sorted(dealt[start : start + 8]) == [0, 1, 2, 3, 10, 11, 12, 13]
    assert dealt[:8] != dealt[8:16]
    assert buffer.sample(0) == []


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.125, 1 / 3, 0.3, 0.5, 0.99, 1.0])
def test_the_ratio_is_exact(ratio):
    buffer = ReplayBuffer(3, seed=0)
    buffer.add_task(range(3))
    total = 0
    for made in range(1, 1001):
        count = buffer.share(7, ratio)
        assert 0 <= count <= 7
        total += count
        assert abs(total - ratio * 7 * made) < 1 + 1e-9
    assert total == pytest.approx(ratio * 7000, abs=1)


def test_a_tenth_is_a_tenth():
    """Ten batches of ten at 0.1: ten examples, which a sum of floats misses."""
    buffer = ReplayBuffer(3)
    buffer.add_task(range(3))
    assert [buffer.share(1, 0.1) for _ in range(20)] == ([0] * 9 + [1]) * 2


def test_an_empty_buffer_owes_nothing():
    buffer = ReplayBuffer(3)
    assert [buffer.share(8, 0.5) for _ in range(10)] == [0] * 10
    assert buffer.mix([1, 2, 3], 0.5) == [1, 2, 3]
    buffer.add_task(range(3))
    assert buffer.share(8, 0.5) == 4


def test_mix():
    buffer = ReplayBuffer(4, seed=0)
    buffer.add_task(["old"] * 4)
    assert buffer.mix(["new"] * 8, 0.25) == ["new"] * 6 + ["old"] * 2


def test_batches_one_pass():
    buffer = ReplayBuffer(4, seed=0)
    buffer.add_task([-1, -2, -3, -4])
    made = list(buffer.batches(range(30), 8, 0.25))
    new = [k for batch in made for k in batch if k >= 0]
    assert sorted(new) == list(range(30))
    assert all(sum(k < 0 for k in batch) == 2 for batch in made)
    assert [len(batch) for batch in made] == [8] * 5
    # Nothing old yet: plain shuffled batches, and no empty one at the end.
    assert [len(b) for b in ReplayBuffer(4).batches(range(16), 8, 0.25)] == [8, 8]
    assert [len(b) for b in ReplayBuffer(4).batches(range(17), 8, 0.25)] == [8, 8, 1]


def test_batches_by_steps():
    buffer = ReplayBuffer(4, seed=0)
    buffer.add_task([-1, -2, -3, -4])
    made = list(buffer.batches(range(10), 8, 0.25, steps=20))
    assert [len(batch) for batch in made] == [8] * 20
    new = Counter(k for batch in made for k in batch if k >= 0)
    assert set(new.values()) == {12}  # 120 slots, 10 examples
    assert list(buffer.batches(range(10), 4, 1, steps=2))  # replay alone is fine with steps


def _used():
    buffer = ReplayBuffer(5, seed=9)
    buffer.add_task(range(50), "a")
    for k in range(30):
        buffer.add(torch.full((2,), k), ("stream", 1))
    buffer.sample(3)
    buffer.share(16, 0.1)
    return buffer


def _future(buffer):
    dealt = [buffer.share(16, 0.1) for _ in range(5)]
    dealt += [int(torch.as_tensor(x).sum()) for x in buffer.sample(30)]
    buffer.add_task(range(1000, 2000), "later")
    return dealt + [int(torch.as_tensor(x).sum()) for x in buffer.sample(30)]


@pytest.mark.parametrize("way", ["state_dict", "torch.save", "deepcopy"])
def test_resume(way):
    buffer = _used()
    if way == "deepcopy":
        other = copy.deepcopy(buffer)
    else:
        state = buffer.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other = ReplayBuffer(5, seed=0)
        other.load_state_dict(state)
    assert other.tasks == buffer.tasks
    assert other.seed == 9
    assert _future(other) == _future(buffer)


def test_the_state_is_a_snapshot():
    buffer = _used()
    state = buffer.state_dict()
    ahead = _future(buffer)
    other = ReplayBuffer(5)
    other.load_state_dict(state)
    assert _future(other) == ahead


def test_json_if_the_examples_are():
    buffer = ReplayBuffer(2, seed=0)
    buffer.add_task([[1, 2], [3, 4], [5, 6]], ("domain", 3))
    other = ReplayBuffer(2)
    other.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert other.tasks == (("domain", 3),)
    assert other.sample(4) == buffer.sample(4)


def test_tensors_are_copied():
    batch = torch.arange(8.0, requires_grad=True)
    buffer = ReplayBuffer(8)
    buffer.add_task([{"x": batch[0:2], "y": (batch[2:4], "text")}])
    kept = buffer.examples(0)[0]
    assert kept["x"].untyped_storage().nbytes() == 8  # not the storage of the whole batch
    assert not kept["x"].requires_grad
    with torch.no_grad():
        batch.zero_()
    assert kept["y"][0].tolist() == [2.0, 3.0]
    assert kept["y"][1] == "text"


def test_a_data_set_that_fails_leaves_no_task():
    class Broken:
        def __len__(self):
            return 10

        def __getitem__(self, k):
            raise OSError("disk")

    buffer = ReplayBuffer(3)
    with pytest.raises(OSError, match="disk"):
        buffer.add_task(Broken(), "a")
    assert len(buffer) == 0
    assert "a" not in buffer


def test_a_stream_that_fails_changes_nothing():
    def broken():
        yield from range(5)
        raise OSError("disk")

    buffer, twin = _filled(), _filled()
    for each in (buffer, twin):
        each.sample(2)  # in the middle of a deck
    with pytest.raises(OSError, match="disk"):
        buffer.add_task(broken(), "b")
    assert "b" not in buffer
    assert buffer.state_dict() == twin.state_dict()
    assert buffer.sample(9) == twin.sample(9)


def _filled():
    buffer = ReplayBuffer(3)
    buffer.add_task(range(3), "a")
    return buffer


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ReplayBuffer(0), ValueError, "positive"),
        (lambda: ReplayBuffer(2.5), TypeError, "per_task must be an int"),
        (lambda: ReplayBuffer(True), TypeError, "per_task must be an int"),
        (lambda: ReplayBuffer(2, seed="x"), TypeError, "seed must be an int"),
        (lambda: ReplayBuffer(2).sample(1), ValueError, "empty"),
        (lambda: _filled().sample(-1), ValueError, "negative"),
        (lambda: _filled().sample(1.0), TypeError, "count must be an int"),
        (lambda: _filled().share(8, 1.5), ValueError, r"in \[0, 1\]"),
        (lambda: _filled().share(8, float("nan")), ValueError, r"in \[0, 1\]"),
        (lambda: _filled().share(-1, 0.5), ValueError, "batch_size"),
        (lambda: _filled().add_task(range(3), "a"), ValueError, "already"),
        (lambda: _filled().add_task([], "b"), ValueError, "empty"),
        (lambda: _filled().add_task({"train": [1]}), TypeError, "not dict; of a dict of splits"),
        (lambda: _filled().add_task(5), TypeError, "not int"),
        (lambda: _filled().add_task(iter([]), "b"), ValueError, "empty"),
        (lambda: _filled().add(1, []), TypeError, "hashable"),
        (lambda: _filled().examples("b"), KeyError, "no task 'b'"),
        (lambda: list(_filled().batches([], 4, 0.5)), ValueError, "empty"),
        (lambda: list(_filled().batches([1], 0, 0.5)), ValueError, "positive"),
        (lambda: list(_filled().batches([1], 4, 1.0)), ValueError, "steps"),
        (lambda: _filled().load_state_dict({}), ValueError, "not the state"),
        (
            lambda: ReplayBuffer(4).load_state_dict(_filled().state_dict()),
            ValueError,
            "keeps 3 examples a task, this buffer 4",
        ),
        (
            lambda: _filled().load_state_dict({"format": "dgg.ReplayBuffer"}),
            ValueError,
            "the state lacks",
        ),
    ],
)
def test_misuse(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_bad_state_changes_nothing():
    buffer = _filled()
    before = buffer.state_dict()
    bad = copy.deepcopy(before) | {"deck": [["a", 7]]}
    with pytest.raises(ValueError, match="the deck names example 7"):
        buffer.load_state_dict(bad)
    assert buffer.state_dict() == before
