"""Owns the build: the only scheduler and the only clock, from what is wanted to artifacts published with their manifests.

Has never heard of terminals. Imports `merge`, and with it torch, only when something must really be merged.
"""

from __future__ import annotations

import importlib
import threading
import time
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdmerge_build import __version__
from sdmerge_build.adapters.writing import carried
from sdmerge_build.digest import blake3_hex
from sdmerge_build.emit import reemit
from sdmerge_build.errors import IntegrityError, Issue, RecipeError, SdbuildError, joined
from sdmerge_build.events import State, Watcher
from sdmerge_build.files import as_space_error
from sdmerge_build.keys import survey_key
from sdmerge_build.lineage import shares_of
from sdmerge_build.manifest import is_current, manifest_of, manifest_path, state_of, write_manifest
from sdmerge_build.methods import Findings
from sdmerge_build.passes import Output, Pass, plan_passes
from sdmerge_build.prepare import Options, Prepared, Wish, gather, prepare, release_folder
from sdmerge_build.programs import Apply
from sdmerge_build.report import Report
from sdmerge_build.stage import Stage, refuse_changed
from sdmerge_build.supply import refuse_full_disk
from sdmerge_build.tensorfile import Layout, lay_out, read_header
from sdmerge_build.writer import Written

__all__ = ["build", "plan_build"]


