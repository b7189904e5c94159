"""README and help texts, executed: every command shown is run, every method and option is there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import checkpoints
import jsonschema
import pytest
from conftest import Space
from hubs import HubFile, Hubs

from sdmerge_build.cli import sdbuild
from sdmerge_build.methods import methods
from sdmerge_build.methods.documentation import documentation_of, table
from sdmerge_build.plan import plan_recipe
from sdmerge_build.recipe import Defaults, SourceTable, StepTable, read_recipe
from sdmerge_build.schema import SCHEMA_FILE, recipe_schema, schema_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SESSIONS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


def expected(shown: str) -> str:
    """Turn what README shows into a pattern: seconds vary, and `…` stands for anything."""
    pattern = re.escape(shown).replace(re.escape("…"), ".*")
    return re.sub(r"in\\ \d+\\\.\d\\ s", r"in \\d+\\.\\d s", pattern)


def test_the_commands_shown_in_readme_do_what_it_shows(space: Space):
    """README's sessions, run one after the other in a folder with the recipes, print what README says they print."""
    shutil.copytree(ROOT / "recipes", space.path / "recipes")
    for n, session in enumerate(SESSIONS):
        if n == 1:  # README says to change the recipe between the first session and the second
            recipe = space.path / "recipes" / "estrilda.toml"
            recipe.write_text(recipe.read_text(encoding="utf-8").replace("alpha = 0.65", "alpha = 0.6"), encoding="utf-8")
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE):
            arguments = shlex.split(command)
            if arguments[0] == "sdbuild":
                arguments = [sys.executable, "-m", "sdmerge_build", *arguments[1:]]
            run = subprocess.run(arguments, cwd=space.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", check=True)

            assert re.fullmatch(expected(shown), run.stdout, re.DOTALL), f"{command} printed:\n{run.stdout}"


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", README, re.DOTALL), ids=lambda block: block.split("\n")[0][:30])
def test_every_recipe_fragment_in_readme_is_read(space: Space, block):
    """Whole recipes and fragments shown in README are accepted as they are."""
    if not block.startswith("recipe"):
        names = {"A", "B", "C", "viewer-mix", "MeinaPastel"}
        sources = "".join(f'[source.{name}]\npath = "{name}.safetensors"\n' for name in sorted(names))
        block = f'[step.shown]\nmethod = "weighted_sum"\na = "A"\nb = "B"\n{block}' if block.startswith("alpha") else block
        top = block if block.startswith("methods") else ""
        block = '[step.shown]\nmethod = "soft_mix"\na = "A"\nb = "B"\nalpha = { base = 0.5, blocks = { M00 = 1 } }\n' if top else block
        block = f'recipe = 1\narchitecture = "sd1"\n{top}{sources}{block}'
        space.write("my_methods.py", re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0])

    assert plan_recipe(read_recipe(space.write("shown.toml", block))).wanted


def test_the_table_of_methods_is_that_of_the_program():
    """README's table holds every method with its fields and the first line of its docstring."""
    shown = README.partition("<!-- methods: `python -m sdmerge_build.methods.documentation` -->\n")[2].partition("\n\n")[0]

    assert f"{shown}\n" == table()


def test_every_field_and_option_is_documented():
    """What README does not mention does not exist."""
    fields = {*SourceTable.model_fields, *Defaults.model_fields, *StepTable.model_fields, "matrix"}
    options = {
        option for command in sdbuild.commands.values() for parameter in command.params for option in parameter.opts if option.startswith("--")
    }
    missing = [word for word in sorted(fields | options) if f"`{word}" not in README and f"{word} " not in README]

    assert missing == []


def test_every_command_and_option_has_help(space: Space):
    """Each command's help says what it is for, and each option's what it does."""
    for name, command in sdbuild.commands.items():
        run = space.sdbuild(name, "--help")
        assert run.returncode == 0
        assert command.help
        assert command.help.split("\n\n")[0].split() == run.stdout.split("\n\n")[1].split()
        assert all(getattr(parameter, "help", None) for parameter in command.params if parameter.param_type_name == "option")


