"""Matrices: one step table becomes one per combination of its axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdmerge_build.errors import Issue
from sdmerge_build.matrix import MAX_STEPS, expand_matrix
from sdmerge_build.tomltext import Lines

HERE = Path("recipe.toml")


def expand(name: str, table: dict[str, Any], text: str = "") -> tuple[dict[str, dict[str, Any]], list[Issue]]:
    """Expand one step table; return its steps and the complaints."""
    issues: list[Issue] = []
    return dict(expand_matrix(name, table, Lines(HERE, text), issues)), issues


def test_a_step_without_a_matrix_is_left_as_it_is():
    """
    Braces mean nothing where there are no axes.
    """
    table = {"formula": "A", "title": "{ratio}"}
    assert ({"mix": table}, []) == expand("mix", table)


def test_every_combination_is_a_step_in_the_order_it_is_written():
    """
    The last axis turns fastest, as in nested loops.
    """
    steps, issues = expand("mix-{a}-{b}", {"formula": "{a} * A + {b} * B", "matrix": {"a": [2, 1], "b": ["x", "y"]}})
    expected = {
        "mix-2-x": {"formula": "2 * A + x * B"},
        "mix-2-y": {"formula": "2 * A + y * B"},
        "mix-1-x": {"formula": "1 * A + x * B"},
        "mix-1-y": {"formula": "1 * A + y * B"},
    }
    assert [] == issues
    assert list(expected.items()) == list(steps.items())


@pytest.mark.parametrize(
    ("value", "field", "expected"),
    [
        (0.65, "{x}", 0.65),
        (1, "{x}", 1),
        ("A", "{x}", "A"),
        (0.65, "{x} ", "0.65 "),
        (0.65, "{x} * A", "0.65 * A"),
        (0.5, "{x}{x}", "0.50.5"),
        (1e-7, "{x} * A", "1e-07 * A"),
        (0.3, ["{x}", "1", 2], [0.3, "1", 2]),
        (0.3, {"base": "{x}", "blocks": {"IN04": "{x}"}}, {"base": 0.3, "blocks": {"IN04": 0.3}}),
        ("IN04", {"base": 0.5, "blocks": {"{x}": 0.1}}, {"base": 0.5, "blocks": {"IN04": 0.1}}),
        (4, {"base": 0.5, "blocks": {"IN0{x}": 0.1}}, {"base": 0.5, "blocks": {"IN04": 0.1}}),
        (0.3, [{"match": "*.{x}.*", "value": "{x}"}], [{"match": "*.0.3.*", "value": 0.3}]),
        (0.3, True, True),
        ("{x}", "{x}", "{x}"),
    ],
)
def test_a_placeholder_is_the_value_itself_where_it_stands_alone(value: Any, field: Any, expected: Any):
    """
    `alpha = "{x}"` is a number when the axis holds numbers; inside longer text the value is written out; keys are text.
    """
    steps, issues = expand("mix-{x}", {"field": field, "matrix": {"x": [value]}})
    assert [] == issues
    assert {"field": expected} == steps[f"mix-{value}"]
    assert type(expected) is type(steps[f"mix-{value}"]["field"])


MATRIX = "`matrix` must be a table of lists, such as `{ ratio = [0.6, 0.7] }`"


@pytest.mark.parametrize(
    ("axes", "what"),
    [
        ({}, MATRIX),
        ([0.6, 0.7], MATRIX),
        (0.6, MATRIX),
        ("0.6", MATRIX),
        ({"x": []}, "axis `x` must be a list of numbers or texts"),
        ({"x": 0.6}, "axis `x` must be a list of numbers or texts"),
        ({"x": "0.6"}, "axis `x` must be a list of numbers or texts"),
        ({"x": [[0.6]]}, "axis `x` must be a list of numbers or texts"),
        ({"x": [{"y": 1}]}, "axis `x` must be a list of numbers or texts"),
        ({"x": [0.6, True]}, "axis `x` must be a list of numbers or texts"),
        ({"x": list(range(MAX_STEPS + 1))}, "`matrix` makes 10001 steps; at most 10000 are built"),
        ({"x": list(range(101)), "y": list(range(100))}, "`matrix` makes 10100 steps; at most 10000 are built"),
        ({axis: list(range(1000)) for axis in "xyzuvw"}, f"`matrix` makes {1000**6} steps; at most 10000 are built"),
    ],
)
def test_a_matrix_that_is_none_is_refused_on_its_line(axes: Any, what: str):
    """
    The complaint names the step, stands on the line of `matrix`, and comes before anything is spelled out.
    """
    steps, issues = expand("mix-{x}", {"formula": "A", "matrix": axes}, '[step."mix-{x}"]\nformula = "A"\nmatrix = 1\n')
    assert {} == steps
    assert [Issue(where="recipe.toml:3", what=f"step `mix-{{x}}`: {what}")] == issues


def test_an_axis_that_the_name_lacks_is_refused():
    """
    Without it, several steps would share one name; the hint shows a name that would do.
    """
    steps, issues = expand("mix", {"formula": "{x} * A", "matrix": {"x": [1, 2]}}, "\n[step.mix]\n")
    what = "the name of step `mix` does not hold `{x}`, so its steps would share one name"
    assert {} == steps
    assert [Issue(where="recipe.toml:2", what=what, hint='write [step."mix-{x}"]')] == issues


@pytest.mark.parametrize(
    ("name", "fields", "unknown", "hint"),
    [
        ("mix-{ratio}", {"formula": "{ratoi} * A"}, "ratoi", "did you mean `ratio`?"),
        ("mix-{ratio}-{other}", {"formula": "A"}, "other", ""),
        ("mix-{ratio}", {"alpha": {"blocks": {"{block}": 1}}}, "block", ""),
        ("mix-{ratio}", {"weights": [1, ["{}"]]}, "", ""),
    ],
)
def test_a_placeholder_that_is_no_axis_is_refused(name: str, fields: dict[str, Any], unknown: str, hint: str):
    """
    A misspelt axis is an error wherever it stands, with the nearest axis.
    """
    steps, issues = expand(name, fields | {"matrix": {"ratio": [1]}}, f'[step."{name}"]')
    assert {} == steps
    assert [Issue(where="recipe.toml:1", what=f"step `{name}` holds `{{{unknown}}}`, which is not an axis of its matrix", hint=hint)] == issues


@given(
    axes=st.dictionaries(
        st.sampled_from(["ratio", "base", "v"]),
        st.lists(st.integers(0, 99) | st.sampled_from(["A", "B"]), min_size=1, max_size=5, unique=True),
        min_size=1,
    )
)
def test_a_matrix_makes_as_many_steps_as_its_axes_multiply_to(axes: dict[str, list[Any]]):
    """
    For any axes of distinct values, every combination has a name and a table of its own.
    """
    name = "-".join(f"{{{axis}}}" for axis in axes)
    steps, issues = expand(name, {"values": [f"{{{axis}}}" for axis in axes], "matrix": axes})
    count = 1
    for values in axes.values():
        count *= len(values)
    assert [] == issues
    assert count == len(steps)
    assert list(steps) == ["-".join(map(str, table["values"])) for table in steps.values()]
