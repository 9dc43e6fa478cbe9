# SPDX-License-Identifier: BSD-3-Clause
"""The sources use of torch's headers what its oldest supported release has.

The build looks at the installed release alone: a macro of a newer one compiles there, and fails
where the oldest is installed, which for the CUDA library may be a machine that nobody has here.
The library that is installed here needs nothing of torch that another release may lack.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

import dgg

SOURCES = pathlib.Path(__file__).parents[1] / "csrc"
# Macros that the headers of torch 2.10.0 define; look there before adding another.
IN_2_10 = {
    "AOTI_TORCH_SUCCESS", "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK",
    "TORCH_BOX",
}  # fmt: skip


def test_no_macro_is_newer_than_the_oldest_release():
    used = set()
    for path in SOURCES.iterdir():
        text = re.sub(r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", "", path.read_text(encoding="utf-8"))
        used |= set(re.findall(r"\b(?:STABLE_|STD_|AOTI_)?TORCH_[A-Z0-9_]+\b", text))
    assert used - IN_2_10 == set()
    assert used, "the pattern finds nothing any more"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of the binutils")
def test_the_installed_library_needs_the_stable_interface_alone():
    libraries = [*pathlib.Path(dgg.__file__).parent.glob("_C.*so")]
    if not libraries:
        pytest.skip("the C++ library is not built here")
    for library in libraries:
        done = subprocess.run(
            ["nm", "--dynamic", "--undefined-only", str(library)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        used = {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}
        # Mangled names of C++ in torch's namespaces, and Python's interface.
        torch_or_python = r"_Z.*(?<!\d)(2at|3c10|5torch|6caffe2)|_?Py"
        wrong = [x for x in used if re.match(torch_or_python, x)]
        assert not wrong, wrong
        assert {x for x in used if x.startswith("aoti_torch_")}, "it uses torch in another way now"
