"""TOML from strangers: read within limits, and every complaint has its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdmerge_build.errors import Issue, RecipeError
from sdmerge_build.tomltext import Lines, read_toml


def written(folder: Path, text: str | bytes) -> Path:
    """Write a recipe, as text or as bytes."""
    path = folder / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaints(path: Path) -> tuple[Issue, ...]:
    """Read a file that must be refused, with the exit code of a bad recipe."""
    with pytest.raises(RecipeError) as caught:
        read_toml(path)
    assert 2 == caught.value.exit_code
    return caught.value.issues


NESTED = "brackets are nested more than 32 deep"
DOTTED = "a dotted name has more than 16 parts"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("x = nan", ":1", "`x` is nan, not a finite number"),
        ("[step.mix]\n\nalpha = inf # all of it", ":3", "`alpha` is inf, not a finite number"),
        ("[step.mix]\nalpha = -inf", ":2", "`alpha` is -inf, not a finite number"),
        ("[step.mix]\nalpha = 1e999", ":2", "`alpha` is inf, not a finite number"),
        ("[step.mix]\nalpha = { base = 0.5, blocks = { IN04 = nan } }", ":2", "`IN04` is nan, not a finite number"),
        ("[step.mix]\nweights = [\n  0.5,\n  nan,\n]", ":2", "is nan, not a finite number"),
        ("a = 1\na = 2\n[b]", "", "cannot overwrite a value"),
        ("[source.A]\npath = 'x'\n[source.A]\n", ":3", "cannot declare ('source', 'A') twice"),
        ("recipe = 1\narchitecture = sd1", ":2", "invalid value"),
        ("recipe = 1\nsource\nstep", ":2", "expected '=' after a key"),
        ("[source.A\npath = 1", ":1", "expected ']' at the end of a table declaration"),
        ('x = "never closed', "", "unterminated string"),
        ("x = 'two\nlines'", ":1", "invalid character"),
        ("x = 2024-13-45", ":1", "expected newline or end of document"),
        ("x = " + "[" * 33 + "]" * 33, "", NESTED),
        ("x = " + "[" * 20_000, "", NESTED),
        ("x = " + "{a=" * 20_000, "", NESTED),
        ("x = " + "[{a=" * 17 + "1" + "}]" * 17, "", NESTED),
        (".".join("a" * 17) + " = 1", "", DOTTED),
        (".".join("a" * 20_000) + " = 1", "", DOTTED),
        (" . ".join("a" * 17) + " = 1", "", DOTTED),
        (".".join(['"a"', "'b'"] * 10_000) + " = 1", "", DOTTED),
        ("[" + ".".join("a" * 20_000) + "]", "", DOTTED),
        ("x = { " + ".".join("a" * 20_000) + " = 1 }", "", DOTTED),
        ('# """\n' + ".".join("a" * 20_000) + ' = 1\n# """', "", DOTTED),
        ("# '''\nx = " + "[" * 20_000 + "\n# '''", "", NESTED),
        ('x = "\\""\ny = ' + "[" * 20_000 + ' # "', "", NESTED),
        ('x = """a""""\n' + ".".join("a" * 20_000) + ' = 1\n# "', "", DOTTED),
        (b"# \xff\xfe", "", "is not UTF-8 text: invalid start byte at byte 2"),
        ("recipe = 1".encode("utf-16"), "", "is not UTF-8 text"),
        (b"recipe = 1\0", ":1", "expected newline or end of document"),
        ("#" * ((1 << 20) + 1), "", "is larger than 1 MiB, too large for a recipe"),
        ("x = " + "9" * 5000, "", "digits"),
    ],
)
def test_text_that_is_no_recipe_is_refused_at_once_with_its_place(tmp_path: Path, text: str | bytes, line: str, what: str):
    """
    Whatever is wrong with the text is one `RecipeError` that names the file and, where it can be known, the line.
    """
    path = written(tmp_path, text)
    issue = complaints(path)[0]

    assert f"{path}{line}" == issue.where or (not line and re.fullmatch(re.escape(str(path)) + r"(:\d+)?", issue.where))
    assert what in issue.what


