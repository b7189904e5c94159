"""Methods that add parts of a difference: each against its formula in NumPy, filters against SciPy, in float64 and float32, whole and in slices."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch
from applied import evaluate
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from sdmerge_build.methods import difference, methods

SHAPES = [(), (1,), (2,), (7,), (5, 1), (1, 5), (12, 9), (8, 4, 3, 3), (3, 2, 1, 1), (2, 3, 2, 3, 2)]
CONVOLUTION = "model.diffusion_model.output_blocks.11.0.out_layers.3.weight"


def trained(shape, dtype=torch.float64, *, zeros=False):
    """Three models of one family; some weights are 0 in one or all of them, and some were left alone by `a` or `b`."""
    c = checkpoints.numbers("base", CONVOLUTION, shape).to(dtype)
    a, b = (c * 0.5 + checkpoints.numbers(seed, CONVOLUTION, shape).to(dtype) for seed in ("anime", "photo"))
    if zeros:
        for step, model in zip((3, 4, 5), (a, b, c), strict=True):
            model.view(-1)[::step] = 0
        a.view(-1)[1::7] = c.reshape(-1)[1::7]
        b.view(-1)[1::5] = c.reshape(-1)[1::5]
    return a, b, c


def divided(x, y):
    """The quotient, 0 where it is 0 / 0."""
    return np.where(y == 0, 0, x / np.where(y == 0, 1, y))


def train_difference(a, b, c, *, alpha):
    return a + 1.8 * alpha * (b - c) * divided(abs(b - a), abs(b - c) + abs(b - a))


def add_opposite(a, b, c, *, alpha):
    return a + 2 * alpha * (b - c) * divided(abs(a - b), abs(a - b) + abs(a + b - 2 * c))


def add_strict_opposite(a, b, c, *, alpha):
    quotient = divided((c - a) * (b - c), np.maximum(abs(a - c), abs(b - c)) ** 2)
    return a + 2 * alpha * (b - c) * np.maximum(0, quotient)


def extract(a, b, c, *, alpha, beta, gamma):
    a, b, c = (np.atleast_1d(x) for x in (a, b, c))
    x, y = b - a, c - a
    cosine = divided((x * y).sum(-1, keepdims=True), np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(y, axis=-1, keepdims=True))
    d = ((np.clip(cosine, -1, 1) + 1) / 2) ** gamma
    return a + ((1 - alpha) * x + alpha * y) * ((1 - beta) * d + beta * (1 - d))


def smooth_add(a, b, c, *, alpha):
    if not a.ndim:
        return a + alpha * (b - c)
    return a + alpha * ndimage.gaussian_filter(ndimage.median_filter(b - c, size=3, mode="reflect"), 1, mode="reflect", truncate=4)


def clamp(a, *bounds, stiffness):
    low, high = np.min(bounds, axis=0), np.max(bounds, axis=0)
    mean = np.mean(bounds, axis=0)
    below = np.max([np.where(bound <= mean, bound, low) for bound in bounds], axis=0)
    above = np.min([np.where(bound >= mean, bound, high) for bound in bounds], axis=0)
    return np.clip(a, (1 - stiffness) * low + stiffness * below, (1 - stiffness) * high + stiffness * above)


CASES = [
    *[(train_difference, {"alpha": alpha}) for alpha in (0, 0.5, 1.0, -2.0)],
    *[(add_opposite, {"alpha": alpha}) for alpha in (0, 0.5, 1.0, -2.0)],
    *[(add_strict_opposite, {"alpha": alpha}) for alpha in (0, 0.5, 1.0, -2.0)],
    *[
        (extract, {"alpha": alpha, "beta": beta, "gamma": gamma})
        for alpha, beta, gamma in ((0.5, 0.25, 1.5), (0, 0, 1), (1, 1, 2), (0.3, 1, 0), (0.5, 0, 40.0))
    ],
    *[(clamp, {"stiffness": stiffness}) for stiffness in (0.0, 0.4, 1.0)],
    *[(smooth_add, {"alpha": alpha}) for alpha in (0, 1.0, 0.3, -2.0)],
]
FORMULAS = dict.fromkeys(formula for formula, _ in CASES)


def name_of(case):
    return getattr(case, "__name__", None)


@pytest.mark.parametrize(("formula", "params"), CASES, ids=name_of)
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
def test_each_method_is_its_formula(formula, params, zeros):
    """Tensors of any shape come out as the formula has them, with zeros in any model and weights that a model left alone."""
    for shape in SHAPES:
        for dtype, error in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
            models = trained(shape, dtype, zeros=zeros)
            found = evaluate(methods()[formula.__name__], models, params)
            expected = formula(*(model.double().numpy() for model in models), **params).reshape(shape)

            assert found.shape == shape
            np.testing.assert_allclose(found.double().numpy(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("formula", FORMULAS, ids=name_of)
def test_slices_make_the_same_bits(formula):
    """A tensor of more than one chunk is the formula's, and the same bit for bit however it is cut."""
    params = next(params for other, params in CASES if other is formula and not {0, 1} & set(params.values()))
    models = trained((290, 480), torch.float32, zeros=True)
    whole = evaluate(methods()[formula.__name__], models, params)
    expected = formula(*(model.double().numpy() for model in models), **params)

    assert torch.equal(whole, evaluate(methods()[formula.__name__], models, params, slice_size=7777))
    np.testing.assert_allclose(whole.double().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("formula", "params"), CASES, ids=name_of)
