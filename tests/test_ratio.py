"""Ratios: numbers and tables, resolved to one value per tensor."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.architectures import BASE, architecture_named
from sdmerge_build.weights.ratio import RatioError, read_ratio

SD1, SDXL, GENERIC = (architecture_named(name) for name in ("sd1", "sdxl", "generic"))

UNET = "model.diffusion_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"
IN04 = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
IN05 = f"{UNET}input_blocks.5.0.in_layers.2.weight"
IN10 = f"{UNET}input_blocks.10.0.in_layers.2.weight"
IN11 = f"{UNET}input_blocks.11.0.in_layers.2.weight"
MIDDLE = f"{UNET}middle_block.1.proj_in.weight"
OUT00 = f"{UNET}output_blocks.0.0.in_layers.2.weight"
OUT11 = f"{UNET}output_blocks.11.0.in_layers.2.weight"
TIME = f"{UNET}time_embed.0.weight"
OUT = f"{UNET}out.2.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
VAE = "first_stage_model.encoder.conv_in.weight"
CONTROL = "control_model.input_hint_block.0.weight"


def values(ratio: Any, *tensors: str) -> list[float]:
    """Read a ratio for SD 1 and ask it for the values of tensors."""
    read = read_ratio(ratio, SD1)
    return [read.of(tensor, SD1) for tensor in tensors]


def facts(ratio: Any) -> list[tuple[str, str]]:
    """List what a key sees of a ratio for SD 1."""
    return list(read_ratio(ratio, SD1).facts())


def counting(length: int, first: float = 0) -> str:
    """Write block weights that count upwards, so that each says its own position."""
    return ",".join(str((first + n) / 100) for n in range(length))


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.3, [0.3, 0.3, 0.3, 0.3]),
        (1, [1.0, 1.0, 1.0, 1.0]),
        (-0.5, [-0.5, -0.5, -0.5, -0.5]),
        (1.75, [1.75, 1.75, 1.75, 1.75]),
        ({"base": 0.5}, [0.5, 0.5, 0.5, 0.5]),
        ({"base": 0.5, "blocks": {"IN04": 0.2}}, [0.2, 0.5, 0.5, 0.5]),
        ({"base": 0.5, "blocks": {"IN04-IN05": 0.2}}, [0.2, 0.2, 0.5, 0.5]),
        ({"base": 0.5, "blocks": {"IN05-IN04": 0.2}}, [0.2, 0.2, 0.5, 0.5]),
        ({"base": 0.5, "blocks": {"IN05-M00": 0.2}}, [0.5, 0.2, 0.2, 0.5]),
        ({"base": 0.5, "blocks": {"IN*": 0.2}}, [0.2, 0.2, 0.5, 0.5]),
        ({"base": 0.5, "blocks": {"IN0[0-4]": 0.2}}, [0.2, 0.5, 0.5, 0.5]),
        ({"base": 0.5, "blocks": {"?0?": 0.2}}, [0.5, 0.5, 0.2, 0.5]),
        ({"base": 0.5, "blocks": {"BASE": 0.2}}, [0.5, 0.5, 0.5, 0.2]),
        ({"base": 0.5, "blocks": {"CLIP_L": 0.2}}, [0.5, 0.5, 0.5, 0.2]),
        ({"base": 0.5, "blocks": {"*": 0.2}}, [0.2, 0.2, 0.2, 0.2]),
        ({"base": 0.5, "rules": [{"match": "*attn2*", "value": 0.2}]}, [0.2, 0.5, 0.5, 0.5]),
        ({"base": 0.5, "rules": [{"match": "model.*", "value": 1}]}, [1.0, 1.0, 1.0, 0.5]),
        ({"base": 0.5, "rules": [{"match": "attn2", "value": 0.2}]}, [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_a_ratio_gives_every_tensor_its_value(ratio: Any, expected: list[float]):
    """
    A number is for every tensor; blocks, ranges, globs and rules say otherwise for some.
    """
    assert expected == values(ratio, IN04, IN05, MIDDLE, TEXT)


def test_the_last_match_wins():
    """
    A profile, then blocks, then elemental text, then rules; within each, the later entry.
    """
    layers: dict[str, Any] = {"base": 0.1}
    assert [0.1, 0.1] == values(layers, IN04, IN05)
    layers["mbw"] = ",".join(["0.2"] * 25)
    assert [0.2, 0.2, 0.1] == values(layers, IN04, IN05, TEXT)
    layers["blocks"] = {"IN*": 0.3, "IN04": 0.4}
    assert [0.4, 0.3] == values(layers, IN04, IN05)
    layers["blocks"] = {"IN04": 0.4, "IN*": 0.3}
    assert [0.3, 0.3] == values(layers, IN04, IN05)
    layers["elemental"] = "IN04:attn2:0.45, IN05:attn2:0.46"
    assert [0.45, 0.3] == values(layers, IN04, IN05)
    layers["elemental"] += ", ::0.47, IN05:in_layers:0.48"
    assert [0.47, 0.48] == values(layers, IN04, IN05)
    layers["rules"] = [{"match": "*input_blocks.4.*", "value": 0.5}, {"match": "*.weight", "value": 0.6}]
    assert [0.6, 0.6] == values(layers, IN04, IN05)
    layers["rules"].reverse()
    assert [0.5, 0.6] == values(layers, IN04, IN05)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({}, {"TIME": 0.5, "OUT": 0.5, "CLIP_L": 0.5, "VAE": 0.5}),
        ({"IN00": 0.1}, {"TIME": 0.1, "OUT": 0.5, "CLIP_L": 0.5, "VAE": 0.5}),
        ({"OUT11": 0.1}, {"TIME": 0.5, "OUT": 0.1, "CLIP_L": 0.5, "VAE": 0.5}),
        ({"OUT*": 0.1}, {"TIME": 0.5, "OUT": 0.1, "CLIP_L": 0.5, "VAE": 0.5}),
        ({"BASE": 0.1}, {"TIME": 0.5, "OUT": 0.5, "CLIP_L": 0.1, "VAE": 0.1}),
        ({"TIME": 0.1}, {"TIME": 0.1, "OUT": 0.5, "CLIP_L": 0.5, "VAE": 0.5}),
        ({"IN00": 0.1, "TIME": 0.5}, {"TIME": 0.5, "OUT": 0.5, "CLIP_L": 0.5, "VAE": 0.5}),
        ({"BASE": 0.1, "VAE": 0.0}, {"TIME": 0.5, "OUT": 0.5, "CLIP_L": 0.1, "VAE": 0.0}),
        ({"OUT": 0.1}, {"TIME": 0.5, "OUT": 0.1, "CLIP_L": 0.5, "VAE": 0.5}),
        ({"OUT": 0.1, "OUT*": 0.2, "OUT11": 0.3}, {"TIME": 0.5, "OUT": 0.3, "CLIP_L": 0.5, "VAE": 0.5}),
    ],
)
def test_a_part_follows_its_block_unless_it_is_named(blocks: dict[str, float], expected: dict[str, float]):
    """
    The time embedding goes with the first block and the last convolution with the last, text encoder and VAE with BASE.
    """
    tensors = {"TIME": TIME, "OUT": OUT, "CLIP_L": TEXT, "VAE": VAE}
    assert expected == dict(zip(tensors, values({"base": 0.5, "blocks": blocks}, *tensors.values()), strict=True))


def test_naming_a_part_leaves_its_block_alone():
    """
    `OUT` is the last convolution and not the twelve output blocks.
    """
    assert [0.1, 0.5, 0.5] == values({"base": 0.5, "blocks": {"OUT": 0.1}}, OUT, OUT00, OUT11)
    assert [0.1, 0.5] == values({"base": 0.5, "blocks": {"TIME": 0.1}}, TIME, CONV_IN)
    assert [0.1, 0.5, 0.5] == values({"base": 0.5, "blocks": {"VAE": 0.1}}, VAE, TEXT, CONTROL)


def test_block_weights_are_counted_as_people_paste_them():
    """
    26 values for SD 1: BASE, IN00 to IN11, M00, OUT00 to OUT11; spaces and signs do not matter.
    """
    tensors = (TEXT, CONV_IN, IN04, IN10, IN11, MIDDLE, OUT00, OUT11)
    assert [0.0, 0.01, 0.05, 0.11, 0.12, 0.13, 0.14, 0.25] == values({"mbw": counting(26)}, *tensors)
    assert [0.9, 0.01, 0.05, 0.11, 0.12, 0.13, 0.14, 0.25] == values({"base": 0.9, "mbw": counting(25, 1)}, *tensors)
    assert values({"mbw": counting(26)}, *tensors) == values({"mbw": f" {counting(26).replace(',', ' , ')}\n"}, *tensors)


def test_block_weights_of_sdxl_are_twenty():
    """
    20 values for SDXL: BASE, IN00 to IN08, M00, OUT00 to OUT08; or 19 beside a base.
    """
    ratio = read_ratio({"mbw": counting(20)}, SDXL)
    assert [n / 100 for n in range(20)] == [ratio.of(f"{prefixes[0]}x" if prefixes else "x", SDXL) for prefixes in SDXL.blocks.values()]
    assert [0.01, 0.01, 0.19] == [ratio.of(f"{UNET}{part}.0.weight", SDXL) for part in ("time_embed", "label_emb.0", "out")]

    beside = read_ratio({"base": 0.0, "mbw": counting(19, 1)}, SDXL)
    assert list(ratio.facts()) == list(beside.facts())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (0.3, {"base": 0.3}),
        (0.3, {"base": 0.3, "blocks": {}, "rules": []}),
        (0.3, {"base": 0.3, "blocks": {"IN*": 0.3, "TIME": 0.3}}),
        (0.3, {"base": 0.9, "blocks": {"*": 0.3}}),
        (0.3, {"mbw": ",".join(["0.30"] * 26)}),
        (0.3, {"base": 0.3, "mbw": ",".join(["3e-1"] * 25)}),
        ({"base": 0.5, "blocks": {"IN04": 0.2, "IN05": 0.2}}, {"base": 0.5, "blocks": {"IN04-IN05": 0.2}}),
        ({"base": 0.5, "blocks": {"IN05": 0.2, "IN04": 0.1}}, {"base": 0.5, "blocks": {"IN04": 0.1, "IN05": 0.2}}),
        ({"base": 0.5, "blocks": {"IN*": 0.9, "IN0*": 0.5, "IN1?": 0.5}}, 0.5),
        ({"base": 0.5, "blocks": {"IN00": 0.1}}, {"base": 0.5, "blocks": {"TIME": 0.1, "IN00": 0.1}}),
        ({"base": 0.5, "blocks": {"BASE": 0.1}}, {"base": 0.1, "blocks": {"IN00-OUT11": 0.5}}),
        ({"mbw": counting(26)}, {"base": 0, "blocks": {b: n / 100 for n, b in enumerate(SD1.blocks)}}),
        (0.25, {"base": 0.25, "preset": "FLAT_25"}),
        (0.25, {"preset": {"from": "ALL_A", "to": "ALL_B", "at": 0.25}}),
        (0.3, {"base": 0.3, "curve": [0.3]}),
        (0.3, {"preset": "GRAD_V", "elemental": "::0.3"}),
        ({"mbw": [n / 100 for n in range(26)]}, {"mbw": counting(26)}),
        ({"preset": "GRAD_V"}, {"base": 0, "curve": [1, 0, 1]}),
        ({"preset": "GRAD_A"}, {"mbw": [0, *(min(n, 24 - n) / 12 for n in range(25))]}),
        ({"preset": "SMOOTHSTEP*2"}, {"preset": "2SMOOTHSTEP"}),
        ({"preset": "WRAP08"}, {"base": 0, "blocks": {"IN00-IN03": 1, "OUT08-OUT11": 1}}),
        ({"preset": "ALL_B", "base": 0}, {"base": 0, "blocks": {"IN00-OUT11": 1}}),
        ({"base": 0.5, "blocks": {"M00": 0.2}}, {"base": 0.5, "elemental": "M00::0.2"}),
        ({"base": 0.5, "blocks": {"OUT": 0.2}}, {"base": 0.5, "elemental": "OUT::0.2"}),
        ({"base": 0.5, "blocks": {"IN00-M00": 0.2}}, {"base": 0.2, "elemental": "NOT IN00-M00::0.5"}),
        ({"base": 0.5, "elemental": "IN04-IN06:attn1:0.3"}, {"base": 0.5, "elemental": " IN06-IN04 : attn1 : 3e-1 ,\n"}),
        ({"base": 0.5, "elemental": "IN04 IN05:ff attn1:0.3"}, {"base": 0.5, "elemental": "IN05:attn1 ff:0.3, IN04:attn1 ff:0.3"}),
        ({"base": 0.5, "elemental": ":attn attn2:0.3"}, {"base": 0.5, "elemental": ":attn:0.3"}),
        ({"base": 0.5, "elemental": "NOT BASE:norm:0.3"}, {"base": 0.5, "elemental": "IN00-OUT11:norm:0.1,OUT11-IN00:norm:0.3"}),
        ({"base": 0.5, "elemental": "M00::0.3"}, {"base": 0.5, "elemental": "M00:norm:0.1, M00::0.3"}),
        ({"base": 0.5, "blocks": {"IN00": 0.2, "TIME": 0.5}}, {"base": 0.5, "blocks": {"IN00": 0.2}, "map": "sd-mecha@1"}),
        ({"base": 0.5, "map": "supermerger@1"}, 0.5),
        (0.0, -0.0),
        ({"base": 0.5, "blocks": {"IN*": 0.0}}, {"base": 0.5, "blocks": {"IN*": -0.0}}),
    ],
)
def test_equal_ratios_are_equal_facts_however_they_are_written(one: Any, other: Any):
    """
    What a key sees is what tensors get; the spelling of a ratio is not in it.
    """
    assert facts(one) == facts(other)
    assert values(one, *SD1.layout()) == values(other, *SD1.layout())


def test_facts_name_what_is_unlike_the_base():
    """
    Facts list the base, then blocks in the order people count them, then parts, then rules as they stand.
    """
    written = {"base": 0.5, "blocks": {"VAE": 0, "OUT11": 0.2, "IN04": 0.1, "M00": 0.5}, "rules": [{"match": "*.bias", "value": 1}]}
    expected = [("", "0.5"), (".IN04", "0.1"), (".OUT11", "0.2"), (".VAE", "0.0"), (".rule1", "*.bias = 1.0")]
    assert expected == facts(written)


def test_a_family_without_blocks_takes_numbers_and_rules():
    """
    Any safetensors file can be merged by rules over its names.
    """
    ratio = read_ratio({"base": 0.5, "rules": [{"match": "layer.0.*", "value": 0.1}]}, GENERIC)
    assert [0.1, 0.5] == [ratio.of(tensor, GENERIC) for tensor in ("layer.0.weight", "layer.1.weight")]


BLOCKS = "did you mean `blocks`?"


@pytest.mark.parametrize(
    ("ratio", "message", "hint"),
    [
        ("0.5", "has text as a ratio: '0.5'", "write the number without quotes"),
        (True, "as a ratio, which is not a finite number", ""),
        (None, "as a ratio, which is not a finite number", ""),
        ([0.5], "as a ratio, which is not a finite number", "values over depth are written `{ base = 0.5, curve = [0.2, 0.8] }`"),
        (float("nan"), "as a ratio, which is not a finite number", ""),
        (float("inf"), "as a ratio, which is not a finite number", ""),
        ({}, "lacks `base`, the value of everything that no block or rule names", "write `base = 0.5`"),
        ({"blocks": {"IN00": 1}}, "lacks `base`, the value of everything that no block or rule names", "write `base = 0.5`"),
        ({"base": "0.5"}, "has text as `base`: '0.5'", "write the number without quotes"),
        ({"base": True}, "as `base`, which is not a finite number", ""),
        ({"base": 0.5, "block": {}}, "has an unknown field `block`", BLOCKS),
        (
            {"base": 0.5, "weights": []},
            "has an unknown field `weights`",
            "a ratio table has `base`, `mbw`, `preset`, `curve`, `blocks`, `elemental`, `rules` and `map`",
        ),
        ({"base": 0.5, "blocks": [0.5]}, "has `blocks` that are not a table", 'write `blocks = { IN04 = 0.2, "OUT*" = 0.1 }`'),
        ({"base": 0.5, "blocks": {"IN04": "0.5"}}, "has text as the value of block `IN04`: '0.5'", "write the number without quotes"),
        ({"base": 0.5, "blocks": {"IN12": 0.5}}, "names block `IN12`, which Stable Diffusion 1.x does not have", "did you mean `IN11`?"),
        ({"base": 0.5, "blocks": {"in04": 0.5}}, "names block `in04`, which Stable Diffusion 1.x does not have", "did you mean `IN04`?"),
        ({"base": 0.5, "blocks": {"IN4": 0.5}}, "names block `IN4`, which Stable Diffusion 1.x does not have", "did you mean `IN04`?"),
        (
            {"base": 0.5, "blocks": {"IN04-IN12": 0.5}},
            "names block `IN04-IN12`, which Stable Diffusion 1.x does not have",
            "the last of them is `IN11`",
        ),
        (
            {"base": 0.5, "blocks": {"ZZ*": 0.5}},
            "names block `ZZ*`, which Stable Diffusion 1.x does not have",
            "`sdbuild methods --blocks sd1` lists its blocks",
        ),
        ({"mbw": counting(25)}, "has an `mbw` of 25 values; Stable Diffusion 1.x takes 26 with BASE", "the order is BASE, IN00, IN01, …, OUT11"),
        ({"mbw": counting(27)}, "has an `mbw` of 27 values; Stable Diffusion 1.x takes 26 with BASE", "the order is BASE, IN00, IN01, …, OUT11"),
        (
            {"base": 0, "mbw": counting(24)},
            "has an `mbw` of 24 values; Stable Diffusion 1.x takes 25 without BASE",
            "the order is IN00, IN01, IN02, …, OUT11",
        ),
        ({"base": 0, "mbw": counting(26)}, "has both `base` and an `mbw` of 26 values, the first of which is BASE", "leave one of them out"),
        ({"mbw": "GRAD_V"}, "has 'GRAD_V' as value 1 of `mbw`, which is not a number", 'write `preset = "GRAD_V"`'),
        ({"mbw": counting(25) + ","}, "has '' as value 26 of `mbw`, which is not a number", "leave out what is no number"),
        ({"mbw": ",".join(["nan"] * 26)}, "as value 1 of `mbw`, which is not a finite number", ""),
        ({"mbw": ",".join(["1e999"] * 26)}, "as value 1 of `mbw`, which is not a finite number", ""),
        ({"base": 0.5, "rules": {}}, "has `rules` that are not a list", 'write `rules = [{ match = "*attn2*", value = 0.8 }]`'),
        ({"base": 0.5, "rules": ["*"]}, "has a rule that is not `{ match = GLOB, value = NUMBER }`", ""),
        ({"base": 0.5, "rules": [{"match": "*"}]}, "has a rule that is not `{ match = GLOB, value = NUMBER }`", ""),
        ({"base": 0.5, "rules": [{"match": 3, "value": 1}]}, "has a rule that is not `{ match = GLOB, value = NUMBER }`", ""),
        ({"base": 0.5, "rules": [{"match": "*", "value": 1, "if": 2}]}, "has a rule that is not `{ match = GLOB, value = NUMBER }`", ""),
        ({"base": 0.5, "rules": [{"match": "*", "value": "1"}]}, "has text as the value of rule `*`: '1'", "write the number without quotes"),
    ],
)
def test_a_ratio_that_means_nothing_says_why(ratio: Any, message: str, hint: str):
    """
    Every mistake in a ratio has one message and, where there is one, the next thing to type.
    """
    with pytest.raises(RatioError, match=re.escape(message)) as caught:
        read_ratio(ratio, SD1)
    assert caught.value.hint.startswith(hint)
    assert bool(hint) == bool(caught.value.hint)


@pytest.mark.parametrize(
    "ratio",
    [10**400, {"base": -(10**400)}, {"base": 0, "blocks": {"M00": 10**400}}, {"base": 0, "rules": [{"match": "*", "value": 10**400}]}],
    ids=["number", "base", "block", "rule"],
)
def test_a_whole_number_too_large_for_a_float_is_refused(ratio: Any):
    """
    TOML has integers of any length; one that no float can hold is refused as infinity is.
    """
    with pytest.raises(RatioError, match="not a finite number"):
        read_ratio(ratio, SD1)


@pytest.mark.parametrize(
    ("ratio", "message", "hint"),
    [
        ({"base": 0.5, "blocks": {"IN00": 1}}, "names block `IN00`, which any safetensors file does not have", "use `rules`"),
        ({"mbw": "1"}, "has `mbw`, but any safetensors file has no blocks", "use `rules` with globs over tensor names"),
    ],
)
def test_a_family_without_blocks_refuses_them(ratio: Any, message: str, hint: str):
    """
    Blocks are refused where there are none, with what to use in their place.
    """
    with pytest.raises(RatioError, match=re.escape(message)) as caught:
        read_ratio(ratio, GENERIC)
    assert hint == caught.value.hint


share = st.floats(-1, 2, allow_nan=False)
patterns = st.sampled_from(
    [*SD1.blocks, *SD1.parts, "IN*", "OUT*", "*", "?N0[2-5]", "IN02-IN07", "OUT03-M00", "CLIP_*"],
)
written = st.fixed_dictionaries(
    {"base": share},
    optional={
        "blocks": st.dictionaries(patterns, share, max_size=6),
        "mbw": st.lists(share, min_size=25, max_size=25).map(lambda values: ",".join(map(repr, values))),
        "rules": st.lists(
            st.fixed_dictionaries({"match": st.sampled_from(["*", "*attn2*", "*.bias", "first_*", UNET + "*"]), "value": share}), max_size=3
        ),
    },
)
SOME_TENSORS = sorted(SD1.layout())[::23]


def said_in(ratio: dict[str, Any]) -> set[float]:
    """Collect every number a ratio writes down."""
    weights = {float(text) for text in ratio["mbw"].split(",")} if "mbw" in ratio else set()
    return {ratio["base"], *ratio.get("blocks", {}).values(), *weights, *(rule["value"] for rule in ratio.get("rules", []))}


@settings(deadline=None)
@given(ratio=written)
def test_every_value_is_one_that_was_written(ratio: dict[str, Any]):
    """
    Whatever a table says, no tensor gets a number that does not stand in it.
    """
    read = read_ratio(ratio, SD1)
    assert {read.of(tensor, SD1) for tensor in SOME_TENSORS} <= said_in(ratio)


@settings(deadline=None)
@given(ratio=written, value=share)
def test_a_rule_for_everything_is_a_number(ratio: dict[str, Any], value: float):
    """
    A last rule that matches every name leaves nothing of what came before it.
    """
    ratio = ratio | {"rules": [*ratio.get("rules", []), {"match": "*", "value": value}]}
    assert {value} == set(values(ratio, *SOME_TENSORS))


@settings(deadline=None)
@given(ratio=written)
def test_a_ratio_spelled_out_is_the_same_ratio(ratio: dict[str, Any]):
    """
    Writing down the value of every block and part gives the same facts: resolution happens once.
    """
    ratio = {key: value for key, value in ratio.items() if key != "rules"}
    read = read_ratio(ratio, SD1)
    blocks = {block: read.of(f"{prefixes[0]}0" if prefixes else "?", SD1) for block, prefixes in SD1.blocks.items()}
    parts = {part: read.of(f"{prefixes[0]}0", SD1) for part, (_, prefixes) in SD1.parts.items()}

    assert list(read.facts()) == facts({"base": blocks[BASE], "blocks": blocks | parts})
