"""Methods that compare models: each against its formula in NumPy, in float64 and float32, whole and in slices."""

from __future__ import annotations

import functools
import math

import checkpoints
import numpy as np
import pytest
import torch
from applied import evaluate
from hypothesis import given
from hypothesis import strategies as st

from sdmerge_build.methods import methods, similarity
from sdmerge_build.methods.measures import answer_alone, answered, seen

SHAPES = [(), (1,), (7,), (5, 1), (1, 5), (12, 9), (8, 4, 3, 3), (3, 2, 1, 1), (2, 3, 2, 3, 2)]
ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
DECODER = "first_stage_model.decoder.conv_in.weight"
RANGE = {"low": 0.1, "high": 0.7}


def trained(shape, dtype=torch.float64, *, zeros=False):
    """Three models of one family: each differs from the last, some weights are 0 in one or all of them."""
    c = checkpoints.numbers("base", ATTENTION, shape).to(dtype)
    a, b = (c * 0.5 + checkpoints.numbers(seed, ATTENTION, shape).to(dtype) for seed in ("anime", "photo"))
    if zeros:
        for step, model in zip((3, 4, 5), (a, b, c), strict=True):
            model.view(-1)[::step] = 0
    return a, b, c


def evaluated(name, models, params, **rest):
    return evaluate(methods()[name], models[: len(methods()[name].models)], params, findings=RANGE, **rest)


def lengths(x):
    return np.sqrt((x * x).sum(0))


def divided(x, y):
    """The quotient, 0 where it is 0 / 0."""
    return np.where(y == 0, 0, x / np.where(y == 0, 1, y))


def column_cosines(a, b):
    return divided((a * b).sum(0), lengths(a) * lengths(b))


def cosine(a, b):
    return float(divided((a * b).sum(), np.linalg.norm(a) * np.linalg.norm(b)))


def in_columns(function):
    """Let a formula see a vector as a column, and a number as one of 1."""

    @functools.wraps(function)
    def formula(a, b, **params):
        return function(np.atleast_1d(a), np.atleast_1d(b), **params).reshape(a.shape)

    return formula


@in_columns
def add_cosine_a(a, b, *, alpha):
    k = 1 - np.clip(column_cosines(a, b) - alpha, 0, 1)
    return (1 - k) * a + k * b


@in_columns
def add_cosine_b(a, b, *, alpha):
    k = 1 - np.clip((column_cosines(a, b) + cosine(a, b)) / 2 - alpha, 0, 1)
    return (1 - k) * a + k * b


def ranged(a, b, s, alpha, low, high):
    k = np.clip((s - low) / (high - low) - alpha, 0, 1)
    return k * a + (1 - k) * b


@in_columns
def cosine_a(a, b, *, alpha, low=0.1, high=0.7):
    x, y = divided(a, lengths(a)), divided(b, lengths(b))
    return ranged(a, b, (column_cosines(x, y) + cosine(x, y)) / 2, abs(alpha), low, high)


@in_columns
def cosine_b(a, b, *, alpha, low=0.1, high=0.7):
    return ranged(a, b, (column_cosines(a, b) + cosine(a, b)) / 2, alpha, low, high)


def similarity_add_difference(a, b, c, *, alpha, beta):
    larger = np.maximum(abs(a), abs(b))
    s = np.where(larger == 0, beta, beta * (divided(a * b, larger**2) + 1) / 2)
    return (1 - s) * (a + alpha * (b - c)) + s * ((1 - alpha / 2) * a + alpha / 2 * b)


def multiply_difference(a, b, c, *, alpha, beta):
    return c + np.copysign(abs(a - c) ** (1 - alpha) * abs(b - c) ** alpha, (1 - beta) * a + beta * b - c)


def euclidean_add_difference(a, b, c, *, alpha):
    x, y = (divided(d, np.linalg.norm(d)) for d in (a - c, b - c))
    m = (1 - alpha) * a + alpha * b - c
    d = np.copysign(np.sqrt((1 - alpha) * x**2 + alpha * y**2), m)
    return c + divided(d, np.linalg.norm(d)) * np.linalg.norm(m)


def multiply_quotient(a, b, c, *, alpha):
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = np.log(abs(a)) - np.log(abs(c)), np.log(abs(b)) - np.log(abs(c))
        s = np.maximum(0, -np.nan_to_num(p * q / np.maximum(abs(p), abs(q)) ** 2))
        found = (a * (b / c + 0j) ** (alpha * s)).real
    return np.where(np.isnan(found) | (s == 0), a, found)


