"""Pruning and repair: averages, what training left behind, `position_ids`, and what a checkpoint lacks."""

from __future__ import annotations

import pytest
import test_folder
import torch
from conftest import Space
from test_parts import CLIP, UNET, VAE, component, cook, family, refusal, same

from sdmerge_build.architectures import architecture_named
from sdmerge_build.methods.moves import bad_pattern, names_of

POSITIONS = CLIP + "text_model.embeddings.position_ids"
PRUNE = '[step.slim]\nmethod = "prune"\na = "A"\n'
LEFT = {
    "global_step": torch.tensor(470000),
    "loss.discriminator.main.0.weight": torch.ones(4, 4),
    "optimizer_states.0.state.3.exp_avg": torch.ones(4),
    "cond_stage_model.logit_scale": torch.tensor(4.6),
}


def averages(tensors, *, dotted: bool = False):
    """Make the averages of a UNet as Stability's code names them: after the wrapper's own names, without dots."""
    made = {}
    for name, tensor in tensors.items():
        if name.startswith(UNET):
            inner = name.removeprefix("model.")
            made["model_ema." + (inner if dotted else inner.replace(".", ""))] = (tensor.float() * 0.5).clone()
    return made | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32)}


def test_what_training_left_behind_is_dropped_aloud(space: Space):
    """
    Averages, optimizers, losses and counts go; what the text encoder holds stays, though no architecture lists it.
    """
    [a] = family("sd1", "A")
    cook(space, PRUNE, A=a | averages(a) | LEFT)
    report = space.build()

    assert same(space.load("slim"), a | {"cond_stage_model.logit_scale": torch.tensor(4.6).half()})
    assert report.warnings == (
        "step `slim` leaves out what training left behind: `global_step`, `loss.discriminator.main.0.weight`, `optimizer_states.0.state.3.exp_avg`",
    )


def test_the_names_of_averages_are_those_of_real_files():
    """
    `model_ema.diffusion_modelinput_blocks00weight` is the average of the first convolution.
    """
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages(family("sd1", "A")[0])


@pytest.mark.parametrize("dotted", [False, True])
def test_averages_take_the_place_of_weights(space: Space, dotted):
    """
    With `use` every weight of the UNet is its average, whichever way that is spelled, and everything else is as it was.
    """
    [a] = family("sd1", "A")
    cook(space, PRUNE + 'ema = "use"\ndtype = "fp32"\n', A=a | averages(a, dotted=dotted))
    space.build()
    slim = space.load("slim")

    assert slim.keys() == a.keys()
    assert all(slim[n].equal(t.float() * 0.5 if n.startswith(UNET) else t.float()) for n, t in a.items() if t.is_floating_point())


def test_averages_can_be_kept(space: Space):
    """
    With `keep` they are there, rounded like any weight; their counts keep their own dtypes.
    """
    [a] = family("sd1", "A")
    ema = averages(a)
    cook(space, PRUNE + 'ema = "keep"\n', A=a | ema)
    space.build()
    slim = space.load("slim")

    assert slim["model_ema.decay"].dtype == torch.float32
    assert slim["model_ema.num_updates"].dtype == torch.int32
    assert same(component(slim, "model_ema."), {n: t.half() if n.startswith("diff") else t for n, t in component(ema, "model_ema.").items()})


def test_averages_that_are_not_there_cannot_be_used(space: Space):
    """
    Without any, or with one of another shape, `use` is refused.
    """
    [a] = family("sd1", "A")
    cook(space, PRUNE + 'ema = "use"\n', A=a)
    assert "step `slim` has no averages to use: `A` holds none" in refusal(space)

    space.checkpoint("A", a | averages(a) | {"model_ema.diffusion_modelout2bias": torch.ones(99)})
    assert "step `slim` has averages of other shapes than the weights: `model.diffusion_model.out.2.bias`" in refusal(space)


def test_averages_without_weights_are_named(space: Space):
    """
    One that is the average of nothing in the file is left out aloud.
    """
    [a] = family("sd1", "A")
    cook(space, PRUNE + 'ema = "use"\n', A=a | averages(a) | {"model_ema.diffusion_modelnothing": torch.ones(4)})

    assert space.build().warnings == ("step `slim` leaves out averages of what it does not have: `model_ema.diffusion_modelnothing`",)


