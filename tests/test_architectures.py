"""Families of checkpoints: recognised by their names, divided into components and blocks, laid out as real files are."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints
import pytest
from blake3 import blake3

from sdmerge_build.architectures import (
    ARCHITECTURES,
    BASE,
    OURS,
    Architecture,
    architecture_named,
    architecture_names,
    is_architecture,
    recognise,
)
from sdmerge_build.architectures.braces import spell
from sdmerge_build.architectures.layout import expand
from sdmerge_build.rehearse import stand_in
from sdmerge_build.tensorfile import read_header

LAYOUTS = Path(os.environ.get("SDBUILD_LAYOUTS") or Path(__file__).parents[2] / "shared" / "layouts")
UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model."
FIRST = UNET + "input_blocks.0.0.weight"
REAL = {"sd1": "sd1", "sdxl": "sdxl", "sd3": "sd3/2b", "flux": "flux/dev"}
"""Real layouts, and whose they are."""
WITH_BLOCKS = [name for name in architecture_names() if name != "generic"]


class Tensor(NamedTuple):
    """What a header says of a tensor, as far as recognising it needs."""

    shape: tuple[int, ...] = ()


def tensors_of(architecture: Architecture) -> dict[str, Tensor]:
    """List the tensors of a full checkpoint as a header would."""
    return {name: Tensor(shape) for name, shape in architecture.layout().items()}


def named(names: Iterable[str]) -> dict[str, Tensor]:
    """Make tensors of names alone."""
    return dict.fromkeys(names, Tensor())


def real_layout(name: str) -> dict[str, dict[str, Any]]:
    """Read the names and shapes of real checkpoints, where they are at hand."""
    path = LAYOUTS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; SDBUILD_LAYOUTS says where real layouts lie")
    return {tensor: facts for component in json.loads(path.read_text(encoding="utf-8")).values() for tensor, facts in component.items()}


@pytest.mark.parametrize("name", REAL)
def test_a_layout_is_that_of_real_checkpoints(name: str):
    """
    Every tensor that files always have is in the layout with its shape, and the layout holds nothing that files do not.
    """
    real, layout = real_layout(name), architecture_named(REAL[name]).layout()
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


@pytest.mark.parametrize("name", REAL)
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
        ("sd2", 1228, "dcb7f80faaea7f100235239a89f2bcf1201b8943a1b86f0e470d23d5f4447843"),
        ("sdxl", 2515, "930deaf770ee75b5c48f5e3d5f0d00e17b7d80e33e8d45ab6624cfa101ca1451"),
        ("sdxl-refiner", 1858, "5e5cb0d19f7fc7a9adf1a636282d0212e3d56a2e08976521d310b74acd6ac894"),
        ("sd3/2b", 1672, "9ab0dacdcdca71dfffe6747f5d7f92693286a5c50e33222cf8dbaebdb0309edd"),
        ("sd3/3.5-medium", 1846, "792cac3cbe431f4461b6afd3539f7d77bcbc8fa0e19d955f26bf34c9f8fa778a"),
        ("sd3/3.5-large", 2104, "7a5d835d1f93cacdc7a63ba4778b2d60e1cfcb1c2de07de9be55223d62727d56"),
        ("flux/dev", 1439, "1ecc01d1488cc4cb7e0d70ff55dc7a1a3d60a220ba6257879a729175786799b8"),
        ("flux/schnell", 1435, "0226350c3093ad6e3029d8944c6c8ba04c3140f82cf8dfa039737537ffb5a2c2"),
    ],
)
def test_a_layout_does_not_change_by_accident(name: str, count: int, digest: str):
    """
    Names and shapes are those that were compared with real checkpoints, or with their sizes; stand-ins and their digests rest on them.
    """
    layout = architecture_named(name).layout()
    lines = "".join(f"{tensor} {'x'.join(map(str, shape))}\n" for tensor, shape in sorted(layout.items()))
    assert count == len(layout)
    assert digest == blake3(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "components", "width", "size"),
    [
        ("sd1", "", 4, 4_265_146_304),  # v1-5-pruned-emaonly.safetensors
        ("sd2", "", 4, 5_214_604_494),  # v2-1_768-ema-pruned.safetensors
        ("sdxl", "", 2, 6_938_078_334),  # sd_xl_base_1.0.safetensors
        ("sdxl-refiner", "", 2, 6_075_981_930),  # sd_xl_refiner_1.0.safetensors
        ("sd3/2b", "dit vae", 2, 4_337_667_306),  # sd3_medium.safetensors, which has 735 tensors
        ("sd3/3.5-medium", "dit vae", 2, 5_107_104_286),  # sd3.5_medium.safetensors
        ("sd3/3.5-large", "dit vae", 2, 16_460_379_262),  # sd3.5_large.safetensors
        ("flux/dev", "dit", 2, 23_802_932_552),  # flux1-dev.safetensors, which has 780 tensors
        ("flux/schnell", "dit", 2, 23_782_506_688),  # flux1-schnell.safetensors, which has 776
    ],
)
def test_a_layout_weighs_what_the_published_file_weighs(name: str, components: str, width: int, size: int):
    """
    What the tensors leave of the file's size is a header, of 100 to 200 bytes for each; a tensor too many or too wide would not fit.
    """
    architecture = architecture_named(name)
    held = {t: shape for t, shape in architecture.layout().items() if not components or architecture.component_of(t) in components.split()}
    header = size - width * sum(math.prod(shape) for shape in held.values())
    assert 100 * len(held) < header < 200 * len(held)


@pytest.mark.parametrize(
    ("name", "component", "millions"),
    [
        ("sd1", "unet", 859.52),
        ("sd2", "unet", 865.91),
        ("sdxl", "unet", 2567.46),
        ("sdxl-refiner", "unet", 2259.53),
        ("sd3/2b", "dit", 2084.95),
        ("sd3/3.5-medium", "dit", 2469.66),
        ("sd3/3.5-large", "dit", 8146.28),  # 8056.63, as it is often told, and the table of positions
        ("flux/dev", "dit", 11901.41),
    ],
)
def test_a_model_has_as_many_parameters_as_people_say(name: str, component: str, millions: float):
    """
    Diffusion models are known by their size; those of SD 2, the refiner and SD 3.5 were not compared with a file, name by name.
    """
    architecture = architecture_named(name)
    held = [math.prod(shape) for tensor, shape in architecture.layout().items() if architecture.component_of(tensor) == component]
    assert millions == round(sum(held) / 1e6, 2)


@pytest.mark.parametrize("name", architecture_names())
def test_a_checkpoint_is_recognised_by_its_names(name: str):
    """
    A full layout, a thinned-out one, and one without VAE or text encoders are all of their family.
    """
    architecture = architecture_named(name)
    tensors = tensors_of(architecture)
    assert architecture.name == recognise(tensors).name
    assert architecture.name == recognise(checkpoints.miniature(name, "A", every=50)).name
    assert architecture.name == recognise({t: s for t, s in tensors.items() if architecture.component_of(t) != "vae"}).name
    assert architecture.fits(tensors)


@pytest.mark.parametrize("name", ["sd3/2b", "sd3/3.5-medium", "sd3/3.5-large", "flux/dev", "flux/schnell"])
@pytest.mark.parametrize("prefix", [UNET, ""], ids=["with prefix", "bare"])
def test_a_diffusion_model_alone_is_recognised(name: str, prefix: str):
    """
    Files of SD 3 and Flux often hold nothing else, with or without the prefix; blocks, parts and components are the same.
    """
    architecture = architecture_named(name)
    bare = {t.removeprefix(UNET): t for t in architecture.layout() if t.startswith(UNET)}
    found = recognise(named(prefix + t for t in bare))
    assert architecture == found
    assert [architecture.block_of(t) for t in bare.values()] == [found.block_of(prefix + t) for t in bare]
    assert {"dit"} == {found.component_of(prefix + t) for t in bare}


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("sd1", "Stable Diffusion 1.x"),
        ("sd1/inpainting", "Stable Diffusion 1.x inpainting"),
        ("sd1/instruct-pix2pix", "Stable Diffusion 1.x instruct-pix2pix"),
        ("sd2", "Stable Diffusion 2.x"),
        ("sd2/inpainting", "Stable Diffusion 2.x inpainting"),
        ("sd2/instruct-pix2pix", "Stable Diffusion 2.x instruct-pix2pix"),
        ("sdxl", "Stable Diffusion XL"),
        ("sdxl/inpainting", "Stable Diffusion XL inpainting"),
        ("sdxl/instruct-pix2pix", "Stable Diffusion XL instruct-pix2pix"),
        ("sdxl-refiner", "Stable Diffusion XL refiner"),
        ("sd3/2b", "Stable Diffusion 3 Medium"),
        ("sd3/3.5-medium", "Stable Diffusion 3.5 Medium"),
        ("sd3/3.5-large", "Stable Diffusion 3.5 Large"),
        ("flux/dev", "Flux.1 dev"),
        ("flux/schnell", "Flux.1 schnell"),
    ],
)
def test_a_variant_is_told_from_the_others(name: str, title: str, tmp_path: Path):
    """
    A file is named after its variant, and so is its tiny stand-in; no other variant of the family takes it for its own.
    """
    architecture = architecture_named(name)
    stand_in(tmp_path / "tiny.safetensors", architecture, "tiny", seed="A")
    for tensors in (tensors_of(architecture), read_header(tmp_path / "tiny.safetensors").tensors):
        assert title == recognise(tensors).title
        others = [other for other in architecture_names() if other.startswith(f"{architecture.name}/") and other != name]
        told = [other for other in others if architecture_named(other).fits(tensors)]
        assert told == (["sd2/512", "sd2/768-v"] if architecture.name == "sd2" else [])  # which nothing in a file tells
        assert architecture_named(architecture.name).fits(tensors)


def test_what_nobody_knows_of_a_variant_does_not_keep_a_file_from_its_family():
    """
    Stable Diffusion 3 with twelve layers more is still Stable Diffusion 3.
    """
    tensors = tensors_of(architecture_named("sd3/2b"))
    more = {t.replace("joint_blocks.0.", f"joint_blocks.{n}."): s for n in range(24, 36) for t, s in tensors.items() if "joint_blocks.0." in t}
    assert ("sd3", "", "Stable Diffusion 3") == ((found := recognise(tensors | more)).name, found.variant, found.title)


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
        [UNET + "input_blocks.11.0.in_layers.2.weight", UNET + "label_emb.0.0.weight", "cond_stage_model.model.token_embedding.weight"],
        ["conditioner.embedders.1.model.token_embedding.weight", UNET + "label_emb.0.0.weight"],
        ["double_blocks.0.img_mod.lin.weight", "single_blocks.0.modulation.lin.weight", "vector_in.in_layer.weight", "controlnet_blocks.0.weight"],
    ],
    ids=[
        "nothing",
        "one weight",
        "text encoder",
        "unet",
        "lora",
        "part of flux",
        "part of sd2",
        "sd1 with labels",
        "unclip",
        "half sdxl",
        "controlnet",
    ],
)
def test_everything_else_is_generic(names: list[str]):
    """
    What is not known for certain is merged without blocks and components, and never taken for what it is not.
    """
    assert "generic" == recognise(named(names)).name


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
        ("sdxl", UNET + "input_blocks.3.0.op.bias", "IN03", "IN03.0", "unet"),
        ("sdxl", UNET + "input_blocks.8.1.norm.weight", "IN08", "IN08.1.proj", "unet"),
        ("sdxl", UNET + "input_blocks.8.1.transformer_blocks.9.norm1.weight", "IN08", "IN08.1.9", "unet"),
        ("sdxl", UNET + "middle_block.1.proj_out.weight", "M00", "M00.1.proj", "unet"),
        ("sdxl", UNET + "middle_block.2.in_layers.0.weight", "M00", "M00.2", "unet"),
        ("sdxl", UNET + "output_blocks.2.2.conv.weight", "OUT02", "OUT02.2", "unet"),
        ("sdxl", UNET + "output_blocks.8.0.in_layers.0.weight", "OUT08", "OUT08.0", "unet"),
        ("sdxl", UNET + "out.2.weight", "OUT08", "OUT", "unet"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", BASE, "CLIP_L", "clip_l"),
        ("sdxl", "conditioner.embedders.1.model.logit_scale", BASE, "CLIP_G", "clip_g"),
        ("sdxl", "first_stage_model.decoder.conv_in.weight", BASE, "VAE", "vae"),
        ("sdxl", "v_pred", BASE, None, "schedule"),
        ("sd2", "cond_stage_model.model.ln_final.weight", BASE, "CLIP_H", "clip_h"),
        ("sdxl-refiner", UNET + "label_emb.0.2.bias", "IN00", "LABEL", "unet"),
        ("sdxl-refiner", UNET + "input_blocks.10.0.in_layers.0.weight", "IN10", None, "unet"),
        ("sdxl-refiner", "conditioner.embedders.0.model.ln_final.weight", BASE, "CLIP_G", "clip_g"),
        ("sd3", UNET + "pos_embed", BASE, "IN", "dit"),
        ("sd3", UNET + "t_embedder.mlp.2.bias", BASE, "IN", "dit"),
        ("sd3", UNET + "joint_blocks.1.x_block.attn.qkv.weight", "J01", None, "dit"),
        ("sd3", "joint_blocks.37.x_block.attn.qkv.weight", "J37", None, "dit"),
        ("sd3/2b", UNET + "final_layer.linear.weight", BASE, "OUT", "dit"),
        ("sd3", "text_encoders.t5xxl.transformer.shared.weight", BASE, "T5", "t5"),
        ("sd3", "text_encoders.clip_g.logit_scale", BASE, "CLIP_G", "clip_g"),
        ("sd3", "model.model_sampling.sigmas", BASE, None, "schedule"),
        ("flux", "double_blocks.1.img_mod.lin.weight", "D01", None, "dit"),
        ("flux", UNET + "double_blocks.18.img_mod.lin.weight", "D18", None, "dit"),
        ("flux", UNET + "single_blocks.37.linear1.bias", "S37", None, "dit"),
        ("flux", "guidance_in.in_layer.weight", BASE, "IN", "dit"),
        ("flux", "final_layer.linear.bias", BASE, "OUT", "dit"),
        ("flux", "vae.decoder.conv_in.weight", BASE, "VAE", "vae"),
        ("flux", "first_stage_model.decoder.conv_in.weight", BASE, "VAE", "vae"),
        ("flux", "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias", BASE, "CLIP_L", "clip_l"),
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


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_are_counted_as_people_count_them(name: str):
    """
    BASE first, then layers in order, each of which holds tensors; what of the diffusion model is in BASE has a name of its own.
    """
    architecture = architecture_named(name)
    layout = architecture.layout()
    assert BASE == next(iter(architecture.blocks))
    assert architecture.depth == (() if name == "sd3" else tuple(architecture.blocks)[1:])
    held = {architecture.block_of(tensor)[0] for tensor in layout}
    assert held == set(architecture.blocks) - ({f"J{n}" for n in range(24, 38)} if name == "sd3" else set())
    assert [] == [tensor for tensor in layout if tensor.startswith(UNET) and architecture.block_of(tensor) == (BASE, None)]


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_parts_have_names_that_no_block_has(name: str):
    """
    A name in a ratio means one thing; each part follows a block that exists, and holds tensors.
    """
    architecture = architecture_named(name)
    assert set() == architecture.parts.keys() & architecture.blocks.keys()
    assert {block for block, _ in architecture.parts.values()} <= architecture.blocks.keys()
    assert architecture.parts.keys() == {architecture.block_of(tensor)[1] for tensor in architecture.layout()} - {None}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd1", {"mbw": 26}),
        ("sd2", {"mbw": 26}),
        ("sdxl", {"mbw": 20, "mbw-vae": 21, "mbw-sd1": 26, "deep": 110}),
        ("sdxl-refiner", {"mbw": 26}),
        ("sd3", {"model-mixer": 25, "model-mixer-large": 39}),
        ("sd3/2b", {"model-mixer": 25}),
        ("sd3/3.5-medium", {"model-mixer": 25}),
        ("sd3/3.5-large", {"model-mixer-large": 39}),
        ("flux", {"model-mixer": 58, "supermerger": 61}),
        ("generic", {}),
    ],
)
def test_block_weights_can_be_pasted_in_every_order_that_people_use(name: str, counts: dict[str, int]):
    """
    A list is known by how many values it has; it names blocks and parts that there are, none twice, and every layer or its parts.
    """
    architecture = architecture_named(name)
    assert counts == {order: len(names) for order, names in architecture.lists.items()}
    assert counts == {order: len(names) for order, names in architecture.spelled.items()}
    for names in architecture.lists.values():
        assert len(set(counts.values())) == len(counts)
        said = [listed for listed in names if listed]
        assert len(set(said)) == len(said)
        assert set(said) <= {*architecture.blocks, *architecture.parts}
        assert set(architecture.depth) <= {architecture.parts[listed][0] if listed in architecture.parts else listed for listed in said}


def test_weights_for_sd1_are_folded_to_those_of_sdxl():
    """
    Of 26 values, those of IN09 to IN11 and OUT09 to OUT11 are dropped.
    """
    folded = dict(zip(architecture_named("sd1").lists["mbw"], architecture_named("sdxl").lists["mbw-sd1"], strict=True))
    assert ["IN09", "IN10", "IN11", "OUT09", "OUT10", "OUT11"] == [block for block, kept in folded.items() if not kept]
    assert [] == [block for block, kept in folded.items() if kept not in {"", block}]


def deep_name(tensor: str) -> str:
    """Say what supermerger calls the place of an SDXL tensor: letters, then the numbers of block, module and transformer layer."""
    for word, name in {"time_embed": "TIME", "label_emb": "LABEL", "first_stage": "VAE", "embedders.0": "CLIPL", "embedders.1": "CLIPG"}.items():
        if word in tensor:
            return name
    if UNET + "out." in tensor:
        return "OUT9"
    letters, numbers = re.search(r"(in|mid|out)(?:put|dle)_blocks?\.([\d.]+)\.", tensor).groups()
    layer = re.search(r"transformer_blocks\.(\d+)", tensor)
    where = numbers.replace(".", "") + ("0" if letters == "mid" else "")
    return letters.upper() + where + (layer[1] if layer else "")


def test_deep_blocks_of_sdxl_are_those_of_supermerger():
    """
    Every tensor has the part whose name stands where supermerger's stands in the list of 110; its IN0 holds nothing.
    """
    sdxl = architecture_named("sdxl")
    ours = dict(zip(sdxl.spelled["deep"], sdxl.lists["deep"], strict=True))
    layout = sdxl.layout()
    assert {t: ours[deep_name(t)] for t in layout} == {t: sdxl.block_of(t)[1] for t in layout}
    assert ["IN0"] == [theirs for theirs, part in ours.items() if not part]


@pytest.mark.parametrize(
    ("name", "order", "words", "blocks"),
    [
        ("sd3", "model-mixer", ["BASE", "IN00", "IN23"], ["BASE", "J00", "J23"]),
        ("sd3/3.5-large", "model-mixer-large", ["IN24", "IN37"], ["J24", "J37"]),
        ("flux", "model-mixer", ["BASE", "DOUBLE18", "SINGLE00"], ["BASE", "D18", "S00"]),
        ("flux", "supermerger", ["CLIP", "T5", "IN", "D00", "S37", "OUT"], ["CLIP_L", "T5", "IN", "D00", "S37", "OUT"]),
        ("sdxl", "mbw", ["IN08", "M00"], ["IN08", "M00"]),
    ],
)
def test_what_a_tool_calls_a_block_is_known(name: str, order: str, words: list[str], blocks: list[str]):
    """
    A list has the tool's own words beside ours.
    """
    architecture = architecture_named(name)
    ours = dict(zip(architecture.spelled[order], architecture.lists[order], strict=True))
    assert blocks == [ours[word] for word in words]


@pytest.mark.parametrize(
    ("name", "tool", "follows"),
    [
        ("sd1", "mbw@1", {"TIME": "IN00", "OUT": "OUT11", "CLIP_L": BASE, "VAE": BASE}),
        ("sd1", "supermerger@1", {"TIME": "IN00", "OUT": "OUT11", "CLIP_L": BASE, "VAE": BASE}),
        ("sd1", "sd-meh@1", {"TIME": "IN00", "OUT": "OUT11", "CLIP_L": BASE, "VAE": BASE}),
        ("sd1", "sd-mecha@1", {"TIME": BASE, "OUT": "OUT11", "CLIP_L": BASE, "VAE": BASE}),
        ("sd1", "chattiori@1", {"TIME": "OUT11", "OUT": "OUT11", "CLIP_L": BASE, "VAE": BASE}),
        ("sdxl", "mbw@1", {"TIME": "IN00", "LABEL": "IN00", "OUT": "OUT08", "VAE": BASE}),
        ("sdxl", "supermerger@1", {"TIME": "IN00", "LABEL": "IN00", "OUT": "OUT08", "VAE": BASE}),
        ("sdxl", "sd-mecha@1", {"TIME": BASE, "LABEL": BASE, "OUT": "OUT08", "VAE": BASE}),
        ("sdxl", "chattiori@1", {"TIME": "", "LABEL": "", "OUT": "OUT08", "VAE": BASE}),
        ("flux", "supermerger@1", {"VAE": ""}),
    ],
)
def test_parts_follow_other_blocks_in_other_tools(name: str, tool: str, follows: dict[str, str]):
    """
    The time embedding is with the first block in MBW, with BASE in sd-mecha, with the last block or nowhere in Chattiori.
    """
    architecture = architecture_named(name)
    differs = architecture.maps[tool]
    assert follows == {part: differs.get(part, architecture.parts[part][0]) for part in follows}


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_block_maps_speak_of_parts_and_blocks_that_there_are(name: str):
    """
    Ours is the one that parts follow without being told.
    """
    architecture = architecture_named(name)
    assert {} == architecture.maps[OURS]
    for follows in architecture.maps.values():
        assert follows.keys() <= architecture.parts.keys()
        assert set(follows.values()) <= {"", *architecture.blocks}


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
    Keys hold the family and a digest of what can change a tensor; its variants have the same, for they change none.
    """
    prints = [architecture_named(name).fingerprint for name in ARCHITECTURES]
    assert len(ARCHITECTURES) == len(set(prints))
    assert all(mark.startswith(f"{name}@") for name, mark in zip(ARCHITECTURES, prints, strict=True))
    assert set(prints) == {architecture_named(name).fingerprint for name in architecture_names()}


@pytest.mark.parametrize("name", ["", "sd", "sd1/", "sd3/3.5", "/2b", "sd3/2b/", "sdxl/refiner", "sdxl/2b", "parts"])
def test_a_recipe_names_a_family_or_one_of_its_variants(name: str):
    """
    Nothing else is an architecture.
    """
    assert not is_architecture(name)
    assert all(is_architecture(known) for known in architecture_names())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("IN{00..02}", ["IN00", "IN01", "IN02"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{q,k}.{0..1}", ["q.0", "q.1", "k.0", "k.1"]),
        ("out", ["out"]),
    ],
)
def test_braces_stand_for_several_names(pattern: str, names: list[str]):
    """
    Ranges hold both ends and are as wide as their first number.
    """
    assert names == [name for name, _ in spell(pattern)]


def test_a_letter_stands_for_what_was_picked():
    """
    Numbers without leading zeros, as tensor names have them.
    """
    assert [("IN08.a", {"n": "8", "w": "a"}), ("IN09.a", {"n": "9", "w": "a"})] == list(spell("IN{n=08..09}.{w=a}"))


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