def geometric_sum(a, b, *, alpha):
    return ((a + 0j) ** (1 - alpha) * (b + 0j) ** alpha).real


def sigmoid_sum(a, b, *, alpha):
    return (a + b) / (1 + math.exp(-4 * alpha)) - a / (1 + math.exp(-alpha))


def smoothstep_sum(a, b, *, alpha):
    ratio = alpha**2 * (3 - 2 * alpha)
    return (1 - ratio) * a + ratio * b


def inverse_smoothstep_sum(a, b, *, alpha):
    ratio = 0.5 - math.sin(math.asin(1 - 2 * alpha) / 3)
    return (1 - ratio) * a + ratio * b


def add_perpendicular(a, b, c, *, alpha):
    x, y = a - c, b - c
    return a + alpha * (y - x * divided((x * y).sum(), (x * x).sum()))


CASES = [
    *[(add_cosine_a, {"alpha": alpha}) for alpha in (0.0, 0.3, 1.0, 2.0, -0.4, -3.0)],
    *[(add_cosine_b, {"alpha": alpha}) for alpha in (0.0, 0.3, 1.0, -0.4)],
    *[(cosine_a, {"alpha": alpha}) for alpha in (0.0, 0.35, -0.35, 1.0)],
    *[(cosine_b, {"alpha": alpha}) for alpha in (0.0, 0.35, -0.35, 1.0)],
    *[(similarity_add_difference, {"alpha": alpha, "beta": beta}) for alpha, beta in ((0.5, 0.7), (0, 1), (1, 0), (-2, 3))],
    *[(multiply_difference, {"alpha": alpha, "beta": beta}) for alpha, beta in ((0.5, 0.3), (0.2, 1), (0, 0), (0, 1), (1, 1), (0.001, 0.5))],
    *[(euclidean_add_difference, {"alpha": alpha}) for alpha in (0, 0.25, 0.5, 1, 0.999)],
    *[(multiply_quotient, {"alpha": alpha}) for alpha in (0.5, 1.0, 0, -1.5)],
    *[(geometric_sum, {"alpha": alpha}) for alpha in (0, 0.5, 1, 0.3, 0.999)],
    *[(sigmoid_sum, {"alpha": alpha}) for alpha in (0, 0.5, 1, -2)],
    (np.maximum, {}),
    *[(smoothstep_sum, {"alpha": alpha}) for alpha in (0, 0.2, 0.5, 1)],
    *[(inverse_smoothstep_sum, {"alpha": alpha}) for alpha in (0, 1e-4, 0.2, 0.5, 0.8, 1)],
    *[(add_perpendicular, {"alpha": alpha}) for alpha in (0, 0.6, 1, -3)],
]
MEASURED = [add_cosine_a, add_cosine_b, cosine_a, cosine_b, euclidean_add_difference, add_perpendicular]


def name_of(case):
    return getattr(case, "__name__", None)


@pytest.mark.parametrize(("formula", "params"), CASES, ids=name_of)
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
def test_each_method_is_its_formula(formula, params, zeros):
    """Tensors of any shape come out as the formula has them, with zeros in any model."""
    for shape in SHAPES:
        for dtype, error in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
            models = trained(shape, dtype, zeros=zeros)
            found = evaluated(formula.__name__, models, params)
            numbers = [model.double().numpy() for model in models[: len(methods()[formula.__name__].models)]]

            assert found.shape == shape
            np.testing.assert_allclose(found.double().numpy(), formula(*numbers, **params), rtol=error, atol=error)


@pytest.mark.parametrize("formula", dict.fromkeys(formula for formula, _ in CASES), ids=name_of)
def test_slices_make_the_same_bits(formula):
    """A tensor is the same bit for bit however it is cut, and the formula's where more than one chunk was measured."""
    params = next(params for other, params in CASES if other is formula and not {0, 1} & set(params.values()))
    rows = 1024 if formula in MEASURED else 64  # columns are measured half a million elements at once
    models = trained((rows, 520), torch.float32, zeros=True)
    whole = evaluated(formula.__name__, models, params)
    sliced = evaluated(formula.__name__, models, params, slice_size=7_777 if rows == 64 else 77_777)

    assert torch.equal(whole, sliced)
    if formula in MEASURED:
        numbers = [model.double().numpy() for model in models[: len(methods()[formula.__name__].models)]]
        np.testing.assert_allclose(whole.double().numpy(), formula(*numbers, **params), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("formula", "params"), CASES, ids=name_of)
