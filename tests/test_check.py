"""Type inference for checkpoints: every mismatch at once, from headers alone, before anything is read or written."""

from __future__ import annotations

import checkpoints
import pytest
import torch
from conftest import PAIR, Space, states

from sdmerge_build.errors import RecipeError, SdbuildError, SpaceError


def complaints(space: Space, **options) -> str:
    """Build, and return what was complained of; nothing may have been made."""
    with pytest.raises(SdbuildError) as caught:
        space.build(**options)
    assert not (space.path / "out").exists()
    return "\n".join(str(issue) for issue in caught.value.issues)


def test_sdxl_in_an_sd1_recipe_is_named_as_such(space: Space):
    """A checkpoint of another architecture is named by its own, with the line to write."""
    space.pair()
    space.checkpoint("B", checkpoints.miniature("sdxl", "B", every=60))
    text = complaints(space)

    assert "recipe.toml:8: source `B` is a Stable Diffusion XL checkpoint, but the recipe merges Stable Diffusion 1.x" in text
    assert 'write `architecture = "sdxl"`' in text


def test_a_lora_in_place_of_a_checkpoint_is_named(space: Space):
    """A LoRA is recognised as one, and one of something else as that."""
    space.pair()
    space.checkpoint("B", {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(8, 8)})

    assert "adapter `B`: 1 of its 1 tensors match nothing of Stable Diffusion 1.x" in complaints(space)


def test_a_part_of_a_checkpoint_says_what_it_lacks(space: Space):
    """A file that is of no known architecture says which tensors it would need."""
    space.pair()
    space.checkpoint("B", {"first_stage_model.decoder.conv_in.bias": torch.zeros(8)})

    assert "it lacks `model.diffusion_model.input_blocks.11.0.in_layers.2.weight`" in complaints(space)


def test_every_mismatch_is_reported_at_once(space: Space):
    """Missing tensors, extra tensors and shapes are reported together, each by name."""
    space.pair()
    b = checkpoints.miniature("sd1", "B", every=40)
    names = [n for n in b if "model.diffusion_model.output_blocks" in n]
    del b[names[0]], b[names[1]]
    b[names[2]] = torch.zeros(2, 2)
    b["model.diffusion_model.control.weight"] = torch.zeros(8)
    space.checkpoint("B", b)
    text = complaints(space)

    assert f"step `mix` needs tensors that `B` lacks: `{names[0]}`, `{names[1]}`" in text
    assert 'write `missing = "keep"` to take them from `A`' in text
    assert "step `mix` needs tensors that `A` lacks: `model.diffusion_model.control.weight`" in text
    assert 'write `extra = "keep"` to take them from `B`, or `extra = "drop"` to leave them out' in text
    assert (
        f"has models of different shapes ({'×'.join(map(str, checkpoints.miniature('sd1', 'B', every=40)[names[2]].shape))} and 2×2): `{names[2]}`"
        in text
    )


def test_policies_keep_and_drop_with_a_note(space: Space):
    """`keep` takes the first model's tensor, `drop` leaves out what only a later one has, and both are said aloud."""
    space.pair(PAIR + 'missing = "keep"\nextra = "drop"\nmismatch = "keep"\n')
    a, b = (checkpoints.miniature("sd1", n, every=40) for n in "AB")
    names = [n for n in b if "model.diffusion_model.output_blocks" in n]
    del b[names[0]]
    b[names[1]] = torch.zeros(2, 2)
    b["model.diffusion_model.control.weight"] = torch.zeros(8)
    space.checkpoint("B", b)
    report = space.build()
    mix = space.load("mix")

    assert mix[names[0]].equal(a[names[0]])
    assert mix[names[1]].equal(a[names[1]])
    assert set(mix) == set(a)
    assert len(report.warnings) == 3
    assert f"step `mix` takes from `A` what `B` lacks: `{names[0]}`" in report.warnings


def test_optional_tensors_are_kept_from_whoever_has_them(space: Space):
    """EMA weights, schedules and `position_ids` need not be in every parent, and are kept exactly."""
    space.pair()
    a = checkpoints.miniature("sd1", "A", every=40)
    a = {n: t for n, t in a.items() if not n.endswith("position_ids")}
    b = checkpoints.miniature("sd1", "B", every=40) | {"betas": torch.linspace(0, 1, 1000), "model_ema.diffusion_modelout2bias": torch.ones(4)}
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    b[position] = torch.arange(77).reshape(1, 77)
    space.checkpoint("A", a)
    space.checkpoint("B", b)
    report = space.build()
    mix = space.load("mix")

    assert mix["betas"].equal(b["betas"])
    assert mix[position].equal(b[position])
    assert mix["model_ema.diffusion_modelout2bias"].dtype == torch.float16
    assert any("takes from `B` what `A` lacks" in note for note in report.warnings)


def test_what_a_step_says_of_extra_tensors_wins(space: Space):
    """
    EMA weights and constants that only a later parent has are left out when the step says so.
    """
    space.pair(PAIR + 'extra = "drop"\n')
    b = checkpoints.miniature("sd1", "B", every=40) | {"betas": torch.linspace(0, 1, 1000), "model_ema.diffusion_modelout2bias": torch.ones(4)}
    space.checkpoint("B", b)
    report = space.build()

    assert set(space.load("mix")) == set(checkpoints.miniature("sd1", "A", every=40))
    assert report.warnings == ("step `mix` leaves out what `A` lacks: `betas`, `model_ema.diffusion_modelout2bias`",)


