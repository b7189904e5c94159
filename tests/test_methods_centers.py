"""Model stock, the geometric median and lower rank, against NumPy: angles, distances and singular values of whole tensors."""

from __future__ import annotations

import itertools

import checkpoints
import numpy as np
import pytest
import torch
from applied import evaluate

from sdmerge_build.methods import methods

SHAPES = [(), (1,), (7,), (5, 1), (1, 5), (12, 9), (8, 4, 3, 3), (3, 2, 1, 1)]
LARGE = (3, 50000)  # more than one chunk, and the last one is short
STOCKS = ["model_stock", "model_stock_filters", "model_stock_rows"]


def checkpoint(count: int, shape: tuple[int, ...], *, shared: float = 0.5) -> list[torch.Tensor]:
    """Tensors of a base and of its descendants, who learned something together and something apart."""
    base, common, *own = (checkpoints.seeded(n, shape, torch.float16).float() for n in range(1, count + 2))
    return [base, *(base + shared * common + 0.25 * change for change in own)]


def merged(name: str, models: list[torch.Tensor], **params) -> torch.Tensor:
    return evaluate(methods()[name], models, params)


def matches(result: torch.Tensor, oracle: np.ndarray) -> None:
    np.testing.assert_allclose(result.numpy(), oracle, rtol=2e-6, atol=1e-7)


def stock(deltas: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """What model stock adds, for one set of angles."""
    cosines = []
    for i, j in pairs:
        norms = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
        cosines.append(np.vdot(deltas[i], deltas[j]) / norms if norms else 0)
    count, c = len(deltas), max(0, np.mean(cosines))
    return count * c / (1 + (count - 1) * c) * deltas.mean(axis=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("name", "params"), [*((name, {}) for name in STOCKS), ("model_stock_rows", {"pairs": "consecutive"})])
def test_model_stock_goes_as_far_as_models_agree(shape, count, name, params):
    """Model stock goes towards the average by the angles between the differences: in the tensor, in each filter, or in each row."""
    models = checkpoint(count + 1, shape)
    base, *others = (model.double().numpy() for model in models)
    lines = {
        "model_stock": (1, base.size),
        "model_stock_filters": (shape[0] if shape else 1, -1),
        "model_stock_rows": (-1, shape[-1] if shape else 1),
    }
    deltas = np.stack([(other - base).reshape(lines[name]) for other in others])
    pairs = list(itertools.pairwise(range(count))) if params else list(itertools.combinations(range(count), 2))

    oracle = np.stack([stock(deltas[:, row], pairs) for row in range(deltas.shape[1])])

    matches(merged(name, models, **params), base + oracle.reshape(shape))


@pytest.mark.parametrize("name", STOCKS)
def test_model_stock_between_agreement_and_contradiction(name):
    """Models that agree are the result; of models that contradict each other, or of which one learned nothing, the base is."""
    base, model = checkpoint(2, (4, 16))

    matches(merged(name, [base, model, model]), model.double().numpy())
    assert torch.equal(merged(name, [base, model]), model)
    assert torch.equal(merged(name, [torch.zeros(4, 16), model, -model]), torch.zeros(4, 16))
    assert torch.equal(merged(name, [base, model, base]), base)
    assert torch.equal(merged(name, [base, base, base]), base)


@pytest.mark.parametrize("name", STOCKS)
def test_model_stock_does_not_depend_on_size(name):
    """Differences a millionth as large have the same angles, and go as far."""
    _, *deltas = checkpoint(3, (6, 10))
    base = torch.zeros(6, 10)

    small = merged(name, [base, *(2**-30 * delta for delta in deltas)])

    assert torch.equal(small * 2**30, merged(name, [base, *deltas]))


def distances(point: np.ndarray, models: list[torch.Tensor]) -> list[float]:
    return [float(np.linalg.norm(point - model.double().numpy())) for model in models]


@pytest.mark.parametrize("shape", [s for s in SHAPES if np.prod(s) > 1])
@pytest.mark.parametrize("count", [3, 5])
def test_the_geometric_median_has_the_smallest_sum_of_distances(shape, count):
    """No step from the geometric median to any side comes closer to all models together."""
    models = checkpoint(count, shape)
    median = merged("geometric_median", models, iterations=2000).double().numpy()
    sum_there = sum(distances(median, models))
    steps = np.random.default_rng(1).normal(size=(50, *shape))

    assert all(sum(distances(median + 1e-3 * step, models)) >= sum_there * (1 - 1e-7) for step in [*steps, *(m.numpy() - median for m in models)])
    assert sum_there <= sum(distances(np.mean([model.double().numpy() for model in models], axis=0), models))


def test_the_geometric_median_of_a_triangle_sees_its_sides_at_equal_angles():
    """Fermat's point of an equilateral triangle is its center; of one with an angle above 120°, that corner."""
    even = [torch.tensor(corner) for corner in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])]
    flat = [torch.tensor(corner) for corner in ([0.0, 0.125], [-4.0, 0.0], [4.0, 0.0])]

    matches(merged("geometric_median", even), np.full(3, 1 / 3))
    np.testing.assert_allclose(merged("geometric_median", flat, iterations=5000), [0.0, 0.125], atol=1e-3)


