"""Owns the build: the only scheduler and the only clock, from what is wanted to artifacts published with their manifests.

Has never heard of terminals. Imports `merge`, and with it torch, only when something must really be merged.
"""

from __future__ import annotations

import importlib
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdmerge_build import __version__
from sdmerge_build.check import Checked, check
from sdmerge_build.emit import reemit
from sdmerge_build.errors import IntegrityError, Issue, RecipeError, SdbuildError, joined
from sdmerge_build.events import State, Watcher
from sdmerge_build.files import Snapshot, as_space_error
from sdmerge_build.keys import survey_key
from sdmerge_build.lineage import shares_of
from sdmerge_build.manifest import is_current, manifest_of, manifest_path, state_of, write_manifest
from sdmerge_build.methods import Findings
from sdmerge_build.passes import Output, Pass, plan_passes
from sdmerge_build.plan import Plan
from sdmerge_build.prepare import Options, Prepared, Wish, gather, prepare, release_folder
from sdmerge_build.programs import Apply, Leaf
from sdmerge_build.supply import refuse_full_disk
from sdmerge_build.tensorfile import Layout, lay_out, read_header
from sdmerge_build.writer import Written

__all__ = ["Report", "build", "plan_build"]


_MOST_NAMED = 4  # artifacts whose names fit beside a progress bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of one run: what was asked for, in recipe order, and what became of it."""

    recipe: Path
    wishes: Sequence[Wish]
    bytes_read: int
    bytes_written: int
    published: int
    missing: Mapping[str, int]  # bytes that a plan would have to download, by source
    seconds: float
    warnings: Sequence[str]
    plan: Plan

    @property
    def exit_code(self) -> int:
        """Return 0, or the code of the first artifact that failed."""
        return next((wish.error.exit_code for wish in self.wishes if wish.error), 0)


def build(path: Path, options: Options, watcher: Watcher) -> Report:
    """Build what a recipe asks for. Nothing is visible under a final name before it is complete and on disk.

    Raises `SdbuildError`; with `options.keep_going` artifacts that cannot be built are reported instead.
    """
    began = time.monotonic()
    torch = _TorchImport()
    prepared = prepare(path, options, watcher, on_read=torch.start, is_plan=False)
    prepared.store.sweep()
    run = _Run(prepared, options, watcher)
    if any(wish.state in {State.WANTED, State.EMITTED} for wish in prepared.wishes):
        run.plan()
        run.check_space()
        run.make(torch)
    published = run.publish()
    return run.report(published, time.monotonic() - began)


def plan_build(path: Path, options: Options, watcher: Watcher) -> Report:
    """Say what `build` would do. Sources nothing is known of are read, to know their keys; nothing is built."""
    began = time.monotonic()
    prepared = prepare(path, options, watcher, on_read=lambda: None, is_plan=True)
    run = _Run(prepared, options, watcher)
    if any(wish.state in {State.WANTED, State.EMITTED} for wish in prepared.wishes):
        run.plan()
    return run.report(0, time.monotonic() - began)


