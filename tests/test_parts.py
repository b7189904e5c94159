"""Parts: components of several models in one checkpoint, and files that hold a component alone, under whatever names they have."""

from __future__ import annotations

from collections.abc import Mapping

import checkpoints
import pytest
import test_folder
import torch
from conftest import Space, digests

from sdmerge_build.architectures import architecture_named
from sdmerge_build.architectures.components import read_components
from sdmerge_build.errors import SdbuildError
from sdmerge_build.lineage import shares_of

HEAD = 'recipe = 1\narchitecture = "{}"\n'
VAE, CLIP, UNET = "first_stage_model.", "cond_stage_model.transformer.", "model.diffusion_model."
CLIP_G = "conditioner.embedders.1.model."
Tensors = dict[str, torch.Tensor]


def component(tensors: Mapping[str, torch.Tensor], prefix: str, *, to: str = "") -> Tensors:
    """Take one component out, under other names."""
    return {to + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def family(architecture: str, *seeds: str) -> list[Tensors]:
    """Make checkpoints with every name of an architecture, each with numbers of its own."""
    made = test_folder.miniature(architecture)
    return [{n: t if not t.is_floating_point() else (t * (k + 1)).half() for n, t in made.items()} for k, _ in enumerate(seeds)]


def cook(space: Space, steps: str, architecture: str = "sd1", **files: Tensors) -> None:
    """Write checkpoints, and a recipe over them."""
    for name, tensors in files.items():
        space.checkpoint(name, tensors)
    sources = "".join(f'[source.{name}]\npath = "{name}.safetensors"\n' for name in files)
    space.write("recipe.toml", HEAD.format(architecture) + sources + steps)


def refusal(space: Space) -> str:
    with pytest.raises(SdbuildError) as caught:
        space.build()
    return str(caught.value)


def same(made: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    """Compare state dicts bit by bit, dtypes too."""
    return test_folder.equal(made, wanted)


def test_a_checkpoint_is_put_together_from_components_of_three(space: Space):
    """
    Each component is its own model's, bit for bit; the schedule comes with the diffusion model, and nothing else comes at all.
    """
    a, b, c = family("sd1", "A", "B", "C")
    a |= {"betas": torch.linspace(0, 1, 10), "model_ema.decay": torch.tensor(0.9), "global_step": torch.tensor(7)}
    b |= {"betas": torch.linspace(0, 2, 10)}
    cook(space, '[step.whole]\nmethod = "parts"\nunet = "A"\nvae = "B"\nclip_l = "C"\n', A=a, B=b, C=c)
    report = space.build()
    wanted = component(a, UNET, to=UNET) | component(b, VAE, to=VAE) | component(c, CLIP, to=CLIP) | {"betas": a["betas"]}

    assert same(space.load("whole"), wanted)
    assert report.warnings == ()


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "some.thing."])
def test_a_vae_in_original_naming_is_taken_behind_any_prefix(space: Space, prefix):
    """
    A stand-alone VAE is one whatever its names begin with.
    """
    a, b = family("sd1", "A", "B")
    cook(space, '[step.mix]\nmethod = "copy"\na = "A"\nvae = "V"\n', A=a, V=component(b, VAE, to=prefix))
    space.build()

    assert same(space.load("mix"), component(a, UNET, to=UNET) | component(a, CLIP, to=CLIP) | component(b, VAE, to=VAE))


@pytest.mark.parametrize("is_old", [False, True])
def test_a_vae_in_diffusers_naming_gets_its_convolutions_back(space: Space, is_old):
    """
    Linear attention becomes 1×1 convolutions with the same bytes; names of older diffusers too.
    """
    a, b = family("sd1", "A", "B")
    vae = test_folder.as_folder(b, "sd1")["vae"]
    if is_old:
        for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            vae = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in vae.items()}
    cook(space, '[step.mix]\nformula = "0.5 * A + 0.5 * A"\nvae = "V"\n', A=a, V=vae)
    space.build()

    assert same(component(space.load("mix"), VAE), component(b, VAE))


