"""Damaged models: what is infinite or not a number goes through every method as such, and through none as an accident."""

from __future__ import annotations

import math

import applied
import checkpoints
import pytest
import torch
from test_methods import FINDINGS, PARAMS, usual

from sdmerge_build.methods import methods


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", [name for name in methods() if name != "rebasin"])
def test_no_method_stumbles_over_what_is_not_finite(name, bad):
    """
    A tensor with one such number comes out in its shape; whether it is refused is the step's policy, not the method's.
    """
    method = methods()[name]
    models = [checkpoints.numbers(letter, "w", (6, 4, 3, 3), torch.float32) for letter in "ABC"[: 3 if method.is_open else len(method.models)]]
    models[-1][2, 1, 0, 0] = bad
    models[0][3, 1, 0, 0] = -bad
    params = {p.name: usual(p) for p in method.parameters.values()} | PARAMS.get(name, {})

    assert applied.evaluate(method, models, params, findings=FINDINGS.get(name)).shape == (6, 4, 3, 3)
