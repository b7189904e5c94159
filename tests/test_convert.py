"""Names: original, diffusers and bare, from any to any, and not a bit of any number changed."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import test_folder
import torch
from conftest import Space
from test_parts import CLIP_G, UNET, VAE, component, cook, family, refusal, same

from sdmerge_build.tensorfile import read_header


def converted(*, naming: str, a: str = "A", pick: str = "", name: str = "new") -> str:
    return f'[step.{name}]\nmethod = "convert"\na = "{a}"\nnaming = "{naming}"\ndtype = "keep"\n' + (f'pick = ["{pick}"]\n' if pick else "")


def below(components: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put a folder's components into one file, each below its name."""
    return {f"{component}.{name}": tensor for component, held in components.items() for name, tensor in held.items()}


def split(space: Space, name: str, root: Path) -> Path:
    """Split a converted file into a folder, with the safetensors library."""
    components: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in space.load(name).items():
        folder, _, rest = key.partition(".")
        components.setdefault(folder, {})[rest] = tensor
    return test_folder.write_folder(root, components)


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_a_checkpoint_is_named_as_diffusers_would(space: Space, architecture):
    """
    Every name, shape and bit is that of the folder that an oracle of its own makes.
    """
    [a] = family(architecture, "A")
    cook(space, converted(naming="diffusers"), architecture, A=a)
    space.build()

    assert same(space.load("new"), below(test_folder.as_folder(a, architecture)))


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_there_and_back_is_where_it_began(space: Space, architecture):
    """
    Diffusers → original → diffusers and original → diffusers → original, as steps and as files, change no bit.
    """
    [a] = family(architecture, "A")
    theirs = below(test_folder.as_folder(a, architecture))
    steps = converted(naming="diffusers", name="there") + converted(naming="original", a="there", name="back")
    steps += converted(naming="original", a="D", name="read") + converted(naming="diffusers", a="D", name="again")
    steps += converted(naming="diffusers", a="back", name="twice")
    cook(
        space,
        steps.replace("[step.read]", "[step.read]\nartifact = true").replace("[step.back]", "[step.back]\nartifact = true"),
        architecture,
        A=a,
        D=theirs,
    )
    space.build()

    assert same(space.load("back"), a)
    assert same(space.load("read"), a)
    assert same(space.load("again"), theirs)
    assert same(space.load("twice"), theirs)


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_a_converted_checkpoint_split_into_a_folder_is_the_same_checkpoint(space: Space, architecture):
    """
    The reader of diffusers folders makes of it the file it was made of, with the same tensor digest.
    """
    [a] = family(architecture, "A")
    cook(space, converted(naming="diffusers"), architecture, A=a)
    space.build()
    folder = split(space, "new", space.path / "folder")
    back = test_folder.assembled_file(folder, space.path / "back.safetensors")

    assert same(checkpoints_of(back), a)
    shown = [space.sdbuild("inspect", str(path), "--json").stdout for path in (back, space.path / "A.safetensors")]
    digests = [line for text in shown for line in text.splitlines() if "tensor_digest" in line]
    assert len(digests) == 2
    assert digests[0] == digests[1]


def checkpoints_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_a_merge_is_converted_slice_by_slice(space: Space):
    """
    q, k and v of a merged tensor larger than a slice are its thirds, also where the merge draws random numbers by the tensor's own name.
    """
    a, b = family("sdxl", "A", "B")
    name = CLIP_G + "transformer.resblocks.0.attn.in_proj_weight"
    for n, model in enumerate((a, b)):
        model[name] = checkpoints.seeded(n, (3 * 333, 1024), torch.float16)
    noisy = '[step.noisy]\nmethod = "add_noise"\na = "mix"\namount = 0.01\n'
    steps = '[step.mix]\nmethod = "slerp"\na = "A"\nb = "B"\n' + noisy + "artifact = true\n" + converted(naming="diffusers", a="noisy")
    cook(space, steps, "sdxl", A=a, B=b)
    space.build()
    whole, theirs = space.load("noisy"), space.load("new")
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn."

    assert same(theirs, below(test_folder.as_folder(whole, "sdxl")))
    assert torch.cat([theirs[f"{layer}{x}_proj.weight"] for x in "qkv"]).equal(whole[name])

    space.edit("artifact = true\n", "")
    space.edit('dtype = "keep"', 'dtype = "fp16"')
    space.build()
    assert theirs.keys() == space.load("new").keys()


def test_an_unkept_merge_is_converted_as_a_kept_one(space: Space):
    """
    The parts of a tensor that is nowhere written are those of the one that is.
    """
    a, b = family("sdxl", "A", "B")
    mix = '[step.mix]\nmethod = "slerp"\na = "A"\nb = "B"\ndtype = "fp16"\n'
    cook(space, mix + converted(naming="diffusers", a="mix"), "sdxl", A=a, B=b)
    space.build()
    unkept = space.load("new")
    cook(space, mix + "artifact = true\n" + converted(naming="diffusers", a="mix"), "sdxl", A=a, B=b)
    space.build(store=space.path / "other")

    assert same(unkept, below(test_folder.as_folder(space.load("mix"), "sdxl")))


