"""Adapters: every tensor of one is a factor of a change, a stray, or complained of; and factors fit their tensor, or it is said why not."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping

import pytest
import torch
from adapters_made import ENDINGS, KOHYA, PEFT, factors, lora, lycoris, named, specs

from sdmerge_build.adapters import TAKEN, Adapter, Change, is_adapter, misfit, read_adapter
from sdmerge_build.architectures import GENERIC, architecture_named
from sdmerge_build.tensorfile import Spec

SD1 = architecture_named("sd1")
SDXL = architecture_named("sdxl")
FLUX = architecture_named("flux/dev")
MODULE = "lora_unet_mid_block_attentions_0_proj_in"
TARGET = "model.diffusion_model.middle_block.1.proj_in.weight"
BIAS = "model.diffusion_model.middle_block.1.proj_in.bias"
LINEAR, POINT, CONV = (32, 24), (32, 24, 1, 1), (32, 24, 3, 3)
KINDS = [
    pytest.param(kind, shapes, shape, id=f"{kind}-{len(shape)}-{shape[-1]}-{'-'.join(shapes)}")
    for shape in (LINEAR, POINT, CONV)
    for kind, shapes in lycoris(shape)
]

Shape = tuple[int, ...]


def read(shapes: Mapping[str, Shape], dtype: str = "F16") -> Adapter:
    return read_adapter(specs(shapes, dtype), SD1)


def accounted(adapter: Adapter, tensors: Mapping[str, Spec]) -> bool:
    """Tell whether every tensor is somebody's factor, a stray, or of a module that is complained of."""
    used = {name for changes in adapter.changes.values() for change in changes for name in change.factors.values()} | set(adapter.strays)
    said = {word for text in adapter.incomplete for word in text.split("`")}
    return all(name in used or any(name.rsplit(".", n)[0] in said for n in range(4)) for name in tensors)


def only(adapter: Adapter) -> Change:
    """Return the one change of an adapter that is sound."""
    assert ((), ()) == (adapter.strays, adapter.incomplete)
    [[change]] = adapter.changes.values()
    return change


# Reading


@pytest.mark.parametrize(("kind", "shapes", "shape"), KINDS)
def test_every_kind_is_read_whole(kind: str, shapes: Mapping[str, Shape], shape: Shape):
    """
    A change has its kind, all its factors under their roles, and fits.
    """
    tensors = specs(named(kind, MODULE, shapes))
    change = only(read_adapter(tensors, SD1))
    assert (TARGET, kind, None, None, False) == (change.target, change.kind, change.rows, change.taken, change.turned)
    assert shapes == factors(change, tensors)
    assert "" == misfit(change, shapes, shape)


OPTIONAL = {"alpha", "dora_scale", "rescale", "mid"}
"""Roles without which the rest is a sound change; of a `mid`, only the tensor's shape tells."""


@pytest.mark.parametrize(("kind", "shapes", "shape"), KINDS)
def test_a_factor_that_is_missing_is_missed(kind: str, shapes: Mapping[str, Shape], shape: Shape):
    """
    Each factor is taken away in turn: what is left is no change, and nothing of it is passed over in silence.
    """
    for role in shapes:
        left = {other: shapes[other] for other in shapes if other != role}
        tensors = specs(named(kind, MODULE, left))
        adapter = read_adapter(tensors, SD1)
        if role in OPTIONAL:
            assert (role == "mid") == bool(misfit(only(adapter), left, shape))
            continue
        assert not adapter.changes
        assert adapter.strays or adapter.incomplete or not tensors
        assert accounted(adapter, tensors)


@pytest.mark.parametrize(("kind", "shapes"), list(lycoris(CONV)))
def test_what_a_kind_does_not_know_is_complained_of(kind: str, shapes: Mapping[str, Shape]):
    """
    A factor of another kind beside a change's own makes it neither.
    """
    extra = {"lokr_t2": (4, 4)} if kind != "lokr" else {"hada_t1": (4, 4)}
    for ending, size in {**extra, "lora_mid.weight": (4, 4)}.items():
        if kind == "lora" and ending == "lora_mid.weight":
            continue
        adapter = read({**named(kind, MODULE, shapes), f"{MODULE}.{ending}": size})
        assert not adapter.changes
        [text] = adapter.incomplete
        assert "of several kinds" in text
    if "dora_scale" not in shapes and kind not in {"lora", "loha", "lokr"}:
        [text] = read({**named(kind, MODULE, shapes), f"{MODULE}.dora_scale": (32, 1)}).incomplete
        assert "`dora_scale`, which means nothing beside" in text


