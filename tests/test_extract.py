"""`extract_lora` and `resize_lora`: decompositions against NumPy's SVD, names against the reader of adapters, files against the sources they came from."""

from __future__ import annotations

import hashlib
import json
import math

import checkpoints
import numpy as np
import pytest
import torch
from conftest import states
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sdmerge_build.adapters import read_adapter
from sdmerge_build.adapters.writing import modules_of
from sdmerge_build.architectures import ARCHITECTURES, architecture_named, architecture_names
from sdmerge_build.build import plan_build
from sdmerge_build.errors import SdbuildError
from sdmerge_build.events import Silent
from sdmerge_build.methods.decomposition import Limits, decomposed, decomposed_product
from sdmerge_build.prepare import Options
from sdmerge_build.supply import Reach

RECIPE = """
recipe = 1
architecture = "sd1"

[source.A]
path = "A.safetensors"

[source.B]
path = "B.safetensors"

[step.lora]
method = "extract_lora"
a = "A"
b = "B"
"""
LINEAR = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
SPATIAL = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
ENCODER = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
NAMES = {
    LINEAR: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    SPATIAL: "lora_unet_down_blocks_0_resnets_0_conv1",
    ENCODER: "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
}


def related(name: str, *, differs: float = 1.0) -> dict[str, torch.Tensor]:
    """Make two checkpoints that differ a little in some matrices of the model, and in nothing else."""
    tensors = checkpoints.miniature("sd1", "base", every=40)
    for tensor, shape in ((LINEAR, (24, 20)), (SPATIAL, (16, 12, 3, 3)), (ENCODER, (20, 24))):
        tensors[tensor] = checkpoints.numbers("base", tensor, shape)
        if name == "A":
            change = checkpoints.numbers("change", tensor, shape, torch.float32) / 16 * (differs if tensor == ENCODER else 1)
            tensors[tensor] = (tensors[tensor].float() + change).half()
    return tensors


def made(space, recipe: str, **differs) -> dict[str, torch.Tensor]:
    """Build the recipe of two related checkpoints, and read the LoRA."""
    for name in "AB":
        space.checkpoint(name, related(name, **differs))
    space.write("recipe.toml", RECIPE + recipe)
    space.build()
    return space.load("lora")


def product(lora: dict[str, torch.Tensor], module: str) -> np.ndarray:
    """Multiply a module's factors as loaders do."""
    up, down = (lora[f"{module}.lora_{side}.weight"].double() for side in ("up", "down"))
    scale = float(lora[f"{module}.alpha"]) / down.shape[0]
    return (up.flatten(1) @ down.flatten(1) * scale).numpy()


def difference(tensor: str) -> np.ndarray:
    return (related("A")[tensor].double() - related("B")[tensor].double()).flatten(1).numpy()


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a rank, by NumPy."""
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * sizes[:rank] @ right[:rank]


def matrix(rows: int, columns: int, seed: int, decay: float = 0.8) -> np.ndarray:
    """A matrix whose singular values fall."""
    generator = np.random.default_rng(seed)
    side = min(rows, columns)
    left, right = (np.linalg.qr(generator.normal(size=(n, side)))[0] for n in (rows, columns))
    return left * decay ** np.arange(side) @ right.T


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_decomposition_is_the_best_of_its_rank(rows, columns, rank, seed):
    """The product of the factors is NumPy's truncated SVD, whichever side is longer, and what is kept is counted right."""
    given_ = matrix(rows, columns, seed)
    factors = decomposed(torch.from_numpy(given_), Limits(rank=rank))
    kept = np.linalg.svd(given_, compute_uv=False)[:rank]

    np.testing.assert_allclose((factors.up @ factors.down).numpy(), best(given_, rank), atol=1e-9)
    assert factors.kept == pytest.approx((kept**2).sum() / (given_**2).sum(), abs=1e-12)
    assert factors.up.shape == (rows, min(rank, rows, columns))


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), inner=st.integers(1, 40), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_product_is_decomposed_without_being_formed(rows, columns, inner, rank, seed):
    """Factors of a larger rank become factors of a smaller one, the same as of their product."""
    up, down = (checkpoints.seeded(seed + n, shape, torch.float64) for n, shape in enumerate(((rows, inner), (inner, columns))))
    factors = decomposed_product(up, down, Limits(rank=rank))

    np.testing.assert_allclose((factors.up @ factors.down).numpy(), best((up @ down).numpy(), rank), atol=1e-12)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"rank": 5}, 5),
        ({"rank": 99}, 20),
        ({"rank": 99, "energy": 0.9}, 6),  # 1 - 0.64^r >= 0.9 (1 - 0.64^20)
        ({"rank": 3, "energy": 0.9}, 3),
        ({"rank": 99, "energy": 0.0}, 1),
        ({"rank": 99, "threshold": 0.5}, 4),  # 0.8^3 = 0.512
        ({"rank": 99, "threshold": 1.0}, 1),
        ({"rank": 99, "energy": 0.9, "threshold": 0.5}, 4),
    ],
)
def test_a_rank_is_fixed_or_follows_from_the_singular_values(limits, expected):
    """Energy is the share of squares, threshold a share of the largest value; the smallest answer counts, and it is at least one."""
    factors = decomposed(torch.from_numpy(matrix(30, 20, 1)), Limits(**limits))

    assert factors.up.shape[1] == expected


