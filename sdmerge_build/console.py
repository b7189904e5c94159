"""Owns what a person sees: progress on a terminal, plain lines elsewhere, results as text or JSON, errors.

Has never heard of how anything is built; it is told, and prints. Results go to stdout, progress, notes and errors to stderr.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sdmerge_build.bars import Style, bars, ratios_as_json
from sdmerge_build.coverage import Use
from sdmerge_build.errors import Issue
from sdmerge_build.events import State, Watcher
from sdmerge_build.files import readable_size
from sdmerge_build.manifest import manifest_path
from sdmerge_build.prepare import Wish
from sdmerge_build.report import Report

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Live", "Plain", "issues_as_json", "print_issues", "print_json", "report_as_json", "report_as_text", "watcher_for"]

_MOST_NAMED = 4  # artifacts of which the texts say the same
_PLAIN_WIDTH = 80  # of bars in logs and pipes
_PLANNED = {State.WANTED: "build", State.EMITTED: "re-emit", State.REUSED: "reuse"}
_DONE = {State.REUSED: "up to date", State.EMITTED: "re-emitted", State.BUILT: "built", State.FAILED: "failed", State.BLOCKED: "blocked"}


def watcher_for(*, is_quiet: bool) -> Watcher:
    """Choose a watcher: live where there is a terminal to redraw, plain lines where there is none."""
    return Live() if sys.stderr.isatty() and not is_quiet else Plain(is_quiet=is_quiet)


class Plain:
    """One line when something begins; for logs and pipes."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet

    def started(self, what: str, nbytes: int) -> None:
        """Say what begins."""
        self.note(f"{what} ({readable_size(nbytes)})")

    def advanced(self, nbytes: int) -> None:
        """Say nothing."""

    def finished(self) -> None:
        """Say nothing."""

    def note(self, message: str) -> None:
        """Print a line, unless told to be quiet."""
        if not self._is_quiet:
            print(message, file=sys.stderr, flush=True)