class _TorchImport:
    """Imports the arithmetic in the background, while files are being read."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._module: Any = None
        self._failure: Exception | None = None

    def start(self) -> None:
        """Begin, unless begun."""
        if self._thread is None:
            warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch looks for it; nothing here needs it
            self._thread = threading.Thread(target=self._import, daemon=True)
            self._thread.start()

    def module(self) -> Any:
        """Wait for the import, and return `merge`."""
        self.start()
        assert self._thread, "BUG: the import was started"
        self._thread.join()
        if self._module is None:
            what = f"torch cannot be loaded: {self._failure}"
            raise SdbuildError(Issue(what=what, hint="is it installed for this Python, and is there memory for it?")) from self._failure
        return self._module

    def _import(self) -> None:
        try:
            self._module = importlib.import_module("sdmerge_build.merge")
        except Exception as error:  # noqa: BLE001  whatever a library may raise while it loads
            self._failure = error


class _Run:
    """One build of one recipe."""

    def __init__(self, prepared: Prepared, options: Options, watcher: Watcher) -> None:
        self._prepared = prepared
        self._options = options
        self._watcher = watcher
        self._checked: Checked | None = None
        self._layouts: dict[str, Layout] = {}
        self._passes: list[Pass] = []
        self._leaves: dict[str, Leaf] = {}
        self._keys: dict[str, str] = {}
        self._began = time.time()

    def _wishes(self, *states: State) -> list[Wish]:
        return [wish for wish in self._prepared.wishes if wish.state in states]

    def check(self) -> Checked:
        """Infer every tensor, once, when it is first needed."""
        if self._checked is None:
            self._checked = check(self._prepared.plan, self._prepared.supply.headers)
        return self._checked

    def plan(self) -> None:
        """Check what is to be made, lay it out, and plan the passes. Raises every mismatch at once, unless told to keep going."""
        checked, plan = self.check(), self._prepared.plan
        for wish in self._wishes(State.WANTED):
            if issues := [issue for name in plan.ancestors(wish.step.name) for issue in checked.issues.get(name, ())]:
                wish.state, wish.error = State.FAILED, RecipeError(*issues)
        if (errors := [wish.error for wish in self._prepared.wishes if wish.error]) and not self._options.keep_going:
            raise joined(errors)
        for wish in self._wishes(State.WANTED, State.EMITTED):
            specs = read_header(wish.stored.path).tensors if wish.stored else checked.tensors.get(wish.step.name)
            if specs is not None:
                self._layouts[wish.step.name] = lay_out(specs.values(), wish.metadata)
        if all(wish.step.name in self._layouts for wish in self._wishes(State.WANTED)):
            self._plan_passes()

    def _plan_passes(self) -> None:
        prepared, supply = self._prepared, self._prepared.supply
        leaves = {name: Leaf(name=name, path=Path(name), header=header) for name, header in supply.headers.items()}  # a plan sees them from afar
        leaves |= {name: Leaf(name=name, path=found.path, header=found.header, snapshot=found.snapshot) for name, found in supply.found.items()}
        for wish in self._wishes(State.REUSED, State.EMITTED):
            if wish.stored:
                leaves[wish.step.name] = Leaf(name=wish.step.name, path=wish.stored.path, header=read_header(wish.stored.path))
        keys = {name: name for name in (*prepared.plan.sources, *prepared.plan.steps)}  # of what stands on a source nobody has seen
        keys |= {name: description.key for name, description in prepared.described.items()}
        self._leaves, self._keys = leaves, keys
        outputs = [
            Output(name=wish.step.name, layout=self._layouts[wish.step.name], nonfinite=wish.step.nonfinite) for wish in self._wishes(State.WANTED)
        ]
        self._passes = list(plan_passes(prepared.plan, self.check(), keys, leaves, outputs))

    def check_space(self) -> None:
        """Refuse to begin what the disk cannot hold."""
        needed = sum(self._layouts[wish.step.name].size for wish in self._wishes(State.WANTED, State.EMITTED))
        store, out = self._options.store_root, self._options.out_folder
        folders = {_device(folder): folder for folder in (out, store)}
        for folder in folders.values():
            refuse_full_disk(folder, needed)

    def make(self, torch: _TorchImport) -> None:
        """Re-emit and merge what is wanted, and commit it to the store."""
        needed = sum(self._layouts[wish.step.name].size for wish in self._wishes(State.WANTED, State.EMITTED))
        with self._prepared.store.partial() as folder, as_space_error(folder, needed):
            done = [self._reemit(wish, folder) for wish in self._wishes(State.EMITTED)]
            if not all(done):  # what could not be re-emitted is merged, and needs its sources
                gather(self._prepared, is_plan=False)
                self._checked = None
                self.plan()
            findings = self._survey(folder, torch)
            for walk in self._passes:
                self._merge(walk, findings, folder, torch)

    def _reemit(self, wish: Wish, folder: Path) -> bool:
        """Write a stored artifact's data behind a new header; when the data proves damaged, ask for it to be merged again."""
        stored, name = wish.stored, wish.step.name
        assert stored, "BUG: a re-emission has tensors to copy"
        target = folder / f"{name}.safetensors"
        self._watcher.started(name, stored.size)
        header = read_header(stored.path)
        try:
            written = reemit(stored.path, header, self._layouts[name], target, stored.tensor_digest, self._watcher.advanced)
        except IntegrityError as error:
            self._watcher.note(f"{error.issues[0].where}: {error.issues[0].what}; {name} is merged again")
            self._prepared.store.discard(stored, folder)
            target.unlink(missing_ok=True)
            wish.state, wish.stored = State.WANTED, None
            return False
        finally:
            self._watcher.finished()
        self._commit(wish, target, written, State.EMITTED, stored.trace["versions"])
        return True

    def _survey(self, folder: Path, torch: _TorchImport) -> dict[str, Findings]:
        """Find out what steps must know of whole models, parents first, unless the store knows it."""
        plan, store = self._prepared.plan, self._prepared.store
        evaluated = {
            self._keys[value.step] for walk in self._passes for program in walk.programs for value in program.values if isinstance(value, Apply)
        }
        findings: dict[str, Findings] = {}
        for step in plan.steps.values():
            if step.method.survey is None or self._keys[step.name] not in evaluated:
                continue
            key = survey_key(step, self._keys, plan.architecture.fingerprint)
            known: Findings | None = store.findings(key)
            if known is None:
                torch.module()
                from sdmerge_build.surveys import conduct  # noqa: PLC0415  it imports torch

                self._watcher.note(f"{step.name}: surveying its models")
                known = conduct(plan, self.check(), self._keys, self._leaves, step, findings, self._options.reach.jobs)
                store.keep_findings(key, known, folder)
            findings[step.name] = known
        return findings

    def _merge(self, walk: Pass, findings: Mapping[str, Findings], folder: Path, torch: _TorchImport) -> None:
        wishes = {wish.step.name: wish for wish in self._wishes(State.WANTED)}
        targets = [folder / f"{output.name}.safetensors" for output in walk.outputs]
        merge = torch.module()
        _check_unchanged(walk)
        names = [output.name for output in walk.outputs]
        self._watcher.started(", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} artifacts", walk.bytes_written)
        results = merge.run(walk, targets, findings, self._options.reach.jobs, self._watcher.advanced, keep_going=self._options.keep_going)
        self._watcher.finished()
        _check_unchanged(walk)
        versions = {"sdbuild": __version__, "torch": merge.torch.__version__}
        for output, target, result in zip(walk.outputs, targets, results, strict=True):
            wish = wishes[output.name]
            if isinstance(result, SdbuildError):
                wish.state, wish.error = State.FAILED, result
            else:
                self._commit(wish, target, result, State.BUILT, versions)

    def _commit(self, wish: Wish, target: Path, written: Written, state: State, versions: dict[str, str]) -> None:
        facts = {"name": wish.step.name, "versions": versions, "began": self._began, "ended": time.time()}
        if shares := self._shares(wish):
            facts["shares"] = shares
        wish.stored = self._prepared.store.commit(target, written, wish.tensor_key, wish.artifact_key, facts)
        wish.state = state

    def _shares(self, wish: Wish) -> Any:
        """Return the sources' shares in the order of the ancestry: those of the tensors that are copied, or those of the merge."""
        if wish.stored:
            return wish.stored.trace.get("shares")
        shares = shares_of(self._prepared.plan, wish.step, self.check())
        return [[share.mean, share.least, share.most] for share in shares.values()] if shares else None

    def publish(self) -> int:
        """Make every finished artifact appear with its manifest; return how many were not there yet."""
        published = 0
        store, plan = self._prepared.store, self._prepared.plan
        for wish in self._wishes(State.REUSED, State.EMITTED, State.BUILT):
            assert wish.stored, "BUG: a finished artifact is in the store"
            published += bool(store.publish(wish.stored, wish.target))
            path = manifest_path(wish.target)
            facts, described, terms = self._prepared.supply.facts, self._prepared.described, wish.terms
            assert terms, "BUG: a finished artifact was looked up"
            state = state_of(plan, wish.stored, facts, terms)
            is_old = not is_current(path, state)
            if is_old or self._options.release:
                manifest = manifest_of(plan, wish.step, wish.stored, described, facts, terms, self._options.rehearse)
            if is_old:
                write_manifest(path, manifest, state)
            if self._options.release:
                self._release(wish, manifest)
        return published

    def _release(self, wish: Wish, manifest: dict[str, Any]) -> None:
        """Write the folder that is ready to be uploaded, and sign it where that is asked for."""
        from sdmerge_build.release import sign, write_release  # noqa: PLC0415  a build that releases nothing need not wait for it

        folder = release_folder(self._options, wish)
        signer = partial(sign, key=self._options.key) if self._options.sign else lambda _: None
        write_release(folder, wish.target, manifest_path(wish.target), manifest, self._prepared.plan.recipe.path.parent, signer)
        wish.released = folder

    def report(self, published: int, seconds: float) -> Report:
        """Put together what happened, or would."""
        emitted = [wish.stored.size for wish in self._wishes(State.EMITTED) if wish.stored]
        return Report(
            recipe=self._prepared.plan.recipe.path,
            wishes=self._prepared.wishes,
            bytes_read=sum(walk.bytes_read for walk in self._passes) + sum(emitted),
            bytes_written=sum(walk.bytes_written for walk in self._passes) + sum(emitted),
            published=published,
            missing=dict(self._prepared.missing),
            seconds=seconds,
            warnings=tuple(self._checked.notes) if self._checked else (),
            plan=self._prepared.plan,
        )


def _check_unchanged(walk: Pass) -> None:
    """Refuse a source that is not as it was when its digests were learned: its key would lie."""
    for leaf in walk.leaves:
        if leaf.snapshot and Snapshot.of(leaf.path) != leaf.snapshot:
            what = "the file changed while it was being merged"
            raise IntegrityError(Issue(where=str(leaf.path), what=what, hint="run again once it is at rest"))


def _device(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev
