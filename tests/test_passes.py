"""The pass: one walk for all artifacts, each source tensor read once, whatever dtypes and shapes they have."""

from __future__ import annotations

import checkpoints
import pytest
import torch
from conftest import Space, digests

from sdmerge_build import passes, programs

RECIPE = """
recipe = 1
architecture = "generic"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[step.half]
formula = "0.5 * A + 0.5 * B"
[step.wide]
formula = "0.25 * A + 0.75 * B"
dtype = "fp32"
[step.part]
method = "copy"
a = "A"
pick = ["m*", "odd.1"]
dtype = "bf16"
"""


@pytest.fixture
def ragged(space: Space) -> Space:
    """Two models with many tensors whose sizes are no multiple of eight, of several dtypes."""
    for name in "AB":
        tensors = {f"m.{n}": checkpoints.numbers(name, f"m.{n}", (n + 1, 8)) for n in range(6)}
        tensors |= {f"odd.{n}": checkpoints.numbers(name, f"odd.{n}", (2 * n + 1, 3), torch.float32 if n % 3 else torch.float16) for n in range(7)}
        tensors |= {"ids": torch.arange(5), "mask": torch.ones(3, dtype=torch.bool), "empty": torch.zeros(0, 3)}
        space.checkpoint(name, tensors)
    space.write("recipe.toml", RECIPE)
    return space


def built_with(space: Space, monkeypatch: pytest.MonkeyPatch, slice_: int, batch: int) -> tuple[dict[str, str], list]:
    """Build afresh with other sizes of slices and batches; return the digests and the passes it took."""
    taken = []
    honest = passes.plan_passes

    def spy(*args):
        for walk in honest(*args):
            taken.append(walk)
            yield walk

    monkeypatch.setattr(programs, "SLICE", slice_)
    monkeypatch.setattr(passes, "BATCH", batch)
    monkeypatch.setattr("sdmerge_build.build.plan_passes", spy)
    made = digests(space.build(store=space.path / f"store{batch}", out=space.path / "out"))
    return made, taken


def test_artifacts_of_different_dtypes_share_one_pass(ragged: Space, monkeypatch):
    """
    Sixteen-bit, thirty-two-bit and partial artifacts are made in one walk that reads each source tensor once.
    """
    _, taken = built_with(ragged, monkeypatch, 1 << 10, 1 << 12)
    total = sum(t.nbytes for t in ragged_tensors().values())

    assert [[output.name for output in walk.outputs] for walk in taken] == [["half", "wide", "part"]]
    assert taken[0].bytes_read <= 2 * total


def ragged_tensors() -> dict[str, torch.Tensor]:
    """The sizes of one of the models above."""
    tensors = {f"m.{n}": torch.zeros(n + 1, 8, dtype=torch.float16) for n in range(6)}
    tensors |= {f"odd.{n}": torch.zeros(2 * n + 1, 3, dtype=torch.float32 if n % 3 else torch.float16) for n in range(7)}
    return tensors | {"ids": torch.arange(5), "mask": torch.ones(3, dtype=torch.bool)}


def test_artifacts_that_cannot_agree_on_an_order_take_separate_passes(ragged: Space, monkeypatch):
    """
    Where ragged tensors of different dtypes do not fit one batch, there are more passes, and the same bytes.
    """
    usual, one = built_with(ragged, monkeypatch, 1 << 10, 1 << 12)
    split, several = built_with(ragged, monkeypatch, 8, 32)

    assert len(one) == 1
    assert len(several) > 1
    assert split == usual


def test_regions_cover_every_output_once(ragged: Space, monkeypatch):
    """
    The regions of a pass's batches follow each other without a gap, for each output.
    """
    for slice_, batch in ((8, 32), (24, 100), (1 << 10, 1 << 12)):
        _, taken = built_with(ragged, monkeypatch, slice_, batch)
        for walk in taken:
            for n, output in enumerate(walk.outputs):
                end = 0
                for start, length in (b.regions[n] for b in walk.batches if b.regions[n][1]):
                    assert start == end
                    end = start + length
                assert end == output.layout.size - len(output.layout.header)


