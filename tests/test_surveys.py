"""Surveys: what methods must know of whole models is found once, before the pass, and kept."""

from __future__ import annotations

import json

import checkpoints
import numpy as np
import pytest
import torch
from conftest import Space, digests

from sdmerge_build.errors import SdbuildError

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
    return [json.loads(path.read_text())["findings"] for path in (space.path / "cache" / "findings").iterdir()]


def _normal(x: np.ndarray) -> np.ndarray:
    """Divide by the norm along the first dimension, as torch's `normalize` does."""
    return x / np.maximum(np.linalg.norm(x, axis=0) if x.ndim else abs(x), 1e-12)


def _columns(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Take the cosine along the first dimension."""
    norms = np.maximum(np.linalg.norm(x, axis=0), 1e-8) * np.maximum(np.linalg.norm(y, axis=0), 1e-8) if x.ndim else abs(x) * abs(y)
    return (x * y).sum(0) / norms if x.ndim else x * y / norms


def _whole(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))


def test_steps_of_one_key_have_one_survey_whatever_their_names(surveyed: Space):
    """
    Two steps that say the same are made once; surveys of what stands on either find it, in any order of use.
    """
    head = RECIPE.split("[step.alike]", maxsplit=1)[0]
    twins = "".join(f'[step.{name}]\nmethod = "cosine_a"\na = "A"\nb = "B"\nalpha = 0.3\n' for name in "XY")
    more = '[step.Z]\nmethod = "cosine_a"\na = "Y"\nb = "B"\nalpha = 0.3\n'
    made = set()
    for n, (a, b) in enumerate([("Z", "X"), ("X", "Z")]):
        surveyed.write("recipe.toml", f'{head}{twins}{more}[step.W]\nmethod = "add"\na = "{a}"\nb = "{b}"\nalpha = 1.0\ncompute = "fp64"\n')
        [wish] = surveyed.build(store=surveyed.path / f"store{n}", out=surveyed.path / f"out{n}").wishes
        made.add(wish.stored.tensor_digest)

    assert len(made) == 1


@pytest.mark.parametrize("text", ['{"findings": {"low": 0.1, "high": 0.9}, "digest": "0"}', '{"low": 0.1, "high": 0.9}', "[]", "", '{"findings": 5}'])
def test_findings_that_are_not_as_they_were_written_are_found_again(surveyed: Space, text: str):
    """
    A findings file that somebody or something changed is not believed.
    """
    first = surveyed.build()
    for path in (surveyed.path / "cache" / "findings").iterdir():
        path.write_text(text, encoding="utf-8")
    (surveyed.path / "cache" / "artifacts").rename(surveyed.path / "gone")

    assert digests(surveyed.build()) == digests(first)


OWN = """
from sdmerge_build.methods import Findings, Ratio, Survey, method

def look(models, /, alpha=None):
    {look}

@method(version=1, survey=Survey(name="mine", version=1, function=look, parameters=({parameters})))
def mine(a, b, /, *, alpha: Ratio = 0.5, findings: Findings):
    \"\"\"Scale by what the survey found.\"\"\"
    return a + b * (alpha * findings["1"])
"""


@pytest.mark.parametrize(
    ("look", "parameters", "message"),
    [
        ("return 5", "", "the survey of method `mine` fails: TypeError"),
        ("return {'a': models.tensor(0, models.names[0])}", "", "the survey of method `mine` fails: TypeError"),
        ("return 1 / 0", "", "the survey of method `mine` fails: ZeroDivisionError"),
        ("import sys; sys.exit(0)", "", "the survey of method `mine` fails: SystemExit"),
        ("return {}", '"alfa",', "its survey asks for `alfa`, which `mine` does not have"),
    ],
)
def test_a_survey_of_ones_own_that_fails_says_so(surveyed: Space, look: str, parameters: str, message: str):
    """
    No traceback for a survey that returns what cannot be kept, raises, or asks for what is not there.
    """
    surveyed.write("mine.py", OWN.format(look=look, parameters=parameters))
    head = RECIPE.split("[step.alike]", maxsplit=1)[0].replace('"sd1"', '"sd1"\nmethods = ["mine.py"]')
    surveyed.write("recipe.toml", head + '[step.X]\nmethod = "mine"\na = "A"\nb = "B"\n')
    with pytest.raises(SdbuildError) as caught:
        surveyed.build()

    assert message in str(caught.value)


def test_findings_are_the_same_when_they_are_read_back(surveyed: Space):
    """
    Numbers as keys become text, as in the file: the first run sees what later runs will.
    """
    surveyed.write("mine.py", OWN.format(look="return {1: 0.25}", parameters=""))
    head = RECIPE.split("[step.alike]", maxsplit=1)[0].replace('"sd1"', '"sd1"\nmethods = ["mine.py"]')
    surveyed.write("recipe.toml", head + '[step.X]\nmethod = "mine"\na = "A"\nb = "B"\n')
    first = surveyed.build()
    again = surveyed.build(store=surveyed.path / "cache", out=surveyed.path / "again")

    assert digests(first) == digests(again)