@pytest.mark.parametrize(
    "text",
    [
        "#" * (1 << 20),
        "x = " + "[" * 32 + "]" * 32,
        ".".join("a" * 16) + " = 1",
        'x = "' + "[" * 500 + "a." * 500 + '"',
        'x = """\n' + "[" * 500 + "\n" + "a." * 500 + '\n"""',
        "x = 'C:\\models\\' # " + "[{" * 50 + "a.b." * 50,
        "# it's a [" + "[" * 50 + " and it's over",
        "x = " + "9" * 18,
        "x = ['a.b.c.d.e.f', 'g.h.i.j.k.l', 'm.n.o.p.q.r']",
        "weights = [" + ", ".join(["0.05"] * 20) + "]",
        "weights = [" + ",".join(["0.05"] * 20) + "]",
        "weights = [\n" + "0.05,\n" * 20 + "]",
        "\n".join(f"a{n}.b = 0.5" for n in range(40)),
    ],
)
def test_what_only_looks_like_a_bomb_is_read(tmp_path: Path, text: str):
    """
    Brackets and dots in texts, comments and numbers do not count; the limits themselves are within the limits.
    """
    assert Lines is type(read_toml(written(tmp_path, text))[1])


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "a" * 20_000,
        "a" * 20_000 + " = 1",
        "x = [" + ",".join("5" * 10_000) + "]",
        "x = [" + "1" * 200 + ",\n" * 1000 + "]",
        "x = " + '"a" ' * 20_000,
        "x = " + "a." * 15 + "b " * 10_000,
        "'" * 20_000,
        '"""' + "\\" * 20_000,
        "= " * 10_000,
    ],
    ids=["long word", "long key", "dense list", "long numbers", "many texts", "almost dotted", "quotes", "backslashes", "signs"],
)
def test_reading_ends(tmp_path: Path, text: str):
    """
    Anything is read or refused, and no pattern is lost in it.
    """
    path = written(tmp_path, text)
    try:
        assert 1 == len(read_toml(path)[0])
    except RecipeError as error:
        assert str(path) in str(error)


def test_a_byte_order_mark_is_read_over(tmp_path: Path):
    """
    Windows Notepad writes one in front of UTF-8; the recipe behind it is as good as any.
    """
    table, lines = read_toml(written(tmp_path, b"\xef\xbb\xbfrecipe = 1\r\narchitecture = 'sd1'\r\n"))
    assert {"recipe": 1, "architecture": "sd1"} == table
    assert f"{tmp_path / 'recipe.toml'}:1" == lines.where("recipe")
    assert f"{tmp_path / 'recipe.toml'}:2" == lines.where("architecture")


def test_every_number_that_is_none_is_named(tmp_path: Path):
    """
    All of them, with their lines, and not the first alone.
    """
    path = written(tmp_path, "[step.one]\nalpha = nan\n[step.two]\nalpha = 1e400\nbeta = 0.5\n")
    expected = [
        Issue(where=f"{path}:2", what="`alpha` is nan, not a finite number"),
        Issue(where=f"{path}:4", what="`alpha` is inf, not a finite number"),
    ]
    assert expected == list(complaints(path))


def test_a_number_in_a_list_is_named_by_its_field(tmp_path: Path):
    """
    A person is told of `weights`, and not of an unnamed `1`.
    """
    assert "`weights`" in complaints(written(tmp_path, "[step.mix]\nweights = [0.5, nan]"))[0].what


def test_a_number_too_long_is_refused_in_words_for_people(tmp_path: Path):
    """
    Five thousand digits are refused without advice to Python programmers.
    """
    assert "set_int_max_str_digits" not in complaints(written(tmp_path, "x = " + "9" * 5000))[0].what


def test_the_place_is_said_once(tmp_path: Path):
    """
    The line stands in front of a message and not at its end as well.
    """
    assert "at line" not in complaints(written(tmp_path, "recipe = 1\narchitecture = sd1"))[0].what


def test_a_recipe_that_is_not_there_is_said_to_be_missing(tmp_path: Path):
    """
    A wrong path is the commonest mistake of all.
    """
    assert Issue(where=str(tmp_path / "no.toml"), what="there is no such recipe") == complaints(tmp_path / "no.toml")[0]


def test_a_folder_is_not_a_recipe(tmp_path: Path):
    """
    A folder in place of a recipe is refused with the folder's name.
    """
    [issue] = complaints(tmp_path)
    assert str(tmp_path) == issue.where
    assert "is not a file" == issue.what


