"""Owns the methods that put checkpoints together and take them apart: components, what training left behind, and names.

Has never heard of numbers: every tensor of the result is a tensor of an input, or of several, bit for bit but for the step's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from sdmerge_build.architectures import Architecture, diffusers_names
from sdmerge_build.architectures.components import read_components, roots_of
from sdmerge_build.architectures.diffusers import STACKED, TRANSPOSED, WIDENED
from sdmerge_build.architectures.made import COUNTED, FLATTENED, Made
from sdmerge_build.methods import Selection, method
from sdmerge_build.methods.moves import Model, Moves, names_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convert", "parts", "prune"]

_BASE = "base"
_EMA = "model_ema."
_SCHEDULE = "schedule"
_LEFTOVERS = ("global_step", "epoch", "iteration", "loss.*", "*optimizer*", "lr_scheduler*", "callbacks*", "logvar")
_COUNTS = ("*.position_ids", "position_ids")
_BACK = {WIDENED: FLATTENED, TRANSPOSED: TRANSPOSED}


def _diffusion(architecture: Architecture) -> str:
    """Name the component that paints: what every checkpoint of the architecture has."""
    return architecture.component_of(architecture.present[0]) if architecture.present else ""


def _whole_name(name: str, architecture: Architecture) -> str:
    """Name a tensor as a checkpoint does that holds more than the diffusion model."""
    is_bare = architecture.bare and not name.startswith(architecture.bare) and architecture.component_of(name) == _diffusion(architecture)
    return f"{architecture.bare}{name}" if is_bare else name


def _parts(models: Sequence[Model], architecture: Architecture) -> Moves:
    """Decide what `parts` takes from whom; a base, where there is one, has what nobody else is named for."""
    moves = Moves(architecture=architecture)
    owner = {model.role: n for n, model in enumerate(models)}
    base, diffusion = owner.get(_BASE), _diffusion(architecture)
    if diffusion in owner:
        owner.setdefault(_SCHEDULE, owner[diffusion])
        stale = [name for name in models[base].shapes if architecture.component_of(name) == "ema"] if base is not None and "ema" not in owner else []
        moves.note(f"leaves out averages that belong to the `{diffusion}` of `{models[base or 0].name}`", stale)
    for n, model in enumerate(models):
        for name in model.shapes:
            component = architecture.component_of(name)
            is_stale = n == base and component == "ema" and diffusion in owner
            if not is_stale and owner.get(component, base) == n and (n == base or component != "other"):
                moves.take(_whole_name(name, architecture), n, Made((name,)))
        if model.role != _BASE and not any(architecture.component_of(name) == model.role for name in model.shapes):
            held = sorted({architecture.component_of(name) for name in model.shapes} - {"other"})
            hint = f"it holds {', '.join(f'`{component}`' for component in held)}" if held else ""
            moves.complaints.append((f"names `{model.name}` as its `{model.role}`, which has no `{model.role}`", "", hint))
    return moves


@method(version=1, moves=_parts)
def parts(base: Tensor, /, **components: Tensor) -> Tensor:
    """Put a checkpoint together from components of several: `unet`, `vae`, `clip_l`, …, each taken whole from the model that it names.

    Fields are the components of the architecture (`sdbuild methods --blocks ARCHITECTURE` lists them); each names a checkpoint, a step, or a
    file that holds this component alone, in original or diffusers naming. What is not named is taken from `base`; without a `base` the result
    has the named components and nothing else, but for the schedule that belongs to the diffusion model. On any other step the same fields
    replace these components of its result: `formula = "0.5 * A + 0.5 * B"` with `vae = "C"`.

    Origin: AUTOMATIC1111 "Bake in VAE"; ComfyUI CheckpointSave with a model, a VAE and a CLIP from different loaders.
    Elsewhere: supermerger and Chattiori "Bake VAE"; kohya `tools/merge_sd3_safetensors.py`; sd-mecha `pick_component`.
    """
    return base


def _prune(models: Sequence[Model], architecture: Architecture, *, ema: str, drop: Selection, leftovers: str, position_ids: str) -> Moves:
    """Decide what `prune` keeps, and what it makes anew."""
    moves, [model] = Moves(architecture=architecture), models
    is_dropped = names_of(drop, architecture)
    averages = {name for name in model.shapes if name.startswith(_EMA)}
    average_of = dict(_averages(model.shapes, averages, moves)) if ema == "use" else {}
    strays = []
    for name, shape in model.shapes.items():
        if is_dropped(name) or (name in averages and ema != "keep"):
            continue
        if leftovers == "drop" and architecture.component_of(name) == "other" and any(fnmatchcase(name, glob) for glob in _LEFTOVERS):
            strays.append(name)
        elif position_ids == "reset" and any(fnmatchcase(name, glob) for glob in _COUNTS):
            moves.take(name, 0, Made((), COUNTED))
        elif name in average_of and model.shapes[average_of[name]] != shape:
            moves.complaints.append(("has averages of other shapes than the weights", name, ""))
        else:
            moves.take(name, 0, Made((average_of.get(name, name),)))
    moves.note("leaves out what training left behind", strays)
    if ema == "use" and not average_of:
        moves.complaints.append((f"has no averages to use: `{model.name}` holds none", "", 'leave out `ema = "use"`'))
    return moves


def _averages(shapes: Mapping[str, object], averages: set[str], moves: Moves) -> Iterator[tuple[str, str]]:
    """Pair weights with their averages, whose names have no dots, or all of them."""
    used: dict[str, str] = {}
    for name in shapes:
        inner = name.removeprefix("model.")
        for spelled in (_EMA + inner.replace(".", ""), _EMA + inner):
            if spelled in averages and name not in averages:
                if spelled in used:
                    moves.complaints.append((f"cannot tell whether an average is that of `{used[spelled]}`", name, ""))
                used[spelled] = name
                yield name, spelled
    idle = sorted(averages - used.keys() - {f"{_EMA}decay", f"{_EMA}num_updates"})
    moves.note("leaves out averages of what it does not have", idle)


@method(version=1, moves=_prune)
def prune(
    a: Tensor,
    /,
    *,
    ema: Literal["drop", "keep", "use"] = "drop",
    drop: Selection = (),
    leftovers: Literal["drop", "keep"] = "drop",
    position_ids: Literal["reset", "keep"] = "reset",
) -> Tensor:
    """Slim and repair a checkpoint: averages of training (EMA), what training left behind, broken `position_ids`.

    What a checkpoint of the architecture consists of stays, `logit_scale` too; only names that no component knows count as leftovers.

    ema: `drop` leaves the averages out, `keep` keeps them, `use` takes them for the weights they are averages of, and leaves them out.
    drop: what else is left out: components of the architecture, globs over tensor names, or regular expressions between slashes.
    leftovers: whether the states of optimizers, losses, counts of steps and the like are left out.
    position_ids: `reset` writes 0, 1, … 76 as whole numbers, also where earlier merges in float16 made fractions of them.

    Origin: AUTOMATIC1111 `modules/extras.py` "discard weights"; Akegarasu `sd-webui-model-converter` for EMA and `position_ids`.
    Elsewhere: supermerger "prune" and "Reset CLIP ids"; sd-meh `--prune`; Chattiori `--prune`, `--keep_ema`; model-mixer "fixclip"; sd-mecha
        `exchange_ema`.
    """
    return a


def _convert(models: Sequence[Model], architecture: Architecture, *, naming: str, pick: Selection) -> Moves:
    """Decide what tensors are called in another naming."""
    moves, [model] = Moves(architecture=architecture), models
    originals = _originals(model, architecture, moves)
    is_picked = names_of(pick, architecture)
    moves.looked_at = {stored: name for name, made in originals.items() for stored in made.names}
    chosen = {name: made for name, made in originals.items() if is_picked(name)}
    if naming == "original":
        for name, made in chosen.items():
            moves.take(_whole_name(name, architecture), 0, made)
    elif naming == "bare":
        _bare(chosen, architecture, moves)
    else:
        _as_diffusers(chosen, architecture, moves)
    return moves


def _originals(model: Model, architecture: Architecture, moves: Moves) -> Mapping[str, Made]:
    """Tell what a model's tensors are called in a checkpoint; what is called so already stays as it is."""
    known = architecture.layout()
    count = sum(name in known or _whole_name(name, architecture) in known for name in model.shapes)
    read = read_components(model.shapes.keys(), architecture)
    if count and count >= (len(read.tensors) if read else 0):  # a few names are the same in both
        return {name: Made((name,)) for name in model.shapes}
    if read is None:
        moves.complaints.append((f"cannot tell what the tensors of `{model.name}` are called", "", ""))
        return {}
    moves.note("leaves out what is not known by this name", [*read.strays, *read.left_out])
    return read.tensors


