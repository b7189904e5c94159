"""Where sources come from: the lock, this machine, headers from afar, and at last whole files; least first, and nothing twice."""

# ruff: noqa: F811  # fixtures are imported, too
from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import socket
import tomllib
from pathlib import Path

import blake3
import pytest
from conftest import digests, states
from hubs import HubFile, status
from safetensors.torch import load_file
from shop import HEAD, MEINA, VIEWER, Shop, model, pickled, sha256, shop, web  # noqa: F401

from sdmerge_build import supply as supply_module
from sdmerge_build.cli import _run
from sdmerge_build.cli.reaching import reach_from
from sdmerge_build.errors import IntegrityError, RecipeError, SourceError, SpaceError
from sdmerge_build.files import free_space
from sdmerge_build.lock import Entry, write_lock
from sdmerge_build.tensorfile import read_header


def pinned(uri: str, data: bytes, *more: str) -> str:
    """Write the fields of a source that is pinned."""
    return "\n".join([f'uri = "{uri}"', f'sha256 = "{sha256(data)}"', *more])


def keys(report) -> dict[str, str]:
    """Say under which key each artifact is kept."""
    return {wish.step.name: wish.artifact_key for wish in report.wishes}


@pytest.fixture
def two(shop: Shop) -> Shop:
    """A locked recipe of two sources that nothing but the lock pins, one on each hub; no file of them is here."""
    shop.recipe(viewer=f'uri = "{VIEWER}"', meina=f'uri = "{MEINA}"')
    shop.lock()
    shutil.rmtree(shop.path / "cache")
    shop.forget()
    return shop


# ---------------------------------------------------------------- --locked


def test_what_is_as_the_lock_says_is_built(two):
    """Locked and unchanged, a recipe is built from the bytes that were locked."""
    assert states(two.build(locked=True)) == {"mix": "built"}
    assert two.notes == ""
    assert states(two.build(locked=True, offline=True)) == {"mix": "reused"}


def test_without_a_lock_nothing_is_locked(shop):
    """--locked needs a lock, and says how to get one."""
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    with pytest.raises(RecipeError) as caught:
        shop.build(locked=True)
    [issue] = caught.value.issues
    assert (issue.where, issue.what) == (str(shop.lock_file), "there is no lock, and --locked asks for one")
    assert "sdbuild lock" in issue.hint
    assert shop.hubs.requests == []


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        (VIEWER, "civitai:7813@99", f"uri = {VIEWER} → civitai:7813@99"),
        ("@main", "@v2", f"uri = {MEINA} → {MEINA.replace('main', 'v2')}"),
        (f'uri = "{VIEWER}"', 'path = "v.safetensors"', f"uri = {VIEWER} → (none)"),
        (f'uri = "{VIEWER}"', f'uri = "{VIEWER}"\npath = "v.safetensors"', "path = (none) → v.safetensors"),
        (f'uri = "{VIEWER}"', f'uri = "{VIEWER}"\nsize = 7', f"size = {len(model('viewer'))} → 7"),
        (f'uri = "{VIEWER}"', f'uri = "{VIEWER}"\nsha256 = "{"ab" * 32}"', f"sha256 = {sha256(model('viewer'))} → {'ab' * 32}"),
        (
            f'uri = "{VIEWER}"',
            f'uri = "{VIEWER}"\nblake3 = "{"cd" * 32}"',
            f"blake3 = {blake3.blake3(model('viewer')).hexdigest()} → {'cd' * 32}",
        ),
        (f'uri = "{VIEWER}"', f'uri = "{VIEWER}"\nfilename = "other.safetensors"', "filename = (none) → other.safetensors"),
    ],
    ids=["version", "revision", "uri-gone", "path-new", "size", "sha256", "blake3", "filename"],
)
def test_a_source_that_changed_since_it_was_locked_is_refused(two, old, new, difference):
    """What the recipe says now and said then is shown side by side, before anybody is asked; the exit code is 2."""
    two.edit(old, new)
    with pytest.raises(RecipeError) as caught:
        two.build(locked=True)
    [issue] = caught.value.issues
    assert difference in issue.what
    assert issue.where.startswith(str(two.path / "recipe.toml:"))
    assert two.hubs.requests == []


def test_a_source_that_is_new_since_it_was_locked_is_refused(two):
    """An entry that is missing, and one that is too many, are told together."""
    two.edit("[source.viewer]", "[source.newcomer]")
    two.edit("* viewer", "* newcomer")
    with pytest.raises(RecipeError) as caught:
        two.build(locked=True)
    assert [issue.what for issue in caught.value.issues] == [
        "source `newcomer` is not as recipe.lock says: it is not there",
        "has source `viewer`, which no recipe has",
    ]
    assert caught.value.issues[1].where == str(two.lock_file)


def test_pins_that_agree_with_the_lock_are_no_difference(two):
    """To write down in the recipe what the lock says already, in whatever case, or a name beside a digest, changes nothing."""
    digest = blake3.blake3(model("viewer")).hexdigest().upper()
    two.edit(
        f'uri = "{VIEWER}"',
        f'uri = "{VIEWER}"\nsize = {len(model("viewer"))}\nsha256 = "{sha256(model("viewer")).upper()}"\nblake3 = "{digest}"\nfilename = "x"',
    )
    two.edit("[source.meina]", '[source.meina]\nlicense = "mine"\ncredit = "Meina"')
    assert states(two.plan(locked=True)) == {"mix": "wanted"}


def test_one_artifact_of_a_locked_recipe_can_be_built_alone(two):
    """Entries of sources that only other artifacts need are no strangers."""
    two.edit("[step.mix]", '[step.alone]\nformula = "1.0 * meina"\n\n[step.mix]')
    assert states(two.build(locked=True, only=("alone",))) == {"alone": "built"}
    assert len(two.downloads) == 1


def test_an_edited_file_is_refused(shop):
    """A file under `path` that is not the one that was locked ends with exit code 4, and every fact that changed is shown."""
    shop.put("own.safetensors", model("own"))
    shop.recipe(own='path = "own.safetensors"')
    shop.lock()
    was = shop.entries()["own"]
    shop.put("own.safetensors", model("other", every=39))
    with pytest.raises(IntegrityError) as caught:
        shop.build(locked=True)
    [issue] = caught.value.issues
    assert caught.value.exit_code == 4
    assert "own.safetensors is not as recipe.lock says: " in issue.what
    assert f"tensors = {was.tensor_digest} → " in issue.what
    assert f"size = {was.size} → {len(model('other', every=39))}" in issue.what


def test_a_file_whose_header_was_edited_is_refused(shop):
    """The same tensors behind another header are another file, and claims end up in lineages."""
    shop.put("own.safetensors", model("own"))
    shop.recipe(own='path = "own.safetensors"')
    shop.lock()
    shop.put("own.safetensors", model("own", metadata="{}"))
    with pytest.raises(IntegrityError, match="what its header claims of its origin"):
        shop.build(locked=True)


def test_changed_terms_do_not_stop_a_locked_build(two):
    """What the hub says of licences today is not asked."""
    two.on_civitai(model("viewer"), flags={"allowDerivatives": False})
    assert states(two.build(locked=True)) == {"mix": "built"}
    assert not [r for r in two.hubs.requests if r.name.startswith("/api/v1/")]


def test_without_locked_a_stale_entry_is_noted_and_the_recipe_wins(two):
    """The recipe is what its author says today; the lock is only a memory."""
    two.on_civitai(model("newer"), "newer.safetensors", version=99)
    two.edit(f'uri = "{VIEWER}"', pinned("civitai:7813@99", model("newer")))
    report = two.build()

    assert f"source `viewer` is not as recipe.lock says: uri = {VIEWER} → civitai:7813@99; sha256 = " in two.notes
    assert report.wishes[0].stored.sha256
    assert (two.path / "cache" / "sources" / blake3.blake3(model("newer")).hexdigest()[:2]).is_dir()
    shutil.rmtree(two.path / "cache")
    two.lock_file.unlink()
    two.edit(f'uri = "{MEINA}"', pinned(MEINA, model("meina")))
    assert two.build().wishes[0].tensor_key == report.wishes[0].tensor_key


def test_without_locked_an_edited_file_is_noted_and_used(shop):
    """A file under `path` is what it is today."""
    shop.put("own.safetensors", model("own"))
    shop.recipe(own='path = "own.safetensors"')
    shop.lock()
    shop.put("own.safetensors", model("other"))
    report = shop.build()

    assert "own.safetensors is not as recipe.lock says: tensors = " in shop.notes
    shop.lock_file.unlink()
    assert digests(report) == digests(shop.build(store=shop.path / "fresh"))


def test_another_filename_is_another_file(shop):
    """Where only a name says which file a source is, the lock of the old name does not stand for the new one."""
    folder = shop.put("models/one.safetensors", model("one")).parent
    shop.put("models/two.safetensors", model("two"))
    shop.recipe(A='filename = "one.safetensors"')
    shop.lock(models=(folder,))
    first = shop.build(models=(folder,))
    shop.edit("one.safetensors", "two.safetensors")
    with pytest.raises(RecipeError, match=r"filename = one\.safetensors → two\.safetensors"):
        shop.build(models=(folder,), locked=True)
    second = shop.build(models=(folder,))

    assert "filename = one.safetensors → two.safetensors" in shop.notes
    assert digests(first) != digests(second)


@pytest.mark.parametrize("forged", [{"claims": {"sd_merge_recipe": "forged"}}, {"kind": "pickle"}, {"size": 7}, {"tensor_digest": "ab" * 32}])
def test_a_forged_lock_is_found_out(two, forged):
    """What a lock says beside the digests is compared with the file, so that no lineage says what somebody wrote into a lock."""
    entries = two.entries()
    was = entries["viewer"]
    entries["viewer"] = Entry(**{name: getattr(was, name) for name in Entry.__dataclass_fields__} | forged)
    write_lock(two.lock_file, entries)
    two.put("models/viewer.safetensors", model("viewer"))
    with pytest.raises((IntegrityError, SourceError)):
        two.build(models=(two.path / "models",))
    assert not (two.path / "out").exists()


# ---------------------------------------------------------------- plans


def test_a_locked_plan_is_complete_before_any_download(two):
    """On a machine that has nothing, keys and bytes are known from the lock and from a look at each header."""
    plan = two.plan(locked=True)

    assert states(plan) == {"mix": "wanted"}
    assert plan.missing == {"viewer": len(model("viewer")), "meina": len(model("meina"))}
    assert (plan.bytes_written > 0, two.downloads) == (True, [])
    assert len(two.looks) <= 2 * 2
    assert not (two.path / "cache").exists()
    assert keys(plan) == keys(two.build(locked=True))
    assert plan.bytes_written == two.plan(store=two.path / "fresh").bytes_written


def test_a_long_header_is_read_by_two_requests(shop):
    """However long a header is, the first request says where it ends, and the second brings the rest."""
    long = model("long", metadata="x" * 900_000)
    shop.on_civitai(long)
    shop.recipe(viewer=pinned(VIEWER, long))
    assert states(shop.plan()) == {"mix": "wanted"}
    assert len(shop.looks) == 2
    assert sum(request.sent for request in shop.looks) < 950_000