RECIPE = """\
recipe = 1
architecture = "sd1"

[defaults]
dtype = "fp16"   # half

[source.viewer-mix]
path = "A.safetensors"
permissions.sell = false
"permissions"."rent" = true

[source."MeinaPastel V4"]
  path = 'B.safetensors'

  [ source . 'spaced' ]  # oddly written
  path="C.safetensors"

[step.mix]
formula = \"\"\"
  0.3 * A +
  0.7 * B
\"\"\"
title = "mix"
weights = [
  0.5,
  0.5,
]
alpha = { base = 0.5, blocks = { IN04 = 0.2 } }

[step.mix.beta]
base = 0.5
rules = [
  { match = "*", value = 1 },
]

[step."mix-{n}".matrix]
n = [1, 2]

[[list]]
a = 1
"""


@pytest.mark.parametrize(
    ("address", "line"),
    [
        (("recipe",), 1),
        (("architecture",), 2),
        (("defaults",), 4),
        (("defaults", "dtype"), 5),
        (("source", "viewer-mix"), 7),
        (("source", "viewer-mix", "path"), 8),
        (("source", "viewer-mix", "permissions", "sell"), 9),
        (("source", "viewer-mix", "permissions", "rent"), 10),
        (("source", "viewer-mix", "sha256"), 7),
        (("source", "MeinaPastel V4"), 12),
        (("source", "MeinaPastel V4", "path"), 13),
        (("source", "spaced"), 15),
        (("source", "spaced", "path"), 16),
        (("step", "mix"), 18),
        (("step", "mix", "formula"), 19),
        (("step", "mix", "title"), 23),
        (("step", "mix", "weights", 1), 24),
        (("step", "mix", "alpha", "blocks", "IN04"), 28),
        (("step", "mix", "beta"), 30),
        (("step", "mix", "beta", "base"), 31),
        (("step", "mix", "beta", "rules", 0, "match"), 32),
        (("step", "mix-{n}", "matrix"), 36),
        (("step", "mix-{n}", "matrix", "n"), 37),
        (("list",), 39),
    ],
)
def test_tables_and_fields_are_found_where_they_stand(tmp_path: Path, address: tuple[str | int, ...], line: int):
    """
    Quoted, dotted, spaced and nested: a field is on its line, and what has no line of its own on that of what holds it.
    """
    path = written(tmp_path, RECIPE)
    assert f"{path}:{line}" == read_toml(path)[1].where(*address)


@pytest.mark.parametrize("address", [("nothing",), ("source", "unknown"), ()])
def test_what_stands_nowhere_is_in_the_file(tmp_path: Path, address: tuple[str, ...]):
    """
    Without a line, a complaint still names its file.
    """
    path = written(tmp_path, RECIPE)
    assert str(path) == read_toml(path)[1].where(*address)


def test_text_between_triple_quotes_is_no_table(tmp_path: Path):
    """
    A description that quotes a recipe does not move the lines of the recipe it stands in.
    """
    path = written(tmp_path, '[step.a]\ndescription = """\n[step.b]\nformula = "x"\n"""\ntitle = "a"\n[step.b]\nformula = "y"\n')
    lines = read_toml(path)[1]
    assert f"{path}:6" == lines.where("step", "a", "title")
    assert f"{path}:7" == lines.where("step", "b")
    assert f"{path}:8" == lines.where("step", "b", "formula")


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\u2029"])
def test_only_line_ends_end_lines(tmp_path: Path, odd: str):
    """
    A separator that editors do not count as a line does not count here.
    """
    path = written(tmp_path, f"# pasted{odd}from a page\nrecipe = 1\n")
    assert f"{path}:2" == read_toml(path)[1].where("recipe")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab.[]{}=\"'#\n\\ 1,"), max_size=60))
def test_any_text_is_a_table_or_an_error(tmp_path: Path, text: str):
    """
    Nothing a stranger writes crashes the reader.
    """
    path = written(tmp_path, text)
    try:
        table, lines = read_toml(path)
    except RecipeError as error:
        assert all(issue.where.startswith(str(path)) for issue in error.issues)
    else:
        assert all(lines.where(key).startswith(f"{path}:") for key in table)
