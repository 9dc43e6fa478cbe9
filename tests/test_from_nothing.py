# SPDX-License-Identifier: BSD-3-Clause
"""From nothing to a guided training in five minutes, by following the README to the letter.

Nothing is known here but the README: its command is run in a clone, in an environment that has
torch and no dgg; then its first example is saved and run, outside of the clone and inside.

Time is the processor's, so that a busy machine changes nothing: whoever waits for nobody has it all
in that many minutes, or sooner on two cores. What a network takes is not in it.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from test_install import clone, environment, has_compiler  # noqa: F401
from wheels import readme_example

resource = pytest.importorskip("resource", reason="the time of child processes is told by POSIX")

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
MINUTES = 5


def spent():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler, there is none")
def test_the_readme_followed_to_the_letter(clone):  # noqa: F811
    install = README.read_text(encoding="utf-8").split("\n## Install\n")[1].split("\n## ")[0]
    command, oldest = re.match(
        r"\s*`(pip install \S+)` in a clone, after torch ≥ (\S+) ", install
    ).groups()
    assert (command, oldest) == ("pip install .", "2.10")
    # A user's shell, in which an environment is active that has torch.
    folder = clone.parent / "environment"
    environment(folder)
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "DGG_")) and name != "DEBUG"
    }
    env["PATH"] = os.pathsep.join([str(folder / "bin"), env["PATH"]])
    begin = spent()

    def shell(line, cwd):
        return subprocess.run(
            line, shell=True, cwd=cwd, env=env, text=True, capture_output=True, timeout=1500,
            start_new_session=True,
        )  # fmt: skip

    done = shell(command, clone)
    if "Could not find a version that satisfies the requirement setuptools" in done.stderr:
        pytest.skip("pip's isolated build needs an index with setuptools, there is none")
    assert done.returncode == 0, done.stdout + done.stderr
    outside = clone.parent / "my project"
    outside.mkdir()
    for cwd in (outside, clone):
        (cwd / "train.py").write_text(readme_example(), encoding="utf-8")
        done = shell("python train.py", cwd)
        # Not a word about a slow reference, nor any other.
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        alone, guided = done.stdout.splitlines()
        lost = [int(re.search(r"forgot (-?\d+) points", line)[1]) for line in (alone, guided)]
        assert guided.startswith("alpha='auto'") and lost[1] < lost[0], done.stdout
        done = shell('python -c "import dgg; print(dgg.__file__)"', cwd)
        assert pathlib.Path(done.stdout.strip()).is_relative_to(
            clone if cwd == clone else folder
        ), done.stdout + done.stderr
    minutes = (spent() - begin) / 60
    print(f"{minutes:.1f} minutes")
    assert minutes < MINUTES
    shutil.rmtree(folder)
