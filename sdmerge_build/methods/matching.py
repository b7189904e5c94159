"""Owns weight matching: finds the permutations of one model's channels that make it most like another model.

Has never heard of files, or of which channels may be permuted. It is algorithm 1 of S. Ainsworth, J. Hayase, S. Srinivasa, "Git Re-Basin"
(ICLR 2023): the sum of `a * permuted b` over all tensors is made larger, one group of channels after the other, until no group can make it
larger. Groups are visited in a fixed order, the paper's in a random one.

One thing is added. Channels whose other dimension is not matched yet are compared at random, so the first visit to a group looks only at
tensors whose other dimensions were matched before. A copy of a model is found again in this way, whatever was permuted in it.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sdmerge_build.architectures.permutations import PERMUTED, Axis, Group, axes_of, groups_of
from sdmerge_build.errors import Issue, SdbuildError
from sdmerge_build.methods import Findings

__all__ = ["Models", "match", "permuted"]

_SWEEPS = 8
_STRIPE = 512  # rows of a matrix of scores that are computed at once, by one thread
_TERMS = 1 << 22  # numbers that are widened to float64 at once
_GAIN = 1e-12  # of the score: what is less is rounding, and could go round in circles


class Models(Protocol):
    """What matching asks of two models."""

    names: tuple[str, ...]
    architecture: str

    def tensor(self, model: int, name: str) -> Tensor:
        """Return one model's tensor."""

    def map(self, function: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
        """Apply a function to names in threads."""


def match(models: Models) -> Findings:
    """Find the permutations of the second model's channels that make it most like the first.

    By group, for each of its strands: the channel that comes to each place. Groups that stay as they are are left out.
    """
    assign = _assignment()
    present = set(models.names)
    groups = [group for group in groups_of(models.architecture) if present.issuperset(group.tensors)]
    if not groups:
        what = "`rebasin` finds no channels that it may permute"
        known = f"it knows the channels of {', '.join(PERMUTED)}"
        hint = f"both models must have all tensors of a layer, under their usual names; {known}: say the recipe's `architecture`"
        raise SdbuildError(Issue(what=what, hint=hint))
    matching = _Matching(models, groups, assign)
    matching.climb()
    return {name: [strand.tolist() for strand in strands] for name, strands in matching.found.items() if not _stays(strands)}


class _Matching:
    """Permutations of the second model's channels, getting better."""

    def __init__(self, models: Models, groups: Sequence[Group], assign: Any) -> None:
        self._models = models
        self._groups = groups
        self._assign = assign
        self._axes = axes_of(models.architecture)
        self._active = {group.name for group in groups}
        self._visited: set[str] = set()
        self.found: dict[str, list[Tensor]] = {}

    def climb(self) -> None:
        """Visit all groups, and again those that something changed for, until nothing changes."""
        stale = set(self._active)
        for _ in range(_SWEEPS):
            for group in self._groups:
                if group.name not in stale:
                    continue
                if self._is_foreseen(group):
                    stale.discard(group.name)
                if self._visit(group):
                    stale |= self._neighbours(group)
            if not stale:
                return

    def _is_foreseen(self, group: Group) -> bool:
        """Tell whether all that a visit would look at has been matched, so that it need not be repeated for its own sake."""
        return group.name in self._visited or all(self._is_settled(axis) for axis in group.axes)

    def _is_settled(self, axis: Axis) -> bool:
        """Tell whether the other dimensions of an axis's tensor have been matched, as far as they ever will."""
        return all(other.group in self._visited for other in self._others(axis))

    def _others(self, axis: Axis) -> list[Axis]:
        return [other for other in self._axes[axis.tensor] if other.dim != axis.dim and other.group in self._active]

    def _neighbours(self, group: Group) -> set[str]:
        return {other.group for axis in group.axes for other in self._others(axis)}

    def _visit(self, group: Group) -> bool:
        """Match the channels of one group; tell whether any of them moved."""
        is_first = group.name not in self._visited
        self._visited.add(group.name)
        scores = self._scores(group, is_first=is_first)
        if scores is None:
            return False
        if not all(bool(strand.isfinite().all()) for strand in scores):
            what = f"the channels of `{group.name}` cannot be matched: a tensor holds values that are infinite or not numbers"
            raise SdbuildError(Issue(what=what, hint="the file is damaged, or was merged beyond what its dtype holds"))
        channels = len(scores[0])
        before = self.found.get(group.name) or [torch.arange(channels) for _ in scores]
        after = _assigned(scores, group.blocks_of(channels), self._assign)
        old, new = _score(scores, before), _score(scores, after)
        if new - old <= _GAIN * max(abs(new), abs(old)) or all(map(torch.equal, before, after)):
            return False
        self.found[group.name] = after
        return True

    def _scores(self, group: Group, *, is_first: bool) -> list[Tensor] | None:
        """Sum for each strand what every channel of `a` has in common with every one of `b`; None where the tensors have no room for the group."""
        channels = 0
        scores: list[Tensor] = []
        for name in group.tensors:
            a, b = self._models.tensor(0, name), self._models.tensor(1, name)
            if not scores:
                channels = a.shape[group.axes[0].dim]
                scores = [torch.zeros(channels, channels, dtype=torch.float64) for _ in group.strands]
                if not group.blocks_of(channels):
                    return None
            for axis in group.axes:
                if axis.tensor != name:
                    continue
                if not group.holds(axis, a.shape, channels):
                    return None
                if not is_first or self._is_settled(axis):
                    others = [(other, self.found[other.group][other.strand]) for other in self._others(axis) if other.group in self.found]
                    self._compare(_channels(a, axis, channels), _channels(permuted(b, others), axis, channels), scores[axis.strand])
        return scores

    def _compare(self, a: Tensor, b: Tensor, scores: Tensor) -> None:
        """Add the products of all channels of `a` with all of `b`, (channels, terms) each, in stripes that are the same for any number of threads."""
        terms = max(1, _TERMS // len(a))

        def add(stripe: str) -> None:
            rows = slice(int(stripe), int(stripe) + _STRIPE)
            for at in range(0, a.shape[1], terms):
                part = slice(at, at + terms)
                scores[rows] += a[rows, part].to(torch.float64) @ b[:, part].to(torch.float64).t()

        self._models.map(add, map(str, range(0, len(a), _STRIPE)))


def _channels(tensor: Tensor, axis: Axis, channels: int) -> Tensor:
    """See a tensor as a row per channel."""
    return tensor.narrow(axis.dim, axis.start(tensor.shape[axis.dim], channels), channels).movedim(axis.dim, 0).reshape(channels, -1)


def permuted(tensor: Tensor, moved: Sequence[tuple[Axis, Sequence[int] | Tensor]]) -> Tensor:
    """Permute a tensor along some of its axes; with each axis comes the channel for each of its places."""
    for dim in sorted({axis.dim for axis, _ in moved}):
        size = tensor.shape[dim]
        index = torch.arange(size)
        for axis, channels in moved:
            if axis.dim == dim:
                start = axis.start(size, len(channels))
                index[start : start + len(channels)] = torch.as_tensor(channels) + start
        tensor = tensor.index_select(dim, index)
    return tensor


def _assigned(scores: Sequence[Tensor], blocks: int, assign: Any) -> list[Tensor]:
    """Find the permutations of the strands, alike in where blocks go, that score best: no other of this kind scores more."""
    if blocks == 1:
        return [torch.as_tensor(assign(strand.numpy(), maximize=True)[1]) for strand in scores]
    width = len(scores[0]) // blocks
    total = torch.zeros(blocks, blocks, dtype=torch.float64).numpy()
    inside = torch.zeros(len(scores), blocks, blocks, width, dtype=torch.int64)
    for strand, columns in zip(scores, inside.numpy(), strict=True):
        pairs = strand.view(blocks, width, blocks, width).transpose(1, 2).contiguous().numpy()
        for to, of in itertools.product(range(blocks), repeat=2):
            rows, columns[to, of] = assign(pairs[to, of], maximize=True)
            total[to, of] += pairs[to, of][rows, columns[to, of]].sum()
    _, order = assign(total, maximize=True)
    return [torch.cat([strand[to, of] + of * width for to, of in enumerate(order.tolist())]) for strand in inside]


def _score(scores: Sequence[Tensor], strands: Sequence[Tensor]) -> float:
    return sum(float(score.gather(1, strand[:, None]).sum()) for score, strand in zip(scores, strands, strict=True))


def _stays(strands: Sequence[Tensor]) -> bool:
    return all(torch.equal(strand, torch.arange(len(strand))) for strand in strands)


def _assignment() -> Any:
    """Return the solver of assignments; the package that has it is an extra."""
    try:
        return importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError as error:
        what = "`rebasin` needs a package that is not installed"
        raise SdbuildError(Issue(what=what, hint='pip install "sdbuild[rebasin]"')) from error
