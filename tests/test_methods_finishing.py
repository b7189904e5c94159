"""Finishing: noise that is a function of its seed, and the eight numbers of supermerger's adjustment."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch
from applied import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.errors import SdbuildError
from sdmerge_build.methods import Place, methods

SHAPES = [(), (1,), (7,), (5, 1), (1, 5), (12, 9), (8, 4, 3, 3), (3, 2, 1, 1)]
UNET = "model.diffusion_model."
NAMES = ("detail_in", "detail_out", "detail_last", "contrast", "brightness", "red", "green", "blue")

COLOURS = {
    "sd1": np.array([[-1, 1, 0, 1], [1 / 3, 1, -1, 0], [2 / 3, 0, -1, 1]]),
    "sdxl": np.array([[0, 1, -1, -1], [0, 0, -1, 1], [1, 0, 0, 0]]),
}
"""Rows are latent channels 1 to 3, columns f4 to f7."""


def noisy(a: torch.Tensor, **params) -> torch.Tensor:
    """Add noise to a tensor."""
    return evaluate(methods()["add_noise"], [a], params)


def adjusted(a: torch.Tensor, name: str, f, architecture: str = "sd1", start: int = 0) -> torch.Tensor:
    """Adjust a flat slice of a tensor by eight numbers."""
    place = Place(name=name, shape=(start + a.numel(),), start=start, count=a.numel(), architecture=architecture)
    return methods()["adjust"].function(a, **dict(zip(NAMES, f, strict=True)), place=place)


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_added_in_proportion(shape):
    """
    What is added is `amount` times the same numbers, whatever the tensor holds.
    """
    a = checkpoints.numbers("A", "w", shape, torch.float32)
    noise = noisy(torch.zeros(shape), amount=1.0).double().numpy()

    assert np.all(noise != 0)
    assert np.allclose(noisy(a, amount=0.03).double().numpy(), a.double().numpy() + 0.03 * noise, rtol=1e-6, atol=1e-8)


def test_noise_is_standard_normal():
    """
    A large tensor's noise has mean 0, deviation 1, and a normal's tails.
    """
    noise = noisy(torch.zeros(400, 500), amount=1.0, seed=3).double().numpy().ravel()

    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((np.abs(noise) > 1.959964).mean() - 0.05) < 0.003


def test_noise_depends_on_seed_and_tensor_only():
    """
    Another seed and another tensor have other noise; slices change nothing; the same seed gives the same numbers again.
    """
    a, method = torch.zeros(60, 70), methods()["add_noise"]
    noise = noisy(a, amount=1.0, seed=5)

    assert torch.equal(noise, evaluate(method, [a], {"amount": 1.0, "seed": 5}, slice_size=100))
    assert not (noise == noisy(a, amount=1.0, seed=6)).any()
    assert not (noise == evaluate(method, [a], {"amount": 1.0, "seed": 5}, name="other.weight")).any()


@given(st.integers(0, 2**63 - 1))
@settings(max_examples=20, deadline=None)
def test_no_noise_is_no_change(seed):
    """
    An amount of 0 returns the model itself, whatever the seed.
    """
    a = checkpoints.numbers("A", "w", (12, 9), torch.float32)

    assert torch.equal(noisy(a, amount=0.0, seed=seed), a)


numbers = st.tuples(*[st.floats(-10, 10, allow_nan=False)] * 8)


@given(numbers, st.sampled_from(["sd1", "sd2", "sdxl", "sdxl-refiner"]))
@settings(max_examples=60, deadline=None)
def test_six_tensors_are_adjusted_by_the_formula(f, architecture):
    """
    Five tensors are scaled and one is shifted, by f0 to f7 as supermerger reads them, with the colours of the architecture.
    """
    factors = {
        "input_blocks.0.0.weight": 1 - 0.01 * f[0],
        "input_blocks.0.0.bias": 1 + 0.02 * f[0],
        "out.0.weight": 1 - 0.01 * f[1],
        "out.0.bias": 1 + 0.02 * f[1],
        "out.2.weight": 1 - 0.01 * f[2],
    }
    for name, factor in factors.items():
        a = checkpoints.numbers("A", name, (24,), torch.float32)
        made = adjusted(a, UNET + name, f, architecture).double().numpy()
        assert np.allclose(made, a.double().numpy() * factor, rtol=1e-6, atol=0), name
    bias = checkpoints.numbers("A", "bias", (4,), torch.float32)
    colours = COLOURS["sdxl" if "xl" in architecture else "sd1"]
    expected = bias.double().numpy() + 0.02 * np.array([f[3], *(colours @ np.array(f[4:]))])

    assert np.allclose(adjusted(bias, f"{UNET}out.2.bias", f, architecture).double().numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_slices_of_the_bias_get_their_own_channels(cut):
    """
    Cut anywhere, the bias of the last layer is shifted as if it were whole.
    """
    bias, f = checkpoints.numbers("A", "bias", (4,), torch.float32), (0, 0, 0, 1.5, 2, -3, 4, -5)
    pieces = [adjusted(bias[:cut], f"{UNET}out.2.bias", f), adjusted(bias[cut:], f"{UNET}out.2.bias", f, start=cut)]

    assert torch.equal(torch.cat(pieces), adjusted(bias, f"{UNET}out.2.bias", f))


@given(numbers)
@settings(max_examples=20, deadline=None)
def test_nothing_else_is_adjusted(f):
    """
    Other tensors are returned as they are, those with similar names too; and so are all when every number is 0.
    """
    a = checkpoints.numbers("A", "w", (4,), torch.float32)
    for name in ("input_blocks.0.0.weight", f"{UNET}input_blocks.1.0.in_layers.0.bias", f"{UNET}output_blocks.0.0.in_layers.2.weight"):
        assert adjusted(a, name, f) is a
    for name in ("input_blocks.0.0.weight", "out.0.bias", "out.2.weight", "out.2.bias"):
        assert torch.equal(adjusted(a, UNET + name, (0.0,) * 8), a)


def test_an_unknown_architecture_is_refused():
    """
    Where the latent channels are not known, a sentence says which architectures are.
    """
    with pytest.raises(SdbuildError, match="latent channels of flux"):
        adjusted(torch.ones(4), f"{UNET}out.2.bias", (1.0,) * 8, "flux")


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_is_adjusted(shape):
    """
    A tensor is scaled whatever its shape, and one number at a time as well.
    """
    a = checkpoints.numbers("A", "w", shape, torch.float32)
    made = evaluate(methods()["adjust"], [a], {"detail_in": 4.0}, name=f"{UNET}input_blocks.0.0.bias", slice_size=1)

    assert torch.equal(made, a * 1.08)
