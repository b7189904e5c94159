"""Profiles: a value per block, from one number, pasted block weights, a preset's name or a curve."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdmerge_build.architectures import BASE, architecture_named
from sdmerge_build.weights.ratio import Ratio, RatioError, read_ratio

SD1, SDXL, LARGE, FLUX, GENERIC = (architecture_named(name) for name in ("sd1", "sdxl", "sd3/3.5-large", "flux", "generic"))
FAMILY = architecture_named("sd3")

IN = [f"IN{n:02}" for n in range(12)]
OUT = [f"OUT{n:02}" for n in range(12)]


def blocks(value: Any, architecture: Any = SD1) -> dict[str, float]:
    """Read a ratio, and list the value of every block."""
    ratio = read_ratio(value, architecture)
    return {block: ratio.at(block) for block in architecture.blocks}


def counting(length: int) -> list[float]:
    """Make block weights each of which says its own position."""
    return [n / 1000 for n in range(length)]


def pasted(values: list[float]) -> str:
    return ", ".join(map(str, values))


def test_a_preset_is_laid_over_the_blocks_of_sd1():
    """
    GRAD_V falls from IN00 to M00 and rises to OUT11; text encoder and VAE stay those of the first model.
    """
    read = blocks({"preset": "GRAD_V"})
    assert (0.0, 1.0, 0.5, 0.0, 0.5, 1.0) == tuple(read[block] for block in (BASE, "IN00", "IN06", "M00", "OUT05", "OUT11"))
    assert 11 / 12 == read["IN01"]


def test_a_preset_is_sampled_over_other_depths():
    """
    On SDXL's 19 blocks, SD 3.5's 38 and Flux's 57 a curve keeps its shape and its ends.
    """
    assert {BASE: 0.0} | {block: abs(1 - n / 9) for n, block in enumerate(SDXL.depth)} == pytest.approx(blocks({"preset": "GRAD_V"}, SDXL))
    for architecture in (LARGE, FLUX):
        read = list(blocks({"preset": "SMOOTHSTEP"}, architecture).values())[1:]
        assert (0.0, 1.0, len(architecture.depth)) == (read[0], read[-1], len(read))
        assert read == sorted(read)


def test_a_list_of_positions_is_folded_for_sdxl():
    """
    WRAP08 is 1 at IN00 to IN03 and OUT08 to OUT11; SDXL has the first four and OUT08, as supermerger folds weights for SD 1.
    """
    ones = {block for block, value in blocks({"preset": "WRAP08"}, SDXL).items() if value}
    assert {"IN00", "IN01", "IN02", "IN03", "OUT08"} == ones
    halves = {block for block, value in blocks({"preset": "RING08_SOFT"}, SDXL).items() if value == 0.5}
    assert {"IN05", "OUT02", "OUT06"} == halves


def test_base_beside_a_preset_is_base():
    """
    A preset says BASE, unless `base` does.
    """
    assert (1.0, 1.0) == tuple(blocks({"preset": "ALL_B"})[block] for block in (BASE, "M00"))
    assert (0.3, 1.0) == tuple(blocks({"preset": "ALL_B", "base": 0.3})[block] for block in (BASE, "M00"))
    assert (0.3, 0.0) == tuple(blocks({"preset": "GRAD_V", "base": 0.3})[block] for block in (BASE, "M00"))


@given(at=st.floats(0, 1), names=st.tuples(*[st.sampled_from(["GRAD_V", "FLAT_25", "COSINE", "SMOOTHSTEP*3", "RING08_SOFT", "ALL_B"])] * 2))
def test_two_presets_mix_block_by_block(at: float, names: tuple[str, str]):
    """
    `{ from, to, at }` is (1 - at) of one and at of the other in every block, BASE included.
    """
    one, other = (blocks({"preset": name}) for name in names)
    mixed = blocks({"preset": {"from": names[0], "to": names[1], "at": at}})
    assert {block: (1 - at) * one[block] + at * other[block] for block in one} == pytest.approx(mixed, abs=1e-15)


def test_the_ends_of_a_mixture_are_the_presets():
    """
    At 0 and at 1 nothing is rounded anew.
    """
    for at, name in ((0, "COSINE"), (1.0, "FAKE_CUBIC_HERMITE")):
        mixture = {"from": "COSINE", "to": "FAKE_CUBIC_HERMITE", "at": at}
        assert blocks({"preset": name}) == blocks({"preset": mixture})


knots = st.lists(st.floats(-10, 10), min_size=1, max_size=100)


@given(curve=knots, base=st.floats(-1, 1), architecture=st.sampled_from([SD1, SDXL, LARGE, FLUX]))
def test_a_curve_is_straight_between_its_knots(curve: list[float], base: float, architecture: Any):
    """
    Values stand at equal distances from the first layer to the last, with straight lines between; what is no layer gets `base`.
    """
    read = blocks({"base": base, "curve": curve}, architecture)
    depth = np.linspace(0, 1, len(architecture.depth))
    np.testing.assert_allclose([read[block] for block in architecture.depth], np.interp(depth, np.linspace(0, 1, len(curve)), curve), atol=1e-13)
    assert base == read[BASE]


@given(curve=knots)
def test_a_curve_turned_round_is_the_same_curve_from_the_other_end(curve: list[float]):
    """
    Direction leaves no trace in the last digit.
    """
    there, back = (list(blocks({"base": 0, "curve": c}, FLUX).values())[1:] for c in (curve, curve[::-1]))
    assert there == back[::-1]


def test_a_curve_goes_through_its_knots():
    """
    Three knots are the first layer, the middle and the last, exactly.
    """
    read = blocks({"base": 0.5, "curve": [0.25, 0.75, 0.5]})
    assert (0.5, 0.25, 0.5, 0.75, 0.625, 0.5) == tuple(read[block] for block in (BASE, "IN00", "IN06", "M00", "OUT05", "OUT11"))
    assert {0.1} == set(list(blocks({"base": 0.5, "curve": [0.1]}).values())[1:])


def test_block_weights_for_sd1_are_folded_for_sdxl():
    """
    Of 26 values, those for IN09 to IN11 and OUT09 to OUT11, which SDXL does not have, are dropped.
    """
    weights = dict(zip([BASE, *IN, "M00", *OUT], counting(26), strict=True))
    expected = {block: weights[block] for block in [BASE, *IN[:9], "M00", *OUT[:9]]}
    assert expected == blocks({"mbw": pasted(counting(26))}, SDXL)
    assert expected == blocks({"base": 0.0, "mbw": pasted(counting(26)[1:])}, SDXL)
    assert expected == blocks({"mbw": counting(26)}, SDXL)


def test_the_twenty_first_value_for_sdxl_is_the_vae():
    """
    sd-mecha's lists, and those that supermerger shows, have a slot for the VAE.
    """
    ratio = read_ratio({"mbw": counting(21)}, SDXL)
    assert (0.02, 0.0) == (ratio.of("first_stage_model.encoder.conv_in.weight", SDXL), ratio.of("conditioner.embedders.0.x", SDXL))
    assert blocks({"mbw": counting(20)}, SDXL) == blocks({"mbw": counting(21)}, SDXL)


XL = "model.diffusion_model."
DEEP = {
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": "CLIPL",
    "conditioner.embedders.1.model.ln_final.weight": "CLIPG",
    f"{XL}input_blocks.0.0.weight": "IN00",
    f"{XL}input_blocks.4.0.in_layers.2.weight": "IN40",
    f"{XL}input_blocks.4.1.proj_in.weight": "IN41",
    f"{XL}input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight": "IN411",
    f"{XL}input_blocks.8.1.transformer_blocks.9.ff.net.2.weight": "IN819",
    f"{XL}middle_block.1.transformer_blocks.3.norm2.weight": "MID103",
    f"{XL}middle_block.2.in_layers.2.weight": "MID20",
    f"{XL}output_blocks.0.1.norm.weight": "OUT01",
    f"{XL}output_blocks.2.2.conv.weight": "OUT22",
    f"{XL}output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight": "OUT510",
    f"{XL}out.2.weight": "OUT9",
    f"{XL}time_embed.0.weight": "TIME",
    f"{XL}label_emb.0.0.weight": "LABEL",
    "first_stage_model.decoder.conv_in.weight": "VAE",
}


def test_a_hundred_and_ten_values_go_below_the_blocks_of_sdxl():
    """
    The extended names of supermerger have a value per transformer layer; without the first of them, `base` is its value.
    """
    names = SDXL.spelled["deep"]
    ratio = read_ratio({"base": 0.9, "mbw": counting(110)}, SDXL)
    assert {tensor: names.index(name) / 1000 for tensor, name in DEEP.items()} == {tensor: ratio.of(tensor, SDXL) for tensor in DEEP}
    shorter = read_ratio({"base": 0.0, "mbw": counting(110)[1:]}, SDXL)
    assert {tensor: names.index(name) / 1000 for tensor, name in DEEP.items()} == {tensor: shorter.of(tensor, SDXL) for tensor in DEEP}


def test_flux_takes_two_lists():
    """
    model-mixer's 58 values begin with BASE, supermerger's 61 with the text encoders and end with the last layer.
    """
    mixer, merger = read_ratio({"mbw": counting(58)}, FLUX), read_ratio({"base": 0.9, "mbw": counting(61)}, FLUX)
    tensors = ["text_encoders.clip_l.x", "text_encoders.t5xxl.x", "model.diffusion_model.img_in.weight", "model.diffusion_model.double_blocks.0.x",
               "model.diffusion_model.single_blocks.37.x", "model.diffusion_model.final_layer.linear.weight", "vae.x"]  # fmt: skip
    assert [0.0, 0.0, 0.0, 0.001, 0.057, 0.0, 0.0] == [mixer.of(tensor, FLUX) for tensor in tensors]
    assert [0.0, 0.001, 0.002, 0.003, 0.059, 0.06, 0.9] == [merger.of(tensor, FLUX) for tensor in tensors]


def test_sd3_takes_a_value_per_joint_block():
    """
    39 values for the large model: BASE and 38 blocks; 25 for the others.
    """
    assert {"J37": 0.038, BASE: 0.0} == {block: blocks({"mbw": counting(39)}, LARGE)[block] for block in ("J37", BASE)}
    assert 0.024 == blocks({"mbw": counting(25)}, architecture_named("sd3/2b"))["J23"]


def of_maps(name: str | None, architecture: Any, **table: Any) -> dict[str, float]:
    """Read block weights as a tool counts them, and list the values of the tensors that tools do not agree on."""
    ratio = read_ratio(table | ({"map": name} if name else {}), architecture)
    return {part: ratio.of(f"{XL}{part}.0.weight", architecture) for part in ("time_embed", "label_emb", "out")}


@pytest.mark.parametrize(
    ("name", "time"),
    [(None, "IN00"), ("mbw@1", "IN00"), ("supermerger@1", "IN00"), ("sd-meh@1", "IN00"), ("sd-mecha@1", BASE), ("chattiori@1", "OUT11")],
)
def test_a_map_says_with_which_block_the_time_embedding_goes(name: str | None, time: str):
    """
    Tools do not agree on `time_embed`; a map is a tool's word on it, and the last convolution is with the last block in all of them.
    """
    order = list(SD1.blocks)
    read = of_maps(name, SD1, mbw=counting(26))
    assert (order.index(time) / 1000, 0.025) == (read["time_embed"], read["out"])


def test_a_map_may_leave_a_part_unmerged():
    """
    Chattiori's merger leaves SDXL's embeddings as the first model has them: no share of anything else, unless an entry names them.
    """
    assert {"time_embed": 0.0, "label_emb": 0.0, "out": 0.5} == of_maps("chattiori@1", SDXL, base=0.5)
    assert {"time_embed": 0.2, "label_emb": 0.0, "out": 0.5} == of_maps("chattiori@1", SDXL, base=0.5, blocks={"TIME": 0.2})
    assert {"time_embed": 0.5, "label_emb": 0.5, "out": 0.5} == of_maps("sd-mecha@1", SDXL, base=0.5, blocks={"IN00": 0.2})
    assert {"time_embed": 0.2, "label_emb": 0.2, "out": 0.5} == of_maps("sd-mecha@1", SDXL, base=0.5, blocks={BASE: 0.2, "IN00": 0.7})


@pytest.mark.parametrize(
    ("ratio", "architecture", "message", "hint"),
    [
        ({"preset": "GRAD_W"}, SD1, "has the preset `GRAD_W`, which there is not", "did you mean `GRAD_V`?"),
        ({"preset": "grad_v"}, SD1, "has the preset `grad_v`, which there is not", "did you mean `GRAD_V`?"),
        ({"preset": "SMOOTHSTEP*5"}, SD1, "has the preset `SMOOTHSTEP*5`, which there is not", "did you mean `SMOOTHSTEP*"),
        ({"preset": "zzz"}, SD1, "has the preset `zzz`, which there is not", "`sdbuild methods --blocks sd1` lists presets"),
        ({"preset": "ALL_R"}, SD1, "has the preset `ALL_R`, which there is not", "results must not differ from run to run; write the numbers"),
        ({"preset": 3}, SD1, "has a `preset` that is neither a name nor `{ from", 'write `preset = "GRAD_V"`'),
        ({"preset": {"from": "GRAD_V"}}, SD1, "has a `preset` that is neither a name nor `{ from", 'write `preset = "GRAD_V"`'),
        ({"preset": {"from": "GRAD_V", "to": 3, "at": 0.5}}, SD1, "has the preset 3, which there is not", "`sdbuild methods"),
        ({"preset": {"from": "GRAD_V", "to": "GRAD_A", "at": 1.5}}, SD1, "has 1.5 as `at` of `preset`, which is not from 0 to 1", ""),
        ({"preset": {"from": "GRAD_V", "to": "GRAD_A", "at": "0.5"}}, SD1, "has text as `at` of `preset`: '0.5'", "write the number without quotes"),
        ({"preset": "GRAD_V"}, GENERIC, "has `preset`, but any safetensors file has no blocks", "use `rules` with globs over tensor names"),
        ({"base": 1, "curve": [1]}, GENERIC, "has `curve`, but any safetensors file has no blocks", "use `rules` with globs over tensor names"),
        ({"preset": "GRAD_V"}, FAMILY, "comes with more and with fewer layers", "say which it is: `architecture` is one of sd3/2b, "),
        ({"curve": [0, 1]}, SD1, "lacks `base`, the value of everything that is no layer", "write `base = 0.5` beside `curve`"),
        ({"base": 0, "curve": []}, SD1, "has a `curve` that is not a list of 1 to 100 numbers", "write `curve = [0.2, 0.8, 0.5]`"),
        ({"base": 0, "curve": [0] * 101}, SD1, "has a `curve` that is not a list of 1 to 100 numbers", "write `curve = [0.2, 0.8, 0.5]`"),
        ({"base": 0, "curve": 0.5}, SD1, "has a `curve` that is not a list of 1 to 100 numbers", "write `curve = [0.2, 0.8, 0.5]`"),
        ({"base": 0, "curve": [0, "1"]}, SD1, "has text as value 2 of `curve`: '1'", "write the number without quotes"),
        ({"mbw": counting(26), "preset": "GRAD_V"}, SD1, "has both `mbw` and `preset`, each of which says", "leave one of them out"),
        ({"curve": [0], "preset": "GRAD_V"}, SD1, "has both `preset` and `curve`, each of which says", "leave one of them out"),
        ({"mbw": {}}, SD1, "has an `mbw` that is neither text nor a list", 'write `mbw = "0.5,0,…"`'),
        ({"mbw": [0.5] * 25 + ["1"]}, SD1, "has text as value 26 of `mbw`: '1'", "write the number without quotes"),
        ({"mbw": counting(22)}, SDXL, "has an `mbw` of 22 values; Stable Diffusion XL takes 20, 21, 26 or 110 with BASE", "the order is BASE, IN00, IN01, …"),
        ({"mbw": counting(25)}, SDXL, "has an `mbw` of 25 values", "the order is BASE, IN00, IN01, …, OUT08; to leave BASE out, write `base` beside"),
        ({"base": 0, "mbw": counting(20)}, SDXL, "has both `base` and an `mbw` of 20 values, the first of which is BASE", "leave one of them out"),
        ({"base": 0, "mbw": counting(18)}, SDXL, "takes 19, 20, 25, 109 or 110 without BASE", "the order is IN00, IN01, IN02, …, OUT08"),
        ({"mbw": counting(110)}, SDXL, "lacks `base`, the value of what none of the 110 values of `mbw` is for", "write `base = 0` beside `mbw`"),
        ({"base": 0, "map": "sd-mecha"}, SD1, "has the map `sd-mecha`, which Stable Diffusion 1.x does not have", "did you mean `sd-mecha@1`?"),
        ({"base": 0, "map": "zzz"}, SD1, "has the map `zzz`", "its maps are mbw@1, supermerger@1"),
        ({"base": 0, "map": 1}, SD1, "has the map 1, which", "its maps are mbw@1, supermerger@1"),
        ({"base": 0, "map": "mbw@1"}, GENERIC, "has the map `mbw@1`, which any safetensors file does not have", "leave out `map`"),
    ],
)  # fmt: skip
def test_a_profile_that_means_nothing_says_why(ratio: Any, architecture: Any, message: str, hint: str):
    """
    Every mistake has one message, and where there is one, the next thing to type.
    """
    with pytest.raises(RatioError, match=re.escape(message)) as caught:
        read_ratio(ratio, architecture)
    assert caught.value.hint.startswith(hint)
    assert bool(hint) == bool(caught.value.hint)


@pytest.mark.parametrize(
    ("ratio", "what"),
    [
        (1.5, "1.5 as a ratio"),
        ({"base": -0.5}, "-0.5 as `base`"),
        ({"mbw": [0.5] * 25 + [2]}, "2.0 as value 26 of `mbw`"),
        ({"mbw": ",".join(["0.5"] * 25 + ["2"])}, "2.0 as value 26 of `mbw`"),
        ({"base": 0, "curve": [0, 1.5, 0]}, "1.5 as value 2 of `curve`"),
        ({"base": 0, "blocks": {"IN04": 1.5}}, "1.5 as the value of block `IN04`"),
        ({"base": 0, "elemental": "IN04:attn1:1.5"}, "1.5 as the ratio of `IN04:attn1:1.5`"),
        ({"base": 0, "rules": [{"match": "*attn2*", "value": -1}]}, "-1.0 as the value of rule `*attn2*`"),
    ],
)
def test_every_number_of_a_table_is_within_the_parameters_range(ratio: Any, what: str):
    """
    Where a method takes ratios from 0 to 1, no number of a table is beyond, and the complaint says the range.
    """
    assert isinstance(read_ratio(ratio, SD1), Ratio)
    with pytest.raises(RatioError, match=re.escape(f"has {what}, which is not from 0 to 1")):
        read_ratio(ratio, SD1, 0.0, 1.0)


def test_ranges_may_be_open():
    """
    A parameter that is not negative has no upper end; the end itself is within.
    """
    assert [0.0, 7.0] == [read_ratio(number, SD1, low=0.0).base for number in (0, 7)]
    with pytest.raises(RatioError, match=r"has -1\.0 as a ratio, which is not 0 or more"):
        read_ratio(-1, SD1, low=0.0)
    with pytest.raises(RatioError, match=r"has 3\.0 as a ratio, which is not 2 or less"):
        read_ratio(3, SD1, high=2.0)
    with pytest.raises(RatioError, match=r"the preset's value of IN00, which is not from 0 to 0\.5"):
        read_ratio({"preset": "GRAD_V"}, SD1, 0.0, 0.5)
