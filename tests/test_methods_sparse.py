"""SCE, RAM, nearswap and Arcee fusion, against the formulas written a second time for whole NumPy arrays."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch
from applied import evaluate
from hypothesis import example, given
from hypothesis import strategies as st

from sdmerge_build.methods import methods

SHAPES = [(), (1,), (7,), (5, 1), (1, 5), (12, 9), (8, 4, 3, 3), (3, 2, 1, 1)]
LARGE = (3, 50000)  # more than one chunk, and the last one is short
METHODS = {"sce": {"density": 0.3}, "ram": {"r": 0.1}, "arcee_fusion": {}}


def checkpoint(count: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors of a base and its descendants as float16 files hold them; the elements that a descendant left alone are its own."""
    base = checkpoints.seeded(1, shape, torch.float16)
    models = [base.float()]
    for n in range(2, count + 1):
        change = checkpoints.seeded(n, shape, torch.float16).mul(64).round().div(256)
        models.append((base + change.masked_fill(torch.arange(base.numel()).view(shape) % n == 1, 0)).float())
    return models


def merged(name: str, models: list[torch.Tensor], **params) -> torch.Tensor:
    return evaluate(methods()[name], models, params)


def numbers(models: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The base and the stacked differences from it, in float64."""
    base, *others = (model.double().numpy() for model in models)
    return base, np.stack([other - base for other in others])


def matches(result: torch.Tensor, oracle: np.ndarray) -> None:
    np.testing.assert_allclose(result.numpy(), oracle, rtol=2e-6, atol=1e-7)


def sce_of(base: np.ndarray, deltas: np.ndarray, density: float) -> np.ndarray:
    """SCE: select, calculate, erase."""
    if density < 1:
        variance = np.round(deltas.var(axis=0) * 2**40)  # differences are multiples of 2^-17: what is equal is equal
        varied = np.sort(variance[variance > 0])[::-1]
        least = varied[max(1, int(density * varied.size)) - 1] if varied.size else np.inf
        deltas = np.where(variance >= least, deltas, 0)
    energies = np.array([np.mean(delta**2) for delta in deltas])
    if not energies.any():
        return base
    shares = (energies / energies.sum()).reshape(-1, *[1] * base.ndim)
    same = (np.sign(deltas) == np.sign(deltas.sum(axis=0))) & (deltas != 0)
    divisor = (shares * same).sum(axis=0)
    return base + (shares * deltas * same).sum(axis=0) / np.where(divisor, divisor, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("count", [2, 4])
def test_sce_selects_by_variance_and_weighs_by_energy(shape, density, count):
    """SCE takes the elements on which models differ most, weighs models by the squares of what is taken, and drops the minority's sign."""
    models = checkpoint(count + 1, shape)

    matches(merged("sce", models, density=density), sce_of(*numbers(models), density))


def test_sce_takes_nothing_where_models_agree():
    """Models that are equal have no variance to select by; with all elements taken, they are the result."""
    base, model = checkpoint(2, (12, 9))

    assert torch.equal(merged("sce", [base, model, model, model], density=0.99), base)
    assert torch.equal(merged("sce", [base, base, base]), base)
    matches(merged("sce", [base, model, model, model]), model.double().numpy())


def ram_of(base: np.ndarray, deltas: np.ndarray, epsilon: float, r: float, alpha: float) -> np.ndarray:
    """RAM: unique changes in full, shared ones averaged; RAM+ strengthens the unique ones."""
    changed = np.abs(deltas) > epsilon
    counts = changed.sum(axis=0)
    result = base.copy()
    for delta, mask in zip(deltas, changed, strict=True):
        unique, shared = mask & (counts == 1), mask & (counts > 1)
        strength = 1 + r * min(shared.sum() / max(unique.sum(), 1e-5), alpha)
        result += np.where(unique, delta * strength, 0) + np.where(shared, delta / np.maximum(counts, 1), 0)
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("r", "alpha"), [(0.0, 0.2), (0.1, 0.2), (0.5, 10.0)])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.005])
def test_ram_adds_unique_changes_and_averages_shared_ones(shape, r, alpha, epsilon):
    """RAM adds what one model changed, averages what several did, and strengthens the unique changes of a model by how much it shares."""
    models = checkpoint(4, shape)

    matches(merged("ram", models, epsilon=epsilon, r=r, alpha=alpha), ram_of(*numbers(models), epsilon, r, alpha))


def test_ram_ignores_what_is_no_change():
    """Differences up to epsilon count for nothing, and are not added either."""
    base, a, b = torch.zeros(4), torch.tensor([0.25, 0.25, -0.5, 1.0]), torch.tensor([0.0, 0.5, 0.25, 0.0])

    assert merged("ram", [base, a, b], epsilon=0.25).tolist() == [0.0, 0.5, -0.5, 1.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.01, 10.0])
