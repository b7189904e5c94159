"""Elemental text: supermerger's way to say values by block and by what a tensor's name holds."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import PAIR, Space
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.architectures import BASE, architecture_named
from sdmerge_build.contribution import contributors
from sdmerge_build.plan import plan_file
from sdmerge_build.weights.ratio import RatioError, read_ratio

SD1, SDXL, GENERIC = (architecture_named(name) for name in ("sd1", "sdxl", "generic"))
UNET = "model.diffusion_model."
BLOCKS = [BASE, *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
TENSORS = [*sorted(SD1.layout())[::29], f"{UNET}time_embed.0.weight", f"{UNET}out.2.bias", "first_stage_model.encoder.norm_out.weight"]


def merger_block(tensor: str) -> str:
    """Count a tensor as supermerger does for SD 1."""
    if "time_embed" in tensor:
        return "IN00"
    if ".out." in tensor:
        return "OUT11"
    for sort, name in (("input_blocks", "IN"), ("middle_block", "M"), ("output_blocks", "OUT")):
        if found := re.search(rf"\.{sort}\.(\d+)\.", tensor):
            return f"{name}{0 if name == 'M' else int(found[1]):02}"
    return BASE


def merger_value(tensor: str, text: str, value: float) -> float:
    """Go through elemental text from the first entry to the last, for one tensor, as supermerger does."""
    for entry in re.split("[,\n]", text):
        if entry.count(":") != 2:
            continue
        blocks, elements, ratio = (part.split() for part in entry.split(":"))
        is_in = not blocks
        for word in blocks:
            first, _, last = word.partition("-")
            if first in BLOCKS:
                ends = sorted((BLOCKS.index(first), BLOCKS.index(last or first)))
                is_in |= merger_block(tensor) in BLOCKS[ends[0] : ends[1] + 1]
        if is_in == (blocks[:1] == ["NOT"]):
            continue
        is_held = not elements or any(word in tensor for word in elements if word != "NOT")
        if is_held != (elements[:1] == ["NOT"]):
            value = float(ratio[0])
    return value


def listed(words: list[str], is_not: bool) -> str:
    return " ".join([*(["NOT"] if is_not and words else []), *words])


names = st.sampled_from([*BLOCKS, "IN00-IN05", "IN05-IN00", "OUT00-OUT11", "IN10-OUT01", "BASE-IN02", "M00-M00"])
parts = st.sampled_from(["attn1", "attn2", "attn", "ff", "norm", "to_k", "weight", "bias", "time_embed", "model.", "in_layers.2", "0"])
entry = st.builds(
    lambda blocks, without, words, other, ratio: f"{listed(blocks, without)}:{listed(words, other)}:{ratio}",
    st.lists(names, max_size=3),
    st.booleans(),
    st.lists(parts, max_size=3),
    st.booleans(),
    st.floats(-1, 2).map(lambda number: round(number, 2) + 0.0),
)
texts = st.lists(entry, max_size=6).flatmap(lambda entries: st.sampled_from([",", ", ", "\n", ",\n"]).map(lambda sign: sign.join(entries)))


@settings(deadline=None)
@given(text=texts)
def test_elemental_text_means_what_supermerger_makes_of_it(text: str):
    """
    Entry after entry, blocks before names, `NOT` for the others, an empty part for all, and the last that holds wins.
    """
    ratio = read_ratio({"base": 0.5, "elemental": text}, SD1)
    assert [merger_value(tensor, text, 0.5) for tensor in TENSORS] == [ratio.of(tensor, SD1) for tensor in TENSORS]


@settings(deadline=None)
@given(text=texts, base=st.floats(-1, 2))
def test_facts_are_text_that_says_the_same(text: str, base: float):
    """
    What a key sees of elemental text, read again, is the same ratio with the same facts.
    """
    ratio = read_ratio({"base": base, "elemental": text}, SD1)
    facts = list(ratio.facts())
    again = {
        "base": ratio.base,
        "blocks": dict(ratio.blocks),
        "elemental": ",".join(value for suffix, value in facts if suffix.startswith(".elemental")),
    }
    assert facts == list(read_ratio(again, SD1).facts())


@settings(deadline=None)
@given(text=texts, more=texts)
def test_what_is_never_reached_leaves_no_trace(text: str, more: str):
    """
    An entry for everything makes what stands before it indifferent.
    """
    ending = f"::0.125,{more}"
    alone, after = (read_ratio({"base": 0.5, "elemental": said}, SD1) for said in (ending, f"{text},{ending}"))
    assert list(alone.facts()) == list(after.facts())


@settings(deadline=None)
@given(text=texts)
def test_every_value_is_found_beforehand(text: str):
    """
    What a tensor may get, and the words its name may be asked for, are known without a tensor.
    """
    ratio = read_ratio({"base": 0.5, "elemental": text}, SD1)
    assert {ratio.of(tensor, SD1) for tensor in TENSORS} <= ratio.values()
    words = {word for said in text.replace("\n", ",").split(",") if said for word in said.split(":")[1].split()} - {"NOT"}
    assert {word for group in ratio.elemental for element in group.elements for word in element.words} <= words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IN00-IN05:attn1:0.3", ["IN00-IN05:attn1:0.3"]),
        ("NOT OUT00-OUT11:attn2 ff:0", ["NOT OUT00-OUT11:attn2 ff:0.0"]),
        (":norm:1", [":norm:1.0"]),
        ("IN00 IN01 IN02 M00:NOT norm bias:1", ["IN00-IN02 M00:NOT bias norm:1.0"]),
        ("CLIP_L:proj:1", ["CLIP_L:proj:1.0"]),
        ("NOT VAE:conv:1", ["NOT VAE:conv:1.0"]),
        ("BASE:norm:1", ["NOT IN00-OUT11:norm:1.0"]),
        ("IN04:norm:1, IN05:ff:0, IN04:ff:0", ["IN04:norm:1.0", "IN04:ff:0.0", "IN05:ff:0.0"]),
    ],
)
def test_facts_are_spelled_in_one_way(text: str, expected: list[str]):
    """
    A change of elemental text is explained in elemental text: ranges joined, words in order, places apart.
    """
    facts = read_ratio({"base": 0.5, "elemental": text}, SD1).facts()
    assert expected == [value for suffix, value in facts if suffix.startswith(".elemental")]


def test_a_map_moves_parts_in_elemental_text_too():
    """
    By sd-mecha's count the time embedding is no part of IN00, and facts say so.
    """
    table = {"base": 0.5, "elemental": "IN00:weight:0.1"}
    ours, theirs = read_ratio(table, SD1), read_ratio(table | {"map": "sd-mecha@1"}, SD1)
    time = f"{UNET}time_embed.0.weight"
    assert (0.1, 0.5) == (ours.of(time, SD1), theirs.of(time, SD1))
    assert [".elemental1", "IN00 !TIME:weight:0.1"] == list(list(theirs.facts())[1])


def test_parts_can_be_named():
    """
    What is a part here has a name, also in elemental text: by itself, or with its block.
    """
    clip, vae = "cond_stage_model.transformer.text_model.final_layer_norm.weight", "first_stage_model.encoder.norm_out.weight"
    for text, expected in (("VAE:norm:0.1", [0.5, 0.1]), ("BASE:norm:0.1", [0.1, 0.1]), ("NOT VAE:norm:0.1", [0.1, 0.5])):
        ratio = read_ratio({"base": 0.5, "elemental": text}, SD1)
        assert expected == [ratio.of(tensor, SD1) for tensor in (clip, vae)]
    deep = read_ratio({"base": 0.5, "elemental": "IN04.1.0:attn1:0.1, IN05:attn1:0.2"}, SDXL)
    layers = [f"{UNET}input_blocks.{block}.1.transformer_blocks.{layer}.attn1.to_q.weight" for block in (4, 5) for layer in (0, 1)]
    assert [0.1, 0.5, 0.2, 0.2] == [deep.of(tensor, SDXL) for tensor in layers]


def test_a_family_without_blocks_takes_words():
    """
    Any safetensors file has names that hold words.
    """
    ratio = read_ratio({"base": 0.5, "elemental": ":norm:0.1, :NOT weight:0.2"}, GENERIC)
    assert [0.1, 0.2, 0.5] == [ratio.of(tensor, GENERIC) for tensor in ("norm.weight", "norm.bias", "conv.weight")]
    assert [":norm:0.1", ":NOT weight:0.2"] == [value for _, value in ratio.facts()][1:]


@pytest.mark.parametrize("ratio", ["R", "U", "X", "D", " R ", "ER", "EU", "0.2 R 0.5"])
def test_random_ratios_are_refused(ratio: str):
    """
    Results must not differ from run to run, so a ratio is a number.
    """
    with pytest.raises(RatioError, match="has a random ratio in `elemental`") as caught:
        read_ratio({"base": 0.5, "elemental": f"IN00-IN05:attn1:{ratio}"}, SD1)
    assert caught.value.hint == "results must not differ from run to run; write the number"


ALL = "an empty part stands for all: `M00::0.5`, `:norm:1`"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("IN00:0.3", "has the entry `IN00:0.3` in `elemental`, which is not BLOCKS:ELEMENTS:RATIO", ALL),
        ("IN00:attn1:ff:0.3", "has the entry `IN00:attn1:ff:0.3` in `elemental`, which is not BLOCKS:ELEMENTS:RATIO", ALL),
        ("0.3", "has the entry `0.3` in `elemental`, which is not BLOCKS:ELEMENTS:RATIO", ALL),
        ("IN00:attn1:0.3, IN12:ff:0", "names block `IN12`, which Stable Diffusion 1.x does not have", "did you mean `IN11`?"),
        ("IN00-IN12:ff:0", "names block `IN00-IN12`, which Stable Diffusion 1.x does not have", "the last of them is `IN11`"),
        ("in00:ff:0", "names block `in00`, which Stable Diffusion 1.x does not have", "did you mean `IN00`?"),
        ("IN*:ff:0", "names block `IN*`, which Stable Diffusion 1.x does not have", "globs mean nothing here; write a range"),
        ("IN00 NOT IN05:ff:0", "has a `NOT` in the middle of `IN00 NOT IN05:ff:0`", "`NOT` stands first, and means all that follow"),
        (":ff NOT attn1:0", "has a `NOT` in the middle of `:ff NOT attn1:0`", "`NOT` stands first, and means all that follow"),
        ("NOT:ff:0", "has a `NOT` of nothing in `elemental`: `NOT:ff:0`", ""),
        (":NOT:0", "has a `NOT` of nothing in `elemental`: `:NOT:0`", ""),
        (":ff:", "has '' as the ratio of `:ff:`, which is not a number", ""),
        (":ff:half", "has 'half' as the ratio of `:ff:half`, which is not a number", ""),
        (":ff:nan", "has nan as the ratio of `:ff:nan`, which is not a finite number", ""),
        (["IN00::1"], "has an `elemental` that is not text", 'write `elemental = "IN00-IN05:attn1:0.3, M00::0.5"`'),
        (",".join(["::1"] * 1001), "has more than 1000 entries, or 4000 words, in `elemental`", ""),
    ],
)
def test_what_supermerger_passes_over_is_an_error(text: Any, message: str, hint: str):
    """
    An entry that would be ignored in silence is a slip of the pen.
    """
    with pytest.raises(RatioError, match=re.escape(message)) as caught:
        read_ratio({"base": 0.5, "elemental": text}, SD1)
    assert caught.value.hint.startswith(hint)
    assert bool(hint) == bool(caught.value.hint)


def test_a_family_without_blocks_has_none_to_name():
    """
    Where there are no blocks, elemental text names none.
    """
    with pytest.raises(RatioError, match="names block `M00`, which any safetensors file does not have") as caught:
        read_ratio({"base": 0.5, "elemental": "M00::1"}, GENERIC)
    assert caught.value.hint == "use `rules`"


@pytest.mark.parametrize(("entry", "found"), [(":attn1:0.5", {"A", "B"}), ("M00:attn1:0, OUT00::0", {"A"})])
def test_who_is_let_in_by_a_word_contributes(space: Space, entry: str, found: set[str]):
    """
    A model whose share is 0 but for what elemental text gives it is one of those an artifact is made of.
    """
    step = f'method = "weighted_sum"\nextra = "drop"\na = "A"\nb = "B"\nalpha = {{ base = 0, elemental = "{entry}" }}'
    plan = plan_file(space.write("recipe.toml", PAIR.replace('formula = "0.3 * A + 0.7 * B"', step)))
    assert found == contributors(plan, plan.steps["mix"])


def test_words_that_no_tensor_of_their_blocks_has_are_idle():
    """
    A misspelt element, or one that its blocks do not have, is named; others are not.
    """
    said = {
        "base": 0.5,
        "elemental": "IN00:attn1:0.9, IN04:attn1:0.3, OUT*:x:1".replace("OUT*", "OUT03"),
        "rules": [{"match": "*nothing*", "value": 1}],
    }
    ratio = read_ratio(said, SD1)
    tensors = [name for name in SD1.layout() if "input_blocks" in name or "output_blocks" in name]

    assert list(ratio.idle(tensors, SD1)) == ["an elemental entry for `x`", "a rule `*nothing*`"]
    assert list(read_ratio({"base": 0.5, "elemental": "IN00:attn1:0.9"}, SD1).idle(tensors, SD1)) == ["an elemental entry for `attn1`"]
