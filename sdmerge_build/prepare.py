"""Owns everything before the first tensor: from a recipe's path to what is asked for, what the store has, and why the rest must be made.

Has never heard of torch, and writes nothing but the memo of digests; `--dry-run` ends here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdmerge_build.adapters.writing import carried
from sdmerge_build.ancestry import concluded, licence_files, refusals, refuse_release
from sdmerge_build.check import check
from sdmerge_build.emit import can_reemit
from sdmerge_build.errors import Issue, RecipeError, SdbuildError, joined
from sdmerge_build.events import State, Watcher
from sdmerge_build.keys import Description, artifact_key, describe_all, differences
from sdmerge_build.licences import Conclusion
from sdmerge_build.lineage import metadata_of
from sdmerge_build.lock import Lock, lock_path, read_lock
from sdmerge_build.manifest import described_in, manifest_path
from sdmerge_build.plan import Plan, Step, plan_file
from sdmerge_build.rehearse import stand_ins
from sdmerge_build.store import Store, Stored
from sdmerge_build.supply import Reach, Supply, refuse_full_disk
from sdmerge_build.tensorfile import read_header

__all__ = ["Options", "Prepared", "Wish", "gather", "prepare", "release_folder"]


_DERIVED = ("sdbuild.lineage", "sd_merge_recipe", "sd_merge_models")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says, beside the recipe."""

    out: Path | None = None
    store: Path = Path("cache")
    reach: Reach = field(default_factory=Reach)
    only: tuple[str, ...] = ()
    rehearse: str = ""  # `tiny`, `full`, or nothing
    keep_going: bool = False
    release: bool = False
    sign: str = ""  # a private key's path, `sigstore`, or nothing

    @property
    def key(self) -> Path | None:
        """Return the key that releases are signed with; none where Sigstore does it."""
        return Path(self.sign) if self.sign and self.sign != "sigstore" else None

    @property
    def store_root(self) -> Path:
        """Return the store's folder; rehearsals have one of their own."""
        return self.store / "rehearsal" if self.rehearse else self.store

    @property
    def out_folder(self) -> Path:
        """Return the folder that artifacts appear in."""
        return self.out or (self.store_root / "out" if self.rehearse else Path("out"))


