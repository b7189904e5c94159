"""Sources that are no safetensors file, with the real command: pickles, shards and diffusers folders, built, inspected and refused."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib

import checkpoints
import pytest
import torch
from conftest import PAIR, Space
from hubs import Hubs
from safetensors.torch import load_file, save_file

from sdmerge_build.architectures import folder_names


@pytest.fixture
def mixed(space: Space):
    """A pair of which B is a .ckpt as Stable Diffusion 1.4 came: Lightning's state around the weights."""
    space.pair(PAIR.replace("B.safetensors", "B.ckpt"))
    tensors = load_file(space.path / "B.safetensors")
    torch.save({"state_dict": dict(reversed(tensors.items())), "global_step": 470000, "epoch": 1}, space.path / "B.ckpt")
    return space


def test_a_pickle_is_merged_like_the_safetensors_file_of_its_tensors(mixed):
    """A recipe over a .ckpt makes the tensors that it makes of the same weights as safetensors; the .ckpt is converted once."""
    first = mixed.sdbuild("recipe.toml")
    assert first.returncode == 0, first.stderr
    assert "converting B.ckpt" in first.stderr
    assert "B.ckpt also holds global_step, epoch, which is left out" in first.stderr
    from_pickle = tomllib.loads((mixed.path / "out" / "mix.manifest.toml").read_text())
    mixed.edit("0.3 * A + 0.7 * B", "0.4 * A + 0.6 * B")
    again = mixed.sdbuild("recipe.toml")
    assert "converting" not in again.stderr
    mixed.edit("0.4 * A + 0.6 * B", "0.3 * A + 0.7 * B")
    mixed.edit("B.ckpt", "B.safetensors")
    [artifact] = mixed.reports("recipe.toml")

    assert artifact["tensor_digest"] == from_pickle["artifact"]["tensor_digest"]
    assert artifact["state"] == "re-emitted"


def test_lineage_and_manifest_keep_the_sha256_of_the_pickle(mixed):
    """What was converted is known by the file that was published: its sha256 is in the manifest and in the header's lineage."""
    mixed.build()
    sha256 = hashlib.sha256((mixed.path / "B.ckpt").read_bytes()).hexdigest()
    facts = json.loads(mixed.sdbuild("inspect", "out/mix.safetensors", "--json").stdout)
    [source] = [source for source in facts["lineage"]["sources"] if source["name"] == "B"]
    [told] = [s for s in tomllib.loads((mixed.path / "out" / "mix.manifest.toml").read_text())["source"] if s["name"] == "B"]

    assert (source["converted_from"], source["sha256"]) == ("pickle", sha256)
    assert (told["converted_from"], told["sha256"], told["size"]) == ("pickle", sha256, (mixed.path / "B.ckpt").stat().st_size)


def test_a_pickle_is_found_among_models_by_its_digest(mixed):
    """A pinned .ckpt is found below a folder of models under whatever name."""
    data = (mixed.path / "B.ckpt").read_bytes()
    (mixed.path / "models").mkdir()
    (mixed.path / "B.ckpt").rename(mixed.path / "models" / "old name.ckpt")
    mixed.edit('path = "B.ckpt"', f'sha256 = "{hashlib.sha256(data).hexdigest()}"')

    assert mixed.sdbuild("recipe.toml", "--models", "models", "--offline").returncode == 0


