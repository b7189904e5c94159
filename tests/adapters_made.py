"""Adapters as their trainers write them: names and shapes of factors, made from a tensor's shape. No reader of ours is asked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sdmerge_build.adapters import Change
from sdmerge_build.tensorfile import Spec

RANK = 4

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

KOHYA = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight", "alpha": "alpha", "dora_scale": "dora_scale"}
PEFT = {"up": "lora_B.weight", "down": "lora_A.weight"}
ENDINGS = {
    "lora": KOHYA,
    "loha": {role: f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {role: f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "glora": {role: f"{role}.weight" for role in ("a1", "a2", "b1", "b2")},
    "oft": {"blocks": "oft_blocks", "rescale": "rescale"},
    "boft": {"blocks": "oft_blocks", "rescale": "rescale"},
    "ia3": {"weight": "weight", "on_input": "on_input"},
    "diff": {"diff": "diff"},
    "set": {"weight": "set_weight"},
}


def specs(shapes: Mapping[str, Shape], dtype: str = "F16") -> dict[str, Spec]:
    """Make what a header says of tensors."""
    return {name: Spec(name, dtype, shape) for name, shape in shapes.items()}


def lora(module: str, out: int, into: int, kernel: Shape = (), endings: Mapping[str, str] = KOHYA) -> Shapes:
    """Make the factors of a linear module, or of a convolution."""
    ones = tuple(1 for _ in kernel)
    made = {f"{module}.{endings['up']}": (out, RANK, *ones), f"{module}.{endings['down']}": (RANK, into, *kernel)}
    return made | ({f"{module}.{endings['alpha']}": ()} if "alpha" in endings else {})


def loras(modules: Iterable[tuple[str, Shape]], endings: Mapping[str, str] = KOHYA) -> dict[str, Spec]:
    """Make an adapter of modules for tensors of these shapes."""
    made: Shapes = {}
    for module, (out, into, *kernel) in modules:
        made |= lora(module, out, into, tuple(kernel), endings)
    return specs(made)


def named(kind: str, module: str, shapes: Mapping[str, Shape]) -> Shapes:
    """Name factors as LyCORIS does."""
    endings = {**ENDINGS[kind], "alpha": "alpha", "dora_scale": "dora_scale"}
    return {f"{module}.{endings[role]}": shape for role, shape in shapes.items()}


def factors(change: Change, tensors: Mapping[str, Spec]) -> Shapes:
    """Return the shapes of a change's factors, by role."""
    return {role: tensors[name].shape for role, name in change.factors.items()}


def lycoris(shape: Shape) -> Iterable[tuple[str, Shapes]]:
    """Yield every kind of factors that LyCORIS makes for a tensor of this shape; it has 32 rows, for BOFT's stages, and a multiple of three columns."""
    out, into, *kernel = shape
    r, k, area = RANK, tuple(kernel), math.prod(kernel)
    ones = tuple(1 for _ in kernel)
    yield "lora", {"up": (out, r, *ones), "down": (r, into, *k)}
    yield "lora", {"up": (out, r, *ones), "down": (r, into, *k), "alpha": (), "dora_scale": (1, into, *ones)}
    yield "lora", {"up": (out, r, *ones), "down": (r, into, *k), "alpha": (1,), "dora_scale": (out, 1, *ones)}
    yield "loha", {"w1_a": (out, r), "w1_b": (r, into * area), "w2_a": (out, r), "w2_b": (r, into * area), "alpha": ()}
    small, large = (4, 3), (out // 4, into // 3)
    yield "lokr", {"w1": small, "w2": (*large, *k), "alpha": ()}
    yield "lokr", {"w1": small, "w2_a": (large[0], r), "w2_b": (r, large[1] * area), "alpha": (), "dora_scale": (1, into, *ones)}
    yield "lokr", {"w1_a": (4, 2), "w1_b": (2, 3), "w2_a": (large[0], r), "w2_b": (r, large[1] * area), "alpha": ()}
    yield "glora", {"a1": (into, r, *ones), "a2": (r, into, *ones), "b1": (out, r, *ones), "b2": (r, into, *k), "alpha": ()}
    yield "oft", {"blocks": (out // 4, 4, 4), "alpha": ()}
    yield "oft", {"blocks": (out // 4, 4, 4), "rescale": (out, 1, *ones), "alpha": ()}
    yield "boft", {"blocks": (4, out // 4, 4, 4), "rescale": (out, 1, *ones), "alpha": ()}
    yield "ia3", {"weight": (1, out, *ones) if kernel else (out,), "on_input": ()}
    yield "ia3", {"weight": (1, into, *ones) if kernel else (into,), "on_input": ()}
    yield "diff", {"diff": shape}
    yield "set", {"weight": shape}
    if area > 1:
        yield "lora", {"up": (out, r, 1, 1), "down": (r, into, 1, 1), "mid": (r, r, *k), "alpha": ()}
        sides = {"w1_a": (r, out), "w1_b": (r, into), "w2_a": (r, out), "w2_b": (r, into)}
        yield "loha", {**sides, "t1": (r, r, *k), "t2": (r, r, *k), "alpha": ()}
        yield "lokr", {"w1": small, "t2": (r, r, *k), "w2_a": (r, large[0]), "w2_b": (r, large[1]), "alpha": ()}