def test_equal_models_stay_as_they_are(formula, params):
    """Where all models are equal, so is the result."""
    model = trained((8, 4, 3, 3), torch.float32, zeros=True)[0]

    assert torch.equal(evaluate(methods()[formula.__name__], [model, model.clone(), model.clone()], params), model)


@pytest.mark.parametrize("name", ["train_difference", "add_opposite", "add_strict_opposite", "smooth_add"])
def test_nothing_of_a_difference_leaves_the_model_itself(name):
    """At `alpha = 0`, or where `b` learned nothing, the result is `a`."""
    a, b, c = trained((8, 4, 3, 3), torch.float32)

    assert torch.equal(evaluate(methods()[name], [a, b, c], {"alpha": 0}), a)
    assert torch.equal(evaluate(methods()[name], [a, b, b.clone()], {}), a)


@pytest.mark.parametrize("scale", [1e-25, 1e15])
@pytest.mark.parametrize("formula", FORMULAS, ids=name_of)
def test_the_scale_of_all_models_does_not_matter(formula, scale):
    """Models of tiny or huge weights, whose squares float32 cannot hold, are merged as others are."""
    params = next(params for other, params in CASES if other is formula and 0 not in params.values())
    models = trained((12, 9), torch.float32)
    found = evaluate(methods()[formula.__name__], [model * scale for model in models], params).double() / scale

    np.testing.assert_allclose(found.numpy(), evaluate(methods()[formula.__name__], models, params).double().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("formula", FORMULAS, ids=name_of)
def test_a_hole_in_any_model_is_seen(formula):
    """NaN in a model is NaN in the result."""
    for n in range(3):
        models = [model.clone() for model in trained((40,), torch.float32)]
        models[n][20] = float("nan")

        assert evaluate(methods()[formula.__name__], models, {}).isnan()[20]


def test_opposites_are_told_from_the_rest():
    """`add_opposite` takes all of what went the other way and half of what only `b` learned; `add_strict_opposite` only the former."""
    c = torch.zeros(4)
    a, b = torch.tensor([-1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, -0.5])

    assert evaluate(methods()["add_opposite"], [a, b, c], {"alpha": 0.5}).tolist() == [0, 0.5, 1, 0.625]
    assert evaluate(methods()["add_strict_opposite"], [a, b, c], {"alpha": 0.5}).tolist() == [0, 0, 1, 0.75]


def test_clamp_takes_any_number_of_bounds():
    """Without bounds a model is free, one bound is what it becomes, of many the outermost count unless they are stiff."""
    a = torch.tensor([9.0, -9.0, 1.5])
    bounds = [torch.full((3,), number) for number in (0.0, 8.0, 1.0, 2.0)]

    assert torch.equal(evaluate(methods()["clamp"], [a], {}), a)
    assert torch.equal(evaluate(methods()["clamp"], [a, bounds[3]], {"stiffness": 0.3}), bounds[3])
    assert evaluate(methods()["clamp"], [a, *bounds], {}).tolist() == [8, 0, 1.5]
    assert evaluate(methods()["clamp"], [a, *bounds], {"stiffness": 0.5}).tolist() == [8, 1, 1.5]
    assert evaluate(methods()["clamp"], [a, *bounds], {"stiffness": 1}).tolist() == [8, 2, 2]
    assert evaluate(methods()["clamp"], [a, bounds[0], *bounds[2:]], {"stiffness": 1}).tolist() == [1, 1, 1]


@given(st.permutations(range(5)))
def test_the_order_of_bounds_does_not_matter(order):
    """Bounds clamp alike in any order."""
    a, _, _ = trained((12, 9), torch.float32)
    bounds = [checkpoints.numbers(f"bound {n}", CONVOLUTION, (12, 9)).float() for n in range(5)]
    expected = evaluate(methods()["clamp"], [a, *bounds], {"stiffness": 0.25})

    assert torch.equal(evaluate(methods()["clamp"], [a, *(bounds[n] for n in order)], {"stiffness": 0.25}), expected)


@pytest.mark.parametrize("shape", [(23,), (7, 11), (4, 5, 6), (5, 4, 3, 3)])
def test_medians_are_those_of_scipy_whatever_the_blocks(shape, monkeypatch):
    """Medians of 3, 9, 27 or 81 neighbours are SciPy's to the bit, and so is the sum where nothing rounds; blocks of one row change nothing."""
    a, b, c = trained(shape, torch.float32)
    whole = evaluate(methods()["smooth_add"], [a, b, c], {})
    monkeypatch.setattr(difference, "_BLOCK", 1)
    in_rows = evaluate(methods()["smooth_add"], [a, b, c], {})
    monkeypatch.setattr(difference, "_blurred", lambda x, dimension: x.narrow(dimension, 4, x.shape[dimension] - 8))
    sharp = evaluate(methods()["smooth_add"], [torch.zeros(shape), b, c], {})

    assert torch.equal(whole, in_rows)
    assert torch.equal(sharp, torch.from_numpy(ndimage.median_filter((b - c).numpy(), size=3)))


def test_a_tensor_without_elements_stays_so():
    """An empty tensor is smoothed to an empty tensor."""
    empty = torch.empty(0, 4)

    assert evaluate(methods()["smooth_add"], [empty, empty, empty], {}).shape == (0, 4)
