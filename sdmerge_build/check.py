"""Owns type inference for checkpoints: from a plan and its sources' headers to every tensor of every step, or every mismatch at once.

Has never heard of tensor data; a wrong architecture in the fifth source is reported before the first gigabyte is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from sdmerge_build.architectures import GENERIC, architecture_named, recognise
from sdmerge_build.blend import Blend, blend_of
from sdmerge_build.dtypes import FLOATS, KEEP, MERGEABLE, promote
from sdmerge_build.errors import Issue, named_briefly
from sdmerge_build.files import readable_size
from sdmerge_build.plan import Plan, Step
from sdmerge_build.tensorfile import Header, Spec
from sdmerge_build.weights.ratio import Ratio

__all__ = ["Checked", "Operation", "check"]

_MUCH = 100_000_000  # bytes of unmerged tensors that are worth a figure
_UNUSUAL = 2.0  # ratios beyond this are probably a slip of the decimal point


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """How one tensor of a step is made."""

    dtype: str  # of the result
    shape: tuple[int, ...]  # of the result
    area: tuple[int, ...]  # of what is computed; smaller than `shape` where only what models have in common is merged
    copied: int | None  # the input whose tensor this is, exactly; None when it is computed
    reads: tuple[int, ...]  # the inputs that matter
    params: Mapping[str, Any]  # numbers for this tensor
    blend: Blend | None  # each input's share, where the method is linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Every tensor of every source and step, how steps make them, and what does not fit."""

    tensors: dict[str, Mapping[str, Spec]] = field(default_factory=dict)
    operations: dict[str, dict[str, Operation]] = field(default_factory=dict)
    issues: dict[str, list[Issue]] = field(default_factory=dict)  # by the source or step they concern
    notes: list[str] = field(default_factory=list)


def check(plan: Plan, headers: Mapping[str, Header]) -> Checked:
    """Infer what every step yields. Issues are collected, not raised, so that a build may go on with what is sound."""
    checked = Checked()
    for name in plan.sources:
        if name not in headers:
            continue
        checked.tensors[name] = headers[name].tensors
        if issues := list(_architecture_issues(plan, name, headers[name])):
            checked.issues[name] = issues
    for step in plan.steps.values():
        if all(i in checked.tensors and i not in checked.issues for i in step.inputs):
            _StepChecker(plan, step, checked).run()
    return checked


def _architecture_issues(plan: Plan, name: str, header: Header) -> Iterator[Issue]:
    said = plan.sources[name].architecture
    wanted = architecture_named(said) if said else plan.architecture
    if wanted.name == GENERIC or wanted.fits(header.tensors):
        return
    where = plan.where("source", name)
    actual = recognise(header.tensors)
    if actual.name != GENERIC:
        what = f"source `{name}` is a {actual.title} checkpoint, but the recipe {'calls it' if said else 'merges'} {wanted.title}"
        yield Issue(where=where, what=what, hint=f'write `architecture = "{actual.name}"`, or use another file')
        return
    if any(tensor.startswith(("lora_", "lycoris_")) or ".lora_" in tensor for tensor in header.tensors):
        yield Issue(where=where, what=f"source `{name}` is a LoRA, not a {wanted.title} checkpoint")
        return
    lacking = wanted.lacking(header.tensors)
    what = f"source `{name}` is not a {wanted.title} checkpoint{f': it lacks {named_briefly(lacking)}' if lacking else ''}"
    yield Issue(where=where, what=what, hint='any safetensors file can be merged with `architecture = "generic"`')


