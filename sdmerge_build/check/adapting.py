"""Owns the check of what adapters do in a step: which tensors they change there, how strongly, and that nothing of them is left out in silence.

Has never heard of how models are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from sdmerge_build.adapters import misfit
from sdmerge_build.check.results import Checked, Operation, Strength
from sdmerge_build.check.shares import Shares
from sdmerge_build.dtypes import FLOATS, MERGEABLE
from sdmerge_build.plan import Plan, Step

__all__ = ["Adapting"]

Complain = Callable[..., None]


class Adapting:
    """The adapters among a step's inputs."""

    def __init__(self, plan: Plan, step: Step, checked: Checked, shares: Shares, complain: Complain) -> None:
        self._plan, self._step, self._checked, self._shares, self._complain = plan, step, checked, shares, complain
        self._adapters = {n: checked.adapters[i] for n, i in enumerate(step.inputs) if i in checked.adapters}

    def complain_of_roles(self) -> None:
        """Complain of checkpoints where adapters must stand, and of an adapter where there must be a model to apply adapters to."""
        step = self._step
        for name in step.adapters:
            if name not in self._checked.adapters:
                hint = "checkpoints are mixed by formulas; the difference of two becomes an adapter by `extract_lora`"
                self._complain(f"names `{name}` as an adapter, which is a checkpoint", hint=hint)
        if step.method.rest == "adapters" and (bases := [i for i in step.inputs[: len(step.method.models)] if i in self._checked.adapters]):
            self._complain(f"applies adapters to `{bases[0]}`, which is an adapter", hint="a formula adds adapters up: `A + 0.5 * B`")

    def total(self) -> Mapping[str, tuple[Strength, ...]]:
        """Infer a sum of adapters: the changes of all, each as strongly as its share says."""
        summed: dict[str, list[Strength]] = {}
        for n, changes in self._adapters.items():
            for target, said in changes.items():
                if share := self._share(n, target):
                    summed.setdefault(target, []).extend(strength.times(share) for strength in said)
        return {target: tuple(said) for target, said in summed.items()}

    def by_tensor(self, names: Collection[str]) -> Mapping[str, Sequence[Strength]]:
        """Sort what adapters do by the tensors that models have; complain of what no model has."""
        sorted_: dict[str, list[Strength]] = {}
        for n, changes in self._adapters.items():
            for target, said in changes.items():
                name = target if target in names else target.removeprefix(self._plan.architecture.bare)
                share = self._share(n, target)
                if share and name in names:
                    sorted_.setdefault(name, []).extend(strength.times(share) for strength in said)
                elif share:
                    hint = "a strength of 0 there leaves it out on purpose: `blocks = { CLIP_L = 0 }`, or a rule with `value = 0`"
                    self._complain(f"would leave out what `{self._step.inputs[n]}` changes, as no model has it", target, hint)
        return sorted_

    def changed(self, name: str, operation: Operation, changes: Sequence[Strength]) -> Operation | None:
        """Add what adapters do to an operation, where their factors fit."""
        for strength in changes:
            stored = self._checked.factors.get(strength.adapter)
            if stored is None:  # what is yet to be made will fit
                continue
            shapes = {role: stored[factor].shape for role, factor in strength.change.factors.items()}
            if text := misfit(strength.change, shapes, operation.shape):
                return self._complain(f"cannot apply `{strength.adapter}`, which {text}", name, "is it made for this architecture?")
        if operation.dtype not in FLOATS or operation.dtype not in MERGEABLE or operation.area != operation.shape:
            return self._complain("would change with an adapter what cannot be computed with", name)
        return replace(operation, changes=tuple(changes))

    def _share(self, adapter: int, target: str) -> float:
        """Return how strongly an adapter is applied to a tensor; a method that does anything but add and scale cannot say."""
        blend, _ = self._shares.of(self._shares.params(target))
        if blend is None:
            what = f"gives `{self._step.inputs[adapter]}`, an adapter, to `{self._step.method.name}`, which works on whole models"
            self._complain(what, hint="apply it first, with `bake` or in a formula")
            return 0.0
        return blend[adapter]
