"""Precision and shapes: dtypes per component, eight bits, what is too large, parents with more input channels."""

from __future__ import annotations

import math
from fractions import Fraction

import checkpoints
import pytest
import torch
from conftest import Space
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.contribution import contributors
from sdmerge_build.errors import RecipeError, SdbuildError
from sdmerge_build.plan import plan_file
from sdmerge_build.rounding import rounded

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TIME = "model.diffusion_model.input_blocks.11.0.in_layers.2.weight"

FORMATS = {  # bits of the mantissa, exponent of the least number, largest number: OCP 8-bit Floating Point Specification, table 1
    torch.float8_e4m3fn: (3, -9, 448.0),
    torch.float8_e5m2: (2, -16, 57344.0),
}


def nearest_even(value: float, mantissa: int, least: int) -> float:
    """Round a number by exact rational arithmetic, to nearest, ties to even."""
    exact = Fraction(value)
    if exact == 0:
        return 0.0
    exponent = math.frexp(value)[1] - 1
    unit = Fraction(2) ** max(exponent - mantissa, least)
    return float(round(exact / unit) * unit)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.sampled_from([torch.float16, torch.float32, torch.float64]), st.floats(-440, 440))
def test_eight_bits_are_rounded_once_to_nearest_even(target, source, value):
    """
    fp16, fp32 and fp64 become eight bits as exact arithmetic would round them.
    """
    mantissa, least, _ = FORMATS[target]
    x = torch.tensor([value], dtype=torch.float64).to(source)

    assert rounded(x, target).to(torch.float64).item() == nearest_even(x.to(torch.float64).item(), mantissa, least)


@settings(max_examples=300, deadline=None)
@given(st.floats(-65519, 65519) | st.floats(-1e-4, 1e-4), st.integers(-2, 2))
def test_float64_becomes_float16_by_one_rounding(value, ulps):
    """
    At ties between two float16 numbers, and a hair beside them, numbers that have no float16 exponent of their own included.
    """
    low = torch.tensor([value], dtype=torch.float64).to(torch.float16)
    tie = ((low + torch.nextafter(low, low + 1)).to(torch.float64) if abs(value) < 1 else low.to(torch.float64) * 2) / 2
    for _ in range(abs(ulps)):
        tie = torch.nextafter(tie, torch.full_like(tie, math.copysign(math.inf, ulps)))

    assert rounded(tie, torch.float16).to(torch.float64).item() == nearest_even(tie.item(), 10, -24)


def test_float64_just_above_a_tie_of_eight_bits_is_rounded_up():
    """
    By way of float32 it would become the tie, and then go down to even.
    """
    x = torch.tensor([1 + 2**-4 + 2**-40], dtype=torch.float64)

    assert x.to(torch.float8_e4m3fn).item() == 1.0
    assert rounded(x, torch.float8_e4m3fn).item() == 1.125


TABLE = """
recipe = 1
architecture = "sd1"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[step.mix]
formula = "0.3 * A + 0.7 * B"
dtype = {dtype}
"""


def test_every_component_has_the_dtype_that_the_recipe_says(space: Space):
    """
    U-Net in eight bits, VAE in float32, the rest as `default` says; `position_ids` stay whole numbers.
    """
    space.pair(TABLE.format(dtype='{ unet = "fp8_e4m3", vae = "fp32", default = "bf16" }'), every=30)
    space.build()
    mix = space.load("mix")
    kinds = {name.split(".")[0]: tensor.dtype for name, tensor in mix.items() if "position_ids" not in name}

    assert kinds == {"model": torch.float8_e4m3fn, "first_stage_model": torch.float32, "cond_stage_model": torch.bfloat16}
    a, b = (checkpoints.miniature("sd1", name, every=30)[TIME].float() for name in "AB")
    assert mix[TIME].float().equal((a * 0.3 + b * 0.7).to(torch.float8_e4m3fn).float())


def test_a_table_of_one_dtype_is_that_dtype(space: Space):
    """
    However it is said, the same dtypes are the same key; without `default`, the rest is fp16.
    """
    space.pair(TABLE.format(dtype='"fp16"'), every=200)
    key = space.build().wishes[0].tensor_key
    for spelling in ('{ unet = "fp16" }', '{ default = "fp16", vae = "fp16" }'):
        space.write("other.toml", TABLE.format(dtype=spelling))
        assert space.build("other.toml", out=space.path / "other").wishes[0].tensor_key == key


def test_a_component_that_is_not_there_is_named(space: Space):
    """
    A misspelt component of `dtype` is an error with the nearest word, in a step and in the defaults.
    """
    space.pair(TABLE.format(dtype='{ unett = "fp16" }') + '[defaults]\ndtype = { clip_g = "fp32" }\n', every=200)
    with pytest.raises(RecipeError) as caught:
        space.build()

    assert "`dtype` names `unett`, which Stable Diffusion 1.x does not have" in str(caught.value)
    assert "did you mean `unet`?" in str(caught.value)
    assert "`dtype` names `clip_g`" in str(caught.value)


def test_fp8_parents_are_merged_and_kept(space: Space):
    """
    Checkpoints in eight bits are read exactly; with `keep`, their child has eight bits too.
    """
    models = {m: {"w": checkpoints.numbers(m, "w", (24, 8)).to(torch.float8_e5m2)} for m in "AB"}
    for name, tensors in models.items():
        space.checkpoint(name, tensors)
    space.write("recipe.toml", TABLE.format(dtype='"keep"').replace('"sd1"', '"generic"'))
    space.build()
    a, b = (models[m]["w"].float() for m in "AB")

    assert space.load("mix")["w"].float().equal((a * 0.3 + b * 0.7).to(torch.float8_e5m2).float())


@pytest.mark.parametrize(("dtype", "torch_dtype", "largest"), [("fp16", torch.float16, 65504.0), ("fp8_e4m3", torch.float8_e4m3fn, 448.0)])
def test_what_is_too_large_is_refused_or_becomes_the_largest_number(space: Space, dtype, torch_dtype, largest):
    """
    An overflow names the largest number of the dtype; `saturate` takes it, for infinite numbers too; NaN stays an error.
    """
    space.checkpoint("A", {"w": torch.tensor([1e6, -1e6, math.inf, 1.0], dtype=torch.float32)})
    space.checkpoint("B", {"w": torch.zeros(4, dtype=torch.float32)})
    recipe = TABLE.format(dtype=f'"{dtype}"').replace('"sd1"', '"generic"').replace("0.3 * A + 0.7 * B", "A + 0.5 * B")
    space.write("recipe.toml", recipe + 'nonfinite = "saturate"\n')
    space.build()
    assert space.load("mix")["w"].to(torch.float64).tolist() == [largest, -largest, largest, 1.0]
    assert space.load("mix")["w"].dtype is torch_dtype

    space.checkpoint("A", {"w": torch.tensor([1e6, 0.0, 0.0, 1.0], dtype=torch.float32)})
    space.write("recipe.toml", recipe)
    with pytest.raises(SdbuildError, match=rf"becomes larger than \w+ holds \({largest:g}\)"):
        space.build()

    space.checkpoint("A", {"w": torch.tensor([math.nan, 0.0, 0.0, 1.0], dtype=torch.float32)})
    space.write("recipe.toml", recipe + 'nonfinite = "saturate"\n')
    with pytest.raises(SdbuildError, match="infinite or not numbers"):
        space.build()


def test_what_is_not_a_number_is_not_called_too_large(space: Space):
    """
    A method that makes NaN of sound numbers is told so, and not to use a wider dtype.
    """
    space.checkpoint("A", {"w": torch.ones(4)})
    space.checkpoint("B", {"w": torch.ones(4)})
    space.write("mine.py", "from sdmerge_build.methods import method\n@method(version=1)\ndef odd(a, /):\n    return a * float('nan')\n")
    head, _ = TABLE.format(dtype='"fp16"').replace('"sd1"', '"generic"\nmethods = ["mine.py"]').split("[step.mix]")
    space.write("recipe.toml", head + '[step.mix]\nmethod = "odd"\na = "A"\n')
    with pytest.raises(SdbuildError, match=r"`w` becomes what is not a number \(NaN\)"):
        space.build()


CHANNELS = """
recipe = 1
architecture = "sd1"
[source.inpainting]
path = "inpainting.safetensors"
[source.A]
path = "A.safetensors"
[source.base]
path = "base.safetensors"
[step.mix]
{step}
mismatch = "{mismatch}"
[step.plain]
formula = "0.5 * A + 0.5 * base"
"""
WEIGHTED = 'method = "weighted_sum"\na = "{a}"\nb = "{b}"\nalpha = 0.25'
DIFFERENCE = 'method = "add_difference"\na = "inpainting"\nb = "A"\nc = "base"'


def with_channels(space: Space, channels: int) -> dict[str, torch.Tensor]:
    """Write two models of four channels and one of more; return their first convolutions in float32."""
    made = {}
    for name in ("inpainting", "A", "base"):
        tensors = checkpoints.miniature("sd1", name, every=40)
        tensors[CONV_IN] = checkpoints.numbers(name, CONV_IN, (320, channels if name == "inpainting" else 4, 3, 3))
        space.checkpoint(name, tensors)
        made[name] = tensors[CONV_IN].float()
    return made


@pytest.mark.parametrize("channels", [9, 8])
@pytest.mark.parametrize(("a", "b"), [("inpainting", "A"), ("A", "inpainting")])
def test_overlap_merges_the_channels_that_all_have(space: Space, channels, a, b):
    """
    Inpainting (9 channels) and instruct-pix2pix (8): four channels are merged, the others are the widest model's, as in AUTOMATIC1111.
    """
    made = with_channels(space, channels)
    space.write("recipe.toml", CHANNELS.format(step=WEIGHTED.format(a=a, b=b), mismatch="overlap"))
    report = space.build()
    mix, wide = space.load("mix")[CONV_IN], made["inpainting"]
    expected = wide.clone()
    expected[:, :4] = made[a][:, :4] * 0.75 + made[b][:, :4] * 0.25

    assert mix.equal(expected.half())
    assert any("merges what shapes have in common, and takes the rest from `inpainting`" in note for note in report.warnings)
    assert space.load("plain")[CONV_IN].shape == made["A"].shape


def test_zeros_stand_for_the_channels_that_a_model_lacks(space: Space):
    """
    With `zeros` the others count as models whose further channels are zero, as in model-mixer.
    """
    made = with_channels(space, 9)
    space.write("recipe.toml", CHANNELS.format(step=WEIGHTED.format(a="inpainting", b="A"), mismatch="zeros"))
    space.build()
    padded = torch.zeros_like(made["inpainting"])
    padded[:, :4] = made["A"]

    assert space.load("mix")[CONV_IN].equal((made["inpainting"] * 0.75 + padded * 0.25).half())


@pytest.mark.parametrize("mismatch", ["overlap", "zeros"])
def test_a_model_becomes_an_inpainting_model_by_adding_a_difference(space: Space, mismatch):
    """
    The recipe people know, inpainting + (model - base), leaves the five channels of the mask as they are.
    """
    made = with_channels(space, 9)
    space.write("recipe.toml", CHANNELS.format(step=DIFFERENCE, mismatch=mismatch))
    space.build()
    expected = made["inpainting"].clone()
    expected[:, :4] += made["A"] - made["base"]

    assert space.load("mix")[CONV_IN].equal(expected.half())


def test_without_a_policy_the_channels_are_an_error_that_names_it(space: Space):
    """
    Nothing is done in silence: the error says what nine channels are, and which policies there are.
    """
    with_channels(space, 9)
    space.write("recipe.toml", CHANNELS.format(step=WEIGHTED.format(a="inpainting", b="A"), mismatch="error"))
    with pytest.raises(RecipeError) as caught:
        space.build()

    assert "nine input channels belong to an inpainting model" in str(caught.value)
    assert '`mismatch = "overlap"`' in str(caught.value)


@pytest.mark.parametrize(("mismatch", "expected"), [("overlap", {"A", "inpainting"}), ("zeros", {"A"})])
def test_who_gives_the_channels_contributes(space: Space, mismatch, expected):
    """
    At ratio 0 the widest model still gives the channels that nobody else has, so its terms bind; zeros have no author.
    """
    with_channels(space, 9)
    step = WEIGHTED.format(a="A", b="inpainting").replace("0.25", "0.0") + '\nextra = "drop"'
    plan = plan_file(space.write("recipe.toml", CHANNELS.format(step=step, mismatch=mismatch)))

    assert contributors(plan, plan.steps["mix"]) == expected


@pytest.mark.parametrize(("dtype", "largest"), [("fp32", 3.4028234663852886e38), ("fp64", math.inf), ("fp16", 65504.0)])
@pytest.mark.parametrize("step", ['method = "copy"\na = "A"', 'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = 0.5\ncompute = "native"'])
def test_saturation_of_a_dtype_that_becomes_wider_takes_the_wider_one_s_largest(space: Space, dtype, largest, step):
    """
    Infinite numbers of fp16 parents become the largest number of what they are written as.
    """
    for name in "AB":
        space.checkpoint(name, {"w": torch.tensor([math.inf, -math.inf, 1.0, 2.0], dtype=torch.float16)})
    head = TABLE.format(dtype='"fp16"').replace('"sd1"', '"generic"').split("[step.mix]")[0]
    space.write("recipe.toml", f'{head}[step.mix]\n{step}\ndtype = "{dtype}"\nnonfinite = "saturate"\n')
    space.build()
    largest = torch.finfo(torch.float64).max if math.isinf(largest) else largest

    assert space.load("mix")["w"].to(torch.float64).tolist() == [largest, -largest, 1.0, 2.0]