def test_vaes_of_different_naming_can_be_merged(space: Space):
    """
    What two files call by other names is the same tensor, and a merge of two VAEs is a VAE.
    """
    a, b = family("sd1", "A", "B")
    vae = test_folder.as_folder(b, "sd1")["vae"]
    cook(space, '[step.mix]\nformula = "0.25 * V + 0.75 * W"\n', V=component(a, VAE), W=vae)
    report = space.build()
    wanted = {n: (t.float() * 0.25 + b[n].float() * 0.75).half() for n, t in a.items() if n.startswith(VAE)}

    assert same(space.load("mix"), wanted)
    assert report.warnings == ("artifact `mix` holds no diffusion model, but `vae`",)


def test_a_clip_g_of_transformers_is_stacked_and_turned(space: Space):
    """
    q, k and v of SDXL's second text encoder become one tensor, its projection is transposed, and what no encoder needs is left out aloud.
    """
    a, b = family("sdxl", "A", "B")
    encoder = test_folder.as_folder(b, "sdxl")["text_encoder_2"] | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    cook(space, '[step.mix]\nmethod = "parts"\nbase = "A"\nclip_g = "G"\n', "sdxl", A=a, G=encoder)
    report = space.build()

    assert same(space.load("mix"), {n: b[n] if n.startswith(CLIP_G) else t for n, t in a.items()})
    assert report.warnings == ("source `G` is `clip_g`; what checkpoints have no place for is left out: `text_model.embeddings.position_ids`",)


def test_stacked_tensors_are_merged_slice_by_slice(space: Space):
    """
    A tensor stacked of three stored ones, larger than any slice, is merged with one that is whole.
    """
    a, b = family("sdxl", "A", "B")
    name = CLIP_G + "transformer.resblocks.0.attn.in_proj_weight"
    for n, model in enumerate((a, b)):
        model[name] = checkpoints.seeded(n, (3 * 333, 1024), torch.float16)
    encoder = test_folder.as_folder(b, "sdxl")["text_encoder_2"]
    steps = '[step.mix]\nformula = "0.5 * A + 0.5 * G"\n[step.noisy]\nmethod = "add_noise"\na = "mix"\namount = 0.01\n'
    cook(space, steps, "sdxl", A=component(a, CLIP_G), G=encoder)
    space.edit("[step.mix]", "[step.mix]\nartifact = true")
    space.build()

    assert space.load("mix")[name].equal(((a[name].float() + b[name].float()) * 0.5).half())


def test_a_plain_text_encoder_is_recognised_by_what_it_holds(space: Space):
    """
    In SDXL two text encoders have the same names; the number of layers tells them apart, and a file of openai's keeps its eyes to itself.
    """
    a, b = family("sdxl", "A", "B")
    clip_l = test_folder.as_folder(b, "sdxl")["text_encoder"]
    seen = clip_l | {
        "vision_model.post_layernorm.weight": torch.ones(4),
        "logit_scale": torch.tensor(4.6),
        "text_projection.weight": torch.ones(4, 4),
    }
    cook(space, '[step.mix]\nmethod = "parts"\nbase = "A"\nclip_l = "L"\n', "sdxl", A=a, L=seen)
    report = space.build()
    prefix = "conditioner.embedders.0."

    assert same(space.load("mix"), {n: b[n] if n.startswith(prefix) else t for n, t in a.items()})
    assert "left out: `logit_scale`, `text_projection.weight`, `vision_model.post_layernorm.weight`" in report.warnings[0]


def test_files_of_comfyui_are_parts_of_flux(space: Space):
    """
    clip_l.safetensors, t5xxl.safetensors, ae.safetensors and a bare transformer make one checkpoint, the transformer behind its prefix.
    """
    whole = checkpoints.miniature("flux/dev", "F")
    files = {
        "dit": component(whole, UNET),
        "l": component(whole, "text_encoders.clip_l.transformer.") | {"logit_scale": torch.tensor(4.6)},
        "t": component(whole, "text_encoders.t5xxl.transformer."),
        "v": component(whole, "vae."),
    }
    files["t"]["encoder.embed_tokens.weight"] = files["t"]["shared.weight"].clone()
    cook(space, '[step.whole]\nmethod = "parts"\ndit = "dit"\nclip_l = "l"\nt5 = "t"\nvae = "v"\n', "flux", **files)
    report = space.build()

    assert same(space.load("whole"), whole)
    assert len(report.warnings) == 2


def test_a_merge_of_bare_transformers_gains_its_parts(space: Space):
    """
    The shorthand on a formula of bare files makes a whole checkpoint of it.
    """
    a, b = (checkpoints.miniature("sd3/2b", seed) for seed in "AB")
    bare = {name: component(model, UNET) for name, model in (("A", a), ("B", b))}
    steps = '[step.mix]\nformula = "0.5 * A + 0.5 * B"\nvae = "W"\nclip_l = "W"\nclip_g = "W"\nt5 = "W"\n'
    cook(space, steps, "sd3", W=a, **bare)
    report = space.build()
    mix = space.load("mix")

    assert mix.keys() == {n for n in a if not n.endswith("sigmas")}
    assert all(t.equal(a[n]) for n, t in mix.items() if not n.startswith(UNET))
    assert all(t.equal(((a[n].float() + b[n].float()) * 0.5).half()) for n, t in mix.items() if n.startswith(UNET))
    assert report.warnings == ()


def test_the_shorthand_is_a_step_like_any_other(space: Space):
    """
    It is in the key and in the lineage, its source counts, and it changes nothing of the rest.
    """
    a, b = family("sd1", "A", "B")
    plain = '[step.mix]\nformula = "0.3 * A + 0.7 * B"\n'
    cook(space, plain, A=a, B=b, V=component(b, VAE), W=component(a, VAE))
    before = digests(space.build())["mix"]
    rest = space.load("mix")
    space.write("recipe.toml", (space.path / "recipe.toml").read_text() + 'vae = "V"\n')
    report = space.build()
    mix, manifest = space.load("mix"), (space.path / "out" / "mix.manifest.toml").read_text()

    assert digests(report)["mix"] != before
    assert same(mix, rest | component(b, VAE, to=VAE))
    assert 'name = "V"' in manifest
    assert 'name = "W"' not in manifest
    assert digests(space.build())["mix"] == digests(report)["mix"]
    space.edit('vae = "V"', 'vae = "W"')
    assert digests(space.build())["mix"] != digests(report)["mix"]
    assert space.load("mix")[VAE + "encoder.conv_in.weight"].equal(a[VAE + "encoder.conv_in.weight"])


def test_shares_follow_tensors_to_their_new_names(space: Space):
    """
    What of an artifact is whose is known through steps that move tensors.
    """
    a, b = family("sd1", "A", "B")
    cook(space, '[step.mix]\nformula = "0.25 * A + 0.75 * B"\nvae = "V"\n', A=a, B=b, V=test_folder.as_folder(b, "sd1")["vae"])
    report = space.build()
    from sdmerge_build.check import check
    from sdmerge_build.tensorfile import read_header

    headers = {name: read_header(space.path / f"{name}.safetensors") for name in "ABV"}
    shares = shares_of(report.plan, report.plan.steps["mix"], check(report.plan, headers))

    assert (shares["V"].least, shares["V"].most) == (0, 1)
    assert (shares["A"].least, shares["A"].most) == (0, 0.25)


def test_the_merge_below_the_shorthand_is_rounded_once(space: Space):
    """
    With `fp64` the sum goes straight to the artifact's dtype.
    """
    a, b = family("sd1", "A", "B")
    cook(space, '[step.mix]\nformula = "0.1 * A + 0.9 * B"\ncompute = "fp64"\nvae = "A"\n', A=a, B=b)
    space.build()
    plain = '[step.mix]\nformula = "0.1 * A + 0.9 * B"\ncompute = "fp64"\n'
    mix = space.load("mix")
    cook(space, plain, A=a, B=b)
    space.build()

    assert component(mix, UNET).keys() == component(a, UNET).keys()
    assert same(component(mix, UNET), component(space.load("mix"), UNET))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ('formula = "0.5 * A + 0.5 * A"\nvea = "A"', "has an unknown field `vea`\n\nhint: did you mean `vae`?"),
        ('formula = "0.5 * A + 0.5 * A"\nclip_g = "A"', "components of Stable Diffusion 1.x are unet, clip_l, vae, ema, schedule"),
        ('method = "copy"\na = "A"\nt5 = "A"', "components of Stable Diffusion 1.x are unet, clip_l, vae, ema, schedule"),
        ('method = "parts"\nbase = "A"', "step `x` names no component"),
        (
            'method = "parts"\nunet = "A"\nvae = "V"\nclip_l = "V"',
            "step `x` names `V` as its `clip_l`, which has no `clip_l`\n\nhint: it holds `vae`",
        ),
        ('method = "parts"\nunet = ["A"]', "`unet` of step `x` must be a name"),
        ('method = "parts"\nunet = "Q"', "step `x` names `Q`, which is neither a source nor a step"),
        ('method = "copy"\na = "A"\nvae = "x"', "steps depend on each other: `x` → `x`"),
    ],
)
def test_mistakes_in_parts_are_explained(space: Space, steps, said):
    """
    Misspelt components, components of other architectures, and files that lack what they are named for.
    """
    [a] = family("sd1", "A")
    cook(space, f"[step.x]\n{steps}\n", A=a, V=component(a, VAE))

    assert said in refusal(space)


def test_a_component_that_is_incomplete_or_strange_is_refused(space: Space):
    """
    A VAE without a tensor, and one with a tensor too many, are named with these.
    """
    a = family("sd1", "A")[0]
    vae = component(a, VAE)
    cook(space, '[step.x]\nmethod = "copy"\na = "A"\nvae = "V"\n', A=a, V={n: t for n, t in vae.items() if n != "quant_conv.bias"})
    assert "source `V` is `vae` of Stable Diffusion 1.x, and lacks `first_stage_model.quant_conv.bias`" in refusal(space)

    space.checkpoint("V", vae | {"decoder.up.9.weight": torch.ones(4)})
    assert "1 of its tensors are not: `decoder.up.9.weight`" in refusal(space)

    folder = test_folder.as_folder(a, "sd1")["vae"]
    folder["encoder.mid_block.attentions.0.to_q.weight"] = torch.ones(8, 8, 3, 3, dtype=torch.float16)
    space.checkpoint("V", folder)
    assert "source `V`: dtypes or shapes of `encoder.mid_block.attentions.0.to_q.weight` do not go together" in refusal(space)


def test_the_vae_of_flux_is_not_that_of_sd1():
    """
    Alike in most names, they are told apart by what one of them lacks.
    """
    flux = [name.removeprefix("vae.") for name in architecture_named("flux").layout() if name.startswith("vae.")]

    assert read_components(flux, architecture_named("flux")).is_whole
    assert not read_components(flux, architecture_named("sd1")).is_whole


def test_inspect_says_what_a_stand_alone_file_is(space: Space):
    """
    `sdbuild inspect` names the component, its naming, and the architectures that it belongs to.
    """
    [a] = family("sd1", "A")
    space.checkpoint("V", component(a, VAE))
    space.checkpoint("T", test_folder.as_folder(a, "sd1")["text_encoder"])
    shown = space.sdbuild("inspect", "V.safetensors").stdout

    assert "V.safetensors: vae by itself, in original naming, as in Stable Diffusion 1.x" in shown
    assert "  vae " in shown
    assert "T.safetensors: clip_l by itself" in space.sdbuild("inspect", "T.safetensors").stdout
