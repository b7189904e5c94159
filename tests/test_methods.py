"""Methods: their schema is their signature, and their arithmetic does not change without their version."""

from __future__ import annotations

import tomllib
from pathlib import Path

import checkpoints
import pytest
import torch
from blake3 import blake3

from sdmerge_build.blend import blend_of
from sdmerge_build.methods import methods

GOLDEN = Path(__file__).parent / "golden" / "methods.toml"
PARAMS = {
    "weighted_sum": {"alpha": 0.35},
    "add_difference": {"alpha": 0.8},
    "linear": {"weights": (0.5, 0.3, 0.2)},
    "copy": {"pick": ("*",), "drop": ()},
}


def golden_digest(name: str) -> str:
    """Digest what a method makes of three fixed models, in float32."""
    method = methods()[name]
    seeds = [int.from_bytes(f"{letter}/golden".encode(), "little") for letter in "ABC"[: 3 if method.is_open else len(method.models)]]
    models = [checkpoints.seeded(seed, (64, 33), torch.float16).float() for seed in seeds]
    return blake3(method.function(*models, **PARAMS[name]).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", methods())
def test_arithmetic_changes_only_with_the_version(name):
    """
    A method's output digest is the one pinned for its version; who changes the arithmetic raises the version and pins anew.
    """
    method = methods()[name]

    assert tomllib.loads(GOLDEN.read_text())[name] == {str(method.version): golden_digest(name)}


@pytest.mark.parametrize(
    ("name", "params", "shares"),
    [
        ("weighted_sum", {"alpha": 0.25}, {0: 0.75, 1: 0.25}),
        ("add_difference", {"alpha": 0.5}, {0: 1.0, 1: 0.5, 2: -0.5}),
        ("linear", {"weights": (0.5, 0.0, 0.25)}, {0: 0.5, 2: 0.25}),
        ("copy", PARAMS["copy"], {0: 1.0}),
    ],
)
def test_shares_come_from_the_method_itself(name, params, shares):
    """
    Run on symbols, a linear method tells what it takes of each model.
    """
    method = methods()[name]
    count = 3 if method.is_open else len(method.models)

    assert blend_of(method, range(count), count, params).shares == shares


def test_a_method_that_is_not_linear_has_no_shares():
    """
    Anything but sums and scaling leaves shares unknown.
    """
    from sdmerge_build.methods import Method

    product = Method(name="product", version=1, function=lambda a, b: a * b, models=("a", "b"), parameters={}, title="")

    assert blend_of(product, range(2), 2, {}) is None


def test_no_method_uses_an_operation_that_rounds_differently_between_cpus():
    """
    lerp, addcmul, addcdiv and add with alpha are fused on some CPUs and not on others.
    """
    import sdmerge_build

    sources = [*Path(sdmerge_build.__file__).parent.glob("methods/*.py"), Path(sdmerge_build.__file__).parent / "merge.py"]
    calls = [word for path in sources for word in ("lerp(", "addcmul(", "addcdiv(", "alpha=alpha", ".baddbmm(") if word in path.read_text()]

    assert calls == []
