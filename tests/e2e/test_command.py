"""The command line as a person meets it: results, errors, exit codes, progress."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import checkpoints
import pytest
from conftest import PAIR, Space


def test_a_finished_build_never_imports_torch(space: Space):
    """
    When every key is in the store, sdbuild answers without importing torch, whatever the methods are.
    """
    space.pair(PAIR.replace('formula = "0.3 * A + 0.7 * B"', 'method = "ties"\nbase = "A"\nmodels = ["B"]\ndensity = 0.5'))
    first = space.sdbuild("recipe.toml", python=("-X", "importtime"))
    again = space.sdbuild("recipe.toml", python=("-X", "importtime"))

    assert "torch" in first.stderr
    assert "torch" not in again.stderr
    assert again.stdout.splitlines()[-1] == "nothing to do: 1 artifact up to date"


def test_results_and_progress_go_separate_ways(space: Space):
    """
    Results are on stdout, progress and notes on stderr, and --quiet says neither.
    """
    space.pair()
    quiet = space.sdbuild("recipe.toml", "--quiet", "--store", "other", "--out", "elsewhere")
    loud = space.sdbuild("recipe.toml")

    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert loud.stdout.startswith("mix  built")
    assert loud.stderr.startswith("reading sources (")


def test_json_is_one_document(space: Space):
    """
    --json prints one document, for results as for errors.
    """
    space.pair()
    run = space.sdbuild("recipe.toml", "--json")
    [artifact] = json.loads(run.stdout)["reports"][0]["artifacts"]
    failed = space.sdbuild("nowhere.toml", "--json")

    assert (artifact["state"], artifact["path"], artifact["manifest"]) == ("built", "out/mix.safetensors", "out/mix.manifest.toml")
    assert json.loads(failed.stdout)["error"] == {"exit": 2, "issues": [{"where": "nowhere.toml", "what": "there is no such recipe", "hint": ""}]}
    assert failed.returncode == 2


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nowhere.toml"], 2, "error: nowhere.toml: there is no such recipe\n"),
        (["recipe.toml", "--jbos", "2"], 2, "error: no such option '--jbos'"),
        (["bild", "recipe.toml"], 2, "error: bild: there is no such recipe"),
        (["recipe.toml", "--jobs", "0"], 2, "error: invalid value for '--jobs': 0 is not in the range 1<=x<=256"),
        (["recipe.toml", "--only", "mxi"], 2, "hint: did you mean `mix`?"),
        (["recipe.toml", "--only", "inner"], 2, "error: recipe.toml:11: step `inner` is not an artifact: other steps use it"),
        (["inspect", "nowhere.safetensors"], 2, "error: nowhere.safetensors: there is no such file\n"),
        (["inspect", "recipe.toml"], 4, "error: recipe.toml: the header claims"),
        (["inspect", "."], 4, "error: .: is not a regular file"),
        (["."], 2, "error: no such command '.'"),
        (["recipe.toml", "--out", "recipe.toml"], 2, "error: invalid value for '--out'"),
        (["recipe.toml", "--store", "blocked/store"], 1, "error: blocked"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_said_in_one_line_without_a_traceback(space: Space, args, code, message):
    """
    A person's mistake ends with the right exit code, where, what and a hint, and no traceback.
    """
    space.pair(PAIR.replace("[step.mix]", '[step.inner]\nformula = "0.5 * A + 0.5 * B"\n[step.mix]').replace("0.7 * B", "0.7 * inner"))
    space.write("blocked", "a file where a folder should be")
    run = space.sdbuild(*args)

    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.returncode == code
    assert not (space.path / "out").exists()


def test_a_recipe_stands_for_build(space: Space):
    """
    `sdbuild RECIPE`, `sdbuild build RECIPE` and options in front of the recipe are the same.
    """
    space.write("recipe.toml", PAIR)

    assert space.sdbuild("--rehearse", "recipe.toml").returncode == 0
    assert "nothing to do" in space.sdbuild("build", "recipe.toml", "--rehearse=tiny").stdout
    assert "nothing to do" in space.sdbuild("recipe.toml", "--rehearse", "--jobs", "1").stdout


def test_rehearsals_keep_to_themselves(space: Space):
    """
    A rehearsal has its own store and out folder, marks its artifacts, and ignores pins it cannot meet.
    """
    space.write("recipe.toml", PAIR.replace('path = "A.safetensors"', f'filename = "A.safetensors"\nsize = 5\nsha256 = "{"ab" * 32}"'))
    [artifact] = space.reports("recipe.toml", "--rehearse")
    shown = space.sdbuild("inspect", artifact["path"]).stdout

    assert artifact["path"] == "cache/rehearsal/out/mix.safetensors"
    assert sorted(p.name for p in space.path.iterdir()) == ["cache", "recipe.toml"]
    assert "sdbuild.rehearsal = tiny" in shown


def test_two_recipes_build_one_after_the_other(space: Space):
    """
    Several recipes make several reports; two artifacts of one name are refused before either is built.
    """
    space.pair()
    space.write("other.toml", PAIR.replace("step.mix", "step.other"))
    space.write("again.toml", PAIR.replace("step.mix", "step.MIX"))
    both = space.sdbuild("recipe.toml", "other.toml")
    clash = space.sdbuild("recipe.toml", "again.toml", "--out", "fresh")

    assert both.returncode == 0
    assert sorted(p.name for p in (space.path / "out").glob("*.safetensors")) == ["mix.safetensors", "other.safetensors"]
    assert (clash.returncode, (space.path / "fresh").exists()) == (2, False)
    assert "artifact `MIX` is also made by recipe.toml" in clash.stderr


def test_keep_going_reports_what_failed_and_builds_the_rest(space: Space):
    """
    With --keep-going the exit code is that of the first failure, and the rest is there.
    """
    space.pair(PAIR + '\n[source.C]\npath = "C.safetensors"\n[step.gone]\nformula = "0.5 * A + 0.5 * C"\n')
    run = space.sdbuild("recipe.toml", "--keep-going")

    assert run.returncode == 5
    assert "gone  blocked" in run.stdout
    assert "mix   built" in run.stdout
    assert "there is no file `C.safetensors` beside the recipe" in run.stderr


def test_dry_run_and_explain_agree_and_build_nothing(space: Space):
    """
    --dry-run names each artifact's fate, the fact that changed, and the bytes; nothing is written but the memo.
    """
    space.pair()
    space.sdbuild("recipe.toml")
    space.edit("0.3 * A + 0.7 * B", "0.2 * A + 0.8 * B")
    before = sorted(space.path.rglob("*.safetensors"))
    dry = space.sdbuild("recipe.toml", "--dry-run")
    wet = space.sdbuild("recipe.toml", "--explain")

    size = sum(t.nbytes for t in checkpoints.miniature("sd1", "A", every=40).values())
    reason = "    param.formula = 0.3 * A + 0.7 * B → 0.2 * A + 0.8 * B"
    assert dry.stdout.splitlines()[:2] == ["mix  build", reason]
    assert dry.stdout.splitlines()[-1].startswith(f"1 artifact to make: {2 * size / 1000:.3g} kB to read, ")
    assert wet.stdout.splitlines()[1] == reason
    assert len(before) < len(sorted(space.path.rglob("*.safetensors")))


def test_a_terminal_gets_a_bar_with_speed_and_time_left(space: Space):
    """
    On a terminal, progress names the artifact, and shows a bar, a speed and the time left.
    """
    space.pair(every=5)
    leader, follower = pty.openpty()
    env = {key: value for key, value in os.environ.items() if not key.startswith("SDBUILD_")} | {"TERM": "xterm-256color", "COLUMNS": "120"}
    child = subprocess.Popen(
        [sys.executable, "-m", "sdmerge_build", "recipe.toml"], cwd=space.path, stdout=subprocess.PIPE, stderr=follower, env=env, text=True
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    stdout, _ = child.communicate(timeout=60)
    os.close(leader)

    assert child.returncode == 0
    assert stdout.startswith("mix  built")
    assert b"reading sources" in shown
    assert b"mix" in shown
    assert b"/s" in shown


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", "CON", "nul.txt", "x.", "C:x", "a\\\\b", "x" * 129, "a\\u0000b", "é"])
def test_names_that_could_leave_the_folder_are_refused(space: Space, name):
    """
    A step's name is a file's name, so it is refused when some system would take it for something else.
    """
    space.pair(PAIR.replace("[step.mix]", f'[step."{name}"]'))
    run = space.sdbuild("recipe.toml")

    assert run.returncode == 2
    assert "cannot be the name of a step" in run.stderr
    assert not (space.path / "out").exists()
