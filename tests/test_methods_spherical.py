"""Methods that go along arcs or turn rows; each against NumPy's float64, written with the directions themselves instead of dot products."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from applied import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.methods import methods as registered
from sdmerge_build.methods import procrustes, spherical
from sdmerge_build.methods.arcs import FLAT, _acos_pi

METHODS = {name: method for name, method in registered().items() if name in spherical.__all__}
SHAPES = [(), (1,), (7,), (5, 1), (1, 5), (12, 9), (8, 4, 3, 3), (3, 2, 1, 1)]
PAIRED = ["slerp", "slerp_vectors", "nuslerp", "nuslerp_rows", "nuslerp_columns"]
NAME = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"


def models(shape, count=2, spread=1.0, seed=0):
    """Models tuned from one base, `spread` far apart."""
    random = np.random.default_rng([seed, *shape])
    base = random.normal(size=shape)
    return [torch.tensor(base + spread * random.normal(size=shape), dtype=torch.float32) for _ in range(count)]


IN_THE_STEPS_DTYPE = ("slerp", "slerp_vectors", "nuslerp")  # which are given float64 here, as by `compute = "fp64"`


def apply(name, given_models, slice_size=0, **params):
    given_models = [model.double() for model in given_models] if name in IN_THE_STEPS_DTYPE else given_models
    return evaluate(METHODS[name], given_models, params, name=NAME, slice_size=slice_size)


def same(one, other):
    """Equal to the last bit, once rounded as the other is."""
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def close(found, expected, tolerance=1e-12):
    """Within a share of the vector's length."""
    assert found.shape == expected.shape
    return np.abs(found.double().numpy() - expected).max(initial=0) <= tolerance * max(np.linalg.norm(expected), 1e-300)


def arc(a, b, alpha, *, unit=False, flattest=1.0):
    """The textbook's formula for one pair of vectors, float64 or longer."""
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    mixture = (1 - alpha) * a + alpha * b
    if not all(lengths):
        return mixture
    u, v = a / lengths[0], b / lengths[1]
    angle = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))  # W. Kahan's
    if angle < 1e-12 or angle > math.pi - FLAT or abs(math.cos(angle)) > flattest:
        return mixture
    a, b = (u, v) if unit else (a, b)
    point = (np.sin((1 - alpha) * angle) * a + np.sin(alpha * angle) * b) / np.sin(angle)
    return point * ((1 - alpha) * lengths[0] + alpha * lengths[1]) if unit else point


def expected_of(name, a, b, alpha):
    """The oracle of a method for two models."""
    a, b = a.double().numpy(), b.double().numpy()
    match name:
        case "slerp":
            return arc(a, b, alpha, unit=True)
        case "slerp_vectors":
            return arc(a, b, alpha, flattest=0.9995)
        case "nuslerp_rows":
            rows = [
                arc(*pair, alpha)
                for pair in zip(np.atleast_2d(a).reshape(-1, (a.shape or (1,))[-1]), b.reshape(-1, (b.shape or (1,))[-1]), strict=True)
            ]
            return np.array(rows).reshape(a.shape)
        case "nuslerp_columns":
            a2, b2 = (x.reshape((x.shape or (1,))[0], -1) for x in (a, b))
            return np.stack([arc(*pair, alpha) for pair in zip(a2.T, b2.T, strict=True)], 1).reshape(a.shape)
    return arc(a, b, alpha)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-3])
def test_arcs_are_the_textbooks(name, shape, spread):
    """
    Between tunes of one base, near or far, and beyond them, points are those of the textbook's formula.
    """
    a, b = models(shape, spread=spread)

    for alpha in (0.25, 0.5, 0.9, -0.3, 1.7):
        assert close(apply(name, [a, b], alpha=alpha), expected_of(name, a, b, alpha), 1e-10)


@pytest.mark.parametrize("name", IN_THE_STEPS_DTYPE)
@pytest.mark.parametrize("alpha", [0.25, -0.3, 1.7])
def test_arcs_in_float32_are_rounded_there(name, alpha):
    """
    In float32 each product and the sum is rounded, as in `weighted_sum`; shares come from float64.
    """
    a, b = models((12, 9))
    found = evaluate(METHODS[name], [a, b], {"alpha": alpha}, name=NAME)

    assert found.dtype is torch.float32
    assert close(found, expected_of(name, a, b, alpha), 1e-6)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("shape", SHAPES)
def test_ends_and_equals_stay_as_they_are(name, shape):
    """
    At 0 and 1 the result is the model itself, between equal models it is either.
    """
    a, b = models(shape)

    assert same(apply(name, [a, b], alpha=0), a)
    assert same(apply(name, [a, b], alpha=1), b)
    assert same(apply(name, [a, a], alpha=0.3), a)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("shape", SHAPES)