def test_complaints_say_what_is_there_and_what_is_not():
    """
    They name the endings that people see in their files.
    """
    module = named("lora", MODULE, {"up": (8, 4), "alpha": ()})
    assert [f"`{MODULE}` has `alpha`, `lora_up.weight` and lacks `lora_down.weight`"] == list(read(module).incomplete)
    assert [f"`{MODULE}` has `alpha` and nothing else"] == list(read({f"{MODULE}.alpha": ()}).incomplete)
    loha = {"w1_a": (8, 4), "w1_b": (4, 8), "w2_a": (8, 4), "w2_b": (4, 8), "t1": (4, 4, 1, 1)}
    [text] = read(named("loha", MODULE, loha)).incomplete
    assert text.endswith("and lacks `hada_t2`")
    [text] = read(named("lokr", MODULE, {"w1": (2, 2), "w1_a": (2, 1), "w1_b": (1, 2), "w2": (2, 2)})).incomplete
    assert text.endswith("has both `lokr_w1` and `lokr_w1_a`, `lokr_w1_b`")
    [text] = read({f"{MODULE}.lora_up.weight": (8, 4), f"{MODULE}.lora_down.weight": (3, 8)}).incomplete
    assert text == f"`{MODULE}` has `up` of 8×4 and `down` of 3×8, whose ranks differ"


def test_a_module_that_is_named_in_two_ways_is_complained_of():
    """
    A file that holds the same change in kohya's and in diffusers' names would apply it twice.
    """
    peft = "unet.mid_block.attentions.0.proj_in"
    tensors = {**lora(MODULE, 8, 8), **lora(peft, 8, 8, endings=PEFT)}
    assert [f"`{MODULE}` and `{peft}` both change `{TARGET}`"] == list(read(tensors).incomplete)
    both = {**lora(MODULE, 8, 8), **lora(MODULE, 8, 8, endings=PEFT)}
    adapter = read(both)
    assert 2 == len(adapter.incomplete)
    assert all("has a tensor twice" in text for text in adapter.incomplete)
    qkv = {**lora("lora_unet_double_blocks_0_img_attn_qkv", 24, 8), **lora("transformer.transformer_blocks.0.attn.to_k", 8, 8)}
    [text] = read_adapter(specs(qkv), FLUX).incomplete
    assert "both change `model.diffusion_model.double_blocks.0.img_attn.qkv.weight`" in text
    single = "transformer.single_transformer_blocks.0"
    overlapping = {**lora("single_blocks.0.processor.qkv_lora", 24, 8), **lora(f"{single}.attn.to_v", 8, 8), **lora(f"{single}.proj_mlp", 32, 8)}
    [text] = read_adapter(specs(overlapping), FLUX).incomplete
    assert "qkv_lora" in text
    assert "to_v" in text


def test_parts_of_a_tensor_come_in_the_order_of_their_rows():
    """
    Whatever the order in the file; and each part may have its own rank, kind, or be left out.
    """
    start = "lora_te2_text_model_encoder_layers_3_self_attn_"
    shapes = {
        **lora(f"{start}v_proj", 8, 8),
        **named("lokr", f"{start}k_proj", {"w1": (2, 2), "w2": (4, 4)}),
        **named("ia3", f"{start}q_proj", {"weight": (8,), "on_input": ()}),
    }
    for _ in range(3):
        adapter = read_adapter(specs(dict(random.sample(list(shapes.items()), len(shapes)))), SDXL)
        assert ((), ()) == (adapter.strays, adapter.incomplete)
        [changes] = adapter.changes.values()
        assert [("ia3", (0, 8)), ("lokr", (8, 8)), ("lora", (16, 8))] == [(change.kind, change.rows) for change in changes]
    [text] = read_adapter(specs(lora("transformer.single_transformer_blocks.0.proj_mlp", 30, 8)), FLUX).incomplete
    assert "makes 30 rows, which cannot be 4 of 7 equal parts" in text
    ia3 = named("ia3", "transformer.single_transformer_blocks.0.proj_mlp", {"weight": (32,), "on_input": ()})
    [text] = read_adapter(specs(ia3), FLUX).incomplete
    assert "its rows are not known" in text


