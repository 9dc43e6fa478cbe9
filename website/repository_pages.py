# SPDX-License-Identifier: BSD-3-Clause
"""Puts the repository's Markdown on the site, each page at its own path; a hook of MkDocs.

A link to a Python file leads to a page that shows the file. The site has no copy of what else a
page may point to (results, folders): such a link becomes its text and the path.
"""

from __future__ import annotations

import pathlib
import posixpath
import re

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = pathlib.Path(__file__).parents[1]
_PATTERNS = ("*.md", "docs/*", "examples/**/*.md", "bench/**/*.md")
_LINK = re.compile(r"(?<!!)\[([^]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config):
    """Makes the anchors of headings those that GitHub makes."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")


def on_files(files, config):
    """Adds the pages, what docs/ has beside them, and pages of the Python files they point to."""
    found = [path for pattern in _PATTERNS for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in found:
        if path.suffix != ".md":
            continue
        for _, target, _ in _LINK.findall(path.read_text(encoding="utf-8")):
            source = (path.parent / target).resolve()
            if source.suffix == ".py" and source.is_file():
                name = source.relative_to(ROOT).as_posix()
                shown = f"# {name}\n\n````python\n{source.read_text(encoding='utf-8')}````\n"
                if f"{name}.md" not in files.src_uris:
                    files.append(File.generated(config, f"{name}.md", content=shown))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links to files of the repository to where the site has them, if it has."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(link):
        text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        if f"{path}.md" in files.src_uris:
            return f"[{text}]({target}.md{anchor})"
        if path in files.src_uris or not (ROOT / path).exists():
            return link[0]
        return text if posixpath.basename(path) in text else f"{text} (`{path}`)"

    return _LINK.sub(replaced, markdown)
