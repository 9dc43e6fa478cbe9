# SPDX-License-Identifier: BSD-3-Clause
"""Checks the site that was built: its links, what it loads, and every page in Chromium.

All links and anchors lead somewhere, and nothing comes from another host. In Chromium no page is
wider than a screen or a telephone, none reports an error, and the search finds something. Pictures
of all pages at both widths are left beside the site; look at them.
"""

from __future__ import annotations

import argparse
import functools
import html.parser
import http.server
import pathlib
import posixpath
import shutil
import sys
import threading
import urllib.parse

ROOT = pathlib.Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Name, width, height, and whether pages are in dark colours: both are to be looked at.
SCREENS = (("screen", 1280, 900, "light"), ("telephone", 390, 844, "dark"))
# What sticks out of the page, unless it scrolls in a box of its own.
TOO_WIDE = """() => [...document.querySelectorAll("article *")].filter(element => {
    if (element.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let box = element.parentElement; box.tagName !== "ARTICLE"; box = box.parentElement)
        if (/auto|scroll/.test(getComputedStyle(box).overflowX)) return false;
    return true;
}).map(element => element.outerHTML.slice(0, 120))"""


class Page(html.parser.HTMLParser):
    """What a page names: its anchors, where its links lead, what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Notes the attributes that name something."""
        for name, value in attributes:
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value or "")
            elif name in ("href", "src") and value:
                (self.links if tag == "a" else self.loads).append(value)


def wrong_links(site: pathlib.Path) -> list[str]:
    """Returns a line for every link that leads nowhere and everything loaded from elsewhere."""
    pages = {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }
    wrong = []
    for name, page in sorted(pages.items()):
        for target in (*page.links, *page.loads):
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loads and parts.scheme != "data":
                    wrong.append(f"{name} loads {target}")
                continue
            path = urllib.parse.unquote(parts.path)
            # 404.html is shown at any path, so its links begin at the root.
            path = posixpath.normpath(posixpath.join("/", posixpath.dirname(name), path))[1:]
            path = path if parts.path else name
            if (site / path).is_dir():
                path = posixpath.join(path, "index.html")
            if not (site / path).is_file():
                wrong.append(f"{name}: no {target}")
            elif parts.fragment and path in pages:
                if urllib.parse.unquote(parts.fragment) not in pages[path].anchors:
                    wrong.append(f"{name}: no anchor {target}")
    return wrong


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that prints nothing."""

    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""


def wrong_in_browser(site: pathlib.Path, pictures: pathlib.Path, browser: str) -> list[str]:
    """Looks at every page at every width; returns a line for everything wrong."""
    from playwright.sync_api import sync_playwright

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    wrong: list[str] = []
    shutil.rmtree(pictures, ignore_errors=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser)
        for screen, width, height, colours in SCREENS:
            tab = chromium.new_page(
                viewport={"width": width, "height": height}, color_scheme=colours
            )
            tab.set_default_timeout(300_000)  # milliseconds; others may use the machine, too
            where = ""
            say = lambda what: wrong.append(f"{where} on the {screen}: {what}")  # noqa: B023, E731
            tab.on("pageerror", lambda error: say(error))  # noqa: B023
            tab.on("console", lambda said: said.type == "error" and say(said.text))  # noqa: B023
            tab.on("request", lambda asked: asked.url.startswith(root) or say(asked.url))  # noqa: B023
            for path in sorted(site.rglob("*.html")):
                where = path.relative_to(site).as_posix()
                tab.goto(root + where)
                across, down = tab.evaluate(
                    "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
                )
                if across > width:
                    say(f"{across} pixels wide")
                for element in tab.evaluate(TOO_WIDE):
                    say(f"sticks out: {element}")
                tab.screenshot(
                    path=pictures / screen / f"{where.removesuffix('.html').replace('/', '-')}.png",
                    full_page=True,
                    # Chromium draws no higher picture.
                    clip={"x": 0, "y": 0, "width": width, "height": min(down, 16000)},
                )
            where = "the search"
            tab.goto(f"{root}index.html?q=set_anchor")
            try:
                tab.wait_for_selector(".md-search-result__item", state="attached")
            except Exception as error:
                say(error)
        chromium.close()
    server.shutdown()
    return wrong


def main() -> int:
    """Prints what is wrong; returns how the process is to end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=pathlib.Path, default=ROOT / "build" / "docs")
    parser.add_argument("--require-browser", action="store_true", help="fail without Chromium")
    options = parser.parse_args()
    pictures = options.site.parent / f"{options.site.name}-pictures"
    wrong = wrong_links(options.site)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is not None:
        wrong += wrong_in_browser(options.site, pictures, browser)
    elif options.require_browser:
        wrong.append(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    count = len([*options.site.rglob("*.html")])
    print(f"{count} pages in {options.site}, {len(wrong) or 'nothing'} wrong")
    if browser is None:
        print(
            f"NOT LOOKED AT IN A BROWSER: none of {', '.join(BROWSERS)} is on the path, so nobody "
            "knows whether a page fits a telephone"
        )
    else:
        print(f"pictures in {pictures}: look at them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
