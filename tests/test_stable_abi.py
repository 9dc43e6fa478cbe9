# SPDX-License-Identifier: BSD-3-Clause
"""The sources use of torch's headers what its oldest supported release has.

The build looks at the installed release alone: a macro of a newer one compiles there, and fails
where the oldest is installed, which for the CUDA library may be a machine that nobody has here.
"""

from __future__ import annotations

import pathlib
import re

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
