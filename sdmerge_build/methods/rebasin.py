"""Owns re-basin: permutes the channels of one model so that they are where another's are, and mixes the two.

Has never heard of files. How channels are matched is in `matching.py`, which of them may move is told by the architecture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdmerge_build.architectures.permutations import axes_of
from sdmerge_build.methods import Findings, Place, Ratio, Survey, method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["rebasin"]


def _match(models: Any) -> Findings:
    """Find the permutations of the second model's channels that make it most like the first."""
    from sdmerge_build.methods.matching import match  # noqa: PLC0415  loads torch

    return match(models)


@method(version=1, cut="nowhere", pinned=True, survey=Survey(name="rebasin", version=1, function=_match), needs="scipy")
def rebasin(a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5, findings: Findings, place: Place) -> Tensor:
    """Permute the channels of `b` so that they match those of `a`, and mix the two: `(1 - alpha) * a + alpha * permuted b`.

    alpha: how much of `b`; permuted, it computes the same as before.

    Origin: S. Ainsworth, J. Hayase, S. Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2022: weight matching.
    Elsewhere: sd-mecha `rebasin`, for SDXL, has a fixed order too; sd-meh, SD.Next and model-mixer visit groups in a random order without a
        seed, and mix in several steps. sdbuild permutes attention heads as wholes and channels inside them, GEGLU's halves together, and
        between convolutions only inside GroupNorm's groups and these as wholes, so that no permutation changes what `b` computes.
        Models that are fine-tunes of one model stay as they are, and this is `weighted_sum`. EMA weights are not permuted.
    """
    if alpha == 0:
        return a
    from sdmerge_build.methods.matching import permuted  # noqa: PLC0415  loads torch

    axes = [axis for axis in axes_of(place.architecture).get(place.name, ()) if axis.group in findings]
    moved = permuted(b, [(axis, findings[axis.group][axis.strand]) for axis in axes])
    return moved if alpha == 1 else a * (1 - alpha) + moved * alpha
