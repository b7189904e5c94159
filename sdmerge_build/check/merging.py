"""Owns the check of steps: type inference, tensor by tensor, of what a step makes of its models and adapters, or every mismatch at once.

Has never heard of tensor data; a wrong shape in the fifth model is reported before the first gigabyte is read.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from sdmerge_build.architectures import recognise
from sdmerge_build.blend import Blend
from sdmerge_build.check.adapting import Adapting
from sdmerge_build.check.drafting import Drafting
from sdmerge_build.check.results import Checked, Operation
from sdmerge_build.check.shares import Shares
from sdmerge_build.dtypes import FLOATS, KEEP, MERGEABLE, promote
from sdmerge_build.errors import Issue, named_briefly
from sdmerge_build.files import readable_size
from sdmerge_build.methods.moves import is_named
from sdmerge_build.plan import Plan, Step
from sdmerge_build.tensorfile import Spec
from sdmerge_build.weights.ratio import Ratio

__all__ = ["check_step"]

_MUCH = 100_000_000  # bytes of unmerged tensors that are worth a figure
_UNUSUAL = 2.0  # ratios beyond this are probably a slip of the decimal point

Specs = Mapping[int, Spec]
"""A tensor of each model of a step, by the model's place among the inputs."""


def check_step(plan: Plan, step: Step, checked: Checked) -> None:
    """Infer what a step yields, or why it cannot."""
    checker = _StepChecker(plan, step, checked)
    checker.run()


