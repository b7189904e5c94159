"""Surroundings that lie: files that change, pipes where files should be, edited state, closed streams. One clear line, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import checkpoints
import pytest
from conftest import PAIR, Space, digests, states

from sdmerge_build.errors import IntegrityError
from sdmerge_build.events import Silent
from sdmerge_build.prepare import Options
from sdmerge_build.supply import Reach


def run(space: Space, *args: str, **options) -> subprocess.CompletedProcess:
    """Run the command, which must neither hang nor show a traceback."""
    done = space.sdbuild(*args, **options)
    assert "Traceback" not in done.stderr + done.stdout
    assert "BUG" not in done.stderr + done.stdout
    return done


class Meddler(Silent):
    """A watcher that changes a source as soon as it has been read."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def finished(self) -> None:
        """Write other numbers into the file that was just hashed, once."""
        if self.space:
            self.space.checkpoint("A", checkpoints.miniature("sd1", "other", every=40))
            self.space = None


def test_a_source_changed_between_reading_and_merging_is_refused(space: Space):
    """
    The key of the old bytes never gets the new ones: the build ends with exit code 4, and nothing is stored.
    """
    from sdmerge_build.build import build

    space.pair()
    options = Options(store=space.path / "cache", out=space.path / "out", reach=Reach(jobs=2, offline=True))
    with pytest.raises(IntegrityError, match="changed while it was being merged"):
        build(space.path / "recipe.toml", options, Meddler(space))

    assert list((space.path / "cache").rglob("model.safetensors")) == []


@pytest.mark.parametrize("name", ["mix.manifest.toml", "mix.safetensors"])
def test_nothing_takes_the_place_of_the_recipe(space: Space, name):
    """
    A manifest or artifact that would be written over the recipe is refused before anything is written.
    """
    space.pair()
    text = (space.path / "recipe.toml").read_text()
    (space.path / name).write_text(text)
    done = run(space, "build", name, "--out", ".")

    assert done.returncode == 2
    assert "which is the recipe" in done.stderr
    assert (space.path / name).read_text() == text


def stored(space: Space):
    """The one model in the store."""
    [model] = (space.path / "cache" / "artifacts").rglob("model.safetensors")
    return model


@pytest.mark.parametrize("place", [20, -1], ids=["header", "data"])
def test_bits_that_rot_in_the_store_are_merged_again(space: Space, place):
    """
    A stored file that went bad without its time changing is noticed when its tensors are used again, and replaced.
    """
    space.pair()
    space.build()
    model = stored(space)
    data = bytearray(model.read_bytes())
    data[place] ^= 1
    status = model.stat()
    model.chmod(0o644)
    model.write_bytes(data)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    space.edit("[step.mix]", '[step.mix]\ntitle = "Other"')
    report = space.build()

    assert states(report) == {"mix": "built"}
    assert digests(report) == digests(space.build(store=space.path / "fresh", out=space.path / "fresh-out"))


def test_a_manifest_follows_the_recipe_to_a_new_name(space: Space):
    """
    The command a manifest gives is that of the recipe it was last built from.
    """
    space.pair()
    run(space, "recipe.toml")
    (space.path / "recipe.toml").rename(space.path / "renamed.toml")
    done = run(space, "renamed.toml")

    assert "mix  up to date" in done.stdout
    assert 'command = "sdbuild renamed.toml --only mix"' in (space.path / "out" / "mix.manifest.toml").read_text()


@pytest.mark.parametrize("where", ["cache/digests.json", "out/mix.manifest.toml", "trace"])
def test_a_pipe_in_place_of_state_does_not_hang(space: Space, where):
    """
    A FIFO where a file should be is not waited for.
    """
    space.pair()
    space.build()
    path = stored(space).with_name("trace.json") if where == "trace" else space.path / where
    path.unlink()
    os.mkfifo(path)

    assert run(space, "recipe.toml").returncode == 0


TRACES = [
    {"size": 1e400},
    {"size": "1"},
    {"versions": None},
    {"versions": {"torch": 3}},
    {"sha256": "\ud800" * 64},
    {"header_size": -1},
    {"mtime_ns": None},
]


