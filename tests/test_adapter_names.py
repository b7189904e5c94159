"""Names in adapters: whatever trainers call the modules of a model, each is found to be the tensor that it is."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping

import pytest
from adapters_made import KOHYA, PEFT, RANK, factors, lora, loras, specs
from test_architectures import REAL, real_layout
from test_folder import clip_g_names, unet_blocks, unet_name

from sdmerge_build.adapters import Adapter, Change, misfit, read_adapter
from sdmerge_build.adapters.writing import modules_of
from sdmerge_build.architectures import Architecture, architecture_named, architecture_names, diffusers_names
from sdmerge_build.tensorfile import Spec

UNET = "model.diffusion_model."
CLIP_1 = "cond_stage_model.transformer."
CLIP_H = "cond_stage_model.model."
CLIP_L = "conditioner.embedders.0.transformer."
CLIP_G = "conditioner.embedders.1.model."
TEXT = "text_encoders."
KNOWN = [name for name in architecture_names() if name != "generic"]
MODERN = ["sd3/2b", "sd3/3.5-medium", "sd3/3.5-large", "flux/dev", "flux/schnell"]

Shape = tuple[int, ...]

OWN = {
    "sd1": {UNET: ["lora_unet_", "diffusion_model.", UNET], CLIP_1: ["lora_te_", "lora_te1_", "text_encoder.", CLIP_1]},
    "sd2": {UNET: ["lora_unet_", "diffusion_model.", UNET], CLIP_H: [CLIP_H]},
    "sdxl": {UNET: ["lora_unet_", "diffusion_model.", UNET], CLIP_L: ["lora_te1_", "text_encoder."], CLIP_G: [CLIP_G]},
    "sdxl-refiner": {UNET: ["lora_unet_", "diffusion_model.", UNET]},
    "sd3": {
        UNET: ["lora_unet_", "diffusion_model.", UNET],
        f"{TEXT}clip_l.transformer.": ["lora_te1_", "text_encoder.", f"{TEXT}clip_l.transformer."],
        f"{TEXT}clip_g.transformer.": ["lora_te2_", "text_encoder_2.", f"{TEXT}clip_g.transformer."],
        f"{TEXT}t5xxl.transformer.": ["lora_te3_", "text_encoder_3.", f"{TEXT}t5xxl.transformer."],
    },
    "flux": {
        UNET: ["lora_unet_", "diffusion_model.", UNET, ""],
        f"{TEXT}clip_l.transformer.": ["lora_te1_", "text_encoder.", f"{TEXT}clip_l.transformer."],
        f"{TEXT}t5xxl.transformer.": ["lora_te3_", "lora_te2_", "text_encoder_2.", f"{TEXT}t5xxl.transformer."],
    },
}
"""What trainers put before a checkpoint's own names: prefix in the checkpoint → prefixes in adapters."""


