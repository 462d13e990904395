"""Write digits.npz from scikit-learn (host only): python -m edge_bcs.data.make_digits

The 1,797 images of 8×8 pixels are the test set of the UCI "Optical Recognition of Handwritten Digits" data
(Alpaydin and Kaynak, 1998; CC BY 4.0) as scikit-learn (BSD licence) ships them: counts 0 to 16 of dark
pixels in 4×4 blocks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


def main() -> None:
    """Write the file beside this module."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez_compressed(
        Path(__file__).with_name("digits.npz"),
        images=digits.images.astype(np.uint8),
        labels=digits.target.astype(np.uint8),
    )


if __name__ == "__main__":
    main()