def test_a_ratio_far_out_is_a_warning(space: Space):
    """
    `alpha = 50` is built, and said to be unusual.
    """
    space.pair(PAIR.replace('formula = "0.3 * A + 0.7 * B"', 'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = 50'))

    assert "`alpha` of step `mix` is 50; ratios usually lie between 0 and 1" in space.build().warnings


def test_position_ids_are_not_averaged_even_as_fractions(space: Space):
    """`position_ids` that an earlier merge turned into float16 are copied as they are, not averaged."""
    space.pair()
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    for name in "AB":
        tensors = checkpoints.miniature("sd1", name, every=40)
        tensors[position] = torch.arange(77, dtype=torch.float16).reshape(1, 77) + (name == "B")
        space.checkpoint(name, tensors)
    space.build()

    assert space.load("mix")[position].equal(torch.arange(77, dtype=torch.float16).reshape(1, 77))


def test_mixed_dtypes_inside_one_file_are_normal(space: Space):
    """A parent that is half float32, half float16 merges like any other."""
    space.pair()
    b = {n: t.float() if i % 2 and t.is_floating_point() else t for i, (n, t) in enumerate(checkpoints.miniature("sd1", "B", every=40).items())}
    space.checkpoint("B", b)
    space.build()

    assert {t.dtype for n, t in space.load("mix").items() if "position_ids" not in n} == {torch.float16}


def test_whole_numbers_against_fractions_are_refused(space: Space):
    """A tensor that is whole numbers in one parent and fractions in another is a mismatch."""
    space.pair(PAIR.replace("sd1", "generic"))
    space.checkpoint("A", {"w": torch.zeros(8)})
    space.checkpoint("B", {"w": torch.zeros(8, dtype=torch.int64)})

    assert "would mix whole numbers with fractions (F32 and I64): `w`" in complaints(space)


def test_shares_of_zero_everywhere_are_refused(space: Space):
    """A step that takes nothing from any model is a mistake."""
    space.pair(PAIR.replace('formula = "0.3 * A + 0.7 * B"', 'method = "linear"\nmodels = ["A", "B"]\nweights = [0, 0]'))

    assert "takes nothing from any model" in complaints(space)


def test_globs_that_match_nothing_are_refused(space: Space):
    """A misspelt glob in a rule or a selection is not obeyed in silence."""
    ratio = '{ base = 0.5, rules = [{ match = "*atn2*", value = 1.0 }] }'
    space.pair(PAIR.replace('formula = "0.3 * A + 0.7 * B"', f'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = {ratio}'))

    assert "has in `alpha` a rule `*atn2*`, which matches no tensor" in complaints(space)


def test_shares_that_do_not_sum_to_one_are_a_warning(space: Space):
    """The build goes on, and says the sum."""
    space.pair(PAIR.replace("0.7 * B", "0.6 * B"))

    assert "the shares of step `mix` sum to 0.9, not to 1" in space.build().warnings


def test_a_full_disk_is_noticed_before_anything_is_computed(space: Space, monkeypatch):
    """The message has the bytes that are needed and those that are free."""
    space.pair()
    monkeypatch.setattr("sdmerge_build.supply.free_space", lambda _: 1000)
    with pytest.raises(SpaceError) as caught:
        space.build()

    assert "are needed, 1 kB are free" in str(caught.value)
    assert caught.value.exit_code == 7


def test_checking_takes_headers_alone(space: Space, monkeypatch):
    """A mismatch is found without the first tensor being computed: the arithmetic is never asked for."""
    space.pair()
    b = checkpoints.miniature("sd1", "B", every=40)
    b.pop(next(n for n in b if "output_blocks" in n))
    space.checkpoint("B", b)
    monkeypatch.setattr("sdmerge_build.build._Run.make", lambda *_: pytest.fail("it was computed"))
    with pytest.raises(RecipeError):
        space.build()


def test_keep_going_builds_what_is_sound(space: Space):
    """With keep_going a mismatch in one step and a missing source leave the other artifacts to be built."""
    space.pair(
        PAIR
        + '\n[source.C]\npath = "C.safetensors"\n[source.D]\npath = "D.safetensors"\n[step.bad]\nformula = "0.5 * A + 0.5 * C"\n[step.gone]\nformula = "0.5 * A + 0.5 * D"\n'
    )
    c = checkpoints.miniature("sd1", "C", every=40)
    c.pop(next(n for n in c if "output_blocks" in n))
    space.checkpoint("C", c)
    report = space.build(keep_going=True)

    assert states(report) == {"mix": "built", "bad": "failed", "gone": "blocked"}
    assert report.exit_code == 2
    assert "lacks" in str(report.wishes[1].error)
    assert "there is no file `D.safetensors`" in str(report.wishes[2].error)


def test_keep_going_gives_up_only_the_artifact_that_is_not_finite(space: Space):
    """With keep_going a value that is not finite fails its own artifact, and the others of the same pass are built."""
    space.pair(PAIR + '\n[step.other]\nformula = "0.5 * A + 0.5 * A"\n')
    b = checkpoints.miniature("sd1", "B", every=40)
    b[next(n for n in b if "input_blocks" in n)].flatten()[0] = float("nan")
    space.checkpoint("B", b)
    report = space.build(keep_going=True)

    assert states(report) == {"mix": "failed", "other": "built"}
    assert report.exit_code == 1
    assert not (space.path / "out" / "mix.safetensors").exists()
