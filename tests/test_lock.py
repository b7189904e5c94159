"""Locks: what is written is read again, what is damaged is refused, and what changed is told."""

# ruff: noqa: F811  # fixtures are imported, too
from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import blake3
import checkpoints
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import COMMIT, LATER, MEINA, VIEWER, Shop, model, pickled, sha256, shop, web  # noqa: F401

from sdmerge_build.cli import _run
from sdmerge_build.errors import IntegrityError, RecipeError, SourceError
from sdmerge_build.lock import Entry, Lock, lock_path, read_lock, write_lock

HEX = "0123456789abcdef" * 4
SOUND = f'lock = 1\n\n[source.A]\ntensor_digest = "{HEX}"\n'

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
terms = st.dictionaries(texts.filter(lambda name: name != "digest"), st.booleans() | texts | st.lists(texts, max_size=4), max_size=5)
entries = st.builds(
    Entry,
    tensor_digest=digests,
    address=st.sampled_from(["", "https://civitai.com/api/download/models/25845", "https://example.org/x?a=1"]),
    size=st.integers(0, 2**63 - 1),
    kind=st.sampled_from(["", "pickle", "shards", "diffusers"]),
    claims=st.dictionaries(texts, texts, max_size=3),
    terms=terms,
    **dict.fromkeys(("uri", "path", "named", "page", "filename"), texts),
    revision=st.sampled_from(["", "0123456789" * 4]),
    **dict.fromkeys(("sha256", "blake3"), st.just("") | digests),
)


# ---------------------------------------------------------------- the file


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(texts, entries, max_size=4))
def test_what_is_written_is_read_again(tmp_path_factory, written):
    """Every entry comes back as it was; it does not matter in which order entries and their tables were made."""
    path = tmp_path_factory.mktemp("lock") / "recipe.lock"
    assert write_lock(path, written)
    text = path.read_bytes()

    assert read_lock(path) == Lock(path=path, exists=True, entries=written)
    backwards = {
        name: Entry(**{f: _reversed(getattr(entry, f)) for f in Entry.__dataclass_fields__}) for name, entry in reversed(list(written.items()))
    }
    assert not write_lock(path, backwards)
    path.unlink()
    assert write_lock(path, backwards)
    assert path.read_bytes() == text


def _reversed(value):
    return dict(reversed(list(value.items()))) if isinstance(value, dict) else value


def test_a_lock_is_sorted_and_knows_no_clock(tmp_path):
    """Sources are in order, and fields in theirs, without a date."""
    path = tmp_path / "recipe.lock"
    entry = Entry(tensor_digest=HEX, uri=VIEWER, size=3, sha256=HEX, terms={"b": True, "a": "x"})
    write_lock(path, {"b": entry, "B": entry, "a": entry})
    table = tomllib.loads(path.read_text(encoding="utf-8"))

    assert list(table["source"]) == ["B", "a", "b"]
    assert list(table["source"]["a"]) == ["sha256", "size", "tensor_digest", "uri", "terms"]
    assert list(table["source"]["a"]["terms"]) == ["a", "b", "digest"]


def test_a_lock_that_says_the_same_is_not_touched(tmp_path):
    """Written again, the file stays the very same."""
    path = tmp_path / "recipe.lock"
    assert write_lock(path, {"a": Entry(tensor_digest=HEX)})
    before = path.stat()

    assert not write_lock(path, {"a": Entry(tensor_digest=HEX)})
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]


def test_no_lock_is_an_empty_one(tmp_path):
    """Where there is no file, nothing is locked."""
    assert read_lock(tmp_path / "recipe.lock") == Lock(path=tmp_path / "recipe.lock", exists=False, entries={})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("allowDerivatives = false", "allowDerivatives = true"),
        ("allowDerivatives = false\n", ""),
        ("allowDerivatives = false\n", "allowDerivatives = false\nallowNoCredit = true\n"),
        ('    "Image",\n', ""),
        ("someone", "nobody"),
    ],
)
def test_edited_terms_are_refused(tmp_path, old, new):
    """Nobody's terms are changed by hand: they are not what their digest was made of."""
    path = tmp_path / "recipe.lock"
    write_lock(
        path, {"A": Entry(tensor_digest=HEX, terms={"allowDerivatives": False, "creator": "someone", "allowCommercialUse": ["Image", "Rent"]})}
    )
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError, match="the entry of source `A` has `terms` that are not the ones their digest was made of"):
        read_lock(path)