def _bare(chosen: Mapping[str, Made], architecture: Architecture, moves: Moves) -> None:
    """Leave out what all names of a component begin with."""
    components = sorted({architecture.component_of(name) for name in chosen})
    if len(components) > 1:
        listed = ", ".join(f"`{component}`" for component in components)
        hint = f'`pick` one of them, such as `pick = ["{components[0]}"]`'
        moves.complaints.append((f"has names without prefixes for one component alone, and there are {listed}", "", hint))
        return
    roots = [architecture.bare, *roots_of(components[0], architecture)] if components else []
    for name, made in chosen.items():
        root = next((root for root in roots if root and name.startswith(root)), "")
        moves.take(name.removeprefix(root), 0, made)


def _as_diffusers(chosen: Mapping[str, Made], architecture: Architecture, moves: Moves) -> None:
    """Name tensors as diffusers does: below its components, or, of one component alone, as its own file has them."""
    naming = diffusers_names(f"{architecture.name}/{architecture.variant}".removesuffix("/"))
    if naming is None:
        moves.complaints.append((f"cannot name tensors of {architecture.title} as diffusers does", "", ""))
        return
    placed = {name: naming.places[whole] for name in chosen if (whole := _whole_name(name, architecture)) in naming.places}
    components = {place.component for place in placed.values()}
    for name, place in placed.items():
        made = chosen[name]
        prefix = f"{place.component}." if len(components) > 1 else ""
        if not made.is_renamed:
            moves.complaints.append(("is named as diffusers does already", name, ""))
            return
        for n, theirs in enumerate(place.names):
            sizes = place.sizes or (1,)
            how = "" if place.how == STACKED else _BACK.get(place.how, place.how)
            moves.take(prefix + theirs, 0, Made(made.names, how, (sum(sizes[:n]), sizes[n], sum(sizes))))
    moves.note("leaves out what diffusers has no place for", sorted(chosen.keys() - placed.keys()))