def test_where_there_is_no_arc_models_are_mixed(name, shape):
    """
    A tensor of zeros, an opposite one and a multiple are mixed as in `weighted_sum`.
    """
    a, _ = models(shape)

    for b in (torch.zeros_like(a), -a, -2.5 * a, 2 * a):
        for pair in ((a, b), (b, a)):
            assert close(apply(name, pair, alpha=0.3), 0.7 * pair[0].double().numpy() + 0.3 * pair[1].double().numpy(), 1e-14)
    assert same(apply(name, [a * 0, a * 0], alpha=0.3), a * 0)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("angle", [3.0, math.pi - 1e-2, math.pi - 1.1 * FLAT])
def test_arcs_between_nearly_opposite_models_are_precise(name, angle):
    """
    Up to the angle at which there is no arc, the point is what it should be to the precision of float32.
    """
    u = np.array([[0.6, 0.8], [0.8, -0.6]])
    a, b = torch.tensor(3 * u[:1]), torch.tensor(math.cos(angle) * u[:1] + math.sin(angle) * u[1:])
    pair = (a.T, b.T) if name == "nuslerp_columns" else (a, b)

    assert close(apply(name, pair, alpha=0.4), expected_of(name, *pair, 0.4), 1e-7)


@pytest.mark.parametrize("name", PAIRED)
def test_swapping_models_is_swapping_ratios(name):
    """
    The point at a quarter from one end is the point at three quarters from the other.
    """
    a, b = models((12, 9))

    assert same(apply(name, [a, b], alpha=0.25).float(), apply(name, [b, a], alpha=0.75).float())


@settings(max_examples=60, deadline=None)
@given(scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e5, 1e18]), other=st.sampled_from([1e-30, 1.0, 1e18]), alpha=st.floats(0.01, 0.99))
def test_slerp_splits_direction_and_length(scale, other, alpha):
    """
    However different the lengths, the direction depends on directions alone, and the length on lengths.
    """
    a, b = models((12, 9))
    found = apply("slerp", [a * scale, b * other], alpha=alpha).double()
    plain = apply("slerp", [a, b], alpha=alpha).double()
    length = (1 - alpha) * (a * scale).double().norm() + alpha * (b * other).double().norm()

    assert torch.allclose(found / found.norm(), plain / plain.norm(), rtol=0, atol=1e-6)  # what rounding leaves of a * scale
    assert math.isclose(found.norm(), length, rel_tol=1e-12)


def test_nearly_parallel_vectors_are_mixed_by_one_method_only():
    """
    Above a cosine of 0.9995 `slerp_vectors` is a mixture; `nuslerp` never is.
    """
    near, far = models((12, 9), spread=0.01), models((12, 9), spread=0.1)
    mixed = [(a.double() * 0.7 + b.double() * 0.3).numpy() for a, b in (near, far)]

    assert close(apply("slerp_vectors", near, alpha=0.3), mixed[0], 1e-15)
    assert not close(apply("nuslerp", near, alpha=0.3), mixed[0], 1e-10)
    assert same(apply("slerp_vectors", far, alpha=0.3), apply("nuslerp", far, alpha=0.3))


@pytest.mark.parametrize("shape", SHAPES)
def test_differences_are_joined_by_an_arc_from_the_base(shape):
    """
    With a base the arc joins what was learned since, in float64, so that small differences keep their digits.
    """
    base, a, b = models(shape, 3, spread=1e-3)
    learned = [(model.double() - base.double()).numpy() for model in (a, b)]

    assert close(apply("nuslerp_differences", [base, a, b], alpha=0.3), base.double().numpy() + arc(*learned, 0.3))
    assert same(apply("nuslerp_differences", [base, a, b], alpha=1), b)
    assert same(apply("nuslerp_differences", [base, base, base], alpha=0.3), base)


def test_many_angles_at_once_are_within_a_few_ulp():
    """
    The angle of a tensor's cosines is that of the math library, at the ends and in between.
    """
    cosines = torch.cat(
        (torch.linspace(-1, 1, 2001, dtype=torch.float64), torch.tensor([1 - 1e-15, -1 + 1e-15, 1e-300, 0.5, -0.5], dtype=torch.float64))
    )
    expected = np.array([math.acos(c) / math.pi for c in cosines.tolist()])

    assert np.all(np.abs(_acos_pi(cosines).numpy() - expected) <= 4 * np.spacing(expected))


def as_mergekit_does(vectors, weights, *, normalize=True):
    """Mergekit's multislerp with its step in the tangent space, in float64."""
    weights = np.array(weights) / (sum(weights) if normalize else 1)
    x = np.stack([vector.double().numpy().reshape(-1) for vector in vectors])
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    u = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    m = weights @ u
    m /= np.linalg.norm(m)
    tangent = weights @ (u - (u @ m)[:, None] * m)
    t = np.linalg.norm(tangent) + 1e-300
    return ((m * np.cos(t) + tangent * (np.sin(t) / t)) * (weights @ lengths)).reshape(tuple(vectors[0].shape))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape) > 4])
@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 2.0, 0.5), (1.0, -0.3, 0.4), (2.0, 0.0, 1.0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_is_mergekits(shape, weights, normalize):
    """
    The weighted mean of directions is what mergekit arrives at: its step in the tangent space is zero.
    """
    three, base = models(shape, 3), models(shape, 1, seed=1)[0]
    learned = [model.double() - base.double() for model in three]
    params = {"weights": weights, "normalize": normalize}

    assert close(apply("multislerp", three, **params), as_mergekit_does(three, weights, normalize=normalize))
    expected = base.double().numpy() + as_mergekit_does(learned, weights, normalize=normalize)
    assert close(apply("multislerp_differences", [base, *three], **params), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_multislerp_knows_when_there_is_nothing_to_join(shape):
    """
    One model with a weight is the result, equal models are, zeros only count in the length, and opposite ones are summed.
    """
    a, b, base = models(shape, 3)

    assert same(apply("multislerp", [a, b, a], weights=(0.0, 0.7, 0.0)), b)
    assert same(apply("multislerp_differences", [base, a, b], weights=(0.0, 0.7)), b)
    assert same(apply("multislerp_differences", [base, a, b], weights=0.0, normalize=False), base)
    assert same(apply("multislerp", [a, b], weights=0.0, normalize=False), a * 0)
    assert same(apply("multislerp", [a, a, a], weights=(0.2, 0.3, 0.9)), a)
    assert same(apply("multislerp", [a, a * 0], weights=1.0), a / 2)
    assert same(apply("multislerp", [a, -a, a * 2, a * -2], weights=1.0), a * 0)
    assert same(apply("multislerp", [a, a * -4], weights=1.0), a * -1.5)
    assert same(apply("multislerp", [a * 0, a * 0], weights=1.0), a * 0)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_what_is_left_of_opposite_directions_is_no_direction(name):
    """
    Where directions cancel out but for a hundred thousandth, models are averaged instead of blowing that up to their length.
    """
    a, b = models((12, 9))
    opposite = 1e-5 * b - a
    params = {"weights": 1.0} if name == "multislerp" else {}

    assert close(apply(name, [a, opposite], **params), (a.double() + opposite.double()).numpy() / 2)


def test_weights_that_sum_to_nothing_give_nothing():
    """
    Weights that should be divided by a sum of 0 leave no number, which the engine refuses.
    """
    a, b = models((12, 9))

    assert apply("multislerp", [a, b], weights=(1.0, -1.0)).isnan().all()


def karcher_by_vectors(tensors, iterations=10, tolerance=1e-5):
    """Mergekit's Karcher mean, iterated on the directions themselves in float64."""
    x = np.stack([tensor.double().numpy().reshape(-1) for tensor in tensors])
    lengths = np.linalg.norm(x, axis=1)
    u = x[lengths > 0] / lengths[lengths > 0, None]
    at = u.mean(0) / np.linalg.norm(u.mean(0))
    for _ in range(iterations):
        tangent = np.zeros_like(at)
        for unit in u:
            cos = np.clip(at @ unit, -1, 1)
            angle = np.arccos(cos)
            if angle >= tolerance:
                tangent += angle / np.sin(angle) * (unit - cos * at) / len(u)
        length = np.linalg.norm(tangent)
        if length < tolerance:
            break
        at = np.cos(length) * at + np.sin(length) / length * tangent
        at /= np.linalg.norm(at)
    return (at * lengths.mean()).reshape(tuple(tensors[0].shape))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape) > 4])
@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_karcher_is_the_iteration_of_directions(shape, spread, count):
    """
    Steps in the space of shares are the steps of the vectors.
    """
    tensors = models(shape, count, spread)

    assert close(apply("karcher", tensors), karcher_by_vectors(tensors), 1e-9)
    assert close(apply("karcher", [*tensors, tensors[0] * 0]), karcher_by_vectors([*tensors, tensors[0] * 0]), 1e-9)