def test_every_value_is_right_whatever_the_order(ragged: Space):
    """
    Ragged and regular tensors of every artifact hold what the formula says.
    """
    ragged.build()
    a, b = (ragged_load(ragged, name) for name in "AB")
    for name, tensor in ragged.load("wide").items():
        expected = a[name].float() * 0.25 + b[name].float() * 0.75 if a[name].is_floating_point() else a[name]
        assert torch.equal(tensor, expected), name
    part = ragged.load("part")
    assert set(part) == {*(f"m.{n}" for n in range(6)), "odd.1", "mask"}
    assert all(torch.equal(t, a[n].to(torch.bfloat16) if n != "mask" else a[n]) for n, t in part.items())


def ragged_load(space: Space, name: str) -> dict[str, torch.Tensor]:
    """Read a source with the safetensors library."""
    from safetensors.torch import load_file

    return load_file(space.path / f"{name}.safetensors")


def test_a_chain_of_a_thousand_steps_is_evaluated_without_recursion(space: Space):
    """
    Deep chains need no deep stack, and intermediate values stay exact in float32.
    """
    for name in "AB":
        space.checkpoint(name, {"w": checkpoints.numbers(name, "w", (16, 8))})
    steps = "\n".join(f'[step.s{n}]\nformula = "0.5 * {"A" if n == 0 else f"s{n - 1}"} + 0.5 * B"' for n in range(1000))
    space.write("recipe.toml", RECIPE.partition("[step.half]")[0] + steps)
    space.build()
    expected = ragged_load(space, "A")["w"].float()
    b = ragged_load(space, "B")["w"].float()
    for _ in range(1000):
        expected = expected * 0.5 + b * 0.5

    assert torch.equal(space.load("s999")["w"], expected.half())


def compiled(space: Space, monkeypatch: pytest.MonkeyPatch, steps: str, models: int) -> programs.Program:
    """Build one tensor of some step over many models, and return its program."""
    for n in range(models):
        space.checkpoint(f"m{n}", {"w": checkpoints.numbers(str(n), "w", (64, 64))})
    sources = "".join(f'[source.m{n}]\npath = "m{n}.safetensors"\n' for n in range(models))
    space.write("recipe.toml", f'recipe = 1\narchitecture = "generic"\n{sources}{steps}')
    _, [walk] = built_with(space, monkeypatch, 1 << 20, 1 << 22)
    return walk.programs[0]


def test_memory_does_not_grow_with_the_length_of_a_chain(space: Space, monkeypatch):
    """
    Values are let go when nothing needs them any more, so a long chain is evaluated in slices of the usual size.
    """
    steps = "\n".join(f'[step.s{n}]\nformula = "0.5 * {"m0" if n == 0 else f"s{n - 1}"} + 0.5 * m1"' for n in range(100))
    program = compiled(space, monkeypatch, steps, 2)

    assert len(program.values) == 102
    assert program.slice_size == 1 << 20


def test_memory_does_not_grow_with_the_number_of_models(space: Space, monkeypatch):
    """
    A step that needs many models at once is evaluated in smaller slices.
    """
    names = ", ".join(f'"m{n}"' for n in range(40))
    program = compiled(space, monkeypatch, f'[step.all]\nmethod = "linear"\nmodels = [{names}]\nweights = [{", ".join(["0.025"] * 40)}]\n', 40)

    assert program.slice_size * 41 <= (1 << 20) * 8
    assert space.load("all")["w"].isfinite().all()


def test_very_many_artifacts_take_several_passes(space: Space, monkeypatch):
    """
    A large matrix is made in passes of at most sixteen artifacts, so that memory and open files stay bounded.
    """
    for name in "AB":
        space.checkpoint(name, {"w": checkpoints.numbers(name, "w", (64, 64))})
    ratios = [n / 100 for n in range(40)]
    step = f'[step."mix-{{r}}"]\nmatrix = {{ r = {ratios} }}\nmethod = "weighted_sum"\na = "A"\nb = "B"\nalpha = "{{r}}"\n'
    space.write("recipe.toml", RECIPE.partition("[step.half]")[0] + step)
    made, taken = built_with(space, monkeypatch, 1 << 17, 1 << 20)

    assert [len(walk.outputs) for walk in taken] == [16, 16, 8]
    assert len(made) == 40
    assert torch.equal(
        space.load("mix-0.39")["w"], (ragged_load(space, "A")["w"].float() * (1 - 0.39) + ragged_load(space, "B")["w"].float() * 0.39).half()
    )
