"""Owns what a build stands on as it goes: what every step yields, the files that can be read, and the adapters that must be files first.

Has never heard of passes, of torch or of how anything is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from sdmerge_build.adapters import is_adapter
from sdmerge_build.check import Checked, check
from sdmerge_build.coverage import Use, uses_of
from sdmerge_build.errors import IntegrityError, Issue
from sdmerge_build.events import State
from sdmerge_build.files import Snapshot
from sdmerge_build.prepare import Prepared, Wish
from sdmerge_build.programs import Leaf
from sdmerge_build.tensorfile import Header, Spec, lay_out, read_header, read_number

__all__ = ["Stage", "refuse_changed"]


class Stage:
    """What is known of the files of one build; it grows as adapters are made."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._checked: Checked | None = None
        self._headers: dict[Path, Header] = {}
        self._made: dict[str, Leaf] = {}
        self.leaves: dict[str, Leaf] = {}
        self.keys: dict[str, str] = {}

    def wishes(self, *states: State) -> list[Wish]:
        """List what is asked for, and in one of these states."""
        return [wish for wish in self._prepared.wishes if wish.state in states]

    def check(self) -> Checked:
        """Infer every tensor, once, when it is first needed."""
        if self._checked is None:
            made = {name: leaf.header for name, leaf in self._own_leaves().items() if is_adapter(leaf.header.tensors)}
            self._checked = check(self._prepared.plan, self._prepared.supply.headers, made)
        return self._checked

    @property
    def notes(self) -> tuple[str, ...]:
        """List what the check noted, if there was one."""
        return tuple(self._checked.notes) if self._checked else ()

    def uses(self) -> tuple[Use, ...]:
        """List what adapters do, if anything was inferred; alphas are read from the files that are here."""
        return tuple(uses_of(self._prepared.plan, self._checked, self._alpha)) if self._checked else ()

    def _alpha(self, adapter: str, tensor: str) -> float | None:
        leaf = self.leaves.get(adapter)
        return read_number(leaf.path, leaf.header, tensor) if leaf and leaf.path.is_file() else None

    def learn(self) -> None:
        """Learn which files can be read, and every key; what was inferred before may be known better now."""
        supply, plan = self._prepared.supply, self._prepared.plan
        leaves = {name: Leaf(name=name, path=Path(name), header=header) for name, header in supply.headers.items()}  # a plan sees them from afar
        leaves |= {name: Leaf(name=name, path=found.path, header=found.header, snapshot=found.snapshot) for name, found in supply.found.items()}
        self.leaves = leaves | self._own_leaves()
        self.keys = {name: name for name in (*plan.sources, *plan.steps)}  # of what stands on a source nobody has seen
        self.keys |= {name: description.key for name, description in self._prepared.described.items()}

    def renew(self) -> None:
        """Infer anew: there are other files than before."""
        self._checked = None

    def keep(self, name: str, path: Path) -> None:
        """Take a file for what a step made, for this run; its twins of the same key are the same."""
        header = self._header(path)
        for twin in self._prepared.plan.steps:
            if self.keys[twin] == self.keys[name]:
                self._made[twin] = Leaf(name=twin, path=path, header=header)

    def drafted(self) -> list[str]:
        """List the adapters that must be made, parents first: those asked for, and those that what is asked for stands on."""
        steps = self._prepared.plan.steps
        needed: set[str] = set()
        stack = [wish.step.name for wish in self.wishes(State.WANTED)]
        while stack:
            name = stack.pop()
            if name in steps and name not in needed and name not in self.leaves:
                needed.add(name)
                stack += steps[name].inputs
        return [name for name in steps if name in needed and name in self.check().drafts]

    def below(self, name: str) -> Collection[str]:
        """List the steps that one stands on, itself among them, as far as there are no files of them."""
        found: set[str] = set()
        stack = [name]
        while stack:
            here = stack.pop()
            if here not in found and here not in self.leaves:
                found.add(here)
                stack += self._prepared.plan.steps[here].inputs
        return found

    def foreseen(self, drafted: Collection[str]) -> Mapping[str, Leaf] | None:
        """Return all leaves, with adapters to be made as they will be; None where one's ranks are not known yet."""
        factors = self.check().factors
        if not all(name in factors for name in drafted):
            return None
        return self.leaves | {name: Leaf(name=name, path=Path(name), header=_header_of(factors[name])) for name in drafted}

    def _own_leaves(self) -> dict[str, Leaf]:
        """List what steps have made already, in the store or for this run."""
        stored = {wish.step.name: wish.stored.path for wish in self.wishes(State.REUSED, State.EMITTED, State.BUILT) if wish.stored}
        return self._made | {name: Leaf(name=name, path=path, header=self._header(path)) for name, path in stored.items()}

    def _header(self, path: Path) -> Header:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]


def _header_of(tensors: Mapping[str, Spec]) -> Header:
    """Foresee the header of a file with these tensors, as far as a plan looks at it."""
    layout = lay_out(tensors.values(), {})
    return Header(tensors={spec.name: spec for spec in layout.specs}, metadata={}, data_start=len(layout.header), file_size=layout.size)


def refuse_changed(leaves: Iterable[Leaf]) -> None:
    """Refuse a source that is not as it was when its digests were learned: its key would lie."""
    for leaf in leaves:
        if leaf.snapshot and Snapshot.of(leaf.path) != leaf.snapshot:
            what = "the file changed while it was being merged"
            raise IntegrityError(Issue(where=str(leaf.path), what=what, hint="run again once it is at rest"))