def test_a_stray_model_hardly_moves_the_geometric_median():
    """Where most models are one, the median is that one, however far away the others are; the average is not."""
    model, stray = checkpoint(2, (12, 9))

    np.testing.assert_allclose(merged("geometric_median", [model, stray * 100, model, model]), model, atol=1e-4)
    assert torch.equal(merged("geometric_median", [model, model]), model)
    assert torch.equal(merged("geometric_median", [model]), model)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_the_geometric_median_is_weiszfelds(iterations):
    """It starts from the average, and each step weighs models by the inverse of their distance."""
    models = checkpoint(4, (12, 9))
    point = np.mean([model.double().numpy() for model in models], axis=0)
    for _ in range(iterations):
        weights = 1 / np.array(distances(point, models))
        point = sum(w * model.double().numpy() for w, model in zip(weights, models, strict=True)) / weights.sum()

    matches(merged("geometric_median", models, iterations=iterations), point)


@pytest.mark.parametrize("name", [*STOCKS, "geometric_median"])
def test_the_order_of_models_does_not_matter(name):
    """Models may be listed in any order, up to the last bits."""
    base, *models = checkpoint(4, (12, 9))

    matches(merged(name, [base, *models]), merged(name, [base, *reversed(models)]).double().numpy())
    matches(merged("geometric_median", models), merged("geometric_median", models[::-1]).double().numpy())


@pytest.mark.parametrize("name", [*STOCKS, "geometric_median"])
@pytest.mark.parametrize("shape", [LARGE, (3000, 50)])
def test_slices_do_not_matter(name, shape):
    """However a tensor larger than a chunk is cut, angles and distances are those of the whole, bit for bit."""
    models = checkpoint(3, shape)

    whole = merged(name, models)

    assert torch.equal(whole, evaluate(methods()[name], models, {}, slice_size=40000))
    if name == "model_stock":
        base, *others = (model.double().numpy() for model in models)
        matches(whole, base + stock(np.stack([other - base for other in others]), [(0, 1)]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0.4, 2, 0.999])
def test_a_truncated_difference_keeps_its_largest_singular_values(shape, rank):
    """What is left of a difference is what its largest singular values make, at least one of them."""
    base, model = checkpoint(2, shape)
    matrix = (model - base).double().numpy().reshape(shape[0] if shape else 1, -1)
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    count = max(1, int(rank * len(values))) if rank < 1 else rank

    oracle = base.double().numpy() + 0.8 * ((u[:, :count] * values[:count]) @ v[:count]).reshape(shape)

    matches(merged("truncate_rank", [base, model], rank=rank, scale=0.8), oracle)


def test_at_full_rank_the_model_is_the_result():
    """As many singular values as there are, or more, leave the model itself; none leave the base; one leaves a difference of that rank."""
    base, model = checkpoint(2, (8, 4, 3, 3))

    assert torch.equal(merged("truncate_rank", [base, model], rank=8), model)
    assert torch.equal(merged("truncate_rank", [base, model], rank=1000), model)
    assert torch.equal(merged("truncate_rank", [base, model], rank=0), base)
    assert torch.equal(merged("truncate_rank", [base, base], rank=3), base)
    assert np.linalg.matrix_rank((merged("truncate_rank", [base, model], rank=1) - base).reshape(8, -1), tol=1e-4) == 1


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_stray_model_costs_the_others_no_digits(place):
    """Wherever a model that is far away stands in the list, the median of the others keeps float32's precision."""
    good = [torch.full((6, 5), 0.02) + 0.001 * checkpoints.numbers(letter, "w", (6, 5), torch.float32) for letter in "ABCD"]
    models = [*good[:place], torch.full((6, 5), 1e4), *good[place:]]
    found = evaluate(methods()["geometric_median"], models, {}).double()
    exact = evaluate(methods()["geometric_median"], [model.double() for model in models], {})

    assert (found - exact).abs().max() < 1e-7