def test_random_vectors_find_nearly_the_same():
    """A randomized decomposition keeps nearly the energy of an exact one, is the same for a seed, and another for another."""
    given_ = torch.from_numpy(matrix(200, 300, 2, decay=0.97))
    exact, *random = (
        decomposed(given_, Limits(rank=20, name="x", **how))
        for how in ({}, {"randomized": True}, {"randomized": True}, {"randomized": True, "seed": 1})
    )

    assert random[0].kept == pytest.approx(exact.kept, rel=3e-3)
    assert random[0].kept <= exact.kept + 1e-12
    assert torch.equal(random[0].up, random[1].up)
    assert not torch.equal(random[0].up, random[2].up)


def test_factors_share_the_singular_values_so_that_float16_holds_small_ones():
    """A difference of a millionth keeps its digits in float16, where `U S` would be a handful of its smallest numbers."""
    small = torch.from_numpy(matrix(64, 64, 3) * 1e-5)
    factors = decomposed(small, Limits(rank=16))
    left, sizes, right = torch.linalg.svd(small)
    usual = (left[:, :16] * sizes[:16]).half().double() @ right[:16].half().double()
    ours = factors.up.half().double() @ factors.down.half().double()
    truth = torch.from_numpy(best(small.numpy(), 16))

    assert (ours - truth).norm() < 0.3 * (usual - truth).norm()


def test_what_is_clamped_is_as_others_clamp_it():
    """Below 1, the factors are `U S` and `V`, cut off at the quantile of all their numbers."""
    given_ = matrix(30, 20, 4)
    factors = decomposed(torch.from_numpy(given_), Limits(rank=4, clamp=0.9))
    left, sizes, right = np.linalg.svd(given_, full_matrices=False)
    limit = np.quantile(np.concatenate([factors.up.numpy().ravel(), factors.down.numpy().ravel()]), 1.0)
    up, down = left[:, :4] * sizes[:4], right[:4]

    np.testing.assert_allclose(np.abs(factors.up.numpy()), np.abs(np.clip(up, -limit, limit)), atol=1e-9)
    np.testing.assert_allclose(np.abs(factors.down.numpy()), np.abs(np.clip(down, -limit, limit)), atol=1e-9)
    assert limit < np.abs(down).max()


def test_arithmetic_changes_only_with_the_version():
    """What is pinned of a decomposition, to six decimals; who changes it raises the versions of `extract_lora` and `resize_lora`."""
    made = hashlib.sha256()
    for how in ({}, {"randomized": True}, {"clamp": 0.9}):
        factors = decomposed(checkpoints.seeded(5, (48, 60), torch.float64), Limits(rank=6, name="x", **how))
        for factor in (factors.up, factors.down):
            made.update((factor * 1e6).round().to(torch.int64).numpy().tobytes())

    assert made.hexdigest() == "d052d9edd4b26e9ba820bea1140aa6ac3b82332744cdad3f923e3c907c553356"


def test_nothing_makes_factors_of_nothing():
    """Models that do not differ have zero factors, and what is not a number is passed on to who complains of it."""
    assert not decomposed(torch.zeros(5, 7), Limits(rank=3)).up.any()
    assert decomposed(torch.full((5, 7), math.nan), Limits(rank=3)).up.isnan().all()


