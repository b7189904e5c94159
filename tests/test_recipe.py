"""Recipes: what may stand in them, and complaints that name field, line and nearest word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Space

from sdmerge_build.digest import blake3_hex
from sdmerge_build.errors import Issue, RecipeError
from sdmerge_build.recipe import Recipe, RecipeTable, read_recipe

HEAD = """\
recipe = 1
architecture = "sd1"
[source.A]
path = "A.safetensors"
"""
STEP = '[step.mix]\nformula = "A"\n'


def read(space: Space, text: str) -> Recipe:
    """Read a recipe."""
    return read_recipe(space.write("recipe.toml", text))


def complaints(space: Space, text: str) -> list[tuple[int, str, str]]:
    """Read a bad recipe; list line, message and hint of every complaint."""
    with pytest.raises(RecipeError) as caught:
        read(space, text)
    return [told(issue, space.path / "recipe.toml") for issue in caught.value.issues]


def told(issue: Issue, path: Path) -> tuple[int, str, str]:
    """Split a complaint into line, message and hint; 0 stands for no line."""
    assert issue.where.startswith(str(path))
    return int(issue.where.removeprefix(str(path)).removeprefix(":") or 0), issue.what, issue.hint


def test_a_recipe_is_what_its_author_said(space: Space):
    """
    Fields are kept as written, nothing is filled in, and the digest is that of the file.
    """
    recipe = read(space, HEAD + '[step.mix]\nformula = "A"\nartifact = false\nalpha = 0.5\n')

    assert "A.safetensors" == recipe.table.source["A"].path
    assert "A" == recipe.table.step["mix"].formula
    assert None is recipe.table.step["mix"].dtype
    assert False is recipe.table.step["mix"].artifact
    assert {"alpha": 0.5} == recipe.table.step["mix"].model_extra
    assert blake3_hex((space.path / "recipe.toml").read_bytes()) == recipe.digest


def test_places_of_a_matrix_are_those_of_its_table(space: Space):
    """
    A step made by a matrix is found where the matrix stands.
    """
    recipe = read(space, HEAD + '[step."mix-{n}"]\nformula = "{n} * A"\nmatrix = { n = [1, 2] }\n')

    assert ["mix-1", "mix-2"] == list(recipe.table.step)
    assert {"mix-1": "mix-{n}", "mix-2": "mix-{n}"} == recipe.templates
    assert f"{recipe.path}:5" == recipe.where("step", "mix-2")
    assert f"{recipe.path}:6" == recipe.where("step", "mix-2", "formula")
    assert f"{recipe.path}:4" == recipe.where("source", "A", "path")


@pytest.mark.parametrize("version", ["2", "99"])
def test_a_newer_format_is_refused_before_anything_else(space: Space, version: str):
    """
    A recipe for a newer sdbuild may hold anything; only its version is complained of.
    """
    text = f"recipe = {version}\nnovelty = true\n[step]\nx = 5\n"
    what = f"is written in recipe format {version}; this sdbuild reads format 1"
    assert [(1, what, "a newer sdbuild may read it")] == complaints(space, text)


@pytest.mark.parametrize("version", ["0", "-1", '"1"', "true", "1.0", "[1]"])
def test_the_version_is_the_whole_number_one(space: Space, version: str):
    """
    What only resembles 1 is refused.
    """
    [(line, what, _)] = complaints(space, HEAD.replace("recipe = 1", f"recipe = {version}") + STEP)
    assert 1 == line
    assert what.startswith("`recipe` ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("archtecture = 1\n" + HEAD + STEP, (1, "the recipe has an unknown field `archtecture`", "did you mean `architecture`?")),
        ("sources = 1\n" + HEAD + STEP, (1, "the recipe has an unknown field `sources`", "did you mean `source`?")),
        (HEAD + "pth = 'x'\n" + STEP, (5, "source `A` has an unknown field `pth`", "did you mean `path`?")),
        (HEAD + "sha265 = 'x'\n" + STEP, (5, "source `A` has an unknown field `sha265`", "did you mean `sha256`?")),
        (HEAD + "zzz = 'x'\n" + STEP, (5, "source `A` has an unknown field `zzz`", "")),
    ],
)
def test_an_unknown_field_is_an_error_with_the_nearest_known(space: Space, text: str, expected: tuple[int, str, str]):
    """
    A misspelt field is never ignored; the complaint has its line and the word that was meant.
    """
    assert [expected] == complaints(space, text)


def test_an_unknown_default_is_an_error_of_the_defaults(space: Space):
    """
    The complaint names the table that holds the misspelt field.
    """
    [(line, what, hint)] = complaints(space, HEAD + "[defaults]\ndtpye = 'fp16'\n" + STEP)
    assert (6, "did you mean `dtype`?") == (line, hint)
    assert "`defaults` has an unknown field `dtpye`" in what


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        (HEAD.replace('"sd1"', "1") + STEP, 2, "`architecture` of the recipe is 1: "),
        (HEAD.replace('"A.safetensors"', "1") + STEP, 4, "`path` of source `A` is 1: "),
        (HEAD.replace('"A.safetensors"', '""') + STEP, 4, "`path` of source `A` is ''"),
        (HEAD + "size = -1\n" + STEP, 5, "`size` of source `A` is -1: "),
        (HEAD + "size = 1.5\n" + STEP, 5, "`size` of source `A` is 1.5: "),
        (HEAD + "size = '1'\n" + STEP, 5, "`size` of source `A` is '1': "),
        (HEAD + "permissions = 'all'\n" + STEP, 5, "`permissions` of source `A` is 'all'"),
        (HEAD + STEP + "artifact = 'yes'\n", 7, "`artifact` of step `mix` is 'yes': "),
        (HEAD + STEP + "artifact = 1\n", 7, "`artifact` of step `mix` is 1: "),
        (HEAD + STEP + "title = 1\n", 7, "`title` of step `mix` is 1: "),
        (HEAD + STEP + "dtype = 'f16'\n", 7, "`dtype` is 'f16'; it must be `fp16`, `bf16`, `fp32`, `fp64`, `fp8_e4m3`, `fp8_e5m2` or `keep`"),
        (HEAD + STEP + "compute = 'fp16'\n", 7, "`compute` is 'fp16'; it must be `fp32`, `fp64` or `native`"),
        (HEAD + STEP + "missing = 'drop'\n", 7, "`missing` is 'drop'; it must be `error` or `keep`"),
        (HEAD + STEP + "extra = 'ignore'\n", 7, "`extra` is 'ignore'; it must be `error`, `keep` or `drop`"),
        (HEAD + STEP + "nonfinite = 'zero'\n", 7, "`nonfinite` is 'zero'; it must be `error`, `allow` or `saturate`"),
        (HEAD + "[defaults]\nmismatch = 'pad'\n" + STEP, 6, "`mismatch` is 'pad'; it must be `error`, `keep`, `overlap` or `zeros`"),
        (HEAD + "sha256 = 'c47e3a94e9'\n" + STEP, 5, "`sha256` of source `A` must be 64 hex digits, but has 10 characters"),
        ("step = [1]\n" + HEAD, 1, "`step` of the recipe is [1]"),
        ("step = 1\n" + HEAD, 1, "`step` of the recipe is 1"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(space: Space, text: str, line: int, part: str):
    """
    Nothing is converted: `"1"` is no number and 1 is no truth value.
    """
    [(where, what, _)] = complaints(space, text)
    assert line == where
    assert what.startswith(part)


def test_a_digest_with_a_wrong_letter_is_told_from_a_short_one(space: Space):
    """
    64 characters of which one is no hex digit: the message does not blame the length.
    """
    [(_, what, _)] = complaints(space, HEAD + f"sha256 = '{'0' * 63}g'\n" + STEP)
    assert "64 hex digits" in what
    assert "but has 64 characters" not in what


@pytest.mark.parametrize("text", ["step.mix = 5\n" + HEAD, HEAD.replace("[source.A]\npath", "source.A") + STEP])
def test_messages_do_not_speak_of_classes(space: Space, text: str):
    """
    Python's class names are nothing to a person who writes recipes.
    """
    [(_, what, _)] = complaints(space, text)
    assert "instance of" not in what


def test_an_empty_recipe_lacks_everything(space: Space):
    """
    What a recipe cannot do without is named all at once, each with what to write.
    """
    expected = [
        (0, "the recipe lacks `recipe`", "write `recipe = 1` at the top"),
        (0, "the recipe lacks `architecture`", 'write `architecture = "sd1"` (or `sdxl`, or `generic`)'),
        (0, "the recipe lacks `source`", "write a [source.NAME] with a `path` or `filename`"),
        (0, "the recipe lacks `step`", "write a [step.NAME] with a `formula`"),
    ]
    assert expected == complaints(space, "# nothing yet\n")


def test_all_problems_are_told_at_once_in_file_order(space: Space):
    """
    A person fixing a recipe gets the whole list, from top to bottom, whatever kind of mistake each is.
    """
    text = """\
