"""Owns how an adapter is written: what its modules are called, how large their factors are, and what its header says for those who load it.

Has never heard of numbers or of how factors are found. Names and header are those of kohya's sd-scripts (`networks/lora*.py`), which
AUTOMATIC1111 and ComfyUI read too: the original spelling behind `lora_unet_`, diffusers' for SD 1 and SD 2, transformers' for text encoders.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sdmerge_build.adapters.changes import Change
from sdmerge_build.architectures import Architecture, folder_names
from sdmerge_build.tensorfile import Spec

__all__ = ["DERIVED", "Module", "carried", "derived_metadata", "modules_of"]

Shape = tuple[int, ...]

_ENCODERS = {
    "sd1": {"cond_stage_model.transformer.": "lora_te"},
    "sd2": {"cond_stage_model.model.": "lora_te"},
    "sdxl": {"conditioner.embedders.0.transformer.": "lora_te1", "conditioner.embedders.1.model.": "lora_te2"},
    "sdxl-refiner": {"conditioner.embedders.0.model.": "lora_te"},
    "sd3": {"text_encoders.clip_l.transformer.": "lora_te1", "text_encoders.clip_g.transformer.": "lora_te2"}
    | {"text_encoders.t5xxl.transformer.": "lora_te3"},
    "flux": {"text_encoders.clip_l.transformer.": "lora_te1", "text_encoders.t5xxl.transformer.": "lora_te3"},
}
"""Where a family keeps its text encoders, and what kohya calls them."""

_UNET = "model.diffusion_model."
_SPELLED_AS_DIFFUSERS = {"sd1", "sd2"}  # whose UNets have the same names

_OPENCLIP = re.compile(r"transformer\.resblocks\.(\d+)\.(attn\.in_proj_weight|attn\.out_proj\.weight|mlp\.c_fc\.weight|mlp\.c_proj\.weight)")
_IN_TRANSFORMERS = {"attn.out_proj.weight": "self_attn_out_proj", "mlp.c_fc.weight": "mlp_fc1", "mlp.c_proj.weight": "mlp_fc2"}
_HELD = re.compile(
    r"(text_model\.encoder\.layers\.\d+\.(self_attn|mlp)|encoder\.block\.\d+\.layer\.\d+\.(SelfAttention|DenseReluDense))\.\w+\.weight"
)
"""The matrices of a text encoder; not its embeddings, which are tables."""

_BASE = {"sd1": "sd_v1", "sd2": "sd_v2", "sd2/768-v": "sd_v2_v", "sdxl": "sdxl_base_v1-0", "sd3": "sd3m", "sd3/2b": "sd3m", "flux": "flux1"}
_NETWORK = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}

DERIVED = ("ss_", "sshs_", "modelspec.architecture", "modelspec.implementation")
"""What an adapter's header says because of the tensors that it turned out to have; beginnings of names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module of an adapter that is written: what it is called, and the matrix or convolution that it changes."""

    name: str
    target: str  # the tensor's name in a full checkpoint
    shape: Shape  # of what it changes, as it lies in the checkpoint
    rows: tuple[int, int] | None = None  # as in `Change`
    turned: bool = False

    @property
    def rank(self) -> int:
        """Return the rank that holds whatever may be added to it."""
        return min(self.shape[0], math.prod(self.shape[1:]))

    @property
    def is_spatial(self) -> bool:
        """Tell whether it is a convolution larger than 1×1."""
        return math.prod(self.shape[2:]) > 1

    def change(self) -> Change:
        """Say what it does, as a reader of its file would."""
        factors = {"up": f"{self.name}.lora_up.weight", "down": f"{self.name}.lora_down.weight", "alpha": f"{self.name}.alpha"}
        return Change(target=self.target, kind="lora", factors=factors, rows=self.rows, turned=self.turned)

    def factors(self, rank: int) -> tuple[Shape, Shape]:
        """Return the shapes of `up` and `down`."""
        out, *rest = reversed(self.shape) if self.turned else self.shape
        return (out, rank, *(1 for _ in rest[1:])), (rank, *rest)

    def specs(self, rank: int, dtype: str) -> tuple[Spec, ...]:
        """List its tensors. `alpha` is float32, for float16 counts exactly to 2048 alone."""
        change = self.change().factors
        up, down = self.factors(rank)
        return Spec(change["up"], dtype, up), Spec(change["down"], dtype, down), Spec(change["alpha"], "F32", ())


