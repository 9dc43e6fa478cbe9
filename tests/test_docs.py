# SPDX-License-Identifier: BSD-3-Clause
"""What the documentation says of the code is true: options, messages, floors, figures, sizes.

That examples run and links lead somewhere is for test_examples.py.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import pathlib
import re
import statistics
import subprocess

import pytest

import dgg
from test_layout import FLOORS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def text(name):
    return (DOCS / name).read_text(encoding="utf-8")


def section(page, begin, end):
    assert page.count(begin) == page.count(end) == 1, begin
    return page.split(begin)[1].split(end)[0]


# -- sizes -----------------------------------------------------------------------------------------


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    assert not [line for line in lines if len(line) > 100]


def test_no_line_of_the_pages_is_longer_than_a_screen():
    pages = [ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
    assert len(pages) > 10
    long = [
        f"{path.name}:{number} ({len(line)})"
        for path in pages
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 120
    ]
    assert not long, long


# -- the index -------------------------------------------------------------------------------------


def test_the_index_lists_every_page_once():
    listed = re.findall(r"^- \[[^]]+\]\((\S+?\.md)\): \S", text("index.md"), re.M)
    inside = [name for name in listed if "/" not in name]
    assert sorted(inside) == sorted(p.name for p in DOCS.glob("*.md") if p.name != "index.md")
    assert [name for name in listed if "/" in name] == ["../CONTRIBUTING.md"]


# -- the site; the rest is in `make docs` ----------------------------------------------------------


def test_the_site_has_the_pages_in_the_order_of_the_index():
    listed = re.findall(r"^- \[[^]]+\]\((\S+?\.md)\): \S", text("index.md"), re.M)
    ordered = [name[3:] if name.startswith("../") else f"docs/{name}" for name in listed]
    config = (ROOT / "website" / "mkdocs.yml").read_text(encoding="utf-8")
    shown = re.findall(r"^ +- .*: (\S+\.md)$", config, re.M)
    assert [name for name in shown if name in ordered] == ordered
    assert len(set(shown)) == len(shown)


def test_every_public_name_is_in_the_api_reference():
    # Read, not imported: the Trainers need packages.
    files = {
        "dgg": "__init__.py", "dgg.hf": "hf/__init__.py", "dgg.lightning": "lightning.py",
        "dgg.metrics": "metrics.py",
    }  # fmt: skip
    public = set()
    for module, file in files.items():
        tree = ast.parse((ROOT / "dgg" / file).read_text(encoding="utf-8"))
        (names,) = (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
        public |= {f"{module}.{name}" for name in names}
    pages = sorted((ROOT / "website" / "pages" / "api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", "\n".join(p.read_text("utf-8") for p in pages), re.M)
    # One page has a module with all its names.
    whole = {name for name in public if name.startswith("dgg.metrics.")}
    assert sorted(shown) == sorted(public - whole - {"dgg.hf"} | {"dgg._literals"})


# -- the floors ------------------------------------------------------------------------------------


def test_the_picture_of_the_floors_is_that_of_the_layout():
    (picture,) = re.findall(r"^```text\n(.*?)^```", text("architecture.md"), re.M | re.S)
    drawn = [
        (name, int(floor))
        for floor, names in re.findall(r"^ *(\d+)  +([\w. ]+?) *(?:\|.*)?$", picture, re.M)
        for name in names.split()
    ]
    assert len(drawn) == len(dict(drawn)), "a file stands on two floors"
    assert dict(drawn) == FLOORS


# -- options ---------------------------------------------------------------------------------------


def documented_options():
    """(Names of the heading's classes, {option: {class or "": default as printed, or None}})."""
    found = []
    for heading, body in re.findall(
        r"^## (.*?)\n(.*?)(?=^## |\Z)", text("options.md"), re.M | re.S
    ):
        options = {}
        entries = re.findall(
            r"^- \*\*`(\w+)(?:=(.+?))?`\*\*(?: \(`(.+?)` in ([\w, ]+)\))?", body, re.M
        )
        assert len(entries) == body.count("\n- "), f"{heading}: an entry that is not understood"
        for name, default, other, classes in entries:
            assert name not in options, f"{heading}: {name} stands there twice"
            options[name] = {"": default or None}
            options[name] |= {cls: other for cls in classes.split(", ") if cls}
        found.append((heading.split(", "), options))
    return found


def described(name):
    if name == "set_anchor":
        return dgg.AdamW.set_anchor
    of_the_trainer = name in ("GuidanceCallback", "ReplayTrainer")
    return getattr(dgg.hf if of_the_trainer else dgg, name)


@pytest.mark.parametrize(
    "name",
    ["AdamW", "Adam", "SGD", "Guidance", "ReplayBuffer", "set_anchor",
     *(pytest.param(name, marks=pytest.mark.slow)
       for name in ("GuidanceCallback", "ReplayTrainer"))],
)  # fmt: skip
def test_every_option_stands_once_with_its_default(name):
    if name in ("GuidanceCallback", "ReplayTrainer"):
        pytest.importorskip("transformers")
    said = {}
    for classes, options in documented_options():
        if name in classes:
            assert not said.keys() & options.keys()
            said |= options
    there = dict(inspect.signature(described(name)).parameters)
    for others in ("self", "args", "kwargs"):  # the latter two are the Trainer's
        there.pop(others, None)
    assert sorted(said) == sorted(there)
    for option, parameter in there.items():
        printed = said[option].get(name, said[option][""])
        if parameter.default is inspect.Parameter.empty:
            assert printed is None, option
        else:
            assert printed is not None, option
            value = ast.literal_eval(printed)
            assert value == parameter.default, f"{option}: {printed}, not {parameter.default!r}"
            assert type(value) is type(parameter.default) or value == 0, option


def test_set_anchor_of_guidance_has_the_same_options():
    ours, theirs = (inspect.signature(cls.set_anchor) for cls in (dgg.AdamW, dgg.Guidance))
    assert ours.parameters.keys() == theirs.parameters.keys()


# -- messages --------------------------------------------------------------------------------------


def literals():
    """All texts of the package, with … where a value is put in."""
    found = []
    for path in sorted((ROOT / "dgg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(parts))
    return found


def test_every_quoted_message_is_one_of_ours():
    page = text("troubleshooting.md")
    quoted = [
        message
        for heading, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.M | re.S)
        if heading.startswith("Errors")
        for message in re.findall(r"^- `(.+?)` \S", body, re.M)
    ]
    assert len(quoted) >= 30
    assert len(quoted) == page.split("## Errors", 1)[1].count("\n- ")
    ours = literals()
    for message in quoted:
        # Of a text that is put in, `…` may stand at the end or the beginning of ours as well.
        pattern = ".*?".join(re.escape(piece) for piece in message.strip("… ").split("…"))
        assert any(re.search(pattern, each, re.S) for each in ours), message


# -- the study -------------------------------------------------------------------------------------

# 97.5 % point of Student's t with 4 degrees of freedom.
_T4 = 2.776445
_METHODS = {
    "DGG": "guidance_replay", "replay": "replay", "L2-SP": "l2sp", "ĝ only": "guidance",
    "sequential": "sequential",
}  # fmt: skip
_METRICS = {"final accuracy": "faa", "forgetting": "forgetting", "learning": "learning"}


def p_of_t4(t):
    """Two-sided p of a t with 4 degrees of freedom, in closed form."""
    angle = math.atan(abs(t) / 2)
    return 1 - math.sin(angle) * (1 + math.cos(angle) ** 2 / 2)


def test_the_differences_of_the_study_follow_from_its_results():
    stored = ROOT / "bench" / "results" / "continual-tiny-2026-11-21.json"
    results = json.loads(stored.read_text(encoding="utf-8"))["results"]
    by_run = {(run["method"], run["seed"]): run for run in results}
    table = section(text("forgetting.md"), "<!-- differences: begin;", "<!-- differences: end -->")
    cells = r"(\S.*?), (.*?) − (.*?) \| (.*) \| (.*) ± (.*) \| (.*) to (.*) \| (.*)"
    rows = re.findall(rf"^\| {cells} \|$", table, re.M)
    assert len(rows) == table.count("\n|") - 2 == 7
    number = lambda printed: float(printed.replace("−", "-"))  # noqa: E731
    for metric, ours, theirs, per_seed, mean, error, low, high, p in rows:
        key = _METRICS[metric]
        found = [
            by_run[_METHODS[ours], seed][key] - by_run[_METHODS[theirs], seed][key]
            for seed in range(5)
        ]
        assert [number(x) for x in per_seed.split(", ")] == pytest.approx(found, abs=0.0501)
        center, deviation = statistics.mean(found), statistics.stdev(found) / math.sqrt(5)
        expected = [center, deviation, center - _T4 * deviation, center + _T4 * deviation]
        assert [*map(number, (mean, error, low, high))] == pytest.approx(expected, abs=0.0501)
        digits = len(p.split(".")[1])
        assert round(p_of_t4(center / deviation), digits) == float(p), (metric, ours, theirs)


def test_every_stored_result_is_cited():
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    cited = "".join(page.read_text(encoding="utf-8") for page in pages)
    # What a run has left there counts once it is committed.
    listing = ["git", "-C", str(ROOT), "ls-files", "bench/results"]
    tracked = subprocess.run(listing, capture_output=True, text=True, timeout=60).stdout.split()
    if not tracked:
        pytest.skip("no repository: results that are kept cannot be told from those of a run")
    stored = {pathlib.Path(path).name for path in tracked} - {"README.md"}
    assert not [name for name in sorted(stored) if name not in cited]
    named = set(re.findall(r"bench/results/([\w.-]+)", cited))
    assert named and named <= {*stored, "README.md"}


STUDY = ROOT / "bench" / "results" / "study-2026-11-30.json"


@pytest.fixture
def study(monkeypatch):
    """The results of the study, and the module that makes tables of them."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from study import summary

    return json.loads(STUDY.read_text(encoding="utf-8")), summary


def test_the_tables_of_the_study_are_those_of_its_results(study):
    found, summary = study
    page = text("forgetting.md")
    assert summary.into_page(found, page) == page
    assert page.count("| guard, w = ½ − replay only, in-domain | 20 |") == 1


def test_the_readme_says_what_the_study_says(study):
    found, summary = study
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    arms = {
        '`alpha="auto", importance=0.5`': "guard50", '`alpha="auto", importance=1`': "guard100",
        "the paper's rule, α searched": "dgg",
        "EWC, exact Fisher matrix, λ searched": "ewc", "CoSO, threshold searched": "other",
    }  # fmt: skip
    cell = r" (\S+) \((\S+) to (\S+); (.*?)\) \|"
    rows = re.findall(rf"^\| (.+?) \|{cell}{cell}$", readme, re.M)
    assert [row[0] for row in rows] == list(arms)
    beds = ("in-domain", "shifted")
    report = "\n".join(summary.sections(found))
    tables = dict(zip(beds, re.split("^## The bed ", report, flags=re.M)[1:],
                      strict=True))  # fmt: skip
    for what, *cells in rows:
        for bed, (mean, low, high, p) in zip(beds, (cells[:4], cells[4:]), strict=True):
            got = summary.comparison(found, bed, arms[what], "replay")
            ends = [summary.signed(x).lstrip("+") for x in (got.low, got.high)]
            assert [mean, low, high] == [summary.signed(got.mean), *ends] and got.n == 20
            pair = summary.pair(arms[what], "replay")
            # The primary tests stand in a table of their own.
            looked = report if arms[what] == "guard50" else tables[bed]
            name = f"{pair}, {bed}" if arms[what] == "guard50" else pair
            planned = re.findall(rf"^\| {name} \|(?: [^|]+ \|){{7}} (.+?) \|$", looked, re.M)
            assert planned == ([] if p == "–" else [p]), (what, bed)
    replay, joint = (
        [statistics.mean(summary.values(found, bed, arm).values()) for bed in beds]
        for arm in ("replay", "joint")
    )
    assert "| replay only | {:.1f} | {:.1f} |".format(*replay) in readme
    assert "joint training ({:.1f} and {:.1f})".format(*joint) in readme
    worst = min(
        summary.comparison(found, setting, guard, "replay").mean
        for setting in found["digits"] if not setting.endswith("-0")
        for guard in ("guard0", "guard50", "guard100")
    )  # fmt: skip
    assert f"there guidance lost up to {-worst:.0f} points" in readme
