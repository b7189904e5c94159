"""What AUTOMATIC1111's Checkpoint Merger does, bare: load both models, mix them in their own dtype, save.

Written from the description of its algorithm. `--equal-work` adds what sdbuild does and it does not: a sha256 and an fsync of the result.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def merge(first: Path, second: Path, result: Path, multiplier: float) -> None:
    """Weighted sum, tensor by tensor, into the first model's dictionary."""
    theta_0, theta_1 = load_file(first), load_file(second)
    for key in theta_0:
        if key in theta_1 and not key.endswith("position_ids"):
            theta_0[key] = (1 - multiplier) * theta_0[key] + multiplier * theta_1[key]
    save_file(theta_0, result, metadata={"format": "pt"})


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:4]]
    merge(*paths, 0.7)
    if "--equal-work" in sys.argv:
        with paths[2].open("rb") as file:
            print(hashlib.file_digest(file, "sha256").hexdigest())
            os.fsync(file.fileno())