def test_one_component_has_the_names_of_its_own_file(space: Space):
    """
    A VAE alone is named as in diffusion_pytorch_model.safetensors, or as a stand-alone file in original naming.
    """
    [a] = family("sd1", "A")
    steps = (
        converted(naming="diffusers", pick="vae")
        + converted(naming="bare", pick="vae", name="bare")
        + converted(naming="bare", pick="clip_l", name="l")
    )
    cook(space, steps, A=a)
    space.build()

    assert same(space.load("new"), test_folder.as_folder(a, "sd1")["vae"])
    assert same(space.load("bare"), component(a, VAE))
    assert same(space.load("l"), test_folder.as_folder(a, "sd1")["text_encoder"])


@pytest.mark.parametrize("architecture", ["flux/dev", "flux/schnell", "sd3/2b", "sd3/3.5-medium"])
def test_transformers_lose_their_prefix_and_gain_it(space: Space, architecture):
    """
    Flux and SD 3: what ComfyUI reads as a diffusion model alone has names without `model.diffusion_model.`.
    """
    whole = checkpoints.miniature(architecture, "F")
    cook(space, converted(naming="bare", pick="dit") + converted(naming="original", a="new", name="back"), architecture.split("/")[0], A=whole)
    space.edit("[step.new]", "[step.new]\nartifact = true")
    space.build()

    assert same(space.load("new"), component(whole, UNET))
    assert same(space.load("back"), component(whole, UNET, to=UNET))


@pytest.mark.parametrize("architecture", ["flux", "sd3"])
def test_transformers_of_diffusers_come_back_bit_for_bit(space: Space, architecture):
    """
    q, k and v, one four times as large beside them in Flux, and halves that change places: there and back nothing has changed.
    """
    whole = {n: t for n, t in checkpoints.miniature(architecture, "F").items() if n.startswith(UNET)}
    for n, name in enumerate(whole):
        shape = list(whole[name].shape)
        if "linear1" in name:
            shape[0] = 21
        elif "qkv" in name:
            shape[0] = 12
        elif "adaLN_modulation" in name:
            shape[0] = 8
        whole[name] = checkpoints.seeded(n, tuple(shape), torch.float16)
    steps = converted(naming="diffusers", name="there") + converted(naming="original", a="there", name="back")
    cook(space, steps.replace("[step.there]", "[step.there]\nartifact = true"), architecture, A=whole)
    space.build()
    there = space.load("there")
    ours, theirs = whole[UNET + "final_layer.adaLN_modulation.1.weight"], there["norm_out.linear.weight"]

    assert same(space.load("back"), whole)
    assert theirs.equal(torch.cat([ours[4:], ours[:4]]))
    if architecture == "flux":
        parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
        linear = torch.cat([there[f"single_transformer_blocks.0.{part}.weight"] for part in parts])
        assert linear.equal(whole[UNET + "single_blocks.0.linear1.weight"])


def test_what_diffusers_has_no_place_for_is_left_out_aloud(space: Space):
    """
    Schedules and averages are named before they are gone.
    """
    [a] = family("sd1", "A")
    cook(space, converted(naming="diffusers"), A=a | {"betas": torch.ones(8), "model_ema.decay": torch.tensor(0.9)})
    report = space.build()

    assert report.warnings == ("step `new` leaves out what diffusers has no place for: `betas`, `model_ema.decay`",)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (converted(naming="bare"), "step `new` has names without prefixes for one component alone, and there are `clip_l`, `unet`, `vae`"),
        (converted(naming="difusers"), "did you mean `diffusers`?"),
        (converted(naming="bare", pick="*nothing*"), "has `*nothing*` in `pick`, which matches no tensor"),
        ('[step.new]\nmethod = "convert"\na = "A"\n', "step `new` lacks `naming`"),
        (converted(naming="diffusers", name="d") + converted(naming="diffusers", a="d"), "step `new` is named as diffusers does already"),
    ],
)
def test_mistakes_in_names_are_explained(space: Space, step, said):
    """
    Several components cannot all be without a prefix, and a misspelt naming is no naming.
    """
    [a] = family("sdxl" if "is named" in said else "sd1", "A")
    cook(space, step, "sdxl" if "is named" in said else "sd1", A=a)

    assert said in refusal(space)


def test_a_conversion_reads_each_tensor_once(space: Space):
    """
    Renaming, stacking and taking apart stream: what is read is what the sources hold.
    """
    [a] = family("sdxl", "A")
    cook(space, converted(naming="diffusers"), "sdxl", A=a)
    report = space.build()
    header = read_header(space.path / "A.safetensors")

    assert report.bytes_read == sum(spec.nbytes for spec in header.tensors.values())


def test_a_component_is_replaced_before_it_is_renamed(space: Space):
    """`vae` beside `convert` would leave the old one under the new names; it is refused, and the way is said."""
    space.pair('recipe = 1\narchitecture = "sd1"\n[source.A]\npath = "A.safetensors"\n[source.B]\npath = "B.safetensors"\n'
               '[step.c]\nmethod = "convert"\na = "A"\nnaming = "diffusers"\nvae = "B"\n')  # fmt: skip
    run = space.sdbuild("recipe.toml")

    assert run.returncode == 2
    assert "replace it in a step before, and convert that step" in run.stderr
