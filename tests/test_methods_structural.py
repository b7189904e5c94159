"""Methods that take regions: of rows, of sorted values, of the spectrum; each against NumPy's float64, written from the formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from applied import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.methods import Place, structural
from sdmerge_build.methods import methods as registered

METHODS = {name: method for name, method in registered().items() if name in structural.__all__}
SHAPES = [(), (1,), (2,), (7,), (5, 1), (1, 5), (12, 9), (8, 4, 3, 3), (3, 2, 1, 1), (4, 120), (3, 101, 3, 3)]
NAME = "model.diffusion_model.input_blocks.1.1.proj_in.weight"


def models(shape, count=2, seed=0):
    """Models tuned from one base: the same values but for a tenth."""
    random = np.random.default_rng([seed, *shape])
    base = random.normal(size=shape)
    return [torch.tensor(base + 0.1 * random.normal(size=shape), dtype=torch.float32) for _ in range(count)]


def same(one, other):
    """Equal to the last bit."""
    return one.shape == other.shape and torch.equal(one, other)


def apply(name, given_models, slice_size=0, **params):
    return evaluate(METHODS[name], given_models, params, name=NAME, slice_size=slice_size)


def region_of_supermerger(a, b, alpha, beta, dim):
    """Supermerger's formula, as it slices."""
    a, b = np.moveaxis(a, dim, 0), np.moveaxis(b, dim, 0)
    n = len(a)
    if alpha + beta <= 1:
        out = a.copy()
        rows = slice(int(n * beta), int(n * (alpha + beta)))
        out[rows] = b[rows]
    else:
        out = b.copy()
        rows = slice(int(n * (alpha + beta - 1)), int(n * beta))
        out[rows] = a[rows]
    return np.moveaxis(out, 0, dim)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape])
@pytest.mark.parametrize(("width", "offset"), [(0.5, 0.0), (0.5, 0.25), (0.3, 0.9), (0.7, 0.7), (0.05, 0.5), (1.0, 0.5), (0.0, 0.3)])
def test_tensor_sum_is_supermergers(shape, width, offset):
    """
    Truncated rows of the first dimension are those of supermerger's "Tensor"; of the second, where it is long, those of "Tensor2".
    """
    a, b = models(shape)
    long = len(shape) > 1 and shape[1] > 100

    for dim, word in ((0, "first"), (1 if long else 0, "auto")):
        found = apply("tensor_sum", [a, b], width=width, offset=offset, dim=word)
        assert same(found, torch.tensor(region_of_supermerger(a.numpy(), b.numpy(), width, offset, dim)))


@settings(max_examples=100, deadline=None)
@given(shape=st.sampled_from([shape for shape in SHAPES if shape]), width=st.floats(-1.5, 1.5), offset=st.floats(-3, 3))
def test_rounded_tensor_sum_is_sd_mechas(shape, width, offset):
    """
    Rounded, a row is of `b` when it lies in the rounded region, taken around where it leaves the tensor.
    """
    a, b = models(shape)
    if width < 0:
        width, offset = -width, offset + width
    width, offset, n = min(width, 1), math.fmod(offset - math.floor(offset), 1), shape[0]
    first, last = round(offset * n), round((offset + width) * n if offset + width <= 1 else (offset + width - 1) * n)
    is_b = [first <= row < last if offset + width <= 1 else not last <= row < first for row in range(n)]
    expected = torch.stack([b[row] if is_b[row] else a[row] for row in range(n)])

    assert same(apply("tensor_sum", [a, b], width=width, offset=offset, rounding="round"), a if width == 0 else b if width == 1 else expected)


@pytest.mark.parametrize(
    ("rounding", "width", "winner"), [("truncate", 0.99, 0), ("truncate", 1, 1), ("round", 0.5, 0), ("round", 0.51, 1), ("round", -0.6, 1)]
)
def test_a_tensor_without_dimensions_goes_one_way(rounding, width, winner):
    """
    Where there are no rows the whole number decides, whatever the offset.
    """
    pair = models(())

    for offset in (0.0, 0.7):
        assert same(apply("tensor_sum", pair, width=width, offset=offset, rounding=rounding), pair[winner])


