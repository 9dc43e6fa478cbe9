# SPDX-License-Identifier: BSD-3-Clause
"""The table of docs/compatibility.md is the one that the tests make, and cannot lie by accident."""

from __future__ import annotations

import pathlib
import sys

import pytest

import compatibility
from compatibility import ABSENT, BELOW, ENGINES, FEATURES, REFUSED, Reason

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "compatibility.md"


@pytest.fixture(scope="module")
def found():
    """What is marked in this folder."""
    return compatibility.collect()


def test_every_mark_names_a_cell_and_every_reason_is_needed(found):
    compatibility.check(found)


def test_the_page_has_the_table_that_the_tests_make(found):
    text = PAGE.read_text(encoding="utf-8")
    if found.absent:
        pytest.skip(f"tests that are left out here have cells, too: {'; '.join(found.absent)}")
    assert text == compatibility.replaced(text, compatibility.render(found)), "make table"


def collected(folder, text):
    head = "import pytest\ncompat = pytest.mark.compat\n"
    folder.joinpath("test_marked.py").write_text(head + text)
    folder.joinpath("pytest.ini").write_text(
        "[pytest]\naddopts = -m 'not slow' --import-mode=importlib\n"
        "markers =\n    compat\n    slow\n"
    )
    sys.modules.pop("test_marked", None)
    return compatibility.collect(folder)


MARKED = """
@compat("FSDP2", "replay", "clipping")
@compat("DDP", "replay", "!LoRA")
@pytest.mark.slow
def test_one(): assert 0, "nothing is run"

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=compat("TP", "replay"))])
def test_two(n): pass

@compat("HSDP", "replay")
@pytest.mark.skip
def test_three(): pass

@compat("HSDP", "LoRA")
@pytest.mark.skip(reason="needs the moon")
def test_four(): pass

@compat("HSDP", "clipping")
@pytest.mark.skipif(True, reason="on this machine")
def test_five(): pass
"""


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("marked"), MARKED)


def test_marks_are_read(marked):
    found = marked
    assert not found.problems and not found.absent
    file = {"test_marked.py"}
    assert {
        key: (cell.tested, cell.refused, cell.skipped) for key, cell in found.cells.items()
    } == {
        ("FSDP2", "replay"): (file, set(), set()),
        ("FSDP2", "clipping"): (file, set(), set()),
        ("DDP", "replay"): (file, set(), set()),
        ("DDP", "LoRA"): (set(), file, set()),
        ("TP", "replay"): (file, set(), set()),
        ("HSDP", "LoRA"): (set(), set(), {"needs the moon"}),
        ("HSDP", "clipping"): (file, set(), set()),
    }, "a test that is skipped without a reason proves nothing"
    reasons = [
        Reason(("DDP",), ("LoRA",), REFUSED, "for this test"),
        Reason(("TP", "HSDP"), ("meta init",), ABSENT, "there is none"),
        Reason(("TP", "FSDP1"), ("replay",), BELOW, "another tests it"),
    ]
    table = compatibility.render(found, reasons, strict=False)
    columns = compatibility.TABLES[0]
    line = next(line for line in table.splitlines() if line.startswith("| replay |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    assert dict(zip(columns, cells, strict=True)) == {
        engine: "a" if engine in ("FSDP2", "DDP", "TP") else "" for engine in columns
    } | {"FSDP1": "–<sup>1</sup>"}, "a test needs no reason why there is none"
    assert "| LoRA |  | –<sup>" in table and "a `test_marked.py`" in table
    assert "refused: for this test (`test_marked.py`)" in table
    assert table.count("n/a: there is none") == 1, "one note for all cells of a reason"
    assert "skipped here: needs the moon" in table and "An empty cell is not tested." in table
    with pytest.raises(ValueError, match="one process × trajectory: neither a test nor a reason"):
        compatibility.render(found, reasons, strict=True)
    everything = [
        *reasons,
        *(
            Reason((engine,), (feature,), ABSENT, "not in this test")
            for engine in ENGINES
            for feature in FEATURES
            if (engine, feature) not in found.cells
            and not (engine in ("TP", "HSDP") and feature == "meta init")
            and (engine, feature) != ("FSDP1", "replay")
        ),
    ]
    assert "An empty cell" not in compatibility.render(found, everything, strict=True)


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ('"FSDP3", "replay"', "engine 'FSDP3'"),
        ('"FSDP2", "repaly"', "feature 'repaly'"),
        ('"FSDP2", "!repaly"', "feature '!repaly'"),
        ('"FSDP2"', "no feature"),
        ("", "engine ''"),
        ('"FSDP2", "replay", why="so"', "keywords"),
    ],
)
def test_a_mark_that_means_nothing_is_an_error(mark, says, tmp_path):
    found = collected(tmp_path, f"@compat({mark})\ndef test_one(): pass\n")
    with pytest.raises(ValueError, match=f"test_marked.py::test_one: .*{says}"):
        compatibility.render(found, [])


@pytest.mark.parametrize(
    ("reasons", "says"),
    [
        ([], "DDP × LoRA: refused by .*but why"),
        ([Reason(("DDP",), ("LoRA",), ABSENT, "no")], r"n/a, it is said, but \['test_marked.py'\]"),
        ([Reason(("DDP",), ("replay",), REFUSED, "no")], "no test is marked with '!replay'"),
        ([Reason(("DDP",), ("LoRA",), "maybe", "no")], "'maybe' is no kind"),
        ([Reason(("DDP",), ("LoRA",), REFUSED, "so " * 13)], "more than 12 words"),
        ([Reason(("DPP",), ("LoRA",), REFUSED, "no")], "'DPP' × 'LoRA': no such cell"),
        ([Reason(("DDP",), ("LoRA",), REFUSED, "no")] * 2, "two reasons"),
    ],
)
def test_a_reason_that_does_not_fit_is_an_error(reasons, says, marked):
    with pytest.raises(ValueError, match=says):
        compatibility.render(marked, reasons)


def test_files_that_are_left_out_are_named(tmp_path):
    found = collected(tmp_path, 'pytest.importorskip("no_such_library")\ndef test_one(): pass\n')
    assert not found.cells
    (line,) = found.absent
    assert "test_marked.py" in line and "no_such_library" in line
    compatibility.check(found, [Reason(("DDP",), ("LoRA",), REFUSED, "its test may be there")])


def test_a_file_that_does_not_import_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="could not collect(.|\n)*ZeroDivisionError"):
        collected(tmp_path, "1 / 0\n")


def test_the_table_is_put_between_its_markers():
    text = f"before\n{compatibility.BEGIN}\nold\n{compatibility.END}\nafter\n"
    once = compatibility.replaced(text, "new\n")
    assert once == f"before\n{compatibility.BEGIN}\n\nnew\n\n{compatibility.END}\nafter\n"
    assert compatibility.replaced(once, "new\n") == once
    for broken in ("", text * 2, compatibility.END + compatibility.BEGIN):
        with pytest.raises(ValueError, match="no place for the table"):
            compatibility.replaced(broken, "new\n")
