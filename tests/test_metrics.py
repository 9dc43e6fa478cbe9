# SPDX-License-Identifier: BSD-3-Clause
"""dgg.metrics against numbers worked out by hand."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dgg import metrics
from dgg.metrics import AccuracyMatrix

# After task 1: 80. After task 2: 60, 90. After task 3: 50, 70, 95.
ROWS = [
    [80.0, None, None],
    [60.0, 90.0, None],
    [50.0, 70.0, 95.0],
]
SIZES = [100, 300, 600]


def test_hand_computed():
    assert metrics.final_average_accuracy(ROWS) == pytest.approx(215 / 3)
    # (100*50 + 300*70 + 600*95) / 1000 = 83
    assert metrics.final_average_accuracy(ROWS, SIZES) == pytest.approx(83.0)
    # (80 + 75 + 215/3) / 3
    assert metrics.average_incremental_accuracy(ROWS) == pytest.approx((80 + 75 + 215 / 3) / 3)
    # ((50-80) + (70-90)) / 2
    assert metrics.backward_transfer(ROWS) == pytest.approx(-25.0)
    assert metrics.forgetting(ROWS) == pytest.approx(25.0)
    assert metrics.learning_accuracy(ROWS) == pytest.approx((80 + 90 + 95) / 3)
    assert metrics.task_curve(ROWS, 0) == [80.0, 60.0, 50.0]
    assert metrics.task_curve(ROWS, 2) == [95.0]


def test_forgetting_is_not_minus_bwt():
    """The best of a task may come after its own turn; the two then differ."""
    rows = [[50.0, None, None], [70.0, 60.0, None], [40.0, 60.0, 90.0]]
    assert metrics.backward_transfer(rows) == pytest.approx((-10 + 0) / 2)
    assert metrics.forgetting(rows) == pytest.approx((30 + 0) / 2)


def test_two_tasks_are_not_off_by_one():
    """A well-known slip gives forgetting 0 after two tasks."""
    rows = [[80.0, None], [30.0, 90.0]]
    assert metrics.forgetting(rows) == pytest.approx(50.0)
    assert metrics.backward_transfer(rows) == pytest.approx(-50.0)


def test_last_task_can_help():
    rows = [[50.0, None], [60.0, 90.0]]
    assert metrics.forgetting(rows) == pytest.approx(-10.0)
    assert metrics.backward_transfer(rows) == pytest.approx(10.0)


def test_upper_triangle_is_not_used():
    full = [[80.0, 1.0, 2.0], [60.0, 90.0, 3.0], [50.0, 70.0, 95.0]]
    assert metrics.summary(full, SIZES) == metrics.summary(ROWS, SIZES)


def test_forward_transfer():
    full = [[80.0, 30.0, 2.0], [60.0, 90.0, 25.0], [50.0, 70.0, 95.0]]
    # ((30 - 10) + (25 - 20)) / 2
    assert metrics.forward_transfer(full, [5.0, 10.0, 20.0]) == pytest.approx(12.5)
    assert metrics.forward_transfer(full, [5.0, None, 20.0]) is None
    assert metrics.forward_transfer(ROWS, [5.0, 10.0, 20.0]) is None
    with pytest.raises(ValueError, match="2 untrained accuracies for 3 tasks"):
        metrics.forward_transfer(full, [5.0, 10.0])


def test_undefined_is_none_with_a_reason():
    one = AccuracyMatrix.from_rows([[70.0]], sizes=[10])
    assert one.faa() == one.aia() == one.learning() == one.faa_weighted() == 70.0
    assert one.bwt() is None
    assert one.forgetting() is None
    assert set(one.undefined()) == {"bwt", "forgetting"}
    assert "only one task" in one.undefined()["bwt"]

    half = AccuracyMatrix(3)
    half.record(0, 0, 80.0)
    assert all(value is None for value in half.summary().values())
    assert half.undefined()["faa"] == "R[2][0] is missing"
    assert half.undefined()["learning"] == "R[1][1] is missing"
    assert half.undefined()["faa_weighted"] == "the sizes of the test sets are not given"


def test_joint_training_has_a_last_row_only():
    matrix = AccuracyMatrix.from_rows([[None, None], [80.0, 90.0]])
    assert matrix.faa() == 85.0
    assert matrix.aia() is matrix.bwt() is matrix.forgetting() is None


def test_record_and_curves():
    matrix = AccuracyMatrix(["a", "b", "c"], SIZES)
    for i, row in enumerate(ROWS):
        for j in range(i + 1):
            matrix.record(i, j, torch.tensor(row[j]))  # whatever has __float__
    assert matrix.rows == ROWS
    assert matrix == AccuracyMatrix.from_rows(ROWS, ["a", "b", "c"], SIZES)
    assert matrix.curve("b") == matrix.curve(1) == [90.0, 70.0]
    assert matrix.curves() == {"a": [80.0, 60.0, 50.0], "b": [90.0, 70.0], "c": [95.0]}
    assert len(matrix) == 3
    assert "3 of 3" in repr(matrix)
    row = matrix[0]
    row[0] = 0.0
    assert matrix.rows[0][0] == 80.0


def test_json_round_trip(tmp_path):
    matrix = AccuracyMatrix.from_rows(ROWS, ["a", "b", "c"], SIZES)
    path = tmp_path / "matrix.json"
    text = matrix.to_json(path)
    assert path.read_text() == text
    assert AccuracyMatrix.from_json(text) == matrix
    assert AccuracyMatrix.from_json(path) == matrix
    assert AccuracyMatrix.from_json(str(path)) == matrix
    parsed = json.loads(text)
    assert AccuracyMatrix.from_json(parsed) == matrix
    assert parsed["metrics"]["faa_weighted"] == pytest.approx(83.0)


def test_csv_round_trip(tmp_path):
    matrix = AccuracyMatrix.from_rows(ROWS, ["a", 'b, "quoted"', "c"])
    path = tmp_path / "matrix.csv"
    text = matrix.to_csv(path)
    assert AccuracyMatrix.from_csv(text) == matrix
    assert AccuracyMatrix.from_csv(path) == matrix
    assert text.splitlines()[1] == "a,80.0,,"
    third = AccuracyMatrix.from_rows([[100 / 3]])
    assert AccuracyMatrix.from_csv(third.to_csv()).rows == [[100 / 3]]  # not a digit lost


@pytest.mark.parametrize(
    "made", [np.int64, np.array, lambda k: np.array([k]), torch.tensor, lambda k: torch.tensor([k])]
)
def test_numbers_of_other_libraries_are_stored_as_plain_ones(made):
    """json writes nothing of numpy's, and an integer of numpy's is not a list of names."""
    plain = AccuracyMatrix.from_rows(ROWS, sizes=SIZES)
    matrix = AccuracyMatrix(made(3), [made(size) for size in SIZES])
    for i, row in enumerate(ROWS):
        for j in range(i + 1):
            matrix.record(made(i), made(j), made(int(row[j])))
    assert matrix == plain
    assert matrix.to_json() == plain.to_json()
    assert {type(size) for size in matrix.sizes} == {int}
    assert {type(value) for row in matrix.rows for value in row} == {float, type(None)}
    assert matrix[made(1)] == ROWS[1]
    assert matrix.curve(made(1)) == metrics.task_curve(ROWS, made(1)) == [90.0, 70.0]
    whole = [[made(80), None], [made(60), made(90)]]
    assert metrics.summary(whole) == metrics.summary([[80.0, None], [60.0, 90.0]])
    assert metrics.forward_transfer([[80, made(30)], [60, 90]], [made(5), made(10)]) == 20.0


def test_arrays_whole():
    rows = np.array([[80, 10], [60, 90]], dtype=np.float32)
    matrix = AccuracyMatrix.from_rows(rows, np.array(["a", "b"]), np.array([1, 3]))
    assert AccuracyMatrix.from_json(matrix.to_json()) == matrix
    assert {type(name) for name in matrix.tasks} == {str}
    halves = AccuracyMatrix(np.array(["only"]), np.array([0.5], dtype=np.float32))
    assert (halves.tasks, halves.sizes) == (["only"], [0.5])
    assert json.loads(halves.to_json())["sizes"] == [0.5]
    assert metrics.final_average_accuracy(rows, torch.tensor([1, 3])) == (60 + 3 * 90) / 4


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: metrics.summary([]), ValueError, "empty"),
        (lambda: metrics.summary([[1.0, 2.0], [3.0]]), ValueError, "square"),
        (lambda: metrics.summary([[math.nan]]), ValueError, "must be None"),
        (lambda: metrics.summary([[math.inf]]), ValueError, "must be None"),
        (lambda: metrics.summary(ROWS, [1, 2]), ValueError, "2 sizes for 3 tasks"),
        (lambda: metrics.summary(ROWS, [1, 2, 0]), ValueError, "positive"),
        (lambda: metrics.final_average_accuracy(ROWS, [1, 2, -3]), ValueError, "positive"),
        (lambda: metrics.task_curve(ROWS, 3), IndexError, "no task 3"),
        (lambda: AccuracyMatrix(0), ValueError, "at least one"),
        (lambda: AccuracyMatrix(["a", "a"]), ValueError, "differ"),
        (lambda: metrics.task_curve(ROWS, True), TypeError, "task must be an int"),
        (lambda: metrics.task_curve(ROWS, np.array([0, 1])), TypeError, "task must be one number"),
        (lambda: metrics.summary([[[1.0, 2.0]]]), TypeError, r"R\[0\]\[0\] must be a number"),
        (lambda: metrics.summary([[np.ones(2)]]), TypeError, r"R\[0\]\[0\] must be one number"),
        (lambda: metrics.summary([["x"]]), ValueError, r"R\[0\]\[0\] must be a number"),
        (lambda: metrics.summary([[1.0]], ["x"]), TypeError, r"sizes\[0\] must be a number"),
        (lambda: metrics.summary([[1.0]], [True]), ValueError, r"sizes\[0\] must be positive"),
        (
            lambda: metrics.summary([[1.0]], [10**400]),
            OverflowError,
            r"sizes\[0\] must be a number",
        ),
        (lambda: AccuracyMatrix([1, "1"]), ValueError, "differ"),
        (lambda: AccuracyMatrix(True), TypeError, "list of names"),
        (lambda: AccuracyMatrix(np.array(2.0)), TypeError, "list of names"),
        (lambda: AccuracyMatrix(2.0), TypeError, "list of names"),
        (
            lambda: AccuracyMatrix(2).record(np.bool_(0), 0, 1.0),
            TypeError,
            "trained must be an int",
        ),
        (lambda: AccuracyMatrix(2).record(0, 0.0, 1.0), TypeError, "evaluated must be an int"),
        (lambda: AccuracyMatrix(2)["a"], TypeError, "i must be an int"),
        (lambda: AccuracyMatrix("abc"), TypeError, "list of names"),
        (lambda: AccuracyMatrix(2).record(2, 0, 1.0), IndexError, "no task 2"),
        (lambda: AccuracyMatrix(2).record(0, -1, 1.0), IndexError, "no task -1"),
        (lambda: AccuracyMatrix(2).record(0, 0, math.nan), ValueError, "must be None"),
        (lambda: AccuracyMatrix(2).record(0, 0, None), ValueError, "number"),
        (lambda: AccuracyMatrix.from_rows(ROWS, ["a"]), ValueError, "1 task names"),
        (lambda: AccuracyMatrix.from_csv("after,a\nb,1\n"), ValueError, "not the tasks"),
    ],
)
def test_misuse(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_standard_library_only():
    """The file can be copied next to a result file and read without torch or numpy."""
    tree = ast.parse(Path(metrics.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    # matplotlib is imported by who draws, and by nobody else.
    assert names - set(sys.stdlib_module_names) == {"matplotlib"}
    code = "import dgg.metrics, sys; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


# -- the picture -----------------------------------------------------------------------------------


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def _cells(ax):
    """(column, row): the number printed there."""
    return {text.get_position(): text.get_text() for text in ax.texts}


def test_plot_draws_a_row_for_every_task_trained(pyplot):
    ax = AccuracyMatrix.from_rows(ROWS, ["a", "b", "c"]).plot()
    (image,) = ax.images
    drawn = np.ma.filled(image.get_array(), -1)
    assert drawn.tolist() == [[80, -1, -1], [60, 90, -1], [50, 70, 95]]
    assert image.get_clim() == (0, 100)
    assert _cells(ax) == {
        (0, 0): "80", (0, 1): "60", (1, 1): "90", (0, 2): "50", (1, 2): "70", (2, 2): "95",
    }  # fmt: skip
    for ticks in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["a", "b", "c"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tested on", "after training")
    assert ax.get_title() == "FAA 71.7   AIA 75.6   BWT -25.0"
    # Numbers are readable on their cells: viridis is dark below and bright above.
    ink = {text.get_text(): text.get_color() for text in ax.texts}
    assert ink["50"] == "white" and ink["95"] == "black"
    ax.figure.canvas.draw()


def test_plot_into_axes_of_somebody(pyplot):
    """An unfinished run, shares instead of per cent, and a colour map of one's own."""
    matrix = AccuracyMatrix(3)
    matrix.record(0, 0, 0.8)
    matrix.record(1, 0, 0.25)
    figure, panels = pyplot.subplots(1, 2)
    before = pyplot.get_fignums()
    assert matrix.plot(panels[1], cmap="gray", vmax=0.5) is panels[1]
    assert pyplot.get_fignums() == before and not panels[0].images
    (image,) = panels[1].images
    assert image.cmap.name == "gray" and image.get_clim() == (0, 0.5)
    assert _cells(panels[1]) == {(0, 0): "0.80", (0, 1): "0.25"}
    assert panels[1].get_title() == "FAA –   AIA –   BWT –"
    figure.canvas.draw()
    empty = AccuracyMatrix(2).plot(panels[0])
    assert not empty.texts and empty.images[0].get_array().mask.all()
    figure.canvas.draw()


