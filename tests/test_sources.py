"""Finding sources: by path, or by name, size and digest among the models a person already owns."""

from __future__ import annotations

import hashlib
import os

import blake3
import checkpoints
import pytest
from conftest import Space, states

from sdmerge_build.errors import IntegrityError, RecipeError, SourceError
from sdmerge_build.sources import UriError, page_of
from sdmerge_build.sources.uri import HttpsAddress, parse_uri

RECIPE = """
recipe = 1
architecture = "sd1"

[source.A]
path = "A.safetensors"

[source.B]
{source}

[step.mix]
formula = "0.3 * A + 0.7 * B"
"""


@pytest.fixture
def owned(space: Space):
    """A models folder as other programs keep it, with B deep inside and strangers around it."""
    space.checkpoint("A", checkpoints.miniature("sd1", "A", every=40))
    path = space.checkpoint("models/Stable-diffusion/anime/b-v2", checkpoints.miniature("sd1", "B", every=40))
    space.checkpoint("models/Stable-diffusion/other", checkpoints.miniature("sd1", "other", every=40))
    (space.path / "models" / "notes.txt").write_text("not a model")
    (space.path / "models" / "broken.safetensors").write_bytes(b"junk")
    data = path.read_bytes()
    space.facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "blake3": blake3.blake3(data).hexdigest()}
    return space


def pinned(space: Space, *pins: str, **others: str) -> None:
    """Write the recipe with some of the facts as pins."""
    lines = [f'{pin} = "{space.facts[pin]}"' if pin != "size" else f"size = {space.facts[pin]}" for pin in pins]
    space.write("recipe.toml", RECIPE.format(source="\n".join([*lines, *(f'{k} = "{v}"' for k, v in others.items())])))


@pytest.mark.parametrize("pins", [("sha256",), ("blake3",), ("sha256", "size"), ("sha256", "blake3", "size")], ids=str)
def test_a_source_is_found_by_its_content(owned, pins):
    """A pinned digest finds the file under whatever name it lies in a folder of models."""
    pinned(owned, *pins)

    assert states(owned.build(models=(owned.path / "models",))) == {"mix": "built"}


def test_a_source_is_found_by_its_name(owned):
    """A file name finds the file below a folder of models; upper and lower case do not count."""
    pinned(owned, filename="B-v2.safetensors")

    assert states(owned.build(models=(owned.path / "models",))) == {"mix": "built"}


def test_a_renamed_file_is_found_by_its_digest_all_the_same(owned):
    """
    A file name says where to look first; when it is not there, the digest finds the file under another name.
    """
    pinned(owned, "sha256", filename="as-it-was-called.safetensors")

    assert states(owned.build(models=(owned.path / "models",))) == {"mix": "built"}


def test_a_path_that_is_not_there_falls_back_to_the_pins(owned):
    """
    Where a source has a path and pins, and the path leads nowhere, the pins find the file.
    """
    pinned(owned, "sha256", path="gone.safetensors")

    assert states(owned.build(models=(owned.path / "models",))) == {"mix": "built"}


def test_many_files_of_one_size_are_counted_and_not_listed(owned):
    """
    Strangers that only share the size of a missing source are one line, not one each.
    """
    pinned(owned, "size", sha256="ab" * 32)
    with pytest.raises(SourceError) as caught:
        owned.build(models=(owned.path / "models",))

    assert len(caught.value.issues) == 1
    assert "2 other files in the folders of models could have been it, and are not" in str(caught.value)