def test_equal_models_stay_as_they_are(formula, params):
    """Where all models are equal, weights of zero among them, so is the result; sums that round may be off in the last place."""
    model = trained((12, 9), torch.float32, zeros=True)[0]
    found = evaluated(formula.__name__, [model, model.clone(), model.clone()], params).float()
    exact = formula not in {geometric_sum, smoothstep_sum, inverse_smoothstep_sum, sigmoid_sum}

    if formula is sigmoid_sum:
        model = model * (2 / (1 + math.exp(-4 * params["alpha"])) - 1 / (1 + math.exp(-params["alpha"])))
    assert torch.equal(found, model) if exact else torch.allclose(found, model, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("name", "params", "which"),
    [
        ("add_cosine_a", {"alpha": 1}, 1),
        ("add_cosine_b", {"alpha": 1.5}, 1),
        ("similarity_add_difference", {"alpha": 0, "beta": 0.4}, 0),
        ("multiply_difference", {"alpha": 0, "beta": 0}, 0),
        ("multiply_difference", {"alpha": 1, "beta": 1}, 1),
        ("euclidean_add_difference", {"alpha": 0}, 0),
        ("euclidean_add_difference", {"alpha": 1}, 1),
        ("multiply_quotient", {"alpha": 0}, 0),
        ("geometric_sum", {"alpha": 0}, 0),
        ("geometric_sum", {"alpha": 1}, 1),
        ("add_perpendicular", {"alpha": 0}, 0),
        ("smoothstep_sum", {"alpha": 0}, 0),
        ("smoothstep_sum", {"alpha": 1}, 1),
        ("inverse_smoothstep_sum", {"alpha": 0}, 0),
        ("inverse_smoothstep_sum", {"alpha": 1}, 1),
    ],
)
def test_a_weight_of_nothing_or_all_gives_the_model_itself(name, params, which):
    """Ratios that leave one model give it bit for bit."""
    models = trained((8, 4, 3, 3), torch.float32)

    assert torch.equal(evaluated(name, models, params), models[which])


@pytest.mark.parametrize(("formula", "params"), CASES, ids=name_of)
def test_zeros_make_no_holes(formula, params):
    """Where models are all zero, or one of them is, nothing becomes NaN or infinite."""
    models = trained((6, 5), torch.float32)
    nothing = torch.zeros(6, 5)
    for mask in range(8):
        chosen = [nothing if mask >> n & 1 else model for n, model in enumerate(models)]

        assert evaluated(formula.__name__, chosen, params).isfinite().all(), f"zero: {mask:03b}"


@pytest.mark.parametrize("scale", [1e-20, 1e15])
@pytest.mark.parametrize("formula", [add_cosine_a, cosine_b, similarity_add_difference, euclidean_add_difference, multiply_quotient, geometric_sum])
def test_the_scale_of_all_models_does_not_matter(formula, scale):
    """Models of tiny or huge weights, whose squares float32 cannot hold, are merged as others are."""
    params = next(params for other, params in CASES if other is formula)
    models = trained((12, 9), torch.float32)
    found = evaluated(formula.__name__, [model * scale for model in models], params).double() / scale

    np.testing.assert_allclose(found.numpy(), evaluated(formula.__name__, models, params).double().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["multiply_quotient", "maximum", "similarity_add_difference"])
def test_a_hole_in_any_model_is_seen(name):
    """NaN in a model is NaN in the result, not another model's weight."""
    for n in range(len(methods()[name].models)):
        models = [model.clone() for model in trained((4,), torch.float32)]
        models[n][2] = math.nan

        assert evaluated(name, models, {"alpha": 0.5, "beta": 0.5}).isnan().tolist() == [False, False, True, False]


def test_perpendicular_is_all_that_is_new_where_a_learned_nothing():
    """Where `a` is as `c`, what `b` learned is perpendicular to nothing: all of it is added."""
    a, b, _ = trained((12, 9), torch.float32)

    assert torch.allclose(evaluated("add_perpendicular", [a, b, a.clone()], {}), b, rtol=0, atol=1e-7)


@given(st.floats(0, 1))
def test_the_inverse_bends_back(alpha):
    """What `smoothstep_sum` does to a ratio, `inverse_smoothstep_sum` undoes."""
    bent = similarity.inverse_smoothstep_sum(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), alpha=alpha).item()
    back = similarity.smoothstep_sum(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), alpha=min(bent, 1.0)).item()

    assert bent <= 1
    assert back == pytest.approx(alpha, abs=1e-15, rel=1e-12)


