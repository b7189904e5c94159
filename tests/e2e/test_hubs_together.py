"""Recipes whose sources come from Civitai and Hugging Face, with the real command against loopback hubs."""

from __future__ import annotations

import hashlib
import json
import tomllib

import checkpoints
import pytest
import torch
from conftest import Space
from hubs import HubFile, Hubs
from safetensors import safe_open
from safetensors.torch import load

RECIPE = """
recipe = 1
architecture = "sd1"

[source.viewer-mix]
uri = "civitai:7813@25845"
sha256 = "{viewer}"
license = "CreativeML-OpenRAIL-M"

[source.MeinaPastel]
uri = "hf:Meina/MeinaPastel/MeinaPastelV4.safetensors@main"
sha256 = "{meina}"

[step.EstrildaMix]
formula = "0.3 * viewer-mix + 0.7 * MeinaPastel"
"""
COMMIT = "4479821af492b5b965b9388866a368ef04f6aff7"


@pytest.fixture
def shop(space: Space, hubs: Hubs):
    """Two checkpoints on two hubs, and a recipe that pins both."""
    space.hubs = hubs
    space.data = {}
    for name in ("viewer", "meina"):
        path = checkpoints.write(space.path / "elsewhere" / f"{name}.safetensors", checkpoints.miniature("sd1", name, every=40))
        space.data[name] = path.read_bytes()
        path.unlink()
    hubs.civitai(7813, 25845, HubFile(id=1, name="viewer.safetensors", data=space.data["viewer"]))
    hubs.huggingface("Meina/MeinaPastel", COMMIT, {"MeinaPastelV4.safetensors": space.data["meina"]})
    space.write("recipe.toml", RECIPE.format(**{name: hashlib.sha256(data).hexdigest() for name, data in space.data.items()}))
    return space


def run(shop, *args, **env):
    """Run the command against the hubs."""
    return shop.sdbuild(*args, env={**shop.hubs.env, **env})


def test_a_recipe_is_built_from_two_hubs_and_then_offline_from_its_lock(shop):
    """Sources are downloaded, verified and merged; locked, the same is built again offline, from the store alone."""
    first = run(shop, "recipe.toml", "--allow-private")
    assert first.returncode == 0, first.stderr
    assert "fetching viewer-mix, MeinaPastel" in first.stderr
    locked = run(shop, "lock", "recipe.toml", "--allow-private")
    assert locked.returncode == 0, locked.stderr
    relocked = run(shop, "recipe.toml", "--locked", "--offline")
    assert "1 re-emitted" in relocked.stdout  # the hubs' terms, which the lock brought, are in the header now
    again = run(shop, "recipe.toml", "--locked", "--offline")
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    assert [line.split()[:2] for line in locked.stdout.splitlines()] == [
        ["MeinaPastel", "locked"],
        ["viewer-mix", "locked"],
        ["recipe.lock", "written"],
    ]
    lock = tomllib.loads((shop.path / "recipe.lock").read_text(encoding="utf-8"))
    assert {name: entry["sha256"] for name, entry in lock["source"].items()} == {
        "viewer-mix": hashlib.sha256(shop.data["viewer"]).hexdigest(),
        "MeinaPastel": hashlib.sha256(shop.data["meina"]).hexdigest(),
    }
    assert lock["source"]["MeinaPastel"]["revision"] == COMMIT


def test_an_artifact_says_where_its_sources_came_from(shop):
    """Manifest and header name each source's address, digest and share; what the author declared of the licence is there, too."""
    assert run(shop, "recipe.toml", "--allow-private").returncode == 0
    manifest = tomllib.loads((shop.path / "out" / "EstrildaMix.manifest.toml").read_text(encoding="utf-8"))
    viewer, meina = manifest["source"]
    assert (viewer["uri"], viewer["share"], viewer["license"]) == ("civitai:7813@25845", 0.3, "CreativeML-OpenRAIL-M")
    assert (meina["uri"], meina["share"], meina["sha256"]) == (
        "hf:Meina/MeinaPastel/MeinaPastelV4.safetensors@main",
        0.7,
        hashlib.sha256(shop.data["meina"]).hexdigest(),
    )
    with safe_open(shop.path / "out" / "EstrildaMix.safetensors", "pt") as file:
        lineage = json.loads(file.metadata()["sdbuild.lineage"])
    assert [source["uri"] for source in lineage["sources"] if "uri" in source] == [viewer["uri"], meina["uri"]]


def test_the_merge_of_two_hubs_is_the_sum_that_was_asked_for(shop):
    """What was downloaded is merged as if it had been here."""
    assert run(shop, "recipe.toml", "--allow-private").returncode == 0
    a, b = (load(shop.data[name]) for name in ("viewer", "meina"))
    mixed = shop.load("EstrildaMix")
    assert mixed.keys() == a.keys() == b.keys()
    for name, tensor in mixed.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor.float(), 0.3 * a[name].float() + 0.7 * b[name].float(), atol=1e-3)


def test_sources_on_private_addresses_are_not_asked_unless_that_is_said(shop):
    """The hub that the environment names is trusted, and where it sends us to is not, unless --allow-private says so."""
    refused = run(shop, "recipe.toml")
    assert refused.returncode == 5
    assert "127.0.0.1 is a private address" in refused.stderr
    assert "--allow-private" in refused.stderr
    assert not (shop.path / "out").exists()