@method(version=1, moves=_convert)
def convert(a: Tensor, /, *, naming: Literal["original", "diffusers", "bare"], pick: Selection = ("*",)) -> Tensor:
    """Call tensors by other names, exactly: original names, those of diffusers and transformers, or a component's own without a prefix.

    With `diffusers` each name begins with its component's folder (`unet.`, `vae.`, `text_encoder.`, `text_encoder_2.`), so that the file can be
    split into one; of a single component, names are those of its own file, `diffusion_pytorch_model.safetensors` or `model.safetensors`.
    With `bare` a single component has the names of a stand-alone file: a VAE's `encoder.…`, a text encoder's `text_model.…`, a Flux or SD 3
    transformer without `model.diffusion_model.`. With `original` all of these become what a checkpoint calls them. What diffusers has no place
    for (averages, schedules, `logit_scale`) is left out there, and said to be.

    naming: `original`, `diffusers` or `bare`.
    pick: what is converted: components of the architecture, globs over original names, or regular expressions between slashes.

    Origin: diffusers `scripts/convert_diffusers_to_original_stable_diffusion.py` and `convert_original_stable_diffusion_to_diffusers.py`.
    Elsewhere: kohya `tools/convert_diffusers20_original_sd.py`; model-mixer "save as diffusers"; ComfyUI reads both.
    """
    return a
