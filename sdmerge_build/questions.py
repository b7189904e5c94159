"""Owns questions to whole tensors: their chunks, who measures which, and who waits for the answers.

Has never heard of methods or of how a chunk is evaluated.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from sdmerge_build.methods.measures import Measure, Partials

__all__ = ["POLL_SECONDS", "Question", "Stopped"]

POLL_SECONDS = 0.1
"""How often who waits looks whether somebody else failed."""


class Stopped(Exception):  # noqa: N818  nothing is wrong with the one who stops
    """Somebody else failed, and nobody needs what was being computed."""


class Question:
    """One question to one whole tensor: its chunks, what was measured of them, and who waits."""

    def __init__(self, chunks: Sequence[tuple[int, int]]) -> None:
        self._chunks = chunks
        self.condition = threading.Condition()
        self.waiting = list(reversed(range(len(chunks))))
        self._left = len(chunks)
        self._states: list[Any] = []
        self._final: list[bool] = []
        self._partials: list[Partials] = []
        self.answers: tuple[Any, ...] | None = None

    def take(self, stopped: threading.Event) -> tuple[int, int, int] | None:
        """Take a chunk to measure: number, start and length; wait while others measure the last ones. None when the answers are there."""
        with self.condition:
            while self.answers is None and not self.waiting:
                self.condition.wait(POLL_SECONDS)
                if stopped.is_set():
                    raise Stopped
            if self.answers is not None:
                return None
            number = self.waiting.pop()
            return number, *self._chunks[number]

    def measure(self, number: int, measures: Sequence[Measure]) -> None:
        """Measure a chunk; whoever measures the last one joins them all."""
        with self.condition:
            if not self._partials:
                self._states, self._final = [None] * len(measures), [False] * len(measures)
                self._partials = [Partials(len(self._chunks)) for _ in measures]
            states, final = self._states, self._final
        found = [None if is_final else m.partial(state) for m, state, is_final in zip(measures, states, final, strict=True)]
        with self.condition:
            for measure, partial, known, is_final in zip(measures, found, self._partials, final, strict=True):
                if not is_final:
                    known.add(measure, number, partial)
            self._left -= 1
            if not self._left:
                self._join(measures)
            self.condition.notify_all()

    def _join(self, measures: Sequence[Measure]) -> None:
        for n, measure in enumerate(measures):
            if not self._final[n]:
                self._final[n], self._states[n] = self._partials[n].joined(measure, self._states[n])
        if all(self._final):
            self.answers = tuple(self._states)
            return
        self._states, self._final = list(self._states), list(self._final)
        self._partials = [Partials(len(self._chunks)) for _ in measures]
        self._left = len(self._chunks)
        self.waiting = list(reversed(range(len(self._chunks))))