class Live:
    """A bar that is redrawn: what is made, how far it is, GB/s, time left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._lock = threading.Lock()

    def started(self, what: str, nbytes: int) -> None:
        """Draw a bar."""
        from rich import progress  # noqa: PLC0415  a build with nothing to do draws nothing
        from rich.console import Console  # noqa: PLC0415

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        self.finished()
        self._progress = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(what, total=nbytes)
        self._progress.start()

    def advanced(self, nbytes: int) -> None:
        """Move the bar."""
        with self._lock:
            if self._progress and self._task is not None:
                self._progress.advance(self._task, nbytes)

    def finished(self) -> None:
        """Take the bar away."""
        with self._lock:
            if self._progress:
                self._progress.stop()
            self._progress = None

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        if self._progress:
            self._progress.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)


def print_issues(issues: Sequence[Issue]) -> None:
    """Print errors in the one grammar: `error: where: what`, a blank line, `hint: …`."""
    if issues:
        print("\n\n".join(f"error: {issue}" for issue in issues), file=sys.stderr)


def report_as_text(report: Report, *, is_plan: bool, explains: bool) -> Iterator[str]:
    """Yield the lines of a report, artifacts in recipe order."""
    yield from (f"warning: {text}" for text in report.warnings)
    width = max((len(wish.step.name) for wish in report.wishes), default=0)
    words = _DONE if not is_plan else _DONE | _PLANNED
    for wish in report.wishes:
        line = f"{wish.step.name:{width}}  {words[wish.state]:10}"
        if wish.stored and not (is_plan and wish.state is State.EMITTED):
            line += f"  {wish.target}  {readable_size(wish.stored.size)}  model hash {wish.stored.sha256[:10]}"
        yield line.rstrip()
        if explains or is_plan:
            yield from (f"    {reason}" for reason in wish.reasons or ["unchanged since it was built"])
    if report.uses:
        yield from _adapters(report.uses)
    if explains:
        yield from bars(report.plan, _style())
    yield from (f"released  {wish.step.name}: {wish.released}" for wish in report.wishes if wish.released)
    yield from _terms(report)
    yield _summary(report, is_plan=is_plan)


def _adapters(uses: Sequence[Use]) -> Iterator[str]:
    """Yield a table of what adapters change, step by step."""
    rows = [("adapter", "applied in", "type", "tensors changed", "rank", "alpha", "strength")]
    for use in uses:
        tensors = ", ".join(f"{count} of {component}" for component, count in use.tensors.items())
        rows.append((use.adapter, use.step, ", ".join(use.kinds), tensors, _range(use.ranks), _range(use.alphas), _range(use.strengths)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "    " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _range(span: tuple[float, float] | None) -> str:
    """Write the least and the most of something; a dash where there is none."""
    if span is None:
        return "–"
    low, high = (f"{number:g}" for number in span)
    return low if low == high else f"{low} to {high}"


def _style() -> Style:
    """Choose what bars are drawn with: blocks where a terminal can show them, plain signs elsewhere."""
    if not sys.stdout.isatty():
        return Style(width=_PLAIN_WIDTH, bar="#", zero="|")
    width = shutil.get_terminal_size().columns
    try:
        "█│".encode(sys.stdout.encoding)
    except UnicodeError:
        return Style(width=width, bar="#", zero="|")
    return Style(width=width, bar="█", zero="│")


def _terms(report: Report) -> Iterator[str]:
    """Yield what the texts say of the artifacts, once for all of which they say the same."""
    said: dict[str, list[str]] = {}
    for wish in report.wishes:
        if wish.terms:
            said.setdefault(str(wish.terms.table()["summary"]), []).append(wish.step.name)
    for summary, names in said.items():
        whose = "" if len(said) == 1 else f" ({', '.join(names[:_MOST_NAMED])}{' …' if len(names) > _MOST_NAMED else ''})"
        yield f"terms{whose}: {summary}; see `sdbuild license {report.recipe}`"


def _summary(report: Report, *, is_plan: bool) -> str:
    counts = {state: sum(wish.state is state for wish in report.wishes) for state in State}
    if is_plan:
        todo = counts[State.WANTED] + counts[State.EMITTED]
        if not todo:
            return _nothing_to_do(report)
        parts = [f"{readable_size(sum(report.missing.values()))} to fetch"] if report.missing else []
        if report.bytes_written:  # not known before a header is, which offline it may not be
            parts += [f"{readable_size(report.bytes_read)} to read", f"{readable_size(report.bytes_written)} to write"]
        return f"{_artifacts(todo)} to make: {', '.join(parts)}"
    if counts[State.REUSED] == len(report.wishes) and not report.published:
        return _nothing_to_do(report)
    parts = [f"{count} {_DONE[state]}" for state, count in counts.items() if count]
    return f"{', '.join(parts)} in {report.seconds:.1f} s"


def _nothing_to_do(report: Report) -> str:
    return f"nothing to do: {_artifacts(len(report.wishes))} up to date"


def _artifacts(count: int) -> str:
    return f"{count} artifact{'s' if count != 1 else ''}"


def report_as_json(report: Report, *, is_plan: bool, explains: bool) -> dict[str, Any]:
    """Turn a report into what a program can read."""
    words = {state: state.value for state in State} | (_PLANNED if is_plan else {})
    return {
        "recipe": str(report.recipe),
        "artifacts": [_wish_as_json(wish, words[wish.state], is_plan=is_plan) for wish in report.wishes],
        "bytes_to_fetch": dict(report.missing),
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "seconds": round(report.seconds, 3),
        "warnings": list(report.warnings),
        "adapters": [use.table() for use in report.uses],
    } | ({"ratios": ratios_as_json(report.plan)} if explains else {})


def _wish_as_json(wish: Wish, state: str, *, is_plan: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": wish.step.name, "state": state, "key": wish.artifact_key, "reasons": wish.reasons}
    if wish.stored and not (is_plan and wish.state is State.EMITTED):
        facts |= {
            "path": str(wish.target),
            "manifest": str(manifest_path(wish.target)),
            "size": wish.stored.size,
            "sha256": wish.stored.sha256,
            "model_hash": wish.stored.sha256[:10],
            "tensor_digest": wish.stored.tensor_digest,
        }
    if wish.terms:
        facts["terms"] = wish.terms.table()
    if wish.released:
        facts["release"] = str(wish.released)
    return facts | ({"errors": issues_as_json(wish.error.issues)} if wish.error else {})


def issues_as_json(issues: Sequence[Issue]) -> list[dict[str, str]]:
    """Turn errors into what a program can read."""
    return [{"where": issue.where, "what": issue.what, "hint": issue.hint} for issue in issues]


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
