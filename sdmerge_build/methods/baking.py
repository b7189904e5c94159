"""Owns the methods that apply adapters to a model.

Has never heard of factors: what an adapter does to a tensor is computed by the engine (`changes.py`), as strongly as the share that it has here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmerge_build.methods import Ratio, method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["bake"]


@method(version=1)
def bake(base: Tensor, /, *adapters: Tensor, strength: list[Ratio] = 1.0) -> Tensor:  # type: ignore[assignment]  # one for all
    """Apply adapters to a model: `base + strength[0] * what adapters[0] adds + …`, one after the other.

    strength: one per adapter, or one for all; a table says it per block, and `rules` per text encoder or tensor.

    Origin: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1; kohya `networks/merge_lora.py`.
    Elsewhere: supermerger "Merge to Checkpoint"; Chattiori `lora_bake.py`; ComfyUI LoraLoader and CheckpointSave, which go on when a tensor of an
        adapter matches nothing: here that is an error.
    """
    total = base
    for adapter, factor in zip(adapters, strength, strict=True):
        if adapter is not None:
            total = total + adapter * factor
    return total
