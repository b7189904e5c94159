"""Owns the methods whose result is an adapter: factors of a difference, or of what other adapters add.

Has never heard of how matrices are decomposed (`decomposition.py`) nor of files; adapters are small and made in one piece, before the pass, so
these functions say what a step means, and the engine approximates it. LAPACK's last bits differ from CPU to CPU, so both are `pinned`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdmerge_build.methods import Positive, Seed, Selection, Unit, method
from sdmerge_build.methods.moves import is_named

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["extract_lora", "resize_lora"]


def _is_picked(tensor: str, component: str, *, pick: Selection, **_: Any) -> bool:
    """Tell whether a tensor's difference is extracted."""
    return is_named(pick, tensor, component)


@method(version=1, selects=_is_picked, cut="nowhere", makes_adapter=True, pinned=True)
def extract_lora(
    a: Tensor,
    b: Tensor,
    /,
    *,
    rank: Positive = 65536,
    energy: Unit = 1.0,
    threshold: Unit = 0.0,
    conv_rank: Positive = 65536,
    min_difference: Positive = 0.0,
    clamp: Unit = 1.0,
    pick: Selection = ("*",),
    randomized: bool = False,
    seed: Seed = 0,
) -> Tensor:
    """Take the difference of two models as a LoRA: `up @ down`, the best approximation of `a - b` that the rank allows.

    The matrices and convolutions of the diffusion model and of the text encoders are extracted, under kohya's names; what else differs (biases,
    norms, embeddings, VAE) cannot be in a LoRA, and a note says how much that is. One of `rank`, `energy` and `threshold` must be said.

    rank: the most singular values that are kept of each tensor.
    energy: the share of the sum of their squares that is enough.
    threshold: those that are not larger than this times the largest are left out.
    conv_rank: the most that are kept of convolutions larger than 1×1; 0 leaves these out, as kohya does unless told.
    min_difference: a text encoder is left out where no number of it differs by more than this; kohya's is 0.01.
    clamp: below 1, numbers of the factors beyond this quantile of them all are cut off, which loses what is largest; kohya's is 0.99.
    pick: what is extracted: components of the architecture, or globs over tensor names.
    randomized: find the leading vectors from random ones (`seed`): quicker where the rank is small, and nearly as good.
    seed: of `randomized`.

    Origin: kohya `networks/extract_lora_from_models.py`, after cloneofsimo's `cli_svd.py`.
    Elsewhere: supermerger "Make LoRA"; ComfyUI LoraSave; mergekit `extract_lora`; sd-mecha's is `truncate_rank`. They write `up = U S` and
        `down = V`; here each factor takes the root of the singular values, so that float16 holds small differences with all its digits.
        With `clamp`, the factors are as theirs. N. Halko, P. G. Martinsson, J. A. Tropp, "Finding Structure with Randomness" (2011).
    """
    return a - b


@method(version=1, cut="nowhere", makes_adapter=True, pinned=True)
def resize_lora(
    adapter: Tensor,
    /,
    *,
    rank: Positive = 65536,
    energy: Unit = 1.0,
    threshold: Unit = 0.0,
    conv_rank: Positive = 65536,
    clamp: Unit = 1.0,
    randomized: bool = False,
    seed: Seed = 0,
) -> Tensor:
    """Make a LoRA of another rank of an adapter, or of a sum of adapters: the best approximation of what they add.

    LoRA, LoCon, LoHa, LoKr and full differences of matrices may be in the sum. One of `rank`, `energy` and `threshold` must be said.

    rank: the most singular values that are kept of each tensor.
    energy: the share of the sum of their squares that is enough.
    threshold: those that are not larger than this times the largest are left out.
    conv_rank: the most that are kept of convolutions larger than 1×1; 0 leaves these out.
    clamp: below 1, numbers of the factors beyond this quantile of them all are cut off.
    randomized: find the leading vectors from random ones (`seed`).
    seed: of `randomized`.

    Origin: kohya `networks/resize_lora.py`, whose `sv_fro` is the root of `energy`, and `sv_ratio` 1 over `threshold`; `networks/svd_merge_lora.py`.
    Elsewhere: supermerger resizes in the course of a merge. Others multiply the factors and decompose the product; plain LoRAs are decomposed
        here without it (QR of the factors), so that no digits of small singular values are lost.
    """
    return adapter