recipe = 1
architecture = 1
[step."mix-{n}"]
formula = "A"
matrix = { n = 5 }
[step.two]
formula = "A"
dtype = "half"
[source.A]
pth = "A.safetensors"
size = -1
[defaults]
artifact = "no"
"""
    assert [2, 5, 8, 10, 11, 13] == [line for line, _, _ in complaints(space, text)]


def test_a_mistake_in_a_matrix_is_told_once(space: Space):
    """
    A wrong field of a matrix is one mistake, however many steps it makes.
    """
    text = HEAD + '[step."mix-{n}"]\nformula = "A"\ndtype = "half"\nmatrix = { n = [1, 2, 3, 4] }\n'
    assert [7] == [line for line, _, _ in complaints(space, text)]


GOOD_NAMES = ["B", "a.b", "viewer-mix", "7th_anime_v3", "v1.5-pruned-emaonly", "_x", "com", "com10", "console", "nul1", "x" * 128]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_may_hold_letters_digits_dashes_dots_and_underscores(space: Space, name: str):
    """
    What people call models is a name, as long as every file system can hold it.
    """
    assert [name] == list(read(space, HEAD + f'[step."{name}"]\nformula = "A"').table.step)


BAD_NAMES = [
    "", " ", "a b", "a/b", "..", ".", ".hidden", "../up", "/abs", "C:\\x", "a\\\\b", "trailing.", "~", "a:b", "a*", "CON", "con", "Con.txt", "PRN", "aux.v2",
    "nul", "COM1", "lpt9.x", "ä", "а", "x" * 129, "a\\u0000b", "a\\nb", "{n}", "a[b]",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", ["source", "step"])
def test_a_name_that_some_file_system_cannot_hold_is_refused(space: Space, kind: str, name: str):
    """
    Folders, hidden files, Windows devices, trailing dots, foreign letters and control characters are no names; the line is named.
    """
    name = name.replace("\\", "\\\\") if name == "C:\\x" else name
    body = 'path = "x"' if kind == "source" else 'formula = "A"'
    text = HEAD + STEP + f'[{kind}."{name}"]\n{body}\n'

    [(line, what, hint)] = complaints(space, text)
    assert 7 == line
    assert what.endswith(f"cannot be the name of a {kind}")
    assert hint.startswith("`{…}` in a name needs a `matrix`" if "{" in name else "use up to 128 letters, digits")
    assert what.isprintable()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (HEAD + '[source.a]\npath = "x"\n' + STEP, "source `a` has the same name as source `A`"),
        (HEAD + '[step.MIX]\nformula = "A"\n' + STEP, "step `mix` has the same name as step `MIX`"),
        (HEAD + '[step.A]\nformula = "A"\n', "step `A` has the same name as source `A`"),
        (HEAD + '[step.a]\nformula = "A"\n', "step `a` has the same name as source `A`"),
    ],
)
def test_names_are_one_when_only_their_case_differs(space: Space, text: str, what: str):
    """
    Windows and macOS cannot keep such files apart, and a name means one thing in the whole recipe.
    """
    assert [what] == [said for _, said, _ in complaints(space, text)]


def test_names_made_by_matrices_are_checked_like_others(space: Space):
    """
    An axis cannot smuggle a path into a name.
    """
    text = HEAD + '[step."mix-{n}"]\nformula = "A"\nmatrix = { n = ["../../x", "ok"] }\n'
    assert [(5, "`mix-../../x` cannot be the name of a step")] == [(line, what) for line, what, _ in complaints(space, text)]


@pytest.mark.parametrize("values", ["[1, 1]", '[1, "1"]', '["0.5", 0.50]'])
def test_a_matrix_that_makes_a_name_twice_is_refused(space: Space, values: str):
    """
    Values that are written the same make the same name.
    """
    text = HEAD + f'[step."mix-{{n}}"]\nformula = "A"\nmatrix = {{ n = {values} }}\n'
    [(line, what, _)] = complaints(space, text)
    assert 5 == line
    assert "is made twice" in what


def test_a_matrix_that_makes_the_name_of_another_step_is_refused(space: Space):
    """
    Both tables are named.
    """
    text = HEAD + '[step.mix-1]\nformula = "A"\n[step."mix-{n}"]\nformula = "A"\nmatrix = { n = [1] }\n'
    assert [(7, "step `mix-1` is made twice, by `mix-1` and by `mix-{n}`", "")] == complaints(space, text)


def test_matrices_together_stay_within_the_limit(space: Space):
    """
    A recipe is refused when its matrices together would fill memory, and not only when one would.
    """
    table = '[step."mix{k}-{{n}}-{{m}}"]\nformula = "A"\nmatrix = {{ n = {values}, m = {values} }}\n'
    text = HEAD + "".join(table.format(k=k, values=list(range(90))) for k in range(3))
    with pytest.raises(RecipeError, match="at most 10000"):
        read(space, text)


def test_editors_are_offered_what_is_read():
    """
    The JSON Schema of a recipe lists the fields that are read, each with what it means.
    """
    schema = RecipeTable.model_json_schema()
    for name in ("SourceTable", "Defaults", "StepTable"):
        fields = schema["$defs"][name]["properties"]
        assert [] == [field for field, about in fields.items() if not about.get("description")]
    assert "additionalProperties" in json.dumps(schema)
