"""What a step's value is: one rounding, exact copies, AUTOMATIC1111's own arithmetic on request, nothing infinite."""

from __future__ import annotations

from fractions import Fraction

import checkpoints
import numpy as np
import pytest
import torch
from conftest import Space
from hypothesis import given
from hypothesis import strategies as st

from sdmerge_build.errors import SdbuildError
from sdmerge_build.rounding import rounded

GENERIC = """
recipe = 1
architecture = "generic"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[source.C]
path = "C.safetensors"
[step.mix]
{step}
"""

SHAPES = {"matrix.weight": (40, 24), "conv.weight": (8, 4, 3, 3), "bias": (24,), "three": (3,), "scalar": (), "empty": (0, 4)}


def lay_down(space: Space, step: str, **dtypes: str) -> dict[str, dict[str, torch.Tensor]]:
    """Write three models and one step over them; return the models."""
    models = {}
    for name in "ABC":
        dtype = checkpoints.DTYPES[dtypes.get(name, "F16")]
        models[name] = {t: checkpoints.numbers(name, t, shape, dtype) for t, shape in SHAPES.items()}
        space.checkpoint(name, models[name])
    space.write("recipe.toml", GENERIC.format(step=step))
    return models


def webui_weighted_sum(a: torch.Tensor, b: torch.Tensor, multiplier: float) -> torch.Tensor:
    """AUTOMATIC1111 `modules/extras.py`, mode "Weighted sum", written from its formula: everything in the files' own dtype."""
    return ((1 - multiplier) * a) + (multiplier * b)


def webui_add_difference(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, multiplier: float) -> torch.Tensor:
    """AUTOMATIC1111 `modules/extras.py`, mode "Add difference", written from its formula."""
    return a + (multiplier * (b - c))


@pytest.mark.parametrize("dtypes", [{}, {"A": "F32", "B": "F32", "C": "F32"}, {"B": "F32"}, {"A": "F32"}, {"A": "BF16", "B": "BF16"}], ids=str)
@pytest.mark.parametrize("multiplier", [0.3, 0.7, 0.65, 1.2, -0.4])
def test_native_arithmetic_is_that_of_automatic1111(space: Space, dtypes, multiplier):
    """With `compute = "native"` a weighted sum has the bytes that AUTOMATIC1111 writes, saved as half or as it is."""
    for dtype, saved in (("fp16", torch.float16), ("keep", None)):
        models = lay_down(space, f'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = {multiplier}\ncompute = "native"\ndtype = "{dtype}"', **dtypes)
        space.build()
        mix = space.load("mix")
        for name in SHAPES:
            expected = webui_weighted_sum(models["A"][name], models["B"][name], multiplier)
            expected = expected if saved is None else expected.to(saved)
            assert mix[name].dtype == expected.dtype
            assert (
                mix[name]
                .view(torch.int16 if mix[name].dtype.itemsize == 2 else torch.int32)
                .equal(expected.view(torch.int16 if expected.dtype.itemsize == 2 else torch.int32))
            ), name


@pytest.mark.parametrize("step", ['method = "add_difference"\na = "A"\nb = "B"\nc = "C"\nalpha = 0.8', 'formula = "A + 0.8 * (B - C)"'])
def test_native_add_difference_is_that_of_automatic1111(space: Space, step):
    """With `compute = "native"` add difference has AUTOMATIC1111's bytes, written as a method or as a formula."""
    models = lay_down(space, step + '\ncompute = "native"')
    space.build()

    for name, tensor in space.load("mix").items():
        assert tensor.equal(webui_add_difference(*(models[m][name] for m in "ABC"), 0.8)), name


def test_native_and_float32_arithmetic_differ(space: Space):
    """Rounding after every operation is not rounding once: the choice is real."""
    lay_down(space, 'formula = "0.3 * A + 0.7 * B"')
    space.build()
    once = space.load("mix")["matrix.weight"]
    space.edit('0.7 * B"', '0.7 * B"\ncompute = "native"')
    space.build()

    assert not once.equal(space.load("mix")["matrix.weight"])


def oracle(value: float, dtype: str) -> float:
    """Round a number to a 16-bit format by exact rational arithmetic, to nearest, ties to even."""
    mantissa, least = {"fp16": (11, -24), "bf16": (8, -133)}[dtype]
    exact = Fraction(value)
    if exact == 0:
        return 0.0
    exponent = 0
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - mantissa + 1, least)
    return float(round(exact / unit) * unit)


@given(st.floats(-60000, 60000, allow_subnormal=True), st.sampled_from(["fp16", "bf16"]))
def test_float64_is_rounded_once(value, dtype):
    """Rounding float64 to sixteen bits equals exact rounding, though torch has to go by way of float32."""
    target = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]

    assert rounded(torch.tensor([value], dtype=torch.float64), target).item() == oracle(value, dtype)


def test_torch_alone_would_round_float64_twice():
    """The case the rounding above exists for: a value just above a tie, which float32 turns into the tie."""
    value = 1 + 2**-11 + 2**-40

    assert torch.tensor([value], dtype=torch.float64).to(torch.float16).item() == 1.0
    assert rounded(torch.tensor([value], dtype=torch.float64), torch.float16).item() == 1 + 2**-10


@pytest.mark.parametrize(
    ("step", "parent"),
    [
        ('method = "weighted_sum"\na = "A"\nb = "B"\nalpha = 0', "A"),
        ('method = "weighted_sum"\na = "A"\nb = "B"\nalpha = 1.0', "B"),
        ('method = "add_difference"\na = "A"\nb = "B"\nc = "C"\nalpha = 0.0', "A"),
        ('method = "linear"\nmodels = ["A", "B", "C"]\nweights = [0, 1, 0]', "B"),
        ('formula = "0 * A + B"', "B"),
        ('formula = "A - A + 0.5 * (C + C)"', "C"),
    ],
)
def test_ratios_of_zero_and_one_copy_exactly(space: Space, step, parent):
    """An effective ratio of 0 or 1 copies the parent's bits, signed zeros included, even where the other parent is damaged."""
    models = lay_down(space, step)
    models[parent]["bias"][:2] = torch.tensor([-0.0, 0.0])
    space.checkpoint(parent, models[parent])
    other = {"A": "B", "B": "C", "C": "B"}[parent]
    if other in "BC" and "formula" not in step:
        models[other]["bias"][0] = float("nan")
        space.checkpoint(other, models[other])
    space.build()

    for name, tensor in space.load("mix").items():
        assert tensor.view(torch.int16).equal(models[parent][name].view(torch.int16)), name


def test_a_ratio_of_one_copies_whole_numbers_too(space: Space):
    """
    Where a parent is copied exactly, its whole numbers come with it.
    """
    models = lay_down(space, 'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = 1.0')
    for n, name in enumerate("AB"):
        models[name] |= {"count": torch.tensor(n, dtype=torch.int32)}
        space.checkpoint(name, models[name])
    space.build()

    assert space.load("mix")["count"].item() == 1


def test_whole_numbers_are_never_averaged(space: Space):
    """Integer and bool tensors are those of the first model."""
    models = lay_down(space, 'formula = "0.5 * A + 0.5 * B"')
    for n, name in enumerate("AB"):
        models[name] |= {
            "ids": torch.arange(77).reshape(1, 77) + n,
            "mask": torch.tensor([True, False, bool(n)]),
            "count": torch.tensor(n, dtype=torch.int32),
        }
        space.checkpoint(name, models[name])
    space.build()
    mix = space.load("mix")

    assert mix["ids"].equal(models["A"]["ids"])
    assert mix["mask"].equal(models["A"]["mask"])
    assert mix["count"].equal(models["A"]["count"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_name(space: Space, bad):
    """A parent with infinite or undefined values fails the artifact, names tensor and parent, and leaves nothing behind."""
    models = lay_down(space, 'formula = "0.5 * A + 0.5 * B"')
    models["B"]["conv.weight"][3, 2, 1, 0] = bad
    space.checkpoint("B", models["B"])
    with pytest.raises(SdbuildError) as caught:
        space.build()

    assert "tensor `conv.weight` of `B`" in str(caught.value)
    assert not (space.path / "out").exists()
    assert list((space.path / "cache" / "partial").iterdir()) == []


def test_a_result_too_large_for_its_dtype_is_refused(space: Space):
    """A sum that overflows float16 is refused, with the largest value the dtype holds."""
    models = lay_down(space, 'formula = "A + B"')
    for name in "AB":
        models[name]["bias"][5] = 40000.0
        space.checkpoint(name, models[name])
    with pytest.raises(SdbuildError) as caught:
        space.build()

    assert "`bias` becomes larger than F16 holds (65504)" in str(caught.value)


def test_values_that_are_not_finite_pass_when_allowed(space: Space):
    """With `nonfinite = "allow"` they are passed on."""
    models = lay_down(space, 'formula = "0.5 * A + 0.5 * B"\nnonfinite = "allow"')
    models["B"]["bias"][5] = float("inf")
    space.checkpoint("B", models["B"])
    space.build()

    assert torch.isinf(space.load("mix")["bias"][5])


def test_an_artifact_is_consumed_as_it_was_rounded(space: Space):
    """Who consumes an artifact consumes its sixteen-bit values, whether it is made in the same run or was stored before."""
    models = lay_down(space, 'formula = "0.3 * A + 0.7 * B"\nartifact = true\n[step.outer]\nformula = "0.6 * mix + 0.4 * C"')
    a, b, c = (models[m]["matrix.weight"].numpy().astype(np.float32) for m in "ABC")
    inner = (a * np.float32(0.3) + b * np.float32(0.7)).astype(np.float16).astype(np.float32)
    expected = (inner * np.float32(0.6) + c * np.float32(0.4)).astype(np.float16)
    space.build(only=("mix",))
    space.build()
    from_store = space.load("outer")["matrix.weight"].numpy()
    space.build(store=space.path / "fresh")

    assert np.array_equal(from_store, expected)
    assert np.array_equal(space.load("outer")["matrix.weight"].numpy(), expected)


def test_an_intermediate_step_stays_in_float32(space: Space):
    """A step that nobody keeps is not rounded to sixteen bits on the way."""
    models = lay_down(space, 'formula = "0.3 * A + 0.7 * B"\n[step.outer]\nformula = "0.6 * mix + 0.4 * C"')
    a, b, c = (models[m]["matrix.weight"].numpy().astype(np.float32) for m in "ABC")
    expected = ((a * np.float32(0.3) + b * np.float32(0.7)) * np.float32(0.6) + c * np.float32(0.4)).astype(np.float16)
    space.build()

    assert np.array_equal(space.load("outer")["matrix.weight"].numpy(), expected)


@pytest.mark.parametrize("ratio", ["0.3", "0.30", "3e-1"])
def test_equal_numbers_are_equal_however_they_are_written(space: Space, ratio):
    """0.3 and 0.30 are one ratio, and one key."""
    lay_down(space, f'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = {ratio}')

    assert space.build().wishes[0].tensor_key == space_key(space)


def space_key(space: Space) -> str:
    """The key of the plain spelling."""
    models = {"a": "A", "b": "B"}
    space.write("plain.toml", GENERIC.format(step=f'method = "weighted_sum"\na = "{models["a"]}"\nb = "{models["b"]}"\nalpha = 0.3'))
    return space.build("plain.toml", out=space.path / "plain").wishes[0].tensor_key


def test_copy_picks_drops_and_converts(space: Space):
    """`copy` keeps what is picked and not dropped, in the dtype asked for; `keep` leaves every dtype alone."""
    models = lay_down(space, 'method = "copy"\na = "A"\npick = ["*.weight", "bias"]\ndrop = ["conv.*"]\ndtype = "fp32"', A="BF16")
    space.build()
    mix = space.load("mix")

    assert set(mix) == {"matrix.weight", "bias"}
    assert mix["bias"].equal(models["A"]["bias"].to(torch.float32))


def test_keep_takes_the_widest_dtype_of_the_parents(space: Space):
    """With `dtype = "keep"`, float16 and bfloat16 parents make a float32 child, as torch promotes them."""
    lay_down(space, 'formula = "0.5 * A + 0.5 * B"\ndtype = "keep"', A="F16", B="BF16")
    space.build()

    assert {tensor.dtype for tensor in space.load("mix").values()} == {torch.float32}
