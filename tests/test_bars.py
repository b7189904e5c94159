"""Pictures of ratios: every block's value on a line, for people and for programs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.architectures import architecture_named
from sdmerge_build.bars import Style, bars, ratios_as_json
from sdmerge_build.weights.ratio import read_ratio

SD1, GENERIC = architecture_named("sd1"), architecture_named("generic")
PLAIN = Style(width=80, bar="#", zero="|")


def planned(architecture: Any = SD1, **steps: dict[str, Any]) -> Any:
    """Stand in for a plan whose steps have these ratios; a list is a ratio per model."""

    def read(value: Any) -> Any:
        return tuple(map(read, value)) if isinstance(value, list) else read_ratio(value, architecture)

    read_steps = {name: SimpleNamespace(params={key: read(value) for key, value in params.items()}) for name, params in steps.items()}
    return SimpleNamespace(architecture=architecture, steps=read_steps)


def drawn(ratio: Any, style: Style = PLAIN) -> list[list[str]]:
    """Draw a ratio, and split its lines into columns, the heading left out."""
    return [line.split() for line in list(bars(planned(mix={"alpha": ratio}), style))[1:]]


def length(ratio: Any, block: str, style: Style = PLAIN) -> int:
    """Measure the bar of a block."""
    return next((line[-1].count("#") for line in drawn(ratio, style) if line[0] == block), 0)


def test_a_line_per_block_in_order():
    """
    Blocks stand in the order people count them, each with its number and a bar in proportion to it.
    """
    lines = drawn({"preset": "GRAD_V", "base": 0.5})
    assert list(SD1.blocks) == [line[0] for line in lines]
    assert ["BASE", "0.5", "#" * 20] == lines[0]
    assert ["IN00", "1", "#" * 40] == lines[1]
    assert ["M00", "0"] == lines[13]


def test_parts_are_drawn_where_they_differ():
    """
    A part stands behind its block, set in, when its value is another; otherwise it is not mentioned.
    """
    lines = list(bars(planned(mix={"alpha": {"base": 0.5, "blocks": {"VAE": 1.0, "IN00": 0.25, "TIME": 0.75}}}), PLAIN))
    assert "alpha of `mix`:" == lines[0]
    assert ["BASE", "  VAE", "IN00", "  TIME", "IN01"] == [line[4:10].rstrip() for line in lines[1:6]]
    assert not [line for line in lines if "CLIP_L" in line or " OUT " in line]


def test_what_is_below_zero_goes_to_the_left():
    """
    Where a value is negative there is a line at zero, the same in every row; 0 to 1 keeps its place on the scale.
    """
    lines = list(bars(planned(mix={"alpha": {"base": 0, "blocks": {"IN00": -1.0, "IN01": 1.0, "IN02": -0.5}}}), PLAIN))[1:]
    assert {line.index("|") for line in lines} == {lines[0].index("|")}
    assert ["#" * 20 + "|", "|" + "#" * 20, "#" * 10 + "|"] == [line.split()[-1] for line in lines[1:4]]


def test_values_beyond_one_stretch_the_scale():
    """
    The longest bar is the greatest value, or 1 where none is greater.
    """
    ratio = {"base": 0, "blocks": {"IN00": 4.0, "IN01": 1.0}}
    assert (40, 10) == (length(ratio, "IN00"), length(ratio, "IN01"))
    assert 20 == length({"base": 0, "blocks": {"IN00": 0.5}}, "IN00")


def test_what_is_not_zero_is_seen():
    """
    However small a value beside the greatest, it has a mark.
    """
    assert 1 == length({"base": 0, "blocks": {"IN00": 1e-9}}, "IN00")
    assert 1 == length({"base": 0, "blocks": {"IN00": 1e300, "IN01": 1}}, "IN01")


numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50)
@given(values=st.lists(numbers, min_size=1, max_size=4), width=st.integers(1, 120))
def test_no_bar_is_wider_than_its_line(values: list[float], width: int):
    """
    Whatever the numbers, a bar fits beside them or is left out.
    """
    ratio = {"base": 0.5, "blocks": dict(zip(SD1.depth, values, strict=False))}
    lines = list(bars(planned(mix={"alpha": ratio}), Style(width=width, bar="#", zero="|")))[1:]
    assert all(len(line) <= width or "#" not in line for line in lines)
    assert all(line.count("#") <= 40 for line in lines)


def test_what_names_decide_is_text():
    """
    Elemental entries and rules stand below the blocks as they would be written; signs that a terminal obeys are spelled out.
    """
    ratio = {"base": 0.5, "blocks": {"M00": 0}, "elemental": "IN00-IN05:attn1:0.3", "rules": [{"match": "*.\x1b[2J*", "value": 1}]}
    assert ["    elemental  IN00-IN05:attn1:0.3", "    rule  *.\\x1b[2J* = 1"] == list(bars(planned(mix={"alpha": ratio}), PLAIN))[-2:]


@pytest.mark.parametrize(("architecture", "where"), [(SD1, "all blocks"), (GENERIC, "all tensors")])
def test_rules_alone_need_no_bars(architecture: Any, where: str):
    """
    Where all blocks are alike one line says so.
    """
    plan = planned(architecture, mix={"alpha": {"base": 0.5, "rules": [{"match": "*attn2*", "value": 0.8}]}})
    assert ["alpha of `mix`:", f"    {where}  0.5", "    rule  *attn2* = 0.8"] == list(bars(plan, PLAIN))


def test_numbers_are_not_drawn():
    """
    A ratio that is one number everywhere is in the reasons, and needs no picture.
    """
    plan = planned(mix={"alpha": 0.5, "beta": {"base": 0.5, "blocks": {"IN*": 0.5}}})
    assert [] == list(bars(plan, PLAIN))
    assert [] == ratios_as_json(plan)


def test_ratios_that_are_alike_are_drawn_once():
    """
    Several steps with one table share its picture; those with another have their own.
    """
    v, a = {"alpha": {"preset": "GRAD_V"}}, {"alpha": {"preset": "GRAD_A"}}
    headings = [line for line in bars(planned(one=v, two=a, three=v), PLAIN) if not line.startswith(" ")]
    assert ["alpha of `one`, `three`:", "alpha of `two`:"] == headings


def test_ratios_per_model_are_drawn_each():
    """
    A list of ratios has a picture per model whose ratio is more than a number.
    """
    plan = planned(mix={"weights": [0.5, {"preset": "GRAD_V"}, {"preset": "GRAD_A"}]})
    headings = [line for line in bars(plan, PLAIN) if not line.startswith(" ")]
    assert ["weights.2 of `mix`:", "weights.3 of `mix`:"] == headings


def test_programs_get_every_value():
    """
    As JSON a ratio is the value of every block, of parts that differ, and what names decide.
    """
    ratio = {"mbw": [n / 100 for n in range(26)], "blocks": {"VAE": 1}, "elemental": ":norm:1", "rules": [{"match": "*.bias", "value": 0.5}]}
    [table] = ratios_as_json(planned(mix={"alpha": ratio}))
    assert table == {
        "step": "mix",
        "parameter": "alpha",
        "blocks": {block: n / 100 for n, block in enumerate(SD1.blocks)},
        "parts": {"VAE": 1.0},
        "elemental": [":norm:1.0"],
        "rules": [{"match": "*.bias", "value": 0.5}],
    }