@pytest.mark.parametrize("name", [name for name in architecture_names() if name.partition("/")[0] in ARCHITECTURES[:-1]])
def test_names_that_are_written_are_read_as_what_they_mean(name):
    """The reader of adapters, which knows names from elsewhere, finds in every module the tensor and the rows that it was written for."""
    architecture = architecture_named(name)
    if not (architecture.variant or architecture.depth):
        pytest.skip("its variants differ")
    modules = [module for target, shape in architecture.layout().items() for module in modules_of(target, shape, architecture)]
    specs = {spec.name: spec for module in modules for spec in module.specs(4, "F16")}
    adapter = read_adapter(specs, architecture)
    read = {(change.target, change.rows, change.turned) for changes in adapter.changes.values() for change in changes}

    assert len(specs) == 3 * len(modules)
    assert not adapter.strays
    assert not adapter.incomplete
    assert read == {(module.target, module.rows, module.turned) for module in modules}


def test_a_difference_is_written_under_kohyas_names(space):
    """Every matrix and convolution of the model and its text encoder has a module of the rank, in the shapes that loaders expect."""
    lora = made(space, "rank = 6")

    for tensor, module in NAMES.items():
        out, into, *kernel = related("B")[tensor].shape
        assert lora[f"{module}.lora_down.weight"].shape == (6, into, *kernel)
        assert lora[f"{module}.lora_up.weight"].shape == (out, 6, *(1 for _ in kernel))
        assert lora[f"{module}.lora_up.weight"].dtype is torch.float16
        assert lora[f"{module}.alpha"].item() == 6
        np.testing.assert_allclose(product(lora, module), best(difference(tensor), 6), atol=3e-5)
    assert not any("first_stage" in name or "norm" in name for name in lora)