class Pair:
    """Two whole models, as a survey sees them."""

    def __init__(self, a, b):
        self._models = a, b
        self.names = tuple(sorted(a))

    def ask(self, name, question, cut):
        """Answer a question that takes one chunk."""
        tensors = [model[name] for model in self._models]
        return answered(question(*(seen(t.reshape(-1), cut, tuple(t.shape)) for t in tensors)), answer_alone)

    def map(self, function, names):
        """Apply a function to names, in their order."""
        return [function(name) for name in names]


def family(seed):
    """A model of which one layer is alike in all of its family, and one has nothing."""
    model = {name: checkpoints.numbers(seed, name, shape).float() for name, shape in LAYERS.items()}
    model["cond_stage_model.transformer.text_model.final_layer_norm.weight"] = torch.ones(9)
    model["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    return model


LAYERS = {
    ATTENTION: (64, 32),
    "model.diffusion_model.input_blocks.0.0.weight": (16, 4, 3, 3),
    "model.diffusion_model.time_embed.0.bias": (20,),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (30, 48),
    DECODER: (8, 4, 3, 3),
}


def expected_range(a, b, alike):
    """What supermerger finds: the least and the largest of all but the outermost hundredths."""
    found = []
    for name in sorted(a):
        if not name.startswith("first_stage_model."):
            found += np.ravel(alike(a[name].double().numpy(), b[name].double().numpy())).tolist()
    found = np.array(found)
    found = found[~np.isnan(found)]
    found = found[found >= np.percentile(found, 1, method="midpoint")]
    found = found[found <= np.percentile(found, 99, method="midpoint")]
    return found.min(), found.max()


def alike_in_both(a, b):
    return (column_cosines(a, b) + (cosine(a, b) if a.any() and b.any() else math.nan)) / 2


@pytest.mark.parametrize(("formula", "alike"), [(cosine_a, column_cosines), (cosine_b, alike_in_both)], ids=name_of)
def test_cosines_are_ranged_over_whole_models(formula, alike):
    """The survey finds the range of all columns but the VAE's; in it, each column's similarity decides; the VAE is that of `a`."""
    a, b = family("anime"), family("photo")
    method = methods()[formula.__name__]
    findings = method.survey.function(Pair(a, b))
    low, high = expected_range(a, b, alike)

    assert (findings["low"], findings["high"]) == (pytest.approx(low), pytest.approx(high))
    for name in LAYERS:
        found = evaluate(method, [a[name], b[name]], {"alpha": 0.2}, name=name, findings=findings)
        expected = formula(a[name].double().numpy(), b[name].double().numpy(), alpha=0.2, low=low, high=high)
        np.testing.assert_allclose(found.numpy(), a[name].numpy() if name == DECODER else expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_of_zeros_counts_as_in_supermerger():
    """A tensor that is all zero in one model is unlike any other for `cosine_a`, and has no similarity for `cosine_b`."""
    layer = checkpoints.numbers("base", ATTENTION, (64, 2)).float()
    pair = Pair({"to_q": layer, "proj_out": torch.zeros(4, 3)}, {"to_q": layer, "proj_out": torch.ones(4, 3)})

    assert methods()["cosine_a"].survey.function(pair)["low"] == 0
    assert methods()["cosine_b"].survey.function(pair)["low"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_models_without_a_range_are_mixed_evenly(name):
    """Where all columns are equally alike, or there are none to compare, alpha alone is the share of `b`."""
    method = methods()[name]
    [(layer, shape)] = list(LAYERS.items())[:1]
    a, b = (torch.full(shape, size) for size in (1.0, 3.0))
    nothing = {DECODER: torch.ones(3, 3)}
    for findings in (method.survey.function(Pair({layer: a}, {layer: b})), method.survey.function(Pair(nothing, nothing))):
        assert findings["low"] == findings["high"]
        assert torch.equal(evaluate(method, [a, b], {"alpha": 0.25}, name=layer, findings=findings), torch.full(shape, 1.5))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=400), st.integers(0, 100))
def test_percentiles_are_those_of_numpy(numbers, percent):
    """Percentiles are NumPy's by the method `midpoint`, of any count of numbers."""
    ascending = torch.tensor(sorted(numbers), dtype=torch.float64)

    assert similarity._percentile(ascending, percent) == np.percentile(numbers, percent, method="midpoint")
