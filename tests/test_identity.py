"""The same bytes whatever the CPU, the threads, the hash seed, the order or the clock."""

from __future__ import annotations

import itertools
import random

import checkpoints
import pytest
import torch
from conftest import Space, digests

from sdmerge_build import passes, programs

RECIPE = """
recipe = 1
architecture = "sd1"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[source.C]
path = "C.safetensors"
[step.mix]
formula = "0.3 * A + 0.7 * B"
[step.native]
method = "add_difference"
a = "A"
b = "B"
c = "C"
alpha = 0.8
compute = "native"
[step.wide]
method = "linear"
models = ["A", "B", "C"]
weights = [0.2, { base = 0.3, blocks = { "OUT*" = 0.9, TIME = 0.0 } }, 0.5]
dtype = "bf16"
compute = "fp64"
[step.chain]
formula = "0.5 * wide + 0.5 * (mix - C)"
dtype = "fp32"
[step.half]
method = "copy"
a = "C"
drop = ["vae"]
"""


def lay_down(space: Space) -> None:
    """Three parents of different dtypes, one of them mixed, and every method over them."""
    for name, dtype in (("A", "F16"), ("B", "F32"), ("C", "BF16")):
        tensors = checkpoints.miniature("sd1", name, dtype, every=25)
        if name == "B":
            tensors = {t: v.half() if n % 2 and v.is_floating_point() else v for n, (t, v) in enumerate(tensors.items())}
        space.checkpoint(name, tensors)
    space.write("recipe.toml", RECIPE)


def test_every_cpu_thread_count_and_hash_seed_makes_the_same_files(space: Space):
    """Artifacts have one sha256 over CPU capabilities, numbers of threads and hash seeds."""
    lay_down(space)
    seen = set()
    for n, (capability, jobs) in enumerate(itertools.product(("default", "avx2", "avx512"), ("1", "2", "4"))):
        env = {"ATEN_CPU_CAPABILITY": capability, "PYTHONHASHSEED": str(n), "TZ": "Asia/Tokyo" if n % 2 else "UTC"}
        made = space.reports("recipe.toml", "--jobs", jobs, "--store", f"store{n}", "--out", f"out{n}", env=env)
        seen.add(tuple((artifact["name"], artifact["sha256"]) for artifact in made))

    assert len(seen) == 1


@pytest.mark.parametrize(("slice_", "batch"), [(64, 64), (8, 1024), (1000, 3000), (1 << 20, 1 << 22)])
def test_chunk_sizes_do_not_matter(space: Space, monkeypatch, slice_, batch):
    """Artifacts have one sha256 whatever is worked on at once."""
    lay_down(space)
    usual = digests(space.build())
    monkeypatch.setattr(programs, "SLICE", slice_)
    monkeypatch.setattr(passes, "BATCH", batch)

    assert digests(space.build(store=space.path / "other", out=space.path / "other-out")) == usual


def test_the_order_of_a_recipe_does_not_matter(space: Space):
    """Tables and fields may be written in any order."""
    lay_down(space)
    usual = digests(space.build())
    head, *tables = RECIPE.split("\n[")
    random.Random(3).shuffle(tables)
    space.write("recipe.toml", "\n[".join([head, *tables]))

    assert digests(space.build(store=space.path / "other", out=space.path / "other-out")) == usual


def test_the_order_of_tensors_in_a_source_does_not_matter(space: Space):
    """A source that was saved by another tool, in another order and under another header, changes no tensor."""
    lay_down(space)
    before = {wish.step.name: wish.stored.tensor_digest for wish in space.build().wishes}
    tensors = checkpoints.miniature("sd1", "A", "F16", every=25)
    from sdmerge_build.tensorfile import Spec, lay_out

    raw = {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"" for name, t in tensors.items()}
    specs = [Spec(name, "I64" if t.dtype is torch.int64 else "F16", tuple(t.shape)) for name, t in tensors.items()]
    layout = lay_out(specs, {"saved by": "another tool"})
    (space.path / "A.safetensors").write_bytes(layout.header + b"".join(raw[spec.name] for spec in layout.specs))
    report = space.build(store=space.path / "other", out=space.path / "other-out")

    assert {wish.step.name: wish.stored.tensor_digest for wish in report.wishes} == before