_MOST_NAMED = 4  # artifacts whose names fit beside a progress bar


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
    return run.report(0, time.monotonic() - began, is_plan=True)


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
        self._stage = Stage(prepared)
        self._wishes = self._stage.wishes
        self._layouts: dict[str, Layout] = {}
        self._passes: list[Pass] = []
        self._notes: list[str] = []
        self._moved = [0, 0]  # bytes read and written for adapters
        self._began = time.time()

    def plan(self) -> None:
        """Check what is to be made, lay it out, and plan the passes. Raises every mismatch at once, unless told to keep going."""
        checked, plan = self._stage.check(), self._prepared.plan
        for wish in self._wishes(State.WANTED):
            if issues := [issue for name in plan.ancestors(wish.step.name) for issue in checked.issues.get(name, ())]:
                wish.state, wish.error = State.FAILED, RecipeError(*issues)
        if (errors := [wish.error for wish in self._prepared.wishes if wish.error]) and not self._options.keep_going:
            raise joined(errors)
        for wish in self._wishes(State.WANTED, State.EMITTED):
            name, header = wish.step.name, read_header(wish.stored.path) if wish.stored else None
            specs = header.tensors if header else checked.tensors.get(name, checked.factors.get(name))
            if specs is not None:
                self._layouts[name] = lay_out(specs.values(), carried(header.metadata, wish.metadata) if header else wish.metadata)
        self._stage.learn()
        wanted = [wish for wish in self._wishes(State.WANTED) if wish.step.name not in checked.drafts]
        leaves = self._stage.foreseen(self._stage.drafted())
        if leaves is not None and all(wish.step.name in self._layouts for wish in wanted):
            outputs = [Output(name=wish.step.name, layout=self._layouts[wish.step.name], nonfinite=wish.step.nonfinite) for wish in wanted]
            self._passes = list(plan_passes(plan, checked, self._stage.keys, leaves, outputs))

    def _space(self) -> int:
        """Count the bytes that will be written, as far as they are known; adapters whose ranks are not, are small."""
        sizes = {name: layout.size for name, layout in self._layouts.items()}
        return sum(sizes.get(wish.step.name, 0) for wish in self._wishes(State.WANTED, State.EMITTED))

    def check_space(self) -> None:
        """Refuse to begin what the disk cannot hold."""
        needed = self._space()
        store, out = self._options.store_root, self._options.out_folder
        folders = {_device(folder): folder for folder in (out, store)}
        for folder in folders.values():
            refuse_full_disk(folder, needed)

    def make(self, torch: _TorchImport) -> None:
        """Re-emit and merge what is wanted, and commit it to the store."""
        with self._prepared.store.partial() as folder, as_space_error(folder, self._space()):
            done = [self._reemit(wish, folder) for wish in self._wishes(State.EMITTED)]
            if not all(done):  # what could not be re-emitted is merged, and needs its sources
                gather(self._prepared, is_plan=False)
                self._stage.renew()
                self.plan()
            findings: dict[str, Findings] = {}
            if self._stage.drafted():
                while drafted := self._stage.drafted():
                    self._make_adapter(drafted[0], findings, folder, torch)
                self._stage.renew()
                self.plan()
            evaluated = {value.step for walk in self._passes for program in walk.everything for value in program.values if isinstance(value, Apply)}
            self._survey(evaluated, findings, folder, torch)
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

    def _make_adapter(self, name: str, findings: dict[str, Findings], folder: Path, torch: _TorchImport) -> None:
        """Make a file of an adapter, before the passes that may read it; commit it where it is asked for."""
        merge = torch.module()
        from sdmerge_build.making import Making, make  # noqa: PLC0415  it imports torch

        plan, stage, target = self._prepared.plan, self._stage, folder / f"{blake3_hex(name.encode())}.safetensors"
        self._survey(stage.below(name), findings, folder, torch)
        making = Making(
            plan=plan,
            checked=stage.check(),
            keys=stage.keys,
            leaves=stage.leaves,
            step=plan.steps[name],
            findings=findings,
            jobs=self._options.reach.jobs,
            note=self._notes.append,
            advanced=self._watcher.advanced,
        )
        wish = next((wish for wish in self._wishes(State.WANTED) if wish.step.name == name), None)
        self._watcher.started(name, making.bytes_read)
        try:
            refuse_changed(stage.leaves.values())
            written = make(making, target, wish.metadata if wish else {})
            refuse_changed(stage.leaves.values())
        except SdbuildError as error:
            if not self._options.keep_going:
                raise
            for blocked in (wish for wish in self._wishes(State.WANTED) if name in plan.ancestors(wish.step.name)):
                blocked.state, blocked.error = State.FAILED, error
            return
        finally:
            self._watcher.finished()
        self._moved = [self._moved[0] + making.bytes_read, self._moved[1] + written.size]
        if wish:
            self._commit(wish, target, written, State.BUILT, {"sdbuild": __version__, "torch": merge.torch.__version__})
        if name not in stage.check().factors:
            stage.renew()
        stage.keep(name, wish.stored.path if wish and wish.stored else target)
        stage.learn()

    def _survey(self, evaluated: Collection[str], findings: dict[str, Findings], folder: Path, torch: _TorchImport) -> None:
        """Find out what steps must know of whole models, parents first, unless it is known already, here or in the store."""
        plan, store, keys = self._prepared.plan, self._prepared.store, self._stage.keys
        wanted = {keys[name] for name in evaluated}
        for step in plan.steps.values():
            if step.method.survey is None or keys[step.name] not in wanted or step.name in findings:
                continue
            key = survey_key(step, keys, plan.architecture.fingerprint)
            known: Findings | None = store.findings(key)
            if known is None:
                torch.module()
                from sdmerge_build.surveys import conduct  # noqa: PLC0415  it imports torch

                self._watcher.note(f"{step.name}: surveying its models")
                known = conduct(plan, self._stage.check(), keys, self._stage.leaves, step, findings, self._options.reach.jobs)
                store.keep_findings(key, known, folder)
            findings[step.name] = known

    def _merge(self, walk: Pass, findings: Mapping[str, Findings], folder: Path, torch: _TorchImport) -> None:
        wishes = {wish.step.name: wish for wish in self._wishes(State.WANTED)}
        targets = [folder / f"{output.name}.safetensors" for output in walk.outputs]
        merge = torch.module()
        refuse_changed(walk.leaves)
        names = [output.name for output in walk.outputs]
        self._watcher.started(", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} artifacts", walk.bytes_written)
        results = merge.run(walk, targets, findings, self._options.reach.jobs, self._watcher.advanced, keep_going=self._options.keep_going)
        self._watcher.finished()
        refuse_changed(walk.leaves)
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
        checked = self._stage.check()
        shares = shares_of(self._prepared.plan, wish.step, checked) if wish.step.name in checked.tensors else None
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

    def report(self, published: int, seconds: float, *, is_plan: bool = False) -> Report:
        """Put together what happened, or would; what adapters do is for plans."""
        emitted = [wish.stored.size for wish in self._wishes(State.EMITTED) if wish.stored]
        return Report(
            recipe=self._prepared.plan.recipe.path,
            wishes=self._prepared.wishes,
            bytes_read=sum(walk.bytes_read for walk in self._passes) + sum(emitted) + self._moved[0],
            bytes_written=sum(walk.bytes_written for walk in self._passes) + sum(emitted) + self._moved[1],
            published=published,
            missing=dict(self._prepared.missing),
            seconds=seconds,
            warnings=(*self._stage.notes, *self._notes),
            plan=self._prepared.plan,
            uses=self._stage.uses() if is_plan else (),
        )


def _device(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev
