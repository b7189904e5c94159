"""Changes of adapters: each kind is its formula, written down a second time in float64, for any slicing and on every CPU."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import checkpoints
import pytest
import torch
from adapted import glora, loaded, loha, loha_core, lokr, lora, lora_mid, oracle, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdmerge_build.methods.changes import Loaded, cut_of, prepare

LINEAR, POINT, CONV, BIAS = (24, 20), (24, 20, 1, 1), (24, 20, 3, 3), (24,)
MATRICES = [LINEAR, POINT, CONV]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def one_thread():
    """As in a pass, where torch's own threads are off."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return checkpoints.numbers("model", "w", shape, dtype)


def baked(w: Tensor, *changes: Loaded, filters: int = 0) -> Tensor:
    """Apply changes to a tensor, in slices of so many filters."""
    prepared = prepare(changes, tuple(w.shape), w.dtype)
    flat, size = w.reshape(-1), filters * math.prod(w.shape[1:]) or w.numel()
    return torch.cat([prepared.apply(flat[at : at + size], at) for at in range(0, w.numel(), size)]).view(w.shape)


ALPHA = torch.tensor(2.5)
ROTATION = some("blocks", 4, 6, 6)
BUTTERFLY = some("butterfly", 3, 4, 6, 6)

CASES = [
    *((shape, "lora", lora(shape)) for shape in MATRICES),
    *((shape, "lora", lora(shape, rank=40, alpha=ALPHA)) for shape in MATRICES),
    (POINT, "lora", lora(LINEAR)),
    (LINEAR, "lora", lora(POINT, alpha=ALPHA)),
    (CONV, "lora", lora_mid(CONV, alpha=ALPHA)),
    *((shape, "loha", loha(shape, alpha=ALPHA)) for shape in MATRICES),
    (CONV, "loha", loha_core(CONV, alpha=ALPHA)),
    *((shape, "lokr", lokr(shape, alpha=ALPHA, one=one, other=other)) for shape in MATRICES for one in ("full", "low") for other in ("full", "flat")),
    (CONV, "lokr", lokr(CONV, other="core", alpha=ALPHA)),
    (CONV, "lokr", lokr(CONV, one="low", other="core")),
    *((shape, "glora", glora(shape, old=old, alpha=ALPHA)) for shape in MATRICES for old in (False, True) if not old or shape != CONV),
    (LINEAR, "ia3", {"weight": some("ia3", 24)}),
    (LINEAR, "ia3", {"weight": some("ia3", 20), "on_input": torch.tensor(1)}),
    (CONV, "ia3", {"weight": some("ia3", 1, 24, 1, 1), "on_input": torch.tensor(0)}),
    (CONV, "ia3", {"weight": some("ia3", 1, 20, 1, 1), "on_input": torch.tensor(1)}),
    *((shape, "diff", {"diff": some("diff", *shape)}) for shape in (*MATRICES, BIAS)),
    *((shape, "set", {"weight": some("set", *shape)}) for shape in (*MATRICES, BIAS)),
    *((shape, "oft", {"blocks": ROTATION}) for shape in MATRICES),
    (LINEAR, "oft", {"blocks": ROTATION, "alpha": torch.tensor(0.01), "rescale": some("c", 24, 1)}),
    *((shape, "boft", {"blocks": BUTTERFLY}) for shape in MATRICES),
    (CONV, "boft", {"blocks": BUTTERFLY, "alpha": torch.tensor(0.01), "rescale": some("c", 24, 1, 1, 1)}),
    *((shape, "lora", lora(shape, alpha=ALPHA, dora_scale=some("m", 24, *[1] * (len(shape) - 1)))) for shape in MATRICES),
    *((shape, "lora", lora(shape, alpha=ALPHA, dora_scale=some("m", 1, 20, *[1] * (len(shape) - 2)))) for shape in MATRICES),
    (CONV, "loha", loha(CONV, alpha=ALPHA, dora_scale=some("m", 24, 1, 1, 1))),
    (CONV, "lokr", lokr(CONV, other="flat", dora_scale=some("m", 1, 20, 1, 1))),
]
IDS = [f"{kind}-{'x'.join(map(str, shape))}-{'-'.join(factors)}" for shape, kind, factors in CASES]


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers differ by no more than roundings to their dtype."""
    unit = 2e-6 if found.dtype is torch.float32 else 1e-11
    return bool(((found.double() - expected).abs() <= unit * expected.abs().amax()).all())


@pytest.mark.parametrize(("shape", "kind", "factors"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_is_its_formula(shape, kind, factors, dtype):
    """
    Every kind makes of a linear, a 1 × 1 or a 3 × 3 weight what its formula in float64 does.
    """
    w, change = weight(shape, dtype), loaded(kind, **factors)
    before = w.clone()

    assert agree(baked(w, change), oracle(w, change))
    assert w.equal(before)
    assert not baked(w, change).equal(w)


@pytest.mark.parametrize(("shape", "kind", "factors"), CASES, ids=IDS)
@pytest.mark.parametrize("filters", [1, 5])
def test_slices_have_the_bits_of_the_whole(shape, kind, factors, filters):
    """
    Where a change may be cut between filters, slices are what they are in the whole tensor, bit for bit.
    """
    shapes = {role: tuple(factor.shape) for role, factor in factors.items()}
    is_local = kind not in {"oft", "boft"} and shapes.get("dora_scale", (24,))[0] == 24
    w, changes = weight(shape), [loaded(kind, **factors), loaded(kind, strength=-0.4, **factors)]

    assert cut_of(kind, shapes, shape, turned=False) == ("filters" if is_local else "nowhere")
    assert cut_of(kind, shapes, shape, turned=True) == "nowhere"
    if is_local:
        assert baked(w, *changes, filters=filters).equal(baked(w, *changes))


@pytest.mark.parametrize(("shape", "kind", "factors"), CASES, ids=IDS)
def test_no_strength_is_no_change(shape, kind, factors):
    """
    At strength 0 a tensor stays as it is.
    """
    w = weight(shape)

    assert baked(w, loaded(kind, strength=0.0, **factors)).equal(w)


@pytest.mark.parametrize(("shape", "kind", "factors"), CASES, ids=IDS)
def test_a_change_of_rows_is_that_of_a_smaller_tensor(shape, kind, factors):
    """
    A q, k or v in a fused tensor gets its change, and the rows around it keep their bits; slices may cut through it.
    """
    fused = weight((60, *shape[1:]))
    change = loaded(kind, rows=(17, 24), **factors)
    found = baked(fused, change)

    assert found[17:41].equal(baked(fused[17:41].clone(), loaded(kind, **factors)))
    assert found[:17].equal(fused[:17])
    assert found[41:].equal(fused[41:])
    if kind not in {"oft", "boft"} and (factors.get("dora_scale", ROTATION[0]).shape[0] != 1):
        assert baked(fused, change, filters=7).equal(found)


@pytest.mark.parametrize(
    ("kind", "factors"),
    [(kind, factors) for shape, kind, factors in CASES if shape == LINEAR],
    ids=[i for i, c in zip(IDS, CASES, strict=True) if c[0] == LINEAR],
)
@pytest.mark.parametrize("rows", [None, (3, 20)])
def test_a_turned_change_is_that_of_the_transposed_tensor(kind, factors, rows):
    """
    What was made for the transposed tensor is applied to it, also where only some rows are meant.
    """
    w = weight((20, 24) if rows is None else (26, 24))
    first, count = rows or (0, 20)
    found = baked(w, loaded(kind, rows=rows, turned=True, **factors))

    assert found[first : first + count].equal(baked(w[first : first + count].t().contiguous(), loaded(kind, **factors)).t())
    assert found[:first].equal(w[:first])
    assert found[first + count :].equal(w[first + count :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_changes_are_made_in_their_order(shape, dtype):
    """
    LoRAs of several ranks, rows and strengths around changes of other kinds give what doing one after the other gives.
    """
    shape = (48, *shape[1:])
    changes = [
        loaded("lora", **lora((24, *shape[1:]), alpha=ALPHA), rows=(0, 24)),
        loaded("lora", **lora((24, *shape[1:]), rank=2), rows=(24, 24), strength=-1.3),
        loaded("lora", **lora(shape, rank=7), strength=0.2),
        loaded("ia3", weight=some("ia3", 48)),
        loaded("lora", **lora(shape, rank=1, alpha=ALPHA)),
        loaded("oft", blocks=some("blocks", 8, 6, 6)),
        loaded("glora", **glora(shape)),
        loaded("set", weight=some("set", *shape), strength=0.3),
        loaded("lokr", **lokr(shape)),
    ]
    expected = weight(shape, dtype)
    for change in changes:
        expected = oracle(expected, change)

    assert agree(baked(weight(shape, dtype), *changes), expected)
    assert agree(
        baked(weight(shape, dtype), *changes[:3], filters=5), oracle(oracle(oracle(weight(shape, dtype), changes[0]), changes[1]), changes[2])
    )


@settings(max_examples=40, deadline=None)
@given(st.floats(-2, 2), st.floats(-2, 2), st.sampled_from([case for case in CASES if "dora_scale" not in case[2]]))
def test_strengths_add(one, other, case):
    """
    What is linear adds as much at a + b as at a and at b together; a whole strength of `set` is the new tensor, to the bit.
    """
    shape, kind, factors = case
    w = weight(shape, torch.float64)
    both = baked(w, loaded(kind, strength=one + other, **factors)) - w
    apart = baked(w, loaded(kind, strength=one, **factors)) + baked(w, loaded(kind, strength=other, **factors)) - 2 * w

    assert (both - apart).abs().max() <= 1e-10 * (1 + both.abs().max())
    if kind == "set":
        assert baked(w.float(), loaded(kind, strength=1.0, **factors)).equal(factors["weight"].float())


@pytest.mark.parametrize("rank", [4, 24])
def test_both_generations_of_glora_are_told_apart_where_a_tensor_is_square(rank):
    """
    Four factors are read as the older LyCORIS wrote them where `a2` is as high as the tensor, else as the newer; so does ComfyUI.
    """
    w, newer = weight((24, 24)), glora((24, 24), rank)
    older = {"a1": newer["a2"], "a2": newer["a1"], "b1": newer["b2"], "b2": newer["b1"]}

    def expected(a1, a2, b1, b2):
        return w.double() + 0.7 * (w.double() @ a1.double() @ a2.double() + b1.double() @ b2.double())

    assert agree(baked(w, loaded("glora", **older)), expected(**newer))
    assert agree(baked(w, loaded("glora", **newer)), expected(**(older if rank == 24 else newer)))


def test_nothing_turns_into_a_negative_zero():
    """
    Where a change adds nothing, or next to nothing below zero, a zero is one without a sign.
    """
    tiny = loaded("lora", up=torch.full((3, 1), 1e-30), down=torch.tensor([[-1e-30, 0.0, 1e-30]]))

    assert not baked(torch.full((3, 3), -0.0), tiny).signbit().any()
    assert not baked(torch.full((3, 3), -0.0), loaded("diff", diff=torch.full((3, 3), -0.0))).signbit().any()


@pytest.mark.parametrize("size", [1.0, 1e-3, 2.0**-14])
def test_a_small_lora_beside_a_large_one_keeps_its_bits(size):
    """
    A LoRA whose trainer put its size into one factor is added as precisely beside another as alone.
    """
    up, down = some("up", 24, 4, dtype=torch.float32), some("down", 4, 20, dtype=torch.float32)
    large, small = loaded("lora", up=up, down=down * 1e-3), loaded("lora", up=down.t()[:4].t().repeat(6, 1) * 1e-6, down=up.t()[:, :20] * 1e3 * size)
    w = torch.zeros(24, 20)
    together, expected = baked(w, large, small), oracle(oracle(w, large), small)

    assert (together - expected).abs().max() <= 2.0**-22 * expected.abs().max()


@pytest.mark.parametrize(("shape", "kind", "factors"), CASES, ids=IDS)
def test_what_is_not_finite_is_seen(shape, kind, factors):
    """
    A factor with a NaN leaves a tensor that has one as well.
    """
    role = next(role for role in ("up", "w1_a", "w1", "a1", "b1", "weight", "diff", "blocks") if role in factors)
    spoilt = factors[role].clone()
    spoilt.view(-1)[1] = math.nan

    assert not baked(weight(shape), loaded(kind, **{**factors, role: spoilt})).isfinite().all()


def test_empty_tensors_and_numbers():
    """
    A tensor without elements stays as it is; a single number may have a difference.
    """
    empty = prepare([loaded("diff", diff=torch.zeros(0, 5))], (0, 5), torch.float32)

    assert empty.apply(torch.zeros(0), 0).shape == (0,)
    assert baked(torch.tensor(2.0), loaded("diff", diff=torch.tensor(4.0), strength=0.5)).item() == 4.0


def bits_of_all() -> str:
    """A digest of what all changes make of tensors."""
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for shape, kind, factors in CASES:
            digest.update(baked(weight(shape, dtype), loaded(kind, **factors)).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("threads", "env"),
    [
        ("1", {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
        ("2", {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}),
    ],
)
def test_every_cpu_and_thread_count_has_the_same_bits(threads, env):
    """
    Without vectors, with MKL's oldest code and with two threads, no bit of any kind of change differs.
    """
    script = f"import test_changes, torch; torch.set_num_threads({threads}); print(test_changes.bits_of_all())"
    path = os.pathsep.join([str(checkpoints.__file__).rsplit("/", 1)[0], *sys.path])
    run = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, check=False)

    assert run.stdout.strip() == bits_of_all(), run.stderr
