"""Skipping, re-emitting, explaining, and a store that survives what is done to it."""

from __future__ import annotations

import json
import os
import shutil
import tomllib

import checkpoints
import pytest
import torch
from conftest import PAIR, Space, digests, states
from safetensors import safe_open

from sdmerge_build.errors import IntegrityError, RecipeError

CHAIN = PAIR + '\n[step.outer]\nformula = "0.5 * mix + 0.5 * B"\n[step.lone]\nformula = "0.2 * A + 0.8 * B"\n'


def stored_files(space: Space) -> list:
    """Every model in the store."""
    return sorted((space.path / "cache" / "artifacts").rglob("model.safetensors"))


def test_a_second_build_reuses_everything(space: Space):
    """When every key is in the store, nothing is built and no byte is read."""
    space.pair(CHAIN)
    space.build()
    again = space.build()

    assert states(again) == {"outer": "reused", "lone": "reused"}
    assert (again.bytes_read, again.bytes_written, again.published) == (0, 0, 0)


def test_only_what_stands_on_a_change_is_rebuilt(space: Space):
    """A ratio inside a chain rebuilds the artifact above it, and says so; the other is reused."""
    space.pair(CHAIN)
    space.build()
    space.edit("0.3 * A + 0.7 * B", "0.4 * A + 0.6 * B")
    report = space.build()

    assert states(report) == {"outer": "built", "lone": "reused"}
    assert report.wishes[0].reasons == ["mix: param.formula = 0.3 * A + 0.7 * B → 0.4 * A + 0.6 * B"]


def test_a_changed_source_is_the_reason(space: Space):
    """New content in a source is named as the source's tensors."""
    space.pair()
    space.build()
    space.checkpoint("B", checkpoints.miniature("sd1", "another", every=40))
    [reason] = space.build().wishes[0].reasons

    assert reason.startswith("B: tensors = ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("recipe = 1", "# a comment\nrecipe = 1"),
        ('path = "A.safetensors"', 'path = "./A.safetensors"'),
        ('formula = "0.3 * A + 0.7 * B"', 'formula = "0.30*A + (7/10) * B"'),
    ],
)
def test_what_is_not_in_the_bytes_is_not_in_the_key(space: Space, old, new):
    """Comments, paths and spelling rebuild nothing."""
    space.pair()
    space.build()
    space.edit(old, new)

    assert states(space.build()) == {"mix": "reused"}