@pytest.mark.parametrize("broken", [torch.arange(77).half() - 0.01, torch.arange(77).bfloat16(), torch.zeros(77, dtype=torch.int32)])
def test_position_ids_become_counts_again(space: Space, broken):
    """
    Whatever earlier merges made of them: 0 to 76, whole numbers of 64 bits, in the shape they had.
    """
    [a] = family("sd1", "A")
    cook(space, PRUNE + '[step.kept]\nmethod = "prune"\na = "A"\nposition_ids = "keep"\n', A=a | {POSITIONS: broken[None]})
    space.build()

    assert same({"p": space.load("slim")[POSITIONS]}, {"p": torch.arange(77)[None]})
    assert same({"p": space.load("kept")[POSITIONS]}, {"p": broken[None]})


def test_repaired_position_ids_go_on_through_a_merge(space: Space):
    """
    A merge of repaired models has counts, and so has what stands on it from the store.
    """
    a, b = family("sd1", "A", "B")
    steps = PRUNE + 'artifact = true\n[step.mix]\nformula = "0.5 * slim + 0.5 * B"\n'
    cook(space, steps, A=a | {POSITIONS: torch.zeros(1, 77).half()}, B=b)
    space.build()
    assert space.load("mix")[POSITIONS].equal(torch.arange(77)[None])

    space.edit("0.5 * slim + 0.5 * B", "0.25 * slim + 0.75 * B")
    space.build()
    assert space.load("mix")[POSITIONS].equal(torch.arange(77)[None])


def test_components_globs_and_regular_expressions_are_dropped(space: Space):
    """
    Three ways to name what goes, one after the other in a list.
    """
    [a] = family("sd1", "A")
    cook(space, PRUNE + r"""drop = ["vae", "*.time_embed.*", '/output_blocks\.(1[01])\./']""" + "\n", A=a)
    report = space.build()
    gone = [n for n in a if n.startswith(VAE) or ".time_embed." in n or ".output_blocks.10." in n or ".output_blocks.11." in n]

    assert same(space.load("slim"), {n: t for n, t in a.items() if n not in gone})
    assert report.warnings == ("artifact `slim` holds no `vae`: whoever loads it needs that from elsewhere",)


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("/(a+)+$/", "which repeats a group"),
        ("/a*b*c*d*/", "which repeats more than 3 things"),
        ("/" + ".?" * 30 + "~/", "which repeats more than 3 things"),
        ("/" + "(?:.|.)" * 28 + "~/", "or has as many choices"),
        (r"/(.)\\1/", "which looks around or back"),
        ("/(?=x)/", "which looks around or back"),
        ("/a[/", "which cannot be read"),
        ("/nothing at all/", "has `/nothing at all/` in `drop`, which matches no tensor"),
        ("*nothing*", "has `*nothing*` in `drop`, which matches no tensor"),
        ("vea", "did you mean `vae`?"),
    ],
)
def test_mistakes_in_what_is_dropped_are_explained(space: Space, drop, said):
    """
    Expressions that could take for ever are refused, as are those that match nothing.
    """
    [a] = family("sd1", "A")
    cook(space, PRUNE + f'drop = ["{drop}"]\n', A=a)

    assert said in refusal(space)


def test_expressions_that_are_accepted_are_quick():
    """
    What a recipe may say takes no time on the longest names that a header may hold.
    """
    name = "a." * 511 + "!"
    for item in ("/a*.*[a.]+$/", "/(?:a|b)?[0-9]{2}x/", r"/^a\.a/"):
        assert not bad_pattern(item)
        names_of((item,), architecture_named("generic"))(name)


def test_a_checkpoint_says_what_it_lacks(space: Space):
    """
    Without VAE or text encoder, picked on purpose or not, an artifact says so; a step in between says nothing.
    """
    a, b = family("sd1", "A", "B")
    a, b = ({n: t for n, t in model.items() if not n.startswith(VAE)} for model in (a, b))
    steps = '[step.mix]\nformula = "0.5 * A + 0.5 * B"\n[step.unet]\nmethod = "copy"\na = "between"\npick = ["unet"]\n'
    cook(space, steps + '[step.between]\nformula = "0.5 * A + 0.5 * B"\n', A=a, B=b)

    shown = space.sdbuild("recipe.toml", "--dry-run")
    assert "artifact `mix` holds no `vae`" in shown.stdout + shown.stderr
    assert space.build().warnings == (
        "artifact `mix` holds no `vae`: whoever loads it needs that from elsewhere",
        "artifact `unet` holds no `vae` and no `clip_l`: whoever loads it needs that from elsewhere",
    )


def test_pruned_models_of_other_architectures_keep_what_they_need(space: Space):
    """
    SDXL's `logit_scale` and `v_pred`, which look like leftovers, are none.
    """
    a = test_folder.miniature("sdxl") | {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.6).half(), "v_pred": torch.tensor([])}
    cook(space, PRUNE, "sdxl", A=a | {"global_step": torch.tensor(1)})
    space.build()

    assert same(space.load("slim"), a)
