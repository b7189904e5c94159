"""Owns formulas: `0.3 * viewer-mix + 0.7 * MeinaPastel` becomes an expression that can be evaluated on anything with arithmetic.

Has never heard of tensors; numbers are folded exactly, as fractions, before anything is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sdmerge_build.errors import nearest

__all__ = ["Expression", "FormulaError", "evaluate", "names_in", "parse_formula", "relabelled", "show"]

MAX_LENGTH = 10_000
MAX_DEPTH = 64
MAX_NAME = 128
MAX_DIGITS = 40
MAX_BITS = 4096
MIN_FACTOR = Fraction(1, 10**30)

_RUN = re.compile(r"(?:\d+\.?\d*|\.\d+)[eE]\+\d{1,3}(?![A-Za-z0-9._])|[A-Za-z0-9._-]{1,160}")  # `1e+30` is the one number with a plus in it
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


class FormulaError(ValueError):
    """A formula cannot be read; `hint` says what to type instead."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Name:
    """A source or step."""

    name: str


@dataclass(frozen=True, slots=True)
class Scaled:
    """A number times an expression; the number is neither 0 nor 1."""

    factor: Fraction
    of: Expression


@dataclass(frozen=True, slots=True)
class Sum:
    """An expression, then others added to it or subtracted from it, from left to right."""

    first: Expression
    rest: tuple[tuple[str, Expression], ...]  # the sign, `+` or `-`, and what follows it


Expression = Name | Scaled | Sum


def parse_formula(text: str, known: Collection[str]) -> Expression:
    """Parse sums, differences, numbers and parentheses over `known` names.

    A name may hold `-` and `.`; the longest known name wins, so a minus sign after a name wants a space.
    Raises `FormulaError`.
    """
    if len(text) > MAX_LENGTH:
        message = f"is longer than {MAX_LENGTH} characters"
        raise FormulaError(message)
    parser = _Parser(list(_tokens(text, known)))
    value = parser.sum(0)
    if parser.peek():
        raise FormulaError(f"has `{_text(parser.peek())}` where it should end or go on with `+`, `-`, `*`")
    if isinstance(value, Fraction):
        raise FormulaError("comes to a number; it names no model that counts")
    return value


def names_in(expression: Expression) -> list[str]:
    """List the names of an expression once each, in the order they are read."""
    found: dict[str, None] = {}
    stack: list[Expression] = [expression]
    while stack:
        match stack.pop():
            case Name(name):
                found[name] = None
            case Scaled(_, of):
                stack.append(of)
            case Sum(first, rest):
                stack += [*(term for _, term in reversed(rest)), first]
    return list(found)


def evaluate(expression: Expression, values: Mapping[str, Any]) -> Any:
    """Evaluate an expression operation by operation, on tensors or on anything else that adds and scales.

    Names whose value is None are left out; what holds no other is None.
    """
    match expression:
        case Name(name):
            return values[name]
        case Scaled(factor, of):
            value = evaluate(of, values)
            return None if value is None else value * float(factor)
        case Sum(first, rest):
            total = evaluate(first, values)
            for sign, term in rest:
                value = evaluate(term, values)
                if total is None or value is None:
                    total = value * (-1.0 if sign == "-" else 1.0) if total is None and value is not None else total
                else:
                    total = total - value if sign == "-" else total + value
            return total


def show(expression: Expression, labels: Mapping[str, str]) -> str:
    """Write an expression in its one canonical spelling, with other labels for its names."""
    match expression:
        case Name(name):
            return labels[name]
        case Scaled(factor, of):
            inner = show(of, labels)
            return f"{float(factor)!r} * {f'({inner})' if isinstance(of, Sum) else inner}"
        case Sum(first, rest):
            terms = ((sign, term, show(term, labels)) for sign, term in rest)
            tail = (f" {sign} {f'({text})' if isinstance(term, Sum) else text}" for sign, term, text in terms)
            return show(first, labels) + "".join(tail)


def relabelled(text: str, labels: Mapping[str, str]) -> str:
    """Put labels in the places that `[…]` marks, once: a label that looks like a mark is left as it is."""
    return re.sub(r"\[([^\[\]]*)\]", lambda mark: labels.get(mark[1], mark[0]), text)


Token = tuple[str, str]  # kind: "name", "number" or the sign itself


def _text(token: Token | None) -> str:
    return token[1] if token else "the end"


def _tokens(text: str, known: Collection[str]) -> Iterator[Token]:
    known = frozenset(known)
    at = 0
    while at < len(text):
        sign = text[at]
        if sign.isspace():
            at += 1
        elif sign in "+-*/()":
            yield sign, sign
            at += 1
        elif run := _RUN.match(text, at):
            token = _longest(run[0], known)
            yield token
            at += len(token[1])
        else:
            message = f"has `{sign}`, which means nothing here"
            raise FormulaError(message, "use names, numbers, `+`, `-`, `*`, `/` and parentheses")


def _longest(run: str, known: Collection[str]) -> Token:
    """Split the first token off a run of letters, digits, dots and dashes: the longest known name, or a number."""
    number = _NUMBER.match(run)
    numeric = number[0] if number and run[len(number[0]) : len(number[0]) + 1] in {"", "-"} else ""
    for end in range(min(len(run), MAX_NAME), len(numeric), -1):
        if run[:end] in known and run[end : end + 1] in {"", "-"}:
            return "name", run[:end]
    if numeric in known:
        return "name", numeric
    if len(numeric) > MAX_DIGITS:
        message = f"has a number of more than {MAX_DIGITS} digits"
        raise FormulaError(message)
    if numeric:
        return "number", numeric
    message = f"names `{run}`, which is neither a source nor a step"
    raise FormulaError(message, nearest(run, known))


class _Parser:
    """Recursive descent over sums of products; every method returns a number or an expression."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0

    def peek(self) -> Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def sum(self, depth: int) -> Expression | Fraction:
        value = self._product(depth)
        rest: list[tuple[str, Expression]] = []
        while (token := self.peek()) and token[0] in "+-":
            self._at += 1
            term = self._product(depth)
            if isinstance(value, Fraction) or isinstance(term, Fraction):
                value, rest = _add(_sum(value, rest), token[0], term), []
            else:
                rest.append((token[0], term))
        return _sum(value, rest)

    def _product(self, depth: int) -> Expression | Fraction:
        value = self._factor(depth)
        while (token := self.peek()) and token[0] in "*/":
            self._at += 1
            value = _multiply(value, self._factor(depth)) if token[0] == "*" else _divide(value, self._factor(depth))
        return value

    def _factor(self, depth: int) -> Expression | Fraction:
        if depth > MAX_DEPTH:
            message = f"is nested more than {MAX_DEPTH} deep"
            raise FormulaError(message)
        token = self.peek()
        self._at += 1
        match token:
            case ("name", name):
                return Name(name)
            case ("number", digits):
                return Fraction(digits)
            case ("-", _):
                return _multiply(Fraction(-1), self._factor(depth + 1))
            case ("(", _):
                value = self.sum(depth + 1)
                if self.peek() is None:
                    raise FormulaError("has a `(` that is never closed")
                if self.peek() != (")", ")"):
                    raise FormulaError(f"has `{_text(self.peek())}` where it should close a `(` or go on with `+`, `-`, `*`")
                self._at += 1
                return value
        message = f"has `{_text(token)}` where a name or a number should stand"
        raise FormulaError(message)


def _sum(value: Expression | Fraction, rest: list[tuple[str, Expression]]) -> Expression | Fraction:
    """Add terms to what stands before them; sums of sums are one sum."""
    if isinstance(value, Fraction) or not rest:
        return value
    return Sum(value.first, (*value.rest, *rest)) if isinstance(value, Sum) else Sum(value, tuple(rest))


def _add(left: Expression | Fraction, sign: str, right: Expression | Fraction) -> Expression | Fraction:
    """Add where one side, or both, are numbers."""
    signed = Fraction(-1 if sign == "-" else 1)
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return _bounded(left + signed * right)
    if isinstance(right, Fraction) and right == 0:
        return left
    if isinstance(left, Fraction) and left == 0:
        return _multiply(signed, right)
    raise FormulaError("adds a number to a model", "write a share in front of the model: `0.5 * name`")


def _bounded(number: Fraction) -> Fraction:
    """Refuse numbers that would only grow."""
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
        raise FormulaError("has a number too large or too exact to mean anything")
    return number


def _multiply(left: Expression | Fraction, right: Expression | Fraction) -> Expression | Fraction:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return _bounded(left * right)
    if isinstance(left, Fraction):
        return _multiply(right, left)
    if not isinstance(right, Fraction):
        raise FormulaError("multiplies two models", "one side of `*` must be a number")
    if isinstance(left, Scaled):  # a number times a number times a model: folded exactly, rounded once
        right = _bounded(right * left.factor)
        left = left.of
    if right == 0:
        return Fraction(0)
    if not MIN_FACTOR <= abs(right) <= 1 / MIN_FACTOR:
        message = "has a factor too large or too small to mean anything"
        raise FormulaError(message)
    return left if right == 1 else Scaled(right, left)


def _divide(left: Expression | Fraction, right: Expression | Fraction) -> Expression | Fraction:
    if not isinstance(right, Fraction):
        raise FormulaError("divides by a model", "only a number may stand after `/`")
    if right == 0:
        raise FormulaError("divides by zero")
    return _multiply(left, 1 / right)