@pytest.mark.parametrize("rounding", ["truncate", "round"])
def test_a_region_is_taken_around(rounding):
    """
    A negative width reaches to the left, and whole turns of the offset change nothing.
    """
    a, b = torch.zeros(8, 3), torch.ones(8, 3)

    def rows(width, offset):
        return apply("tensor_sum", [a, b], width=width, offset=offset, rounding=rounding)[:, 0].tolist()

    assert rows(0.5, 0.75) == rows(-0.5, 0.25) == rows(-0.5, 2.25) == rows(0.5, -0.25) == [1, 1, 0, 0, 0, 0, 1, 1]
    assert rows(0.25, -1e-20) == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(12, 9), (4, 120), (3, 101, 3, 3), (7,)])
@pytest.mark.parametrize("slice_size", [1, 5, 64, 1000])
@pytest.mark.parametrize("offset", [0.2, 0.8])
def test_tensor_sum_does_not_depend_on_slices(shape, slice_size, offset):
    """
    Wherever a tensor is cut, the rows are the same.
    """
    a, b = models(shape)

    for dim in ("first", "auto"):
        whole = apply("tensor_sum", [a, b], offset=offset, dim=dim)
        assert same(apply("tensor_sum", [a, b], offset=offset, dim=dim, slice_size=slice_size), whole)


def moved_by_rank(a, b, width, offset):
    """sd-mecha's top-k formula, element by element."""
    flat, n = a.reshape(-1), a.size
    rank = np.empty(n, dtype=int)
    rank[np.lexsort((np.arange(n), b.reshape(-1)))] = np.arange(n)
    ascending, magnitudes = np.sort(flat), np.sort(np.abs(flat))

    def limit(position):
        return magnitudes[position - 1] if position > 0 else -1

    wraps = width + offset > 1
    start, end = (width + offset - 1, offset) if wraps else (offset, width + offset)
    low, high = limit(round(n * start)), limit(round(n * end))
    out = [ascending[rank[i]] if (low <= abs(ascending[rank[i]]) <= high) != wraps else flat[i] for i in range(n)]
    return torch.tensor(np.array(out, dtype=a.dtype).reshape(a.shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("width", "offset"), [(1.0, 0.0), (0.5, 0.0), (0.25, 0.5), (0.5, 0.5), (0.6, 0.7), (0.9, 0.9)])
def test_top_k_moves_values_to_ranks(shape, width, offset):
    """
    Values of some magnitudes go to where the other model has its value of the same rank.
    """
    a, b = models(shape)
    b = b.mul(4).round()  # equal values, whose order is that of their positions

    assert same(apply("top_k_tensor_sum", [a, b], width=width, offset=offset), moved_by_rank(a.numpy(), b.numpy(), width, offset))


def test_top_k_sorts_like_the_other_model():
    """
    With all values moved, the result has the values of one model in the order of the other; with none it is the model.
    """
    a, b = models((12, 9))
    moved = apply("top_k_tensor_sum", [a, b])

    assert same(moved.view(-1).sort().values, a.view(-1).sort().values)
    assert same(moved.view(-1).argsort(stable=True), b.view(-1).argsort(stable=True))
    assert same(apply("top_k_tensor_sum", [a, b], width=0, offset=0.3), a)
    assert same(apply("top_k_tensor_sum", [a, a]), a)


def crossed_as_sd_meh(a, b, c, alpha, beta):
    """sd-meh's formula in float64: both models transformed."""
    if not a.shape:
        return alpha * a + (1 - alpha) * b
    order = np.argsort(c.reshape(-1), kind="stable")
    spectra = [np.fft.rfft(x.reshape(-1)[order].astype(np.float64)) for x in (a, b)]
    at = np.arange(len(spectra[0])) / len(spectra[0])
    share = np.clip((at - alpha) / beta + 0.5, 0, 1) if beta > 1e-10 else (at >= alpha).astype(float)
    out = np.empty(a.size)
    out[order] = np.fft.irfft((1 - share) * spectra[0] + share * spectra[1], a.size)
    return out.reshape(a.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.3, 0.4), (0.0, 0.5), (0.9, 2.0)])