def test_nearswap_mixes_by_distance(shape, t):
    """The nearer an element of the other model, the more of it is taken; all of it, where it is not further away than t."""
    a, b = checkpoint(2, shape)
    x, y = a.double().numpy(), b.double().numpy()

    with np.errstate(divide="ignore", invalid="ignore"):
        w = np.where(x == y, 1, np.clip(t / np.abs(x - y), 0, 1))
    matches(merged("nearswap", [a, b], t=t), w * y + (1 - w) * x)


@given(st.floats(-4, 4, width=32), st.floats(-4, 4, width=32), st.floats(0, 8, width=32))
@example(1.0, 2.0**-30, 1.0)  # the step rounds
def test_nearswap_never_moves_further_than_said(a, b, t):
    """An element moves towards the other model by at most t, and takes its very value when it gets there."""
    result = merged("nearswap", [torch.tensor([a]), torch.tensor([b])], t=t).item()

    assert min(a, b) <= result <= max(a, b)
    assert abs(result - a) <= t + 1e-6
    assert result == b or np.float32(abs(np.float32(b) - np.float32(a))) > t


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def importance_of(base: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Arcee's importance, with Kullback's and Leibler's divergence as they wrote it."""
    rows = base.reshape(-1, base.shape[-1]) if base.ndim else base.reshape(1, 1)
    p, q = softmax(model.reshape(rows.shape)), softmax(rows)
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    return (np.abs(model - base).reshape(rows.shape) * divergence).reshape(base.shape)


@pytest.mark.parametrize("shape", [(7,), (1, 5), (12, 9), (8, 4, 3, 3), (20, 30), (97,)])
@pytest.mark.parametrize("fence", [0.0, 1.5, -0.5])
def test_arcee_fusion_takes_over_outliers_of_importance(shape, fence):
    """Elements whose importance is beyond the fence are the model's, all others the base's; quartiles are NumPy's."""
    base, model = (checkpoints.seeded(n, shape, torch.float16).float() for n in (1, 2))

    result = merged("arcee_fusion", [base, model], fence=fence)

    importance = importance_of(base.double().numpy(), model.double().numpy())
    lower, median, upper = np.quantile(importance, [0.25, 0.5, 0.75])
    threshold = median + fence * (upper - lower)
    clear = np.abs(importance - threshold) > 1e-6 * importance.max()
    assert clear.mean() >= 0.8
    expected = np.where(importance >= threshold, model.numpy(), base.numpy())
    assert np.array_equal(result.numpy()[clear], expected[clear])


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (3, 2, 1, 1)])
def test_arcee_fusion_has_nothing_to_compare_in_rows_of_one(shape):
    """The softmax of one element is 1: no importance, no threshold, and the model is taken as it is."""
    base, model = checkpoint(2, shape)

    assert torch.equal(merged("arcee_fusion", [base, model]), model)


def test_arcee_fusion_bears_large_numbers():
    """Exponentials neither overflow nor become nothing, and equal models are the result."""
    base = torch.tensor([[900.0, 100.0, -900.0], [-5000.0, -5001.0, -5002.0]])

    assert torch.equal(merged("arcee_fusion", [base, base]), base)
    assert merged("arcee_fusion", [base, base + torch.tensor([8.0, 0.0, 0.0])]).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_slices_do_not_matter(name):
    """However a tensor larger than a chunk is cut, variances, counts and quartiles are those of the whole, bit for bit."""
    models = checkpoint(2 if name == "arcee_fusion" else 3, (3000, 50) if name == "arcee_fusion" else LARGE)

    whole = merged(name, models, **METHODS[name])

    assert torch.equal(whole, evaluate(methods()[name], models, METHODS[name], slice_size=40000))
    assert not torch.equal(whole, models[0])


@pytest.mark.parametrize(("name", "oracle"), [("sce", lambda *m: sce_of(*m, 0.3)), ("ram", lambda *m: ram_of(*m, 1e-5, 0.1, 0.2))])
def test_large_tensors_are_measured_whole(name, oracle):
    """What is asked of a tensor is answered by all its chunks."""
    models = checkpoint(3, LARGE)

    matches(merged(name, models, **METHODS[name]), oracle(*numbers(models)))


@pytest.mark.parametrize("name", ["sce", "ram"])
def test_the_order_of_models_does_not_matter(name):
    """Models may be listed in any order."""
    base, a, b = checkpoint(3, (12, 9))

    assert torch.equal(merged(name, [base, a, b], **METHODS[name]), merged(name, [base, b, a], **METHODS[name]))


@pytest.mark.parametrize("name", [*METHODS, "nearswap"])
def test_equal_models_change_nothing(name):
    """Where no model learned anything, everything stays, and nothing is divided by 0."""
    base = checkpoints.seeded(1, (12, 9), torch.float16).float()
    params = {"t": 0.001} if name == "nearswap" else METHODS[name]

    assert torch.equal(merged(name, [base, base], **params), base)