def test_the_way_to_build_with_owned_models_works(space: Space):
    """
    README's lines for building with the models one has, run as they are, find the models and build.
    """
    [block] = [text for text in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "SDBUILD_MODELS" in text]
    text = (ROOT / "recipes" / "estrilda.toml").read_text(encoding="utf-8")
    for name, source in tomllib.loads(text)["source"].items():
        folder = space.path / "stable-diffusion-webui" / "models" / "Stable-diffusion" / "mine"
        data = checkpoints.write(folder / source["filename"], checkpoints.miniature("sd1", name, every=50)).read_bytes()
        text = text.replace(str(source["size"]), str(len(data))).replace(source["sha256"], hashlib.sha256(data).hexdigest())
    space.write("recipes/estrilda.toml", text)
    env = os.environ | {"HOME": str(space.path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-e", "-c", block], cwd=space.path, env=env, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (space.path / "out").glob("*.safetensors")) == [f"EstrildaMix{n}.safetensors" for n in ("", 2, 3)]


def test_the_way_to_lock_and_download_works(space: Space, hubs: Hubs):
    """
    README's lines for locking, building, fetching and building offline, run as they are, download both parents once.
    """
    [block] = [text for text in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "sdbuild lock" in text]
    text = (ROOT / "recipes" / "estrilda.toml").read_text(encoding="utf-8")
    for n, (name, source) in enumerate(tomllib.loads(text)["source"].items()):
        path = checkpoints.write(space.path / "elsewhere", checkpoints.miniature("sd1", name, every=50))
        data = path.read_bytes()
        path.unlink()
        text = text.replace(str(source["size"]), str(len(data))).replace(source["sha256"], hashlib.sha256(data).hexdigest())
        model, version = re.findall(r"\d+", source["uri"])
        hubs.civitai(int(model), int(version), HubFile(id=n, name=source["filename"], data=data))
    space.write("recipes/estrilda.toml", text)
    mirrors = {"SDBUILD_CIVITAI_URL": hubs.url, "HF_ENDPOINT": hubs.cdn_url}  # named by their owner, so private addresses are in order
    env = os.environ | mirrors | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-e", "-c", block], cwd=space.path, env=env, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stderr.count("fetching viewer-mix, MeinaPastel") == 1
    assert run.stdout.endswith("nothing to do: 3 artifacts up to date\n")
    assert "allowDerivatives = true" in (space.path / "recipes" / "estrilda.lock").read_text(encoding="utf-8")


def test_the_download_benchmark_runs():
    """
    The download benchmark's one command measures and checks, tried here on a tiny file.
    """
    assert "`python tests/bench/download.py`" in README
    command = [sys.executable, str(ROOT / "tests" / "bench" / "download.py"), "--size", "tiny", "--rounds", "1", "--as-found"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| sdbuild fetch, ") == 2


def test_the_benchmark_runs(space: Space):
    """
    The benchmark's one command measures every program and checks what they made, tried here on tiny files.
    """
    assert "`python tests/bench/run.py`" in README
    command = [sys.executable, str(ROOT / "tests" / "bench" / "run.py"), "--size", "tiny", "--as-found", "--rounds", "1", "--folder", str(space.path)]
    run = subprocess.run(command, cwd=space.path, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| sdbuild, ") == 5


def test_the_benchmark_of_methods_runs(space: Space):
    """
    Its one command measures every program and checks what they made, tried here on tiny files and without the other tools.
    """
    assert "`python tests/bench/methods.py`" in README
    command = [sys.executable, str(ROOT / "tests" / "bench" / "methods.py"), "--size", "tiny", "--as-found", "--rounds", "1", "--methods", "ties"]
    run = subprocess.run([*command, "--folder", str(space.path)], cwd=space.path, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert "ties" in run.stdout


def test_methods_lists_and_describes(space: Space):
    """`sdbuild methods` prints every method, and one method's fields on request."""
    listed = space.sdbuild("methods").stdout
    described = space.sdbuild("methods", "weighted_sum").stdout

    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")] == list(methods())
    assert "  alpha  a number, or a table over blocks and tensor names; 0.5 unless said\n         how much of `b`." in described
    assert "Elsewhere: supermerger" in described
    assert space.sdbuild("methods", "wieghted_sum").stderr == "error: there is no method `wieghted_sum`\n\nhint: did you mean `weighted_sum`?\n"


@pytest.mark.parametrize("name", methods())
def test_every_method_is_explained(name):
    """Each says what it does with its formula, what each parameter is, where it comes from and how it is called elsewhere."""
    method = methods()[name]
    said = documentation_of(method)

    assert re.fullmatch(r"[A-Z].*[.`]", said.title)
    assert said.origin
    assert said.elsewhere
    assert set(said.parameters) == set(method.parameters)
    assert not {*method.roles, *method.parameters} & set(StepTable.model_fields)


def test_the_schema_is_that_of_the_models():
    """recipe.schema.json is what the models that read recipes say; `python -m sdmerge_build.schema` writes it."""
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_every_recipe(path):
    """Editors find nothing wrong with the recipes that come with the project; to them a date of TOML is text, as JSON has no dates."""
    recipe = json.loads(json.dumps(tomllib.loads(path.read_text(encoding="utf-8")), default=str))
    jsonschema.validate(recipe, recipe_schema())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("formula", "formulla"),
        ('architecture = "sd1"', 'architecture = "sd9"'),
        ("recipe = 1", "recipe = 2"),
        ("size     =", "sise     ="),
        ("alpha = 0.65", "alpha = true"),
    ],
)
def test_the_schema_refuses_what_the_program_refuses(space: Space, old, new):
    """A mistake that sdbuild reports is one that editors underline."""
    text = (ROOT / "recipes" / "estrilda.toml").read_text(encoding="utf-8").replace(old, new)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(text), recipe_schema())

    assert space.sdbuild(space.write("bad.toml", text)).returncode == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_rehearsed_twice(space: Space, path):
    """Each recipe of the project is built on stand-ins, and the second time there is nothing to do."""
    first = space.reports(str(path), "--rehearse")
    second = space.sdbuild(path, "--rehearse")

    assert {artifact["state"] for artifact in first} == {"built"}
    assert "nothing to do" in second.stdout
    for artifact in first:
        text = Path(space.path, artifact["manifest"]).read_text(encoding="utf-8")
        assert tomllib.loads(text)["artifact"]["rehearsal"] == "tiny"


def test_inspect_shows_what_a_file_is(space: Space):
    """`sdbuild inspect` reads any checkpoint, and says the digests that other tools know it by."""
    path = space.checkpoint("A", checkpoints.miniature("sdxl", "A", every=30), {"format": "pt", "modelspec.title": "A \x1b[31mred\x1b[0m title"})
    facts = json.loads(space.sdbuild("inspect", path, "--json").stdout)
    shown = space.sdbuild("inspect", path).stdout

    assert (facts["architecture"], facts["sha256"]) == ("sdxl", hashlib.sha256(path.read_bytes()).hexdigest())
    assert facts["tensors"] == sum(part["tensors"] for part in facts["components"].values())
    assert "\x1b" not in shown
    assert facts["sha256"][:10] in shown


def test_inspect_shows_the_lineage_that_sdbuild_wrote(space: Space):
    """An artifact inspected by itself tells its sources and steps."""
    space.pair()
    space.build()
    shown = space.sdbuild("inspect", "out/mix.safetensors").stdout

    assert "source  A  licence not said" in shown
    assert "step    mix  formula@1  formula = 0.3 * A + 0.7 * B" in shown
