"""Checkpoints in several files: diffusers folders and shards are read as one state dict, under original names."""

from __future__ import annotations

import json
import random
import re
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import checkpoints
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

from sdmerge_build.architectures import architecture_named, folder_names, recognise, recognise_folder
from sdmerge_build.errors import IntegrityError, SdbuildError, SourceError
from sdmerge_build.formats.folder import Part, assemble, assembled, assembly_layout, choose_parts, find_parts, is_folder_checkpoint
from sdmerge_build.tensorfile import Header, Spec, read_header

FAMILIES = ["sd1", "sdxl"]
STEM = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
TEXT_ENCODER = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
UNET = "model.diffusion_model."
CLIP_G = "conditioner.embedders.1.model."
LAYER = "text_model.encoder.layers.0.self_attn."
IN_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

Names = dict[str, tuple[str, tuple[str, ...], str]]
"""Original name → component, names there, and what makes the original of them."""


# An oracle of its own: it counts blocks as the two libraries' constructors do, and knows nothing of tables.


def unet_blocks(attends: list[bool]) -> dict[str, str]:
    """Pair the blocks of a UNet, the original's with the folder's, by building both from the same levels."""
    pairs = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    pairs |= {"middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1"}
    pairs |= {f"time_embed.{2 * n}": f"time_embedding.linear_{n + 1}" for n in range(2)} | {
        f"label_emb.0.{2 * n}": f"add_embedding.linear_{n + 1}" for n in range(2)
    }
    block = 1
    for level, attending in enumerate(attends):
        for n in range(2):
            pairs[f"input_blocks.{block}.0"] = f"down_blocks.{level}.resnets.{n}"
            if attending:
                pairs[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{n}"
            block += 1
        if level < len(attends) - 1:
            pairs[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level, attending in enumerate(reversed(attends)):
        for n in range(3):
            modules = [f"up_blocks.{level}.resnets.{n}"]
            modules += [f"up_blocks.{level}.attentions.{n}"] if attending else []
            modules += [f"up_blocks.{level}.upsamplers.0"] if n == 2 and level < len(attends) - 1 else []
            pairs |= {f"output_blocks.{block}.{m}": module for m, module in enumerate(modules)}
            block += 1
    return pairs


def unet_name(name: str, pairs: Mapping[str, str]) -> str:
    ours = max((prefix for prefix in pairs if name.startswith(f"{prefix}.")), key=len)
    theirs, rest = pairs[ours], name.removeprefix(f"{ours}.")
    if "resnets" in theirs:
        inner, _, leaf = rest.rpartition(".")
        return f"{theirs}.{IN_RESNET[inner]}.{leaf}"
    return f"{theirs}.{rest}"


def vae_name(name: str) -> tuple[str, str]:
    for half, side in (("down", "encoder"), ("up", "decoder")):
        if found := re.fullmatch(rf"{side}\.{half}\.(\d)\.(block\.(\d)|{half}sample)\.(.*)", name):
            level, _, n, rest = found.groups()
            level = level if half == "down" else "0123"[::-1][int(level)]
            inner = f"resnets.{n}.{rest}" if n else f"{half}samplers.0.{rest}"
            return f"{side}.{half}_blocks.{level}.{inner}".replace("nin_shortcut", "conv_shortcut"), ""
    how = "widened" if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name) else ""
    words = [("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"), ("attn_1.norm", "attn_1.group_norm")]
    words += [("attn_1.proj_out", "attn_1.to_out.0"), ("attn_1.q", "attn_1.to_q"), ("attn_1.k", "attn_1.to_k"), ("attn_1.v", "attn_1.to_v")]
    words += [("mid.attn_1", "mid_block.attentions.0"), ("norm_out", "conv_norm_out")]
    for ours, theirs in words:
        name = name.replace(ours, theirs)
    return name, how


def clip_g_names(name: str) -> tuple[tuple[str, ...], str]:
    if found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", name):
        return tuple(f"text_model.encoder.layers.{found[1]}.self_attn.{x}_proj.{found[2]}" for x in "qkv"), "stacked"
    if name == "text_projection":
        return ("text_projection.weight",), "transposed"
    words = [("transformer.resblocks", "encoder.layers"), ("ln_final", "final_layer_norm"), ("ln_", "layer_norm"), (".attn.", ".self_attn.")]
    words += [("c_fc", "fc1"), ("c_proj", "fc2"), ("token_embedding", "embeddings.token_embedding")]
    words += [("positional_embedding", "embeddings.position_embedding.weight")]
    for ours, theirs in words:
        name = name.replace(ours, theirs)
    return (f"text_model.{name}",), ""


def oracle(family: str) -> Names:
    """Say where a folder keeps every tensor of a layout."""
    pairs = unet_blocks([True, True, True, False] if family == "sd1" else [False, True, True])
    where: Names = {}
    for name in architecture_named(family).layout():
        if name.startswith(UNET):
            where[name] = "unet", (unet_name(name.removeprefix(UNET), pairs),), ""
        elif name.startswith("first_stage_model."):
            theirs, how = vae_name(name.removeprefix("first_stage_model."))
            where[name] = "vae", (theirs,), how
        elif name.startswith(TEXT_ENCODER[family]):
            where[name] = "text_encoder", (name.removeprefix(TEXT_ENCODER[family]),), ""
        elif name != CLIP_G + "logit_scale":
            where[name] = "text_encoder_2", *clip_g_names(name.removeprefix(CLIP_G))
    return where


def pieces(shape: tuple[int, ...], how: str) -> list[tuple[int, ...]]:
    """Say the shapes of the tensors that an original is made of."""
    if how == "stacked":
        return [(shape[0] // 3, *shape[1:])] * 3
    return [shape[:2] if how == "widened" else shape[::-1] if how == "transposed" else shape]


def header(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Header:
    """Make a header without a file."""
    return Header(tensors={name: Spec(name, dtype, shape) for name, shape in shapes.items()}, metadata={}, data_start=8, file_size=8)


def full_size(family: str) -> dict[Part, Header]:
    """Make the headers of a folder as large as real ones are."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    layout = architecture_named(family).layout()
    for name, (component, names, how) in oracle(family).items():
        shapes.setdefault(component, {}).update(zip(names, pieces(layout[name], how), strict=True))
    return {Part(component, f"{component}/{STEM[component]}.safetensors"): header(held) for component, held in shapes.items()}


def small(size: int) -> int:
    return size if size <= 4 else 3 * small(1280) if size == 3840 else 4 + size % 7


def miniature(family: str) -> dict[str, torch.Tensor]:
    """Make the original state dict of a family: every name, small shapes, those that are stacked still three times as high."""
    tensors = {}
    for n, (name, shape) in enumerate(architecture_named(family).layout().items()):
        if name == CLIP_G + "logit_scale":
            continue
        generator = torch.Generator().manual_seed(n)  # no two tensors alike: a swap must show
        tensors[name] = torch.randn(tuple(map(small, shape)), generator=generator).half()
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(77).reshape(1, 77)
    return tensors


def as_folder(tensors: Mapping[str, torch.Tensor], family: str) -> dict[str, dict[str, torch.Tensor]]:
    """Turn a state dict into a folder's components, with torch."""
    components: dict[str, dict[str, torch.Tensor]] = {}
    for name, (component, names, how) in oracle(family).items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if how == "transposed":
            tensor = tensor.T
        elif how == "widened":
            tensor = tensor.squeeze(3).squeeze(2)
        components.setdefault(component, {}).update(zip(names, tensor.chunk(len(names)) if how == "stacked" else [tensor], strict=True))
    return components


def write_folder(root: Path, components: Mapping[str, Mapping[str, torch.Tensor]], *, variant: str = "", shards: int = 0) -> Path:
    """Write a diffusers folder, each component whole or in shards."""
    for component, tensors in components.items():
        stem = STEM.get(component, "diffusion_pytorch_model")
        if not shards:
            checkpoints.write(root / component / f"{stem}{variant}.safetensors", tensors)
            continue
        write_shards(root / component, f"{stem}{variant}", f"{stem}.safetensors.index{variant}.json", tensors, shards)
    write_index(root, components)
    return root


def write_index(root: Path, components: Mapping[str, object], **more: object) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    known = {component: ["diffusers", "AnyModel"] for component in components}
    table = {"_class_name": "AnyPipeline", "scheduler": ["diffusers", "S"], "safety_checker": [None, None], "force_zeros": True, **known, **more}
    (root / "model_index.json").write_text(json.dumps(table))
    return root


def write_shards(folder: Path, stem: str, index: str, tensors: Mapping[str, torch.Tensor], count: int) -> Path:
    """Write tensors in shards, dealt out in no order that anyone sorts by."""
    names = sorted(tensors)
    random.Random(stem).shuffle(names)
    weight_map = {}
    for n in range(count):
        file = f"{stem}-{n + 1:05}-of-{count:05}.safetensors"
        checkpoints.write(folder / file, {name: tensors[name] for name in names[n::count]})
        weight_map |= dict.fromkeys(names[n::count], file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder / index


def headers_of(root: Path, parts: tuple[Part, ...]) -> dict[Part, Header]:
    return {part: read_header(root / part.path) for part in parts}


def assembled_file(path: Path, target: Path) -> Path:
    """Do all of it: find, read headers, assemble; and check what is said of the result."""
    root, parts = find_parts(path)
    heard: list[int] = []
    written = assemble(root, parts, headers_of(root, parts), target, heard.append)
    result = read_header(target)
    assert tuple(result.tensors.values()) == assembled(headers_of(root, parts))
    assert written.size == target.stat().st_size == assembly_layout(headers_of(root, parts)).size
    assert sum(heard) == result.file_size - result.data_start
    return target


def complaints(error: pytest.ExceptionInfo[SdbuildError]) -> str:
    return str(error.value)


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Compare state dicts bit by bit."""
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and first[n].shape == second[n].shape and torch.equal(first[n], second[n]) for n in first
    )


@pytest.mark.parametrize(
    ("family", "count", "digest"),
    [
        ("sd1", 1130, "475cc63d71a63e502e67696c9b9588aa1c6b82c7800736c73a46b3572192b8f6"),
        ("sdxl", 2641, "7348c052d40151c3edf6c7ff5904189312b875078afc29d6b6c9101ade38e4dd"),
    ],
)
def test_the_oracle_knows_the_names_that_diffusers_writes(family: str, count: int, digest: str):
    """
    Names and shapes are those of diffusers 0.42.1 and transformers 5.23 for the configurations of SD 1.5 and SDXL.
    """
    shapes = {f"{part.component}.{name}": spec.shape for part, held in full_size(family).items() for name, spec in held.tensors.items()}
    lines = [f"{name} {'x'.join(map(str, shape))}\n" for name, shape in sorted(shapes.items()) if not name.endswith("position_ids")]
    assert count == len(lines)
    assert digest == blake3("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_original_name_is_made_once_in_its_shape(family: str):
    """
    A folder of real size makes the layout, name by name and shape by shape; only `logit_scale`, which folders lack, is missing.
    """
    layout = architecture_named(family).layout()
    layout.pop(CLIP_G + "logit_scale", None)
    made = assembled(full_size(family))
    assert len(layout) == len(made)
    assert layout == {spec.name: spec.shape for spec in made}
    assert family == recognise({spec.name: spec for spec in made}).name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_the_oracle_says(family: str):
    """
    Every original has one place, no two share one, and all are where the oracle says: the table can be read both ways.
    """
    names = folder_names(family)
    assert oracle(family) == {name: (place.component, place.names, place.how) for name, place in names.places.items()}
    spots = [(place.component, name) for place in names.places.values() for name in place.names]
    assert len(spots) == len(set(spots))
    assert [] == [
        (place, n) for place, (original, n) in names.originals.items() if place in set(spots) and names.places[original].names[n] != place[1]
    ]


def test_nothing_is_known_of_other_folders():
    """
    SD 2, SDXL's refiner and Flux are not taken for what they resemble.
    """
    unet = ["unet.down_blocks.3.resnets.0.conv1.weight", "unet.conv_in.weight"]
    assert "sd1" == recognise_folder(unet).architecture
    assert recognise_folder([*unet, "text_encoder.text_model.encoder.layers.12.layer_norm1.weight"]) is None
    assert recognise_folder([*unet, "unet.add_embedding.linear_1.weight"]) is None
    assert recognise_folder(["transformer.x_embedder.weight"]) is None
    assert folder_names("generic") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_the_original_state_dict(tmp_path: Path, family: str):
    """
    Every number is where the original has it, whoever reads the file; and shards, their order and their number change no byte.
    """
    tensors = miniature(family)
    components = as_folder(tensors, family)
    whole = assembled_file(write_folder(tmp_path / "whole", components), tmp_path / "whole.safetensors")
    assert equal(tensors, load_file(whole))
    with safe_open(whole, "pt") as file:
        assert {"format": "pt"} == file.metadata()
    shards = write_folder(tmp_path / "shards", components, shards=5)
    assert whole.read_bytes() == assembled_file(shards, tmp_path / "shards.safetensors").read_bytes()
    assert whole.read_bytes() == assembled_file(shards / "model_index.json", tmp_path / "again.safetensors").read_bytes()
    root, parts = find_parts(shards)
    mixed = random.Random(1).sample(parts, len(parts))
    assemble(root, mixed, dict(reversed(headers_of(root, parts).items())), tmp_path / "mixed.safetensors", lambda _: None)
    assert whole.read_bytes() == (tmp_path / "mixed.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_spellings_are_the_same_tensors(tmp_path: Path, family: str):
    """
    Older attention names of the VAE, 1×1 convolutions there, and text encoders without `text_model` make the same file.
    """
    components = as_folder(miniature(family), family)
    new = assembled_file(write_folder(tmp_path / "new", components), tmp_path / "new.safetensors")
    older = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
    vae = components["vae"]
    for ours, theirs in older:
        vae = {name.replace(f".{ours}.", f".{theirs}."): tensor for name, tensor in vae.items()}
    components["vae"] = {n: t[:, :, None, None] if n.endswith("query.weight") else t for n, t in vae.items()}
    components["text_encoder"] = {name.removeprefix("text_model."): tensor for name, tensor in components["text_encoder"].items()}
    old = assembled_file(write_folder(tmp_path / "old", components), tmp_path / "old.safetensors")
    assert new.read_bytes() == old.read_bytes()


def test_position_ids_of_the_second_text_encoder_are_dropped():
    """
    What folders of older transformers hold and the original has no name for is left out.
    """
    headers = full_size("sdxl")
    part = next(part for part in headers if part.component == "text_encoder_2")
    more = header({"text_model.embeddings.position_ids": (1, 77)}, "I64").tensors
    longer = Header(tensors={**headers[part].tensors, **more}, metadata={}, data_start=8, file_size=8)
    assert assembled(headers) == assembled(headers | {part: longer})


@pytest.mark.parametrize("dtype", ["U8", "F16", "F32", "F64"])
def test_a_projection_is_transposed_bit_by_bit(tmp_path: Path, dtype: str):
    """
    Rows become columns in every width, also where there are more of one than of the other.
    """
    kinds = {"U8": torch.uint8, **checkpoints.DTYPES}
    matrix = torch.arange(15).reshape(3, 5).to(kinds[dtype])
    components = {"unet": {"add_embedding.linear_1.weight": torch.ones(2, 2)}, "text_encoder_2": {"text_projection.weight": matrix}}
    made = load_file(assembled_file(write_folder(tmp_path / "f", components), tmp_path / "t.safetensors"))
    assert torch.equal(matrix.T, made[CLIP_G + "text_projection"])


def test_a_hostile_projection_takes_no_time_and_no_memory(tmp_path: Path):
    """
    A matrix without rows has no columns to go through, however many it claims; a large one is refused.
    """
    table = {"text_projection.weight": {"dtype": "F16", "shape": [0, 2**61], "data_offsets": [0, 0]}}
    raw = json.dumps(table).encode()
    root = write_folder(tmp_path / "f", {"unet": {"add_embedding.linear_1.weight": torch.ones(2, 2)}})
    (root / "text_encoder_2").mkdir()
    (root / "text_encoder_2" / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    write_index(root, {"unet": 1, "text_encoder_2": 1})
    made = read_header(assembled_file(root, tmp_path / "t.safetensors"))
    assert (2**61, 0) == made.tensors[CLIP_G + "text_projection"].shape
    for shape in ((2**20, 2**20), (4,), (2, 2, 2)):
        with pytest.raises(IntegrityError, match="not a matrix of at most"):
            assembled(sdxl_with("text_encoder_2", {"text_projection.weight": shape}))


def sdxl_with(component: str, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> dict[Part, Header]:
    """Make the headers of next to nothing, and of one component more."""
    return {Part("unet", "unet/u"): header({"add_embedding.linear_1.weight": (2, 2)}), Part(component, f"{component}/c"): header(shapes, dtype)}


def test_what_cannot_be_stacked_is_refused():
    """
    The three matrices of one tensor must all be there and be alike.
    """
    q, k, v = (f"{LAYER}{x}_proj.weight" for x in "qkv")
    with pytest.raises(IntegrityError) as error:
        assembled(sdxl_with("text_encoder_2", {q: (4, 4), v: (4, 4)}))
    assert f"`{k}`: not there, and `{CLIP_G}transformer.resblocks.0.attn.in_proj_weight` is made of `{q}`" in complaints(error)
    with pytest.raises(IntegrityError, match=r"q_proj.weight` F16 4×4.*v_proj.weight` F16 4×8: differ in dtype or shape"):
        assembled(sdxl_with("text_encoder_2", {q: (4, 4), k: (4, 4), v: (4, 8)}))
    part = Part("text_encoder_2", "more")
    with pytest.raises(IntegrityError, match=r"k_proj.weight` F32 4×4.*differ in dtype"):
        assembled(sdxl_with("text_encoder_2", {q: (4, 4), v: (4, 4)}) | {part: header({k: (4, 4)}, "F32")})
    for shape in ((), (2**61, 0)):
        with pytest.raises(IntegrityError, match="cannot be stacked"):
            assembled(sdxl_with("text_encoder_2", dict.fromkeys((q, k, v), shape)))


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 1), (4, 4, 3, 3)])
def test_what_cannot_be_widened_is_refused(shape: tuple[int, ...]):
    """
    An attention matrix of the VAE is a matrix or a 1×1 convolution.
    """
    with pytest.raises(IntegrityError, match="neither a matrix nor a 1×1 convolution"):
        assembled(sdxl_with("vae", {"encoder.mid_block.attentions.0.to_q.weight": shape}))


def test_names_nobody_knows_are_named():
    """
    A stray tensor of a known family is an error that names it and its file; blocks beyond the last are strays too.
    """
    with pytest.raises(IntegrityError) as error:
        assembled(sdxl_with("vae", {"encoder.lora.weight": (1,), "encoder.down_blocks.4.resnets.0.conv1.weight": (1,), "quant_conv.bias": (8,)}))
    assert (
        complaints(error)
        == "vae/c: `encoder.down_blocks.4.resnets.0.conv1.weight`, `encoder.lora.weight`: no such tensor is known of sdxl in diffusers folders"
    )


def test_families_without_a_table_keep_their_names(tmp_path: Path):
    """
    A folder of Flux is read under its components' names.
    """
    components = {"transformer": {"x_embedder.weight": torch.ones(3)}, "vae": {"encoder.conv_in.bias": torch.zeros(3)}}
    made = load_file(assembled_file(write_folder(tmp_path / "f", components), tmp_path / "t.safetensors"))
    assert {"transformer.x_embedder.weight", "vae.encoder.conv_in.bias"} == made.keys()


def test_shards_of_a_single_checkpoint_keep_their_names(tmp_path: Path):
    """
    An index by itself is a checkpoint; what a whole file of the same tensors holds is what comes of it, in any number of shards.
    """
    tensors = miniature("sd1")
    made = []
    for count in (1, 3, 40):
        index = write_shards(tmp_path / str(count), "model", "model.safetensors.index.json", tensors, count)
        assert is_folder_checkpoint(index)
        root, parts = find_parts(index)
        assert root == index.parent
        assert [""] * count == [part.component for part in parts]
        made.append(assembled_file(index, tmp_path / f"{count}.safetensors"))
    assert equal(tensors, load_file(made[0]))
    assert 1 == len({path.read_bytes() for path in made})


def test_what_an_index_says_of_its_shards_is_checked():
    """
    A tensor in another shard than the index says, one in no index and one in two shards are all named.
    """
    part, other = Part("", "a.safetensors", ("x", "y")), Part("", "b.safetensors", ("z",))
    with pytest.raises(IntegrityError) as error:
        assembled({part: header({"x": (1,)}), other: header({"y": (1,), "z": (1,), "x": (1,)})})
    text = complaints(error)
    assert "a.safetensors: does not hold `y`, as its index says" in text
    assert "b.safetensors: holds `x`, `y`, which its index does not place there" in text
    assert "b.safetensors: `x` is the same tensor as `x` of a.safetensors" in text


def test_two_spellings_of_one_tensor_are_refused():
    """
    A VAE with old and new names holds its attention twice, and nobody can tell which counts.
    """
    with pytest.raises(
        IntegrityError, match=r"`encoder.mid_block.attentions.0.query.bias` is the same tensor as `encoder.mid_block.attentions.0.to_q"
    ):
        assembled(sdxl_with("vae", {f"encoder.mid_block.attentions.0.{x}.bias": (4,) for x in ("to_q", "query")}))


def test_complaints_are_many_but_not_endless():
    """
    A thousand mistakes make twenty complaints and a count.
    """
    shapes = {f"l{n}": (1,) for n in range(1000)}
    with pytest.raises(IntegrityError) as error:
        assembled({Part("", "a"): header(shapes), Part("", "b"): header(shapes)})
    assert 21 == len(error.value.issues)
    assert complaints(error).endswith("and 980 complaints more")


def test_results_that_no_reader_takes_are_refused_at_once():
    """
    Too many tensors in all, and names that grow too long, are seen before anything is written.
    """
    with pytest.raises(IntegrityError, match="hold 60000 tensors"):
        assembled({Part("", str(n)): header({f"{n}.{m}": (1,) for m in range(30_000)}) for n in range(2)})
    with pytest.raises(IntegrityError, match="longer than 1024"):
        assembled({Part("vae", "a"): header({"n" * 1024: (1,)})})


# Which files make up a checkpoint.


def choose(files: Mapping[str, object], entry: str = "model_index.json") -> list[tuple[str, str]]:
    """Choose from a listing; JSON is given as what it says, or as bytes."""
    raw = {name: content if isinstance(content, bytes) else json.dumps(content).encode() for name, content in files.items()}
    return [(part.component, part.path) for part in choose_parts(entry, list(raw), raw.__getitem__)]


ANY = ["diffusers", "AnyModel"]


def test_the_files_of_a_folder_are_chosen():
    """
    Whole files before shards, full numbers before fp16, and each component by itself; what holds no weights of the model is left out.
    """
    index = dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker", "image_encoder", "tokenizer"), ANY)
    files = {
        "model_index.json": index | {"_class_name": "P", "feature_extractor": [None, None], "force": True},
        "unet/diffusion_pytorch_model.safetensors.index.json": {
            "weight_map": {"a": "s-1.safetensors", "b": "s-2.safetensors", "c": "s-1.safetensors"}
        },
        "unet/diffusion_pytorch_model.fp16.safetensors": b"",
        "unet/s-1.safetensors": b"",
        "unet/s-2.safetensors": b"",
        "vae/diffusion_pytorch_model.fp16.safetensors": b"",
        "vae/diffusion_pytorch_model.bin": b"",
        "text_encoder/model.safetensors": b"",
        "text_encoder/model.fp16.safetensors": b"",
        "text_encoder_2/model.safetensors.index.fp16.json": {"weight_map": {"a": "m.fp16-1.safetensors"}},
        "text_encoder_2/m.fp16-1.safetensors": b"",
        "safety_checker/model.safetensors": b"",
        "image_encoder/model.safetensors": b"",
        "v1-5-pruned.safetensors": b"",
    }
    assert choose(files) == [
        ("text_encoder", "text_encoder/model.safetensors"),
        ("text_encoder_2", "text_encoder_2/m.fp16-1.safetensors"),
        ("unet", "unet/s-1.safetensors"),
        ("unet", "unet/s-2.safetensors"),
        ("vae", "vae/diffusion_pytorch_model.fp16.safetensors"),
    ]
    raw = {name: json.dumps(content).encode() for name, content in files.items() if name.endswith(".json")}
    claimed = {part.path: part.claimed for part in choose_parts("model_index.json", files, raw.__getitem__)}
    assert ("a", "c") == claimed["unet/s-1.safetensors"]
    assert claimed["text_encoder/model.safetensors"] is None


def test_everything_missing_is_listed_at_once():
    """
    Components without files, pickles and lost shards: one complaint each, in one error.
    """
    files = {
        "model_index.json": dict.fromkeys(("unet", "vae", "text_encoder"), ANY),
        "unet/diffusion_pytorch_model.safetensors.index.json": {"weight_map": {str(n): f"s-{n}.safetensors" for n in range(4)}},
        "unet/s-2.safetensors": b"",
        "vae/diffusion_pytorch_model.bin": b"",
    }
    with pytest.raises(SourceError) as error:
        choose(files)
    text = complaints(error)
    assert all(f"unet/s-{n}.safetensors: this shard is not there" in text for n in (0, 1, 3))
    assert "vae/diffusion_pytorch_model.bin: component `vae` is there as a `.bin` only" in text
    assert "can be converted by itself" in text
    assert "text_encoder: component `text_encoder` has no safetensors file" in text
    assert 5 == len(error.value.issues)
    with pytest.raises(SourceError, match="is not there"):
        choose({})


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b"[" * 300_000, "too large"),
        (b"{" + b" " * (16 << 20) + b"}", "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "not a JSON table"),
        (b"7", "not a JSON table"),
        (b'{"weight_map": {"a": "a.safetensors"}, "weight_map": {"b": "a.safetensors"}}', "`weight_map` is named twice"),
        (b'{"weight_map": {"a": "a.safetensors", "a": "a.safetensors"}}', "`a` is named twice"),
        (b'{"weight_map": []}', "has no `weight_map`"),
        (b'{"weight_map": {}}', "has no `weight_map`"),
        (b"{}", "has no `weight_map`"),
        (b'{"weight_map": {"a": 7}}', "has no `weight_map`"),
        (b'{"weight_map": {"a": ["a.safetensors"]}}', "has no `weight_map`"),
        (b'{"weight_map": {"a": "../a.safetensors"}}', "beside its index"),
        (b'{"weight_map": {"a": "/etc/a.safetensors"}}', "beside its index"),
        (b'{"weight_map": {"a": "..\\\\a.safetensors"}}', "beside its index"),
        (b'{"weight_map": {"a": "C:a.safetensors"}}', "beside its index"),
        (b'{"weight_map": {"a": "b/../a.safetensors"}}', "beside its index"),
        (b'{"weight_map": {"a": "a\\u0000.safetensors"}}', "beside its index"),
        (b'{"weight_map": {"a": "\\ud800.safetensors"}}', "beside its index"),
        (b'{"weight_map": {"a": "pytorch_model-1.bin"}}', "beside its index"),
        (b'{"weight_map": {"a": ""}}', "beside its index"),
        (json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(2000)}}).encode(), "names 2000 shards"),
    ],
)
def test_an_index_that_cannot_be_believed_is_refused(content: bytes, what: str):
    """
    Hostile JSON and shards that lie elsewhere end in one sentence, in an index by itself as in one of a component.
    """
    with pytest.raises(IntegrityError, match=what):
        choose({"m.safetensors.index.json": content, "a.safetensors": b""}, "m.safetensors.index.json")
    name = "unet/diffusion_pytorch_model.safetensors.index.json"
    with pytest.raises(IntegrityError, match=what):
        choose({"model_index.json": {"unet": ANY}, name: content, "unet/a.safetensors": b""})


@pytest.mark.parametrize("value", [7, "unet", {}, [], ["diffusers"], ["a", "b", "c"], [1, 2], True, None])
def test_a_model_index_that_cannot_be_believed_is_refused(value: object):
    """
    A component is a library and a class, or two nulls where there is none; and one at least must hold weights.
    """
    with pytest.raises(IntegrityError, match="not a library and a class"):
        choose({"model_index.json": {"unet": value, "vae": ANY}, "vae/diffusion_pytorch_model.safetensors": b""})
    with pytest.raises(IntegrityError, match="names no component with weights"):
        choose({"model_index.json": {"unet": [None, None], "../unet": ANY, "scheduler": ANY}})


def test_only_an_index_is_an_entry(tmp_path: Path):
    """
    A config, a checkpoint and an index of pickles are not read as folders.
    """
    for name in ("config.json", "pytorch_model.bin.index.json", "a.safetensors"):
        with pytest.raises(IntegrityError, match="is neither"):
            choose({name: {}}, name)
        (tmp_path / name).write_text("{}")
        assert not is_folder_checkpoint(tmp_path / name)
    assert not is_folder_checkpoint(tmp_path)
    assert not is_folder_checkpoint(tmp_path / "none")
    assert is_folder_checkpoint(write_index(tmp_path, {}))
    assert is_folder_checkpoint(tmp_path / "model_index.json")


def test_errors_of_a_local_folder_say_where_it_is(tmp_path: Path):
    """
    Paths in complaints are paths that can be opened.
    """
    write_index(tmp_path / "f", {"unet": 1})
    with pytest.raises(SourceError, match=re.escape(str(tmp_path / "f" / "unet"))):
        find_parts(tmp_path / "f")
    with pytest.raises(SourceError, match=re.escape(str(tmp_path / "none"))):
        find_parts(tmp_path / "none" / "model_index.json")
    (tmp_path / "f" / "model_index.json").write_bytes(b" " * (17 << 20))
    with pytest.raises(SourceError, match="too large"):
        find_parts(tmp_path / "f")


def test_fp16_stands_in_for_what_is_not_there(tmp_path: Path):
    """
    A folder of fp16 variants alone is read; where the full file lies beside it, that one is.
    """
    components = as_folder(miniature("sd1"), "sd1")
    half = write_folder(tmp_path / "half", components, variant=".fp16")
    made = assembled_file(half, tmp_path / "half.safetensors")
    assert equal(miniature("sd1"), load_file(made))
    shards = write_folder(tmp_path / "shards", components, variant=".fp16", shards=3)
    assert made.read_bytes() == assembled_file(shards, tmp_path / "shards.safetensors").read_bytes()
    write_folder(half, {"vae": {name: tensor.float() for name, tensor in components["vae"].items()}})
    write_index(half, components)
    again = load_file(assembled_file(half, tmp_path / "again.safetensors"))
    assert {torch.float32} == {tensor.dtype for name, tensor in again.items() if name.startswith("first_stage_model.")}
    assert torch.float16 == again[UNET + "out.2.bias"].dtype


# Writing.


def test_memory_stays_small(tmp_path: Path):
    """
    Half a gigabyte would pass through the same few megabytes that ninety-six do.
    """
    tensors = {f"t{n}": torch.full((8 << 20,), n, dtype=torch.uint8) for n in range(12)}
    index = write_shards(tmp_path, "model", "model.safetensors.index.json", tensors, 4)
    root, parts = find_parts(index)
    headers = headers_of(root, parts)
    tracemalloc.start()
    assemble(root, parts, headers, tmp_path / "out.safetensors", lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20
    assert equal(tensors, load_file(tmp_path / "out.safetensors"))


def small_folder(root: Path) -> tuple[tuple[Part, ...], dict[Part, Header]]:
    write_folder(root, {"transformer": {"a": torch.ones(64)}, "vae": {"b": torch.ones(64)}})
    _, parts = find_parts(root)
    return parts, headers_of(root, parts)


def test_what_is_there_is_not_written_over(tmp_path: Path):
    """
    A target that exists is an error, and stays as it was.
    """
    parts, headers = small_folder(tmp_path / "f")
    (tmp_path / "t").write_text("mine")
    with pytest.raises(FileExistsError):
        assemble(tmp_path / "f", parts, headers, tmp_path / "t", lambda _: None)
    assert "mine" == (tmp_path / "t").read_text()


@pytest.mark.parametrize(
    ("damage", "error"),
    [("cut", IntegrityError), ("grown", IntegrityError), ("gone", FileNotFoundError), ("stopped", KeyboardInterrupt)],
)
def test_nothing_is_left_when_it_fails(tmp_path: Path, damage: str, error: type[Exception]):
    """
    A part that changed after its header was read, or an interruption, leaves no half a file behind.
    """
    parts, headers = small_folder(tmp_path / "f")
    victim = tmp_path / "f" / parts[-1].path

    def advanced(_: int) -> None:
        raise KeyboardInterrupt

    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-8])
    elif damage == "grown":
        victim.write_bytes(victim.read_bytes() + bytes(8))
    elif damage == "gone":
        victim.unlink()
    with pytest.raises(error):
        assemble(tmp_path / "f", parts, headers, tmp_path / "t", advanced if damage == "stopped" else lambda _: None)
    assert ["f"] == [path.name for path in tmp_path.iterdir()]


def test_files_that_are_links_are_followed(tmp_path: Path):
    """
    A snapshot in the cache of Hugging Face is a folder of links.
    """
    components = {"transformer": {"a": torch.arange(9)}}
    real = write_folder(tmp_path / "real", components)
    (tmp_path / "snapshot" / "transformer").mkdir(parents=True)
    name = "transformer/diffusion_pytorch_model.safetensors"
    try:
        (tmp_path / "snapshot" / name).symlink_to(real / name)
    except OSError:
        pytest.skip("links cannot be made here")
    shutil.copy(real / "model_index.json", tmp_path / "snapshot")
    assert equal({"transformer.a": torch.arange(9)}, load_file(assembled_file(tmp_path / "snapshot", tmp_path / "t.safetensors")))


def test_empty_tensors_and_scalars_pass_through(tmp_path: Path):
    """
    Tensors of no elements and of one, of every width, come out as they went in.
    """
    tensors = {
        "none": torch.ones(0, 3),
        "one": torch.tensor(2.5),
        "byte": torch.ones(3, dtype=torch.uint8),
        "wide": torch.ones(3, dtype=torch.float64),
    }
    index = write_shards(tmp_path, "m", "m.safetensors.index.json", tensors, 2)
    made = assembled_file(index, tmp_path / "t.safetensors")
    assert equal(tensors, load_file(made))