class _StepChecker:
    """Infers one step, tensor by tensor, and groups its complaints by kind."""

    def __init__(self, plan: Plan, step: Step, checked: Checked) -> None:
        self._plan = plan
        self._step = step
        self._checked = checked
        self._inputs = [checked.tensors[i] for i in step.inputs]
        self._complaints: dict[tuple[str, str], list[str]] = {}  # (what is said, hint) → tensors
        self._kept: dict[str, list[str]] = {}
        self._strange: dict[str, float] = {}
        self._blends: dict[tuple[Any, ...], tuple[Blend | None, tuple[int, ...]]] = {}

    def run(self) -> None:
        """Infer the step's tensors and operations, or its issues."""
        tensors: dict[str, Spec] = {}
        operations: dict[str, Operation] = {}
        for name in sorted(set().union(*self._inputs)):
            operation = self._operation(name) if self._is_selected(name) else None
            if operation:
                tensors[name] = Spec(name, operation.dtype, operation.shape)
                operations[name] = operation
        self._find_idle_patterns()
        if not tensors and not self._complaints:
            self._complain("would have no tensor at all")
        where = self._plan.where("step", self._step.name)
        issues = [
            Issue(where=where, what=f"step `{self._step.name}` {what}{f': {named_briefly(names)}' if names[0] else ''}", hint=hint)
            for (what, hint), names in self._complaints.items()
        ]
        if issues:
            self._checked.issues[self._step.name] = issues
            return
        self._checked.tensors[self._step.name] = tensors
        self._checked.operations[self._step.name] = operations
        self._warn_of_shares()
        for what, names in self._kept.items():
            size = sum(tensors[name].nbytes for name in names if name in tensors)
            amount = f" ({len(names)} tensors, {readable_size(size)})" if size > _MUCH else ""
            self._checked.notes.append(f"step `{self._step.name}` {what}{amount}: {named_briefly(names)}")

    def _complain(self, what: str, tensor: str = "", hint: str = "") -> None:
        self._complaints.setdefault((what, hint), []).append(tensor)

    def _is_selected(self, name: str) -> bool:
        selects = self._step.method.selects
        return selects is None or selects(name, self._plan.architecture.component_of(name), **self._step.params)

    def _operation(self, name: str) -> Operation | None:
        """Decide how a tensor is made; None when it is left out or complained of."""
        holders = [n for n, tensors in enumerate(self._inputs) if name in tensors]
        specs = [self._inputs[n][name] for n in holders]
        if len(holders) < len(self._inputs):
            return self._incomplete(name, holders, specs[0])
        if self._plan.architecture.is_constant(name):
            return _copy_of(0, specs[0], specs[0].dtype)
        if len({spec.shape for spec in specs}) > 1 and (not _overlap(specs)[0] or self._step.mismatch in {"error", "keep"}):
            if self._step.mismatch == "keep":
                self._keep(f"takes unmerged from `{self._step.inputs[0]}` what has other shapes elsewhere", name)
                return self._copy(name, 0, specs[0])
            return self._complain(*self._shape_complaint(name, specs))
        kinds = {spec.dtype in FLOATS for spec in specs}
        if kinds == {False}:
            same = len({spec.shape for spec in specs}) == 1
            return self._whole_numbers(name, specs) if same else self._complain(*self._shape_complaint(name, specs))
        if len(kinds) > 1:
            types = " and ".join(dict.fromkeys(spec.dtype for spec in specs))
            return self._complain(f"would mix whole numbers with fractions ({types})", name)
        return self._merge(name, specs)

    def _incomplete(self, name: str, holders: Sequence[int], spec: Spec) -> Operation | None:
        """Decide what to do with a tensor that only some models have: as the step says, and if it does not say, as the architecture allows."""
        step, architecture, holder = self._step, self._plan.architecture, self._step.inputs[holders[0]]
        lacking = ", ".join(f"`{step.inputs[n]}`" for n in range(len(self._inputs)) if n not in holders)
        field, policy = ("missing", step.missing) if holders[0] == 0 else ("extra", step.extra)
        if policy == "drop":
            return self._keep(f"leaves out what {lacking} lacks", name)
        if policy == "error" and not architecture.may_lack(name):
            advice = f'write `{field} = "keep"` to take them from `{holder}`' + (
                ', or `extra = "drop"` to leave them out' if field == "extra" else ""
            )
            return self._complain(f"needs tensors that {lacking} lacks", name, advice)
        if architecture.is_constant(name):
            return _copy_of(holders[0], spec, spec.dtype)
        self._keep(f"takes from `{holder}` what {lacking} lacks", name)
        return self._copy(name, holders[0], spec)

    def _keep(self, what: str, tensor: str) -> None:
        """Note what is done with a tensor that not every model has."""
        self._kept.setdefault(what, []).append(tensor)

    def _shape_complaint(self, name: str, specs: Sequence[Spec]) -> tuple[str, str, str]:
        families = [recognise(tensors) for tensors in self._inputs]
        if len({family.name for family in families}) > 1:
            shown = ", ".join(f"`{i}` is {f.title}" for i, f in zip(self._step.inputs, families, strict=True))
            return f"mixes architectures ({shown}), so shapes differ", name, ""
        shapes = " and ".join("×".join(map(str, spec.shape)) or "scalar" for spec in specs)
        is_input = name.endswith("input_blocks.0.0.weight")
        wide = {9: "nine input channels belong to an inpainting model", 8: "eight input channels belong to an instruct-pix2pix model"}
        known = next((text for channels, text in wide.items() if any(spec.shape[1:2] == (channels,) for spec in specs)), "")
        hint = f'{known}; `mismatch = "overlap"` merges the channels that all have, `"keep"` takes the first model\'s' if is_input and known else ""
        return f"has models of different shapes ({shapes})", name, hint

    def _whole_numbers(self, name: str, specs: Sequence[Spec]) -> Operation:
        """Take the whole numbers of the model that is copied here, or else of the first: they are never averaged."""
        params = {key: _for_tensor(value, name, self._plan) for key, value in self._step.params.items()}
        blend, reads = _shares(self._step, len(specs), params)
        source = reads[0] if blend and len(reads) == 1 and blend[reads[0]] == 1 else 0
        return _copy_of(source, specs[source], specs[source].dtype)

    def _merge(self, name: str, specs: Sequence[Spec]) -> Operation | None:
        step = self._step
        if unreadable := [spec.dtype for spec in specs if spec.dtype not in MERGEABLE]:
            return self._complain(f"cannot compute with {unreadable[0]}", name)
        params = {key: _for_tensor(value, name, self._plan) for key, value in step.params.items()}
        for parameter, value in params.items():
            if isinstance(value, float) and abs(value) > _UNUSUAL and step.method.parameters[parameter].kind == "Ratio":
                self._strange[parameter] = value
        key = tuple(params.values())
        if key not in self._blends:
            self._blends[key] = _shares(step, len(specs), params)
        blend, reads = self._blends[key]
        if not reads:
            return self._complain("takes nothing from any model: every share is 0", name)
        shapes = [spec.shape for spec in specs]
        if len(set(shapes)) > 1:
            return self._merge_overlap(name, specs, params)
        if blend and len(reads) == 1 and blend[reads[0]] == 1:
            return self._copy(name, reads[0], specs[reads[0]])
        dtype = self._dtype(name, specs)
        if dtype is None:
            return None
        return Operation(dtype=dtype, shape=shapes[0], area=shapes[0], copied=None, reads=reads, params=params, blend=blend)

    def _merge_overlap(self, name: str, specs: Sequence[Spec], params: Mapping[str, Any]) -> Operation | None:
        """Merge models of which some have more channels: what all have, the rest being the widest's; or as if the others had zeros there."""
        widest, common = _overlap(specs)
        dtype = self._dtype(name, specs)
        if dtype is None:
            return None
        if self._step.mismatch == "overlap":
            holder = next(n for n, spec in enumerate(specs) if spec.shape == widest)
            self._keep(f"merges what shapes have in common, and takes the rest from `{self._step.inputs[holder]}`", name)
        area = common if self._step.mismatch == "overlap" else widest
        return Operation(dtype=dtype, shape=widest, area=area, copied=None, reads=tuple(range(len(specs))), params=params, blend=None)

    def _dtype(self, name: str, specs: Sequence[Spec]) -> str | None:
        """Decide the dtype of a tensor that is computed."""
        dtype = self._step.dtype.of(self._plan.architecture.component_of(name))
        if dtype == KEEP:
            dtype = specs[0].dtype
            for spec in specs[1:]:
                dtype = promote(dtype, spec.dtype)
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
        totals = {round(blend.total(), 6) for blend, _ in self._blends.values() if blend}
        if odd := sorted(totals - {1.0}):
            self._checked.notes.append(f"the shares of step `{self._step.name}` sum to {', '.join(f'{total:g}' for total in odd)}, not to 1")

    def _find_idle_patterns(self) -> None:
        """Complain of globs that match nothing: a misspelt one would otherwise be obeyed in silence."""
        names = set().union(*self._inputs)
        components = {self._plan.architecture.component_of(name) for name in names}
        for key, value in self._step.params.items():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Ratio):
                    for said in item.idle(names, self._plan.architecture):
                        self._complain(f"has in `{key}` {said}, which matches no tensor")
                elif isinstance(item, str) and isinstance(value, tuple) and item not in components and not any(fnmatchcase(n, item) for n in names):
                    self._complain(f"has `{item}` in `{key}`, which matches no tensor")


