"""`sdbuild lock`, `fetch`, `--locked` and `--offline`, with the real command: what is asked, what is printed, what is left behind."""

# ruff: noqa: F811  # fixtures are imported, too
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import checkpoints
import pytest
from conftest import NOWHERE
from hubs import slow, well
from shop import MEINA, VIEWER, Shop, model, pickled, sha256, shop, web  # noqa: F401

HEARD, LOADED = 99, 98
GUARD = f"""
import os
import sys


def listen(event, args):
    if event.startswith("socket.") or (event == "import" and args[0].partition(".")[0] in ("httpx", "httpcore")):
        os.write(2, f"guard: {{event}} {{args[:1]}}\\n".encode())
        os._exit({HEARD} if event.startswith("socket.") else {LOADED})


sys.addaudithook(listen)
"""


def run(shop: Shop, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command against the hubs."""
    return shop.sdbuild(*args, env={**shop.env, **env})


def guarded(shop: Shop, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that ends when anybody opens a socket, looks up a name, or loads the client."""
    shop.put("guard/sitecustomize.py", GUARD.encode())
    path = os.pathsep.join(filter(None, [str(shop.path / "guard"), os.environ.get("PYTHONPATH")]))
    return run(shop, *args, PYTHONPATH=path)


@pytest.fixture
def two(shop: Shop) -> Shop:
    """A locked recipe of two sources on two hubs; no file of them is here."""
    shop.recipe(viewer=f'uri = "{VIEWER}"', meina=f'uri = "{MEINA}"')
    shop.lock()
    shutil.rmtree(shop.path / "cache")
    shop.forget()
    return shop


def test_the_guard_hears(two):
    """The guard of the tests below ends a process that asks somebody."""
    heard = guarded(two, "fetch", "recipe.toml", "--allow-private")
    assert heard.returncode == LOADED, heard.stderr


def test_offline_nobody_is_asked(two):
    """Offline, planning, fetching, building, locking and doing nothing open no socket and load no client; not even one that fails."""
    plan = guarded(two, "recipe.toml", "--dry-run", "--offline", "--locked")
    assert (plan.returncode, "40.4 kB to fetch" in plan.stdout) == (0, True), plan.stderr
    for command in (["fetch", "recipe.toml", "--offline"], ["recipe.toml", "--offline"]):
        refused = guarded(two, *command)
        assert (refused.returncode, "--offline forbids asking for it" in refused.stderr) == (5, True), refused.stderr

    assert run(two, "fetch", "recipe.toml", "--locked", "--allow-private").returncode == 0
    two.hubs.requests.clear()
    for command, said in (
        (["fetch", "recipe.toml", "--locked"], "found"),
        (["recipe.toml", "--offline", "--locked"], "1 built"),
        (["recipe.toml"], "nothing to do: 1 artifact up to date"),
        (["recipe.toml", "--dry-run"], "nothing to do: 1 artifact up to date"),
        (["lock", "recipe.toml", "--offline"], "recipe.lock is up to date"),
    ):
        done = guarded(two, *command)
        assert (done.returncode, said in done.stdout) == (0, True), (command, done.stdout, done.stderr)

    shutil.rmtree(two.path / "cache" / "sources")
    shutil.rmtree(two.path / "out")
    again = guarded(two, "recipe.toml", "--locked")
    assert (again.returncode, "up to date  out/mix.safetensors" in again.stdout) == (0, True), again.stderr
    assert (two.path / "out" / "mix.manifest.toml").exists()
    assert two.hubs.requests == []


def test_what_is_all_here_asks_nobody(shop):
    """Sources on this machine, by path, name or digest, are merged without a client, whatever the recipe says of addresses."""
    shop.put("own.safetensors", model("own"))
    shop.put("models/checkpoints/viewer.safetensors", model("viewer"))
    shop.recipe(own='path = "own.safetensors"', viewer=f'uri = "{VIEWER}"\nsha256 = "{sha256(model("viewer"))}"')
    built = guarded(shop, "recipe.toml", "--models", "models")
    assert (built.returncode, "1 built" in built.stdout) == (0, True), built.stderr
    rehearsed = guarded(shop, "recipe.toml", "--rehearse")
    assert rehearsed.returncode == 0, rehearsed.stderr


def test_locking_says_what_it_wrote(shop):
    """A source is locked, unchanged, changed field by field, or removed; --json says the same."""
    shop.put("own.safetensors", model("own"))
    shop.recipe(viewer=f'uri = "{VIEWER}"', own='path = "own.safetensors"')
    first = run(shop, "lock", "recipe.toml", "--allow-private")
    second = run(shop, "lock", "recipe.toml", "--allow-private")
    shop.on_civitai(model("viewer"), flags={"allowDerivatives": False})
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    third = run(shop, "lock", "recipe.toml", "--allow-private")
    fourth = run(shop, "lock", "recipe.toml", "--allow-private", "--json")

    assert first.stdout.splitlines() == [
        f"own     locked      20.2 kB  sha256 {sha256(model('own'))[:10]}…",
        f"viewer  locked      20.2 kB  sha256 {sha256(model('viewer'))[:10]}…",
        "recipe.lock written",
    ]
    assert [line.split()[1] for line in second.stdout.splitlines()] == ["unchanged", "unchanged", "is"]
    assert second.stderr == ""
    assert third.stdout.splitlines() == [
        "own     removed",
        f"viewer  changed     20.2 kB  sha256 {sha256(model('viewer'))[:10]}…",
        "    terms.allowDerivatives = True → False",
        "recipe.lock written",
    ]
    [document] = json.loads(fourth.stdout)["recipes"]
    assert (document["written"], document["changes"]) == (False, {"viewer": []})
    assert document["sources"]["viewer"]["terms"]["allowDerivatives"] is False


def test_fetching_says_where_files_are(two):
    """--json lists each source's file, its digests, and whether it was downloaded; the build afterwards needs no hub."""
    fetched = run(two, "fetch", "recipe.toml", "--locked", "--allow-private", "--json")
    assert (fetched.returncode, fetched.stderr) == (0, "")
    [document] = json.loads(fetched.stdout)["recipes"]
    entries = two.entries()
    for source in document["sources"]:
        data = model(source["name"])
        assert (source["downloaded"], source["size"]) == (True, len(data))
        assert (two.path / source["path"]).read_bytes() == data
        assert (source["blake3"], source["tensor_digest"]) == (entries[source["name"]].blake3, entries[source["name"]].tensor_digest)
    built = two.sdbuild("recipe.toml", "--locked", "--offline")
    assert (built.returncode, "1 built" in built.stdout) == (0, True), built.stderr


def test_a_difference_is_shown_and_refused(two):
    """--locked ends with exit code 2 and both sides of what changed; without it, the same is a note."""
    two.edit(VIEWER, "civitai:7813@99")
    refused = run(two, "recipe.toml", "--locked", "--allow-private")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: recipe.toml:4: source `viewer` is not as recipe.lock says: uri = {VIEWER} → civitai:7813@99\n\n"
        "hint: `sdbuild lock recipe.toml` writes the lock anew\n"
    )
    noted = run(two, "recipe.toml", "--allow-private")
    assert noted.stderr.startswith(f"recipe.toml:4: source `viewer` is not as recipe.lock says: uri = {VIEWER} → civitai:7813@99; ")
    assert (noted.returncode, two.downloads) == (5, [])
    as_json = run(two, "fetch", "recipe.toml", "--locked", "--json")
    assert json.loads(as_json.stdout)["error"]["exit"] == as_json.returncode == 2


def test_the_line_to_paste_is_printed(shop):
    """What nobody pins is refused with exit code 2 and the line that pins it."""
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    refused = run(shop, "recipe.toml", "--allow-private")
    assert refused.returncode == 2
    assert f'write `sha256 = "{sha256(model("viewer"))}"`, which is what https://civitai.com/models/7813' in refused.stderr


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent there")
def test_a_lock_that_is_interrupted_leaves_the_old_one(shop):
    """Ctrl-C in the middle of a download ends with exit code 130; the lock is the old one, and nothing lies beside it."""
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    assert run(shop, "lock", "recipe.toml", "--allow-private").returncode == 0
    before = shop.lock_file.read_bytes()
    shop.on_civitai(model("newer"))
    shop.forget()
    shop.hubs.faults = [well(), slow(0, 60)]
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("SDBUILD_")} | NOWHERE | shop.env
    command = [sys.executable, "-m", "sdmerge_build", "lock", "recipe.toml", "--allow-private"]
    with subprocess.Popen(command, cwd=shop.path, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not shop.downloads and time.monotonic() < until:
            time.sleep(0.01)
        assert shop.downloads
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (130, "")
    assert "interrupted" in err
    assert shop.lock_file.read_bytes() == before
    assert {path.name for path in shop.path.iterdir()} == {"cache", "recipe.lock", "recipe.toml"}
    done = run(shop, "lock", "recipe.toml", "--allow-private")
    assert (done.returncode, "changed" in done.stdout) == (0, True), done.stderr


def test_sources_of_every_kind_are_locked_fetched_and_built_offline(web):
    """Civitai, AIR, Hugging Face, a plain address, a path, a pickle, another recipe's step: locked once, built elsewhere from the lock."""
    address = web.hubs.https("/files/web.safetensors", model("web"))
    web.on_civitai(model("base"), "base.safetensors", 1, 2)
    web.put("own.safetensors", model("own"))
    web.put("old.ckpt", pickled("old"))
    web.recipe("more/base.toml", A='uri = "urn:air:sd1:checkpoint:civitai:1@2"', own='path = "../own.safetensors"')
    web.recipe(
        viewer=f'uri = "{VIEWER}"',
        meina=f'uri = "{MEINA}"',
        web=f'uri = "{address}"',
        own='path = "own.safetensors"',
        old='path = "old.ckpt"',
        base='uri = "recipe:more/base.toml#mix"',
    )
    assert run(web, "lock", "recipe.toml", "--allow-private").returncode == 0
    plan = guarded(web, "recipe.toml", "--locked", "--dry-run", "--offline", "--json", "--store", "fresh")
    assert plan.returncode == 0, plan.stderr
    [planned] = json.loads(plan.stdout)["reports"]
    assert set(planned["bytes_to_fetch"]) == {"viewer", "meina", "web", "more/base.toml#A"}
    assert run(web, "fetch", "recipe.toml", "--locked", "--allow-private", "--store", "fresh").returncode == 0
    built = guarded(web, "recipe.toml", "--locked", "--offline", "--json", "--store", "fresh")
    assert built.returncode == 0, built.stderr
    [artifact] = json.loads(built.stdout)["reports"][0]["artifacts"]
    assert (artifact["state"], artifact["key"]) == ("built", planned["artifacts"][0]["key"])


@pytest.mark.parametrize("field", ["sha256", "blake3"])
def test_an_edited_digest_in_the_lock_is_noticed(two, field):
    """--locked compares every digest that the lock states with the bytes, also where the recipe pins nothing."""
    lock = two.path / "recipe.lock"
    digest = tomllib.loads(lock.read_text())["source"]["viewer"][field]
    lock.write_text(lock.read_text().replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    fetched = run(two, "fetch", "recipe.toml", "--locked", "--allow-private", "--store", "fresh")

    assert fetched.returncode in {4, 5}
    assert digest in fetched.stderr
    assert "Traceback" not in fetched.stderr


def test_a_source_that_is_taken_by_its_name_is_said_to_be(two):
    """What nothing pins may be another file than its address means: a build says so, and takes it."""
    (two.path / "recipe.lock").unlink()
    (two.path / "models").mkdir()
    checkpoints.write(two.path / "models" / "other.safetensors", checkpoints.miniature("sd1", "other", every=40))
    for name in ("viewer", "meina"):
        two.edit(f"[source.{name}]", f'[source.{name}]\nfilename = "other.safetensors"')
    built = run(two, "recipe.toml", "--models", "models")

    assert built.returncode == 0, built.stderr
    assert f"source `viewer` is taken as it is: nothing pins that other.safetensors is {VIEWER}" in built.stderr