def weights(layout: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    """List the linear and convolutional weights below a prefix, and embeddings with them."""
    return {name: shape for name, shape in layout.items() if name.startswith(prefix) and name.endswith(".weight") and len(shape) in {2, 4}}


def spelled(prefix: str, module: str) -> str:
    """Put a module behind a prefix; underscores follow underscores."""
    return prefix + (module.replace(".", "_") if prefix.endswith("_") else module)


def layout_of(name: str) -> dict[str, Shape]:
    """Return names and shapes: of real checkpoints, where these are at hand."""
    known = {ours: theirs for theirs, ours in REAL.items()}
    if name in known:
        return {tensor: tuple(facts["shape"]) for tensor, facts in real_layout(known[name]).items()}
    return architecture_named(name).layout()


def check_whole(adapter: Adapter, targets: Mapping[str, Shape], tensors: Mapping[str, Spec]) -> None:
    """Demand that an adapter changes these tensors and no others, each as a whole, and fits them."""
    assert ((), ()) == (adapter.strays, adapter.incomplete)
    assert set(targets) == set(adapter.changes)
    for target, changes in adapter.changes.items():
        [change] = changes
        assert (target, None, None, False) == (change.target, change.rows, change.taken, change.turned)
        assert "" == misfit(change, factors(change, tensors), targets[target])


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner", *MODERN])
@pytest.mark.parametrize("endings", [KOHYA, PEFT], ids=["kohya", "peft"])
def test_every_weight_is_found_by_its_own_name(name: str, endings: Mapping[str, str]):
    """
    A checkpoint's own names, behind whatever trainers put before them, are its tensors.
    """
    layout, architecture = layout_of(name), architecture_named(name)
    for prefix, others in OWN[architecture.name].items():
        targets = weights(layout, prefix)
        assert targets
        for other in others:
            modules = [(spelled(other, target.removeprefix(prefix).removesuffix(".weight")), shape) for target, shape in targets.items()]
            tensors = loras(modules, endings)
            check_whole(read_adapter(tensors, architecture), targets, tensors)


LEVELS = {
    "sd1": [True, True, True, False],
    "sd2": [True, True, True, False],
    "sdxl": [False, True, True],
    "sdxl-refiner": [False, True, True, False],
}
UNET_PREFIXES = ["lora_unet_", "oft_unet_", "lycoris_", "unet.", "base_model.model.", "unet.base_model.model.", "base_model.model.unet.", ""]


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("prefix", UNET_PREFIXES)
def test_every_weight_of_a_unet_is_found_by_its_name_in_diffusers(name: str, prefix: str):
    """
    Blocks are counted as the two libraries' constructors do: adapters in diffusers' names reach every weight of a UNet.
    """
    pairs, architecture = unet_blocks(LEVELS[name]), architecture_named(name)
    targets = weights(layout_of(name), UNET)
    modules = [(spelled(prefix, unet_name(target.removeprefix(UNET), pairs).removesuffix(".weight")), shape) for target, shape in targets.items()]
    tensors = loras(modules)
    check_whole(read_adapter(tensors, architecture), targets, tensors)


@pytest.mark.parametrize(
    ("name", "prefix", "others"),
    [
        ("sd2", CLIP_H, ["lora_te_", "text_encoder.", f"{TEXT}clip_h.transformer."]),
        ("sdxl", CLIP_G, ["lora_te2_", "text_encoder_2.", "text_encoder_2.base_model.model.", f"{TEXT}clip_g.transformer."]),
        ("sdxl-refiner", "conditioner.embedders.0.model.", ["lora_te_", "text_encoder_2."]),
    ],
)
def test_every_weight_of_an_openclip_is_found_by_its_name_in_transformers(name: str, prefix: str, others: list[str]):
    """
    q, k and v are thirds of the rows of one tensor, in this order; the projection lies transposed.
    """
    layout, architecture = layout_of(name), architecture_named(name)
    held = {n: shape for n, shape in layout.items() if n.startswith(prefix) and len(shape) == 2}
    for other in others:
        modules, wanted = [], {}
        for target, shape in held.items():
            theirs, how = clip_g_names(target.removeprefix(prefix))
            count = shape[0] // len(theirs)
            modules += [(spelled(other, module.removesuffix(".weight")), (count, *shape[1:])) for module in theirs]
            wanted[target] = [(n * count, count) if how == "stacked" else None for n in range(len(theirs))]
        tensors = loras(modules)
        adapter = read_adapter(tensors, architecture)
        assert ((), ()) == (adapter.strays, adapter.incomplete)
        assert wanted == {target: [change.rows for change in changes] for target, changes in adapter.changes.items()}
        turned = {target for target, changes in adapter.changes.items() if any(change.turned for change in changes)}
        assert {f"{prefix}text_projection"} == turned
        for target, changes in adapter.changes.items():
            assert [""] * len(changes) == [misfit(change, factors(change, tensors), held[target]) for change in changes]


# Written by hand, by what diffusers' converters say (`loaders/single_file_utils.py`), block by block, for the numbers of the layouts above.

SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_FUSED = {"attn.to_{}": "x_block.attn.qkv", "attn.add_{}_proj": "context_block.attn.qkv", "attn2.to_{}": "x_block.attn2.qkv"}
FLUX_BLOCK = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_FUSED = {"attn.to_{}": "img_attn.qkv", "attn.add_{}_proj": "txt_attn.qkv"}
ENDS = {
    "sd3": {
        "context_embedder": "context_embedder",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    "flux": {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
}

Place = tuple[str, tuple[int, int] | None, tuple[int, int] | None]
"""Target, rows, and which rows of the module's these are."""


def transformer_names(name: str, layout: Mapping[str, Shape]) -> Iterator[tuple[str, Shape, list[Place]]]:
    """Yield diffusers' modules of a transformer, the shapes of their weights, and where these are."""
    family, _, variant = name.partition("/")
    last = {"2b": 23, "3.5-medium": 23, "3.5-large": 37}.get(variant)
    swapped = {UNET + "final_layer.adaLN_modulation.1.weight", f"{UNET}joint_blocks.{last}.context_block.adaLN_modulation.1.weight"}
    whole = dict(ENDS[family])
    fused: dict[str, tuple[str, int, int]] = {}
    for i in range(38):
        block, theirs = ("joint_blocks", SD3_BLOCK) if family == "sd3" else ("double_blocks", FLUX_BLOCK)
        whole |= {f"transformer_blocks.{i}.{their}": f"{block}.{i}.{our}" for their, our in theirs.items()}
        for their, our in (SD3_FUSED if family == "sd3" else FLUX_FUSED).items():
            fused |= {f"transformer_blocks.{i}.{their.format(x)}": (f"{block}.{i}.{our}", n, 1) for n, x in enumerate("qkv")}
        whole |= {f"single_transformer_blocks.{i}.norm.linear": f"single_blocks.{i}.modulation.lin"}
        whole |= {f"single_transformer_blocks.{i}.proj_out": f"single_blocks.{i}.linear2"}
        fused |= {f"single_transformer_blocks.{i}.attn.to_{x}": (f"single_blocks.{i}.linear1", n, 1) for n, x in enumerate("qkv")}
        fused |= {f"single_transformer_blocks.{i}.proj_mlp": (f"single_blocks.{i}.linear1", 3, 4)}
    for module, ours in whole.items():
        target = f"{UNET}{ours}.weight"
        if shape := layout.get(target):
            half = shape[0] // 2
            halves = [(target, (0, half), (half, half)), (target, (half, half), (0, half))]
            yield module, shape, halves if target in swapped else [(target, None, None)]
    for module, (ours, first, count) in fused.items():
        target = f"{UNET}{ours}.weight"
        if shape := layout.get(target):
            unit = shape[1]  # as many rows as columns: heads have the width of the model
            yield module, (count * unit, shape[1]), [(target, (first * unit, count * unit), None)]


@pytest.mark.parametrize("name", MODERN)
@pytest.mark.parametrize("prefix", ["lora_transformer_", "lora_unet_", "lycoris_", "transformer.", "base_model.model.", ""])
def test_every_weight_of_a_transformer_is_found_by_its_name_in_diffusers(name: str, prefix: str):
    """
    q, k, v and the feed-forward beside them are rows of one tensor; where diffusers has scale before shift, the halves change places.
    """
    layout, architecture = layout_of(name), architecture_named(name)
    oracle = list(transformer_names(name, layout))
    tensors = loras((spelled(prefix, module), shape) for module, shape, _ in oracle)
    adapter = read_adapter(tensors, architecture)
    assert ((), ()) == (adapter.strays, adapter.incomplete)
    wanted = sorted(place for _, _, places in oracle for place in places)
    assert wanted == sorted((c.target, c.rows, c.taken) for changes in adapter.changes.values() for c in changes)
    assert set(weights(layout, UNET)) == set(adapter.changes)
    for target, changes in adapter.changes.items():
        assert [""] * len(changes) == [misfit(change, factors(change, tensors), layout[target]) for change in changes]
        parts = [change.rows for change in changes if change.rows]
        assert sum(count for _, count in parts) in {0, layout[target][0]}


HAND = {
    "sd1": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj": "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj",
        "lora_unet_up_blocks_1_attentions_2_proj_in": "output_blocks.5.1.proj_in",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0": "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0",
        "lora_unet_mid_block_attentions_0_proj_out": "middle_block.1.proj_out",
        "lora_unet_mid_block_resnets_1_conv2": "middle_block.2.out_layers.3",
        "lora_unet_down_blocks_1_downsamplers_0_conv": "input_blocks.6.0.op",
        "lora_unet_up_blocks_0_upsamplers_0_conv": "output_blocks.2.1.conv",
        "lora_unet_up_blocks_2_upsamplers_0_conv": "output_blocks.8.2.conv",
        "lora_unet_up_blocks_1_resnets_0_conv_shortcut": "output_blocks.3.0.skip_connection",
        "lora_unet_down_blocks_3_resnets_1_time_emb_proj": "input_blocks.11.0.emb_layers.1",
        "lora_unet_time_embedding_linear_2": "time_embed.2",
        "lora_unet_conv_in": "input_blocks.0.0",
        "lora_unet_conv_out": "out.2",
        "lora_unet_input_blocks_4_1_proj_in": "input_blocks.4.1.proj_in",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": "input_blocks.1.1.transformer_blocks.0.attn1.to_k",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora": "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_lora": "middle_block.1.transformer_blocks.0.attn2.to_v",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": CLIP_1 + "text_model.encoder.layers.0.self_attn.q_proj",
        "lora_te_text_model_encoder_layers_11_mlp_fc2": CLIP_1 + "text_model.encoder.layers.11.mlp.fc2",
        "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora": CLIP_1 + "text_model.encoder.layers.3.self_attn.out_proj",
        "text_encoder.text_model.encoder.layers.3.self_attn.to_k_lora": CLIP_1 + "text_model.encoder.layers.3.self_attn.k_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.4.mlp.fc1": CLIP_1 + "text_model.encoder.layers.4.mlp.fc1",
        "base_model.model.text_model.encoder.layers.4.mlp.fc2": CLIP_1 + "text_model.encoder.layers.4.mlp.fc2",
    },
    "sd2": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": "input_blocks.1.1.proj_in",
        "lora_unet_up_blocks_2_attentions_0_transformer_blocks_0_attn2_to_k": "output_blocks.6.1.transformer_blocks.0.attn2.to_k",
        "lora_te_text_model_encoder_layers_22_mlp_fc1": CLIP_H + "transformer.resblocks.22.mlp.c_fc",
        "lora_te_text_model_encoder_layers_0_mlp_fc2": CLIP_H + "transformer.resblocks.0.mlp.c_proj",
        "lora_te_text_model_encoder_layers_7_self_attn_out_proj": CLIP_H + "transformer.resblocks.7.attn.out_proj",
        "text_encoders.clip_h.transformer.text_model.encoder.layers.7.mlp.fc1": CLIP_H + "transformer.resblocks.7.mlp.c_fc",
        "lora_te_text_model_embeddings_token_embedding": CLIP_H + "token_embedding",
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_v": "input_blocks.4.1.transformer_blocks.1.attn2.to_v",
        "lora_unet_input_blocks_1_0_in_layers_2": "input_blocks.1.0.in_layers.2",
        "lora_unet_input_blocks_3_0_op": "input_blocks.3.0.op",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2": "middle_block.1.transformer_blocks.9.ff.net.2",
        "lora_unet_output_blocks_5_2_conv": "output_blocks.5.2.conv",
        "lora_unet_label_emb_0_0": "label_emb.0.0",
        "lora_unet_out_2": "out.2",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_out_0": "input_blocks.4.1.transformer_blocks.1.attn1.to_out.0",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn1_to_q": "input_blocks.8.1.transformer_blocks.9.attn1.to_q",
        "lora_unet_up_blocks_0_attentions_2_proj_out": "output_blocks.2.1.proj_out",
        "lora_unet_up_blocks_1_upsamplers_0_conv": "output_blocks.5.2.conv",
        "lora_unet_up_blocks_2_resnets_2_conv1": "output_blocks.8.0.in_layers.2",
        "unet.up_blocks.0.attentions.1.transformer_blocks.3.attn2.to_k": "output_blocks.1.1.transformer_blocks.3.attn2.to_k",
        "unet.add_embedding.linear_2": "label_emb.0.2",
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": "middle_block.1.transformer_blocks.0.ff.net.0.proj",
        "lora_te1_text_model_encoder_layers_10_mlp_fc1": CLIP_L + "text_model.encoder.layers.10.mlp.fc1",
        "text_encoder.text_model.encoder.layers.2.self_attn.v_proj": CLIP_L + "text_model.encoder.layers.2.self_attn.v_proj",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2": CLIP_G + "transformer.resblocks.31.mlp.c_proj",
        "text_encoder_2.text_model.encoder.layers.2.self_attn.out_proj": CLIP_G + "transformer.resblocks.2.attn.out_proj",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.2.mlp.fc1": CLIP_G + "transformer.resblocks.2.mlp.c_fc",
        "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc": CLIP_G + "transformer.resblocks.2.mlp.c_fc",
        "first_stage_model.decoder.conv_in": "first_stage_model.decoder.conv_in",
        "vae.decoder.up_blocks.0.resnets.1.conv1": "first_stage_model.decoder.up.3.block.1.conv1",
    },
    "sd3/2b": {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": "joint_blocks.0.x_block.attn.qkv",
        "lora_unet_joint_blocks_22_context_block_mlp_fc1": "joint_blocks.22.context_block.mlp.fc1",
        "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1": "joint_blocks.23.context_block.adaLN_modulation.1",
        "lora_unet_final_layer_adaLN_modulation_1": "final_layer.adaLN_modulation.1",
        "diffusion_model.joint_blocks.4.x_block.mlp.fc2": "joint_blocks.4.x_block.mlp.fc2",
        "transformer.transformer_blocks.4.ff_context.net.2": "joint_blocks.4.context_block.mlp.fc2",
        "transformer.transformer_blocks.22.norm1_context.linear": "joint_blocks.22.context_block.adaLN_modulation.1",
        "lora_transformer_transformer_blocks_4_attn_to_add_out": "joint_blocks.4.context_block.attn.proj",
        "lora_transformer_pos_embed_proj": "x_embedder.proj",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": f"{TEXT}clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "lora_te1_text_projection": f"{TEXT}clip_l.transformer.text_projection",
        "lora_te2_text_projection": f"{TEXT}clip_g.transformer.text_projection",
        "lora_te2_text_model_encoder_layers_31_self_attn_k_proj": f"{TEXT}clip_g.transformer.text_model.encoder.layers.31.self_attn.k_proj",
        "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0": f"{TEXT}t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_0",
        "text_encoder_3.encoder.block.23.layer.0.SelfAttention.q": f"{TEXT}t5xxl.transformer.encoder.block.23.layer.0.SelfAttention.q",
    },
    "sd3/3.5-large": {
        "lora_unet_joint_blocks_37_x_block_attn_qkv": "joint_blocks.37.x_block.attn.qkv",
        "transformer.transformer_blocks.23.norm1_context.linear": "joint_blocks.23.context_block.adaLN_modulation.1",
    },
    "sd3/3.5-medium": {
        "lora_unet_joint_blocks_12_x_block_attn2_qkv": "joint_blocks.12.x_block.attn2.qkv",
        "transformer.transformer_blocks.12.attn2.to_out.0": "joint_blocks.12.x_block.attn2.proj",
    },
    "flux/dev": {
        "lora_unet_double_blocks_0_img_attn_qkv": "double_blocks.0.img_attn.qkv",
        "lora_unet_double_blocks_18_txt_mlp_2": "double_blocks.18.txt_mlp.2",
        "lora_unet_single_blocks_0_linear1": "single_blocks.0.linear1",
        "lora_unet_single_blocks_37_modulation_lin": "single_blocks.37.modulation.lin",
        "lora_unet_guidance_in_in_layer": "guidance_in.in_layer",
        "lora_unet_final_layer_linear": "final_layer.linear",
        "lora_unet_img_in": "img_in",
        "diffusion_model.double_blocks.0.img_attn.qkv": "double_blocks.0.img_attn.qkv",
        "double_blocks.3.txt_attn.proj": "double_blocks.3.txt_attn.proj",
        "base_model.model.double_blocks.3.txt_mod.lin": "double_blocks.3.txt_mod.lin",
        "double_blocks.5.processor.qkv_lora2": "double_blocks.5.txt_attn.qkv",
        "double_blocks.5.processor.proj_lora1": "double_blocks.5.img_attn.proj",
        "single_blocks.5.processor.proj_lora": "single_blocks.5.linear2",
        "transformer.single_transformer_blocks.7.proj_out": "single_blocks.7.linear2",
        "transformer.single_transformer_blocks.7.norm.linear": "single_blocks.7.modulation.lin",
        "transformer.transformer_blocks.7.ff.net.0.proj": "double_blocks.7.img_mlp.0",
        "lora_transformer_transformer_blocks_7_attn_to_out_0": "double_blocks.7.img_attn.proj",
        "lycoris_transformer_blocks_7_ff_context_net_2": "double_blocks.7.txt_mlp.2",
        "lycoris_transformer_blocks_7_ff_linear_out": "double_blocks.7.img_mlp.2",
        "transformer.x_embedder": "img_in",
        "lora_te1_text_model_encoder_layers_5_self_attn_out_proj": f"{TEXT}clip_l.transformer.text_model.encoder.layers.5.self_attn.out_proj",
        "lora_te1_text_projection": f"{TEXT}clip_l.transformer.text_projection",
        "lora_te3_encoder_block_5_layer_1_DenseReluDense_wo": f"{TEXT}t5xxl.transformer.encoder.block.5.layer.1.DenseReluDense.wo",
        "lora_te2_encoder_block_5_layer_0_SelfAttention_o": f"{TEXT}t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.o",
        "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.v": f"{TEXT}t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.v",
    },
}
"""Modules as they are called in files that people share, and what they are; targets without a component are the UNet's or transformer's."""


@pytest.mark.parametrize(("name", "module", "ours"), [(name, *row) for name, rows in HAND.items() for row in rows.items()])
def test_a_name_is_the_tensor_that_people_mean(name: str, module: str, ours: str):
    """
    One module, one tensor, all of it.
    """
    target = f"{'' if ours.startswith(('text_encoders.', 'con', 'first_')) and ours != 'context_embedder' else UNET}{ours}.weight"
    adapter = read_adapter(specs(lora(module, 8, 8)), architecture_named(name))
    assert ((), ()) == (adapter.strays, adapter.incomplete)
    [[change]] = adapter.changes.values()
    assert (target, None, None, False) == (change.target, change.rows, change.taken, change.turned)


@pytest.mark.parametrize(
    ("name", "module", "target", "out", "rows"),
    [
        ("sd2", "lora_te_text_model_encoder_layers_4_self_attn_v_proj", CLIP_H + "transformer.resblocks.4.attn.in_proj_weight", 1024, (2048, 1024)),
        ("sdxl", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj", CLIP_G + "transformer.resblocks.0.attn.in_proj_weight", 1280, (0, 1280)),
        (
            "sdxl",
            "text_encoder_2.text_model.encoder.layers.9.self_attn.to_k_lora",
            CLIP_G + "transformer.resblocks.9.attn.in_proj_weight",
            1280,
            (1280, 1280),
        ),
        ("sd3/2b", "transformer.transformer_blocks.9.attn.add_v_proj", UNET + "joint_blocks.9.context_block.attn.qkv.weight", 1536, (3072, 1536)),
        ("sd3/3.5-large", "transformer.transformer_blocks.9.attn.to_k", UNET + "joint_blocks.9.x_block.attn.qkv.weight", 2432, (2432, 2432)),
        ("sd3/3.5-medium", "transformer.transformer_blocks.9.attn2.to_q", UNET + "joint_blocks.9.x_block.attn2.qkv.weight", 1536, (0, 1536)),
        ("flux/dev", "lora_transformer_transformer_blocks_2_attn_add_k_proj", UNET + "double_blocks.2.txt_attn.qkv.weight", 3072, (3072, 3072)),
        ("flux/dev", "transformer.single_transformer_blocks.0.attn.to_v", UNET + "single_blocks.0.linear1.weight", 3072, (6144, 3072)),
        ("flux/dev", "lycoris_single_transformer_blocks_0_proj_mlp", UNET + "single_blocks.0.linear1.weight", 12288, (9216, 12288)),
        ("flux/dev", "single_blocks.0.processor.qkv_lora", UNET + "single_blocks.0.linear1.weight", 9216, (0, 9216)),
        ("flux/dev", "diffusion_model.single_blocks.0.linear1_qkv", UNET + "single_blocks.0.linear1.weight", 9216, (0, 9216)),
    ],
)
def test_a_part_of_a_fused_tensor_is_its_rows(name: str, module: str, target: str, out: int, rows: tuple[int, int]):
    """
    Where a checkpoint has one tensor for what an adapter tells apart, a module changes its rows alone.
    """
    adapter = read_adapter(specs(lora(module, out, 8)), architecture_named(name))
    assert ((), ()) == (adapter.strays, adapter.incomplete)
    [[change]] = adapter.changes.values()
    assert (target, rows, None) == (change.target, change.rows, change.taken)


@pytest.mark.parametrize(
    ("name", "module", "target"),
    [
        ("flux/dev", "transformer.norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("sd3/2b", "lora_transformer_norm_out_linear", "final_layer.adaLN_modulation.1"),
        ("sd3/2b", "transformer.transformer_blocks.23.norm1_context.linear", "joint_blocks.23.context_block.adaLN_modulation.1"),
        ("sd3/3.5-large", "transformer.transformer_blocks.37.norm1_context.linear", "joint_blocks.37.context_block.adaLN_modulation.1"),
    ],
)
def test_halves_that_diffusers_keeps_in_the_other_order_change_places(name: str, module: str, target: str):
    """
    Scale and shift in diffusers are shift and scale in checkpoints.
    """
    tensors = specs(lora(module, 12, 6))
    [changes] = read_adapter(tensors, architecture_named(name)).changes.values()
    assert [(f"{UNET}{target}.weight", (0, 6), (6, 6)), (f"{UNET}{target}.weight", (6, 6), (0, 6))] == [(c.target, c.rows, c.taken) for c in changes]
    assert ["", ""] == [misfit(change, factors(change, tensors), (12, 6)) for change in changes]
    assert "" != misfit(changes[1], factors(changes[1], tensors), (10, 6))
    bias = read_adapter(specs({f"{module}.diff_b": (12,)}), architecture_named(name)).changes[f"{UNET}{target}.bias"]
    assert [((0, 6), (6, 6)), ((6, 6), (0, 6))] == [(c.rows, c.taken) for c in bias]


def test_what_does_not_come_apart_is_not_read_where_halves_change_places():
    """
    A Kronecker product has no halves to change.
    """
    adapter = read_adapter(specs({"transformer.norm_out.linear.lokr_w1": (3, 2), "transformer.norm_out.linear.lokr_w2": (4, 3)}), FLUX)
    assert not adapter.changes
    [text] = adapter.incomplete
    assert "only lora, diff and set come apart" in text


FLUX = architecture_named("flux/dev")
SDXL = architecture_named("sdxl")


def test_a_family_has_the_names_of_all_its_variants_and_says_where_they_differ():
    """
    Whoever writes `sd3` alone may use an adapter of any size; one module is not the same in all of them.
    """
    family = architecture_named("sd3")
    for module in ("lora_unet_joint_blocks_37_x_block_attn_qkv", "lora_unet_joint_blocks_3_x_block_attn2_proj"):
        assert 1 == len(read_adapter(specs(lora(module, 8, 8)), family).changes)
    adapter = read_adapter(specs(lora("transformer.transformer_blocks.23.norm1_context.linear", 12, 6)), family)
    [text] = adapter.incomplete
    assert "is not the same in all variants" in text
    assert 'architecture = "sd3/VARIANT"' in text


def test_spellings_that_collide_mean_what_diffusers_means():
    """
    Dots become underscores, and yet no two tensors of a component come to share a name; but for open_clip's projection, which is one tensor.
    """
    for name in KNOWN:
        naming = diffusers_names(name)
        shared: dict[tuple[str, str], set[str]] = {}
        for (component, theirs), (ours, n) in naming.originals.items():
            shared.setdefault((component, re.sub(r"[._]", "_", theirs)), set()).add(f"{ours} {n}")
        assert {} == {key: found for key, found in shared.items() if len(found) > 1}
    for name in ("conditioner.embedders.1.model.text_projection", "lora_te2_text_projection"):
        [[change]] = read_adapter(specs(lora(name, 8, 8)), SDXL).changes.values()
        assert (CLIP_G + "text_projection", True) == (change.target, change.turned)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux/dev"])
def test_names_of_another_architecture_are_strays(name: str):
    """
    An adapter for something else is not taken for what it resembles.
    """
    foreign = ["lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_te4_text_model_encoder_layers_0_mlp_fc1", "lora_unet_blocks_0_ffn_0", "unet"]
    tensors = specs({name: shape for module in foreign for name, shape in lora(module, 8, 8).items()})
    adapter = read_adapter(tensors, architecture_named(name))
    assert (sorted(tensors), (), {}) == (list(adapter.strays), adapter.incomplete, adapter.changes)


def test_underscores_are_not_guessed():
    """
    A name that would be one with another dot in it, and one that a number continues, are strays.
    """
    for module in ("lora_unet_input_blocks_41_proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in_0", "lora_unet_", "lora_unet_out"):
        adapter = read_adapter(specs(lora(module, 8, 8)), SDXL)
        assert not adapter.changes


def test_the_names_of_an_architecture_are_known_soon():
    """
    Spelling out every name is done once, in a moment.
    """
    from sdmerge_build.adapters.spellings import _spelled, spellings_of

    for architecture in (SDXL, FLUX):
        spellings_of(architecture)
        _spelled.cache_clear()
        began = time.perf_counter()
        found = spellings_of(architecture)
        assert time.perf_counter() - began < 1
        assert spellings_of(architecture) is found


def test_a_rank_is_not_taken_for_a_row():
    """
    What is counted are the rows that factors make, whatever their rank.
    """
    tensors = specs(lora("transformer.single_transformer_blocks.0.attn.to_k", 6, 6))
    [[change]] = read_adapter(tensors, FLUX).changes.values()
    assert (6, 6) == change.rows
    assert RANK == tensors[change.factors["down"]].shape[0]


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_written_is_read(name: str):
    """
    Every module that we name ourselves is found where it was made for.
    """
    architecture = architecture_named(name)
    modules = [module for target, shape in architecture.layout().items() for module in modules_of(target, shape, architecture)]
    adapter = read_adapter({spec.name: spec for module in modules for spec in module.specs(RANK, "F16")}, architecture)
    assert ((), ()) == (adapter.strays, adapter.incomplete)
    written: dict[str, list[Change]] = {}
    for module in modules:
        written.setdefault(module.target, []).append(module.change())
    assert written == {target: list(changes) for target, changes in adapter.changes.items()}


def test_every_architecture_can_be_asked():
    """
    Families and variants alike.
    """
    for name in KNOWN:
        architecture: Architecture = architecture_named(name)
        prefix = "lora_unet_final_layer_linear" if architecture.name in {"sd3", "flux"} else "lora_unet_out_2"
        assert 1 == len(read_adapter(specs(lora(prefix, 8, 8)), architecture).changes)
