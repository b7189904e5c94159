"""Products of matrices: as precise as a processor's, with the same bits for every slicing, thread count and CPU."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from fractions import Fraction

import checkpoints
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.methods.products import Multiplier, product

DTYPES = [torch.float32, torch.float64]
MANTISSA = {torch.float32: 24, torch.float64: 42}
SHAPES = [(1, 1, 1), (7, 3, 5), (64, 320, 48), (3, 1025, 4), (5, 20_000, 6)]


@pytest.fixture(autouse=True)
def one_thread():
    """As in a pass, where torch's own threads are off."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices of numbers that are not alike."""
    return checkpoints.numbers("left", "w", (m, k), dtype), checkpoints.numbers("right", "w", (k, n), dtype)


def exact(left: torch.Tensor, right: torch.Tensor) -> list[list[Fraction]]:
    """The true product."""
    columns = right.t().tolist()
    return [[sum((Fraction(a) * Fraction(b) for a, b in zip(row, column, strict=True)), Fraction()) for column in columns] for row in left.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_as_precise_as_its_dtype(shape, dtype):
    """
    No element is farther from the true one than the largest elements of its row and column and the dtype allow.
    """
    left, right = pair(*shape, dtype)
    found = product(left, right)
    bound = left.abs().amax(1, keepdim=True).double() * right.abs().amax(0).double() * shape[1] * 2.0 ** -MANTISSA[dtype]
    for i, row in enumerate(exact(left[:2], right[:, :2])):
        for j, value in enumerate(row):
            assert abs(Fraction(found[i, j].item()) - value) <= Fraction(bound[i, j].item())
    assert found.dtype is dtype


@pytest.mark.parametrize("k", [16, 320, 5000])
def test_float32_loses_no_more_than_the_processors_product(k):
    """
    On numbers like those of adapters, the mean square of the error is not above that of float32 added in order.
    """
    left, right = (checkpoints.numbers(name, "w", shape, torch.float32) for name, shape in (("l", (40, k)), ("r", (k, 40))))
    true = left.double() @ right.double()
    in_order = torch.zeros(40, 40)
    for n in range(k):
        in_order += left[:, n : n + 1] * right[n]

    assert (product(left, right) - true).square().mean() <= (in_order - true).square().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 64])
def test_slices_of_rows_have_the_bits_of_the_whole(dtype, size):
    """
    However `left` is cut, each row of the product is the same.
    """
    left, right = pair(64, 1100, 33, dtype)
    left[5] = 0
    left[7] *= 1e-20
    left[9, 3] = math.nan
    whole = product(left, right)
    prepared = Multiplier(right, is_wide=dtype is torch.float64)

    bits = torch.int32 if dtype is torch.float32 else torch.int64  # a NaN has bits, and is unlike itself
    assert torch.cat([product(part, right) for part in left.split(size)]).view(bits).equal(whole.view(bits))
    assert torch.cat([prepared.of(part).to(dtype).add_(0.0) for part in left.split(size)]).view(bits).equal(whole.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_along_rows_does_not_matter(dtype):
    """
    As sums are exact, turning both matrices round along what is summed changes nothing; a processor's own product changes.
    """
    left, right = pair(30, 900, 30, dtype)

    assert product(left.flip(1), right.flip(0)).equal(product(left, right))
    assert not (left.flip(1) @ right.flip(0)).equal(left @ right)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scales_by_powers_of_two_go_through(data):
    """
    Rows and columns may be of any size: what a power of two scales, it scales exactly.
    """
    dtype, limit = data.draw(st.sampled_from([(torch.float32, 60), (torch.float64, 400)]))
    left, right = pair(6, 40, 5, dtype)
    rows = torch.tensor([2.0 ** data.draw(st.integers(-limit, limit)) for _ in range(6)], dtype=dtype).unsqueeze(1)
    columns = torch.tensor([2.0 ** data.draw(st.integers(-limit, limit)) for _ in range(5)], dtype=dtype)

    assert product(left * rows, right * columns).equal(product(left, right) * rows * columns)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.sampled_from(DTYPES))