def test_plot_with_a_norm_of_the_callers(pyplot):
    from matplotlib.colors import PowerNorm

    ax = AccuracyMatrix.from_rows(ROWS).plot(norm=PowerNorm(0.5, vmin=10, vmax=90))
    assert ax.images[0].get_clim() == (10, 90)
    ax.figure.canvas.draw()


def test_plot_without_matplotlib_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        AccuracyMatrix(2).plot()


def matrix():
    return AccuracyMatrix.from_rows([[0.9, None], [0.8, 0.75]], ["a", "b"])


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_csv_that_was_cut_off_is_not_read_as_another_number(cut):
    """0.75 became 0.7 or 0.0."""
    with pytest.raises(ValueError, match="cut|end|line"):
        AccuracyMatrix.from_csv(matrix().to_csv()[: -1 - cut])


def test_an_empty_csv_is_an_error_that_says_so(tmp_path):
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match=r"empty\.csv|empty"):
        AccuracyMatrix.from_csv(tmp_path / "empty.csv")


@pytest.mark.parametrize("write", ["to_json", "to_csv"])
def test_a_full_disk_leaves_the_matrix_that_was_written_before(write, tmp_path, monkeypatch):
    """The recipe writes the same file after every task."""
    path = tmp_path / "matrix"
    former = getattr(matrix(), write)(path)
    write_text = type(path).write_text

    def full(self, text, *args, **options):
        write_text(self, text[:9], *args, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="space"):
        getattr(matrix(), write)(path)
    assert path.read_text() == former