@pytest.fixture
def deaf(monkeypatch):
    """Let nobody open a socket or look up a name."""

    def refuse(*_args, **_said):
        raise AssertionError("somebody is asked")

    for name in ("socket", "getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)


def test_offline_a_locked_recipe_is_planned_without_a_socket(two, deaf):  # noqa: ARG001  last, for the other fixture asks
    """The lock alone is enough for keys and for the bytes to fetch."""
    plan = two.plan(locked=True, offline=True)
    assert plan.missing == {"viewer": len(model("viewer")), "meina": len(model("meina"))}
    assert all(keys(plan).values())


def test_the_keys_of_an_offline_plan_are_those_of_the_build(two):
    """Offline or not, planned or built, with a lock or without, keys are the same."""
    offline = keys(two.plan(offline=True))
    built = two.build()
    two.lock_file.unlink()
    two.edit(f'uri = "{VIEWER}"', pinned(VIEWER, model("viewer")))
    two.edit(f'uri = "{MEINA}"', pinned(MEINA, model("meina")))
    assert offline == keys(built)
    assert [wish.tensor_key for wish in two.plan(offline=True).wishes] == [wish.tensor_key for wish in built.wishes]


def test_offline_what_is_not_here_is_not_built(two, deaf):  # noqa: ARG001  last, for the other fixture asks
    """A build without the network needs its sources here, and says which are not; the exit code is 5."""
    with pytest.raises(SourceError) as caught:
        two.build(offline=True)
    assert [issue.what.split("`")[1] for issue in caught.value.issues] == ["viewer", "meina"]
    assert all("--offline forbids asking for it" in issue.what for issue in caught.value.issues)


def test_offline_without_a_lock_there_is_no_plan(shop, deaf):  # noqa: ARG001  last, for the other fixture asks
    """Without a lock nothing is known of what is not here."""
    shop.recipe(viewer=pinned(VIEWER, model("viewer")))
    with pytest.raises(SourceError, match="--offline forbids asking for it"):
        shop.plan(offline=True)


def test_without_a_lock_a_plan_looks_at_headers_alone(shop):
    """What a pinned source will be is known after its download; until then, what is to fetch is."""
    shop.recipe(viewer=pinned(VIEWER, model("viewer")))
    plan = shop.plan()

    assert plan.missing == {"viewer": len(model("viewer"))}
    assert (plan.wishes[0].artifact_key, plan.wishes[0].reasons) == ("", ["source `viewer` must be fetched first"])
    assert (shop.downloads, len(shop.looks)) == ([], 1)


# ---------------------------------------------------------------- header first


def test_another_architecture_is_refused_before_the_download(shop):
    """A header tells an SDXL checkpoint from an SD 1.5 one; not a byte of its tensors is asked for."""
    shop.on_civitai(model("xl", "sdxl"))
    shop.recipe(viewer=pinned(VIEWER, model("xl", "sdxl")), meina=pinned(MEINA, model("meina")))
    for act in (shop.plan, shop.build, shop.fetch):
        with pytest.raises(RecipeError, match=r"source `viewer` is a .* checkpoint, but the recipe merges"):
            act()
    assert (shop.downloads, list((shop.path / "cache").glob("downloads/*"))) == ([], [])


def test_a_missing_tensor_is_refused_before_the_download(shop):
    """So is a model that lacks what another one has."""
    shop.on_civitai(model("viewer", every=43))
    shop.recipe(meina=pinned(MEINA, model("meina")), viewer=pinned(VIEWER, model("viewer", every=43)))
    for act in (shop.plan, shop.build, shop.fetch):
        with pytest.raises(RecipeError, match="needs tensors that `viewer` lacks"):
            act()
    assert shop.downloads == []


def test_a_disk_that_is_too_small_is_refused_before_the_download(two, monkeypatch):
    """Sources and artifact together must fit."""
    both = len(model("viewer")) + len(model("meina"))
    monkeypatch.setattr(supply_module, "free_space", lambda _folder: both + 1000)
    two.fetch(store=two.path / "elsewhere")
    two.forget()
    for act in (two.plan, two.build):
        with pytest.raises(SpaceError, match="no space left"):
            act()
    monkeypatch.setattr(supply_module, "free_space", lambda _folder: both - 1)
    for act in (two.fetch, two.lock):
        with pytest.raises(SpaceError, match="no space left"):
            act(store=two.path / "third")
    assert (two.downloads, free_space(two.path) > 0) == ([], True)


def test_a_remote_pickle_is_downloaded_and_converted(shop):
    """A pickle has no header to look at: it is fetched whole, and its manifest says what it was."""
    data = pickled("old")
    shop.on_civitai(data, "old.ckpt")
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    shop.lock()
    with_lock = shop.build(locked=True)
    manifest = tomllib.loads((shop.path / "out" / "mix.manifest.toml").read_text(encoding="utf-8"))
    [source] = manifest["source"]
    assert (source["converted_from"], source["sha256"], source["size"]) == ("pickle", sha256(data), len(data))
    lineage = with_lock.wishes[0].metadata["sdbuild.lineage"]
    viewer = next(source for source in json.loads(lineage)["sources"] if source["name"] == "viewer")
    assert (viewer["converted_from"], viewer["sha256"]) == ("pickle", sha256(data))

    shop.lock_file.unlink()
    shop.edit(f'uri = "{VIEWER}"', 'path = "old.ckpt"')
    shop.put("old.ckpt", data)
    assert states(shop.build(offline=True)) == {"mix": "re-emitted"}  # the header has no address now, the tensors are the same


# ---------------------------------------------------------------- unpinned


@pytest.mark.parametrize("name", ["viewer", "meina"])
def test_what_nobody_pins_is_not_downloaded(shop, name):
    """The hub's own digest is offered as the line to paste; pasted, it is downloaded."""
    uri = {"viewer": VIEWER, "meina": MEINA}[name]
    shop.recipe(A=f'uri = "{uri}"')
    with pytest.raises(RecipeError) as caught:
        shop.build()
    [issue] = caught.value.issues
    line = f'sha256 = "{sha256(model(name))}"'
    assert (caught.value.exit_code, f"write `{line}`" in issue.hint, f"run `sdbuild lock {shop.path / 'recipe.toml'}`" in issue.hint) == (
        2,
        True,
        True,
    )
    assert issue.where.endswith("recipe.toml:4")
    assert shop.downloads == shop.looks == []

    shop.edit(f'uri = "{uri}"', f'uri = "{uri}"\n{line}')
    assert states(shop.build()) == {"mix": "built"}


def test_what_no_hub_knows_must_be_locked(web):
    """Of a plain address nobody says a digest; the advice is to lock."""
    web.recipe(A=f'uri = "{web.hubs.https("/a.safetensors", model("web"))}"')
    for act in (web.build, web.plan, web.fetch):
        with pytest.raises(RecipeError, match=r"nothing pins what it must be\n\nhint: run `sdbuild lock .*recipe.toml`, which notes what it is"):
            act()
    assert web.hubs.requests == []
    web.lock()
    assert states(web.build()) == {"mix": "built"}


def test_an_unpinned_file_of_the_right_name_is_taken_as_ever(shop):
    """A name is enough for what lies in one's own folders; nobody is asked."""
    shop.put("models/viewer.safetensors", model("viewer"))
    shop.recipe(A=f'uri = "{VIEWER}"\nfilename = "Viewer.safetensors"')
    assert states(shop.build(models=(shop.path / "models",))) == {"mix": "built"}
    assert shop.hubs.requests == []


# ---------------------------------------------------------------- found before fetched

TREES = {
    "AUTOMATIC1111": ("stable-diffusion-webui", "models/Stable-diffusion/anime/viewer.safetensors"),
    "Forge": ("webui_forge/webui/models", "Stable-diffusion/viewer.safetensors"),
    "ComfyUI": ("ComfyUI", "models/checkpoints/sd15/viewer.safetensors"),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("pins", ["sha256", "blake3", "sha256 size", "filename", "lock"])
def test_what_is_owned_is_not_downloaded(shop, tree, pins):
    """Wherever other programs keep a file and whatever pins it, it is found there, and nobody is asked."""
    root, place = TREES[tree]
    data = model("viewer")
    facts = {"sha256": f'"{sha256(data)}"', "blake3": f'"{blake3.blake3(data).hexdigest()}"', "size": len(data), "filename": '"viewer.safetensors"'}
    shop.recipe(viewer="\n".join([f'uri = "{VIEWER}"', *(f"{pin} = {facts[pin]}" for pin in pins.split() if pin != "lock")]))
    if pins == "lock":
        shop.lock()
        shutil.rmtree(shop.path / "cache")
    shop.forget()
    shop.put(f"{root}/{place}" if pins == "filename" else f"{root}/{place}".replace("viewer", "renamed"), data)
    shop.put(f"{root}/{place}".replace("viewer", "another"), model("another"))
    assert states(shop.build(models=(shop.path / root,))) == {"mix": "built"}
    assert shop.hubs.requests == []


def test_what_was_downloaded_is_found_in_the_store(two):
    """The store is looked through like a folder of models, so nothing is downloaded twice."""
    two.fetch()
    assert len(two.downloads) == 2
    two.forget()
    assert {name: is_new for name, (_, is_new) in two.fetch().items()} == {"viewer": False, "meina": False}
    assert states(two.build()) == {"mix": "built"}
    assert two.hubs.requests == []


def test_a_file_that_only_looks_right_is_noted_and_the_right_one_downloaded(shop):
    """The same name and size with other content is told, and not taken."""
    data = model("viewer")
    shop.put("models/viewer.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    shop.recipe(viewer=pinned(VIEWER, data, f"size = {len(data)}", 'filename = "viewer.safetensors"'))
    shop.build(models=(shop.path / "models",))

    assert f"viewer.safetensors: its sha256 is {sha256(data[:-1] + bytes([data[-1] ^ 1]))}, not {sha256(data)}" in shop.notes
    assert len(shop.downloads) == 1
    assert load_file(shop.path / "out" / "mix.safetensors").keys()


def test_files_of_another_size_are_not_read(two, monkeypatch):
    """A hundred files that cannot be it are not even opened."""
    for n in range(100):
        with two.put(f"models/{n}.safetensors", b"").open("wb") as file:
            file.truncate((1 << 30) + n)
    opened = []
    for place, name in ((builtins, "open"), (io, "open"), (os, "open")):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda path, *args, _real=real, **said: (opened.append(str(path)), _real(path, *args, **said))[1])
    two.fetch(models=(two.path / "models",))

    assert not [path for path in opened if f"{os.sep}models{os.sep}" in path]
    assert len(two.downloads) == 2


def test_folders_are_looked_through_once(two, monkeypatch):
    """What is not in the folders of models is not looked for there again in the same run."""
    walked = []
    real = os.walk
    monkeypatch.setattr(os, "walk", lambda folder, **said: (walked.append(folder), real(folder, **said))[1])
    folder = two.put("models/other.safetensors", model("other")).parent
    two.lock_file.unlink()
    two.edit(f'uri = "{VIEWER}"', pinned(VIEWER, model("viewer")))
    two.edit(f'uri = "{MEINA}"', pinned(MEINA, model("meina")))
    two.build(models=(folder,))
    assert walked.count(folder) == 1


def test_folders_that_no_user_has_are_an_error(monkeypatch, tmp_path):
    """A folder of models whose owner is not known is told like one that is not there."""
    monkeypatch.setenv("SDBUILD_MODELS", "~nobody-of-this-name/models")
    with pytest.raises(RecipeError, match="there is no such folder of models\n\nhint: SDBUILD_MODELS names it"):
        reach_from(models=(tmp_path,), jobs=1)


# ---------------------------------------------------------------- builds


def test_what_can_be_built_is_built(shop):
    """With --keep-going, a source that is not to be had stops only what needs it; nothing is downloaded for what cannot be made."""
    shop.on_civitai(model("third"), "third.safetensors", 3, 4)
    steps = '[step.sound]\nformula = "1.0 * meina"\n\n[step.blocked]\nformula = "0.5 * gone + 0.5 * third"\n'
    shop.recipe(
        steps=steps,
        gone=pinned("civitai:5@6", model("gone")),
        third=pinned("civitai:3@4", model("third")),
        meina=pinned(MEINA, model("meina")),
    )
    report = shop.build(keep_going=True)

    assert states(report) == {"sound": "built", "blocked": "blocked"}
    assert report.exit_code == 5
    assert [request.name.rpartition("/")[2] for request in shop.downloads] == ["MeinaPastelV4.safetensors"]


def test_nothing_is_downloaded_for_what_cannot_be_made(shop):
    """With --keep-going, an artifact that its sources' headers rule out is not paid for, and the others are built."""
    shop.on_civitai(model("xl", "sdxl"))
    steps = '[step.sound]\nformula = "1.0 * meina"\n\n[step.mixed]\nformula = "0.5 * meina + 0.5 * viewer"\n'
    shop.recipe(steps=steps, viewer=pinned(VIEWER, model("xl", "sdxl")), meina=pinned(MEINA, model("meina")))
    report = shop.build(keep_going=True)

    assert states(report) == {"sound": "built", "mixed": "failed"}
    assert [request.name.rpartition("/")[2] for request in shop.downloads] == ["MeinaPastelV4.safetensors"]


def test_a_download_that_fails_stops_only_what_needs_it(shop):
    """With --keep-going, bytes that prove to be others fail one artifact, and the other is built."""
    bad = bytearray(model("viewer"))
    bad[-1] ^= 1
    shop.hubs.civitai(7813, 25845, HubFile(id=1, name="viewer.safetensors", data=model("viewer"), served=bytes(bad)))
    steps = '[step.sound]\nformula = "1.0 * meina"\n\n[step.other]\nformula = "1.0 * viewer"\n'
    shop.recipe(steps=steps, viewer=pinned(VIEWER, model("viewer")), meina=pinned(MEINA, model("meina")))
    report = shop.build(keep_going=True)

    assert states(report) == {"sound": "built", "other": "blocked"}
    assert report.exit_code == 4


def test_a_finished_artifact_needs_no_source(two):
    """With a lock, what is in the store needs neither sources nor network: it is published again, manifest and shares and all."""
    first = two.build()
    manifest = (two.path / "out" / "mix.manifest.toml").read_bytes()
    shutil.rmtree(two.path / "cache" / "sources")
    (two.path / "cache" / "digests.json").unlink()
    two.forget()
    assert states(two.build(offline=True, locked=True)) == {"mix": "reused"}
    shutil.rmtree(two.path / "out")
    again = two.build(locked=True)

    assert (states(again), again.published) == ({"mix": "reused"}, 1)
    assert digests(again) == digests(first)
    assert (two.path / "out" / "mix.manifest.toml").read_bytes() == manifest
    assert [source["share"] for source in tomllib.loads(manifest.decode())["source"]] == [0.5, 0.5]
    assert (two.hubs.requests, two.notes) == ([], "")


def test_a_new_title_needs_no_source(two):
    """Another header is put before the tensors that are there; sources are neither needed nor asked for."""
    two.build()
    shutil.rmtree(two.path / "cache" / "sources")
    two.forget()
    two.edit("[step.mix]", '[step.mix]\ntitle = "Another"')
    assert states(two.build(offline=True, locked=True)) == {"mix": "re-emitted"}


def test_damaged_tensors_are_merged_again_from_sources_fetched_again(two):
    """When tensors that were to be re-emitted prove damaged, the sources they need are looked for and downloaded."""
    first = two.build()
    stored = first.wishes[0].stored.path
    times = stored.stat()
    stored.chmod(0o644)
    with stored.open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(stored, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.rmtree(two.path / "cache" / "sources")
    shutil.rmtree(two.path / "out")
    two.edit("[step.mix]", '[step.mix]\ntitle = "Another"')
    two.forget()
    assert states(two.build()) == {"mix": "built"}
    assert "mix is merged again" in two.notes
    assert len(two.downloads) == 2

    artifact = two.load("mix")
    two.build(store=two.path / "fresh")
    assert all(artifact[name].equal(tensor) for name, tensor in two.load("mix").items())


def test_an_artifact_does_not_replace_a_source_that_only_the_lock_knows(shop):
    """A source that is not even looked for, for the artifact is in the store, is not overwritten where the artifact is to appear."""
    data = model("viewer")
    mine = shop.put("models/mix.safetensors", data)
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    shop.lock(models=(mine.parent,))
    shop.build(models=(mine.parent,))
    for reach in ({"models": (mine.parent,)}, {}):
        with pytest.raises(RecipeError, match=r"artifact `mix` would replace .*mix\.safetensors, which is source `viewer`"):
            shop.build(out=mine.parent, **reach)
    assert mine.read_bytes() == data


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_an_artifact_is_the_same_wherever_its_sources_come_from(shop, kind):
    """Downloaded, owned or in the store: one file, bit by bit, and one manifest; a lock adds the hub's terms, and changes no tensor."""
    data, name = (model("viewer"), "viewer.safetensors") if kind == "safetensors" else (pickled("viewer"), "viewer.ckpt")
    shop.on_civitai(data, name)
    shop.put(f"models/renamed{Path(name).suffix}", data)
    shop.recipe(viewer=pinned(VIEWER, data), meina=pinned(MEINA, model("meina")))
    owned = {"models": (shop.path / "models",)}
    files, manifests, tensors = set(), set(), set()

    def build(store, **said):
        report = shop.build(store=shop.path / store, out=shop.path / f"out-{store}", **said)
        files.update(digests(report).values())
        tensors.add(report.wishes[0].stored.tensor_digest)
        manifest = tomllib.loads((shop.path / f"out-{store}" / "mix.manifest.toml").read_text(encoding="utf-8"))
        manifests.add(repr(manifest))
        return read_header(shop.path / f"out-{store}" / "mix.safetensors").metadata

    unlocked = build("owned", **owned)
    if kind == "safetensors":  # for a pickle, which is slow to convert, the two most different ways are enough
        build("downloaded")
    assert (len(files), len(manifests)) == (1, 1)
    shop.lock()
    if kind == "safetensors":
        build("locked-owned", **owned, locked=True)
    build("cache", locked=True, offline=True)
    metadata = build("locked", locked=True)

    assert (len(files), len(manifests), len(tensors)) == (2, 2, 1)
    assert '"permissions"' in metadata["sdbuild.lineage"]
    assert '"permissions"' not in unlocked["sdbuild.lineage"]
    assert ('"converted_from":"pickle"' in metadata["sdbuild.lineage"]) is (kind == "pickle")


def test_sources_of_other_recipes_are_locked_with_the_root(shop):
    """A recipe that names another's step locks that recipe's sources under their full names; the other's own lock does not count."""
    shop.on_civitai(model("base"), "base.safetensors", 1, 2)
    shop.recipe("more/base.toml", A='uri = "civitai:1@2"')
    shop.lock("more/base.toml")
    (shop.path / "more" / "base.lock").write_text("not a lock", encoding="utf-8")
    shop.recipe(meina=f'uri = "{MEINA}"', base='uri = "recipe:more/base.toml#mix"')
    assert set(shop.lock().entries) == {"meina", "more/base.toml#A"}
    shutil.rmtree(shop.path / "cache")
    plan = keys(shop.plan(locked=True, offline=True))
    assert keys(shop.build(locked=True)) == plan

    shop.edit("civitai:1@2", "civitai:1@3", "more/base.toml")
    with pytest.raises(RecipeError) as caught:
        shop.build(locked=True)
    [issue] = caught.value.issues
    assert issue.where == f"{shop.path / 'more' / 'base.toml'}:4"
    assert "source `more/base.toml#A` is not as recipe.lock says: uri = civitai:1@2 → civitai:1@3" in issue.what


# ---------------------------------------------------------------- sdbuild fetch


def test_fetch_only_fetches(two):
    """Sources are downloaded and verified; nothing is built, and the build afterwards needs nobody."""
    fetched = two.fetch(locked=True)
    assert {name: is_new for name, (_, is_new) in fetched.items()} == {"viewer": True, "meina": True}
    assert fetched["viewer"][0].path.read_bytes() == model("viewer")
    assert not (two.path / "out").exists()
    assert not (two.path / "cache" / "artifacts").exists()
    assert states(two.build(offline=True, locked=True)) == {"mix": "built"}


def test_fetch_offline_verifies_what_is_here(two):
    """Offline, everything must be here already."""
    with pytest.raises(SourceError, match="--offline forbids asking for it"):
        two.fetch(offline=True)
    two.fetch()
    two.forget()
    assert not any(is_new for _, is_new in two.fetch(offline=True).values())
    assert two.hubs.requests == []


def test_fetch_holds_the_recipe_to_its_lock(two):
    """--locked means the same for fetching as for building."""
    two.edit(VIEWER, "civitai:7813@99")
    with pytest.raises(RecipeError, match=f"uri = {VIEWER} → civitai:7813@99"):
        two.fetch(locked=True)


def test_a_hub_that_is_down_is_told_with_what_could_be_done(two):
    """Why it could not be downloaded, and what file could be put into a folder instead."""
    two.hubs.redirect_faults = [status(404)] * 9
    with pytest.raises(SourceError) as caught:
        two.fetch()
    text = str(caught.value)
    assert "404" in text
    assert "source `viewer` is nowhere to be found" in text
    assert "put it into any folder and name that folder with --models" in text
    assert caught.value.exit_code == 5


def test_several_recipes_are_fetched_in_one_go(two, capsys):
    """Each recipe has its own lock and its own document."""
    (two.path / "second.toml").write_text(HEAD + f'[source.A]\n{pinned(MEINA, model("meina"))}\n[step.x]\nformula = "1.0 * A"\n', encoding="utf-8")
    args = [str(two.path / "recipe.toml"), str(two.path / "second.toml"), "--store", str(two.path / "cache"), "--allow-private"]
    assert _run(["fetch", *args]) == 0
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()] == [["viewer", "downloaded"], ["meina", "downloaded"], ["A", "found"]]
    assert "fetching viewer, meina" in said.err