def test_biases_and_norms_are_differences():
    """
    What a full adapter adds to a bias, and what it adds to a norm, are changes of tensors of their own.
    """
    norm = "lora_unet_mid_block_resnets_0_norm1"
    where = "model.diffusion_model.middle_block.0.in_layers.0"
    shapes = {f"{MODULE}.diff": (8, 8), f"{MODULE}.diff_b": (8,), f"{norm}.w_norm": (8,), f"{norm}.b_norm": (8,)}
    tensors = specs(shapes)
    adapter = read_adapter(tensors, SD1)
    assert ((), ()) == (adapter.strays, adapter.incomplete)
    assert {BIAS, TARGET, f"{where}.bias", f"{where}.weight"} == set(adapter.changes)
    assert {"diff"} == {change.kind for changes in adapter.changes.values() for change in changes}
    assert "" == misfit(adapter.changes[BIAS][0], {"diff": (8,)}, (8,))
    assert "holds 8 for 6" == misfit(adapter.changes[BIAS][0], {"diff": (8,)}, (6,))
    both = read({**lora(MODULE, 8, 8), f"{MODULE}.diff_b": (8,)})
    assert {"lora", "diff"} == {change.kind for changes in both.changes.values() for change in changes}
    part = read_adapter(specs({"lora_te2_text_model_encoder_layers_3_self_attn_k_proj.diff_b": (8,)}), SDXL)
    assert ("conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_bias", (8, 8)) == (only(part).target, only(part).rows)
    scale = read_adapter(specs({"diffusion_model.double_blocks.0.img_attn.norm.key_norm.diff": (8,)}), FLUX)
    assert "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale" == only(scale).target
    lonely = read({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.diff_b": (8,)})
    assert 1 == len(lonely.strays)
    assert not lonely.changes


def test_the_bias_of_peft_is_read_where_nothing_scales_it():
    """
    PEFT's `lora_bias` adds to the bias; with an `alpha` beside it, it would be scaled or not, and nobody says.
    """
    module = "unet.mid_block.attentions.0.proj_in"
    shapes = {**lora(module, 8, 8, endings=PEFT), f"{module}.lora_B.bias": (8,)}
    assert {TARGET, BIAS} == set(read(shapes).changes)
    [text] = read({**shapes, f"{module}.alpha": ()}).incomplete
    assert "has `lora_B.bias` and `alpha`" in text


def test_every_spelling_of_a_factor_is_read():
    """
    `up` and `down` under all the names that they had in diffusers, PEFT, kohya and XLabs.
    """
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    pairs = [("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"), ("lora_B.default.weight", "lora_A.default.weight")]
    pairs += [("lora.up.weight", "lora.down.weight"), ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"), ("lora_B", "lora_A")]
    for up, down in pairs:
        for name in (module, text):
            assert {"up", "down"} == set(only(read({f"{name}.{up}": (8, 4), f"{name}.{down}": (4, 8)})).factors)
    old = module.replace(".to_q", ".processor.to_q_lora")
    assert {"up", "down"} == set(only(read({f"{old}.up.weight": (8, 4), f"{old}.down.weight": (4, 8)})).factors)
    for magnitude in ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight", "dora_scale"):
        change = only(read({**lora(module, 8, 6, endings=PEFT), f"{module}.{magnitude}": (8,)}))
        assert f"{module}.{magnitude}" == change.factors["dora_scale"]
        assert "" == misfit(change, {"up": (8, 4), "down": (4, 6), "dora_scale": (8,)}, (8, 6))


def test_kohyas_oft_is_read():
    """
    It has a prefix of its own, and for Flux a number; what it splits into q, k and v is not read, and said so.
    """
    assert "oft" == only(read({"oft_unet_mid_block_attentions_0_proj_in.oft_blocks": (2, 4, 4)})).kind
    module = "oft_unet_double_blocks_0_img_attn_proj"
    assert "oft" == only(read_adapter(specs({f"{module}.oft_blocks.0": (2, 4, 4), f"{module}.alpha": ()}), FLUX)).kind
    split = specs({f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{n}": (2, 4, 4) for n in range(3)})
    assert 2 == len(read_adapter(split, FLUX).strays)


def test_magnitudes_that_may_go_either_way_are_not_guessed():
    """
    PEFT writes the magnitudes of a convolution's rows as LyCORIS writes those of its columns.
    """
    module = "unet.mid_block.resnets.0.conv1"
    shapes = {**lora(module, 8, 8, (3, 3), PEFT), f"{module}.lora_magnitude_vector": (1, 8, 1, 1)}
    [text] = read(shapes).incomplete
    assert "of a convolution" in text


def test_what_nobody_knows_is_a_stray():
    """
    Tensors that mean something else elsewhere are listed, not left out.
    """
    known = ["reshape_weight", "oft_R.weight", "weight", "lora_mid", "bm.weight", "lokr_t1", "oft_diag", "scalar"]
    odd = ["emb_params", "lora_unet_nothing.lora_up.weight", "", ".", "..", ".lora_up.weight", "alpha"]
    shapes = dict.fromkeys([*(f"{MODULE}.{ending}" for ending in known), *odd], (8, 8))
    tensors = specs(shapes)
    adapter = read_adapter(tensors, SD1)
    assert sorted(shapes) == list(adapter.strays)
    assert ({}, ()) == (adapter.changes, adapter.incomplete)


def test_factors_that_are_no_fractions_are_complained_of():
    """
    Whole numbers are read for what they may be alone.
    """
    [text] = read(lora(MODULE, 8, 8), dtype="I8").incomplete
    assert "as I8, which is not computed with" in text
    ia3 = named("ia3", MODULE, {"weight": (8,), "on_input": ()})
    tensors = specs(ia3) | {f"{MODULE}.on_input": Spec(f"{MODULE}.on_input", "I64", ())}
    assert "ia3" == only(read_adapter(tensors, SD1)).kind


def test_any_model_has_its_own_names():
    """
    Of a model that nothing is known of, a module with dots is the tensor of that name; what has none is a stray.
    """
    generic = architecture_named(GENERIC)
    shapes = {
        **lora("layer.3", 8, 8, endings=PEFT),
        **lora("base_model.model.norm.0", 8, 8),
        **lora("lora_unet_layer_3", 8, 8),
        "layer.3.diff_b": (8,),
    }
    adapter = read_adapter(specs(shapes), generic)
    assert ["layer.3.bias", "layer.3.weight", "norm.0.weight"] == list(adapter.changes)
    assert sorted(lora("lora_unet_layer_3", 8, 8)) == list(adapter.strays)


def test_the_order_of_a_file_does_not_matter():
    """
    The same tensors in another order are the same adapter.
    """
    shapes = {
        name: shape
        for n, (kind, made) in enumerate(lycoris(LINEAR))
        for name, shape in named(kind, f"lora_unet_input_blocks_{n % 9}_0_op", made).items()
    }
    first = read_adapter(specs(shapes), SDXL)
    assert first.incomplete
    for _ in range(3):
        assert first == read_adapter(specs(dict(random.sample(list(shapes.items()), len(shapes)))), SDXL)


# Which files are adapters


@pytest.mark.parametrize(
    "name",
    [f"{MODULE}.{ending}" for kind in ENDINGS for ending in ENDINGS[kind].values()]
    + ["unet.mid_block.attentions.0.proj_in.lora_A.weight", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"]
    + ["double_blocks.0.processor.qkv_lora1.down.weight", "unet.mid_block.attentions.0.proj_in.hada_w1_a", "lycoris_conv_in.diff"]
    + [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        "diffusion_model.out.2.set_weight",
        "a.lora.up.weight",
    ],
)
def test_an_adapter_is_known_by_any_of_its_names(name: str):
    """
    Also when most of a file is something else, so that nothing of it is left out in silence.
    """
    assert is_adapter([*(f"x.{n}.weight" for n in range(9)), name])


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner", "sd3/3.5-medium", "flux/dev", GENERIC])
def test_a_checkpoint_is_no_adapter(name: str):
    """
    Nor is one with names that adapters have too.
    """
    names = [*architecture_named(name).layout(), "snake.alpha", "layer.down.weight", "block.up.weight", "net.a1.weight", "alpha", "weight", ""]
    assert not is_adapter(names)


# Fitting


@pytest.mark.parametrize(("kind", "shapes", "shape"), KINDS)
def test_a_factor_of_another_size_does_not_fit(kind: str, shapes: Mapping[str, Shape], shape: Shape):
    """
    Each side of each factor is made longer in turn: somebody notices, before anything is multiplied.
    """
    for role, sizes in shapes.items():
        for side in range(len(sizes)):
            longer = {**shapes, role: tuple(size + 1 if n == side else size for n, size in enumerate(sizes))}
            change = Change(target=TARGET, kind=kind, factors={})
            assert "" != misfit(change, longer, shape), (role, side)


@pytest.mark.parametrize(("kind", "shapes", "shape"), KINDS)
def test_a_change_does_not_fit_another_tensor(kind: str, shapes: Mapping[str, Shape], shape: Shape):
    """
    A tensor with more rows, more columns or a larger kernel is another one, but for what works on rows or on columns alone.
    """
    change = Change(target=TARGET, kind=kind, factors={})
    loose = kind in {"ia3", "oft", "boft"}
    sides = [0] if kind in {"oft", "boft"} else [] if kind == "ia3" else [0, 1]
    for side in sides:
        other = tuple(size * 5 if n == side else size for n, size in enumerate(shape))
        assert "" != misfit(change, shapes, other)
    if len(shape) > 2 and not loose:
        assert "" != misfit(change, shapes, (*shape[:2], shape[2] + 1, shape[3]))
    if kind == "ia3":
        assert "" != misfit(change, shapes, (40, 48, *shape[2:]))
    assert "" != misfit(change, shapes, ())
    assert "" != misfit(change, shapes, shape[:1])


def made(kind: str, shapes: Mapping[str, Shape], shape: Shape) -> torch.Tensor | None:
    """Make a difference of factors as LyCORIS documents it, with numbers; None for kinds that make none."""
    f = {role: torch.ones(size) for role, size in shapes.items()}
    if kind == "lora":
        down = torch.einsum("mnxy,njab->mjxy", f["mid"], f["down"]) if "mid" in f else f["down"]
        return (f["up"].flatten(1) @ down.flatten(1)).reshape(shape)
    if kind == "loha":
        if "t1" in f:
            return torch.einsum("ijkl,jr,ip->prkl", f["t1"], f["w1_b"], f["w1_a"]) * torch.einsum("ijkl,jr,ip->prkl", f["t2"], f["w2_b"], f["w2_a"])
        return ((f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])).reshape(shape)
    if kind == "lokr":
        w1 = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
        sides = f["w2_a"] @ f["w2_b"] if "w2_a" in f and "t2" not in f else None
        w2 = f["w2"] if "w2" in f else torch.einsum("ijkl,jr,ip->prkl", f["t2"], f["w2_b"], f["w2_a"]) if sides is None else sides
        return torch.kron(w1[..., None, None] if w2.dim() == 4 else w1, w2.contiguous()).reshape(shape)
    if kind == "glora":
        weights = torch.ones(shape)
        return torch.einsum("oi...,ij,jk->ok...", weights, f["a1"].flatten(1), f["a2"].flatten(1)) + (
            f["b1"].flatten(1) @ f["b2"].flatten(1)
        ).reshape(shape)
    return None


@pytest.mark.parametrize(("kind", "shapes", "shape"), KINDS)
def test_what_fits_can_be_multiplied(kind: str, shapes: Mapping[str, Shape], shape: Shape):
    """
    The factors that are called fitting make a difference of the tensor's shape, by the formulas of LyCORIS.
    """
    difference = made(kind, shapes, shape)
    assert difference is None or shape == tuple(difference.shape)


def test_factors_of_a_point_are_those_of_a_matrix():
    """
    SD 1 projects with 1×1 convolutions what SDXL projects with matrices; trainers write either shape for either.
    """
    change = Change(target=TARGET, kind="lora", factors={})
    for up in ((32, 4), (32, 4, 1, 1)):
        for down in ((4, 24), (4, 24, 1, 1)):
            for shape in (LINEAR, POINT):
                assert "" == misfit(change, {"up": up, "down": down}, shape)
    assert "makes 32×24×3×3 of 32×24" == misfit(change, {"up": (32, 4), "down": (4, 24, 3, 3)}, LINEAR)
    assert "makes 32×24 of 32×24×3×3" == misfit(change, {"up": (32, 4), "down": (4, 24)}, CONV)
    assert "makes 32×24×1×9 of 32×24×3×3" == misfit(change, {"up": (32, 4), "down": (4, 24, 1, 9)}, CONV)
    assert "makes 30 rows of 32" == misfit(change, {"up": (30, 4), "down": (4, 24)}, LINEAR)
    assert "has `up` of 32×4×3×3, which is to be a matrix" == misfit(change, {"up": (32, 4, 3, 3), "down": (4, 24)}, LINEAR)
    assert "has `up` without a single element" == misfit(change, {"up": (32, 0), "down": (0, 24)}, LINEAR)
    assert "has `down` of 24, which is to be a matrix or a convolution" == misfit(change, {"up": (32, 4), "down": (24,)}, LINEAR)
    assert "has `alpha` of 2, which is to be one number" == misfit(change, {"up": (32, 4), "down": (4, 24), "alpha": (2,)}, LINEAR)
    assert "makes a matrix, and this has 1 dimension" == misfit(change, {"up": (32, 4), "down": (4, 24)}, (32,))


def test_rows_and_turns_are_looked_at():
    """
    A part has its own rows, and the transposed tensor its sides the other way round.
    """
    shapes = {"up": (8, 4), "down": (4, 6), "dora_scale": (8, 1)}
    part = Change(target=TARGET, kind="lora", factors={}, rows=(16, 8))
    assert "" == misfit(part, shapes, (24, 6))
    assert "changes rows 16 to 23 of a tensor that has 20" == misfit(part, shapes, (20, 6))
    assert "makes 8×6 of 8×7" == misfit(part, shapes, (24, 7))
    turned = Change(target=TARGET, kind="lora", factors={}, turned=True)
    assert "" == misfit(turned, shapes, (6, 8))
    assert "makes 8 rows of 6" == misfit(turned, shapes, (8, 6))
    halves = Change(target=TARGET, kind="lora", factors={}, rows=(0, 4), taken=(4, 4))
    assert "" == misfit(halves, {"up": (8, 4), "down": (4, 6)}, (8, 6))
    assert "of which rows 4 to 7 are meant" in misfit(halves, {"up": (6, 4), "down": (4, 6)}, (8, 6))
    assert {"up", "diff", "weight"} == TAKEN


def test_magnitudes_and_scales_go_along_a_side():
    """
    DoRA's along the rows or the columns, in any shape that says so; OFT's along the rows.
    """
    change = Change(target=TARGET, kind="lora", factors={})
    base = {"up": (32, 4), "down": (4, 24)}
    for good in ((32,), (32, 1), (1, 24)):
        assert "" == misfit(change, {**base, "dora_scale": good}, LINEAR)
    for good in ((32, 1, 1, 1), (1, 24, 1, 1)):
        assert "" == misfit(change, {**base, "dora_scale": good}, POINT)
    for bad in ((24,), (24, 1), (1, 32), (32, 24), (), (1,)):
        assert "along no side of 32×24" in misfit(change, {**base, "dora_scale": bad}, LINEAR)
    oft = Change(target=TARGET, kind="oft", factors={})
    assert "does not go along the rows" in misfit(oft, {"blocks": (8, 4, 4), "rescale": (24, 1)}, LINEAR)
    assert "which are to be square" in misfit(oft, {"blocks": (8, 4, 3)}, LINEAR)
    boft = Change(target=TARGET, kind="boft", factors={})
    assert "" == misfit(boft, {"blocks": (4, 8, 4, 4)}, LINEAR)
    assert "5 stages" in misfit(boft, {"blocks": (5, 8, 4, 4)}, LINEAR)
    assert "stages" in misfit(boft, {"blocks": (10**9, 8, 4, 4)}, LINEAR)
    assert "square and even" in misfit(boft, {"blocks": (1, 32, 1, 1)}, LINEAR)


def test_both_orders_of_glora_fit():
    """
    LyCORIS once wrote its four matrices the other way round; on square tensors, both orders have ranks that agree.
    """
    for shape in ((32, 24), (24, 24)):
        out, into = shape
        new = {"a1": (into, 4), "a2": (4, into), "b1": (out, 4), "b2": (4, into)}
        old = {"a1": (4, into), "a2": (into, 4), "b1": (4, into), "b2": (out, 4)}
        for shapes in (new, old):
            change = only(read(named("glora", MODULE, shapes)))
            assert "" == misfit(change, shapes, shape)
            assert "" != misfit(change, shapes, (out + 1, into))
        part = "lora_te2_text_model_encoder_layers_3_self_attn_k_proj"
        if out == into:
            assert [(24, 24)] * 2 == [only(read_adapter(specs(named("glora", part, shapes)), SDXL)).rows for shapes in (new, old)]
    [text] = read(named("glora", MODULE, {"a1": (24, 4), "a2": (5, 24), "b1": (32, 4), "b2": (4, 24)})).incomplete
    assert "whose ranks differ" in text


# Strangers


def test_strangers_are_read_in_a_moment():
    """
    Fifty thousand tensors, as many as are read, with the longest names there may be, and all for one target.
    """
    long = "base_model.model." + "down_blocks." * 80
    files = [
        {f"{long}{n}.lora_up.weight": (1, 1) for n in range(50_000)},
        {f"lora_unet_{n}.{ending}": (1, 1) for n in range(5000) for ending in KOHYA.values()},
        {f"{''.join(random.choice('._') if c in '._' else c for c in MODULE)}.lora_up.weight": (1, 1) for _ in range(20_000)},
        {f"{'.' * n}alpha": () for n in range(1000)},
    ]
    for shapes in files:
        tensors = specs(shapes)
        began = time.perf_counter()
        is_adapter(tensors)
        adapter = read_adapter(tensors, SDXL)
        assert time.perf_counter() - began < 5
        assert accounted(adapter, tensors)


def test_no_shape_breaks_the_reading():
    """
    Factors of any number of dimensions, of any size, under any roles, end as changes or as complaints.
    """
    endings = [ending for kind in ENDINGS for ending in ENDINGS[kind].values()] + ["alpha", "dora_scale", "diff_b"]
    chance = random.Random(6)
    for _ in range(3000):
        shapes = {
            f"{MODULE}.{ending}": tuple(chance.choice([0, 1, 2, 3, 4, 2**40]) for _ in range(chance.choice([0, 1, 2, 2, 2, 3, 4, 5])))
            for ending in chance.sample(endings, chance.randint(1, 6))
        }
        tensors = specs(shapes)
        adapter = read_adapter(tensors, SD1)
        assert accounted(adapter, tensors)
        for changes in adapter.changes.values():
            for change in changes:
                for shape in ((), (4,), (4, 4), (0, 4), (4, 4, 3, 3), (math.prod([2**40]), 2)):
                    assert isinstance(misfit(change, factors(change, tensors), shape), str)


def test_a_half_that_is_lacking_is_noticed_in_a_whole_file():
    """
    In an adapter of many modules, each tensor but `alpha` is needed.
    """
    layout = architecture_named("sd1").layout()
    modules = [n.removeprefix("model.diffusion_model.").removesuffix(".weight") for n in layout if n.endswith("attn1.to_q.weight")]
    shapes = {name: shape for module in modules for name, shape in lora(f"lora_unet_{module.replace('.', '_')}", 8, 8).items()}
    assert len(modules) == len(read(shapes).changes)
    for lacking in shapes:
        adapter = read({name: shape for name, shape in shapes.items() if name != lacking})
        assert lacking.endswith(".alpha") != bool(adapter.strays or adapter.incomplete)
