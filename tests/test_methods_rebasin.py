"""Re-basin: which channels may change places, how they are matched, and what the method makes of it."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from applied import evaluate
from blake3 import blake3
from conftest import Space, digests, states
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

from sdmerge_build.architectures import architecture_named
from sdmerge_build.architectures.permutations import Group, axes_of, groups_of
from sdmerge_build.errors import RecipeError, SdbuildError
from sdmerge_build.methods import matching, methods
from sdmerge_build.methods.matching import match, permuted

State = dict[str, torch.Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."

# Smaller sizes that fit together as the real ones do: heads, halves of GEGLU, encoders side by side, 32 groups of GroupNorm.
SIZES = {
    "sd1": {49408: 20, 77: 7, 320: 32, 640: 32, 768: 128, 960: 64, 1280: 64, 1920: 96, 2560: 128, 3072: 256, 5120: 256, 10240: 512}
    | {128: 32, 256: 32, 512: 64},
    "sd2": {49408: 20, 77: 7, 320: 64, 640: 64, 1024: 128, 1280: 128, 3072: 384, 4096: 512, 5120: 256, 10240: 512, 2560: 128} | {512: 64},
    "sdxl": {49408: 20, 77: 7, 320: 64, 640: 128, 768: 128, 1280: 128, 2048: 256, 2560: 256, 2816: 144, 3072: 256, 3840: 384, 5120: 512} | {512: 64},
}

PLACES = {
    "sd1": ("cond_stage_model.", f"{UNET}time_embed.", f"{UNET}input_blocks.8."),
    "sd2": ("cond_stage_model.", f"{UNET}time_embed.", f"{UNET}input_blocks.8."),
    "sdxl": ("conditioner.", f"{UNET}time_embed.", f"{UNET}label_emb.", f"{UNET}input_blocks.5."),
}
"""What the tests of functions are about; with two layers of each text encoder, and one block of the VAE."""


def made(architecture: str, seed: str, *, parts: bool = True, dtype: torch.dtype = torch.float64) -> State:
    """Make a small model of real names, or those parts of it that the functions below compute."""
    state, small = {}, SIZES[architecture]
    for name, shape in architecture_named(architecture).layout().items():
        layer = re.search(r"^con.*(?:layers|resblocks)\.(\d+)\.", name)
        is_part = name.startswith((*PLACES[architecture], f"{VAE}encoder.mid.")) and (layer is None or int(layer[1]) < 2)
        if (is_part or not parts) and not name.endswith("position_ids"):
            state[name] = checkpoints.numbers(seed, name, tuple(small.get(d, d) for d in shape), dtype)
    return state


class Pair:
    """Two models, as a survey sees them."""

    def __init__(self, a: State, b: State, architecture: str = "sd1") -> None:
        self.names = tuple(sorted(a.keys() & b.keys()))
        self.architecture = architecture
        self._states = (a, b)

    def tensor(self, model: int, name: str) -> torch.Tensor:
        """Return a tensor."""
        return self._states[model][name].float()

    def map(self, function, names):
        """Apply a function to names, here one after the other."""
        return [function(name) for name in names]


def shuffled(state: Mapping[str, torch.Tensor], architecture: str, seed: int = 0) -> State:
    """Permute the channels of every group at random, with whole blocks, and inside blocks in every strand on its own."""
    generator = torch.Generator().manual_seed(seed)
    places = {}
    for group in groups_of(architecture):
        lead = group.strands[0][0]
        if lead.tensor not in state:
            continue
        channels = state[lead.tensor].shape[lead.dim]
        blocks = group.blocks_of(channels)
        width = channels // blocks
        order = torch.randperm(blocks, generator=generator).tolist()
        places[group.name] = [torch.cat([torch.randperm(width, generator=generator) + of * width for of in order]) for _ in group.strands]
    axes = axes_of(architecture)
    return {
        name: permuted(tensor, [(axis, places[axis.group][axis.strand]) for axis in axes.get(name, ()) if axis.group in places])
        for name, tensor in state.items()
    }


# What the networks compute, written from their definitions.


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """A linear layer, or a convolution of one pixel."""
    return functional.linear(x, state[f"{name}.weight"].flatten(1), state.get(f"{name}.bias"))


def layer_norm(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm."""
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of (tokens, channels)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return functional.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1).matmul(v).transpose(0, 1).flatten(1)


