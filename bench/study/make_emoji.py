# SPDX-License-Identifier: BSD-3-Clause
"""Makes the two emoji atlases and their list; only needed to make them again.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python bench/study/make_emoji.py emoji-datasource-*-16.0.0.tgz

Both have the same emoji in the same places: a row for each category of `CATEGORIES`, `A_CATEGORY`
of them in a row, scaled from 64 to `CELL` pixels. DATA.md says whose the drawings are.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
CELL, A_CATEGORY = 32, 28
# Of the data's own sub-categories.
CATEGORIES = {
    "face": ("face-",),
    "animal": ("animal-",),
    "plant": ("plant-",),
    "food": ("food-",),
    "vehicle": ("transport-ground", "transport-air", "transport-water"),
    "building": ("place-building", "place-religious"),
    "clothing": ("clothing",),
    "flag": ("country-flag",),
}
# Emoji that have a name of one word here; they must be among those of their category.
NAMED = {
    "animal": ("octopus", "frog", "fox_face", "penguin", "pig", "whale"),
    "plant": ("rose", "sunflower", "cactus", "maple_leaf"),
    "food": ("pizza", "banana", "apple", "grapes", "carrot", "hamburger"),
    "vehicle": ("rocket", "bus", "boat", "airplane"),
}
SHEET_CELL = 66  # 64 pixels and a transparent border of one


def main(*packages: str) -> None:
    """Write the atlases from the two packages."""
    opened = dict(map(_read, packages))
    rows = _chosen(json.loads(opened["google"]["emoji.json"]))
    for style, files in opened.items():
        sheet = Image.open(io.BytesIO(files["64.png"])).convert("RGBA")
        atlas = Image.new("RGBA", (CELL * A_CATEGORY, CELL * len(rows)))
        listed = {e["unified"]: e for e in json.loads(files["emoji.json"])}
        for y, emojis in enumerate(rows.values()):
            for x, emoji in enumerate(emojis):
                place = listed[emoji["unified"]]
                left, top = (SHEET_CELL * place[f"sheet_{axis}"] + 1 for axis in "xy")
                small = sheet.crop((left, top, left + 64, top + 64)).resize(
                    (CELL, CELL), Image.Resampling.BOX
                )
                atlas.paste(small, (CELL * x, CELL * y))
        path = HERE / f"emoji_{style}.png"
        # 256 colours with transparency: a third of the size, and no difference at this resolution.
        atlas.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
        print(f"{path}: {path.stat().st_size} bytes")
    listing = {name: [emoji["short_name"] for emoji in emojis] for name, emojis in rows.items()}
    text = json.dumps({"cell": CELL, "rows": listing, "named": NAMED}, indent=1)
    (HERE / "emoji.json").write_text(text + "\n", encoding="utf-8")


def _read(package: str) -> tuple[str, dict[str, bytes]]:
    """The style, and the list and the sheet of 64 pixels."""
    style = "google" if "google" in package else "twitter"
    wanted = ("package/emoji.json", f"package/img/{style}/sheets/64.png")
    with tarfile.open(package) as archive:
        return style, {name.split("/")[-1]: archive.extractfile(name).read() for name in wanted}


def _chosen(emojis: list[dict]) -> dict[str, list[dict]]:
    """For each category the named ones and others, evenly spaced in the data's order."""
    rows = {}
    for category, beginnings in CATEGORIES.items():
        members = [
            e
            for e in sorted(emojis, key=lambda e: e["sort_order"])
            if e["subcategory"].startswith(beginnings)
            and e["has_img_google"]
            and e["has_img_twitter"]
        ]
        named = NAMED.get(category, ())
        first = [e for name in named for e in members if e["short_name"] == name]
        if len(first) != len(named):
            raise SystemExit(f"{category}: {set(named) - {e['short_name'] for e in first}}?")
        rest = [e for e in members if e not in first]
        needed = A_CATEGORY - len(first)
        rows[category] = first + [rest[k * len(rest) // needed] for k in range(needed)]
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