def test_karcher_is_where_angles_pull_equally():
    """
    At the result the tangents to all models, as long as their angles, cancel out; the order of models does not matter.
    """
    tensors = models((12, 9), 4)
    found = apply("karcher", tensors, iterations=100, tolerance=1e-13)
    at = found.numpy().reshape(-1) / np.linalg.norm(found)
    pull = np.zeros_like(at)
    for tensor in tensors:
        unit = tensor.double().numpy().reshape(-1) / np.linalg.norm(tensor.double())
        cos = at @ unit
        pull += np.arccos(cos) / np.sqrt(1 - cos**2) * (unit - cos * at)

    assert np.linalg.norm(pull) < 1e-12
    assert same(apply("karcher", tensors[::-1]).float(), apply("karcher", tensors).float())


@pytest.mark.parametrize("shape", SHAPES)
def test_karcher_knows_when_there_is_nothing_to_join(shape):
    """
    One model is the result, equal models are, of two it is the middle of the arc, and opposite ones are averaged.
    """
    a, b = models(shape)

    assert same(apply("karcher", [a]), a)
    assert same(apply("karcher", [a, a, a]), a)
    assert same(apply("karcher", [a * 0, a * 0]), a * 0)
    assert same(apply("karcher", [a, a * -4]), a * -1.5)
    assert same(apply("karcher", [a, a, a, -a]), a)
    assert close(apply("karcher", [a, b]), arc(a.double().numpy(), b.double().numpy(), 0.5, unit=True))


@pytest.mark.parametrize(
    ("name", "shape", "count", "params"),
    [
        ("slerp", (300, 512), 2, {"alpha": 0.3}),
        ("slerp_vectors", (300, 512), 2, {"alpha": 0.3}),
        ("nuslerp", (300, 512), 2, {"alpha": 0.3}),
        ("nuslerp_differences", (300, 512), 3, {"alpha": 0.3}),
        ("nuslerp_rows", (300, 512), 2, {"alpha": 0.3}),
        ("nuslerp_columns", (1100, 512), 2, {"alpha": 0.3}),
        ("multislerp", (300, 512), 3, {"weights": (0.5, 0.3, 0.2)}),
        ("multislerp_differences", (300, 512), 3, {"weights": (0.5, 0.3)}),
        ("karcher", (300, 512), 3, {}),
    ],
)
def test_large_tensors_are_measured_as_one(name, shape, count, params):
    """
    A tensor of several chunks is one vector, wherever it is cut.
    """
    given_models = models(shape, count)
    whole = apply(name, given_models, **params)
    oracles = {
        "nuslerp_differences": lambda base, a, b: base + arc(a - base, b - base, 0.3),
        "multislerp": lambda *_: as_mergekit_does(given_models, params["weights"]),
        "multislerp_differences": lambda base, *_: (
            base + as_mergekit_does([m.double() - given_models[0].double() for m in given_models[1:]], params["weights"])
        ),
        "karcher": lambda *_: karcher_by_vectors(given_models),
    }
    oracle = oracles.get(name, lambda *_: expected_of(name, *given_models, 0.3))

    assert close(whole, oracle(*(model.double().numpy() for model in given_models)))
    assert same(apply(name, given_models, slice_size=70_000, **params), whole)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "rotate"])
@pytest.mark.parametrize("slice_size", [1, 10, 50])
def test_small_slices_are_the_same(name, slice_size):
    """
    Cut into almost nothing, a tensor of filters is merged to the same bits.
    """
    given_models = models((8, 4, 3, 3), 3 if METHODS[name].models[:1] == ("base",) else 2)
    params = {"weights": 0.5} if "weights" in METHODS[name].parameters else {}

    assert same(apply(name, given_models, slice_size=slice_size, **params), apply(name, given_models, **params))


def rotated_as_sd_mecha(a, b, alignment, alpha, centralization):
    """sd-mecha's formula for many independent rows: NumPy's singular vectors, and complex eigenvalues for fractions of a turn."""
    shape = a.shape
    size = (shape[0] * shape[1], -1) if len(shape) == 4 and shape[2] * shape[3] > 1 else (shape[0], -1)
    a, b = a.reshape(size), b.reshape(size)
    mean_a, mean_b = a.mean(0) * centralization, b.mean(0) * centralization
    a, b = a - mean_a, b - mean_b
    u, _, vt = np.linalg.svd(a.T @ b)
    if alignment != round(alignment):
        u[:, -1] *= np.sign(np.linalg.det(u @ vt))
    q = u @ vt
    values, vectors = np.linalg.eig(q)
    power = (vectors * values.astype(complex) ** alignment) @ np.linalg.inv(vectors)
    turned = ((1 - alpha) * a + alpha * (b @ q.T)) @ power.real
    return (turned + (1 - alignment) * mean_a + alignment * mean_b).reshape(shape)