@pytest.mark.parametrize("change", TRACES, ids=str)
def test_traces_of_wrong_types_are_a_miss(space: Space, change):
    """
    A trace that somebody edited is not believed, whatever is in it.
    """
    space.pair()
    before = digests(space.build())
    trace = stored(space).with_name("trace.json")
    trace.write_text(json.dumps(json.loads(trace.read_text()) | change))
    report = space.build()

    assert (states(report), digests(report)) == ({"mix": "built"}, before)


@pytest.mark.parametrize("change", [{"tensors": 3}, {"tensors": None}, {"tensors": "\ud800" * 64}, {"sha256": 5}, {"more": 1}], ids=str)
def test_memos_of_wrong_types_are_forgotten(space: Space, change):
    """
    A memo that somebody edited only costs a second reading.
    """
    space.pair()
    space.build()
    memo = space.path / "cache" / "digests.json"
    table = json.loads(memo.read_text())
    for entry in table["files"].values():
        entry["digests"] |= change
    memo.write_text(json.dumps(table))

    assert states(space.build()) == {"mix": "reused"}


MANIFESTS = [
    "artifact = 1",
    "[artifact]\nkey = 3",
    '[[source]]\nname = 1\n[[step]]\nname = "mix"\nfacts = 3',
    '[[step]]\nname = "mix"\nkey = "k"\nfacts = { a = 1 }\ninputs = 3',
    '[[step]]\nname = "mix"\nkey = "k"\nfacts = { "param.formula" = "[0]" }\ninputs = { '
    + ", ".join(f'"{n}" = "{f"[{n + 1}]" * 10}"' for n in range(12))
    + " }",
    "a." * 20_000 + "b = 1",
    "\x00",
]


@pytest.mark.parametrize("text", MANIFESTS, ids=lambda text: text[:30])
def test_manifests_of_wrong_types_explain_nothing_and_harm_nothing(space: Space, text):
    """
    A manifest in the out folder that somebody edited is no manifest; the next run writes a good one.
    """
    space.pair()
    space.build()
    space.edit("0.3 * A", "0.2 * A")
    (space.path / "out" / "mix.manifest.toml").write_text(text)
    dry = run(space, "recipe.toml", "--dry-run")
    done = run(space, "recipe.toml", "--explain")

    assert (dry.returncode, done.returncode) == (0, 0)
    assert (space.path / "out" / "mix.manifest.toml").read_text().startswith("# Written by sdbuild")


@pytest.mark.parametrize("name", ["HOST-²-x", "HOST-99999999999999999999-x", "HOST--x", "no-number", "x"])
def test_odd_folders_among_the_partial_ones_are_left_alone(space: Space, name):
    """
    Sweeping up after killed builds does not stumble over names it does not know.
    """
    from sdmerge_build import files

    space.pair()
    folder = space.path / "cache" / "partial" / name.replace("HOST", files._host())
    folder.mkdir(parents=True)
    space.build()

    assert folder.exists()


BAD = [
    ('formula = "0.3 * A + 0.7 * B"', f'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = 0x{"f" * 6000}', 2),
    ('path = "B.safetensors"', f'path = "B.safetensors"\nsize = 0x{"f" * 6000}', 2),
    ("recipe = 1", f"recipe = 0x{'f' * 6000}", 2),
    ("0.3 * A", f"{'1' * 5000} * A", 2),
    ("0.3 * A", "*".join(["7e999"] * 1600) + " * A", 2),
    ("0.3 * A", "-" * 9000 + "A", 2),
    ('path = "B.safetensors"', 'path = "B.safetensors"\npermissions = { d = 1979-05-27 }', 2),
    ('path = "B.safetensors"', 'path = "~nosuchuser/x.safetensors"', 5),
    ('path = "B.safetensors"', f'path = "{"x" * 5000}"', 5),
    ("[step.mix]", '[step.mix]\ndtype = "' + "x" * 9000 + '"', 2),
]


