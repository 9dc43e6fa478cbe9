# SPDX-License-Identifier: BSD-3-Clause
"""dgg.ReplayBuffer: what is kept, what is dealt, and that a resumed buffer has the same future."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import random
import types
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import ChainDataset, DataLoader, Dataset, IterableDataset, TensorDataset

from dgg.replay import ReplayBuffer, drawing


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


def test_ranks_take_other_cards_of_the_same_deck():
    """Together they have what one rank has that takes all, and their buffers stay the same."""
    one, *others = (ReplayBuffer(4, seed=2) for _ in range(4))
    for buffer in (one, *others):
        buffer.add_task(range(4))
        buffer.add_task(range(10, 14))
    for count in (2, 3, 0, 1):  # 18 cards of a deck of 8
        parts = [b.sample(count, rank=k, world_size=3) for k, b in enumerate(others)]
        assert [len(part) for part in parts] == [count] * 3
        assert [x for part in parts for x in part] == one.sample(3 * count)
        assert all(buffer.state_dict() == one.state_dict() for buffer in others)


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


# ---------------------------------------------------------------------------------- copies

Point = namedtuple("Point", ["x", "tags"])


class Row(Point):
    """A named tuple with an attribute, and a __new__ that takes something else."""

    def __new__(cls, both):
        return super().__new__(cls, *both)

    def __getnewargs__(self):
        return (tuple(self),)


class Plain:
    def __init__(self, value):
        self.value = value


@dataclasses.dataclass
class Record:
    x: object
    tags: list


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: object
    tags: list


class Mapped(dict):
    pass


def _examples():
    """One of every kind, none sharing anything with another."""
    tensor, array = torch.ones(3), np.ones(3)
    return {
        "dict": {"x": [1, 2], "y": 0},
        "nested": {"x": [{"deep": [tensor.clone()]}, (tensor.clone(), [1])]},
        "tuple": ([1], tensor.clone()),
        "set": {1, 2},
        "tensor": tensor.clone(),
        "array": array.copy(),
        "objects": np.array([[1], "a"], dtype=object),
        "deque": deque([[1], [2]], maxlen=2),
        "namedtuple": Point(tensor.clone(), ["a"]),
        "odd namedtuple": Row((array.copy(), ["a"])),
        "structseq": torch.max(torch.ones(2, 2), 0),
        "dataclass": Record(tensor.clone(), ["a"]),
        "frozen dataclass": Frozen(tensor.clone(), ["a"]),
        "OrderedDict": OrderedDict(x=[1], y=tensor.clone()),
        "defaultdict": defaultdict(list, x=[1]),
        "dict subclass": Mapped(x=[1], y=array.copy()),
        "UserDict": UserDict(x=[1], y=tensor.clone()),
        "UserList": UserList([[1], tensor.clone()]),
        "object": Plain(5),
        "bytes": bytearray(b"abc"),
    }


def _damage(value):
    """Changes in place whatever can be changed, as deep as it goes."""
    if isinstance(value, torch.Tensor):
        value.mul_(-7)
    elif isinstance(value, np.ndarray):
        for part in value.ravel() if value.dtype == object else ():
            _damage(part)
        value[:] = 0
    elif isinstance(value, (dict, UserDict)):
        for part in value.values():
            _damage(part)
        value.popitem()
        value["new"] = -1
    elif isinstance(value, (list, UserList, deque, tuple)):
        for part in value:
            _damage(part)
        if not isinstance(value, tuple):
            value.pop()
            value.append(-1)
    elif isinstance(value, set):
        value.add(-1)
    elif isinstance(value, bytearray):
        value[0] = 0
    elif isinstance(value, Frozen):
        _damage(value.x)
        _damage(value.tags)
    elif hasattr(value, "__dict__"):
        for name, part in vars(value).items():
            _damage(part)
            setattr(value, name, -1)


def _text(value):
    """The whole content, without identities."""
    if isinstance(value, Plain):
        return f"Plain({value.value!r})"
    extra = sorted(vars(value).items()) if isinstance(value, Row) else ""
    if isinstance(value, (list, UserList, deque, tuple)):
        return f"{type(value).__name__}{[_text(part) for part in value]}{extra}"
    return f"{type(value).__name__}:{value!r}"


KINDS = list(_examples())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_done_to_a_batch_stays_there(kind):
    """A collator that popped a key or padded in place had the memory changed for good."""
    expected = _text(_examples()[kind])
    buffer = ReplayBuffer(1)
    buffer.add_task([_examples()[kind]], "a")
    ways = {
        "sample": lambda: buffer.sample(3),
        "examples": lambda: buffer.examples("a"),
        "iter": lambda: list(buffer),
        "mix": lambda: buffer.mix([None] * 4, 1),
        "batches": lambda: next(buffer.batches([None], 4, 1, steps=1)),
    }
    for name, way in ways.items():
        given = way()
        assert [_text(example) for example in given] == [expected] * len(given), name
        for example in given:
            _damage(example)
        assert kind == "structseq" or _text(given[0]) != expected  # it was damaged
        assert _text(buffer.examples("a")[0]) == expected, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["add", "add_task", "stream", "state", "deepcopy"])
def test_what_is_done_to_the_source_stays_there(kind, way):
    example = _examples()[kind]
    expected = _text(example)
    buffer = ReplayBuffer(1)
    if way == "add":
        buffer.add(example)
    elif way == "stream":
        buffer.add_task(iter([example]))
    else:
        buffer.add_task([example])
    if way in ("state", "deepcopy"):
        other, state = ReplayBuffer(1), buffer.state_dict()
        if way == "state":
            other.load_state_dict(state)
        else:
            other = copy.deepcopy(buffer)
        example, buffer = state["tasks"][0]["examples"][0], other
    _damage(example)
    assert _text(buffer.sample(1)[0]) == expected


def test_containers_of_a_state_are_new_and_tensors_shared():
    buffer = ReplayBuffer(1)
    buffer.add_task([{"x": torch.ones(2), "y": [1]}])
    kept = buffer.state_dict()["tasks"][0]["examples"][0]
    assert kept["x"].data_ptr() == buffer.state_dict()["tasks"][0]["examples"][0]["x"].data_ptr()
    kept["y"].append(2)
    kept.pop("x")
    assert buffer.sample(1)[0]["y"] == [1]
    assert buffer.sample(1)[0]["x"].tolist() == [1.0, 1.0]


def test_tensors_can_be_shared():
    image, array = torch.ones(2), np.ones(2)
    buffer = ReplayBuffer(1, copy_tensors=False)
    buffer.add_task([{"x": image, "y": [array], "z": Record(Plain(1), [])}])
    one, two = buffer.sample(2)
    assert one["x"] is two["x"] is not image
    assert one["y"][0] is two["y"][0] is not array
    assert one["z"].x is two["z"].x
    one["y"].append(1)
    one["z"].tags.append(1)
    one.pop("x")
    (kept,) = buffer
    assert kept.keys() == {"x", "y", "z"}
    assert len(kept["y"]) == 1
    assert kept["z"].tags == []
    assert copy.deepcopy(buffer).copy_tensors is False


def test_what_cannot_be_copied_is_kept_as_it_is():
    class Closing:
        def __del__(self):
            closed.append(self)

    closed = []
    given = [(k for k in range(3)), types.MappingProxyType({"x": 1}), Closing(), torch, len, Plain]
    buffer = ReplayBuffer(10)
    buffer.add_task(given)
    assert {id(example) for example in buffer.sample(6)} == {id(example) for example in given}
    assert not closed


def test_what_contains_itself():
    node = Record(torch.ones(2), [])
    node.tags.append({"parent": node})
    buffer = ReplayBuffer(1)
    buffer.add(node)
    kept = buffer.sample(1)[0]
    assert kept is not node
    assert kept.tags[0]["parent"] is kept
    assert kept.x is not node.x


def test_images():
    images = pytest.importorskip("PIL.Image")
    image = images.new("RGB", (4, 4), "red")
    buffer = ReplayBuffer(1)
    buffer.add_task([{"image": image}])
    image.putpixel((0, 0), (0, 0, 0))
    for _ in range(2):
        kept = buffer.sample(1)[0]["image"]
        assert kept.getpixel((0, 0)) == (255, 0, 0)
        kept.putpixel((0, 0), (0, 0, 0))
        kept.thumbnail((2, 2))


def test_batch_encodings():
    transformers = pytest.importorskip("transformers")
    row = transformers.BatchEncoding({"input_ids": torch.arange(3), "labels": [1, 2]})
    buffer = ReplayBuffer(1)
    buffer.add_task([row])
    for _ in range(2):
        kept = buffer.sample(1)[0]
        assert type(kept) is type(row)
        assert kept["input_ids"].tolist() == [0, 1, 2]
        assert kept.pop("labels") == [1, 2]
        kept["input_ids"][kept["input_ids"] == 0] = -100


# -------------------------------------------------------------------------------- data sets


class Stream(IterableDataset):
    """A stream that knows how long it is."""

    def __len__(self):
        return 7

    def __iter__(self):
        return iter(range(7))


@pytest.mark.parametrize(
    "dataset",
    [Stream(), ChainDataset([Stream(), Stream()]), ChainDataset(iter([Stream()]))],
    ids=["stream", "chain", "chain without length"],
)
def test_streams_that_have_a_length(dataset):
    buffer = ReplayBuffer(3)
    assert buffer.add_task(dataset) == 3
    assert set(buffer.examples(0)) <= set(range(7))


def test_dataset_with_a_length_and_no_indices():
    class Iterated(Dataset):
        __len__, __iter__ = Stream.__len__, Stream.__iter__

    class Neither(Dataset):
        __len__ = Stream.__len__

    buffer = ReplayBuffer(3)
    assert buffer.add_task(Iterated()) == 3
    with pytest.raises(TypeError, match="a sequence or an iterable of examples, not Neither"):
        buffer.add_task(Neither())
    with pytest.raises(TypeError, match=r"needs a data set with len\(\) and indices.*mix"):
        buffer.batches(Stream(), 4, 0.5)


def test_streams_of_hugging_face():
    datasets = pytest.importorskip("datasets")

    class Sized(datasets.IterableDataset):
        def __len__(self):
            return 7

    rows = datasets.Dataset.from_dict({"x": list(range(7))})
    stream = rows.to_iterable_dataset()
    stream.__class__ = Sized
    buffer = ReplayBuffer(3)
    assert buffer.add_task(stream) == buffer.add_task(rows) == 3
    assert all(example.keys() == {"x"} for example in buffer)


def test_rows_of_one_tensor_are_examples():
    rows = torch.arange(20.0).view(10, 2)
    for dataset in (rows, rows.numpy(), list(rows), tuple(rows[:1]), TensorDataset(rows)):
        buffer = ReplayBuffer(4)
        assert buffer.add_task(dataset) == min(4, len(dataset))
        assert all(np.shape(each if len(each) == 2 else each[0]) == (2,) for each in buffer)
    # Two images of one channel are more likely than one row of a tuple of columns.
    assert ReplayBuffer(4).add_task((torch.ones(1, 8, 8), torch.ones(1, 8, 8))) == 2
    assert ReplayBuffer(4).add_task((torch.ones(2), torch.ones(3))) == 2
    assert ReplayBuffer(4).add_task((torch.tensor(1), torch.tensor(2))) == 2


@pytest.mark.parametrize(
    "columns",
    [
        (torch.ones(5, 2), torch.ones(5)),
        (np.ones((5, 2)), np.ones(5)),
        (torch.ones(5, 2), np.ones(5), torch.ones(5)),
    ],
)
def test_columns_are_refused(columns):
    buffer = _filled()
    for call in (
        lambda: buffer.add_task(columns),
        lambda: buffer.batches(columns, 4, 0.5),
    ):
        with pytest.raises(TypeError, match=r"5 rows each.*TensorDataset\(X, Y\) or list\(zip"):
            call()
    with pytest.raises(TypeError, match="mix first, then collate"):
        buffer.mix(columns, 0.5)
    with pytest.raises(TypeError, match="mix first, then collate"):
        buffer.mix({"x": columns[0]}, 0.5)
    assert buffer.state_dict() == _filled().state_dict()


def test_loaders_are_refused():
    loader = DataLoader(range(8), batch_size=4)
    for call in (_filled().add_task, lambda loader: _filled().batches(loader, 4, 0.5)):
        with pytest.raises(TypeError, match=r"has batches, not examples: .* loader\.dataset"):
            call(loader)


# ---------------------------------------------------------------------- resuming a pass

NEW = [f"new {k}" for k in range(20)]


def _in_training():
    buffer = ReplayBuffer(4, seed=3)
    buffer.add_task(["a", "b", "c", "d", "e"], "first")
    buffer.sample(1)
    return buffer


def _through_a_file(buffer):
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = ReplayBuffer(buffer.per_task)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def _through_json(buffer):
    other = ReplayBuffer(buffer.per_task)
    other.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    return other


@pytest.mark.parametrize("through", [_through_a_file, _through_json, copy.deepcopy])
@pytest.mark.parametrize("steps", [None, 3, 13])
@pytest.mark.parametrize("ratio", [0.25, 0.9])
def test_a_pass_goes_on_after_a_load(through, steps, ratio):
    """It began anew, and showed a part of the data set twice."""
    whole = _in_training()
    made = list(whole.batches(NEW, 4, ratio, steps))
    after = list(whole.batches(NEW, 4, ratio, steps))
    for cut in range(len(made) + 1):
        buffer = _in_training()
        first = list(itertools.islice(buffer.batches(NEW, 4, ratio, steps), cut))
        other = through(buffer)
        assert first + list(other.batches(NEW, 4, ratio, steps)) == made
        assert list(other.batches(NEW, 4, ratio, steps)) == after  # and once only
    if steps is None:
        seen = Counter(example for batch in made for example in batch if example in NEW)
        assert seen == Counter(NEW)


def test_a_pass_is_cut_twice():
    made = list(_in_training().batches(NEW, 4, 0.25))
    buffer, again = _in_training(), []
    while len(again) < len(made):
        again.append(next(buffer.batches(NEW, 4, 0.25)))
        buffer = _through_json(_through_json(buffer))  # a state of a state that was not used
    assert again == made


def test_a_call_in_the_same_process_begins_anew():
    buffer = _in_training()
    next(buffer.batches(NEW, 4, 0.25))
    passed = [example for batch in buffer.batches(NEW, 4, 0.25) for example in batch]
    assert set(NEW) <= set(passed)
    assert buffer.state_dict()["pass"] is None  # it came to its end


def test_a_pass_that_is_left_ends_with_the_task():
    buffer = _in_training()
    next(buffer.batches(NEW, 4, 0.25))
    buffer.add_task(NEW, "second")
    assert buffer.state_dict()["pass"] is None
    assert len(list(_through_json(buffer).batches(NEW[:7], 7, 0.0))) == 1


def test_a_pass_of_something_else_is_not_taken_up():
    buffer = _in_training()
    running = buffer.batches(NEW, 4, 0.25, steps=9)
    next(running)
    for dataset, steps, text in (
        (NEW[:19], 9, r"len\(dataset\) = 20, after 1 batches, and this call has 19"),
        (NEW, 8, "steps = 9, after 1 batches, and this call has 8: .*resume=False"),
        (NEW, None, "this call has None"),
    ):
        other = _through_json(buffer)
        before = other.state_dict()
        with pytest.raises(ValueError, match=text):
            next(other.batches(dataset, 4, 0.25, steps))
        assert other.state_dict() == before
        new = other.batches(dataset, 4, 0.0, steps, resume=False)
        assert set(next(new)) <= set(dataset)
    # The size of a batch and its share of replay may differ.
    other = _through_json(buffer)
    rest = list(other.batches(NEW, 2, 0, steps=9))
    assert [len(batch) for batch in rest] == [2] * 8


def test_the_state_has_the_iterator_that_went_last():
    buffer = _in_training()
    one, two = buffer.batches(NEW, 4, 0.0), buffer.batches(NEW[:8], 4, 0.0)
    first = [next(one), next(two), next(one)]
    rest = list(_through_json(buffer).batches(NEW, 4, 0.0))
    assert sorted(first[0] + first[2] + sum(rest, [])) == sorted(NEW)
    assert sum((next(two), first[1]), []) != NEW[:8]  # the other goes on, too
    assert len(list(_through_json(buffer).batches(NEW[:8], 4, 0.0))) == 0


def test_states_from_before_passes_load():
    buffer = _in_training()
    next(buffer.batches(NEW, 4, 0.25))
    state = buffer.state_dict()
    del state["pass"], state["worker"]
    other = ReplayBuffer(4)
    other.load_state_dict(state)
    seen = [example for batch in other.batches(NEW, 4, 0.25) for example in batch]
    assert set(NEW) <= set(seen)


def test_arguments_are_checked_before_the_first_batch():
    with pytest.raises(ValueError, match="positive"):
        _filled().batches(NEW, 0, 0.5)


# ------------------------------------------------------------------------------- workers


class Drawing(Dataset):
    """Each row is what its worker draws."""

    def __init__(self, buffer, rows=8):
        self.buffer, self.rows = buffer, rows

    def __len__(self):
        return self.rows

    def __getitem__(self, k):
        info = torch.utils.data.get_worker_info()
        return (-1 if info is None else info.id), self.buffer.sample(6)


def _drawn(buffer, *, seed, epochs=1, workers=2, **options):
    """For every epoch, what each worker drew, in order."""
    torch.manual_seed(seed)
    loader = DataLoader(
        Drawing(buffer),
        batch_size=None,
        num_workers=workers,
        timeout=120 * bool(workers),
        **options,
    )
    result = []
    for _ in range(epochs):
        by_worker = {}
        for number, drawn in loader:
            by_worker.setdefault(number, []).extend(drawn)
        result.append([by_worker[number] for number in sorted(by_worker)])
    return result


def _for_workers(seed=0):
    buffer = ReplayBuffer(50, seed=seed)
    buffer.add_task(range(50))
    buffer.sample(3)
    return buffer


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_differently(persistent):
    """Each had the generator of the main process, and dealt what all others did."""
    buffer = _for_workers()
    before = buffer.state_dict()
    options = {"persistent_workers": persistent, "multiprocessing_context": "fork"}
    epochs = _drawn(buffer, seed=1, epochs=2, **options)
    assert [len(drawn) for epoch in epochs for drawn in epoch] == [24] * 4
    # Decks of 50 that differ, of both workers and of both epochs.
    assert len({tuple(drawn) for epoch in epochs for drawn in epoch}) == 4
    if persistent:  # which go on: nothing comes twice before all came once
        assert all(len(set(one + two)) == 48 for one, two in zip(*epochs, strict=True))
    assert _drawn(buffer, seed=1, epochs=2, **options) == epochs
    assert _drawn(buffer, seed=2, epochs=2, **options) != epochs
    assert _drawn(_for_workers(seed=1), seed=1, epochs=2, **options) != epochs
    assert buffer.state_dict() == before


def test_spawned_workers_draw_as_forked_ones():
    buffer = _for_workers()
    forked = _drawn(buffer, seed=1, multiprocessing_context="fork")
    assert _drawn(buffer, seed=1, multiprocessing_context="spawn") == forked


def test_a_loader_without_workers_uses_the_buffer_itself():
    expected = _for_workers().sample(48)
    assert _drawn(_for_workers(), seed=1, workers=0) == [[expected]]


def _as_worker(monkeypatch, number, seed=7, **more):
    info = None if number is None else types.SimpleNamespace(id=number, seed=seed, **more)
    monkeypatch.setattr(drawing, "get_worker_info", lambda: info)


def test_a_state_of_a_worker_goes_on_in_that_worker_alone(monkeypatch):
    main = _for_workers()
    expected = _for_workers().sample(9)
    _as_worker(monkeypatch, 0)
    buffer = copy.deepcopy(main)
    first = list(itertools.islice(buffer.batches(range(20), 4, 0.5), 3))
    state = buffer.state_dict()
    ahead = list(buffer.batches(range(20), 4, 0.5, resume=False))
    _as_worker(monkeypatch, 0, seed=8)  # worker seeds differ after a restart
    again = ReplayBuffer(50)
    again.load_state_dict(state)
    rest = list(again.batches(range(20), 4, 0.5))
    new = [k for batch in first + rest for k in batch[:2]]
    assert sorted(new) == list(range(20))
    _as_worker(monkeypatch, 1, seed=8)
    other = ReplayBuffer(50)
    other.load_state_dict(state)
    assert list(other.batches(range(20), 4, 0.5)) not in (rest, ahead)
    _as_worker(monkeypatch, None)
    assert main.sample(9) == expected


def test_workers_shuffle_and_fill_differently(monkeypatch):
    def used():
        buffer = ReplayBuffer(5)
        buffer.add_task(range(100), "a")
        buffer.add_task(iter(range(100)), "b")
        for k in range(100):
            buffer.add(k, "c")
        return list(buffer), next(buffer.batches(range(100), 5, 0.0))

    results = []
    for number in (None, 0, 1):
        _as_worker(monkeypatch, number)
        results.append(used())
        assert used() == results[-1]
    assert len({str(result) for result in results}) == 3
    _as_worker(monkeypatch, 1, worker_method="thread")  # which shares the buffer with others
    assert used() == results[0]


# ---------------------------------------------------------------------- nothing half way


class Broken(Dataset):
    """Fails at the k-th read, by index or in order."""

    def __init__(self, fails, error=None):
        self.fails, self.error, self.read = fails, error or OSError("disk"), 0

    def __len__(self):
        return 10

    def __getitem__(self, k):
        self.read += 1
        if self.read == self.fails:
            raise self.error
        return k

    def stream(self):
        for k in range(10):
            yield self[k]


class Uncopied(dict):
    """Copies itself as often as it was told."""

    left = 0

    def __copy__(self):
        if not Uncopied.left:
            raise MemoryError("no room")
        Uncopied.left -= 1
        return Uncopied(self)


def _twins():
    for _ in range(2):
        buffer = ReplayBuffer(3, seed=1)
        buffer.add_task(range(3), "a")
        buffer.sample(2)
        buffer.share(3, 0.5)
        yield buffer


def _unchanged(buffer, twin):
    assert buffer.state_dict() == twin.state_dict()
    assert buffer.sample(9) == twin.sample(9)


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt("disk")], ids=repr)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fails", [1, 2, 3])
def test_add_task_that_fails_changes_nothing(streamed, fails, error):
    buffer, twin = _twins()
    for extra in (0, 5) if streamed else (0,):  # the reservoir full already
        broken = Broken(fails + extra, error=error)
        with pytest.raises(type(error), match="disk"):
            buffer.add_task(broken.stream() if streamed else broken, "b")
        assert "b" not in buffer
    with pytest.raises(ValueError, match="empty"):
        buffer.add_task(iter([]) if streamed else [], "b")
    _unchanged(buffer, twin)


def test_add_that_fails_changes_nothing():
    buffer, twin = _twins()
    for task in ("b", "a"):
        for _ in range(20):  # of a task that is full the first few may not be kept
            with pytest.raises(MemoryError, match="no room"):
                while True:
                    if not buffer.add(Uncopied(), task):
                        twin.add(Uncopied(), task)
    assert "b" not in buffer
    _unchanged(buffer, twin)


def test_sampling_that_fails_changes_nothing():
    Uncopied.left = 12  # as many as go in
    buffers = []
    for _ in range(2):
        buffer = ReplayBuffer(6)
        buffer.add_task([Uncopied(x=k) for k in range(6)])
        buffers.append(buffer)
    buffer, twin = buffers
    for count, left in ((4, 2), (20, 15), (7, 0)):
        Uncopied.left = left
        for call in (
            lambda count=count: buffer.sample(count),
            lambda count=count: buffer.mix([None] * count, 1.0),
            lambda count=count: next(buffer.batches([None], count, 1.0, steps=1)),
        ):
            with pytest.raises(MemoryError, match="no room"):
                call()
    Uncopied.left = 10**9
    assert buffer.sample(9) == twin.sample(9)
    assert buffer.state_dict() == twin.state_dict()
    Uncopied.left = 0


def test_arguments_that_are_wrong_change_nothing():
    buffer, twin = _twins()
    for call in (
        lambda: buffer.sample(-1),
        lambda: buffer.sample(1.5),
        lambda: buffer.sample(1, rank=2, world_size=2),
        lambda: buffer.sample(1, rank=-1, world_size=2),
        lambda: buffer.sample(1, world_size=0),
        lambda: buffer.sample(1, world_size=1.5),
        lambda: buffer.share(4, 2),
        lambda: buffer.share(4, "x"),
        lambda: buffer.share(4.5, 0.5),
        lambda: buffer.mix(5, 0.5),
        lambda: buffer.mix({1, 2, 3}, 0.5),
        lambda: buffer.add(1, []),
        lambda: buffer.add_task([1], []),
        lambda: buffer.batches([1], 4, 0.5, steps=-1),
        lambda: buffer.batches([1], 4, 0.5, steps=1.5),
        lambda: buffer.batches(5, 4, 0.5),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()
    _unchanged(buffer, twin)


def test_a_batch_that_cannot_be_read_is_made_after_all():
    """The state is that of the last batch; what comes after a load is as without the failure."""
    expected = list(_in_training().batches(range(10), 4, 0.5))
    for fails in range(1, 11):
        buffer, made = _in_training(), []
        with pytest.raises(OSError, match="disk"):
            made.extend(buffer.batches(Broken(fails), 4, 0.5))
        again = _through_json(buffer)
        with pytest.raises(OSError, match="disk"):  # once more, and the pass is still there
            next(again.batches(Broken(1), 4, 0.5))
        assert made + list(again.batches(range(10), 4, 0.5)) == expected


# -------------------------------------------------------------------------- hostile states


def _hostile(state, chance):
    """A copy with one thing wrong, somewhere."""
    state = copy.deepcopy(state)
    values = [
        None, True, False, -1, 0, 1, 3, 2.5, float("nan"), 10**30, 2**32, "x", b"x", "", [], {}, (),
        [1], [[]], [["a", 0]], ["a", 0], {"task": 1}, [0, 0], [1, 0], [-1, 2], [3, 2], [None] * 3,
        [3, [0] * 625, None], [3, [1] * 624, None], object(), np.int64(1), np.float32(2.5),
        np.arange(3), torch.ones(2), torch.tensor(1), Fraction(1, 2), 1j, range(3), {1, 2},
        10**5000,
    ]  # fmt: skip
    holder = state
    while True:
        keys = list(holder if isinstance(holder, dict) else range(len(holder)))
        if not keys:
            holder = state
            continue
        key = chance.choice(keys)
        if isinstance(holder[key], (dict, list)) and chance.random() < 0.75:
            holder = holder[key]
            continue
        break
    what = chance.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder[key], list):
        holder[key] = holder[key][: chance.randrange(len(holder[key]) + 1)]
    elif what == 2 and isinstance(holder[key], list):
        holder[key] = holder[key] * 2
    elif what == 3 and isinstance(holder, list):
        holder.append(chance.choice(holder))
    else:
        holder[key] = chance.choice(values)
    return state


def test_hostile_states():
    """Each is refused, and the buffer as it was, or makes a buffer that works."""
    source = ReplayBuffer(3, seed=2)
    source.add_task(["p", "q", "r", "s"], "a")
    source.add_task([["t"], {"u": 1}], ("b", 2))
    source.share(4, 0.3)
    running = source.batches(range(9), 3, 0.3, steps=5)
    next(running), next(running)
    good = source.state_dict()
    chance = random.Random(0)
    taken = Counter()
    for case in range(600):
        buffer, twin = _in_training_of(3), _in_training_of(3)
        bad = _hostile(good, chance)
        try:
            buffer.load_state_dict(bad)
        except (ValueError, TypeError, KeyError) as error:
            assert str(error), case
            taken["refused"] += 1
            assert buffer.state_dict() == twin.state_dict(), (case, error)
            continue
        taken["loaded"] += 1
        state = buffer.state_dict()
        assert type(state["seed"]) is int
        repr(buffer)
        if len(buffer):
            assert len(buffer.sample(20)) == 20
        assert 0 <= buffer.share(5, 0.1) <= 5
        if state["pass"] is not None and state["pass"]["length"] < 100:
            rows = range(state["pass"]["length"])
            for batch in itertools.islice(buffer.batches(rows, 3, 0.3, state["pass"]["steps"]), 20):
                assert len(batch) <= 3
        for task in buffer.tasks:
            for k in range(5):
                buffer.add(k, task)
        buffer.add_task(range(20), "new")
        twin.load_state_dict(buffer.state_dict())
        if len(buffer):
            assert len(twin.sample(5)) == 5
    assert min(taken.values()) > 50, taken


def _in_training_of(per_task):
    buffer = ReplayBuffer(per_task, seed=4)
    buffer.add_task(range(10), "mine")
    next(buffer.batches(range(4), 2, 0.5))
    return buffer


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format": np.ones(2)}, ValueError, "not the state"),
        ({"per_task": True}, TypeError, "per_task of the state must be an int"),
        ({"seed": "1"}, TypeError, "seed of the state must be an int"),
        ({"seed": 10**5000}, ValueError, "seed of the state must have 1024 bits at most"),
        ({"tasks": {}}, TypeError, "tasks of the state must be a list"),
        ({"tasks": [["a"]]}, TypeError, "a task of the state must be a dict"),
        ({"tasks": [{"task": "a"}]}, ValueError, r"lacks \['examples', 'seen'\]"),
        ({"tasks": [("a", 3, "pqr")]}, TypeError, "examples of task 'a' of the state .* a list"),
        ({"tasks": [("a", -1, [])]}, ValueError, "seen of task 'a' .* must not be negative"),
        ({"tasks": [("a", 2, [1, 2, 3])]}, ValueError, "3 examples of task 'a', of 2 seen"),
        ({"tasks": [("a", 9, [1, 2, 3, 4])]}, ValueError, "and 3 kept at most"),
        ({"tasks": [("a", 1, [1]), ("a", 1, [2])]}, ValueError, "task 'a' twice"),
        ({"tasks": [({}, 1, [1])]}, TypeError, "hashable"),
        ({"tasks": [(np.arange(2), 1, [1])]}, TypeError, "a task must be one number"),
        ({"deck": [["a", 0, 1]]}, ValueError, "a card of the deck .* must have 2 entries"),
        ({"deck": ["a0"]}, TypeError, "a card of the deck .* must be a list"),
        ({"deck": [["a", 0], ["a", 0]]}, ValueError, "names an example twice"),
        ({"deck": [["a", True]]}, TypeError, "must be an int"),
        ({"deck": [[[], 0]]}, ValueError, "which is not there"),
        ({"owed": [1, 0]}, ValueError, "a fraction below 1"),
        ({"owed": [5, 2]}, ValueError, "a fraction below 1"),
        ({"owed": [-1, 2]}, ValueError, "a fraction below 1"),
        ({"owed": [0.5, 1]}, TypeError, "owed of the state must be an int"),
        ({"owed": 5}, TypeError, "owed of the state must be a list"),
        ({"rng": [3, [1] * 624, None]}, ValueError, "not one of random.Random"),
        ({"rng": [3, [1] * 625, "x"]}, TypeError, "rng of the state must be a number"),
        ({"rng": [9, [1] * 625, None]}, ValueError, "not one of random.Random"),
        ({"rng": [3, [0] * 624 + [624], None]}, ValueError, "not one of random.Random"),
        ({"rng": [3, [2**32] * 624 + [624], None]}, ValueError, "not one of random.Random"),
        ({"rng": [3, [1] * 624 + [9999], None]}, ValueError, "not one of random.Random: inv"),
        ({"rng": [3, "x" * 625, None]}, TypeError, "rng of the state must be a list"),
        ({"pass": 5}, TypeError, "pass of the state must be a dict"),
        ({"pass": {"length": 3}}, ValueError, "pass of the state lacks"),
        ({"pass": (3, None, 1, 1, [0, 3])}, ValueError, "order of the state is not one of 3"),
        ({"pass": (3, None, 1, 1, [0, 0])}, ValueError, "order of the state is not one of 3"),
        ({"pass": (3, 2, 3, 1, [0])}, ValueError, "contradicts itself"),
        ({"pass": (3, None, 1, 0, [0])}, ValueError, "contradicts itself"),
        ({"worker": -1}, ValueError, "worker of the state must not be negative"),
        ({"worker": "0"}, TypeError, "worker of the state must be an int"),
    ],
)
def test_what_is_wrong_with_a_state_is_said(change, error, text):
    buffer = _filled()
    before = buffer.state_dict()
    if "tasks" in change and isinstance(change["tasks"], list):
        names = ("task", "seen", "examples")
        change["tasks"] = [
            dict(zip(names, entry, strict=True)) if isinstance(entry, tuple) else entry
            for entry in change["tasks"]
        ]
    if isinstance(change.get("pass"), tuple):
        names = ("length", "steps", "made", "passes", "order")
        change["pass"] = dict(zip(names, change["pass"], strict=True))
    with pytest.raises(error, match=text):
        buffer.load_state_dict(before | change)
    assert buffer.state_dict() == before


def test_a_task_that_is_nested_without_end():
    task = []
    for _ in range(100_000):
        task = [task]
    state = _filled().state_dict()
    state["tasks"][0]["task"] = task
    with pytest.raises(ValueError, match="nested too deeply"):
        _filled().load_state_dict(state)
    while task:
        task = task[0]


# --------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "made", [np.int64, np.array, lambda k: np.array([k]), torch.tensor, lambda k: torch.tensor([k])]
)
def test_numbers_of_other_libraries_are_stored_as_plain_ones(made):
    def used(number):
        buffer = ReplayBuffer(number(5), seed=number(9))
        buffer.add_task(range(50), number(3))
        buffer.add("x", (number(4), "name"))
        dealt = buffer.sample(number(7)) + buffer.mix(["new"] * 4, number(1))
        dealt += next(buffer.batches(range(6), number(4), number(0), number(2)))
        assert number(3) in buffer
        return dealt, buffer.share(number(3), number(1)), buffer.examples(number(3)), buffer

    *expected, plain = used(int)
    *results, buffer = used(made)
    assert results == expected
    assert repr(buffer) == repr(plain)
    assert json.dumps(buffer.state_dict()) == json.dumps(plain.state_dict())
    assert _through_a_file(buffer).state_dict() == plain.state_dict()
    state = plain.state_dict() | {"per_task": made(5), "seed": made(9), "owed": [made(0), made(1)]}
    state["rng"] = [made(3), [made(word) for word in state["rng"][1]], None]
    state["deck"] = [[task, made(k)] for task, k in state["deck"]]
    other = ReplayBuffer(5)
    other.load_state_dict(state)
    assert json.dumps(other.state_dict()) == json.dumps(plain.state_dict())


def test_tasks_of_numpy():
    buffer = ReplayBuffer(1)
    for task in (np.str_("a"), np.int64(1), (np.float32(0.5), np.bool_(True))):
        buffer.add_task([0], task)
    assert json.dumps(buffer.tasks) == '["a", 1, [0.5, true]]'
    assert _through_a_file(buffer).tasks == buffer.tasks


@pytest.mark.parametrize(
    "ratio",
    [0.1, np.float64(0.1), np.float32(0.1), np.float16(0.1), np.array([0.1], dtype=np.float32)]
    + [torch.tensor(0.1), torch.tensor([0.1], dtype=torch.bfloat16), Fraction(1, 10)],
)
def test_a_tenth_is_a_tenth_in_any_precision(ratio):
    buffer = _filled()
    assert [buffer.share(1, ratio) for _ in range(20)] == ([0] * 9 + [1]) * 2
    third = ReplayBuffer(1)
    third.add_task([0])
    assert [third.share(1, Fraction(1, 3)) for _ in range(6)] == [0, 0, 1] * 2


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ReplayBuffer(0), ValueError, "positive"),
        (lambda: ReplayBuffer(2.5), TypeError, "per_task must be an int"),
        (lambda: ReplayBuffer(True), TypeError, "per_task must be an int"),
        (lambda: ReplayBuffer(2, seed="x"), TypeError, "seed must be an int"),
        (lambda: ReplayBuffer(2).sample(1), ValueError, "empty"),
        (lambda: ReplayBuffer(np.bool_(True)), TypeError, "per_task must be an int"),
        (lambda: ReplayBuffer(np.array([2, 3])), TypeError, "per_task must be one number"),
        (lambda: ReplayBuffer(np.float64(2)), TypeError, "per_task must be an int"),
        (lambda: ReplayBuffer(2, seed=10**5000), ValueError, "seed must have 1024 bits"),
        (lambda: ReplayBuffer(2, copy_tensors="no"), TypeError, "copy_tensors must be a bool"),
        (lambda: _filled().sample(True), TypeError, "count must be an int"),
        (lambda: _filled().share(8, True), TypeError, "ratio must be a number"),
        (lambda: _filled().share(8, "0.5"), TypeError, "ratio must be a number"),
        (lambda: _filled().share(8.0, 0.5), TypeError, "batch_size must be an int"),
        (lambda: _filled().batches([1], 4, 0.5, True), TypeError, "steps must be an int"),
        (lambda: _filled().batches([1], 4, 0.5, -1), ValueError, "steps must not be negative"),
        (lambda: _filled().add(1, torch.ones(2)), TypeError, "a task must be one number"),
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


class Named(ReplayBuffer):
    def __init__(self, name):
        super().__init__(3)
        self.name = name


def test_a_copy_of_a_buffer_of_a_subclass_has_what_that_has_added():
    """The copy is made by the constructor, whose arguments are taken for ReplayBuffer's."""
    assert copy.deepcopy(Named("faces")).name == "faces"