@pytest.mark.parametrize("shape", [(12, 9), (40, 5), (6, 1), (8, 4, 3, 3), (12, 5, 1, 1), (14, 3, 3)])
@pytest.mark.parametrize(
    ("alignment", "alpha", "centralization"),
    [(1.0, 0.0, 1.0), (1.0, 0.4, 1.0), (0.5, 0.0, 1.0), (0.3, 0.6, 0.5), (2.0, 0.1, 0.0), (-1.0, 0.0, 1.0), (0.0, 0.5, 1.0)],
)
def test_rotate_is_sd_mechas(shape, alignment, alpha, centralization):
    """
    With more rows than columns, rows are turned as sd-mecha turns them.
    """
    a, b = models(shape)
    expected = rotated_as_sd_mecha(a.double().numpy(), b.double().numpy(), alignment, alpha, centralization)

    assert close(apply("rotate", [a, b], alignment=alignment, alpha=alpha, centralization=centralization), expected, 1e-10)


@pytest.mark.parametrize("shape", [(3, 9), (4, 5), (6, 40), (9, 9), (2, 30)])
def test_few_rows_are_turned_as_far_as_can_be(shape):
    """
    With fewer rows than columns, the result is as near to the other model as any rotation brings it, and a rotation at every alignment.
    """
    a, b = models(shape)
    turned = apply("rotate", [a, b], centralization=0.0)
    a, b = a.double(), b.double()
    best = a.norm() ** 2 + b.norm() ** 2 - 2 * torch.linalg.svdvals(a.T @ b).sum()

    assert math.isclose((turned - b).norm() ** 2, best, rel_tol=1e-6)
    for alignment in (1.0, 0.25, 0.5, -0.7):
        part = apply("rotate", [a, b], alignment=alignment, centralization=0.0)
        assert torch.allclose(part @ part.T, a @ a.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 9), (6, 40), (12, 9)])
def test_fractions_of_a_turn_add_up(shape):
    """
    Turned by a third and two thirds, rows are turned once; by a millionth, hardly.
    """
    a, b = (model.double() for model in models(shape, spread=0.3))
    q = procrustes._best_rotation(a, b, is_proper=True)
    third = procrustes._turned(torch.eye(len(q), dtype=q.dtype), q, 1 / 3)

    assert torch.allclose(q @ q.T, torch.eye(len(q), dtype=q.dtype), rtol=0, atol=1e-12)
    assert torch.linalg.det(q) > 0
    assert torch.allclose(procrustes._turned(third, q, 2 / 3), q, rtol=0, atol=1e-12)
    assert torch.allclose(apply("rotate", [a, b], alignment=1e-6), a, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotate_has_its_ends(shape):
    """
    Not turned it is the model, turned and mixed wholly it is the other, equal ones stay, vectors are mixed.
    """
    a, b = models(shape)

    assert same(apply("rotate", [a, b], alignment=0), a)
    assert same(apply("rotate", [a, b], alignment=1, alpha=1), b)
    assert same(apply("rotate", [a, a], alignment=0.4), a)
    assert len(shape) > 1 or same(apply("rotate", [a, b], alpha=0.25), a * 0.75 + b * 0.25)


@pytest.mark.parametrize("shape", [(12, 9), (3, 9), (1, 5), (8, 4, 3, 3)])
def test_rotate_goes_on_where_there_is_nothing_to_turn_to(shape):
    """
    Beside a model of zeros no turn is better than another, so there is none.
    """
    a, _ = models(shape)

    for alignment in (1.0, 0.5):
        assert close(apply("rotate", [a, a * 0], alignment=alignment, centralization=0.0), a.double().numpy(), 1e-12)
        assert close(apply("rotate", [a * 0, a], alignment=alignment, centralization=0.0), np.zeros(shape), 1e-12)


def test_rotate_finds_the_turn_that_was_made():
    """
    A model turned by a rotation is turned back onto it, whole and by halves.
    """
    a, _ = models((12, 3))
    generator = np.array([[0, 0.3, 0.1], [-0.3, 0, 0.5], [-0.1, -0.5, 0]])
    values, vectors = np.linalg.eig(generator)
    whole, half = (torch.tensor(((vectors * np.exp(values * t)) @ np.linalg.inv(vectors)).real) for t in (1, 0.5))
    b = a.double() @ whole

    assert close(apply("rotate", [a.double(), b], centralization=0.0), b.numpy())
    assert close(apply("rotate", [a.double(), b], alignment=0.5, centralization=0.0), (a.double() @ half).numpy())
