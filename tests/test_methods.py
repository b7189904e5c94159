"""Methods: their schema is their signature, and their arithmetic does not change without their version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import applied
import checkpoints
import pytest
import torch
from blake3 import blake3

from sdmerge_build.blend import blend_of
from sdmerge_build.methods import REQUIRED, Parameter, methods

GOLDEN = Path(__file__).parent / "golden" / "methods.toml"
PARAMS = {
    "weighted_sum": {"alpha": 0.35},
    "add_difference": {"alpha": 0.8},
    "linear": {"weights": (0.5, 0.3, 0.2)},
    "copy": {"pick": ("*",), "drop": ()},
    "add_cosine_a": {"alpha": -0.2},
    "add_cosine_b": {"alpha": -0.2},
    "cosine_a": {"alpha": 0.05},
    "cosine_b": {"alpha": 0.05},
    "smoothstep_sum": {"alpha": 0.3},
    "inverse_smoothstep_sum": {"alpha": 0.3},
    "nearswap": {"t": 0.05},
}
"""Parameters other than what `usual` says."""

FINDINGS = {
    "cosine_a": {"low": -0.3, "high": 0.3},
    "cosine_b": {"low": -0.3, "high": 0.3},
    "rebasin": {},
}


def usual(parameter: Parameter) -> Any:
    """Give a parameter a value that does something: numbers of no special meaning, and defaults for the rest."""
    if parameter.ratio:
        return 0.35 if parameter.default is REQUIRED or parameter.default in {0, 1} else parameter.default
    return parameter.words[0] if parameter.words and parameter.default is REQUIRED else parameter.default


def golden_digest(name: str) -> str:
    """Digest what a method makes of three fixed models, in float32; of pinned methods, what is left in float64 of six decimals."""
    method = methods()[name]
    seeds = [int.from_bytes(f"{letter}/golden".encode(), "little") for letter in "ABC"[: 3 if method.is_open else len(method.models)]]
    dtype = torch.float64 if method.pinned else torch.float32
    models = [checkpoints.seeded(seed, (64, 33), torch.float16).to(dtype) for seed in seeds]
    params = {p.name: usual(p) for p in method.parameters.values()} | PARAMS.get(name, {})
    made = applied.evaluate(method, models, params, name="model.diffusion_model.out.0.weight", findings=FINDINGS.get(name))
    return blake3((made * 1e6).round().numpy().tobytes() if method.pinned else made.numpy().tobytes()).hexdigest()


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
    lerp, addcmul, addcdiv and add with alpha are fused on some CPUs and not on others; which does not matter where products are exact.
    """
    import sdmerge_build

    package = Path(sdmerge_build.__file__).parent
    sources = [*package.glob("methods/*.py"), package / "merge.py", package / "evaluate.py"]
    fused = re.compile(r"(torch|\))?\.(lerp|addcmul|addcdiv|baddbmm|addmm)_?\(|\.(add|sub)_?\([^()]*alpha=")
    calls = [(path.name, found[0]) for path in sources for found in fused.finditer(path.read_text())]

    assert calls == [("lanes.py", ".addcmul_(")]  # of float32 in float64, see test_measures.py


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_exact_methods_have_the_same_bytes_on_every_cpu(capability):
    """
    Where torch uses none of a CPU's vectors, or fewer, methods that are called exact make what is pinned for them.
    """
    code = "import sys, test_methods as t; print(*(f'{n} {t.golden_digest(n)}' for n, m in t.methods().items() if not m.pinned), sep='\\n')"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    pinned = {name: next(reversed(digests.values())) for name, digests in tomllib.loads(GOLDEN.read_text()).items()}
    made = dict(line.split() for line in run.stdout.splitlines())

    assert len(made) > 50
    assert {name: digest for name, digest in made.items() if pinned[name] != digest} == {}


def test_every_method_does_something_of_its_own():
    """
    No two methods make the same of the pinned models, but those that differ elsewhere only: by shape, or for models that are nearly parallel.

    Those that move tensors decide by name, and are not asked.
    """
    seen: dict[str, list[str]] = {}
    for name, digests in tomllib.loads(GOLDEN.read_text()).items():
        if not methods()[name].moves:
            seen.setdefault(next(reversed(digests.values())), []).append(name)

    assert [names for names in seen.values() if len(names) > 1] == [["model_stock_filters", "model_stock_rows"], ["slerp_vectors", "nuslerp"]]
