"""The definition of correct: after any edit, an incremental build leaves the same bytes a clean build leaves. And the test of that test."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import checkpoints
import pytest
import torch
from conftest import Space, digests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdmerge_build import keys, prepare

SHAPES = {"layer.0.weight": (8, 12), "layer.0.bias": (12,), "odd": (3,), "scalar": (), "ids": (1, 7)}


@dataclasses.dataclass(frozen=True)
class Project:
    """A recipe and its sources, as far as edits reach."""

    ratio: float = 0.5
    alpha: float = 0.25
    rule: float | None = None
    method: str = "weighted_sum"
    dtype: str = "fp16"
    compute: str = "fp32"
    inner_dtype: str = "fp32"
    keep_inner: bool = False
    name: str = "outer"
    title: str = "A title"
    seed: str = "B"
    header: str = "as it came"
    swapped: bool = False

    def lay_down(self, space: Space) -> None:
        """Write the recipe and the sources."""
        for name, seed in (("A", "A"), ("B", self.seed), ("C", "C")):
            tensors = {t: checkpoints.numbers(seed, t, shape) for t, shape in SHAPES.items() if t != "ids"}
            tensors["ids"] = torch.arange(7).reshape(1, 7) + len(seed)
            space.checkpoint(name, tensors, {"format": "pt", "note": self.header, "modelspec.title": self.header})
        first, second = ("B", "A") if self.swapped else ("A", "B")
        alpha = f'{{ base = {self.alpha}, rules = [{{ match = "layer*", value = {self.rule} }}] }}' if self.rule is not None else self.alpha
        third = 'c = "C"' if self.method == "add_difference" else ""
        space.write(
            "recipe.toml",
            f"""
recipe = 1
architecture = "generic"
[defaults]
dtype = "{self.dtype}"
compute = "{self.compute}"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[source.C]
path = "C.safetensors"
[step.inner]
formula = "{self.ratio} * {first} + {1 - self.ratio} * {second}"
dtype = "{self.inner_dtype}"
{"artifact = true" if self.keep_inner else ""}
[step.{self.name}]
title = "{self.title}"
method = "{self.method}"
a = "inner"
b = "C"
{third}
alpha = {alpha}
""",
        )


RATIOS = st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.65, 1.0, 1.5])
PROJECTS = st.builds(
    Project,
    ratio=RATIOS,
    alpha=RATIOS,
    rule=st.none() | RATIOS,
    method=st.sampled_from(["weighted_sum", "add_difference"]),
    dtype=st.sampled_from(["fp16", "bf16", "fp32", "keep"]),
    compute=st.sampled_from(["fp32", "fp64", "native"]),
    inner_dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    keep_inner=st.booleans(),
    name=st.sampled_from(["outer", "renamed"]),
    title=st.sampled_from(["A title", "Another"]),
    seed=st.sampled_from(["B", "BB"]),
    header=st.sampled_from(["as it came", "edited by a stranger"]),
    swapped=st.booleans(),
)


def check_incremental_equals_clean(projects: list[Project]) -> None:
    """Build each project in turn in one store, and each again in a store of its own, and compare every artifact."""
    with tempfile.TemporaryDirectory() as folder:
        space = Space(Path(folder))
        for n, project in enumerate(projects):
            project.lay_down(space)
            incremental = digests(space.build())
            clean = digests(space.build(store=space.path / f"clean{n}", out=space.path / f"out{n}"))

            assert incremental == clean


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PROJECTS, min_size=2, max_size=4))
def test_an_incremental_build_equals_a_clean_one(projects):
    """After any sequence of edits, an incremental build leaves the same bytes a clean build leaves."""
    check_incremental_equals_clean(projects)


FORGOTTEN = {
    "param.": (Project(), Project(alpha=0.75)),
    "param.alpha.rule": (Project(), Project(rule=0.3)),
    "dtype": (Project(dtype="fp32"), Project(dtype="bf16")),
    "compute": (Project(dtype="fp32", inner_dtype="fp16"), Project(dtype="fp32", inner_dtype="fp16", compute="native")),
    "input.": (Project(), Project(seed="BB")),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_the_property_catches_keys_that_forget(forgotten, monkeypatch):
    """The property fails when keys stop covering parameters, dtypes, precision or inputs."""
    honest = keys.describe

    class Forgetful:
        def __init__(self, sink):
            self._sink = sink

        def fact(self, name, value):
            if not name.startswith(forgotten):
                self._sink.fact(name, value)

    monkeypatch.setattr(keys, "describe", lambda step, plan, parents, sink: honest(step, plan, parents, Forgetful(sink)))

    with pytest.raises(AssertionError):
        check_incremental_equals_clean(list(FORGOTTEN[forgotten]))


def test_the_property_catches_artifact_keys_that_forget_metadata(monkeypatch):
    """The property fails when artifact keys stop covering what the header says."""
    monkeypatch.setattr(prepare, "artifact_key", lambda tensor_key, _metadata: tensor_key)

    with pytest.raises(AssertionError):
        check_incremental_equals_clean([Project(), Project(title="Another")])
