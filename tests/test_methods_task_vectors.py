"""Task arithmetic, TIES, breadcrumbs, DARE and DELLA, against the formulas written a second time for whole NumPy arrays."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch
from applied import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.blend import blend_of
from sdmerge_build.methods import Place, methods
from sdmerge_build.methods.chance import bernoulli

SHAPES = [(), (1,), (7,), (5, 1), (1, 5), (12, 9), (8, 4, 3, 3), (3, 2, 1, 1)]
LARGE = (3, 50000)  # more than one chunk, and the last one is short
NAME = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
RANDOM = {"dare": {"density": 0.5}, "della": {"density": 0.5}}
THINNED = {"ties": {"density": 0.3}, "breadcrumbs": {"density": 0.5, "gamma": 0.1}, **RANDOM}


def checkpoint(count: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors of a base and its descendants as float16 files hold them; every third element nobody has touched, and many changed alike."""
    base = checkpoints.seeded(1, shape, torch.float16)
    coarse = [checkpoints.seeded(n, shape, torch.float16).mul(64).round().div(256) for n in range(2, count + 1)]
    untouched = torch.arange(base.numel()).view(shape) % 3 == 2
    return [base.float(), *((base + change.masked_fill(untouched, 0)).float() for change in coarse)]


def merged(name: str, models: list[torch.Tensor], **params) -> torch.Tensor:
    return evaluate(methods()[name], models, params, name=NAME)


