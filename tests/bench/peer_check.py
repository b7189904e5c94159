"""Compares some tensors of a peer's result with ours: `python peer_check.py TOOL OURS THEIRS MODEL…`. Started by methods.py.

peers.py compares every tensor and says why some differ; here a result must be the same but for rounding in all but a few elements. mergekit
rounds to float16 after every operation, so a difference counts in units in the last place of the largest number that went in, and the lengths of its largest
tensors are more than float16 can hold: these are left out.
"""

from __future__ import annotations

import math
import sys

import numpy as np
from safetensors import safe_open

UNITS, SHARE = {"sd-mecha": 1, "mergekit": 8}[sys.argv[1]], 0.01
ours, theirs, *models = (safe_open(path, "np") for path in sys.argv[2:])
names = [name for name in sorted(ours.keys()) if "position_ids" not in name]
assert set(names) <= set(theirs.keys())
for name in names[::97]:
    if math.prod(ours.get_slice(name).get_shape()) > 1 << 22:
        continue
    x, y, *inputs = (file.get_tensor(name).astype(np.float64) for file in (ours, theirs, *models))
    assert theirs.get_tensor(name).dtype == ours.get_tensor(name).dtype == np.float16, name
    largest = np.max(np.abs([x, *inputs]), axis=0)
    differing = np.count_nonzero(np.abs(x - y) > UNITS * np.spacing(largest.astype(np.float16)).astype(np.float64))
    assert differing <= max(4, SHARE * x.size), f"{name}: {differing} of {x.size} elements differ"