class Bait:
    """What a malicious pickle holds: a call that leaves a mark."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("command", [["recipe.toml"], ["inspect", "B.ckpt"]], ids=["build", "inspect"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(mixed, command):
    """A pickle that would run a command makes an error, exit code 4, and no mark; nothing is built."""
    canary = mixed.path / "canary"
    torch.save({"state_dict": {"w": torch.zeros(3), "x": Bait(canary)}}, mixed.path / "B.ckpt")
    run = mixed.sdbuild(*command)

    assert run.returncode == 4
    assert "posix.system" in run.stderr or "nt.system" in run.stderr
    assert "Traceback" not in run.stderr
    assert not canary.exists()
    assert not (mixed.path / "out").exists()


def test_a_sharded_checkpoint_is_one_source(space: Space):
    """Shards behind an index are merged as the one checkpoint they are; a missing shard is named."""
    space.pair()
    whole = load_file(space.path / "B.safetensors")
    names = sorted(whole)
    shards = {f"B-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for file, held in shards.items():
        save_file({name: whole[name] for name in held}, space.path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (space.path / "B.safetensors.index.json").write_text(json.dumps(index))
    plain = space.reports("recipe.toml")
    space.edit("B.safetensors", "B.safetensors.index.json")
    sharded = space.reports("recipe.toml")
    (space.path / "B-00002-of-00003.safetensors").unlink()
    run = space.sdbuild("recipe.toml", "--store", "fresh")

    assert [a["tensor_digest"] for a in plain] == [a["tensor_digest"] for a in sharded]
    assert run.returncode == 5
    assert "B-00002-of-00003.safetensors" in run.stderr


def write_folder(space: Space) -> dict[str, bytes]:
    """Write the folder B that diffusers would write of B.safetensors, and return its files."""
    folder = space.path / "B"
    original = load_file(space.path / "B.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in original.items():
        place = folder_names("sd1").places.get(name)
        if place is None:
            continue
        shaped = tensor.squeeze(-1).squeeze(-1) if place.how == "widened" else tensor
        parts.setdefault(place.component, {})[place.names[0]] = shaped.contiguous()
    for component, tensors in parts.items():
        checkpoints.write(folder / component / ("model.safetensors" if "text" in component else "diffusion_pytorch_model.safetensors"), tensors)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | {c: ["diffusers", "X"] for c in parts}))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_diffusers_folder_is_one_source(space: Space):
    """A folder as diffusers writes it is merged under original names, and is converted once; inspect reads it the same way."""
    space.pair(every=1)
    write_folder(space)
    plain = space.reports("recipe.toml")
    space.edit("B.safetensors", "B")
    run = space.sdbuild("recipe.toml")
    assert run.returncode == 0, run.stderr
    again = space.reports("recipe.toml")
    inspected = json.loads(space.sdbuild("inspect", "B", "--json").stdout)

    assert [a["tensor_digest"] for a in plain] == [a["tensor_digest"] for a in again]
    assert "putting B together" in run.stderr
    assert (inspected["architecture"], inspected["kind"], inspected["sha256"]) == ("sd1", "diffusers", None)


COMMIT = "4479821af492b5b965b9388866a368ef04f6aff7"


def test_a_diffusers_folder_on_a_hub_is_locked_and_downloaded(space: Space, hubs: Hubs):
    """A folder on Hugging Face is named by its index: locked at its commit, put together once, and had again from the lock elsewhere."""
    space.pair(every=1)
    files = write_folder(space)
    [plain] = space.reports("recipe.toml")
    hubs.huggingface("me/anime", COMMIT, {**{f"v2/{name}": data for name, data in files.items()}, "README.md": b"#"})
    space.edit('path = "B.safetensors"', 'uri = "hf:me/anime/v2/model_index.json@main"')
    env = hubs.env
    unpinned = space.sdbuild("recipe.toml", "--allow-private", env=env)
    locked = space.sdbuild("lock", "recipe.toml", "--allow-private", env=env)
    assert locked.returncode == 0, locked.stderr
    entry = tomllib.loads((space.path / "recipe.lock").read_text())["source"]["B"]
    here = space.reports("recipe.toml", "--locked", "--offline", env=env)
    elsewhere = space.sdbuild("recipe.toml", "--locked", "--allow-private", "--store", "fresh", "--out", "there", "--json", env=env)
    assert elsewhere.returncode == 0, elsewhere.stderr
    [there] = json.loads(elsewhere.stdout)["reports"][0]["artifacts"]

    assert unpinned.returncode == 2
    assert "run `sdbuild lock recipe.toml`" in unpinned.stderr
    assert (entry["kind"], entry["revision"]) == ("diffusers", COMMIT)
    assert [plain["tensor_digest"]] * 2 == [here[0]["tensor_digest"], there["tensor_digest"]]
    assert not list((space.path / "fresh" / "downloads").iterdir())


def test_shards_on_a_hub_that_changed_are_refused_by_the_lock(space: Space, hubs: Hubs):
    """The commit is locked, and so are the tensors: a hub that serves other shards for the same commit is refused."""
    space.pair()
    whole = load_file(space.path / "B.safetensors")
    names = sorted(whole)

    def shards(change: float) -> dict[str, bytes]:
        files = {}
        for n in range(2):
            save_file({name: whole[name] + change if whole[name].is_floating_point() else whole[name] for name in names[n::2]}, space.path / "shard")
            files[f"m-{n}.safetensors"] = (space.path / "shard").read_bytes()
        index = {"weight_map": {name: f"m-{n}.safetensors" for n in range(2) for name in names[n::2]}}
        return files | {"m.safetensors.index.json": json.dumps(index).encode()}

    hubs.huggingface("me/anime", COMMIT, shards(0.0))
    space.edit('path = "B.safetensors"', f'uri = "hf:me/anime/m.safetensors.index.json@{COMMIT}"')
    assert space.sdbuild("lock", "recipe.toml", "--allow-private", env=hubs.env).returncode == 0
    hubs.huggingface("me/anime", COMMIT, shards(0.5))
    run = space.sdbuild("recipe.toml", "--locked", "--allow-private", "--store", "fresh", env=hubs.env)

    assert run.returncode == 4
    assert "is not as recipe.lock says: tensors = " in run.stderr