def numbers(models: list[torch.Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The base and the differences from it, in float64."""
    base, *others = (model.double().numpy() for model in models)
    return base, [other - base for other in others]


def matches(result: torch.Tensor, oracle: np.ndarray) -> None:
    np.testing.assert_allclose(result.numpy(), oracle, rtol=2e-6, atol=1e-7)


def kept(delta: np.ndarray, density: float) -> np.ndarray:
    """The largest magnitudes of a difference, and all that tie with the last of them."""
    ordered = np.sort(np.abs(delta), axis=None)[::-1]
    return np.where(np.abs(delta) >= ordered[max(1, int(density * delta.size)) - 1], delta, 0)


def agreeing(deltas: list[np.ndarray], weights: list[float], *, vote: str = "magnitude", normalize: bool = True) -> np.ndarray:
    """TIES, element by element."""
    merged = np.zeros(deltas[0].shape)
    for at in np.ndindex(merged.shape):
        found = [(w * d[at], abs(w)) for w, d in zip(weights, deltas, strict=True)]
        ballot = sum(np.sign(x) if vote == "count" else x for x, _ in found)
        same = [(x, w) for x, w in found if x * ballot > 0]
        if same:
            merged[at] = sum(x for x, _ in same) / (sum(w for _, w in same) if normalize else 1)
    return merged


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic_adds_weighted_differences(shape):
    """Each model adds what it learned since the base, times its weight; nothing is left of a weight of 0."""
    models = checkpoint(4, shape)
    base, deltas = numbers(models)

    matches(merged("task_arithmetic", models, weights=(0.7, 0.0, -0.25)), base + 0.7 * deltas[0] - 0.25 * deltas[2])
    assert torch.equal(merged("task_arithmetic", models, weights=(0.0, 0.0, 0.0)), models[0])


def test_task_arithmetic_tells_its_shares():
    """What task arithmetic takes of each model is known without a tensor: the base has what is left."""
    shares = blend_of(methods()["task_arithmetic"], range(3), 3, {"weights": (0.75, -0.5)}).shares

    assert shares == {0: 0.75, 1: 0.75, 2: -0.5}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vote", ["magnitude", "count"])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_trims_elects_and_merges(shape, vote, normalize):
    """TIES keeps the largest differences, lets them elect a sign, and merges those that have it."""
    models = checkpoint(4, shape)
    base, deltas = numbers(models)
    density, weights = (0.2, 0.6, 1.0), (1.0, 0.5, 0.75)

    result = merged("ties", models, density=density, weights=weights, vote=vote, normalize=normalize, scale=0.8)

    trimmed = [kept(delta, k) for delta, k in zip(deltas, density, strict=True)]
    matches(result, base + 0.8 * agreeing(trimmed, weights, vote=vote, normalize=normalize))


def test_ties_counts_negative_weights_as_votes_for_the_other_sign():
    """A negative weight takes away what a model learned: the mean is of what was voted for, not turned around."""
    base = torch.zeros(4)
    a, b = torch.tensor([0.5, 0.5, -0.5, 0.0]), torch.tensor([0.25, -0.25, 1.0, 1.0])

    result = merged("ties", [base, a, b], density=1.0, weights=(1.0, -1.0))

    assert result.tolist() == [0.5, 0.375, -0.75, -1.0]


def test_ties_adds_nothing_where_the_votes_cancel():
    """Where one model went up as far as another went down, the base stays; a count cancels out for unlike distances too."""
    models = [torch.tensor([0.125, 0.125]), torch.tensor([0.375, 0.5]), torch.tensor([-0.125, 0.0])]

    assert merged("ties", models, density=1.0).tolist() == [0.125, 0.5]
    assert merged("ties", models, density=1.0, vote="count").tolist() == [0.125, 0.125]


def test_ties_keeps_something_of_every_tensor():
    """However low the density, the largest difference of a tensor stays, even of a scalar such as a logit scale."""
    assert merged("ties", [torch.tensor(4.0), torch.tensor(4.5)], density=1e-9) == 4.5
    assert merged("ties", [torch.zeros(3), torch.tensor([0.25, -0.5, 0.5])], density=1e-9).tolist() == [0.0, -0.5, 0.5]


@pytest.mark.parametrize("vote", ["magnitude", "count"])
def test_ties_does_not_depend_on_the_order_of_models(vote):
    """Models may be listed in any order, with their parameters."""
    base, a, b = checkpoint(3, (12, 9))

    one = merged("ties", [base, a, b], density=(0.3, 0.6), weights=(0.5, 1.0), vote=vote)

    assert torch.equal(one, merged("ties", [base, b, a], density=(0.6, 0.3), weights=(1.0, 0.5), vote=vote))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_breadcrumbs_keep_the_middle(numel, density, gamma):
    """Of distinct magnitudes exactly the density is left, without the largest as far as there is room."""
    changes = np.random.default_rng(numel).permutation(np.arange(1, numel + 1)) / 512
    result = merged("breadcrumbs", [torch.zeros(numel), torch.from_numpy(changes).float()], density=density, gamma=gamma)

    count = max(1, int(density * numel)) if density else 0
    top = min(int(gamma * numel), numel - count)
    middle = sorted(changes)[numel - top - count : numel - top]
    assert sorted(result[result != 0].tolist()) == middle


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("consensus", ["sum", "ties"])
@pytest.mark.parametrize("normalize", [True, False])
def test_breadcrumbs_add_or_elect_what_is_left(shape, consensus, normalize):
    """What breadcrumbs leave of each model is summed, or merged as in TIES."""
    models = checkpoint(3, shape)
    base, deltas = numbers(models)
    weights = (0.75, 0.5)

    result = merged("breadcrumbs", models, density=0.5, gamma=0.2, weights=weights, consensus=consensus, normalize=normalize)

    middle = []
    for delta in deltas:
        ordered = np.sort(np.abs(delta), axis=None)
        count = max(1, int(0.5 * delta.size))
        top = min(int(0.2 * delta.size), delta.size - count)
        low, high = ordered[delta.size - top - count], ordered[delta.size - top - 1]
        middle.append(np.where((np.abs(delta) >= low) & (np.abs(delta) <= high), delta, 0))
    summed = (weights[0] * middle[0] + weights[1] * middle[1]) / (1.25 if normalize else 1)
    matches(result, base + (summed if consensus == "sum" else agreeing(middle, weights, normalize=normalize)))


def test_small_tensors_survive_breadcrumbs():
    """A tensor with fewer elements than 1 / gamma keeps its difference; elsewhere that of every bias is lost."""
    bias = torch.arange(1.0, 51) / 64

    assert torch.equal(merged("breadcrumbs", [torch.zeros(50), bias], density=0.9, gamma=0.01), bias.where(bias > 5 / 64, 0))


def chances(shape: tuple[int, ...], density: float | torch.Tensor, seed: int, stream: int) -> np.ndarray:
    numel = int(np.prod(shape))
    place = Place(name=NAME, shape=shape, start=0, count=numel, architecture="sd1")
    return bernoulli(density, seed, place, stream).numpy().reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("consensus", ["sum", "ties"])
def test_dare_drops_by_each_models_own_chance(shape, rescale, consensus):
    """DARE keeps of each difference what the model's own chance keeps, and makes up for the rest."""
    models = checkpoint(3, shape)
    base, deltas = numbers(models)
    density, weights = (0.5, 0.8), (0.75, 0.5)

    result = merged("dare", models, density=density, weights=weights, rescale=rescale, consensus=consensus, seed=7)

    left = [delta * chances(shape, p, 7, n) for n, (delta, p) in enumerate(zip(deltas, density, strict=True))]
    for n, p in enumerate(density):
        whole = np.abs(left[n]).sum()
        left[n] = left[n] * {"density": 1 / p, "none": 1, "l1": np.abs(deltas[n]).sum() / whole if whole else 1}[rescale]
    summed = weights[0] * left[0] + weights[1] * left[1]
    matches(result, base + (summed if consensus == "sum" else agreeing(left, weights, normalize=False)))


def by_rank(row: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """The probabilities of a row, written with pairs: the rank of an element is how many are smaller, or equal and before it."""
    ranks = np.array([sum((abs(x), i) < (abs(y), j) for i, x in enumerate(row)) for j, y in enumerate(row)])
    return np.clip(density - epsilon + 2 * epsilon * ranks / (len(row) - 1), 0, 1) if len(row) > 1 else np.array([density])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.1, 0.4), (0.9, 0.3), (0.5, 0.0)])
