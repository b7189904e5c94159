"""A shelf of bad recipes: each begins with what it must be told, `# expected: …`, and is told it with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdmerge_build.cli import _run
from sdmerge_build.errors import RecipeError
from sdmerge_build.plan import plan_recipe
from sdmerge_build.recipe import read_recipe

FOLDER = Path(__file__).with_name("recipes") / "bad"
SHELF = sorted(FOLDER.glob("*.toml"))
LINELESS = {"duplicate-field", "no-artifacts", "no-steps"}
"""Mistakes that stand on no line."""


def expected_of(recipe: Path) -> list[str]:
    """Read the comments at the top of a bad recipe."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("# expected: ") for line in lines if line.startswith("# expected: ")]


def test_the_shelf_is_full():
    """
    There are many ways to be wrong, and each recipe on the shelf says what it expects.
    """
    assert len(SHELF) >= 60
    assert [] == [recipe.name for recipe in SHELF if not recipe.read_text(encoding="utf-8").startswith("# expected: ")]


@pytest.mark.parametrize("recipe", SHELF, ids=lambda recipe: recipe.stem)
def test_a_bad_recipe_is_told_what_is_wrong_and_where(recipe: Path):
    """
    Every complaint names the file, nearly every one the line; what is expected is among them, and all have exit code 2.
    """
    with pytest.raises(RecipeError) as caught:
        plan_recipe(read_recipe(recipe))

    told = "\n".join(str(issue) for issue in caught.value.issues)
    assert [] == [text for text in expected_of(recipe) if text not in told], told
    assert 2 == caught.value.exit_code
    place = re.escape(str(recipe)) + (r"(:\d+)?" if recipe.stem in LINELESS else r":\d+")
    assert [] == [issue for issue in caught.value.issues if not re.fullmatch(place, issue.where)]


@pytest.mark.parametrize("recipe", SHELF, ids=lambda recipe: recipe.stem)
def test_a_complaint_has_the_grammar_of_messages(recipe: Path):
    """
    A message is one line, begins in lower case or with a quoted word, ends without a stop, is told once, and shows no Python.
    """
    with pytest.raises(RecipeError) as caught:
        plan_recipe(read_recipe(recipe))

    whats = [issue.what for issue in caught.value.issues]
    assert len(set(caught.value.issues)) == len(whats)
    for what in whats:
        assert re.match(r"[a-z`]", what), what
        assert not re.search(r"\.$|\n|instance of|Traceback|None\b|<class", what), what


@pytest.mark.parametrize("recipe", SHELF, ids=lambda recipe: recipe.stem)
def test_a_bad_recipe_leaves_nothing_behind(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """
    The command ends with exit code 2, says why on stderr alone, and has made no file and no folder.
    """
    monkeypatch.chdir(tmp_path)
    code = _run([str(recipe)])

    said = capsys.readouterr()
    assert 2 == code
    assert "" == said.out
    assert said.err.startswith("error: ")
    assert "BUG" not in said.err
    assert [] == list(tmp_path.iterdir())
