"""Formulas, compared with Python's own arithmetic over fractions."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.formula import FormulaError, Name, Scaled, Sum, evaluate, names_in, parse_formula, show

KNOWN = ["A", "B", "C", "viewer-mix", "MeinaPastel", "v1.5-pruned", "7th_anime_v3"]
LABELS = {name: name for name in KNOWN}


class Exact(Fraction):
    """A value of a model: floats are taken as the exact binary fractions that they are."""

    def __mul__(self, other):
        return Exact(Fraction(self) * Fraction(other))

    def __add__(self, other):
        return Exact(Fraction(self) + Fraction(other))

    def __sub__(self, other):
        return Exact(Fraction(self) - Fraction(other))


VALUES = {name: Exact(n * n + 3, n + 1) for n, name in enumerate(KNOWN)}


def canonical(text: str) -> str:
    """Write a formula as keys have it, with its own names."""
    return show(parse_formula(text, KNOWN), LABELS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("  A\t+\nB ", "A + B"),
        ("0.3 * viewer-mix + 0.7 * MeinaPastel", "0.3 * viewer-mix + 0.7 * MeinaPastel"),
        ("0.30*viewer-mix+.7*MeinaPastel", "0.3 * viewer-mix + 0.7 * MeinaPastel"),
        ("viewer-mix * 3e-1 + MeinaPastel * 70 / 100", "0.3 * viewer-mix + 0.7 * MeinaPastel"),
        ("(1 - 0.7) * viewer-mix + 0.7 * (MeinaPastel)", "0.3 * viewer-mix + 0.7 * MeinaPastel"),
        ("A + 1.0 * (B - C)", "A + (B - C)"),
        ("A + 0.5 * (B - C)", "A + 0.5 * (B - C)"),
        ("A + B - C", "A + B - C"),
        ("(A + B) - C", "A + B - C"),
        ("A + (B - C)", "A + (B - C)"),
        ("A - (B - C)", "A - (B - C)"),
        ("1/3 * A", "0.3333333333333333 * A"),
        ("A / 3", "0.3333333333333333 * A"),
        ("A / 4 * 2", "0.5 * A"),
        ("(A + B) / 2", "0.5 * (A + B)"),
        ("2 * (3 * (A + B))", "6.0 * (A + B)"),
        ("2 * (3 * A)", "6.0 * A"),
        ("0.1 * 3 * A", "0.3 * A"),
        ("1 * A", "A"),
        ("-A", "-1.0 * A"),
        ("--A", "A"),
        ("A - -B", "A - -1.0 * B"),
        ("A - 0.5 * B", "A - 0.5 * B"),
        ("A + 0 * B", "A"),
        ("0 * A - B", "-1.0 * B"),
        ("0 + A", "A"),
        ("1e999 * 1e-999 * A", "A"),
        ("1e30 * A", "1e+30 * A"),
        ("A / 1e30", "1e-30 * A"),
    ],
)
def test_a_formula_has_one_canonical_spelling(text: str, expected: str):
    """Spaces, brackets, order of factors and ways to write a number do not change what a key sees; numbers are folded exactly."""
    assert expected == canonical(text)
    assert expected == canonical(expected)


@pytest.mark.parametrize(
    ("text", "known", "expected"),
    [
        ("viewer-mix", ["viewer", "mix", "viewer-mix"], ["viewer-mix"]),
        ("viewer-mix", ["viewer", "mix"], ["viewer", "mix"]),
        ("viewer - mix", ["viewer", "mix", "viewer-mix"], ["viewer", "mix"]),
        ("A-B", ["A", "B"], ["A", "B"]),
        ("A-B-C", ["A-B", "B-C", "A", "C"], ["A-B", "C"]),
        ("A-0.5*B", ["A", "B"], ["A", "B"]),
        ("0.5*B-A", ["A", "B"], ["B", "A"]),
        ("0.5*v1.5-pruned", ["v1.5-pruned", "v1"], ["v1.5-pruned"]),
        ("v1.5-0.5*v2", ["v1.5", "v2"], ["v1.5", "v2"]),
        ("7th_anime_v3 + 2*8bit", ["7th_anime_v3", "8bit"], ["7th_anime_v3", "8bit"]),
        ("1.5 + 2.1", ["1.5", "2.1"], ["1.5", "2.1"]),
        ("0.5*1.5-inpainting", ["1.5-inpainting"], ["1.5-inpainting"]),
        ("1e-3*A", ["A"], ["A"]),
        ("1e-3", ["1e-3"], ["1e-3"]),
        ("B + A + B - C", ["A", "B", "C"], ["B", "A", "C"]),
        ("A + 0*B", ["A", "B"], ["A"]),
        ("(C - (B - A))", ["A", "B", "C"], ["C", "B", "A"]),
    ],
)
def test_the_longest_known_name_wins(text: str, known: list[str], expected: list[str]):
    """Names may hold dashes, dots and digits; they are listed once each, as they are read."""
    assert expected == names_in(parse_formula(text, known))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "where a name or a number should stand", ""),
        ("  ", "where a name or a number should stand", ""),
        ("A +", "where a name or a number should stand", ""),
        ("* A", "has `*` where a name or a number should stand", ""),
        ("A + * B", "has `*` where a name or a number should stand", ""),
        ("()", "has `)` where a name or a number should stand", ""),
        ("-", "where a name or a number should stand", ""),
        ("A B", "has `B` where it should end or go on", ""),
        ("A 0.5", "has `0.5` where it should end or go on", ""),
        ("2 A", "has `A` where it should end or go on", ""),
        ("A)", "has `)` where it should end or go on", ""),
        ("(A", "has a `(` that is never closed", ""),
        ("A + (B - (C)", "has a `(` that is never closed", ""),
        ("0.5", "comes to a number; it names no model that counts", ""),
        ("0.5 * 2 - 1", "comes to a number; it names no model that counts", ""),
        ("0 * A", "comes to a number; it names no model that counts", ""),
        ("A + 1", "adds a number to a model", "write a share in front of the model: `0.5 * name`"),
        ("0.5 - A", "adds a number to a model", "write a share in front of the model: `0.5 * name`"),
        ("A * B", "multiplies two models", "one side of `*` must be a number"),
        ("(A + B) * (A - B)", "multiplies two models", "one side of `*` must be a number"),
        ("1 / A", "divides by a model", "only a number may stand after `/`"),
        ("A / B", "divides by a model", "only a number may stand after `/`"),
        ("A / 0", "divides by zero", ""),
        ("A / (0.5 - 1/2)", "divides by zero", ""),
        ("viewer-mxi", "names `viewer-mxi`, which is neither a source nor a step", "did you mean `viewer-mix`?"),
        ("a", "names `a`, which is neither a source nor a step", "did you mean `A`?"),
        ("0.5 * zzz", "names `zzz`, which is neither a source nor a step", ""),
        ("0x10 * A", "names `0x10`, which is neither a source nor a step", ""),
        ("2A", "names `2A`, which is neither a source nor a step", "did you mean `A`?"),
        ("1e9999 * A", "names `1e9999`, which is neither a source nor a step", ""),
        ("nan * A", "names `nan`, which is neither a source nor a step", ""),
        ("A ^ 2", "has `^`, which means nothing here", "use names, numbers, `+`, `-`, `*`, `/` and parentheses"),
        ("{ratio} * A", "has `{`, which means nothing here", "use names, numbers, `+`, `-`, `*`, `/` and parentheses"),
        ("A, B", "has `,`, which means nothing here", "use names, numbers, `+`, `-`, `*`, `/` and parentheses"),
        ("٣ * A", "has `٣`, which means nothing here", "use names, numbers, `+`, `-`, `*`, `/` and parentheses"),
        ("A × 2", "has `×`, which means nothing here", "use names, numbers, `+`, `-`, `*`, `/` and parentheses"),
        ("1e31 * A", "has a factor too large or too small to mean anything", ""),
        ("1e-31 * A", "has a factor too large or too small to mean anything", ""),
        ("A / 1e31", "has a factor too large or too small to mean anything", ""),
        ("1e20 * (1e20 * A)", "has a factor too large or too small to mean anything", ""),
        ("1e999 * A", "has a factor too large or too small to mean anything", ""),
        ("A" + " " * 10_000, "is longer than 10000 characters", ""),
        ("(" * 65 + "A" + ")" * 65, "is nested more than 64 deep", ""),
        ("-" * 66 + "A", "is nested more than 64 deep", ""),
        ("(" * 5000 + "A" + ")" * 4999, "is nested more than 64 deep", ""),
    ],
)
def test_a_formula_that_means_nothing_says_why(text: str, message: str, hint: str):
    """Every mistake has one message and, where there is one, the next thing to type."""
    with pytest.raises(FormulaError, match=re.escape(message)) as caught:
        parse_formula(text, KNOWN)
    assert hint == caught.value.hint


def test_a_number_may_be_written_with_a_plus_in_its_exponent():
    """`1e+1` is what Python prints for large numbers, so it is read."""
    assert canonical("1e+1 * A") == "10.0 * A"


def test_the_missing_sign_is_told_from_the_missing_bracket():
    """In `(A B)` the bracket is closed; what is missing stands between the names."""
    with pytest.raises(FormulaError, match="has `B` where"):
        parse_formula("(A B)", KNOWN)


def test_a_long_sum_is_flat():
    """2500 terms are one sum, parsed, evaluated and written out without deep recursion."""
    expression = parse_formula("+".join(["A", "B"] * 1250), KNOWN)

    assert isinstance(expression, Sum)
    assert len(expression.rest) == 2499
    assert 1250 * (VALUES["A"] + VALUES["B"]) == evaluate(expression, VALUES)
    assert show(expression, LABELS) == "A + B" + " + A + B" * 1249
    assert names_in(expression) == ["A", "B"]


def test_a_long_run_of_dashes_is_read():
    """`A-A-A-…` as long as a formula may be is read, and does not keep a machine busy."""
    expression = parse_formula("-".join(["A"] * 2000), KNOWN)
    assert evaluate(expression, {"A": 1}) == 1 - 1999


def test_parentheses_may_nest_up_to_the_limit():
    """64 levels are read; brackets that change nothing leave no trace."""
    assert canonical("(" * 64 + "A" + ")" * 64) == "A"
    deep = "A - (B - (" * 32 + "A - B" + "))" * 32
    assert deep == canonical(deep)


def test_numbers_are_folded_exactly_and_rounded_once():
    """0.1 * 3 is 0.3, although 0.1 * 3 in floating point is not."""
    assert Scaled(Fraction(3, 10), Name("A")) == parse_formula("0.1 * 3 * A", KNOWN)
    assert 0.3 != 0.1 * 3


def test_labels_replace_names_wherever_they_stand():
    """A key sees the roles of models and not what the recipe calls them."""
    expression = parse_formula("B + 0.5 * (A - B)", KNOWN)
    assert show(expression, {"B": "[1]", "A": "[2]"}) == "[1] + 0.5 * ([2] - [1])"


numbers = st.sampled_from(["0.25", "0.5", "2", "3", "10", ".125", "1.5e1", "4.0"])
models = st.sampled_from(KNOWN)
nodes = st.recursive(
    models,
    lambda inner: st.one_of(
        st.builds("{} + {}".format, inner, inner),
        st.builds("{} - {}".format, inner, models),
        st.builds("{} - ({})".format, inner, inner),
        st.builds("{} * ({})".format, numbers, inner),
        st.builds("({}) * {}".format, inner, numbers),
        st.builds("({})/{}".format, inner, st.sampled_from(["2", "4", "0.5", "8"])),
        st.builds("-({})".format, inner),
    ),
    max_leaves=12,
)


def by_other_hands(text: str) -> Fraction:
    """Evaluate a formula with Python: names become fractions, numbers too."""
    for n, name in sorted(enumerate(KNOWN), key=lambda item: -len(item[1])):
        text = re.sub(rf"(?<![A-Za-z0-9._<-]){re.escape(name)}(?![A-Za-z0-9._>-])", f"<{n}>", text)
    text = re.sub(r"(?<![<\d.])(\d*\.?\d+(?:e\d+)?)(?![>\d])", r"Fraction('\1')", text)
    text = re.sub(r"<(\d+)>", lambda match: f"Fraction({VALUES[KNOWN[int(match[1])]]!s})".replace("Fraction(", "Fraction('").replace(")", "')"), text)
    return eval(text, {"Fraction": Fraction})  # noqa: S307  the text is made above


@settings(max_examples=300, deadline=None)
@given(text=nodes)
def test_a_formula_has_the_value_that_python_gives_it(text: str):
    """Any formula of names, numbers, signs and brackets is worth what Python's own parser and exact fractions make of it."""
    assert by_other_hands(text) == evaluate(parse_formula(text, KNOWN), VALUES)


@settings(max_examples=200, deadline=None)
@given(text=nodes)
def test_the_canonical_spelling_means_the_same(text: str):
    """What a key sees can be parsed again, is then spelled the same, and has the same value and names."""
    expression = parse_formula(text, KNOWN)
    again = parse_formula(show(expression, LABELS), KNOWN)

    assert show(expression, LABELS) == show(again, LABELS)
    assert evaluate(expression, VALUES) == evaluate(again, VALUES)
    assert names_in(expression) == names_in(again)


@settings(max_examples=300, deadline=None)
@given(text=st.text("AB0.5e-+*/() ^_\n9", max_size=30))
def test_any_text_is_a_formula_or_an_error(text: str):
    """Nothing a person types crashes the parser."""
    try:
        expression = parse_formula(text, KNOWN)
    except FormulaError as error:
        assert str(error)
    else:
        assert set(names_in(expression)) <= {"A", "B"}
        assert names_in(expression)
