"""Owns the methods that move a model without mixing it.

Has never heard of files; what `copy` leaves out never reaches a layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmerge_build.methods import Selection, method
from sdmerge_build.methods.moves import is_named

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["copy"]


def _is_copied(tensor: str, component: str, *, pick: Selection, drop: Selection) -> bool:
    """Tell whether `copy` keeps a tensor: picked, and not dropped."""
    return is_named(pick, tensor, component) and not is_named(drop, tensor, component)


@method(version=1, selects=_is_copied)
def copy(a: Tensor, /, *, pick: Selection = ("*",), drop: Selection = ()) -> Tensor:
    """Copy a model: convert its dtype, pick or drop components or tensors.

    pick: what is copied: components of the architecture, globs over tensor names, or regular expressions between slashes.
    drop: what of it is left out.

    Origin: AUTOMATIC1111 "No interpolation".
    Elsewhere: Chattiori "NoIn"; mergekit `passthrough`; ComfyUI's save nodes.
    """
    return a