def modules_of(target: str, shape: Shape, architecture: Architecture) -> tuple[Module, ...]:
    """Return what an adapter calls a tensor: one module, three for a fused q, k and v that loaders know apart; none where it has no name for it."""
    if len(shape) not in {2, 4} or 0 in shape:
        return ()
    for prefix, theirs in _ENCODERS.get(architecture.name, {}).items():
        if target.startswith(prefix):
            return _of_encoder(target, target.removeprefix(prefix), theirs, shape)
    if architecture.component_of(target) not in {"unet", "dit"} or not target.endswith(".weight"):
        return ()
    bare = target.removeprefix(_UNET)
    if architecture.name in _SPELLED_AS_DIFFUSERS:
        bare = _diffusers_names().get(_UNET + bare, "")
    name = f"lora_unet_{_flat(bare)}"
    return (Module(name=name, target=_UNET + bare if architecture.bare else target, shape=shape),) if bare else ()


@functools.cache
def _diffusers_names() -> Mapping[str, str]:
    """Return what diffusers calls the tensors of the UNet that SD 1 and SD 2 share."""
    names = folder_names("sd1")
    assert names, "BUG: SD 1 has names in diffusers"
    return {ours: place.names[0] for ours, place in names.places.items() if place.component == "unet"}


def _of_encoder(target: str, bare: str, theirs: str, shape: Shape) -> tuple[Module, ...]:
    """Name a tensor of a text encoder as transformers does, whose q, k and v are not fused."""
    if bare in {"text_projection", "text_projection.weight"}:
        return (Module(name=f"{theirs}_text_projection", target=target, shape=shape, turned=bare == "text_projection"),)
    if not (found := _OPENCLIP.fullmatch(bare)):
        return (Module(name=f"{theirs}_{_flat(bare)}", target=target, shape=shape),) if _HELD.fullmatch(bare) else ()
    start = f"{theirs}_text_model_encoder_layers_{found[1]}"
    if found[2] in _IN_TRANSFORMERS:
        return (Module(name=f"{start}_{_IN_TRANSFORMERS[found[2]]}", target=target, shape=shape),)
    count = shape[0] // 3
    return tuple(
        Module(name=f"{start}_self_attn_{letter}_proj", target=target, shape=(count, *shape[1:]), rows=(n * count, count))
        for n, letter in enumerate("qkv")
    )


def _flat(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


def derived_metadata(architecture: Architecture, ranks: Iterable[tuple[Module, int]], said: Mapping[str, str]) -> dict[str, str]:
    """Compose what loaders look for in an adapter's header, from its modules and their ranks; `said` is the rest of the header."""
    plain: dict[Module, int] = {}
    spatial: dict[Module, int] = {}
    for module, rank in ranks:
        (spatial if module.is_spatial else plain)[module] = rank
    size, conv = _common(plain or spatial), _common(spatial)
    variant = f"{architecture.name}/{architecture.variant}".removesuffix("/")
    args = {"conv_dim": str(conv), "conv_alpha": str(float(conv))} if spatial and conv else {}
    base = _BASE.get(variant, "" if architecture.name == "sd3" else _BASE.get(architecture.name, ""))
    made = {
        "ss_v2": str(architecture.name == "sd2"),
        "ss_network_module": _NETWORK.get(architecture.name, "networks.lora"),
        "ss_network_dim": str(size) if size else "Dynamic",
        "ss_network_alpha": str(float(size)) if size else "Dynamic",
        "ss_network_args": json.dumps(args),
    }
    made |= {"ss_base_model_version": base} if base else {}
    if family := said.get("modelspec.architecture"):
        made["modelspec.architecture"] = f"{family}/lora"
    if "modelspec.implementation" in said and architecture.name in _SPELLED_AS_DIFFUSERS:
        made["modelspec.implementation"] = "diffusers"
    return made


def _common(ranks: Mapping[Module, int]) -> int:
    """Return the rank that all modules have, but for those that are too small for it; 0 where there is none."""
    most = max(ranks.values(), default=0)
    return most if all(rank == min(most, module.rank) for module, rank in ranks.items()) else 0


def carried(header: Mapping[str, str], said: Mapping[str, str]) -> dict[str, str]:
    """Put a new header before an adapter's stored tensors: what was derived from them holds still."""
    if "ss_network_module" not in header:
        return dict(said)
    return {**said, **{name: text for name, text in header.items() if name.startswith(DERIVED)}}
