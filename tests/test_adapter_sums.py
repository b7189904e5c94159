"""Sums of adapters that are files: joined exactly, or made smaller, against float64 products by NumPy and against baking one after the other."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch
from safetensors import safe_open

from sdmerge_build.errors import SdbuildError

LINEAR = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
SPATIAL = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
POINTWISE = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
SHAPES = {LINEAR: (24, 20), SPATIAL: (16, 12, 3, 3), POINTWISE: (16, 16, 1, 1)}
NAMES = {
    LINEAR: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    SPATIAL: "lora_unet_down_blocks_0_resnets_0_conv1",
    POINTWISE: "lora_unet_down_blocks_0_attentions_0_proj_in",
}
RECIPE = """
recipe = 1
architecture = "sd1"

[source.M]
path = "M.safetensors"

[source.style]
path = "style.safetensors"

[source.detail]
path = "detail.safetensors"
"""


def model() -> dict[str, torch.Tensor]:
    tensors = checkpoints.miniature("sd1", "M", "F32", every=60)
    return tensors | {name: checkpoints.numbers("M", name, shape, torch.float32) for name, shape in SHAPES.items()}


def lora(seed: str, rank: int, alpha: float | None, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Make a LoRA as kohya writes it."""
    tensors = {}
    for target, (out, into, *kernel) in SHAPES.items():
        module = NAMES[target]
        tensors[f"{module}.lora_up.weight"] = checkpoints.numbers(seed, f"{module} up", (out, rank, *(1 for _ in kernel)), dtype)
        tensors[f"{module}.lora_down.weight"] = checkpoints.numbers(seed, f"{module} down", (rank, into, *kernel), dtype)
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return tensors


def delta(tensors: dict[str, torch.Tensor], target: str) -> np.ndarray:
    """What a LoRA adds to a tensor, in float64."""
    up, down = (tensors[f"{NAMES[target]}.lora_{side}.weight"].double().flatten(1).numpy() for side in ("up", "down"))
    alpha = tensors.get(f"{NAMES[target]}.alpha")
    return up @ down * (1.0 if alpha is None else float(alpha) / len(down))


def project(space, recipe: str, *, style: dict[str, torch.Tensor] | None = None, detail: dict[str, torch.Tensor] | None = None) -> None:
    """Build a recipe of a model and two adapters."""
    space.checkpoint("M", model())
    space.checkpoint("style", lora("style", 4, 2.0) if style is None else style)
    space.checkpoint("detail", lora("detail", 3, None) if detail is None else detail)
    space.write("recipe.toml", RECIPE + recipe)
    space.build()


def test_a_sum_of_adapters_is_joined_along_the_rank(space):
    """`up` side by side, strength and alpha in it; `down` below one another, bit for bit; `alpha` is the new rank."""
    project(space, '[step.both]\nformula = "0.75 * style - 0.3 * detail"\ndtype = "fp32"')
    both, style, detail = space.load("both"), lora("style", 4, 2.0), lora("detail", 3, None)

    for target, module in NAMES.items():
        up, down = both[f"{module}.lora_up.weight"], both[f"{module}.lora_down.weight"]
        assert torch.equal(down, torch.cat([one[f"{module}.lora_down.weight"].float() for one in (style, detail)]))
        assert torch.equal(up[:, :4], style[f"{module}.lora_up.weight"].float() * 0.375)
        assert torch.equal(up[:, 4:], (detail[f"{module}.lora_up.weight"].double() * -0.3).float())
        assert both[f"{module}.alpha"].item() == 7
        np.testing.assert_allclose(delta(both, target), 0.75 * delta(style, target) - 0.3 * delta(detail, target), atol=1e-8)
    assert len(both) == 9


def test_what_is_joined_bakes_as_one_after_the_other(space):
    """The exact join, baked, is what both do one after the other, to the last bits of float32; and in one formula."""
    project(space, """
[step.both]
formula = "0.8 * style - 0.3 * detail"
artifact = true
dtype = "fp32"
[step.joined]
formula = "M + both"
dtype = "fp32"
[step.first]
formula = "M + 0.8 * style"
[step.turns]
formula = "first - 0.3 * detail"
dtype = "fp32"
[step.at-once]
formula = "M + 0.8 * style - 0.3 * detail"
dtype = "fp32"
""")  # fmt: skip
    joined, turns, once = (space.load(name) for name in ("joined", "turns", "at-once"))

    for name, weight in model().items():
        if not weight.is_floating_point():
            continue
        assert torch.equal(joined[name], weight) == (name not in SHAPES)
        torch.testing.assert_close(joined[name], turns[name], rtol=0, atol=2.0**-25)  # weights are below 1/8: an ulp is 2^-27
        torch.testing.assert_close(joined[name], once[name], rtol=0, atol=2.0**-26)