class _StepChecker:
    """Infers one step, tensor by tensor, and groups its complaints by kind."""

    def __init__(self, plan: Plan, step: Step, checked: Checked) -> None:
        self._plan = plan
        self._step = step
        self._checked = checked
        self._models = {n: checked.tensors[i] for n, i in enumerate(step.inputs) if i in checked.tensors}
        self._complaints: dict[tuple[str, str], list[str]] = {}  # (what is said, hint) → tensors
        self._kept: dict[str, list[str]] = {}
        self._strange: dict[str, float] = {}
        self._shares = Shares(plan, step, self._models)
        self._adapting = Adapting(plan, step, checked, self._shares, self._complain)
        self._drafting = Drafting(plan, step, checked, self._shares, self._complain)

    def run(self) -> None:
        """Infer the step's tensors and operations, or its issues."""
        self._adapting.complain_of_roles()
        if not self._models:
            self._add_adapters()
            return
        tensors: dict[str, Spec] = {}
        operations: dict[str, Operation] = {}
        names = sorted(set().union(*self._models.values()))
        changes = self._adapting.by_tensor(set(names))
        for name in names:
            operation = self._operation(name) if self._is_selected(name) else None
            if operation and name in changes:
                operation = self._adapting.changed(name, operation, changes[name])
            if operation:
                tensors[name] = Spec(name, operation.dtype, operation.shape)
                operations[name] = operation
        self._find_idle_patterns()
        if not tensors and not self._complaints:
            self._complain("would have no tensor at all")
        if self._step.method.makes_adapter and not self._complaints:
            self._drafting.extraction(operations)
        if self._has_issues():
            return
        self._checked.operations[self._step.name] = operations
        if self._step.method.makes_adapter:
            return
        self._checked.tensors[self._step.name] = tensors
        self._warn_of_shares()
        for what, names in self._kept.items():
            size = sum(tensors[name].nbytes for name in names if name in tensors)
            amount = f" ({len(names)} tensors, {readable_size(size)})" if size > _MUCH else ""
            self._checked.notes.append(f"step `{self._step.name}` {what}{amount}: {named_briefly(names)}")

    def _add_adapters(self) -> None:
        """Infer a sum of adapters; one that is kept as a file, or made smaller, is what that file will do."""
        summed = self._adapting.total()
        if not self._complaints and (self._step.is_artifact or self._step.method.makes_adapter):
            self._drafting.sum(summed)
        if not self._has_issues():
            self._checked.adapters.setdefault(self._step.name, summed)

    def _has_issues(self) -> bool:
        """Say what was complained of, if anything was."""
        where = self._plan.where("step", self._step.name)
        issues = [
            Issue(where=where, what=f"step `{self._step.name}` {what}{f': {named_briefly(names)}' if names[0] else ''}", hint=hint)
            for (what, hint), names in self._complaints.items()
        ]
        if issues:
            self._checked.issues[self._step.name] = issues
        return bool(issues)

    def _complain(self, what: str, tensor: str = "", hint: str = "") -> None:
        self._complaints.setdefault((what, hint), []).append(tensor)

    def _is_selected(self, name: str) -> bool:
        selects = self._step.method.selects
        return selects is None or selects(name, self._plan.architecture.component_of(name), **self._step.params)

    def _operation(self, name: str) -> Operation | None:
        """Decide how a tensor is made; None when it is left out or complained of."""
        specs = {n: tensors[name] for n, tensors in self._models.items() if name in tensors}
        first, spec = next(iter(specs.items()))
        if len(specs) < len(self._models):
            return self._incomplete(name, specs)
        if self._plan.architecture.is_constant(name):
            return _copy_of(first, spec, spec.dtype)
        shapes = {spec.shape for spec in specs.values()}
        if len(shapes) > 1 and (not _overlap(shapes)[0] or self._step.mismatch in {"error", "keep"}):
            if self._step.mismatch == "keep":
                self._keep(f"takes unmerged from `{self._step.inputs[first]}` what has other shapes elsewhere", name)
                return self._copy(name, first, spec)
            return self._complain(*self._shape_complaint(name, specs))
        kinds = {spec.dtype in FLOATS for spec in specs.values()}
        if kinds == {False}:
            return self._whole_numbers(name, specs) if len(shapes) == 1 else self._complain(*self._shape_complaint(name, specs))
        if len(kinds) > 1:
            types = " and ".join(dict.fromkeys(spec.dtype for spec in specs.values()))
            return self._complain(f"would mix whole numbers with fractions ({types})", name)
        return self._merge(name, specs)

    def _incomplete(self, name: str, specs: Specs) -> Operation | None:
        """Decide what to do with a tensor that only some models have: as the step says, and if it does not say, as the architecture allows."""
        step, architecture, (first, spec) = self._step, self._plan.architecture, next(iter(specs.items()))
        holder = step.inputs[first]
        lacking = ", ".join(f"`{step.inputs[n]}`" for n in self._models if n not in specs)
        field, policy = ("missing", step.missing) if first == next(iter(self._models)) else ("extra", step.extra)
        if policy == "drop":
            return self._keep(f"leaves out what {lacking} lacks", name)
        if policy == "error" and not architecture.may_lack(name):
            if alone := self._alone():
                return self._complain(f"mixes {alone} with whole models", name, 'a component is replaced by a field: `vae = "NAME"`')
            advice = f'write `{field} = "keep"` to take them from `{holder}`' + (
                ', or `extra = "drop"` to leave them out' if field == "extra" else ""
            )
            return self._complain(f"needs tensors that {lacking} lacks", name, advice)
        if architecture.is_constant(name):
            return _copy_of(first, spec, spec.dtype)
        self._keep(f"takes from `{holder}` what {lacking} lacks", name)
        return self._copy(name, first, spec)

    def _alone(self) -> str:
        """Name the inputs that hold components alone, where others are whole models."""
        alone = [self._step.inputs[n] for n in self._models if self._step.inputs[n] in self._checked.stored]
        return " and ".join(f"`{name}`, which holds a component alone," for name in alone) if len(alone) < len(self._models) else ""

    def _keep(self, what: str, tensor: str) -> None:
        """Note what is done with a tensor that not every model has."""
        self._kept.setdefault(what, []).append(tensor)

    def _shape_complaint(self, name: str, specs: Specs) -> tuple[str, str, str]:
        families = {self._step.inputs[n]: recognise(tensors) for n, tensors in self._models.items()}
        if len({family.name for family in families.values()}) > 1:
            shown = ", ".join(f"`{i}` is {family.title}" for i, family in families.items())
            return f"mixes architectures ({shown}), so shapes differ", name, ""
        shapes = " and ".join("×".join(map(str, spec.shape)) or "scalar" for spec in specs.values())
        is_input = name.endswith("input_blocks.0.0.weight")
        wide = {9: "nine input channels belong to an inpainting model", 8: "eight input channels belong to an instruct-pix2pix model"}
        known = next((text for channels, text in wide.items() if any(s.shape[1:2] == (channels,) for s in specs.values())), "")
        hint = f'{known}; `mismatch = "overlap"` merges the channels that all have, `"keep"` takes the first model\'s' if is_input and known else ""
        return f"has models of different shapes ({shapes})", name, hint

    def _whole_numbers(self, name: str, specs: Specs) -> Operation:
        """Take the whole numbers of the model that is copied here, or else of the first: they are never averaged."""
        blend, reads = self._shares.of(self._shares.params(name))
        source = reads[0] if blend and len(reads) == 1 and blend[reads[0]] == 1 else next(iter(specs))
        return _copy_of(source, specs[source], specs[source].dtype)

    def _merge(self, name: str, specs: Specs) -> Operation | None:
        step = self._step
        if unreadable := [spec.dtype for spec in specs.values() if spec.dtype not in MERGEABLE]:
            return self._complain(f"cannot compute with {unreadable[0]}", name)
        params = self._shares.params(name)
        for parameter, value in params.items():
            if isinstance(value, float) and abs(value) > _UNUSUAL and step.method.parameters[parameter].kind == "Ratio":
                self._strange[parameter] = value
        blend, reads = self._shares.of(params)
        if not reads:
            return self._complain("takes nothing from any model: every share is 0", name)
        shapes = {spec.shape for spec in specs.values()}
        if len(shapes) > 1:
            return self._merge_overlap(name, specs, params)
        if blend and len(reads) == 1 and blend[reads[0]] == 1:
            return self._copy(name, reads[0], specs[reads[0]])
        dtype = self._dtype(name, specs)
        if dtype is None:
            return None
        [shape] = shapes
        return Operation(dtype=dtype, shape=shape, area=shape, copied=None, reads=reads, params=params, blend=blend)

    def _merge_overlap(self, name: str, specs: Specs, params: Mapping[str, Any]) -> Operation | None:
        """Merge models of which some have more channels: what all have, the rest being the widest's; or as if the others had zeros there."""
        widest, common = _overlap({spec.shape for spec in specs.values()})
        dtype = self._dtype(name, specs)
        if dtype is None:
            return None
        if self._step.mismatch == "overlap":
            holder = next(n for n, spec in specs.items() if spec.shape == widest)
            self._keep(f"merges what shapes have in common, and takes the rest from `{self._step.inputs[holder]}`", name)
        area = common if self._step.mismatch == "overlap" else widest
        return Operation(dtype=dtype, shape=widest, area=area, copied=None, reads=tuple(specs), params=params, blend=None)

    def _dtype(self, name: str, specs: Specs) -> str | None:
        """Decide the dtype of a tensor that is computed."""
        dtype = self._step.dtype.of(self._plan.architecture.component_of(name))
        if dtype == KEEP:
            dtype = functools.reduce(promote, (spec.dtype for spec in specs.values()))
            if dtype not in MERGEABLE:
                return self._complain(f"cannot round to {dtype}", name, "say a `dtype`")
        return dtype

    def _copy(self, name: str, source: int, spec: Spec) -> Operation | None:
        """Take one input's tensor; fractions still become the step's dtype."""
        dtype = self._step.dtype.of(self._plan.architecture.component_of(name))
        if spec.dtype not in FLOATS or dtype in {KEEP, spec.dtype}:
            return _copy_of(source, spec, spec.dtype)
        if spec.dtype not in MERGEABLE:
            return self._complain(f"cannot convert {spec.dtype}", name)
        return _copy_of(source, spec, dtype)

    def _warn_of_shares(self) -> None:
        """Note shares that do not sum to 1, and ratios far out: meant, perhaps, but the weights will not have the size of a model's."""
        for parameter, value in self._strange.items():
            self._checked.notes.append(f"`{parameter}` of step `{self._step.name}` is {value:g}; ratios usually lie between 0 and 1")
        if odd := list(self._shares.odd_totals()):
            self._checked.notes.append(f"the shares of step `{self._step.name}` sum to {', '.join(f'{total:g}' for total in odd)}, not to 1")

    def _find_idle_patterns(self) -> None:
        """Complain of globs that match nothing: a misspelt one would otherwise be obeyed in silence."""
        names = set().union(*self._models.values())
        components = {self._plan.architecture.component_of(name) for name in names}
        for key, value in self._step.params.items():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Ratio):
                    for said in item.idle(names, self._plan.architecture):
                        self._complain(f"has in `{key}` {said}, which matches no tensor")
                elif (
                    isinstance(item, str) and isinstance(value, tuple) and item not in components and not any(is_named((item,), n, "") for n in names)
                ):
                    self._complain(f"has `{item}` in `{key}`, which matches no tensor")


def _copy_of(source: int, spec: Spec, dtype: str) -> Operation:
    return Operation(dtype=dtype, shape=spec.shape, area=spec.shape, copied=source, reads=(source,), params={}, blend=Blend({source: 1.0}))


def _overlap(shapes: Collection[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the widest of several shapes and what all have in common; two empty ones when none holds all the others."""
    if len({len(shape) for shape in shapes}) > 1:
        return (), ()
    widest = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    common = tuple(min(sizes) for sizes in zip(*shapes, strict=True))
    return (widest, common) if widest in shapes else ((), ())
