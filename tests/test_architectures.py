"""Families of checkpoints: recognised by their names, divided into components and blocks, laid out as real files are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from blake3 import blake3

from sdmerge_build.architectures import ARCHITECTURES, BASE, architecture_named, recognise
from sdmerge_build.architectures.layout import expand

LAYOUTS = Path(os.environ.get("SDBUILD_LAYOUTS") or Path(__file__).parents[2] / "shared" / "layouts")
UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model."


def real_layout(name: str) -> dict[str, dict[str, Any]]:
    """Read the names and shapes of real checkpoints, where they are at hand."""
    path = LAYOUTS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; SDBUILD_LAYOUTS says where real layouts lie")
    return {tensor: facts for component in json.loads(path.read_text(encoding="utf-8")).values() for tensor, facts in component.items()}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_layout_is_that_of_real_checkpoints(name: str):
    """
    Every tensor that files always have is in the layout with its shape, and the layout holds nothing that files do not.
    """
    real, layout = real_layout(name), architecture_named(name).layout()
    always = {tensor: tuple(facts["shape"]) for tensor, facts in real.items() if not facts.get("optional")}
    assert {} == {tensor: shape for tensor, shape in always.items() if layout.get(tensor) != shape}
    assert {} == {tensor: shape for tensor, shape in layout.items() if tensor not in real or tuple(real[tensor]["shape"]) != shape}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_what_real_checkpoints_may_lack_is_known(name: str):
    """
    Tensors that files often lack may be lacking, and no others.
    """
    real, architecture = real_layout(name), architecture_named(name)
    assert [] == [tensor for tensor, facts in real.items() if architecture.may_lack(tensor) != bool(facts.get("optional"))]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_every_real_tensor_has_a_component(name: str):
    """
    Nothing in a real checkpoint is `other`, so that `copy` can name all of it.
    """
    architecture = architecture_named(name)
    assert [] == [tensor for tensor in real_layout(name) if architecture.component_of(tensor) == "other"]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_real_tensors_that_are_no_weights_are_constants(name: str):
    """
    Whole numbers are never averaged.
    """
    architecture = architecture_named(name)
    whole = [tensor for tensor, facts in real_layout(name).items() if facts.get("dtype", "").startswith("I")]
    assert whole
    assert [] == [tensor for tensor in whole if not architecture.is_constant(tensor)]


@pytest.mark.parametrize(
    ("name", "count", "digest"),
    [
        ("sd1", 1131, "bdc968db9758cb5085a70c8b7a4f41079b56ed396fa75b972cbd8fc2dd3e2e2c"),
        ("sdxl", 2515, "930deaf770ee75b5c48f5e3d5f0d00e17b7d80e33e8d45ab6624cfa101ca1451"),
    ],
)
def test_a_layout_does_not_change_by_accident(name: str, count: int, digest: str):
    """
    Names and shapes are those that were compared with real checkpoints; stand-ins and their digests rest on them.
    """
    layout = architecture_named(name).layout()
    lines = "".join(f"{tensor} {'x'.join(map(str, shape))}\n" for tensor, shape in sorted(layout.items()))
    assert count == len(layout)
    assert digest == blake3(lines.encode()).hexdigest()


@pytest.mark.parametrize(("name", "gigabytes"), [("sd1", 2.13), ("sdxl", 6.94)])
def test_a_layout_weighs_what_its_files_weigh(name: str, gigabytes: float):
    """
    Two bytes per element come to the size of an fp16 checkpoint.
    """
    elements = 0
    for shape in architecture_named(name).layout().values():
        product = 1
        for size in shape:
            product *= size
        elements += product
    assert gigabytes == round(elements * 2 / 1e9, 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_is_recognised_by_its_names(name: str):
    """
    A full layout, a thinned-out one, and one without text encoder layers or VAE are all of their family.
    """
    architecture = architecture_named(name)
    assert name == recognise(architecture.layout()).name
    assert name == recognise(checkpoints.miniature(name, "A", every=50)).name
    assert name == recognise([tensor for tensor in architecture.layout() if not tensor.startswith("first_stage_model.")]).name


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["weight"],
        [CLIP + "embeddings.token_embedding.weight"],
        [UNET + "input_blocks.11.0.in_layers.2.weight"],
        ["lora_unet_down_blocks_0.alpha"],
        ["double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
        ["cond_stage_model.model.transformer.resblocks.0.ln_1.weight", UNET + "input_blocks.11.0.in_layers.2.weight"],
        [UNET + "label_emb.0.0.weight", UNET + "input_blocks.11.0.in_layers.2.weight", CLIP + "embeddings.token_embedding.weight"],
        ["conditioner.embedders.0.model.token_embedding.weight", UNET + "label_emb.0.0.weight"],
    ],
    ids=["nothing", "one weight", "text encoder", "unet", "lora", "flux", "sd2", "sd1 with labels", "sdxl refiner"],
)
def test_everything_else_is_generic(names: list[str]):
    """
    What is not known for certain is merged without blocks and components, and never taken for what it is not.
    """
    assert "generic" == recognise(names).name


@pytest.mark.parametrize(
    ("architecture", "tensor", "block", "part", "component"),
    [
        ("sd1", UNET + "time_embed.0.weight", "IN00", "TIME", "unet"),
        ("sd1", UNET + "input_blocks.0.0.weight", "IN00", None, "unet"),
        ("sd1", UNET + "input_blocks.1.0.in_layers.0.weight", "IN01", None, "unet"),
        ("sd1", UNET + "input_blocks.11.0.in_layers.0.weight", "IN11", None, "unet"),
        ("sd1", UNET + "middle_block.1.norm.weight", "M00", None, "unet"),
        ("sd1", UNET + "output_blocks.1.0.in_layers.0.weight", "OUT01", None, "unet"),
        ("sd1", UNET + "output_blocks.11.1.norm.weight", "OUT11", None, "unet"),
        ("sd1", UNET + "out.0.bias", "OUT11", "OUT", "unet"),
        ("sd1", CLIP + "final_layer_norm.weight", BASE, "CLIP_L", "clip_l"),
        ("sd1", "first_stage_model.quant_conv.weight", BASE, "VAE", "vae"),
        ("sd1", "model_ema.decay", BASE, None, "ema"),
        ("sd1", "model_ema.diffusion_modeltime_embed0weight", BASE, None, "ema"),
        ("sd1", "alphas_cumprod", BASE, None, "schedule"),
        ("sd1", "sqrt_one_minus_alphas_cumprod", BASE, None, "schedule"),
        ("sd1", "state_dict.stray", BASE, None, "other"),
        ("sdxl", UNET + "time_embed.2.bias", "IN00", "TIME", "unet"),
        ("sdxl", UNET + "label_emb.0.0.weight", "IN00", "LABEL", "unet"),
        ("sdxl", UNET + "input_blocks.8.1.norm.weight", "IN08", None, "unet"),
        ("sdxl", UNET + "output_blocks.8.0.in_layers.0.weight", "OUT08", None, "unet"),
        ("sdxl", UNET + "out.2.weight", "OUT08", "OUT", "unet"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", BASE, "CLIP_L", "clip_l"),
        ("sdxl", "conditioner.embedders.1.model.logit_scale", BASE, "CLIP_G", "clip_g"),
        ("sdxl", "first_stage_model.decoder.conv_in.weight", BASE, "VAE", "vae"),
        ("sdxl", "v_pred", BASE, None, "schedule"),
        ("generic", UNET + "input_blocks.1.0.in_layers.0.weight", BASE, None, "other"),
    ],
)
def test_a_tensor_has_a_block_a_part_and_a_component(architecture: str, tensor: str, block: str, part: str | None, component: str):
    """
    The time embedding counts with the first block, the last convolution with the last, text encoders and VAE with BASE.
    """
    family = architecture_named(architecture)
    assert (block, part) == family.block_of(tensor)
    assert component == family.component_of(tensor)


@pytest.mark.parametrize(("name", "count"), [("sd1", 26), ("sdxl", 20), ("generic", 0)])
def test_blocks_are_counted_as_people_count_them(name: str, count: int):
    """
    BASE first, then IN, M and OUT in order; every block holds tensors, and every tensor of the UNet is in one that is not BASE.
    """
    architecture = architecture_named(name)
    assert count == len(architecture.blocks)
    assert [BASE][:count] == list(architecture.blocks)[:1]
    held = {architecture.block_of(tensor)[0] for tensor in architecture.layout()}
    assert held == set(architecture.blocks) or not count
    outside = [tensor for tensor in architecture.layout() if tensor.startswith(UNET) and architecture.block_of(tensor)[0] == BASE]
    assert [] == outside


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_parts_have_names_that_no_block_has(name: str):
    """
    A name in a ratio means one thing; each part follows a block that exists.
    """
    architecture = architecture_named(name)
    assert set() == architecture.parts.keys() & architecture.blocks.keys()
    assert {block for block, _ in architecture.parts.values()} <= architecture.blocks.keys()


@pytest.mark.parametrize(
    ("tensor", "is_constant", "may_lack"),
    [
        (CLIP + "embeddings.position_ids", True, True),
        ("alphas_cumprod_prev", True, True),
        ("model_ema.num_updates", True, True),
        ("model_ema.diffusion_modelout0bias", False, True),
        (CLIP + "embeddings.position_embedding.weight", False, False),
        (UNET + "out.0.bias", False, False),
    ],
)
def test_constants_and_optional_tensors_are_told_apart(tensor: str, is_constant: bool, may_lack: bool):
    """
    Constants are copied and may be lacking; averages of weights may be lacking and are merged; weights are neither.
    """
    sd1 = architecture_named("sd1")
    assert (is_constant, may_lack) == (sd1.is_constant(tensor), sd1.may_lack(tensor))


def test_fingerprints_tell_families_apart():
    """
    Keys hold the family and a digest of what can change a tensor.
    """
    prints = [architecture_named(name).fingerprint for name in ARCHITECTURES]
    assert len(ARCHITECTURES) == len(set(prints))
    assert all(mark.startswith(f"{name}@") for name, mark in zip(ARCHITECTURES, prints, strict=True))


def test_a_layout_is_spelled_out_from_parts():
    """
    A list is a shape, a text calls a part, a table nests, braces in a name stand for several, sizes multiply.
    """
    table = {"blocks.{0..1}": "pair c=4 d=2*8", "{a,b}.x": {"scale": []}, "head": [3, "2*5"]}
    parts = {"pair": {"weight": ["c", "d"], "": "tail e=2*c"}, "tail": {"bias": ["e"]}}
    expected = {
        "a.x.scale": (),
        "b.x.scale": (),
        "blocks.0.bias": (8,),
        "blocks.0.weight": (4, 16),
        "blocks.1.bias": (8,),
        "blocks.1.weight": (4, 16),
        "head": (3, 10),
    }
    assert list(expected.items()) == list(expand(table, parts).items())