@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
def test_della_keeps_large_differences_more_often(shape, density, epsilon, rescale):
    """In DELLA, the probability to be kept grows with the rank in the filter, and stays within 0 and 1; nothing is divided by 0."""
    models = checkpoint(2, shape)
    base, [delta] = numbers(models)

    result = merged("della", models, density=density, epsilon=epsilon, rescale=rescale, consensus="sum", normalize=False, seed=3)

    rows = delta.reshape(shape[0] if shape else 1, -1)
    probabilities = np.stack([by_rank(row, density, epsilon) for row in rows]).reshape(shape)
    mask = chances(shape, torch.from_numpy(probabilities.reshape(-1)), 3, 0)
    left = np.where(mask, delta, 0)
    if rescale == "density":
        left = np.where(mask, delta / np.where(mask, probabilities, 1), 0)
    if rescale == "l1" and left.any():
        left = left * (np.abs(delta).sum() / np.abs(left).sum())
    matches(result, base + left)


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_dropped_is_a_matter_of_seed_model_and_tensor(name):
    """The same seed gives the same bytes; another seed, tensor, or place among the models drops other elements, and the mean stays."""
    base, change = torch.zeros(40, 1000), torch.full((40, 1000), 0.25)
    method, params = methods()[name], {**RANDOM[name], "consensus": "sum", "normalize": False}

    one = evaluate(method, [base, change], {**params, "seed": 5}, name="conv_in.weight")
    others = [
        evaluate(method, [base, change], {**params, "seed": 6}, name="conv_in.weight"),
        evaluate(method, [base, change], {**params, "seed": 5}, name="conv_out.weight"),
        evaluate(method, [base, base, change], {**params, "seed": 5}, name="conv_in.weight"),
    ]

    assert torch.equal(one, evaluate(method, [base, change], {**params, "seed": 5}, name="conv_in.weight"))
    for result in [one, *others]:
        assert 0.24 < result.mean() < 0.26
    for other in others:
        assert 0.45 < ((one != 0) == (other != 0)).float().mean() < 0.55


@pytest.mark.parametrize("name", THINNED)
@pytest.mark.parametrize("params", [{"weights": 0.0}, {"scale": 0.0}, {"density": 0.0}])
def test_without_weight_scale_or_density_the_base_is_the_result(name, params):
    """Where nothing is added, the result is the base itself, whatever else is said."""
    models = checkpoint(3, (12, 9))

    assert torch.equal(merged(name, models, **{**THINNED[name], **params}), models[0])


@pytest.mark.parametrize("name", THINNED)
def test_at_full_density_nothing_is_dropped(name):
    """A density of 1 keeps every element, without asking anything of the tensor or of chance."""
    models = checkpoint(2, (12, 9))
    extra = {"gamma": 0.3} if name == "breadcrumbs" else {}

    matches(merged(name, models, density=1.0, **extra), models[1].double().numpy())


@pytest.mark.parametrize("name", THINNED)
@pytest.mark.parametrize("consensus", ["sum", "ties"])
def test_models_equal_to_the_base_change_nothing(name, consensus):
    """Where no model learned anything, everything stays, and nothing is divided by 0."""
    base = checkpoints.seeded(1, (12, 9), torch.float16).float()
    extra = {} if name == "ties" else {"consensus": consensus}
    rescale = {"rescale": "l1"} if name in RANDOM else {}

    assert torch.equal(merged(name, [base, base, base], **THINNED[name], **extra, **rescale), base)


@pytest.mark.parametrize("name", THINNED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_compute_dtype_keeps_and_drops_the_same(name, dtype):
    """Differences that are exact in a dtype lead to the same decisions in it."""
    base = torch.zeros(30, 8)
    change = (torch.arange(240.0).view(30, 8) - 120) / 128
    params = {**THINNED[name], **({"rescale": "none"} if name in RANDOM else {})}

    result = merged(name, [base.to(dtype), change.to(dtype)], **params)

    assert result.dtype is dtype
    assert torch.equal(result.float(), merged(name, [base, change], **params))


@pytest.mark.parametrize("name", THINNED)
@pytest.mark.parametrize("extra", [{}, {"rescale": "l1"}])
def test_slices_do_not_matter(name, extra):
    """However a tensor larger than a chunk is cut, thresholds, sums and chances are those of the whole, bit for bit."""
    if extra and name not in RANDOM:
        extra = {"weights": (0.5, 0.25)}
    models = checkpoint(3, LARGE)
    params = {**THINNED[name], **extra}

    whole = merged(name, models, **params)

    assert torch.equal(whole, evaluate(methods()[name], models, params, name=NAME, slice_size=40000))
    assert not torch.equal(whole, models[0])


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
def test_thresholds_are_of_the_whole_tensor(name):
    """The elements that are kept are the largest of all chunks together."""
    models = checkpoint(2, LARGE)
    base, [delta] = numbers(models)
    extra = {"gamma": 0.0} if name == "breadcrumbs" else {}

    matches(merged(name, models, density=0.1, **extra), base + kept(delta, 0.1))