def test_the_header_says_what_loaders_look_for(space):
    """Rank and alpha, the base, ModelSpec's `/lora`; the model hash is what anybody computes from the file."""
    made(space, "rank = 6\nconv_rank = 4")
    path = space.path / "out" / "lora.safetensors"
    with safe_open(path, "pt") as file:
        said = file.metadata()
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")

    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("6", "6.0")
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4.0"}
    assert (said["ss_base_model_version"], said["ss_v2"]) == ("sd_v1", "False")
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.implementation"] == "diffusers"
    assert said["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert len(said["sshs_legacy_hash"]) == 8


def test_the_legacy_hash_is_of_the_file_with_training_metadata_alone(space):
    """64 KiB from the first mebibyte on, of a file with this data whose header says nothing else."""
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight"
    for letter in "AB":
        space.checkpoint(letter, related(letter) | {name: checkpoints.numbers(letter, name, (4096, 256))})
    space.write("recipe.toml", RECIPE + f'rank = 256\npick = ["{name}"]')
    space.build()
    with safe_open(space.path / "out" / "lora.safetensors", "pt") as file:
        said = file.metadata()
    data = (space.path / "out" / "lora.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    plain = json.loads(data[8:start])
    plain["__metadata__"] = {key: text for key, text in said.items() if key.startswith("ss_")}
    header = json.dumps(plain, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    whole = len(header).to_bytes(8, "little") + header + data[start:]

    assert said["sshs_legacy_hash"] == hashlib.sha256(whole[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


def test_extracted_and_baked_again_is_the_original(space):
    """At full rank to float32's last digits; at a lower one, within the energy that the rank leaves out."""
    made(space, 'rank = 999\nartifact = true\ndtype = "fp32"\n[step.low]\nmethod = "extract_lora"\na = "A"\nb = "B"\nrank = 4\ndtype = "fp32"\n'
         '[step.back]\nmethod = "bake"\nbase = "B"\nadapters = ["lora"]\ndtype = "fp32"\n[step.near]\nformula = "B + low"\ndtype = "fp32"')  # fmt: skip
    back, near = space.load("back"), space.load("near")

    for tensor in NAMES:
        original = related("A")[tensor].double().flatten(1).numpy()
        lost = np.linalg.norm(best(difference(tensor), 4) - difference(tensor))
        np.testing.assert_allclose(back[tensor].double().flatten(1).numpy(), original, atol=1e-7)
        assert np.linalg.norm(near[tensor].double().flatten(1).numpy() - original) == pytest.approx(lost, rel=1e-3)


def test_a_rank_may_follow_from_the_energy(space):
    """With `energy`, ranks differ, the header says so, and no matrix keeps less; what builds on it takes them as they are."""
    lora = made(space, 'energy = 0.8\ndtype = "fp32"\nartifact = true\n[step.back]\nformula = "B + lora"\ndtype = "fp32"')
    back = space.load("back")
    with safe_open(space.path / "out" / "lora.safetensors", "pt") as file:
        said = file.metadata()

    assert said["ss_network_dim"] == "Dynamic"
    for tensor, module in NAMES.items():
        whole, kept = difference(tensor), product(lora, module)
        sizes = np.linalg.svd(whole, compute_uv=False) ** 2
        rank = int((np.cumsum(sizes) < 0.8 * sizes.sum()).sum()) + 1
        assert lora[f"{module}.lora_down.weight"].shape[0] == rank
        np.testing.assert_allclose(back[tensor].flatten(1).numpy(), related("B")[tensor].float().flatten(1).numpy() + kept, atol=1e-6)


def test_text_encoders_that_hardly_differ_are_left_out(space):
    """`min_difference` is about the largest number of each text encoder; the model itself is never left out, and a bake goes on."""
    lora = made(space, 'rank = 4\nmin_difference = 0.001\nartifact = true\n[step.back]\nformula = "B + lora"', differs=0.05)

    assert not any(name.startswith("lora_te") for name in lora)
    assert any(name.startswith("lora_unet") for name in lora)
    assert torch.equal(space.load("back")[ENCODER], related("B")[ENCODER])


def test_convolutions_and_tensors_may_be_left_out(space):
    """`conv_rank = 0` leaves out what is larger than 1×1, `pick` everything that it does not name; a rank may differ by block."""
    lora = made(space, 'rank = { base = 4, blocks = { CLIP_L = 2 } }\nconv_rank = 0\npick = ["unet", "clip_l"]')

    assert f"{NAMES[SPATIAL]}.alpha" not in lora
    assert lora[f"{NAMES[LINEAR]}.alpha"].item() == 4
    assert lora[f"{NAMES[ENCODER]}.alpha"].item() == 2


def test_notes_say_what_a_lora_cannot_hold(space):
    """A plan counts the tensors; a build says how much of the difference they are."""
    for name in "AB":
        space.checkpoint(name, related(name))
    space.write("recipe.toml", RECIPE + "rank = 4")
    options = Options(store=space.path / "cache", out=space.path / "out", reach=Reach(jobs=2, offline=True))
    planned = plan_build(space.path / "recipe.toml", options, Silent())

    assert any("leaves out what a LoRA cannot hold" in text for text in planned.warnings)
    assert any("% of the difference" in text for text in space.build().warnings)


def test_a_plan_knows_what_it_can(space):
    """Before anything is made, a plan counts the bytes of fixed ranks, and says of others that they are not known."""
    for name in "AB":
        space.checkpoint(name, related(name))
    options = Options(store=space.path / "cache", out=space.path / "out", reach=Reach(jobs=2, offline=True))
    space.write("recipe.toml", RECIPE + 'energy = 0.9\n[step.back]\nformula = "B + lora"')

    assert any("decides its ranks while it is built" in text for text in plan_build(space.path / "recipe.toml", options, Silent()).warnings)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ("", "says nothing of how much it keeps"),
        ("energy = 0.9\nrandomized = true", "is randomized and has no `rank`"),
        ("rank = 0", "would have no module at all"),
        ('rank = 4\npick = ["nothing*"]', "matches no tensor"),
    ],
)
def test_an_extraction_that_means_nothing_is_refused(space, fields, complaint):
    """Before anything is read but headers."""
    with pytest.raises(SdbuildError, match=complaint):
        made(space, fields)


def test_a_model_cannot_be_resized(space):
    """`resize_lora` is for adapters."""
    with pytest.raises(SdbuildError, match="names `A` as an adapter, which is a checkpoint"):
        made(space, 'rank = 4\n[step.small]\nmethod = "resize_lora"\nadapter = "A"\nrank = 2')


def test_an_extraction_is_made_once(space):
    """The second run has nothing to do; a new title re-emits the file and leaves its tensors, and what was found of them."""
    made(space, "rank = 4")
    before = (space.path / "out" / "lora.safetensors").read_bytes()

    assert states(space.build()) == {"lora": "reused"}
    space.edit("[step.lora]", '[step.lora]\ntitle = "Another"')
    assert states(space.build()) == {"lora": "re-emitted"}
    with safe_open(space.path / "out" / "lora.safetensors", "pt") as file:
        said = file.metadata()
    assert said["modelspec.title"] == "Another"
    assert said["ss_network_dim"] == "4"
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    start = 8 + int.from_bytes(before[:8], "little")
    assert said["sshs_model_hash"] == hashlib.sha256(before[start:]).hexdigest()


def test_threads_change_nothing(space):
    """One thread or three, the same file."""
    made(space, "rank = 4\nrandomized = true")
    first = (space.path / "out" / "lora.safetensors").read_bytes()
    space.build(jobs=3, store=space.path / "other", out=space.path / "elsewhere")

    assert (space.path / "elsewhere" / "lora.safetensors").read_bytes() == first


def test_what_is_not_finite_is_refused_by_name(space):
    """A NaN in a source is not turned into factors."""
    for name in "AB":
        tensors = related(name)
        tensors[LINEAR][0, 0] = math.nan
        space.checkpoint(name, tensors)
    space.write("recipe.toml", RECIPE + "rank = 4")

    with pytest.raises(SdbuildError, match="infinite or not numbers"):
        space.build()


def test_one_that_fails_leaves_the_others(space):
    """Told to keep going, a build fails what stands on an adapter that cannot be made, and makes the rest."""
    tensors = related("A")
    tensors[LINEAR][0, 0] = math.nan
    space.checkpoint("A", tensors)
    space.checkpoint("B", related("B"))
    more = 'artifact = true\n[step.back]\nformula = "B + lora"\n[step.half]\nformula = "0.5 * B"'
    space.write("recipe.toml", RECIPE + f"rank = 4\n{more}")

    assert states(space.build(keep_going=True)) == {"lora": "failed", "back": "failed", "half": "built"}


def test_bare_files_are_extracted_and_baked(space):
    """Files that hold nothing but the diffusion model leave its prefix out; the names of modules do not change."""
    bare = "double_blocks.0.img_attn.qkv.weight"
    architecture = architecture_named("flux/schnell")
    for letter in "AB":
        tensors = {name.removeprefix(architecture.bare): tensor for name, tensor in checkpoints.miniature("flux/schnell", "base", every=60).items()}
        space.checkpoint(letter, tensors | {bare: checkpoints.numbers(letter, bare, (24, 12))})
    text = RECIPE.replace('"sd1"', '"flux/schnell"') + 'rank = 12\ndtype = "fp32"\nartifact = true\n[step.back]\nformula = "B + lora"\ndtype = "fp32"'
    space.write("recipe.toml", text)
    space.build()

    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in space.load("lora")
    torch.testing.assert_close(space.load("back")[bare], checkpoints.numbers("A", bare, (24, 12)).float(), rtol=0, atol=1e-6)


def test_fused_tensors_of_openclip_come_apart(space):
    """SDXL's second text encoder fuses q, k and v, and loaders know them apart; together they are what was fused."""
    fused = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
    for name in "AB":
        tensors = checkpoints.miniature("sdxl", "base", every=60)
        tensors[fused] = checkpoints.numbers(name, fused, (36, 12))
        space.checkpoint(name, tensors)
    space.write(
        "recipe.toml", RECIPE.replace("sd1", "sdxl") + 'rank = 12\ndtype = "fp32"\nartifact = true\n[step.back]\nformula = "B + lora"\ndtype = "fp32"'
    )
    space.build()
    lora = space.load("lora")
    parts = [product(lora, f"lora_te2_text_model_encoder_layers_3_self_attn_{letter}_proj") for letter in "qkv"]
    original, base = (checkpoints.numbers(name, fused, (36, 12)).double().numpy() for name in "AB")

    np.testing.assert_allclose(np.concatenate(parts), original - base, atol=1e-6)
    np.testing.assert_allclose(space.load("back")[fused].double().numpy(), original, atol=1e-6)


def test_projections_that_files_may_lack_are_extracted_all_the_same(space):
    """SDXL's second text encoder has a projection that no sampler needs; its difference is in the LoRA, and baked it comes back."""
    name = "conditioner.embedders.1.model.text_projection"
    base = checkpoints.miniature("sdxl", "base", every=60) | {name: checkpoints.numbers("base", name, (20, 20), torch.float32)}
    tuned = base | {name: base[name] + checkpoints.numbers("change", name, (20, 20), torch.float32)}
    for letter, tensors in (("A", tuned), ("B", base)):
        space.checkpoint(letter, tensors)
    space.write("recipe.toml", RECIPE.replace("sd1", "sdxl") + 'rank = 20\ndtype = "fp32"\n[step.back]\nformula = "B + lora"\ndtype = "fp32"\n')
    space.build()

    assert (space.load("back")[name] - tuned[name]).abs().max() < 1e-6