def test_a_name_with_other_content_is_not_taken(owned):
    """Where name and size fit but the content does not, the file is not taken, and both digests are quoted."""
    pinned(owned, "size", sha256="ab" * 32, filename="b-v2.safetensors")
    with pytest.raises(SourceError) as caught:
        owned.build(models=(owned.path / "models",))

    assert f"its sha256 is {owned.facts['sha256']}, not {'ab' * 32} as pinned" in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_path_with_other_content_is_an_integrity_error(owned):
    """A file at the given path that is not the pinned one is refused, with both digests."""
    owned.write("recipe.toml", RECIPE.format(source=f'path = "models/Stable-diffusion/anime/b-v2.safetensors"\nsha256 = "{"cd" * 32}"\nsize = 3'))
    with pytest.raises(IntegrityError) as caught:
        owned.build()

    assert f"its size is {owned.facts['size']}, not 3 as pinned" in str(caught.value)
    assert f"its sha256 is {owned.facts['sha256']}, not {'cd' * 32}" in str(caught.value)


def test_a_source_that_is_nowhere_says_what_to_do(owned):
    """The message names the page, the file, its size, its sha256, and where to put it; the exit code is 5."""
    owned.write(
        "recipe.toml", RECIPE.format(source=f'uri = "civitai:7813@25845"\nfilename = "viewer.safetensors"\nsize = 2132625462\nsha256 = "{"ef" * 32}"')
    )
    run = owned.sdbuild("recipe.toml")

    assert run.returncode == 5
    assert "recipe.toml:8: source `B` is nowhere to be found" in run.stderr
    for fact in (
        "viewer.safetensors",
        "2132625462 bytes",
        "ef" * 32,
        "https://civitai.com/models/7813?modelVersionId=25845",
        "--models",
        "SDBUILD_MODELS",
    ):
        assert fact in run.stderr
    assert not (owned.path / "out").exists()


def test_the_environment_names_folders_too(owned):
    """SDBUILD_MODELS is searched like --models, and a file is hashed once and remembered."""
    pinned(owned, "sha256")
    env = {"SDBUILD_MODELS": os.pathsep.join([str(owned.path / "models")])}
    first = owned.sdbuild("recipe.toml", env=env)
    second = owned.sdbuild("recipe.toml", env=env)

    assert "reading sources" in first.stderr
    assert "reading sources" not in second.stderr
    assert "nothing to do: 1 artifact up to date" in second.stdout


def test_a_folder_of_models_that_is_not_there_is_an_error(owned):
    """A misspelt folder is not searched in silence."""
    pinned(owned, "sha256")
    run = owned.sdbuild("recipe.toml", "--models", "modles")

    assert (run.returncode, run.stderr) == (2, "error: modles: there is no such folder of models\n")


def test_links_that_run_in_circles_are_walked_once(owned):
    """A folder that links to its own parent does not trap the search."""
    (owned.path / "models" / "loop").symlink_to(owned.path / "models", target_is_directory=True)
    pinned(owned, "sha256")

    assert states(owned.build(models=(owned.path / "models",))) == {"mix": "built"}


def test_a_damaged_source_is_an_integrity_error(space: Space):
    """A source whose header lies is refused with what is wrong, and where the recipe names it."""
    space.pair()
    data = (space.path / "B.safetensors").read_bytes()
    (space.path / "B.safetensors").write_bytes(data[:-100])
    with pytest.raises(IntegrityError) as caught:
        space.build()

    assert "recipe.toml:8: source `B`" in str(caught.value)
    assert "truncated" in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        ("https://example.org/m.safetensors", "https://example.org/m.safetensors"),
        ("civitai:11866@27135", "https://civitai.com/models/11866?modelVersionId=27135"),
        ("civitai:11866@27135#99", "https://civitai.com/models/11866?modelVersionId=27135"),
        ("urn:air:sd1:checkpoint:civitai:11866@27135", "https://civitai.com/models/11866?modelVersionId=27135"),
        ("hf:Meina/MeinaPastel/m v.safetensors@main".replace(" ", "_"), "https://huggingface.co/Meina/MeinaPastel/blob/main/m_v.safetensors"),
        ("recipe:other.toml#step", "recipe:other.toml#step"),
    ],
)
def test_addresses_name_the_page_a_person_would_open(uri, page):
    """Every form of address is read, and says where to look."""
    assert page_of(uri) == page


