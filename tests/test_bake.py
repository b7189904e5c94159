"""Baking: adapters applied to checkpoints by the whole engine, against plain float64 arithmetic on the same files."""

from __future__ import annotations

import json

import checkpoints
import pytest
import torch
from conftest import Space
from safetensors.torch import save_file

from sdmerge_build import passes, programs
from sdmerge_build.errors import SdbuildError

UNET = "model.diffusion_model."
LINEAR = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV = UNET + "input_blocks.1.0.in_layers.2.weight"
NARROW = UNET + "input_blocks.1.1.proj_in.weight"
ENCODER = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
NORM = UNET + "input_blocks.1.0.in_layers.0.weight"
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
SHAPES = {LINEAR: (24, 16), CONV: (12, 8, 3, 3), NARROW: (16, 24, 1, 1), ENCODER: (20, 20), NORM: (8,)}
MODULES = {  # kohya's names of the same layers
    LINEAR: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    CONV: "lora_unet_down_blocks_0_resnets_0_conv1",
    NARROW: "lora_unet_down_blocks_0_attentions_0_proj_in",
    ENCODER: "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
}
RECIPE = 'recipe = 1\narchitecture = "sd1"\n[defaults]\ndtype = "fp32"\n' + "".join(f'[source.{n}]\npath = "{n}.safetensors"\n' for n in "ABXY")


def model(seed: str) -> dict[str, torch.Tensor]:
    """A thinned checkpoint that has the layers above."""
    tensors = checkpoints.miniature("sd1", seed, every=60)
    return tensors | {name: checkpoints.numbers(seed, name, shape) for name, shape in SHAPES.items()} | {IDS: torch.arange(77).reshape(1, 77)}


def lora(seed: str, rank: int = 3, alpha: float | None = 2.0, targets=tuple(MODULES)) -> dict[str, torch.Tensor]:
    """A LoRA, and a LoCon where layers are convolutions, as kohya saves it."""
    tensors = {}
    for target in targets:
        out, *rest = SHAPES[target]
        name = MODULES[target]
        tensors[f"{name}.lora_down.weight"] = checkpoints.numbers(seed, f"{name}/down", (rank, *rest))
        tensors[f"{name}.lora_up.weight"] = checkpoints.numbers(seed, f"{name}/up", (out, rank, *(1 for _ in rest[1:])))
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def delta(adapter: dict[str, torch.Tensor], target: str) -> torch.Tensor:
    """What a LoRA adds to a layer, in float64."""
    name = MODULES[target]
    up, down = (adapter[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
    return (adapter.get(f"{name}.alpha", torch.tensor(float(len(down)))).item() / len(down) * (up @ down)).reshape(SHAPES[target])


@pytest.fixture
def studio(space: Space) -> Space:
    """Two checkpoints, A and B, and two adapters, X and Y."""
    for name in "AB":
        space.checkpoint(name, model(name))
    for name in "XY":
        space.checkpoint(name, lora(name, rank=3 if name == "X" else 30, alpha=2.0 if name == "X" else None))
    return space


def built(space: Space, step: str, **options) -> dict[str, torch.Tensor]:
    space.write("recipe.toml", RECIPE + step)
    space.build(**options)
    return space.load("baked")


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for a rounding to float32 of the sum, and as large a one of what is added."""
    return found.dtype is torch.float32 and bool((found.double() - expected).abs().max() <= 3e-8)


BOTH = '[step.baked]\nmethod = "bake"\nbase = "A"\nadapters = ["X", "Y"]\nstrength = [0.8, -0.3]\n'


def test_adapters_are_added_as_strongly_as_the_recipe_says(studio: Space):
    """Linear layers, 1×1 and 3×3 convolutions and the text encoder become W + s · alpha / rank · up · down; all else is copied exactly."""
    a, x, y = model("A"), lora("X"), lora("Y", 30, None)
    found = built(studio, BOTH)

    for name in found:
        if name in MODULES:
            assert close(found[name], a[name].double() + 0.8 * delta(x, name) - 0.3 * delta(y, name)), name
        else:
            assert torch.equal(found[name].to(a[name].dtype), a[name]), name


def test_a_formula_and_bake_say_the_same(studio: Space):
    """Adapters in a formula beside one model are those of `bake`, to the last bit."""
    baked = built(studio, BOTH)
    formula = built(studio, '[step.baked]\nformula = "0.8 * X + A - 0.3 * Y"\n')

    assert all(torch.equal(baked[name], formula[name]) for name in baked)


def test_models_are_mixed_and_adapters_added_with_one_rounding(studio: Space):
    """A formula over two models and an adapter is computed in float32 and rounded once, to float16."""
    a, b, x = model("A"), model("B"), lora("X")
    text = '[step.baked]\nformula = "0.3 * A + 0.7 * B + 0.5 * X"\n'
    wide = built(studio, text)
    narrow = built(studio, text.replace("formula", 'dtype = "fp16"\nformula'))

    assert close(wide[LINEAR], 0.3 * a[LINEAR].double() + 0.7 * b[LINEAR].double() + 0.5 * delta(x, LINEAR))
    assert torch.equal(narrow[LINEAR], wide[LINEAR].to(torch.float16))
    assert close(wide[NORM], 0.3 * a[NORM].double() + 0.7 * b[NORM].double())


def test_strengths_are_ratios_per_block_part_and_rule(studio: Space):
    """A block, the text encoder and a glob have strengths of their own; 0 leaves a layer exactly as it is."""
    a, x = model("A"), lora("X")
    table = '{ base = 1.0, blocks = { CLIP_L = 0.5, IN01 = 0.25 }, rules = [{ match = "*proj_in*", value = 0 }] }'
    found = built(studio, f'[step.baked]\nmethod = "bake"\nbase = "A"\nadapters = ["X"]\nstrength = {table}\n')

    assert close(found[ENCODER], a[ENCODER].double() + 0.5 * delta(x, ENCODER))
    assert close(found[LINEAR], a[LINEAR].double() + 0.25 * delta(x, LINEAR))
    assert torch.equal(found[NARROW].half(), a[NARROW])


def test_fp64_computes_in_float64(studio: Space):
    """With `compute = "fp64"` nothing is lost before the one rounding."""
    a, x, y = model("A"), lora("X"), lora("Y", 30, None)
    found = built(studio, BOTH + 'compute = "fp64"\ndtype = "fp64"\n')

    expected = a[LINEAR].double() + 0.8 * delta(x, LINEAR) - 0.3 * delta(y, LINEAR)
    assert (found[LINEAR] - expected).abs().max() <= 1e-15


@pytest.mark.parametrize(("slice_", "batch", "jobs"), [(256, 1 << 12, 1), (1 << 10, 1 << 14, 3)])
def test_a_bake_does_not_depend_on_slices_and_threads(studio: Space, monkeypatch, slice_, batch, jobs):
    """Wherever tensors are cut, and whoever computes them, the bytes are the same."""
    whole = built(studio, BOTH)
    monkeypatch.setattr(programs, "SLICE", slice_)
    monkeypatch.setattr(programs, "_BAKED", slice_)
    monkeypatch.setattr(passes, "BATCH", batch)
    cut = built(studio, BOTH, jobs=jobs, store=studio.path / "other")

    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def complaints(space: Space, step: str) -> str:
    with pytest.raises(SdbuildError) as caught:
        built(space, step)
    assert not (space.path / "out").exists()
    return "\n".join(str(issue) for issue in caught.value.issues)


def test_every_tensor_of_an_adapter_matters(studio: Space):
    """Whichever tensor is taken away but an alpha, the adapter is refused: nothing is applied in part and in silence."""
    whole = lora("X")
    for name in whole:
        save_file({n: t for n, t in whole.items() if n != name}, studio.path / "X.safetensors")
        if name.endswith(".alpha"):
            built(studio, BOTH)
            for folder in ("out", "cache"):
                (studio.path / folder).rename(studio.path / f"{folder}-{name}")
        else:
            assert "adapter `X`" in complaints(studio, BOTH), name


def test_a_tensor_that_matches_nothing_is_listed(studio: Space):
    """What no layer of the architecture is called is an error that names it, and the recipe's line."""
    save_file(lora("X") | {"lora_unet_nowhere.lora_down.weight": torch.zeros(3, 4)}, studio.path / "X.safetensors")
    text = complaints(studio, BOTH)

    assert "lora_unet_nowhere.lora_down.weight" in text
    assert "recipe.toml:" in text


def test_a_layer_that_no_model_has_is_not_left_out_in_silence(studio: Space):
    """An adapter for a text encoder, and a model without one: refused, unless its strength there is 0."""
    bare = {
        name: tensor for name, tensor in model("A").items() if not name.startswith("cond_stage_model.transformer.text_model.encoder.layers.0.self")
    }
    studio.checkpoint("A", bare)

    assert ENCODER in complaints(studio, BOTH)
    built(studio, BOTH.replace("[0.8, -0.3]", '{ base = 1.0, rules = [{ match = "cond_stage_model.*", value = 0 }] }'))


def test_factors_that_do_not_fit_are_named(studio: Space):
    """A LoRA of another model's width is refused before anything is read."""
    wrong = lora("X") | {f"{MODULES[LINEAR]}.lora_down.weight": torch.zeros(3, 99)}
    save_file(wrong, studio.path / "X.safetensors")

    assert "`X`" in (text := complaints(studio, BOTH))
    assert LINEAR in text


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ('[step.baked]\nmethod = "bake"\nbase = "A"\nadapters = ["B"]\n', "names `B` as an adapter, which is a checkpoint"),
        ('[step.baked]\nmethod = "bake"\nbase = "X"\nadapters = ["Y"]\n', "applies adapters to `X`, which is an adapter"),
        ('[step.baked]\nmethod = "slerp"\na = "A"\nb = "X"\nalpha = 0.3\n', "`slerp`, which works on whole models"),
    ],
)
def test_models_and_adapters_are_told_apart(studio: Space, step: str, what: str):
    """What takes models says so when it is given an adapter, and the other way round."""
    assert what in complaints(studio, step)