def test_a_new_title_is_re_emitted_without_merging(space: Space, monkeypatch):
    """A title is in the header alone: the stored data is copied behind a new header."""
    space.pair()
    before = space.build()
    space.edit("[step.mix]", '[step.mix]\ntitle = "Estrilda, the third"')
    monkeypatch.setattr("sdmerge_build.merge.run", lambda *_, **__: pytest.fail("it was merged again"))
    after = space.build()

    assert states(after) == {"mix": "re-emitted"}
    assert after.wishes[0].stored.tensor_digest == before.wishes[0].stored.tensor_digest
    assert "metadata.modelspec.title = mix → Estrilda, the third" in after.wishes[0].reasons
    with safe_open(space.path / "out" / "mix.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "Estrilda, the third"


def test_renaming_a_step_merges_nothing(space: Space, monkeypatch):
    """A step's name is its title unless it says another, and no part of its tensors."""
    space.pair()
    space.build()
    space.edit("[step.mix]", "[step.blend]")
    monkeypatch.setattr("sdmerge_build.merge.run", lambda *_, **__: pytest.fail("it was merged again"))

    assert states(space.build()) == {"blend": "re-emitted"}


def test_a_parent_with_an_edited_header_merges_nothing(space: Space, monkeypatch):
    """A parent that was downloaded again with another header has the same tensors; at most the header is written anew."""
    space.pair()
    space.build()
    ancestors = json.dumps({"ab" * 32: {"name": "grandparent", "legacy_hash": None, "sd_merge_recipe": None}})
    space.checkpoint("B", checkpoints.miniature("sd1", "B", every=40), {"format": "pt", "sd_merge_models": ancestors})
    monkeypatch.setattr("sdmerge_build.merge.run", lambda *_, **__: pytest.fail("it was merged again"))

    assert states(space.build()) == {"mix": "re-emitted"}


def test_a_re_emitted_file_equals_one_merged_afresh(space: Space):
    """The way a file came about does not show in its bytes."""
    space.pair()
    space.build()
    space.edit("[step.mix]", '[step.mix]\ntitle = "T"')

    assert digests(space.build()) == digests(space.build(store=space.path / "fresh"))


def test_two_names_for_one_step_are_merged_once(space: Space):
    """Steps with equal keys share one evaluation, and each has its own file."""
    space.pair(PAIR + '\n[step.twin]\nformula = "0.3 * A + 0.7 * B"\n')
    report = space.build()

    assert states(report) == {"mix": "built", "twin": "built"}
    assert report.wishes[0].stored.tensor_digest == report.wishes[1].stored.tensor_digest
    assert report.bytes_read == sum(t.nbytes for t in checkpoints.miniature("sd1", "A", every=40).values()) * 2


def test_intermediate_steps_never_touch_the_disk(space: Space):
    """Only artifacts are in the store, and nothing partial is left."""
    space.pair(CHAIN)
    space.build()

    assert len(stored_files(space)) == 2
    assert list((space.path / "cache" / "partial").iterdir()) == []


def test_a_stored_artifact_is_a_parent_without_its_own_parents(space: Space):
    """A step that stands on a stored artifact reads that, and not what it was made of."""
    space.pair(PAIR.replace("[step.mix]", "[step.mix]\nartifact = true") + '\n[step.outer]\nformula = "0.5 * mix + 0.5 * B"\n')
    space.build(only=("mix",))
    report = space.build(only=("outer",))

    assert report.bytes_read == 2 * sum(t.nbytes for t in checkpoints.miniature("sd1", "A", every=40).values())


def test_a_published_file_that_was_removed_or_replaced_comes_back(space: Space):
    """What is at the published name is what the store holds, however it was lost."""
    space.pair()
    space.build()
    target = space.path / "out" / "mix.safetensors"
    good = target.read_bytes()
    for spoil in (target.unlink, lambda: (target.unlink(), target.write_bytes(b"junk"))):
        spoil()
        report = space.build()
        assert states(report) == {"mix": "reused"}
        assert target.read_bytes() == good


def test_a_link_at_the_published_name_is_replaced_and_not_followed(space: Space):
    """
    A link that lies where an artifact belongs is replaced; what it points to is left alone.
    """
    space.pair()
    (space.path / "precious").write_text("mine")
    (space.path / "out").mkdir()
    (space.path / "out" / "mix.safetensors").symlink_to(space.path / "precious")
    space.build()

    assert (space.path / "precious").read_text() == "mine"
    assert not (space.path / "out" / "mix.safetensors").is_symlink()


def test_a_published_file_is_not_a_writable_door_into_the_store(space: Space):
    """A published file either shares the store's read-only mode or is a copy of its own."""
    space.pair()
    report = space.build()
    target, stored = space.path / "out" / "mix.safetensors", report.wishes[0].stored.path

    assert not stored.stat().st_mode & 0o222
    assert not target.samefile(stored) or not target.stat().st_mode & 0o222
    assert stored.stat().st_mode & 0o444 == 0o444 & ~os.umask(os.umask(0))


@pytest.mark.parametrize("harm", ["bit", "short", "empty", "gone", "folder", "link", "trace", "trace-type", "no-trace"])
def test_damage_in_the_store_is_a_miss_and_is_repaired(space: Space, harm):
    """A stored artifact that is not what its trace says is built again, and takes the damaged one's place."""
    space.pair()
    before = digests(space.build())
    [model] = stored_files(space)
    trace = model.with_name("trace.json")
    data = model.read_bytes()
    if harm == "trace":
        trace.write_text("{")
    elif harm == "trace-type":
        trace.write_text('["not", "a", "trace"]')
    elif harm == "no-trace":
        trace.unlink()
    else:
        model.unlink()
        if harm == "bit":
            model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif harm == "short":
            model.write_bytes(data[:-1])
        elif harm == "empty":
            model.write_bytes(b"")
        elif harm == "folder":
            model.mkdir()
        elif harm == "link":
            (space.path / "elsewhere").write_bytes(data)
            model.symlink_to(space.path / "elsewhere")
    (space.path / "out" / "mix.safetensors").unlink()
    report = space.build()

    assert states(report) == {"mix": "built"}
    assert digests(report) == before
    assert states(space.build()) == {"mix": "reused"}


def test_a_store_copied_to_another_disk_is_still_good(space: Space):
    """Times are not content: a store whose files have new times is believed once its bytes were read."""
    space.pair()
    before = digests(space.build())
    for path in (space.path / "cache").rglob("*"):
        os.utime(path, (1, 1))

    report = space.build()
    assert (states(report), digests(report)) == ({"mix": "reused"}, before)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"memo": 99}', '{"memo": 1, "files": {"x": 3}}', "\x00"])
