# SPDX-License-Identifier: BSD-3-Clause
"""csrc/table.h and kernels/layout.py have the same numbers under the same names, and no others.

The name of a C++ constant says what it is called in Python: `kColumnExpAvg` is `EXP_AVG`,
`kSlotExpAvg` is `EXP_AVG_SLOT`, `kAdamBeta1` is the place of "beta1" in `ADAM_HYPER`.
"""

import ast
import pathlib
import re

import pytest
import torch
from dgg.kernels import layout

from dgg import _philox, reference

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADER = (ROOT / "csrc" / "table.h").read_text(encoding="utf-8")
LISTS = {"Dtype": "DTYPE_NAMES", "AdamHyper": "ADAM_HYPER", "SgdHyper": "SGD_HYPER",
         "GuideHyper": "GUIDE_HYPER"}  # fmt: skip
# What is called otherwise in Python.
RENAMED = {"kLaunchChunk": "CHUNK", "kTotalNorm": "NORM_TOTAL", "kGradNorm": "NORM_GRAD",
           "kDistance": "NORM_DISTANCE", "kHDotR": "H_DOT_R", "kUDotR": "U_DOT_R"}  # fmt: skip
# What C++ alone needs.
OF_CPP = {"kLargest", "kNoDtypes"}


def in_capitals(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def in_python(name, enum):
    """Returns what a constant of table.h is called in layout.py."""
    if name in RENAMED:
        return RENAMED[name]
    if enum == "Column" and name != "kColumns":
        return in_capitals(name.removeprefix("kColumn"))
    if enum == "DtypeSlot" and name != "kSlots":
        return in_capitals(name.removeprefix("kSlot")) + "_SLOT"
    return in_capitals(name.removeprefix("k"))


def numbers_of(header):
    """Returns the numbers and the lists of names in a text like table.h, as layout.py has them."""
    found = {}
    for enum, body in re.findall(r"enum (\w+) : int \{(.*?)\};", header, re.DOTALL):
        names, number = {}, 0
        for entry in re.sub(r"//.*", "", body).split(","):
            if not entry.strip():
                continue
            name, _, value = (part.strip() for part in entry.partition("="))
            number = int(value, 0) if value else number
            names[name] = number
            number += 1
        if enum in LISTS:
            *places, count = names
            assert count.endswith("s") and list(names.values()) == [*range(len(names))], enum
            prefix = "k" + enum.removesuffix("Hyper").removesuffix("Dtype")
            found[LISTS[enum]] = tuple(
                in_capitals(name.removeprefix(prefix)).lower() for name in places
            )
        else:
            found |= {in_python(name, enum): number for name, number in names.items()}
    constants = re.findall(r"^constexpr \w+ (k\w+) = (0x[\dA-F]+|\d+)u?;", header, re.MULTILINE)
    found |= {in_python(n, None): int(v, 0) for n, v in constants if n not in OF_CPP}
    return found


def numbers_of_python():
    public = {name: value for name, value in vars(layout).items() if name[0] != "_"}
    del public["GRANULARITIES"], public["ROUTES"]  # the same by their names
    return public


def test_both_have_the_same_numbers():
    assert numbers_of(HEADER) == numbers_of_python()


def test_granularities_go_by_their_names():
    names = {"step": layout.BY_STEP, "tensor": layout.BY_TENSOR, "element": layout.BY_ELEMENT}
    assert names == layout.GRANULARITIES


def test_routes_go_by_their_names():
    routes = [layout.BY_GRADIENT, layout.BY_FIRST_MOMENT, layout.BY_DECOUPLED]
    assert list(zip(reference.ROUTES, routes, strict=True)) == list(layout.ROUTES.items())


def test_the_reference_has_the_rows_of_products():
    names = ["TOTAL", "GUIDED", "PULL", "REPLAY", "H_DOT_R", "U_DOT_R", "PRODUCTS", "GUARD_EXTRAS"]
    assert all(getattr(reference, name) == getattr(layout, name) for name in names)


@pytest.mark.parametrize(
    "before,after",
    [("  kColumnExpAvgSq,\n  kColumnMaxExpAvgSq,", "  kColumnMaxExpAvgSq,\n  kColumnExpAvgSq,"),
     ("  kColumnCopy,\n", "  kColumnCopy,\n  kColumnMore,\n"),
     ("kSlotReplay,", ""),
     ("kFloat32, kBFloat16", "kBFloat16, kFloat32"),
     ("  kAdamBeta1,\n  kAdamBeta2,", "  kAdamBeta2,\n  kAdamBeta1,"),
     ("  kSgdNesterov,\n", ""),
     ("kGuideMaximize, kGuideStrength", "kGuideStrength, kGuideMaximize"),
     ("kStateBit = 8", "kStateBit = 64"),
     ("kByStep, kByTensor", "kByTensor, kByStep"),
     ("kLaunchChunk = 8192", "kLaunchChunk = 4096"),
     ("kSlotBits = 4", "kSlotBits = 8"),
     ("kFirstStep = 4", "kFirstStep = 8"),
     ("kByGradient, kByFirstMoment", "kByFirstMoment, kByGradient"),
     ("kHDotR, kUDotR", "kUDotR, kHDotR"),
     ("kGradNorm = 2", "kGradNorm = 8"),
     ("kClip, kGradLength", "kGradLength, kClip"),
     ("kStreamElement = 0x80000000u", "kStreamElement = 0x40000000u")],
)  # fmt: skip
def test_a_change_of_the_header_is_noticed(before, after):
    assert HEADER.count(before) == 1
    assert numbers_of(HEADER.replace(before, after)) != numbers_of_python()


def test_the_reference_counts_likewise():
    for name in ("INJECT", "INJECT_ELEMENTS", "FIRST_STEP", "NORM_TOTAL", "NORM_GRAD",
                 "NORM_DISTANCE", "CLIP", "SCALES"):  # fmt: skip
        assert getattr(reference, name) == getattr(layout, name), name
    for name in ("STREAM_STEP", "STREAM_TENSOR", "STREAM_ELEMENT", "STREAM_ROUNDING"):
        assert getattr(_philox, name) == getattr(layout, name), name
    assert [getattr(torch, name) for name in layout.DTYPE_NAMES] == [*reference.FLOAT_DTYPES]


def test_layout_imports_nothing():
    tree = ast.parse((ROOT / "kernels" / "layout.py").read_text(encoding="utf-8"))
    assert not [x for x in ast.walk(tree) if isinstance(x, (ast.Import, ast.ImportFrom))]


def test_columns_go_by_names():
    bare = {
        # Triton adds a column to the address of a row; C++ takes it out of an array.
        "kernels/*.py": re.compile(r"\b(line|group|coefficients|out) \+ \d"),
        "csrc/*": re.compile(r"\b(r|c|row|columns|hyper|coefficients|out)\[\d"),
    }
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for where, pattern in bare.items()
        for path in sorted(ROOT.glob(where))
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)
