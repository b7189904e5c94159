"""Owns the check of adapters that are to be made: their modules, of what each is made, and its rank, where that is known before there are numbers.

Has never heard of decompositions. A sum that nobody keeps as a file needs none: what it does is then a list of strengths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sdmerge_build.adapters.products import products
from sdmerge_build.adapters.writing import Module, modules_of
from sdmerge_build.check.results import Checked, Complain, Draft, Operation, Strength
from sdmerge_build.check.shares import Shares
from sdmerge_build.dtypes import KEEP, promote
from sdmerge_build.errors import named_briefly
from sdmerge_build.plan import Plan, Step
from sdmerge_build.tensorfile import Spec

__all__ = ["Drafting"]

UNLIMITED = 65536  # the default of `rank`, beyond any side of any matrix
_ADDED = {"lora", "loha", "lokr", "diff"}  # what adds the same to whatever weights it meets
_ADVICE = 'a step with `method = "resize_lora"` makes LoRAs of it'


class Drafting:
    """The modules of an adapter that a step makes."""

    def __init__(self, plan: Plan, step: Step, checked: Checked, shares: Shares, complain: Complain) -> None:
        self._plan, self._step, self._checked, self._shares, self._complain = plan, step, checked, shares, complain

    @functools.cached_property
    def _layout(self) -> Mapping[str, tuple[int, ...]]:
        return self._plan.architecture.layout()

    def extraction(self, operations: Mapping[str, Operation]) -> None:
        """Draft the difference of two models; note what of it no module can hold."""
        if adapters := [i for i in self._step.inputs if i in self._checked.adapters]:
            hint = "apply it first, with `bake` or in a formula"
            return self._complain(f"takes an adapter, `{adapters[0]}`, and a model together", hint=hint)
        if self._step.adapters or not self._is_limited():
            return None
        drafts: list[Draft] = []
        left: list[str] = []
        for name, operation in operations.items():
            if operation.copied is not None:
                continue
            modules = modules_of(name, operation.shape, self._plan.architecture) if operation.area == operation.shape else ()
            left += [] if modules or self._plan.architecture.component_of(name) == "ema" else [name]
            drafts += [draft for module in modules if (draft := self._decomposed(module, name, operation.params, operation.dtype, ()))]
        if left:
            self._checked.notes.append(f"step `{self._step.name}` leaves out what a LoRA cannot hold: {len(left)} tensors, {named_briefly(left)}")
        self._take(drafts)

    def sum(self, summed: Mapping[str, Sequence[Strength]]) -> None:
        """Draft a sum of adapters: joined rank by rank, or decomposed where the method is to make it smaller."""
        is_smaller = self._step.method.makes_adapter
        if is_smaller and not self._is_limited():
            return
        drafts: list[Draft] = []
        for target, strengths in summed.items():
            if not all(self._suits(target, strength, is_smaller=is_smaller) for strength in strengths):
                continue
            modules = modules_of(target, self._shape(target, strengths), self._plan.architecture)
            if not modules:
                self._complain("has no place in a LoRA for what it changes", target)
            for module in modules:
                parts = tuple(strength for strength in strengths if _overlap(module, strength))
                draft = self._joined(module, parts) if parts and not is_smaller else None
                if parts and is_smaller:
                    draft = self._decomposed(module, target, self._shares.params(target), self._dtype(target, parts), parts)
                drafts += [draft] if draft else []
        self._take(drafts)

    def _is_limited(self) -> bool:
        """Tell whether a step says how much it keeps; complain when it does not."""
        params = self._step.params
        numbers = {name: params[name].values() for name in ("rank", "energy", "threshold")}
        if numbers["rank"] == {float(UNLIMITED)} and numbers["energy"] == {1.0} and numbers["threshold"] == {0.0}:
            return bool(self._complain("says nothing of how much it keeps", hint="write `rank = 64`, `energy = 0.99` or `threshold = 0.01`"))
        if params["randomized"] and max(numbers["rank"]) >= UNLIMITED:
            return bool(
                self._complain("is randomized and has no `rank`", hint="random vectors are drawn for a `rank`; leave `randomized` out, or say it")
            )
        return True

    def _decomposed(self, module: Module, name: str, params: Mapping[str, Any], dtype: str, parts: tuple[Strength, ...]) -> Draft | None:
        """Draft a module whose rank is limited; None where it is limited to nothing."""
        most = min(int(params["rank"]), int(params["conv_rank"]) if module.is_spatial else UNLIMITED, module.rank)
        component = self._plan.architecture.component_of(name)
        is_fixed = params["energy"] == 1 and params["threshold"] == 0 and (component in {"unet", "dit"} or params.get("min_difference", 0) == 0)
        return Draft(module=module, tensor=name, dtype=dtype, most=most, is_fixed=is_fixed, params=params, parts=parts) if most else None

    def _joined(self, module: Module, parts: tuple[Strength, ...]) -> Draft:
        """Draft a module that holds several, one beside the other."""
        ranks = [self._checked.factors[p.adapter][p.change.factors["down"]].shape[0] for p in parts if p.adapter in self._checked.factors]
        dtype = self._dtype(module.target, parts)
        return Draft(module=module, tensor=module.target, dtype=dtype, most=sum(ranks), is_fixed=len(ranks) == len(parts), params={}, parts=parts)

    def _dtype(self, target: str, parts: Sequence[Strength]) -> str:
        dtype = self._step.dtype.of(self._plan.architecture.component_of(target))
        if dtype != KEEP:
            return dtype
        stored = [spec.dtype for part in parts for role, spec in self._stored(part).items() if role != "alpha"]
        dtype = stored[0] if stored else "F32"
        for other in stored[1:]:
            dtype = promote(dtype, other)
        return dtype

    def _suits(self, target: str, strength: Strength, *, is_smaller: bool) -> bool:
        """Tell whether a change can be part of a LoRA; complain when it cannot."""
        kind, roles = strength.change.kind, strength.change.factors
        what = f"{kind}{' with `dora_scale`' if 'dora_scale' in roles else ' with a core' if 'mid' in roles else ''}"
        if kind not in _ADDED or "dora_scale" in roles:
            self._complain(f"cannot make a LoRA of what `{strength.adapter}` does, which depends on the weights that it changes ({what})", target)
            return False
        if not is_smaller and (kind != "lora" or "mid" in roles):
            self._complain(f"cannot join `{strength.adapter}` to others as it is ({what})", target, _ADVICE)
            return False
        return True

    def _stored(self, strength: Strength) -> dict[str, Spec]:
        known = self._checked.factors.get(strength.adapter, {})
        return {role: known[name] for role, name in strength.change.factors.items() if name in known}

    def _shape(self, target: str, strengths: Sequence[Strength]) -> tuple[int, ...]:
        """Find the shape of what adapters change, without a model: from their factors, and the kernel that the architecture has there."""
        usual = self._layout.get(target, ())
        found = [(self._flat_shape(s), s) for s in strengths]
        rows = [size[0] if s.change.rows is None else sum(s.change.rows) for size, s in found if size]
        columns = {size[1] for size, _ in found if size}
        if not found or not all(size for size, _ in found) or len(columns) != 1:
            return usual
        [width] = columns
        whole = [size[0] for size, s in found if s.change.rows is None]
        if not whole and usual and math.prod(usual[1:]) == width:
            return usual
        height = max(whole or rows)
        parts = {s.change.rows[1] for s in strengths if s.change.rows}
        if not whole and target.endswith("in_proj_weight") and len(parts) == 1:
            height = 3 * parts.pop()
        kernel = usual[2:] if len(usual) == 4 else ()
        return (height, width // math.prod(kernel), *kernel)

    def _flat_shape(self, strength: Strength) -> tuple[int, ...]:
        """Find the size of what a change adds, as a matrix."""
        for draft in self._checked.drafts.get(strength.adapter, ()):
            if draft.module.target == strength.change.target and draft.module.rows == strength.change.rows:
                return draft.module.shape[0], math.prod(draft.module.shape[1:])
        return _flat_shape(strength, {role: spec.shape for role, spec in self._stored(strength).items()})

    def _take(self, drafts: Sequence[Draft]) -> None:
        """Take a file with these modules for the step's value; of one that is there already, those that it has."""
        name = self._step.name
        self._checked.drafts[name] = tuple(drafts)
        known = self._checked.factors.get(name)
        if known is None and all(draft.is_fixed for draft in drafts):
            self._checked.factors[name] = {spec.name: spec for draft in drafts for spec in draft.module.specs(draft.most, draft.dtype)}
        elif known is None:
            self._checked.notes.append(f"step `{name}` decides its ranks while it is built")
        adapters: dict[str, tuple[Strength, ...]] = {}
        for draft in drafts:
            change = draft.module.change()
            if known is None or change.factors["down"] in known:
                adapters[change.target] = (*adapters.get(change.target, ()), Strength(name, change, 1.0))
        self._checked.adapters[name] = adapters
        if not drafts:
            self._complain("would have no module at all")


def _overlap(module: Module, strength: Strength) -> bool:
    """Tell whether a change concerns rows of a module."""
    if module.rows is None or strength.change.rows is None:
        return True
    start, count = strength.change.rows
    return start < sum(module.rows) and module.rows[0] < start + count


def _flat_shape(strength: Strength, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Find the size of what a change adds, as a matrix; nothing where its factors are not known yet."""
    if len(shapes) < len(strength.change.factors):
        return ()
    made = products(strength.change.kind, shapes)[0]
    rows, columns = (strength.change.taken or (0, made.rows))[1], math.prod(made.shape[1:])
    return (columns, rows) if strength.change.turned else (rows, columns)