def test_a_broken_memo_only_costs_time(space: Space, text):
    """The memo of digests saves work and never decides."""
    space.pair()
    before = digests(space.build())
    (space.path / "cache" / "digests.json").write_text(text)
    report = space.build()

    assert (states(report), digests(report)) == ({"mix": "reused"}, before)


def test_a_source_changed_in_place_with_its_times_put_back_is_noticed(space: Space):
    """Content decides: the same size and modification time do not hide other bytes."""
    space.pair()
    space.build()
    path = space.path / "B.safetensors"
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert states(space.build()) == {"mix": "built"}


def test_a_source_changed_while_it_is_merged_is_refused(space: Space, monkeypatch):
    """An input that moves during the pass discards the result."""
    from sdmerge_build import merge

    space.pair()
    honest = merge.run

    def meddle(*args, **kwargs):
        results = honest(*args, **kwargs)
        os.utime(space.path / "B.safetensors", (1, 1))
        return results

    monkeypatch.setattr(merge, "run", meddle)
    with pytest.raises(IntegrityError, match="changed while it was being merged"):
        space.build()

    assert stored_files(space) == []


def test_an_artifact_may_not_take_the_place_of_its_source(space: Space):
    """A recipe whose output is one of its inputs is refused, by identity and not by name."""
    space.pair(PAIR.replace("[step.mix]", "[step.A2]"))
    (space.path / "out").mkdir()
    os.link(space.path / "A.safetensors", space.path / "out" / "A2.safetensors")
    with pytest.raises(RecipeError, match="which is source `A`"):
        space.build()


def test_pruning_the_store_is_removing_folders(space: Space):
    """After `rm -rf` of any part of the store the next build makes what is missing."""
    space.pair(CHAIN)
    before = digests(space.build())
    shutil.rmtree(stored_files(space)[0].parent)
    shutil.rmtree(space.path / "out")
    report = space.build()

    assert sorted(states(report).values()) == ["built", "reused"]
    assert digests(report) == before


def test_the_manifest_tells_the_whole_story(space: Space):
    """The manifest has the artifact's digests, every step and source, their shares through nested steps, licences and how to reproduce it."""
    nested = PAIR.replace('path = "A.safetensors"', 'path = "A.safetensors"\nlicense = "CC0-1.0"\ncredit = "Ada"')
    nested += '\n[step.outer]\ntitle = "Outer"\nmethod = "weighted_sum"\na = "mix"\nb = "B"\nalpha = 0.5\nauthor = "Eve"\n'
    space.pair(nested)
    report = space.build()
    manifest = tomllib.loads((space.path / "out" / "outer.manifest.toml").read_text())
    artifact = manifest["artifact"]

    assert artifact["sha256"] == report.wishes[0].stored.sha256
    assert artifact["model_hash"] == artifact["sha256"][:10]
    assert artifact["tensors"] == len(space.load("outer"))
    assert (artifact["title"], artifact["author"], artifact["architecture"]) == ("Outer", "Eve", "sd1")
    assert [(source["name"], source["share"]) for source in manifest["source"]] == [("A", 0.15), ("B", 0.85)]
    assert (manifest["source"][0]["license"], manifest["source"][0]["credit"]) == ("CC0-1.0", "Ada")
    assert [step["name"] for step in manifest["step"]] == ["mix", "outer"]
    assert manifest["step"][1]["facts"]["param.alpha"] == "0.5"
    assert manifest["reproduce"]["command"] == "sdbuild recipe.toml --only outer"
    assert manifest["reproduce"]["versions"]["torch"] == torch.__version__