@pytest.mark.parametrize(("old", "new", "code"), BAD, ids=lambda value: str(value)[:40])
def test_recipes_that_are_only_there_to_break_something(space: Space, old, new, code):
    """
    Numbers without end, depths without end and paths nobody has end with the right exit code and a short message.
    """
    space.pair(PAIR.replace(old, new))
    done = run(space, "recipe.toml")

    assert done.returncode == code
    assert len(done.stderr) < 12_000


def test_halves_of_characters_in_a_parent_do_not_stop_a_build(space: Space):
    """
    Lineage that JSON can spell and UTF-8 cannot hold is carried on with its bad signs replaced.
    """
    claim = '{"' + "aa" * 32 + '": {"name": "half \\ud800", "sd_merge_recipe": "\\udc00"}}'
    lineage = '{"sources": [{"name": "\\ud800"}], "steps": [{"name": "\\ud800", "facts": {"param.x": "[0]"}, "inputs": {"0": "' + "[0]" * 10 + '"}}]}'
    space.pair()
    space.checkpoint("B", checkpoints.miniature("sd1", "B", every=40), {"sd_merge_models": claim, "sdbuild.lineage": lineage, "k\x1b[2J": "v\n"})

    assert run(space, "recipe.toml").returncode == 0
    assert "\x1b" not in run(space, "inspect", "B.safetensors").stdout
    assert json.loads(run(space, "inspect", "B.safetensors", "--json").stdout)["claims"]["ancestors"]


@pytest.mark.parametrize(
    "shell",
    [
        "{} recipe.toml >&-",
        "{} recipe.toml 2>&-",
        "{} recipe.toml >&- 2>&-",
        "{} recipe.toml --json > /dev/full",
        "{} inspect A.safetensors 2> /dev/full",
        "{} recipe.toml | head -c 1",
    ],
)
def test_closed_and_full_streams(space: Space, shell):
    """
    Output that nobody can receive is no reason for a traceback, and the work is done all the same.
    """
    space.pair()
    command = shell.format(f"{sys.executable} -m sdmerge_build")
    done = subprocess.run(["bash", "-c", command], cwd=space.path, capture_output=True, text=True, check=False, timeout=100)

    assert "Traceback" not in done.stdout + done.stderr
    assert "BUG" not in done.stdout + done.stderr
    assert "inspect" in shell or (space.path / "out" / "mix.safetensors").exists()


def test_signs_that_a_terminal_cannot_show_are_numbers(space: Space):
    """
    Where the output's encoding has no arrow, the arrow is spelled out.
    """
    space.pair()
    run(space, "recipe.toml")
    space.edit("0.3 * A", "0.2 * A")
    done = run(space, "recipe.toml", "--dry-run", env={"PYTHONIOENCODING": "cp1252"})

    assert "\\u2192" in done.stdout


def test_without_numpy_nothing_is_said_of_it(space: Space):
    """
    Torch's complaint about numpy, which is not needed, does not reach the person.
    """
    space.pair()
    code = "import sys; sys.modules['numpy'] = None; from sdmerge_build.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "recipe.toml", "--quiet"], cwd=space.path, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_torch_that_cannot_be_loaded_is_said_in_one_line(space: Space):
    """
    A broken torch is a sentence and exit code 1.
    """
    space.pair()
    code = "import sys; sys.modules['torch'] = None; from sdmerge_build.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "recipe.toml"], cwd=space.path, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "error: torch cannot be loaded: " in done.stderr
    assert "Traceback" not in done.stderr


def test_several_recipes_say_what_was_built_before_one_failed(space: Space):
    """
    With --json and several recipes, the document holds the reports of those that were built, and the error.
    """
    space.pair()
    space.write("bad.toml", PAIR.replace("[step.mix]", "[step.other]").replace('path = "B', 'path = "Z'))
    done = run(space, "recipe.toml", "bad.toml", "--json")
    document = json.loads(done.stdout)

    assert done.returncode == 5
    assert [report["artifacts"][0]["state"] for report in document["reports"]] == ["built"]
    assert document["error"]["exit"] == 5
