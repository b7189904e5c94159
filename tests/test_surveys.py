"""Surveys: what methods must know of whole models is found once, before the pass, and kept."""

from __future__ import annotations

import json

import checkpoints
import numpy as np
import pytest
import torch
from conftest import Space, digests

RECIPE = """
recipe = 1
architecture = "sd1"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[step.alike]
method = "cosine_a"
a = "A"
b = "B"
alpha = 0.1
[step.nested]
method = "cosine_b"
a = "alike-in-memory"
b = "B"
alpha = { base = 0.2, blocks = { "OUT*" = 0.0 } }
[step.alike-in-memory]
method = "cosine_a"
a = "half"
b = "B"
alpha = 0.3
[step.half]
formula = "0.5 * A + 0.5 * B"
"""


@pytest.fixture
def surveyed(space: Space) -> Space:
    """Provide two fine-tunes of one model, and steps that survey them, and each other."""
    base = checkpoints.miniature("sd1", "base", every=12)
    for name in "AB":
        other = checkpoints.miniature("sd1", name, every=12)
        tuned = {t: (x.float() + other[t].float() / 4).half() if x.is_floating_point() else x for t, x in base.items()}
        space.checkpoint(name, tuned)
    space.write("recipe.toml", RECIPE)
    return space


def findings(space: Space) -> dict[str, int]:
    """List the files of findings, with their times."""
    return {path.name: path.stat().st_mtime_ns for path in (space.path / "cache" / "findings").iterdir()}


def test_findings_are_kept_and_another_ratio_reuses_them(surveyed: Space):
    """
    Each survey leaves one file; another ratio is another merge with the same findings, and damaged ones are found again.
    """
    first = surveyed.build()
    kept = findings(surveyed)
    surveyed.edit("alpha = 0.1", "alpha = 0.15")
    second = surveyed.build()

    assert len(kept) == 3
    assert findings(surveyed) == kept
    assert [wish.state.value for wish in second.wishes] == ["built", "reused"]
    assert first.wishes[0].tensor_key != second.wishes[0].tensor_key

    for name in kept:
        (surveyed.path / "cache" / "findings" / name).write_text("{", encoding="utf-8")
    surveyed.edit("alpha = 0.15", "alpha = 0.1")
    third = surveyed.build(out=surveyed.path / "again")
    assert third.wishes[0].stored.sha256 == first.wishes[0].stored.sha256


def test_what_is_found_does_not_depend_on_threads(surveyed: Space):
    """
    One thread or three find the same, and merge the same.
    """
    few = surveyed.build(jobs=1)
    many = surveyed.build(jobs=3, store=surveyed.path / "other", out=surveyed.path / "other-out")
    contents = {path.name: path.read_text() for path in (surveyed.path / "cache" / "findings").iterdir()}

    assert digests(few) == digests(many)
    assert contents == {path.name: path.read_text() for path in (surveyed.path / "other" / "findings").iterdir()}


def test_cosine_a_is_supermergers_two_passes(surveyed: Space):
    """
    Against supermerger's algorithm in NumPy over whole models: percentiles of all columns first, then the mixture; the VAE stays `a`.
    """
    surveyed.build()
    mix = surveyed.load("alike")
    a, b = ({t: x.double().numpy() for t, x in _floats(surveyed, name).items()} for name in "AB")
    entries = []
    for name in a:
        if not name.startswith("first_stage_model."):
            unit_a, unit_b = a[name] / np.linalg.norm(a[name]), b[name] / np.linalg.norm(b[name])
            entries.append(np.atleast_1d(_columns(_normal(unit_a), _normal(unit_b))).ravel())
    every = np.concatenate(entries)
    every = every[~np.isnan(every)]
    every = every[every >= np.percentile(every, 1, method="midpoint")]
    every = every[every <= np.percentile(every, 99, method="midpoint")]
    low, high = every.min(), every.max()
    for name, tensor in mix.items():
        if name not in a:
            continue
        if name.startswith("first_stage_model."):
            expected = a[name]
        else:
            c = (_columns(_normal(a[name]), _normal(b[name])) + _whole(_normal(a[name]), _normal(b[name]))) / 2
            k = np.clip((c - low) / (high - low) - 0.1, 0, 1)
            expected = k * a[name] + (1 - k) * b[name]
        assert np.abs(tensor.double().numpy() - expected).max() <= 2e-4, name
    [kept] = [f for f in _kept(surveyed) if abs(f["low"] - low) < 1e-9]
    assert kept["high"] == pytest.approx(high, rel=1e-9)


def _floats(space: Space, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {t: x for t, x in load_file(space.path / f"{name}.safetensors").items() if x.is_floating_point()}


def _kept(space: Space) -> list[dict[str, float]]:
    return [json.loads(path.read_text()) for path in (space.path / "cache" / "findings").iterdir()]


def _normal(x: np.ndarray) -> np.ndarray:
    """Divide by the norm along the first dimension, as torch's `normalize` does."""
    return x / np.maximum(np.linalg.norm(x, axis=0) if x.ndim else abs(x), 1e-12)


def _columns(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Take the cosine along the first dimension."""
    norms = np.maximum(np.linalg.norm(x, axis=0), 1e-8) * np.maximum(np.linalg.norm(y, axis=0), 1e-8) if x.ndim else abs(x) * abs(y)
    return (x * y).sum(0) / norms if x.ndim else x * y / norms


def _whole(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))
