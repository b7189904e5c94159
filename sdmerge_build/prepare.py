"""Owns everything before the first tensor: from a recipe's path to what is asked for, what the store has, and why the rest must be made.

Has never heard of torch, and writes nothing but the memo of digests; `--dry-run` ends here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdmerge_build.errors import Issue, RecipeError, SdbuildError
from sdmerge_build.events import State, Watcher
from sdmerge_build.keys import Description, artifact_key, describe_all, differences
from sdmerge_build.lineage import metadata_of
from sdmerge_build.manifest import described_in, manifest_path
from sdmerge_build.plan import Plan, Step, plan_file
from sdmerge_build.rehearse import stand_ins
from sdmerge_build.sources import Found, Search, find_sources
from sdmerge_build.store import Store, Stored
from sdmerge_build.tensorfile import read_header

__all__ = ["Options", "Prepared", "Wish", "joined", "prepare"]


_DERIVED = ("sdbuild.lineage", "sd_merge_recipe", "sd_merge_models")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says, beside the recipe."""

    out: Path | None = None
    store: Path = Path("cache")
    models: tuple[Path, ...] = ()
    jobs: int = 1
    only: tuple[str, ...] = ()
    rehearse: str = ""  # `tiny`, `full`, or nothing
    keep_going: bool = False

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
    metadata: dict[str, str] = field(default_factory=dict)
    tensor_key: str = ""
    artifact_key: str = ""
    stored: Stored | None = None  # the artifact itself, or, for a re-emission, one with the same tensors
    reasons: list[str] = field(default_factory=list)
    error: SdbuildError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A recipe, ready to be built."""

    plan: Plan
    store: Store
    found: dict[str, Found]
    described: dict[str, Description]
    wishes: list[Wish]


def prepare(path: Path, options: Options, watcher: Watcher, on_read: Callable[[], None]) -> Prepared:
    """Read, plan, find and describe. `on_read` is called before large files are read, when a build has become likely.

    Raises what is wrong with the recipe, and, unless `options.keep_going`, every source that is not to be had.
    """
    plan = plan_file(path, only=options.only)
    store = Store(options.store_root)
    if options.rehearse:
        plan = _rehearsed(plan, options, watcher)

    def reading(nbytes: int) -> None:
        on_read()
        watcher.started("reading sources", nbytes)

    search = Search(folders=options.models, memo=store.memo, jobs=options.jobs, reading=reading, advanced=watcher.advanced)
    found, errors = find_sources(plan.recipe, plan.sources, search)
    watcher.finished()
    if errors and not options.keep_going:
        raise joined(list(errors.values()))
    described = describe_all(plan, {name: source.digests.tensors for name, source in found.items()})
    wishes = [Wish(step=plan.steps[name], target=options.out_folder / f"{name}.safetensors") for name in plan.wanted]
    prepared = Prepared(plan=plan, store=store, found=found, described=described, wishes=wishes)
    _refuse_to_replace_sources(prepared)
    for wish in wishes:
        if wish.step.name in described:
            _look_up(wish, prepared, options.rehearse)
        else:
            wish.state = State.BLOCKED
            wish.error = joined([errors[n] for n in plan.ancestors(wish.step.name) if n in errors])
    return prepared


def joined(errors: list[SdbuildError]) -> SdbuildError:
    """Make one error of several; the first decides what kind it is."""
    issues = dict.fromkeys(issue for error in errors for issue in error.issues)
    return type(errors[0])(*issues)


def _rehearsed(plan: Plan, options: Options, watcher: Watcher) -> Plan:
    if options.rehearse == "full":
        watcher.note("making full-size stand-ins, several gigabytes, where they are not there yet")
    sources = stand_ins(plan.architecture, plan.sources, options.rehearse, options.store_root / "sources")
    return replace(plan, sources=sources)


def _refuse_to_replace_sources(prepared: Prepared) -> None:
    """Refuse an artifact or manifest that would take the place of a file it is made from."""
    issues = []
    inputs = [(source.path, f"source `{name}`") for name, source in prepared.found.items()] + [(prepared.plan.recipe.path, "the recipe")]
    for wish in prepared.wishes:
        for target in (wish.target, manifest_path(wish.target)):
            for path, what in inputs:
                if target.exists() and target.samefile(path):
                    where = prepared.plan.recipe.where("step", wish.step.name)
                    text = f"artifact `{wish.step.name}` would replace {path}, which is {what}"
                    issues.append(Issue(where=where, what=text, hint="choose another folder with --out, or another name"))
    if issues:
        raise RecipeError(*issues)


def _look_up(wish: Wish, prepared: Prepared, rehearsal: str) -> None:
    """Find out whether an artifact, or its tensors, are in the store, and if not, why."""
    plan, store = prepared.plan, prepared.store
    name = wish.step.name
    wish.metadata = metadata_of(plan, wish.step, prepared.described, prepared.found, rehearsal)
    wish.tensor_key = prepared.described[name].key
    wish.artifact_key = artifact_key(wish.tensor_key, wish.metadata)
    if stored := store.find(wish.tensor_key, wish.artifact_key):
        wish.state, wish.stored = State.REUSED, stored
        return
    changed = list(_changed_facts(wish, prepared))
    if stored := store.find_tensors(wish.tensor_key):
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
    names = sorted(name for name in {*old, *metadata} if old.get(name) != metadata.get(name))
    names = [name for name in names if name not in _DERIVED] or names  # these repeat what other fields say
    return [f"metadata.{name} = {_brief(old.get(name))} → {_brief(metadata.get(name))}" for name in names]


def _brief(text: str | None) -> str:
    if text is None:
        return "(none)"
    return text if len(text) <= 60 else f"{text[:57]}…"
