"""Owns the methods that finish one model: noise, and the fine adjustment of its first and last layers.

Has never heard of a second model. Both see flat slices: what depends on a position asks where the slice lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmerge_build.errors import Issue, SdbuildError
from sdmerge_build.methods import Place, Ratio, Seed, method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_noise", "adjust"]

_FIRST = "model.diffusion_model.input_blocks.0.0."
_NORM = "model.diffusion_model.out.0."
_LAST = "model.diffusion_model.out.2."

# What brightness, red, green and blue are in latent channels 1 to 3.
_SD1 = ((-1.0, 1 / 3, 2 / 3), (1.0, 1.0, 0.0), (0.0, -1.0, -1.0), (1.0, 0.0, 1.0))
_SDXL = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (-1.0, -1.0, 0.0), (-1.0, 1.0, 0.0))
_COLOURS = {"sd1": _SD1, "sd2": _SD1, "sdxl": _SDXL, "sdxl-refiner": _SDXL}


@method(version=1)
def add_noise(a: Tensor, /, *, amount: Ratio, seed: Seed = 0, place: Place) -> Tensor:
    """Add noise to a model: `a + amount * Z`, Z standard normal.

    amount: the standard deviation of the noise, the same for every tensor; trained weights have one of about 0.03.
    seed: another seed gives other noise; every tensor has its own either way.

    Origin: supermerger "plus random".
    Elsewhere: supermerger draws anew in every run, and leaves out tensors named `to_out`, `proj_out` or `norm`: say so with `rules`.
    """
    if amount == 0:
        return a
    from sdmerge_build.methods.chance import normal  # noqa: PLC0415  it imports torch, as nothing else here does

    return a + normal(seed, place).mul_(amount).to(a.dtype)


@method(version=1)
def adjust(
    a: Tensor,
    /,
    *,
    detail_in: Ratio = 0.0,
    detail_out: Ratio = 0.0,
    detail_last: Ratio = 0.0,
    contrast: Ratio = 0.0,
    brightness: Ratio = 0.0,
    red: Ratio = 0.0,
    green: Ratio = 0.0,
    blue: Ratio = 0.0,
    place: Place,
) -> Tensor:
    """Adjust detail and colour: `input_blocks.0.0`, `out.0` and `out.2` are scaled or shifted, and nothing else.

    detail_in: f0, "IN"; more than 0 makes more detail: `input_blocks.0.0.weight * (1 - 0.01 f0)`, `.bias * (1 + 0.02 f0)`.
    detail_out: f1, "OUT"; likewise: `out.0.weight * (1 - 0.01 f1)`, `.bias * (1 + 0.02 f1)`.
    detail_last: f2, "OUT2"; likewise: `out.2.weight * (1 - 0.01 f2)`.
    contrast: f3, "CONT"; latent channel 0: `out.2.bias[0] + 0.02 f3`.
    brightness: f4, "BRI"; with f5, f6 and f7 a colour that is added to latent channels 1 to 3, `out.2.bias`, 0.02 for each 1.
    red: f5, "COL1"; from cyan, less than 0, to red.
    green: f6, "COL2"; from magenta to green.
    blue: f7, "COL3"; from yellow to blue.

    Origin: supermerger "Adjust", whose eight numbers are pasted in this order: f0,f1,f2,f3,f4,f5,f6,f7.
    Elsewhere: Chattiori `--fine`; model-mixer's first versions had seven numbers, the last four for the four latent channels, 0.02 for each 1.
        SD 1.x and 2.x have one table of colours, SDXL another, by architecture; supermerger tells them by a tensor's name.
    """
    colours = _COLOURS.get(place.architecture)
    if colours is None:
        what = f"`adjust` does not know the latent channels of {place.architecture}"
        raise SdbuildError(Issue(what=what, hint=f"it adjusts models of {', '.join(_COLOURS)}: say the recipe's `architecture`"))
    factors = {
        f"{_FIRST}weight": 1 - 0.01 * detail_in,
        f"{_FIRST}bias": 1 + 0.02 * detail_in,
        f"{_NORM}weight": 1 - 0.01 * detail_out,
        f"{_NORM}bias": 1 + 0.02 * detail_out,
        f"{_LAST}weight": 1 - 0.01 * detail_last,
    }
    if place.name == f"{_LAST}bias":
        shades = (brightness, red, green, blue)
        mixed = [sum(shade * colour[channel] for shade, colour in zip(shades, colours, strict=True)) for channel in range(3)]
        shifts = [0.02 * shift for shift in (contrast, *mixed)]
        return a + a.new_tensor(shifts[place.start : place.start + place.count])
    factor = factors.get(place.name, 1.0)
    return a if factor == 1 else a * factor