def test_an_artifact_is_used_as_it_was_rounded(space):
    """A sum that is a float16 file changes a model as that file would, were it a source."""
    project(space, '[step.both]\nformula = "0.8 * style - 0.3 * detail"\nartifact = true\n[step.baked]\nformula = "M + both"\ndtype = "fp32"')
    baked, both = space.load("baked"), space.load("both")
    assert both[f"{NAMES[LINEAR]}.lora_up.weight"].dtype is torch.float16
    space.checkpoint("both", both)
    space.write("again.toml", RECIPE + '[source.both]\npath = "both.safetensors"\n[step.again]\nformula = "M + both"\ndtype = "fp32"')
    space.build("again.toml")

    assert all(torch.equal(space.load("again")[name], baked[name]) for name in SHAPES)


def test_block_weights_scale_a_joined_adapter(space):
    """Any method that adds and scales may be given adapters alone, with a table of strengths; what is scaled to nothing has no module."""
    project(
        space, '[step.scaled]\nmethod = "scale"\na = "style"\nalpha = { base = 0.5, rules = [{ match = "*in_layers*", value = 0 }] }\ndtype = "fp32"'
    )
    scaled = space.load("scaled")

    assert not any(name.startswith(NAMES[SPATIAL]) for name in scaled)
    np.testing.assert_allclose(delta(scaled, LINEAR), 0.5 * delta(lora("style", 4, 2.0), LINEAR), atol=1e-8)


def test_the_header_of_mixed_ranks_says_so(space):
    """One rank is named; where modules differ, it is `Dynamic`."""
    less = {name: tensor for name, tensor in lora("detail", 3, None).items() if NAMES[LINEAR] in name}
    project(space, '[step.both]\nformula = "style + detail"\n[step.same]\nformula = "0.5 * style"', detail=less)
    said = {}
    for name in ("both", "same"):
        with safe_open(space.path / "out" / f"{name}.safetensors", "pt") as file:
            said[name] = file.metadata()

    assert said["both"]["ss_network_dim"] == "Dynamic"
    assert (said["same"]["ss_network_dim"], said["same"]["ss_network_alpha"]) == ("4", "4.0")


@pytest.mark.parametrize("rank", [1, 3, 5, 7, 99])
def test_a_sum_is_resized_to_the_best_of_a_rank(space, rank):
    """SVD of the sum, as NumPy has it of the product; at full rank it is the sum itself."""
    project(
        space,
        f'[step.sum]\nformula = "0.8 * style - 0.3 * detail"\nartifact = false\n[step.small]\nmethod = "resize_lora"\nadapter = "sum"\nrank = {rank}\ndtype = "fp32"',
    )
    small, style, detail = space.load("small"), lora("style", 4, 2.0), lora("detail", 3, None)

    for target in NAMES:
        whole = 0.8 * delta(style, target) - 0.3 * delta(detail, target)
        left, sizes, right = np.linalg.svd(whole, full_matrices=False)
        np.testing.assert_allclose(delta(small, target), left[:, :rank] * sizes[:rank] @ right[:rank], atol=1e-8)


def test_a_rank_may_follow_from_the_energy_of_an_adapter(space):
    """`energy` leaves out what is too little; the rank never exceeds what the factors have."""
    project(space, '[step.small]\nmethod = "resize_lora"\nadapter = "style"\nenergy = 0.7\ndtype = "fp32"')
    small = space.load("small")

    for target, module in NAMES.items():
        sizes = np.linalg.svd(delta(lora("style", 4, 2.0), target), compute_uv=False) ** 2
        assert small[f"{module}.alpha"].item() == int((np.cumsum(sizes) < 0.7 * sizes.sum()).sum()) + 1


def hadamard(seed: str) -> dict[str, torch.Tensor]:
    """A LoHa of the linear module."""
    out, into = SHAPES[LINEAR]
    parts = {"w1_a": (out, 2), "w1_b": (2, into), "w2_a": (out, 2), "w2_b": (2, into)}
    return {f"{NAMES[LINEAR]}.hada_{part}": checkpoints.numbers(seed, part, shape) for part, shape in parts.items()}