def test_one_hot_rows_pick_elements(numbers, dtype):
    """
    A product with the identity gives every number back, up to the unit of its row, and a lone number exactly; nothing is a negative zero.
    """
    x = torch.tensor([numbers], dtype=dtype)
    found = product(x, torch.eye(len(numbers), dtype=dtype))

    assert (found - x).abs().max() <= x.abs().max() * 2.0**-20
    assert product(torch.diag(x[0]), torch.eye(len(numbers), dtype=dtype)).diagonal().equal(x[0])
    assert not (found.eq(0) & found.signbit()).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(dtype, bad):
    """
    One bad element spoils its row of the product, or its column, and nothing else.
    """
    left, right = pair(4, 6, 5, dtype)
    usual = product(left, right)
    spoilt_left, spoilt_right = left.clone(), right.clone()
    spoilt_left[2, 3] = bad
    spoilt_right[1, 4] = bad
    rows, columns = product(spoilt_left, right), product(left, spoilt_right)

    assert not rows[2].isfinite().any()
    assert not columns[:, 4].isfinite().any()
    assert rows[[0, 1, 3]].equal(usual[[0, 1, 3]])
    assert columns[:, :4].equal(usual[:, :4])


def test_the_smallest_and_the_largest_numbers():
    """
    Numbers without a leading bit, and products that leave the range, are what they should be.
    """
    tiny, huge = 2.0**-1074, 2.0**1023
    left, right = torch.tensor([[tiny], [huge], [3 * tiny]], dtype=torch.float64), torch.tensor([[1.0, huge, 2.0**-1000]], dtype=torch.float64)

    assert product(left, right).tolist() == [[tiny, 2.0**-51, 0.0], [huge, math.inf, 2.0**23], [3 * tiny, 3 * 2.0**-51, 0.0]]
    assert product(torch.tensor([[2.0**-149]]), torch.tensor([[2.0**100]])).item() == 2.0**-49
    assert product(torch.tensor([[3e38]]), torch.tensor([[3e38]])).item() == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty_sides_are_sums_of_nothing(shape, dtype):
    """
    Without rows or columns there is no element; without anything to sum, all are zero.
    """
    left, right = torch.ones(shape[:2], dtype=dtype), torch.ones(shape[1:], dtype=dtype)

    assert product(left, right).equal(torch.zeros(shape[0], shape[2], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_are_products_side_by_side(dtype):
    """
    A batch has the bits of its members.
    """
    left, right = checkpoints.numbers("l", "w", (3, 4, 20), dtype), checkpoints.numbers("r", "w", (3, 20, 5), dtype)

    assert product(left, right).equal(torch.stack([product(a, b) for a, b in zip(left, right, strict=True)]))


def test_narrow_dtypes_count_as_float32():
    """
    float16 beside bfloat16 is multiplied as float32 would be.
    """
    left, right = checkpoints.numbers("l", "w", (4, 20), torch.float16), checkpoints.numbers("r", "w", (20, 5), torch.bfloat16)

    assert product(left, right).equal(product(left.float(), right.float()))


SCRIPT = """
import hashlib, sys
import checkpoints, torch
from sdmerge_build.methods.products import product
from test_products import bits_of_many
torch.set_num_threads(int(sys.argv[1]))
print(bits_of_many())
"""


def bits_of_many() -> str:
    """A digest of products of many shapes and sizes of numbers."""
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for m, k, n in [*SHAPES, (300, 64, 300), (17, 2000, 129), (128, 320, 640)]:
            left, right = pair(m, k, n, dtype)
            left[::3] *= 1e-12
            right[:, ::2] *= 1e9
            digest.update(product(left, right).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("threads", "env"),
    [
        ("1", {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
        ("2", {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}),
        ("1", {"MKL_CBWR": "AVX2"}),
    ],
)
def test_every_cpu_and_thread_count_has_the_same_bits(threads, env):
    """
    Without vectors, with narrow ones, with MKL's oldest code and with two threads, no bit differs.
    """
    path = os.pathsep.join([str(checkpoints.__file__).rsplit("/", 1)[0], *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, threads], env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, check=False
    )

    assert run.stdout.strip() == bits_of_many(), run.stderr