def test_a_plan_shows_what_adapters_change(studio: Space):
    """`--dry-run` prints adapters with types, counts by component, ranks, alphas and strengths, as text and as JSON."""
    studio.write("recipe.toml", RECIPE + BOTH)
    run = studio.sdbuild("recipe.toml", "--dry-run")

    assert run.returncode == 0, run.stderr
    lines = [" ".join(line.split()) for line in run.stdout.splitlines()]
    assert "adapter applied in type tensors changed rank alpha strength" in lines
    assert "X baked lora 1 of clip_l, 3 of unet 3 2 0.8" in lines
    assert "Y baked lora 1 of clip_l, 3 of unet 30 – -0.3" in lines
    [report] = json.loads(studio.sdbuild("recipe.toml", "--dry-run", "--json").stdout)["reports"]
    assert report["adapters"][0]["ranks"] == [3, 3]


def test_adapters_are_ancestors(studio: Space):
    """An adapter is in the lineage, and another one makes another artifact."""
    first = studio.write("recipe.toml", RECIPE + BOTH) and studio.reports("recipe.toml")[0]
    assert '"X"' in (studio.path / "out" / "baked.manifest.toml").read_text()
    assert studio.reports("recipe.toml")[0]["state"] == "reused"
    studio.checkpoint("X", lora("another"))
    second = studio.reports("recipe.toml")[0]

    assert first["sha256"] != second["sha256"]
    assert second["state"] == "built"


def test_a_rehearsal_makes_stand_ins_for_adapters(studio: Space):
    """Sources that a recipe applies as adapters are rehearsed as LoRAs, in the layout of its architecture."""
    studio.write("recipe.toml", (RECIPE + BOTH).replace(".safetensors", ".nowhere"))
    run = studio.sdbuild("recipe.toml", "--rehearse")

    assert run.returncode == 0, run.stderr
    assert "1 built" in run.stdout