def _shares(step: Step, count: int, params: Mapping[str, Any]) -> tuple[Blend | None, tuple[int, ...]]:
    """Find each model's share, and which models need be read: those the method can do without, and takes nothing of, need not."""
    everyone = tuple(range(count))
    blend = blend_of(step.method, everyone, count, params)
    if blend is None:
        return None, everyone
    some = tuple(n for n in everyone if blend[n] != 0)
    is_copy = len(some) == 1 and blend[some[0]] == 1
    if not some or is_copy or blend_of(step.method, some, count, params):
        return blend, some
    return blend, everyone


def _copy_of(source: int, spec: Spec, dtype: str) -> Operation:
    return Operation(dtype=dtype, shape=spec.shape, area=spec.shape, copied=source, reads=(source,), params={}, blend=Blend({source: 1.0}))


def _overlap(specs: Sequence[Spec]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the widest of several shapes and what all have in common; two empty ones when none holds all the others."""
    shapes = {spec.shape for spec in specs}
    if len({len(shape) for shape in shapes}) > 1:
        return (), ()
    widest = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    common = tuple(min(sizes) for sizes in zip(*shapes, strict=True))
    return (widest, common) if widest in shapes else ((), ())


def _for_tensor(value: Any, tensor: str, plan: Plan) -> Any:
    """Resolve a parameter for one tensor: ratios become numbers."""
    if isinstance(value, Ratio):
        return value.of(tensor, plan.architecture)
    if isinstance(value, tuple):
        return tuple(_for_tensor(item, tensor, plan) for item in value)
    return value
