"""Owns the check of sources: whether a file is of the recipe's architecture, or an adapter for it that is understood to the last tensor.

Has never heard of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sdmerge_build.adapters import Adapter, Change, Settings, SettingsError, is_adapter, read_adapter, read_settings, scale_of
from sdmerge_build.architectures import GENERIC, architecture_named, recognise
from sdmerge_build.architectures.components import Components, read_components
from sdmerge_build.check.results import Checked, Strength
from sdmerge_build.errors import Issue, named_briefly
from sdmerge_build.plan import Plan
from sdmerge_build.tensorfile import Header, Spec

__all__ = ["check_source"]

_MADE_FOR = ("ss_base_model_version", "modelspec.architecture")
_MOST_LISTED = 20  # tensors of an adapter that are complained of by name


def check_source(plan: Plan, name: str, header: Header, checked: Checked) -> None:
    """Take a source for what its header shows it to be, or complain."""
    if plan.architecture.name != GENERIC and is_adapter(header.tensors):
        adapter = read_adapter(header.tensors, plan.architecture)
        checked.factors[name] = header.tensors
        issues = list(_adapter_issues(plan, name, header, adapter))
        try:
            settings = read_settings(header.metadata)
            checked.adapters[name] = {
                target: tuple(_strength(name, change, settings, header) for change in changes) for target, changes in adapter.changes.items()
            }
        except SettingsError as error:
            what = f"adapter `{name}`: {error}, so nobody knows how strongly it is to be applied"
            issues.append(Issue(where=plan.where("source", name), what=what))
    elif parts := _components(plan, name, header):
        issues = list(_take_components(plan, name, header, parts, checked))
    else:
        checked.tensors[name] = header.tensors
        issues = list(_architecture_issues(plan, name, header))
    if issues:
        checked.issues[name] = issues


def _strength(name: str, change: Change, settings: Settings, header: Header) -> Strength:
    """Say how strongly a change is applied, or, to what has lengths of its own, how strongly before it is given them."""
    rank = next(iter(header.tensors[change.factors["down"]].shape), 0) if "down" in change.factors else 0
    scale = scale_of(change, settings, rank)
    return Strength(name, replace(change, scale=scale), 1.0) if "dora_scale" in change.factors else Strength(name, change, scale)


def _adapter_issues(plan: Plan, name: str, header: Header, adapter: Adapter) -> Iterator[Issue]:
    """Complain of every tensor of an adapter that would be left out."""
    where, title = plan.where("source", name), plan.architecture.title
    if adapter.strays:
        count = f"{len(adapter.strays)} of its {len(header.tensors)} tensors match"
        what = f"adapter `{name}`: {count} nothing of {title}: {named_briefly(adapter.strays, most=_MOST_LISTED)}"
        said = next((f"; its header says `{header.metadata[key]}`" for key in _MADE_FOR if key in header.metadata), "")[:100]
        yield Issue(where=where, what=what, hint=f"an adapter is applied whole or not at all; is it made for this architecture{said}?")
    for text in adapter.incomplete[:_MOST_LISTED]:
        yield Issue(where=where, what=f"adapter `{name}`: {text}")
    if len(adapter.incomplete) > _MOST_LISTED:
        yield Issue(where=where, what=f"adapter `{name}`: and {len(adapter.incomplete) - _MOST_LISTED} complaints more")


def _components(plan: Plan, name: str, header: Header) -> Components | None:
    """Read a file that is no checkpoint as a part of one: a VAE or a text encoder, as they are published by themselves."""
    said = plan.sources[name].architecture
    wanted = architecture_named(said) if said else plan.architecture
    if wanted.name == GENERIC or wanted.fits(header.tensors) or recognise(header.tensors).name != GENERIC:
        return None
    return read_components(header.tensors.keys(), wanted)


def _take_components(plan: Plan, name: str, header: Header, parts: Components, checked: Checked) -> Iterator[Issue]:
    """Take a part of a checkpoint under the names it has in one; complain of what is missing, unknown, or does not go together."""
    where, kind = plan.where("source", name), " and ".join(f"`{component}`" for component in parts.names)
    if parts.strays:
        what = f"source `{name}` is {kind} of {plan.architecture.title}, and {len(parts.strays)} of its tensors are not"
        yield Issue(where=where, what=f"{what}: {named_briefly(parts.strays, most=_MOST_LISTED)}", hint="is it of another architecture?")
    if parts.lacking:
        yield Issue(where=where, what=f"source `{name}` is {kind} of {plan.architecture.title}, and lacks {named_briefly(parts.lacking)}")
    tensors = {}
    for tensor, made in parts.tensors.items():
        specs = [header.tensors[stored] for stored in made.names]
        shape = made.shape([spec.shape for spec in specs])
        if shape is None or len({spec.dtype for spec in specs}) > 1:
            what = f"source `{name}`: dtypes or shapes of {named_briefly(made.names)} do not go together"
            yield Issue(where=where, what=f"{what}, and are one tensor, `{tensor}`, in a checkpoint" if len(specs) > 1 else what)
        else:
            tensors[tensor] = Spec(tensor, specs[0].dtype, shape)
    checked.tensors[name] = tensors
    checked.stored[name] = parts.tensors
    if parts.left_out:
        checked.notes.append(f"source `{name}` is {kind}; what checkpoints have no place for is left out: {named_briefly(parts.left_out)}")


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
    lacking = wanted.lacking(header.tensors)
    what = f"source `{name}` is not a {wanted.title} checkpoint{f': it lacks {named_briefly(lacking)}' if lacking else ''}"
    yield Issue(where=where, what=what, hint='any safetensors file can be merged with `architecture = "generic"`')