@dataclass(slots=True, kw_only=True)
class Wish:
    """An artifact that is asked for, and what is known of it."""

    step: Step
    target: Path
    state: State = State.WANTED
    terms: Conclusion | None = None  # what the texts say of it, once its sources are known
    metadata: dict[str, str] = field(default_factory=dict)
    tensor_key: str = ""
    artifact_key: str = ""
    stored: Stored | None = None  # the artifact itself, or, for a re-emission, one with the same tensors
    released: Path | None = None  # the folder that is ready to be uploaded
    reasons: list[str] = field(default_factory=list)
    error: SdbuildError | None = None


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A recipe, ready to be built; what is known of its sources grows as they arrive."""

    plan: Plan
    store: Store
    supply: Supply
    wishes: list[Wish]
    options: Options
    described: dict[str, Description] = field(default_factory=dict)

    @property
    def is_release(self) -> bool:
        """Tell whether what is built is to be published: terms that forbid it end the run."""
        return self.options.release or self.plan.recipe.table.release is not None

    @property
    def missing(self) -> dict[str, int]:
        """Return the bytes still to be downloaded, by source."""
        return self.supply.missing


def prepare(path: Path, options: Options, watcher: Watcher, on_read: Callable[[], None], *, is_plan: bool) -> Prepared:
    """Read, plan, look for sources, describe, and look up what is there. `on_read` is called before large files are read.

    A plan looks at headers from afar where it must, and downloads nothing. Raises what is wrong with the recipe, and, unless
    `options.keep_going`, every source that is not to be had.
    """
    plan = plan_file(path, only=options.only, locked=options.reach.locked)
    store = Store(options.store_root)
    lock = Lock(path=lock_path(path), exists=False, entries={}) if options.rehearse else read_lock(lock_path(path))
    if options.rehearse:
        plan = _rehearsed(plan, options, watcher)
    reach = replace(options.reach, folders=(), locked=False) if options.rehearse else options.reach
    supply = Supply(plan, store, lock, reach, watcher, on_read)
    wishes = [Wish(step=plan.steps[name], target=options.out_folder / f"{name}.safetensors") for name in plan.wanted]
    prepared = Prepared(plan=plan, store=store, supply=supply, wishes=wishes, options=options)
    licence_files(plan)
    if prepared.is_release and not options.keep_going:
        refuse_release(plan, supply.glance(), is_final=False)
    if options.release:
        _refuse_bad_release(options, wishes)
    supply.look()
    _raise_errors(prepared)
    _look_up_all(prepared)
    _refuse_releases(prepared, is_final=False)
    gather(prepared, is_plan=is_plan)
    _refuse_releases(prepared, is_final=not supply.missing)
    _refuse_to_replace_sources(prepared)
    return prepared


def release_folder(options: Options, wish: Wish) -> Path:
    """Name the folder that an artifact is released in."""
    return options.out_folder / "release" / wish.step.name


def gather(prepared: Prepared, *, is_plan: bool) -> None:
    """Get the sources of everything that must be made: from this machine, or, once their headers and the disk are seen to fit, from elsewhere."""
    supply = prepared.supply
    needed = _needed(prepared)
    supply.seek(needed)
    supply.order(needed, is_plan=is_plan)
    _raise_errors(prepared)
    if supply.errors:
        _look_up_all(prepared)
        supply.cancel(needed - _needed(prepared))
    if supply.missing:
        _check_beforehand(prepared)
        supply.cancel(needed - _needed(prepared))
    if supply.orders and not is_plan:
        supply.fetch()
        _raise_errors(prepared)
    _look_up_all(prepared)


def _needed(prepared: Prepared) -> set[str]:
    """List the sources of what must still be made."""
    plan = prepared.plan
    return {name for wish in prepared.wishes if wish.state is State.WANTED for name in plan.ancestors(wish.step.name) if name in plan.sources}


def _raise_errors(prepared: Prepared) -> None:
    errors = prepared.supply.errors
    if errors and not prepared.options.keep_going:
        raise joined(list(errors.values()))


def _look_up_all(prepared: Prepared) -> None:
    """Describe what has become known, and look up what is asked for and has not been looked up."""
    plan, supply = prepared.plan, prepared.supply
    facts = supply.facts
    prepared.described = describe_all(plan, {name: f.tensors for name, f in facts.items()}, {name: f.settings for name, f in facts.items()})
    for wish in prepared.wishes:
        if wish.state is not State.WANTED:
            continue
        sources = [name for name in plan.ancestors(wish.step.name) if name in plan.sources]
        if errors := [supply.errors[name] for name in sources if name in supply.errors]:
            wish.state, wish.error = State.BLOCKED, joined(errors)
        elif not wish.tensor_key and wish.step.name in prepared.described:
            _look_up(wish, prepared, prepared.options.rehearse)
        elif not wish.tensor_key:
            wish.reasons = [f"source `{name}` must be fetched first" for name in sources if name in supply.missing]


def _check_beforehand(prepared: Prepared) -> None:
    """Refuse what would fail after gigabytes: sources that do not fit, or a disk that cannot hold it all. Knows headers only."""
    plan, options = prepared.plan, prepared.options
    checked = check(plan, prepared.supply.headers)
    errors: list[SdbuildError] = []
    needed = sum(prepared.missing.values())
    for wish in (wish for wish in prepared.wishes if wish.state is State.WANTED):
        name = wish.step.name
        needed += sum(spec.nbytes for spec in checked.tensors.get(name, checked.factors.get(name, {})).values())
        if issues := [issue for ancestor in plan.ancestors(name) for issue in checked.issues.get(ancestor, ())]:
            wish.state, wish.error = State.FAILED, RecipeError(*issues)
            errors.append(wish.error)
    if errors and not options.keep_going:
        raise joined(errors)
    refuse_full_disk(options.store_root, needed)


def _rehearsed(plan: Plan, options: Options, watcher: Watcher) -> Plan:
    if options.rehearse == "full":
        watcher.note("making full-size stand-ins, several gigabytes, where they are not there yet")
    sources = stand_ins(plan.architecture, plan.sources, _adapters(plan), options.rehearse, options.store_root / "sources")
    return replace(plan, sources=sources)


def _adapters(plan: Plan) -> set[str]:
    """List the sources that must be adapters, by what the recipe does with them or says of them."""
    found = {name for name, source in plan.sources.items() if source.adapter}
    stack = [name for step in plan.steps.values() for name in step.adapters]
    while stack:
        name = stack.pop()
        if name in plan.sources:
            found.add(name)
        elif plan.steps[name].method.name == "formula":  # a sum of adapters
            stack += plan.steps[name].inputs
    return found


def _refuse_releases(prepared: Prepared, *, is_final: bool) -> None:
    """End the run, or leave artifacts out, where what they are made of forbids their release."""
    if not prepared.is_release:
        return
    refused = refusals(prepared.plan, prepared.supply.facts, is_final=is_final)
    for wish in prepared.wishes:
        if wish.step.name in refused:
            wish.state, wish.error, wish.stored = State.BLOCKED, refused[wish.step.name], None
    if refused and not prepared.options.keep_going:
        raise joined(list(refused.values()))


def _refuse_bad_release(options: Options, wishes: Sequence[Wish]) -> None:
    """Refuse before anything is read what could not be released or signed afterwards."""
    from sdmerge_build.release import refuse_foreign, refuse_unsigned  # noqa: PLC0415  a build that releases nothing need not wait for it

    if options.sign:
        refuse_unsigned(options.key)
    for wish in wishes:
        refuse_foreign(release_folder(options, wish))


def _refuse_to_replace_sources(prepared: Prepared) -> None:
    """Refuse an artifact or manifest that would take the place of a file it is made from."""
    issues = []
    plan = prepared.plan
    recipes = [(plan.recipe.path, "the recipe"), *((other.path, f"the recipe `{name}`") for name, other in plan.others.items())]
    files = [(path, name) for name, source in prepared.supply.found.items() for path in (source.path, source.original) if path]
    inputs = [(path, f"source `{name}`") for path, name in files] + recipes
    for wish in prepared.wishes:
        replaced = [
            (path, what) for target in (wish.target, manifest_path(wish.target)) if target.exists() for path, what in inputs if target.samefile(path)
        ]
        if wish.target.is_file() and not (wish.stored and wish.target.samefile(wish.stored.path)):
            replaced += [(wish.target, f"source `{name}`") for name in prepared.supply.held_in(wish.target)]
        for path, what in replaced:
            where, text = plan.where("step", wish.step.name), f"artifact `{wish.step.name}` would replace {path}, which is {what}"
            issues.append(Issue(where=where, what=text, hint="choose another folder with --out, or another name"))
    if issues:
        raise RecipeError(*issues)


def _look_up(wish: Wish, prepared: Prepared, rehearsal: str) -> None:
    """Find out whether an artifact, or its tensors, are in the store, and if not, why."""
    plan, store = prepared.plan, prepared.store
    name = wish.step.name
    facts = prepared.supply.facts
    wish.terms = concluded(plan, wish.step, facts)
    wish.metadata = metadata_of(plan, wish.step, prepared.described, facts, wish.terms, rehearsal)
    wish.tensor_key = prepared.described[name].key
    wish.artifact_key = artifact_key(wish.tensor_key, wish.metadata)
    if stored := store.find(wish.tensor_key, wish.artifact_key):
        wish.state, wish.stored = State.REUSED, stored
        return
    changed = list(_changed_facts(wish, prepared))
    if (stored := store.find_tensors(wish.tensor_key)) and can_reemit(read_header(stored.path)):
        wish.state, wish.stored = State.EMITTED, stored
        wish.reasons = [*changed, "its tensors are already in the store"] if changed else list(_changed_metadata(stored, wish.metadata))
    else:
        wish.reasons = changed or [f"there is no earlier {name} to compare with"]
        if not changed and manifest_path(wish.target).exists():
            wish.reasons = ["it is no longer in the store"]


def _changed_facts(wish: Wish, prepared: Prepared) -> Iterator[str]:
    """Compare with what the published manifest of the same name says was built before."""
    earlier = described_in(manifest_path(wish.target))
    if earlier:
        name = wish.step.name
        yield from differences(earlier, prepared.described, name, name if name in earlier else list(earlier)[-1])


def _changed_metadata(stored: Stored, metadata: dict[str, str]) -> list[str]:
    old = read_header(stored.path).metadata
    metadata = carried(old, metadata)
    names = sorted(name for name in {*old, *metadata} if old.get(name) != metadata.get(name))
    names = [name for name in names if name not in _DERIVED] or names  # these repeat what other fields say
    return [f"metadata.{name} = {_brief(old.get(name))} → {_brief(metadata.get(name))}" for name in names]


def _brief(text: str | None) -> str:
    if text is None:
        return "(none)"
    return text if len(text) <= 60 else f"{text[:57]}…"
