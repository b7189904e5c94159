"""What a build leaves behind, compared with arithmetic done by other hands."""

from __future__ import annotations

import checkpoints
import numpy as np
import torch
from conftest import Space


def test_an_artifact_is_the_weighted_sum_of_its_parents(space: Space):
    """Every tensor is 0.3 A + 0.7 B in float32, rounded once to float16."""
    space.pair(every=7)
    space.build()

    a, b, mix = checkpoints.miniature("sd1", "A", every=7), checkpoints.miniature("sd1", "B", every=7), space.load("mix")
    assert set(mix) == set(a)
    for name, tensor in mix.items():
        if name.endswith("position_ids"):
            assert torch.equal(tensor, a[name])
            continue
        x, y = a[name].numpy().astype(np.float32), b[name].numpy().astype(np.float32)
        expected = (x * np.float32(0.3) + y * np.float32(0.7)).astype(np.float16)
        assert np.array_equal(tensor.numpy(), expected), name