def test_terms_of_which_only_the_digest_is_left_are_refused(tmp_path):
    """To leave out what was said is an edit, too."""
    path = tmp_path / "recipe.lock"
    path.write_text(SOUND + f'[source.A.terms]\ndigest = "{HEX}"\n', encoding="utf-8")
    with pytest.raises(RecipeError, match="not the ones their digest was made of"):
        read_lock(path)


DAMAGE = {
    "no TOML": ("lock = ", "is not TOML"),
    "an empty file": ("", "is not a lock of version 1"),
    "no text": (b"\xff\xfe\x00lock", "is not UTF-8 text"),
    "a later version": (SOUND.replace("lock = 1", "lock = 2"), "is not a lock of version 1"),
    "a version that is true": (SOUND.replace("lock = 1", "lock = true"), "is not a lock of version 1"),
    "a version that is a text": (SOUND.replace("lock = 1", 'lock = "1"'), "is not a lock of version 1"),
    "sources that are a list": ("lock = 1\nsource = [1]", "is not a lock of version 1"),
    "a source that is a number": ("lock = 1\n[source]\nA = 3", "the entry of source `A` is not a table"),
    "an unknown field": (SOUND + "sise = 3", "has an unknown field `sise`"),
    "no digest of the tensors": ("lock = 1\n[source.A]\nsize = 3", "lacks `tensor_digest`"),
    "a short digest": (SOUND.replace(HEX, HEX[:-1]), "has a `tensor_digest` that cannot be read"),
    "a digest in capitals": (SOUND.replace(HEX, HEX.upper()), "has a `tensor_digest` that cannot be read"),
    "an empty digest": (SOUND + 'sha256 = ""', "has a `sha256` that cannot be read"),
    "a digest that is a number": (SOUND + "blake3 = 7", "has a `blake3` that cannot be read"),
    "a size that is a text": (SOUND + 'size = "3"', "has a `size` that cannot be read"),
    "a size that is true": (SOUND + "size = true", "has a `size` that cannot be read"),
    "a size below nothing": (SOUND + "size = -1", "has a `size` that cannot be read"),
    "a size beyond all disks": (SOUND + f"size = {2**63}", "has a `size` that cannot be read"),
    "a number of 5000 digits": (SOUND + f"size = 1{'0' * 5000}", "is not TOML"),
    "an address without encryption": (SOUND + 'address = "http://example.org/x"', "has a `address` that cannot be read"),
    "an address on this machine": (SOUND + 'address = "file:///etc/passwd"', "has a `address` that cannot be read"),
    "a kind nobody knows": (SOUND + 'kind = "zip"', "has a `kind` that cannot be read"),
    "a kind that is a list": (SOUND + "kind = []", "has a `kind` that cannot be read"),
    "claims that are a text": (SOUND + 'claims = "x"', "has a `claims` that cannot be read"),
    "claims that are no texts": (SOUND + "claims = { a = 1 }", "has `claims` that are not texts"),
    "terms that are a list": (SOUND + "terms = [1]", "has a `terms` that cannot be read"),
    "terms without a digest": (SOUND + "terms = { a = 1979-05-27, b = nan }", "has `terms` that are not the ones"),
    "brackets without end": ("lock = " + "[" * 100_000, "brackets are nested more than 32 deep"),
    "a name of many parts": ("lock = 1\n" + "a." * 50_000 + "b = 1", "a dotted name has more than 16 parts"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_lock_is_one_clear_message(tmp_path, capsys, kind):
    """Whatever is wrong with a lock is told once, with its path and what to do, and ends with exit code 2."""
    damage, complaint = DAMAGE[kind]
    path = tmp_path / "recipe.lock"
    path.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    with pytest.raises(RecipeError) as caught:
        read_lock(path)
    [issue] = caught.value.issues
    assert (issue.where, caught.value.exit_code) == (str(path), 2)
    assert complaint in issue.what
    assert "sdbuild lock" in issue.hint

    (tmp_path / "recipe.toml").write_text('recipe = 1\narchitecture = "sd1"\n[source.A]\npath = "A"\n[step.mix]\nformula = "1.0 * A"\n')
    for command in (["build", "--dry-run", "--locked"], ["lock"], ["fetch"]):
        assert _run([*command, str(tmp_path / "recipe.toml"), "--offline", "--store", str(tmp_path / "cache")]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("error: "), complaint in said.err) == ("", 1, True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes among files")
@pytest.mark.parametrize("kind", ["folder", "pipe", "circle"])
def test_what_is_no_file_is_no_lock(tmp_path, kind):
    """A folder, a pipe or a link to itself in the lock's place is refused, and nobody waits for it."""
    path = tmp_path / "recipe.lock"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "circle": lambda: path.symlink_to(path)}[kind]()
    with pytest.raises(RecipeError, match=r"recipe\.lock: cannot be read: ") as caught:
        read_lock(tmp_path / "recipe.lock")
    assert len(caught.value.issues) == 1


def test_a_lock_that_is_too_large_is_not_read(tmp_path):
    """A file of any size may lie there; one that no lock can have is not taken into memory."""
    with (tmp_path / "recipe.lock").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RecipeError, match="cannot be read: not a regular file, or too large"):
        read_lock(tmp_path / "recipe.lock")


def test_all_that_is_wrong_with_a_lock_is_told_at_once(tmp_path):
    """Every entry at fault is named."""
    (tmp_path / "recipe.lock").write_text("lock = 1\n[source]\nA = 1\nB = {}\nC = { size = 1.5 }\n")
    with pytest.raises(RecipeError) as caught:
        read_lock(tmp_path / "recipe.lock")
    assert [issue.what.split("`")[1] for issue in caught.value.issues] == ["A", "B", "C"]


def test_the_lock_of_a_recipe_lies_beside_it():
    """NAME.lock beside NAME.toml, whatever dots the name has."""
    assert lock_path(Path("recipes/mix.v2.toml")) == Path("recipes/mix.v2.lock")


# ---------------------------------------------------------------- sdbuild lock


@pytest.fixture
def everything(web: Shop) -> Shop:
    """A recipe of sources of every kind."""
    address = web.hubs.https("/files/web%20mix.safetensors", model("web"))
    web.put("own.safetensors", model("own"))
    web.put("old.ckpt", pickled("old"))
    web.on_civitai(model("base"), "base.safetensors", 1, 2)
    web.recipe("more/base.toml", A='uri = "urn:air:sd1:checkpoint:civitai:1@2"', own='path = "../own.safetensors"')
    web.recipe(
        viewer=f'uri = "{VIEWER}"',
        meina=f'uri = "{MEINA}"',
        web=f'uri = "{address}"',
        own='path = "own.safetensors"',
        old='path = "old.ckpt"',
        base='uri = "recipe:more/base.toml#mix"',
    )
    web.address = address
    return web


def test_everything_is_locked_and_locked_again_it_is_unchanged(everything):
    """Each source's address, revision, size and digests are written down, of other recipes' sources too; a second time, nothing happens."""
    locked = everything.lock()
    data = {"viewer": model("viewer"), "meina": model("meina"), "web": model("web"), "own": model("own"), "old": pickled("old")}
    data |= {"more/base.toml#A": model("base"), "more/base.toml#own": model("own")}
    assert locked.changes == {name: ["is new"] for name in sorted(data)}
    entries = everything.entries()
    assert set(entries) == set(data)
    for name, content in data.items():
        entry = entries[name]
        assert (entry.size, entry.sha256, entry.blake3) == (len(content), sha256(content), blake3.blake3(content).hexdigest())
    assert entries["own"].tensor_digest == entries["more/base.toml#own"].tensor_digest != entries["viewer"].tensor_digest
    assert {name: entry.kind for name, entry in entries.items() if entry.kind} == {"old": "pickle"}
    assert entries["viewer"].address == "https://civitai.com/api/download/models/25845"
    assert entries["more/base.toml#A"].page == "https://civitai.com/models/1?modelVersionId=2"
    assert (entries["meina"].revision, COMMIT in entries["meina"].address) == (COMMIT, True)
    assert (entries["web"].address, entries["web"].filename) == (everything.address, "web mix.safetensors")
    assert (entries["viewer"].terms["allowDerivatives"], entries["meina"].terms["license"]) == (True, "creativeml-openrail-m")
    assert (entries["own"].path, entries["old"].path) == ("own.safetensors", "old.ckpt")

    before = everything.lock_file.stat()
    again = everything.lock()
    assert (again.is_written, set(map(tuple, again.changes.values()))) == (False, {()})
    assert (everything.lock_file.stat().st_ino, everything.lock_file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_licence_of_a_model_is_locked_and_its_change_told(shop):
    """The author's terms of that day stay in the lock until it is written anew; then each field that changed is shown."""
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    shop.lock()
    shop.on_civitai(model("viewer"), flags={"allowDerivatives": False, "allowNoCredit": ...}, commercial=["Image"])
    locked = shop.lock()

    assert locked.is_written
    assert sorted(locked.changes["viewer"]) == [
        "terms.allowCommercialUse = ['Image', 'RentCivit', 'Rent', 'Sell', 'SellMerge'] → ['Image']",
        "terms.allowDerivatives = True → False",
        "terms.allowNoCredit = True → (none)",
    ]


def test_another_file_on_the_hub_is_told_field_by_field(shop):
    """A version whose file was replaced is downloaded, and its size and digests are shown."""
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    shop.lock()
    shop.on_civitai(model("viewer", every=39), "viewer-2.safetensors")
    changes = {text.partition(" = ")[0]: text for text in shop.lock().changes["viewer"]}

    assert set(changes) == {"filename", "size", "sha256", "blake3", "tensor_digest"}
    assert changes["filename"] == "filename = viewer.safetensors → viewer-2.safetensors"
    assert changes["size"] == f"size = {len(model('viewer'))} → {len(model('viewer', every=39))}"
    assert changes["sha256"].endswith(f" → {sha256(model('viewer', every=39))}")


def test_a_branch_that_moved_is_locked_at_its_new_commit(shop):
    """A branch means another commit later; the lock says which, and downloads nothing when the file is the same."""
    shop.recipe(meina=f'uri = "{MEINA}"')
    shop.lock()
    shop.forget()
    shop.on_huggingface(model("meina"), LATER)
    changes = {text.partition(" = ")[0]: text for text in shop.lock().changes["meina"]}

    assert set(changes) == {"address", "page", "revision"}
    assert changes["revision"] == f"revision = {COMMIT} → {LATER}"
    assert not shop.downloads


def test_a_locked_branch_stays_where_it_was(shop):
    """With a lock, a moved branch is not asked: the commit that was locked is downloaded, without asking the hub's API."""
    shop.recipe(meina=f'uri = "{MEINA}"')
    shop.lock()
    shop.on_huggingface(model("other"), LATER)
    shop.forget()
    [(found, is_new)] = shop.fetch(store=shop.path / "fresh", locked=True).values()

    assert is_new
    assert found.path.read_bytes() == model("meina")
    assert {r.name for r in shop.hubs.requests if r.host == "api"} == {f"/Meina/MeinaPastel/resolve/{COMMIT}/MeinaPastelV4.safetensors"}


def test_what_nobody_vouches_for_is_trusted_when_it_is_first_seen(web):
    """A plain address has no digest: the lock notes what was there, and anything else is refused from then on."""
    address = web.hubs.https("/m.safetensors", model("web"))
    web.recipe(web=f'uri = "{address}"')
    web.lock()
    web.hubs.https("/m.safetensors", model("other"))
    with pytest.raises(IntegrityError, match="sends is another file: its blake3 is"):
        web.build(store=web.path / "fresh")
    assert not (web.path / "out").exists()

    assert any(text.startswith(f"sha256 = {sha256(model('web'))} → {sha256(model('other'))}") for text in web.lock().changes["web"])


def test_a_source_that_left_the_recipe_leaves_the_lock(shop):
    """An entry without a source is removed, and that is told."""
    shop.recipe(viewer=f'uri = "{VIEWER}"', meina=f'uri = "{MEINA}"')
    shop.lock()
    shop.recipe(meina=f'uri = "{MEINA}"')
    locked = shop.lock()

    assert locked.changes == {"meina": [], "viewer": ["is gone"]}
    assert set(shop.entries()) == {"meina"}


def test_a_lock_is_written_offline_of_what_is_here(shop):
    """Without the network, what was locked and lies in the store is found again, and what the hub said of it still stands."""
    own = shop.put("own.safetensors", model("own"))
    shop.recipe(viewer=f'uri = "{VIEWER}"', own='path = "own.safetensors"')
    shop.lock()
    before = shop.entries()
    shop.forget()
    own.write_bytes(model("other"))
    locked = shop.lock(offline=True)

    assert locked.changes["viewer"] == []
    assert {text.partition(" = ")[0] for text in locked.changes["own"]} == {"sha256", "blake3", "tensor_digest"}
    assert shop.entries()["viewer"] == before["viewer"]
    assert (shop.hubs.requests, shop.notes) == ([], "")


def test_offline_an_address_stands_only_for_the_bytes_it_was_locked_with(shop):
    """Other bytes under the same address are locked without what the hub said of the first ones."""
    shop.recipe(meina=f'uri = "{MEINA}"')
    shop.lock()
    shop.put("models/m.safetensors", model("other"))
    shop.recipe(meina=f'uri = "{MEINA}"\nsha256 = "{sha256(model("other"))}"')
    shop.lock(offline=True, models=(shop.path / "models",))
    entry = shop.entries()["meina"]

    assert entry.sha256 == sha256(model("other"))
    assert (entry.uri, entry.address, entry.revision, dict(entry.terms)) == (MEINA, "", "", {})


def test_offline_what_is_not_here_cannot_be_locked(shop):
    """The message names the source and its page; the old lock stays."""
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    with pytest.raises(SourceError, match="source `viewer` is nowhere to be found, and --offline forbids asking for it"):
        shop.lock(offline=True)
    assert (shop.lock_file.exists(), shop.hubs.requests) == (False, [])


def test_a_file_of_ones_own_is_not_locked_under_another_files_address(shop):
    """A source with a path and an address is locked only if both lead to the same bytes: elsewhere, the address decides."""
    shop.put("own.safetensors", model("own"))
    shop.recipe(viewer=f'path = "own.safetensors"\nuri = "{VIEWER}"')
    with pytest.raises(IntegrityError, match=f"its sha256 is {sha256(model('own'))}, not {sha256(model('viewer'))}"):
        shop.lock()
    assert not shop.lock_file.exists()

    shop.put("own.safetensors", model("viewer"))
    shop.lock()
    assert (shop.entries()["viewer"].path, shop.downloads) == ("own.safetensors", [])


def test_a_sharded_checkpoint_is_locked_by_its_tensors(shop):
    """A folder has no digest of its own: the lock notes its kind, its size and its tensors, and an edited part is refused."""
    tensors = checkpoints.miniature("sd1", "big", every=40)
    names = sorted(tensors)
    parts = {"big-1.safetensors": names[::2], "big-2.safetensors": names[1::2]}
    sizes = [checkpoints.write(shop.path / part, {name: tensors[name] for name in of}).stat().st_size for part, of in parts.items()]
    shop.write("big.safetensors.index.json", json.dumps({"weight_map": {name: part for part, of in parts.items() for name in of}}))
    shop.recipe(big='path = "big.safetensors.index.json"')
    shop.lock()
    entry = shop.entries()["big"]
    assert (entry.kind, entry.sha256, entry.blake3, entry.size) == ("shards", "", "", sum(sizes))
    shop.build(locked=True)

    checkpoints.write(shop.path / "big-1.safetensors", {name: tensors[name] * 2 for name in names[::2]})
    with pytest.raises(IntegrityError, match=r"is not as recipe\.lock says: tensors = "):
        shop.build(locked=True)


def test_strange_texts_of_a_hub_neither_break_the_lock_nor_reach_the_terminal(shop, capsys):
    """Halves of characters, which JSON can spell, are replaced; what a terminal would obey is spelled out."""
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    args = ["lock", str(shop.path / "recipe.toml"), "--store", str(shop.path / "cache"), "--allow-private"]
    assert _run(args) == 0
    shop.on_civitai(model("viewer"), "v\x1b[31m\nx.safetensors", flags={"name": "\udc00 \x1b]0;title\x07"})
    assert _run(args) == 0
    entry = shop.entries()["viewer"]

    assert (entry.filename, entry.terms["model"]) == ("v\x1b[31m\nx.safetensors", "? \x1b]0;title\x07")
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "filename = viewer.safetensors → v\\x1b[31m\\nx.safetensors" in said.out


def test_claims_are_locked_as_lineages_read_them(shop):
    """What a header claims of its origin is in the lock; of what is too long to be read, that it is."""
    claim = json.dumps({HEX: {"name": "x"}})
    shop.put("claims.safetensors", model("claims", metadata=claim))
    shop.put("long.safetensors", model("long", metadata="x" * ((1 << 20) + 1)))
    shop.recipe(**{name: f'path = "{name}.safetensors"' for name in ("claims", "long")})
    shop.lock()
    entries = shop.entries()

    assert {name: dict(entry.claims) for name, entry in entries.items()} == {
        "claims": {"sd_merge_models": claim},
        "long": {"sd_merge_models": "… 1048577 characters"},
    }
    shop.build(locked=True)


def test_a_recipe_that_is_wrong_is_not_locked(shop):
    """A source of another architecture is found out from its header, before it is downloaded and before anything is written."""
    shop.on_civitai(model("xl", "sdxl"))
    shop.recipe(viewer=f'uri = "{VIEWER}"')
    with pytest.raises(RecipeError, match=r"source `viewer` is a .* checkpoint, but the recipe merges"):
        shop.lock()
    assert (shop.downloads, shop.lock_file.exists()) == ([], False)