def test_other_kinds_become_loras_by_decomposition(space):
    """A LoHa, alone and beside a LoRA, is resized to a LoRA that adds the same, where the rank allows it."""
    loha = hadamard("detail")
    project(
        space,
        '[step.small]\nmethod = "resize_lora"\nadapter = "sum"\nrank = 20\ndtype = "fp32"\n[step.sum]\nformula = "style + 0.5 * detail"',
        detail=loha,
    )
    a, b, c, d = (loha[f"{NAMES[LINEAR]}.hada_{part}"].double().numpy() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))

    np.testing.assert_allclose(delta(space.load("small"), LINEAR), delta(lora("style", 4, 2.0), LINEAR) + 0.5 * (a @ b) * (c @ d), atol=1e-8)


def test_cores_of_convolutions_are_resized(space):
    """A LoCon with a core (mid) is a LoRA whose product is contracted with it."""
    out, into, *kernel = SHAPES[SPATIAL]
    parts = {"up": (out, 3, 1, 1), "down": (2, into, 1, 1), "mid": (3, 2, *kernel)}
    core = {f"{NAMES[SPATIAL]}.lora_{part}.weight": checkpoints.numbers("core", part, shape) for part, shape in parts.items()}
    project(space, '[step.small]\nmethod = "resize_lora"\nadapter = "detail"\nrank = 16\ndtype = "fp32"', detail=core)
    up, down, mid = (core[f"{NAMES[SPATIAL]}.lora_{part}.weight"].double().numpy() for part in ("up", "down", "mid"))
    whole = np.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])

    np.testing.assert_allclose(delta(space.load("small"), SPATIAL), whole.reshape(out, -1), atol=1e-8)


@pytest.mark.parametrize("method", ["join", "resize_lora"])
def test_what_cannot_be_in_a_lora_is_refused(space, method):
    """A LoHa cannot be joined, and the message says what to do; what depends on the weights cannot even be resized."""
    module = NAMES[LINEAR]
    magnitudes = lora("detail", 3, None) | {f"{module}.dora_scale": torch.ones(24, 1)}
    step = '[step.both]\nformula = "style + detail"' if method == "join" else '[step.both]\nmethod = "resize_lora"\nadapter = "detail"\nrank = 2'

    with pytest.raises(SdbuildError, match="depends on the weights that it changes") as failed:
        project(space, step, detail=magnitudes)
    assert "dora_scale" in str(failed.value)
    if method == "join":
        with pytest.raises(SdbuildError, match="cannot join `detail`") as failed:
            project(space, step, detail=hadamard("detail"))
        assert "resize_lora" in str(failed.value)


def test_adapters_for_some_rows_are_joined_as_blocks(space):
    """Flux fuses q, k and v, and diffusers knows them apart: one for q and one for all three are joined row by row."""
    fused = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    whole = {
        f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight": checkpoints.numbers("w", side, shape)
        for side, shape in (("up", (24, 2)), ("down", (2, 12)))
    }
    part = {
        f"transformer.transformer_blocks.0.attn.to_k.lora_{side}.weight": checkpoints.numbers("p", side, shape)
        for side, shape in (("B", (8, 3)), ("A", (3, 12)))
    }
    for name, tensors in (("style", whole), ("detail", part)):
        space.checkpoint(name, tensors)
    space.checkpoint("M", checkpoints.miniature("flux", "M", "F32", every=60) | {fused: torch.zeros(24, 12)})
    text = (
        RECIPE.replace("sd1", "flux/schnell")
        + '[step.both]\nformula = "style + 0.5 * detail"\ndtype = "fp32"\nartifact = true\n[step.baked]\nformula = "M + both"\ndtype = "fp32"'
    )
    space.write("recipe.toml", text)
    space.build()
    both = space.load("both")
    w, p = ([tensor.double().numpy() for tensor in tensors.values()] for tensors in (whole, part))
    expected = w[0] @ w[1]
    expected[8:16] += 0.5 * p[0] @ p[1]
    up, down = (both[f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight"].double().numpy() for side in ("up", "down"))

    assert up.shape == (24, 5)
    np.testing.assert_allclose(up @ down, expected, atol=1e-8)
    np.testing.assert_allclose(space.load("baked")[fused].double().numpy(), expected, atol=1e-8)


def test_joined_adapters_are_known_and_made_once(space):
    """The second run has nothing to do; another strength makes the file again."""
    project(space, '[step.both]\nformula = "0.8 * style - 0.3 * detail"')
    assert [wish.state.value for wish in space.build().wishes] == ["reused"]
    space.edit("0.8 *", "0.9 *")

    assert [wish.state.value for wish in space.build().wishes] == ["built"]