def peft_names(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The attention layer of a LoRA as diffusers saves it: no alpha, it is in the header."""
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return {
        f"{module}.lora_A.weight": adapter[f"{MODULES[LINEAR]}.lora_down.weight"],
        f"{module}.lora_B.weight": adapter[f"{MODULES[LINEAR]}.lora_up.weight"],
    }


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.r": 3, "unet.lora_alpha": 12}, 4.0),
        ({"unet.r": 3, "unet.lora_alpha": 12, "unet.alpha_pattern": {"transformer_blocks.0.attn1.to_q": 1.5}}, 0.5),
        ({"unet.r": 9, "unet.lora_alpha": 9, "unet.rank_pattern": {"to_q": 3}}, 3.0),
        ({"unet.r": 3, "unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / 3**0.5),
        ({"r": 3, "lora_alpha": 6}, 2.0),
        ({}, 1.0),
    ],
)
def test_a_header_says_how_strongly_a_lora_of_diffusers_was_trained(studio: Space, settings, scale):
    """Alpha and rank of diffusers' LoRAs are in `lora_adapter_metadata`, for all modules or by their names."""
    a, x = model("A"), lora("X", alpha=None)
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
    studio.checkpoint("X", peft_names(x), metadata)
    found = built(studio, '[step.baked]\nformula = "A + 0.5 * X"\n')

    assert close(found[LINEAR], a[LINEAR].double() + 0.5 * scale * delta(x, LINEAR))


def test_another_alpha_in_the_header_makes_another_artifact(studio: Space):
    """What a header says of an adapter's strength is in the key of whatever it is applied to."""
    studio.write("recipe.toml", RECIPE + '[step.baked]\nformula = "A + X"\n')
    keys = set()
    for alpha in (1, 2):
        studio.checkpoint("X", peft_names(lora("X")), {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": alpha})})
        keys.add(studio.reports("recipe.toml")[0]["key"])

    assert len(keys) == 2


@pytest.mark.parametrize(
    "settings",
    [
        *("[", "[1]", '{"unet.lora_alpha": "4", "unet.r": 3}', '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(a+)+": 1}}'),
        *('{"transformer.lora_alpha": 4}', '{"unet": {"r": 3, "lora_alpha": 6}}', '{"unet.r": 8, "unet.lora_alpha": 8}'),
        *('{"unet.r": 3, "unet.lora_alpha": 3, "unet.use_rslora": 1}', '{"unet.r": 3, "unet.lora_alpha": 3, "unet.use_dora": true}'),
        f'{{"unet.r": 3, "unet.lora_alpha": 1{"0" * 400}}}',
    ],
)
def test_settings_that_nobody_understands_are_refused(studio: Space, settings):
    """Where alpha cannot be read, an adapter is refused instead of being applied somehow."""
    studio.checkpoint("X", peft_names(lora("X")), {"lora_adapter_metadata": settings})

    assert "adapter `X`: its `lora_adapter_metadata`" in complaints(studio, '[step.baked]\nformula = "A + X"\n')


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bfloat16, torch.float64])
def test_alpha_may_be_a_whole_number(studio: Space, dtype):
    """Whatever dtype a trainer gave alpha, it is read as the number that it is."""
    a, x = model("A"), lora("X")
    studio.checkpoint("X", {name: t.to(dtype) if name.endswith("alpha") else t for name, t in x.items()})
    found = built(studio, '[step.baked]\nformula = "A + 0.5 * X"\n')

    assert close(found[LINEAR], a[LINEAR].double() + 0.5 * delta(x, LINEAR))


def test_an_alpha_that_is_no_number_is_refused(studio: Space):
    """An exponent alone is a dtype that nothing is computed with."""
    odd = {name: t.to(torch.float8_e8m0fnu) if name.endswith("alpha") else t for name, t in lora("X").items()}
    studio.checkpoint("X", odd)

    assert "has `alpha` as F8_E8M0, which is not computed with" in complaints(studio, BOTH)


@pytest.mark.parametrize(("shape", "on_input"), [((24,), 1), ((1, 16), 0)])
def test_a_factor_that_contradicts_its_own_side_is_named(studio: Space, shape, on_input):
    """IA³ says on which side it multiplies; one that does not go along that side is the adapter's fault, and said to be."""
    name = MODULES[LINEAR]
    studio.checkpoint("X", {f"{name}.weight": torch.ones(shape), f"{name}.on_input": torch.tensor(on_input)})
    text = complaints(studio, '[step.baked]\nformula = "A + X"\n')

    assert "`X` cannot be applied to" in text


def test_a_factor_that_is_not_finite_is_the_adapters_fault(studio: Space):
    """What an adapter brings in is not blamed on a method."""
    studio.checkpoint("X", lora("X") | {f"{MODULES[LINEAR]}.alpha": torch.tensor(torch.inf)})

    assert "of `X` holds values that are infinite" in complaints(studio, BOTH)


def test_an_adapter_of_strength_0_binds_nobody(studio: Space):
    """A LoRA that is applied nowhere is not among those whose terms count, as in a formula."""
    step = BOTH.replace("[0.8, -0.3]", "[0.8, 0.0]")
    studio.write("recipe.toml", (RECIPE + step).replace('path = "Y.safetensors"', 'path = "Y.safetensors"\nlicense = "GPL-3.0-only"'))

    assert "GPL" not in studio.sdbuild("license", "recipe.toml").stdout


def test_a_layer_larger_than_any_model_has_is_refused(studio: Space):
    """Small files whose product would fill the memory are refused before anything is multiplied."""
    name = MODULES[LINEAR]
    studio.checkpoint("X", {f"{name}.lokr_w1": torch.ones(200_000, 1), f"{name}.lokr_w2": torch.ones(1, 200_000)})

    assert "more elements than any layer has" in complaints(studio, '[step.baked]\nmethod = "resize_lora"\nadapter = "X"\nrank = 2\n')


def test_the_strength_in_a_header_is_that_of_a_dora_before_it_is_given_its_lengths(studio: Space):
    """Lengths are those of W + alpha / rank · up · down, as peft has them: the whole change is not scaled."""
    a, x = model("A"), lora("X", alpha=None)
    lengths = (checkpoints.numbers("X", "lengths", (24,)).abs() + 1).to(torch.float32)
    module = next(iter(peft_names(x))).removesuffix(".lora_A.weight")
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 12, "unet.use_dora": True})}
    studio.checkpoint("X", peft_names(x) | {f"{module}.lora_magnitude_vector": lengths}, metadata)
    found = built(studio, '[step.baked]\nformula = "A + 0.5 * X"\n')[LINEAR].double()

    turned = a[LINEAR].double() + 4 * delta(x, LINEAR)
    turned *= lengths.double().unsqueeze(1) / turned.norm(dim=1, keepdim=True)
    assert (found - (a[LINEAR].double() + turned) / 2).abs().max() < 3e-7


def test_the_strength_in_a_header_is_that_of_biases_too(studio: Space):
    """A layer's bias gets alpha / rank times `lora_B.bias`, as in peft."""
    target = ENCODER.replace("weight", "bias")
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    a, bias = model("A") | {target: checkpoints.numbers("A", target, (20,))}, checkpoints.numbers("X", "bias", (20,))
    studio.checkpoint("A", a)
    x = lora("X", alpha=None)
    sides = {f"{module}.lora_{s}.weight": x[f"{MODULES[ENCODER]}.lora_{side}.weight"] for s, side in (("A", "down"), ("B", "up"))}
    metadata = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 3, "text_encoder.lora_alpha": 12})}
    studio.checkpoint("X", sides | {f"{module}.lora_B.bias": bias}, metadata)
    found = built(studio, '[step.baked]\nformula = "A + X"\n')

    assert close(found[ENCODER], a[ENCODER].double() + 4 * delta(x, ENCODER))
    assert close(found[target], a[target].double() + 4 * bias.double())


def test_alpha_may_not_be_complex(studio: Space):
    """What is no number that could be multiplied with is refused before anything is read."""
    x = {name: tensor.to(torch.complex64) if name.endswith(".alpha") else tensor for name, tensor in lora("X").items()}
    studio.checkpoint("X", x)

    assert "has `alpha` as C64, which is not computed with" in complaints(studio, '[step.baked]\nformula = "A + X"\n')


def test_sums_of_adapters_may_have_alphas_that_are_whole_numbers(studio: Space):
    """What is written of them is the same as of fractions."""
    step = '[step.baked]\nformula = "0.5 * X"\n'
    expected = built(studio, step)
    studio.checkpoint("X", {name: tensor.to(torch.int64) if name.endswith(".alpha") else tensor for name, tensor in lora("X").items()})
    found = built(studio, step)

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inspect_says_what_an_adapter_is(studio: Space):
    """For which architecture it is made, of which kind and rank, and what of a model it changes."""
    run = studio.sdbuild("inspect", "Y.safetensors")

    assert run.returncode == 0, run.stderr
    assert "Y.safetensors: adapter (lora, rank 30) for Stable Diffusion 1.x, changes 4 tensors" in run.stdout
    assert " ".join(run.stdout.split()).find("unet 6 tensors") > 0
    assert run.stdout.rstrip().endswith("adapter = true")


def test_a_dora_may_have_biases(studio: Space):
    """Magnitudes belong to the matrix: a bias beside them has none, and is no contradiction to `use_dora`."""
    target, module = ENCODER.replace("weight", "bias"), "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    a, bias, x = model("A") | {target: torch.zeros(20)}, checkpoints.numbers("X", "bias", (20,)), lora("X", alpha=None)
    studio.checkpoint("A", a)
    sides = {f"{module}.lora_{s}.weight": x[f"{MODULES[ENCODER]}.lora_{side}.weight"] for s, side in (("A", "down"), ("B", "up"))}
    sides |= {f"{module}.lora_B.bias": bias, f"{module}.lora_magnitude_vector": torch.ones(20)}
    settings = {"text_encoder.r": 3, "text_encoder.lora_alpha": 6, "text_encoder.use_dora": True}
    studio.checkpoint("X", sides, {"lora_adapter_metadata": json.dumps(settings)})

    assert close(built(studio, '[step.baked]\nformula = "A + X"\n')[target], 2 * bias.double())
