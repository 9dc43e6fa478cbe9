# SPDX-License-Identifier: BSD-3-Clause
"""Makes digits.npz from the digits of scikit-learn; only needed to make it again.

    pip download --no-deps scikit-learn && python bench/study/make_digits.py scikit_learn-*.whl

The images are the test set of “Optical Recognition of Handwritten Digits” by E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), CC BY 4.0, as
scikit-learn (BSD-3-Clause) distributes it: 1,797 images of 8 × 8 pixels with 17 shades. Nothing of
them is changed but the form in which they are stored.
"""

from __future__ import annotations

import gzip
import sys
import zipfile
from pathlib import Path

import numpy as np

MEMBER = "sklearn/datasets/data/digits.csv.gz"
OUT = Path(__file__).with_name("digits.npz")


def main(wheel: str) -> None:
    """Write the images and labels of a wheel of scikit-learn."""
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(MEMBER)).decode("ascii").splitlines()
    table = np.array([[float(cell) for cell in line.split(",")] for line in lines])
    if table.shape != (1797, 65) or table.min() < 0 or table[:, :64].max() > 16:
        raise SystemExit(f"{wheel} has other digits than those expected: {table.shape}")
    images, labels = table[:, :64].astype(np.uint8), table[:, 64].astype(np.uint8)
    np.savez_compressed(OUT, images=images, labels=labels)
    print(f"{OUT}: {len(labels)} images, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