def clip(state: State, at: str, tokens: Sequence[int]) -> torch.Tensor:
    """The text encoder of SD 1.x, as far as its last norm."""
    x = state[f"{at}.embeddings.token_embedding.weight"][list(tokens)] + state[f"{at}.embeddings.position_embedding.weight"][: len(tokens)]
    for layer in (f"{at}.encoder.layers.{n}" for n in range(2)):
        h = layer_norm(state, f"{layer}.layer_norm1", x)
        q, k, v = (linear(state, f"{layer}.self_attn.{n}_proj", h) for n in "qkv")
        x = x + linear(state, f"{layer}.self_attn.out_proj", attention(q, k, v, x.shape[-1] // 64))
        h = linear(state, f"{layer}.mlp.fc1", layer_norm(state, f"{layer}.layer_norm2", x))
        x = x + linear(state, f"{layer}.mlp.fc2", h * torch.sigmoid(1.702 * h))
    return layer_norm(state, f"{at}.final_layer_norm", x)


def openclip(state: State, at: str, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The text encoder of SD 2.x and SDXL: before its last norm, and pooled."""
    x = state[f"{at}.token_embedding.weight"][list(tokens)] + state[f"{at}.positional_embedding"][: len(tokens)]
    for layer in (f"{at}.transformer.resblocks.{n}" for n in range(2)):
        h = layer_norm(state, f"{layer}.ln_1", x)
        q, k, v = functional.linear(h, state[f"{layer}.attn.in_proj_weight"], state[f"{layer}.attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(state, f"{layer}.attn.out_proj", attention(q, k, v, x.shape[-1] // 64))
        x = x + linear(state, f"{layer}.mlp.c_proj", functional.gelu(linear(state, f"{layer}.mlp.c_fc", layer_norm(state, f"{layer}.ln_2", x))))
    return x, layer_norm(state, f"{at}.ln_final", x)[-1] @ state[f"{at}.text_projection"]


def transformer(state: State, at: str, x: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    """A transformer of the UNet, from proj_in to proj_out."""
    x = linear(state, f"{at}.proj_in", x)
    for block in sorted({name.removeprefix(f"{at}.").split(".")[1] for name in state if name.startswith(f"{at}.transformer_blocks.")}):
        layer = f"{at}.transformer_blocks.{block}"
        for n in (1, 2):
            h = layer_norm(state, f"{layer}.norm{n}", x)
            q, k, v = (linear(state, f"{layer}.attn{n}.to_{w}", h if w == "q" or n == 1 else context) for w in "qkv")
            x = x + linear(state, f"{layer}.attn{n}.to_out.0", attention(q, k, v, heads or x.shape[-1] // 64))
        h, gate = linear(state, f"{layer}.ff.net.0.proj", layer_norm(state, f"{layer}.norm3", x)).chunk(2, -1)
        x = x + linear(state, f"{layer}.ff.net.2", h * functional.gelu(gate))
    return linear(state, f"{at}.proj_out", x)


def convolved(state: State, norm: str, layer: str, x: torch.Tensor) -> torch.Tensor:
    """GroupNorm, SiLU and a convolution."""
    h = functional.silu(functional.group_norm(x, 32, state[f"{norm}.weight"], state[f"{norm}.bias"]))
    return functional.conv2d(h, state[f"{layer}.weight"], state[f"{layer}.bias"], padding=1)


def embedded(state: State, at: str, x: torch.Tensor) -> torch.Tensor:
    """The small network that reads the time, or SDXL's sizes."""
    return linear(state, f"{at}.2", functional.silu(linear(state, f"{at}.0", x)))


def computed(state: State, architecture: str) -> dict[str, torch.Tensor]:
    """Compute from fixed inputs what leaves each part of a network."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, results = [3, 1, 4, 1, 5], {}
    emb = embedded(state, f"{UNET}time_embed", noise(state[f"{UNET}time_embed.0.weight"].shape[1]))
    match architecture:
        case "sd1":
            context = clip(state, "cond_stage_model.transformer.text_model", tokens)
        case "sd2":
            context, _ = openclip(state, "cond_stage_model.model", tokens)
        case _:
            stream, pooled = openclip(state, "conditioner.embedders.1.model", tokens)
            context = torch.cat([clip(state, "conditioner.embedders.0.transformer.text_model", tokens), stream], -1)
            emb = emb + embedded(state, f"{UNET}label_emb.0", torch.cat([pooled, noise(16)]))
    at = f"{UNET}input_blocks.{5 if architecture == 'sdxl' else 8}"
    x = noise(1, state[f"{at}.0.in_layers.0.weight"].numel(), 4, 4)
    h = convolved(state, f"{at}.0.in_layers.0", f"{at}.0.in_layers.2", x) + linear(state, f"{at}.0.emb_layers.1", functional.silu(emb))[:, None, None]
    results["block"] = convolved(state, f"{at}.0.out_layers.0", f"{at}.0.out_layers.3", h)
    results["transformer"] = transformer(state, f"{at}.1", x.flatten(2)[0].t(), context, 8 if architecture == "sd1" else 0)
    mid = f"{VAE}encoder.mid"
    x = noise(1, 64, 4, 4)
    h = convolved(state, f"{mid}.block_1.norm1", f"{mid}.block_1.conv1", x)
    results["vae block"] = convolved(state, f"{mid}.block_1.norm2", f"{mid}.block_1.conv2", h)
    q, k, v = (linear(state, f"{mid}.attn_1.{n}", x.flatten(2)[0].t()) for n in "qkv")
    results["vae attention"] = linear(state, f"{mid}.attn_1.proj_out", attention(q, k, v, 1))
    return results


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl"])
def test_no_permutation_changes_what_a_network_computes(architecture):
    """
    Text encoders, transformers, residual blocks and the VAE compute the same after every group was permuted at random.
    """
    state = made(architecture, "A")
    other = shuffled(state, architecture)
    moved = {
        axis.group for name, axes in axes_of(architecture).items() if name in state and not torch.equal(state[name], other[name]) for axis in axes
    }

    assert {group.name for group in groups_of(architecture) if group.strands[0][0].tensor in state} <= moved
    before, after = computed(state, architecture), computed(other, architecture)
    for part, result in before.items():
        assert result.std() > 1e-3, part
        assert torch.allclose(result, after[part], rtol=0, atol=1e-12), part


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl"])
def test_groups_fit_the_real_sizes(architecture):
    """
    In a checkpoint of real shapes every group has room, and no two groups claim the same numbers of a dimension.
    """
    layout = architecture_named(architecture).layout()
    taken: dict[tuple[str, int], int] = {}
    for group in groups_of(architecture):
        channels = layout[group.axes[0].tensor][group.axes[0].dim]
        assert group.blocks_of(channels)
        for axis in group.axes:
            assert group.holds(axis, layout[axis.tensor], channels)
            taken[axis.tensor, axis.dim] = taken.get((axis.tensor, axis.dim), 0) + channels

    assert all(count <= layout[name][dim] for (name, dim), count in taken.items())
    assert len({group.name for group in groups_of(architecture)}) == len(groups_of(architecture)) > 130


@pytest.fixture(autouse=True)
def one_thread():
    """Compute with one thread, as surveys do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> State:
    """A small SD 1.x checkpoint without VAE and residual blocks: those have most groups, and nothing of their own."""
    tensors = made("sd1", "A", parts=False, dtype=torch.float32)
    known = architecture_named("sd1").present
    return {name: tensor for name, tensor in tensors.items() if name in known or not re.search(r"first_stage|(in|out)_layers", name)}


def merged(a: State, b: State, alpha: float) -> State:
    """Apply the method to every tensor, as a build would."""
    findings = match(Pair(a, b))
    return {name: evaluate(methods()["rebasin"], [a[name], b[name]], {"alpha": alpha}, name=name, findings=findings) for name in a}


def test_a_permuted_copy_is_found_again():
    """
    Whatever was permuted in a copy of a model, every tensor of the copy comes back to its place, bit for bit.

    In this model what is inside transformers is so large that it would hide the little that is not permuted twice.
    """
    model = made("sd1", "A", parts=False, dtype=torch.float32)
    model = {name: tensor * (16 if "transformer_blocks" in name else 1) for name, tensor in model.items()}
    copy = shuffled(model, "sd1", 7)
    assert sum(not torch.equal(copy[name], model[name]) for name in model) > 800
    back = merged(model, copy, 1.0)

    assert all(torch.equal(back[name], model[name]) for name in model)


def test_a_permuted_fine_tune_is_found_again(model):
    """
    A copy that was trained a little further and permuted is merged as if it had never been permuted.
    """
    tuned = {name: tensor + 0.02 * checkpoints.numbers("tuned", name, tuple(tensor.shape), torch.float32) for name, tensor in model.items()}
    mixed = merged(model, shuffled(tuned, "sd1", 8), 0.25)

    assert all(torch.equal(mixed[name], model[name] * 0.75 + tuned[name] * 0.25) for name in model)


def test_groups_are_visited_until_nothing_changes(model):
    """
    Where the layers at the ends of a transformer have become others, the first visits are wrong, and later ones put them right.
    """
    a = {name: tensor for name, tensor in model.items() if name.startswith(f"{UNET}input_blocks.8.1")}
    tuned = {}
    for name, tensor in a.items():
        is_inside = "transformer_blocks" in name and tensor.dim() > 1
        tuned[name] = tensor + (0.3 if is_inside else 10) * checkpoints.numbers("x", name, tuple(tensor.shape), torch.float32)
    back = merged(a, shuffled(tuned, "sd1", 8), 1.0)

    assert all(torch.equal(back[name], tuned[name]) for name in a)


def test_a_fine_tune_stays_where_it_is(model):
    """
    Between a model and its fine-tune nothing is permuted, and nothing is kept of it.
    """
    tuned = {name: tensor + 0.02 * checkpoints.numbers("tuned", name, tuple(tensor.shape), torch.float32) for name, tensor in model.items()}

    assert match(Pair(model, tuned)) == {}


def test_what_is_matched_cannot_be_matched_better(model):
    """
    For two models that have nothing to do with each other, no permutation of one group's channels makes the sum of `a * permuted b` larger.
    """
    at = f"{UNET}input_blocks.8.1"
    a = {name: tensor for name, tensor in model.items() if name.startswith(at)}
    b = {name: checkpoints.numbers("B", name, tuple(tensor.shape), torch.float32) for name, tensor in a.items()}
    none, moved = merged(a, b, 0.0), merged(a, b, 1.0)

    assert all(torch.equal(none[name], a[name]) for name in a)
    assert all(torch.equal(moved[name].flatten().sort().values, b[name].flatten().sort().values) for name in a)
    assert in_common(a, moved) > 1.1 * abs(in_common(a, b))
    for group in groups_of("sd1"):
        if group.name in {f"{at} stream", f"{at}.transformer_blocks.0.ff hidden"}:
            best, now = possible(group, a, moved)
            assert best <= now * (1 + 1e-9), group.name


def in_common(a: State, b: State) -> float:
    """The sum of all products."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def possible(group: Group, a: State, b: State) -> tuple[float, float]:
    """What the best permutation of a group's channels would score, and what staying scores."""
    channels = a[group.axes[0].tensor].shape[group.axes[0].dim]
    scores = np.zeros((channels, channels))
    for axis in group.axes:
        start = axis.start(a[axis.tensor].shape[axis.dim], channels)
        rows = [np.moveaxis(state[axis.tensor].double().numpy(), axis.dim, 0)[start : start + channels].reshape(channels, -1) for state in (a, b)]
        scores += rows[0] @ rows[1].T
    return scores[linear_sum_assignment(-scores)].sum(), np.trace(scores)


def test_a_group_that_lacks_a_tensor_stays(model):
    """
    Where one model lacks a tensor of a group, or its shapes are no network's, the group's channels stay; others move.
    """
    copy = shuffled(model, "sd1", 9)
    block = f"{UNET}input_blocks.8.1.transformer_blocks.0"
    del copy[f"{block}.ff.net.2.weight"]
    odd = f"{UNET}input_blocks.7.1.transformer_blocks.0.ff.net.0.proj.weight"
    other = {**model, odd: torch.zeros(500, 64)}
    found = match(Pair(other, {**copy, odd: torch.zeros(500, 64)}))

    assert f"{block}.ff hidden" not in found
    assert f"{UNET}input_blocks.7.1.transformer_blocks.0.ff hidden" not in found
    assert f"{UNET}input_blocks.5.1.transformer_blocks.0.ff hidden" in found


def test_models_without_known_channels_are_refused(model):
    """
    An architecture nobody knows permutations of, and a file of a few tensors, are refused by a sentence that says what is needed.
    """
    for pair in (Pair(model, model, "flux"), Pair({"a": torch.ones(1)}, {"a": torch.ones(1)})):
        with pytest.raises(SdbuildError, match="sd1, sd2, sdxl"):
            match(pair)


def test_values_that_are_not_numbers_are_refused(model):
    """
    A model with a NaN cannot be matched, and the group is named.
    """
    broken = {**model, f"{UNET}time_embed.0.bias": torch.full((64,), math.nan)}

    with pytest.raises(SdbuildError, match=r"time_embed hidden.*not numbers"):
        match(Pair(model, broken))


def test_a_recipe_is_refused_before_anything_is_read_where_scipy_is_missing(space: Space, monkeypatch):
    """
    What is not installed is said when the recipe is read, with its line and the command to type.
    """
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else object())
    space.write("recipe.toml", 'recipe = 1\narchitecture = "sd1"\n[source.A]\npath = "A"\n[step.mix]\nmethod = "rebasin"\na = "A"\nb = "A"\n')
    with pytest.raises(RecipeError, match=r"recipe\.toml:6: `rebasin`, the method of step `mix`, needs a package"):
        space.build()


def test_the_groups_of_permutations_change_only_with_the_version():
    """
    What `permutations.toml` says is in no key: who changes it raises the versions of `rebasin` and of its survey, and pins it anew.
    """
    import sdmerge_build

    content = (Path(sdmerge_build.__file__).parent / "architectures" / "permutations.toml").read_text(encoding="utf-8")
    rebasin = methods()["rebasin"]

    assert (rebasin.version, rebasin.survey.version) == (1, 1)
    assert blake3(repr(tomllib.loads(content)).encode()).hexdigest() == "b32d0371f6658ea9a67e7eeda70354e73aa8126b02e15b44a8693b680205ab4e"


def test_without_scipy_the_command_to_type_is_said(model, monkeypatch):
    """
    Where scipy is not installed, the message says what to install.
    """
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)

    with pytest.raises(SdbuildError, match=r'pip install "sdbuild\[rebasin\]"'):
        match(Pair(model, model))


def test_blocks_are_assigned_as_wholes():
    """
    With blocks, the best permutation is the best of all that keep blocks together, in all strands alike.
    """
    generator = torch.Generator().manual_seed(3)
    scores = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(2)]

    def inside(score: torch.Tensor, to: int, of: int) -> float:
        """The best that two channels can do in a block of two."""
        here = score[2 * to : 2 * to + 2, 2 * of : 2 * of + 2]
        return float(max(here[0, 0] + here[1, 1], here[0, 1] + here[1, 0]))

    best = max(sum(inside(score, to, of) for to, of in enumerate(order) for score in scores) for order in itertools.permutations(range(3)))
    found = matching._assigned(scores, 3, linear_sum_assignment)

    assert matching._score(scores, found) == pytest.approx(best, abs=1e-12)
    assert all(sorted(strand.tolist()) == list(range(6)) for strand in found)
    assert len({tuple((strand // 2).tolist()) for strand in found}) == 1


RECIPE = """
recipe = 1
architecture = "sd1"
defaults.dtype = "fp32"
[source.A]
path = "A.safetensors"
[source.B]
path = "B.safetensors"
[step.out]
method = "rebasin"
a = "A"
b = "B"
alpha = 0.25
"""


def test_a_recipe_finds_permutations_once(space: Space, model):
    """
    A second run does nothing, another ratio takes the permutations that are known, and threads change no byte.
    """
    tuned = {name: tensor + 0.02 * checkpoints.numbers("tuned", name, tuple(tensor.shape), torch.float32) for name, tensor in model.items()}
    space.checkpoint("A", model)
    space.checkpoint("B", shuffled(tuned, "sd1", 4))
    space.write("recipe.toml", RECIPE)
    built = digests(space.build(jobs=2))
    [kept] = (space.path / "cache" / "findings").iterdir()
    written = kept.stat().st_mtime_ns, kept.read_bytes()
    out = space.load("out")

    assert all(torch.equal(out[name], model[name] * 0.75 + tuned[name] * 0.25) for name in model)
    assert digests(space.build(jobs=1, store=space.path / "other", out=space.path / "elsewhere")) == built
    assert [report["state"] for report in space.reports("recipe.toml")] == ["reused"]
    space.edit("0.25", "1.0")
    assert states(space.build()) == {"out": "built"}
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == written
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in space.load("out").items())