def test_distribution_crossover_is_sd_mehs(shape, alpha, beta):
    """
    Transforming the difference gives what transforming both models gives.
    """
    a, b, c = models(shape, 3)
    found = apply("distribution_crossover", [a, b, c], alpha=alpha, beta=beta)

    assert np.allclose(found, crossed_as_sd_meh(a.numpy(), b.numpy(), c.numpy(), alpha, beta), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_distribution_crossover_has_its_ends(shape):
    """
    Beyond the spectrum the result is one of the models; equal models stay as they are.
    """
    a, b, c = models(shape, 3)

    assert same(apply("distribution_crossover", [a, b, c], alpha=0.0), b)
    assert same(apply("distribution_crossover", [a, b, c], alpha=1.0), a)
    assert same(apply("distribution_crossover", [a, a, c], alpha=0.5, beta=0.0), a)


def crossed_as_sd_mecha(a, b, alpha, tilt):
    """sd-mecha's filter, on full complex spectra in float64; at tilt 2 the limit from both sides."""
    squares = [np.square(np.abs(np.fft.fftfreq(n) * n) / max(n // 2, 1)) for n in a.shape]
    frequency = np.sqrt(sum(np.meshgrid(*squares, indexing="ij")) / a.ndim)
    tilt %= 4
    inverted, alpha = tilt > 2, 1 - alpha if tilt > 2 else alpha
    if tilt in {0, 2}:
        share = frequency > 1 - alpha if tilt == 0 else frequency < alpha
    else:
        k = 1 / math.tan(math.pi * tilt / 2)
        share = k * frequency + k * alpha + alpha - k if tilt <= 1 or 2 < tilt <= 3 else k * frequency - k * alpha + alpha
    share = np.clip(share, 0, 1)
    share = 1 - share if inverted else share
    return np.real(np.fft.ifftn((1 - share) * np.fft.fftn(a) + share * np.fft.fftn(b)))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape])
@pytest.mark.parametrize("tilt", [0.0, 0.3, 0.9, 1.0, 1.5, 2.0, 2.6, 3.0, 3.5, 4.0, -0.4])
def test_crossover_is_sd_mechas(shape, tilt):
    """
    A real spectrum of the difference gives what full spectra of both models give, for every slope of the filter.
    """
    a, b = models(shape)

    for alpha in (0.2137, 0.64):  # of no frequency, where float32 would decide
        expected = crossed_as_sd_mecha(a.double().numpy(), b.double().numpy(), alpha, tilt)
        assert np.allclose(apply("crossover", [a, b], alpha=alpha, tilt=tilt), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tilt", [1e-7, 2 - 1e-7, 2 + 1e-7, 4 - 1e-7])
def test_crossover_changes_with_the_tilt_by_little(tilt):
    """
    Just beside a filter that cuts all at once the result is nearly that of the cut.
    """
    a, b = models((12, 9))

    assert torch.allclose(
        apply("crossover", [a, b], alpha=0.3, tilt=tilt), apply("crossover", [a, b], alpha=0.3, tilt=round(tilt)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_crossover_has_its_ends(shape):
    """
    At 0 and 1 the result is one of the models, equal models stay as they are, and without dimensions `alpha` mixes.
    """
    a, b = models(shape)

    assert same(apply("crossover", [a, b], alpha=0), a)
    assert same(apply("crossover", [a, b], alpha=1), b)
    assert not shape or same(apply("crossover", [a, a], alpha=0.4, tilt=0.2), a)
    assert shape or same(apply("crossover", [a, b], alpha=0.25, tilt=0.9), a * 0.75 + b * 0.25)


@pytest.mark.parametrize("name", ["distribution_crossover", "crossover"])
def test_halves_are_computed_wider(name):
    """
    There is no spectrum of float16; tensors of it give the result of their values in float32.
    """
    given_models = [model.half() for model in models((12, 9), 3 if name == "distribution_crossover" else 2)]

    assert same(apply(name, given_models, alpha=0.3).float(), apply(name, [model.float() for model in given_models], alpha=0.3))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_tensors_stay_empty(name, shape):
    """
    A tensor without elements is merged to one.
    """
    method = METHODS[name]
    extra = {"alpha": 0.5} if "alpha" in method.parameters else {}
    if method.place:
        extra["place"] = Place(name=NAME, shape=shape, start=0, count=0, architecture="sd1")
    seen = torch.zeros(shape) if method.cut == "nowhere" else torch.zeros(0)

    assert method.function(*[seen] * len(method.models), **extra).shape == seen.shape