@pytest.mark.parametrize("write", ["to_json", "to_csv"])
def test_links_pipes_and_modes_stay_what_they_are(write, tmp_path):
    """Somebody else reads the file behind a link, and `/dev/stdout` is one, too."""
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.touch()
    file.chmod(0o640)
    link.symlink_to(file)
    text = getattr(matrix(), write)(link)
    assert link.is_symlink() and file.read_text() == text
    file.write_text("former")
    getattr(matrix(), write)(file)
    assert file.read_text() == text and stat.S_IMODE(file.stat().st_mode) == 0o640
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        # To read and to write: whoever opens it for one of them would wait for the other.
        end = os.open(pipe, os.O_RDWR)
        pool.submit(getattr(matrix(), write), pipe).result(timeout=60)
        assert os.read(end, 9999).decode() == text
        os.close(end)
    assert pipe.is_fifo() and {file, link, pipe} == set(tmp_path.iterdir())


def test_ranks_write_the_same_file_at_once(tmp_path):
    """Each would take away what the other is about to put in its place."""
    path, one = tmp_path / "matrix.json", matrix()
    with ThreadPoolExecutor(4) as pool:
        texts = set(pool.map(lambda _: one.to_json(path), range(400)))
    assert texts == {path.read_text()} and [path] == list(tmp_path.iterdir())


def test_a_set_of_tasks_has_no_order():
    """Their order differs from process to process, and so would rows and columns."""
    with pytest.raises(TypeError, match="order|list"):
        AccuracyMatrix({"scenes", "charts"})
