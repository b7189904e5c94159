"""Owns the check of steps that move tensors: every tensor of the result is one of an input's, or made of some, bit for bit but for its dtype.

Has never heard of arithmetic, nor of why a tensor is moved: that is for the method to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sdmerge_build.architectures.made import COUNTED, Made
from sdmerge_build.blend import Blend
from sdmerge_build.check.results import Checked, Operation
from sdmerge_build.dtypes import FLOATS, KEEP, MERGEABLE
from sdmerge_build.errors import Issue, named_briefly
from sdmerge_build.methods.moves import Model, Moves, names_of
from sdmerge_build.plan import Plan, Step
from sdmerge_build.tensorfile import Spec

__all__ = ["check_completeness", "check_moves"]

_MODEL = ("unet", "dit")  # what paints
_BESIDE = ("vae", "clip_l", "clip_g", "clip_h", "t5")  # what it cannot paint without


def check_moves(plan: Plan, step: Step, checked: Checked) -> None:
    """Infer what a step that moves tensors yields, or why it cannot."""
    method = step.method
    assert method.moves, "BUG: the step moves nothing"
    where = plan.where("step", step.name)
    if adapters := [i for i in step.inputs if i in checked.adapters]:
        what = f"step `{step.name}` gives `{adapters[0]}`, an adapter, to `{method.name}`, which works on whole models"
        checked.issues[step.name] = [Issue(where=where, what=what, hint="apply it first, with `bake` or in a formula")]
        return
    models = [
        Model(name=name, role=role, shapes={tensor: spec.shape for tensor, spec in checked.tensors[name].items()})
        for name, role in zip(step.inputs, step.roles, strict=True)
    ]
    moves: Moves = method.moves(models, plan.architecture, **step.params)
    _idle(step, models, moves)
    operations = {}
    for tensor, (n, made) in moves.tensors.items():
        if operation := _operation(plan, step, n, tensor, made, models[n], checked, moves):
            operations[tensor] = operation
    if not operations and not moves.complaints:
        moves.complaints.append(("would have no tensor at all", "", ""))
    if moves.complaints:
        checked.issues[step.name] = list(_issues(where, step, moves.complaints))
        return
    checked.operations[step.name] = operations
    checked.tensors[step.name] = {tensor: Spec(tensor, operation.dtype, operation.shape) for tensor, operation in operations.items()}
    checked.notes.extend(f"step `{step.name}` {what}: {named_briefly(names)}" for what, names in moves.notes.items())


def _operation(plan: Plan, step: Step, n: int, tensor: str, made: Made, model: Model, checked: Checked, moves: Moves) -> Operation | None:
    """Decide how a tensor is made; None when it is complained of."""
    if made.how == COUNTED:
        count = model.shapes[tensor]
        return Operation(dtype="I64", shape=count, area=count, copied=None, reads=(), params={}, blend=Blend({}), moved=made)
    specs = [checked.tensors[model.name][name] for name in made.names]
    shape, dtypes = made.shape([spec.shape for spec in specs]), {spec.dtype for spec in specs}
    if shape is None or len(dtypes) > 1:
        shown = ", ".join(f"{spec.dtype} {'×'.join(map(str, spec.shape)) or 'scalar'}" for spec in specs)
        moves.complaints.append((f"cannot make tensors of others of these dtypes and shapes ({shown})", tensor, ""))
        return None
    [dtype] = dtypes
    to = dtype
    if dtype in FLOATS and not any(plan.architecture.is_constant(name) for name in (tensor, *made.names)):
        said = step.dtype.of(_component(plan, tensor, made))
        to = dtype if said == KEEP else said
    if to != dtype and dtype not in MERGEABLE:
        moves.complaints.append((f"cannot convert {dtype}", tensor, ""))
        return None
    moved = None if made == Made((tensor,)) else made
    return Operation(dtype=to, shape=shape, area=shape, copied=n, reads=(n,), params={}, blend=Blend({n: 1.0}), moved=moved)


def _component(plan: Plan, tensor: str, made: Made) -> str:
    """Name the component of a tensor, whichever of its names tells it."""
    components = [plan.architecture.component_of(name) for name in (*made.names, tensor)]
    return next((component for component in components if component not in {"other", "ema"}), components[0])


def _issues(where: str, step: Step, complaints: Sequence[tuple[str, str, str]]) -> Iterator[Issue]:
    """Group complaints by what they say."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for what, tensor, hint in complaints:
        grouped.setdefault((what, hint), []).extend([tensor] if tensor else [])
    for (what, hint), names in grouped.items():
        yield Issue(where=where, what=f"step `{step.name}` {what}{f': {named_briefly(names)}' if names else ''}", hint=hint)


def _idle(step: Step, models: Sequence[Model], moves: Moves) -> None:
    """Complain of what a list names and no model has: a misspelt glob would otherwise be obeyed in silence."""
    names = [name for model in models for name in model.shapes]
    looked = {moves.looked_at.get(name, name) for name in names}
    for key, value in step.params.items():
        for item in value if isinstance(value, tuple) else ():
            if not any(map(names_of((item,), moves.architecture), looked)):
                moves.complaints.append((f"has `{item}` in `{key}`, which matches no tensor", "", ""))


def check_completeness(plan: Plan, checked: Checked) -> None:
    """Note what a kept checkpoint lacks that no picture is made without: whoever loads it needs that from elsewhere."""
    architecture = plan.architecture
    for step in plan.steps.values():
        if not step.is_artifact or step.name not in checked.tensors:
            continue
        operations: Mapping[str, Operation] = checked.operations[step.name]
        held = {_component(plan, tensor, operation.moved or Made((tensor,))) for tensor, operation in operations.items()}
        known = set(architecture.components)
        lacking = [f"`{component}`" for component in _BESIDE if component in known - held]
        alone = sorted(held & {*_MODEL, *_BESIDE})
        if lacking and held & set(_MODEL):
            checked.notes.append(f"artifact `{step.name}` holds no {' and no '.join(lacking)}: whoever loads it needs that from elsewhere")
        elif alone and lacking:
            checked.notes.append(f"artifact `{step.name}` holds no diffusion model, but {' and '.join(f'`{part}`' for part in alone)}")