@pytest.mark.parametrize("uri", ["", "http://example.org/x", "civitai:7813", "hf:owner/file", "file:///etc/passwd", "C:\\models\\x.safetensors"])
def test_other_addresses_are_refused(uri):
    """Plain http, unpinned versions and local files are no addresses."""
    with pytest.raises(UriError):
        page_of(uri)


def test_a_bad_address_in_a_recipe_is_named_with_its_line(space: Space):
    """An address nobody can read is a mistake in the recipe, found before anything else."""
    space.pair()
    space.edit('path = "B.safetensors"', 'uri = "civitai:7813"')
    with pytest.raises(RecipeError, match=r"recipe.toml:9: source `B`: `civitai:7813` is not an address sdbuild knows"):
        space.build()


def test_a_path_that_is_not_there_does_not_blame_other_files(owned):
    """A source whose path leads nowhere is looked for by its digest, and a stranger that is not it is no integrity error."""
    owned.write("recipe.toml", RECIPE.format(source=f'path = "gone.safetensors"\nsha256 = "{"ab" * 32}"'))
    with pytest.raises(SourceError) as caught:
        owned.build(models=(owned.path / "models",))
    pinned(owned, "sha256", path="gone.safetensors")

    assert "there is no file `gone.safetensors` beside the recipe; 3 other files in the folders of models could have been it" in str(caught.value)
    assert states(owned.build(models=(owned.path / "models",))) == {"mix": "built"}


def test_a_folder_without_an_index_says_what_to_name(owned):
    """A folder that is no checkpoint is refused with what would be one."""
    owned.write("recipe.toml", RECIPE.format(source='path = "models"'))
    with pytest.raises(IntegrityError, match="is a folder without a model_index"):
        owned.build()


@pytest.mark.parametrize(
    ("copied", "page"),
    [
        ("https://civitai.com/models/11866?modelVersionId=27135", "https://civitai.com/models/11866?modelVersionId=27135"),
        ("https://www.civitai.com/models/11866/meinapastel?modelVersionId=27135#x", "https://civitai.com/models/11866?modelVersionId=27135"),
        ("https://huggingface.co/a/b/blob/main/c/d.safetensors", "https://huggingface.co/a/b/blob/main/c/d.safetensors"),
        ("https://hf.co/a/b/resolve/v1.0/d.safetensors?download=true", "https://huggingface.co/a/b/blob/v1.0/d.safetensors"),
    ],
)
def test_a_page_copied_from_the_browser_is_what_it_shows(copied, page):
    """The address of a version's or a file's page is read like the scheme's own."""
    assert page_of(copied) == page
    assert not isinstance(parse_uri(copied), HttpsAddress)


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("https://civitai.com/models/11866/meinapastel", "civitai:11866@VERSION"),
        ("https://huggingface.co/Meina/MeinaPastel", "hf:Meina/MeinaPastel/FILE@REVISION"),
        ("civitai:11866", "civitai:11866@VERSION"),
        ("civitai:11866@1#a.safetensors", "the file's number"),
        ("hf:a/b/c.safetensors", "@main"),
        ("http://x.org/y.safetensors", "only https:"),
        ("models/y.safetensors", "is a `path`"),
        ("Civitai:1@2", "small letters"),
    ],
)
def test_a_mistaken_address_is_told_what_was_meant(written, advice):
    """The hint says what to write instead."""
    with pytest.raises(UriError) as caught:
        parse_uri(written)

    assert advice in caught.value.hint


def test_a_page_with_a_token_is_refused_like_any_address_with_one():
    """An address from the browser that holds a secret is not read, and the secret is not quoted."""
    with pytest.raises(UriError) as caught:
        parse_uri("https://civitai.com/models/1?modelVersionId=2&token=canary")

    assert "canary" not in str(caught.value)
