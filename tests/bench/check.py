"""Checks what the benchmark made: some tensors of the artifact against 0.3 A + 0.7 B done by numpy in float32."""

from __future__ import annotations

import sys

import numpy as np
from safetensors import safe_open

a, b, made = (safe_open(path, "np") for path in sys.argv[1:4])
names = [name for name in sorted(made.keys()) if "position_ids" not in name]
assert set(made.keys()) == set(a.keys())
for name in names[::97]:
    x, y = (file.get_tensor(name).astype(np.float32) for file in (a, b))
    expected = (x * np.float32(1 - 0.7) + y * np.float32(0.7)).astype(np.float16)
    assert np.array_equal(expected, made.get_tensor(name)), name