def test_shares_that_differ_from_block_to_block_say_how_far(space: Space):
    """A share is the mean over all averaged elements, with its least and most."""
    ratio = '{ base = 0.0, blocks = { "OUT*" = 1.0 } }'
    space.pair(PAIR.replace('formula = "0.3 * A + 0.7 * B"', f'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = {ratio}'), every=10)
    space.build()
    b = tomllib.loads((space.path / "out" / "mix.manifest.toml").read_text())["source"][1]
    sizes = {n: t.numel() for n, t in space.load("mix").items() if "position_ids" not in n}
    out = sum(size for n, size in sizes.items() if n.startswith(("model.diffusion_model.output_blocks.", "model.diffusion_model.out.")))

    assert (b["share_least"], b["share_most"]) == (0.0, 1.0)
    assert b["share"] == pytest.approx(out / sum(sizes.values()), abs=1e-9)


def test_the_header_says_what_other_tools_read(space: Space):
    """ModelSpec and AUTOMATIC1111's fields are in the header, parents under their pinned sha256, ancestors as their files claim them."""
    ancestors = {"AB" * 32: {"name": "grandparent", "legacy_hash": "x", "sd_merge_recipe": None}, "junk": 3}
    space.pair()
    path = space.checkpoint("B", checkpoints.miniature("sd1", "B", every=40), {"format": "pt", "sd_merge_models": json.dumps(ancestors)})
    import hashlib

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    space.edit('path = "B.safetensors"', f'path = "B.safetensors"\nsha256 = "{sha256}"')
    space.build()
    with safe_open(space.path / "out" / "mix.safetensors", "pt") as file:
        metadata = file.metadata()

    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert (metadata["modelspec.resolution"], metadata["modelspec.merged_from"]) == ("512x512", "A, B")
    assert set(json.loads(metadata["sd_merge_models"])) == {sha256, "ab" * 32}
    assert json.loads(metadata["sd_merge_recipe"])["secondary_model_hash"] == sha256
    manifest = tomllib.loads((space.path / "out" / "mix.manifest.toml").read_text())
    assert manifest["claimed"] == [{"by": "B", "sha256": "ab" * 32, "name": "grandparent", "said_in": "sd_merge_models"}]


@pytest.mark.parametrize(
    "claim", ["not json", "[" * 100_000, json.dumps([1]), json.dumps({"ab" * 32: {"name": 3}}), "{" + '"a":1,' * 300_000 + '"b":2}'], ids=len
)
def test_hostile_claims_of_a_parent_are_passed_over(space: Space, claim):
    """Metadata of a parent that is no lineage, huge or nested without end neither fails nor burdens a build."""
    space.pair()
    space.checkpoint("B", checkpoints.miniature("sd1", "B", every=40), {"format": "pt", "sd_merge_models": claim})
    space.build()
    with safe_open(space.path / "out" / "mix.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sd_merge_models"]) == {}


def test_a_ratio_that_was_built_before_is_explained_by_the_ratio(space: Space):
    """
    Where the tensors of a changed step are in the store already, the reason is still the change, and that nothing need be merged.
    """
    space.pair(CHAIN)
    space.build()
    space.edit("0.2 * A + 0.8 * B", "0.3 * A + 0.7 * B")
    space.edit("[step.mix]", "[step.mix]\nartifact = true")
    space.edit('[step.outer]\nformula = "0.5 * mix + 0.5 * B"', '[step.outer]\nformula = "0.5 * mix + 0.5 * A"')
    space.build(only=("mix",))
    report = space.build()

    assert states(report)["lone"] == "re-emitted"
    assert report.wishes[-1].reasons == ["param.formula = 0.2 * A + 0.8 * B → 0.3 * A + 0.7 * B", "its tensors are already in the store"]
