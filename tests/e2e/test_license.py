"""Terms, end to end: `sdbuild license`, builds, releases and lineages, with the real command in a scratch folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import checkpoints
import pytest
from conftest import Space
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
EVIDENCE = 'evidence = { url = "https://example.org/terms", date = 2026-11-01 }'
RECIPE = """
recipe = 1
architecture = "sd1"
{top}

[source.A]
path = "A.safetensors"
{a}

[source.B]
path = "B.safetensors"
{b}

[step.mix]
formula = "0.3 * A + 0.7 * B"
{step}
"""
PERMITTED = """permissions = { allowNoCredit = true, allowCommercialUse = ["Image", "RentCivit", "Rent", "Sell", "SellMerge"], \
allowDerivatives = true, allowDifferentLicense = true }"""


def licensed(name: str) -> str:
    return f'license = "{name}"\n{EVIDENCE}'


RAIL = licensed("CreativeML Open RAIL-M")


def cook(space: Space, a: str = RAIL, b: str = RAIL, *, top: str = "", step: str = "") -> None:
    space.pair(RECIPE.format(a=a, b=b, top=top, step=step))


def terms_of(space: Space, target: str = "recipe.toml") -> dict:
    run = space.sdbuild("license", target, "--json")
    assert run.returncode in {0, 3}, run.stderr
    [artifact] = json.loads(run.stdout)["artifacts"]
    assert run.returncode == (3 if artifact["terms"]["share"] == "no" else 0)
    return artifact["terms"]


def manifest_of(space: Space, name: str = "mix") -> dict:
    return tomllib.loads((space.path / "out" / f"{name}.manifest.toml").read_text(encoding="utf-8"))


def header_of(space: Space, path: str = "out/mix.safetensors") -> dict[str, str]:
    with safe_open(space.path / path, "pt") as file:
        return dict(file.metadata())


def test_the_showcase_is_not_to_be_shared_until_somebody_shows_its_parents_permissions(space: Space):
    """Both parents' flags on Civitai are unknown, which is a conflict; asserted with evidence and date, the texts allow a conclusion."""
    shutil.copy(ROOT / "recipes" / "estrilda.toml", space.path / "estrilda.toml")
    before = space.sdbuild("license", "estrilda.toml")
    text = (space.path / "estrilda.toml").read_text(encoding="utf-8")
    space.write("estrilda.toml", text.replace('license  = "Creative', f'{EVIDENCE}\n{PERMITTED}\nlicense  = "Creative'))
    after = space.sdbuild("license", "estrilda.toml")

    assert before.returncode == 3
    assert "conflict C8: the terms of `MeinaPastel`, `viewer-mix` are not known" in before.stdout
    assert before.stdout.count("what its author permits on Civitai is not known") == 2
    assert (after.returncode, after.stderr) == (0, "")
    assert "terms: CreativeML Open RAIL-M\n" in after.stdout
    assert "the recipe, with evidence: https://example.org/terms on 2026-11-01" in after.stdout


def test_a_release_is_refused_before_anything_large_is_read(space: Space):
    """FAIPL-1.0-SD with a non-commercial parent is conflict C1: exit 3 under --release, with no source hashed and nothing written."""
    cook(space, licensed("FAIPL-1.0-SD"), licensed("CC-BY-NC-4.0"))
    run = space.sdbuild("recipe.toml", "--release")

    assert run.returncode == 3
    assert "artifact `mix` cannot be released (C1)" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (space.path / "cache").exists()
    assert not (space.path / "out").exists()


def test_a_private_build_of_the_same_always_works_and_says_so(space: Space):
    """Without a release, the build succeeds, prints one line about its terms, and records that it is not to be shared."""
    cook(space, licensed("FAIPL-1.0-SD"), licensed("CC-BY-NC-4.0"))
    run = space.sdbuild("recipe.toml")
    terms = manifest_of(space)["terms"]

    assert run.returncode == 0
    [line] = [line for line in run.stdout.splitlines() if line.startswith("terms: ")]
    assert "not to be shared: a copyleft text meets limits (C1)" in line
    assert terms["share"] == "no"
    assert [c["id"] for c in terms["conflict"] if c["level"] == "conflict"] == ["C1"]


@pytest.mark.parametrize(
    ("a", "b", "license_"),
    [
        ("CreativeML Open RAIL-M", "FAIPL-1.0-SD", "LicenseRef-scancode-fair-ai-public-1.0-sd"),
        ("Apache-2.0", "FLUX.1 [dev] Non-Commercial License", "LicenseRef-scancode-flux-1-nc"),
    ],
)
def test_the_stricter_licence_is_what_the_result_comes_under(space: Space, a, b, license_):
    """RAIL and FAIPL-SD make FAIPL-SD, schnell and dev make FLUX non-commercial; the release is written and says so in its header."""
    cook(space, licensed(a), licensed(b))
    run = space.sdbuild("recipe.toml", "--release")

    assert run.returncode == 0, run.stderr
    assert manifest_of(space)["terms"]["license"] == license_
    assert header_of(space)["modelspec.license"] == manifest_of(space)["terms"]["license_title"]


def test_a_declared_licence_that_is_looser_refuses_the_release(space: Space):
    """A `[release]` table alone asks for the check: MIT over a non-commercial parent is C7, an unknown name gets the nearest one."""
    cook(space, RAIL, licensed("CC-BY-NC-4.0"), top='[release]\nlicense = "MIT"')
    looser = space.sdbuild("recipe.toml")
    space.edit('"MIT"', '"CC-BY-NC-4.O"')
    unknown = space.sdbuild("recipe.toml")

    assert (looser.returncode, unknown.returncode) == (3, 3)
    assert "(C7)" in looser.stderr
    assert "did you mean `cc-by-nc-4.0`?" in unknown.stderr
    assert not (space.path / "out").exists()


def test_a_release_folder_is_whole_and_its_documents_validate(space: Space):
    """Artifact, manifest, notice, licence texts, card, statement and bill of materials; a second run changes nothing."""
    space.write("texts/rail.txt", "the text of the licence\n")
    cook(space, f'{RAIL}\nlicense_file = "texts/rail.txt"\ncredit = "Ada"', top='[release]\ntitle = "Evening"\nversion = "2"\nauthor = "someone"')
    assert space.sdbuild("recipe.toml", "--release").returncode == 0
    folder = space.path / "out" / "release" / "mix"
    first = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}
    again = space.sdbuild("recipe.toml", "--release")

    assert {"mix.safetensors", "mix.manifest.toml", "NOTICE", "README.md", "mix.intoto.jsonl", "mix.cdx.json"} <= {p.name for p in first}
    assert "nothing to do" in again.stdout
    assert first == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert "the text of the licence\n" in [p.read_text(encoding="utf-8") for p in (folder / "LICENSES").iterdir()]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str((folder / "mix.cdx.json").read_text(encoding="utf-8")) is None
    [subject] = json.loads((folder / "mix.intoto.jsonl").read_text(encoding="utf-8"))["subject"]
    assert subject["digest"]["sha256"] == hashlib.sha256((folder / "mix.safetensors").read_bytes()).hexdigest()


def test_a_folder_with_other_things_in_it_is_not_replaced(space: Space):
    """A release is refused before anything is built where somebody keeps files of their own."""
    cook(space)
    mine = space.write("out/release/mix/holiday.txt", "mine")
    run = space.sdbuild("recipe.toml", "--release")

    assert run.returncode == 1
    assert "holds what sdbuild did not write" in run.stderr
    assert mine.read_text(encoding="utf-8") == "mine"
    assert not (space.path / "out" / "mix.safetensors").exists()


def test_a_merge_of_ones_own_can_be_a_parent_of_a_release(space: Space):
    """Parents of parents that nobody pinned have no sha256; the documents do without, and name no text that does not exist."""
    cook(space)
    space.build()
    child = f'recipe = 1\narchitecture = "sd1"\n[source.mix]\npath = "out/mix.safetensors"\n[source.A]\npath = "A.safetensors"\n{RAIL}\n'
    space.write("child.toml", child + '[step.child]\nformula = "0.5 * mix + 0.5 * A"\n')
    run = space.sdbuild("child.toml", "--release")
    folder = space.path / "out" / "release" / "child"

    assert run.returncode == 0, run.stderr
    assert [path.name for path in (folder / "LICENSES").iterdir()] == ["LicenseRef-CreativeML-OpenRAIL-M.txt"]
    assert "B, claimed by mix" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_release_that_cannot_be_signed_leaves_the_earlier_one(space: Space):
    """A key that cannot sign is refused before anything is built, and the signed release stays as it is."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    for name, key in (("good", ec.generate_private_key(ec.SECP256R1())), ("rsa", rsa.generate_private_key(65537, 2048))):
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (space.path / f"{name}.pem").write_bytes(key.private_bytes(*form))
    cook(space)
    assert space.sdbuild("recipe.toml", "--sign", "good.pem").returncode == 0
    signature = space.path / "out" / "release" / "mix" / "model.sig"
    before = signature.read_bytes()
    for key in ("rsa.pem", "nowhere.pem", "recipe.toml"):
        run = space.sdbuild("recipe.toml", "--sign", key)
        assert run.returncode == 1
        assert run.stderr.startswith(f"error: {key}: ")
    assert signature.read_bytes() == before


def test_terms_are_edited_without_merging_again(space: Space):
    """Another title, credit or licence writes another header before the same data."""
    cook(space, f'{RAIL}\ncredit = "Ada"')
    space.build()
    digest = manifest_of(space)["artifact"]["tensor_digest"]
    for old, new in (('credit = "Ada"', 'credit = "Grace"'), ('formula = "', 'title = "Dusk"\nformula = "'), ("CreativeML Open RAIL-M", "MIT")):
        space.edit(old, new)
        [wish] = space.build().wishes
        assert wish.state.value == "re-emitted"
        assert wish.stored.tensor_digest == digest


def test_a_file_merged_by_automatic1111_brings_its_ancestors_as_claimed(space: Space):
    """A parent with AUTOMATIC1111's fields: its ancestors are in the tree, in the manifest and in `inspect`, as somebody's word."""
    recipe = {"type": "webui", "primary_model_hash": "ab" * 32, "secondary_model_hash": "cd" * 32, "interp_method": "Weighted sum", "multiplier": 0.3}
    models = {sha * 32: {"name": name, "legacy_hash": "0123abcd", "sd_merge_recipe": None} for sha, name in (("ab", "grandma"), ("cd", "grandpa"))}
    metadata = {"format": "pt", "sd_merge_recipe": json.dumps(recipe), "sd_merge_models": json.dumps(models)}
    cook(space)
    space.checkpoint("B", checkpoints.miniature("sd1", "B", every=40), metadata)
    space.build()
    tree = space.sdbuild("license", "recipe.toml")
    inspected = space.sdbuild("inspect", "B.safetensors")
    claimed = [a for a in manifest_of(space)["terms"]["ancestor"] if a.get("claimed_by")]

    assert [(a["name"], a["claimed_by"], a["status"]) for a in claimed] == [("B: grandma", "B", "claimed"), ("B: grandpa", "B", "claimed")]
    assert manifest_of(space)["terms"]["status"] == "claimed"
    assert "   ├─ B: grandma" in tree.stdout
    assert "made by AUTOMATIC1111; Weighted sum" in inspected.stdout
    assert f"claimed  grandpa  sha256 {'cd' * 32}" in inspected.stdout


def test_a_parent_made_here_brings_the_terms_of_its_own_parents(space: Space):
    """An artifact that is used elsewhere, without a word about its licence, comes under what its own parents came under."""
    cook(space, licensed("CC-BY-NC-4.0"), f"{RAIL}\n{PERMITTED.replace('allowNoCredit = true', 'allowNoCredit = false')}")
    space.build()
    child = f'recipe = 1\narchitecture = "sd1"\n[source.mix]\npath = "out/mix.safetensors"\n[source.C]\npath = "A.safetensors"\n{RAIL}\n'
    space.write("child.toml", child + '[step.child]\nformula = "0.5 * mix + 0.5 * C"\n')
    terms = terms_of(space, "child.toml")

    assert terms["concluded"]["weights_commercial"] == "non-commercial"
    assert terms["concluded"]["credit"]
    assert terms["status"] == "claimed"
    assert terms["share"] == "on-terms"


def test_what_was_unknown_is_not_known_by_being_merged_twice(space: Space):
    """A licence without evidence, or none at all, is unknown in the child, in the grandchild, and in a file without its manifest."""
    for a in ('license = "CreativeML Open RAIL-M"', ""):
        cook(space, a)
        space.build()
        child = 'recipe = 1\narchitecture = "sd1"\n[source.{0}]\npath = "out/{0}.safetensors"\n[step.{1}]\nformula = "1.0 * {0}"\n'
        space.write("child.toml", child.format("mix", "child"))
        space.build("child.toml")
        space.write("grandchild.toml", child.format("child", "grandchild"))
        space.build("grandchild.toml")
        (space.path / "out" / "grandchild.manifest.toml").unlink()

        assert terms_of(space, "child.toml")["status"] == "unknown"
        assert terms_of(space, "grandchild.toml")["status"] == "unknown"
        assert terms_of(space, "out/grandchild.safetensors")["share"] == "no"


def test_terms_are_handed_on_to_grandchildren(space: Space):
    """What binds a grandparent binds the grandchild, though its recipe never names it."""
    cook(space, licensed("CC-BY-NC-4.0"))
    space.build()
    child = 'recipe = 1\narchitecture = "sd1"\n[source.{0}]\npath = "out/{0}.safetensors"\n[step.{1}]\nformula = "1.0 * {0}"\n'
    space.write("child.toml", child.format("mix", "child"))
    space.build("child.toml")
    space.write("grandchild.toml", child.format("child", "grandchild"))

    assert terms_of(space, "grandchild.toml")["concluded"]["weights_commercial"] == "non-commercial"
    assert terms_of(space, "grandchild.toml")["status"] == "claimed"


@pytest.mark.parametrize("extent", ["full", "licences", "none"])
def test_the_author_decides_what_the_file_itself_tells(space: Space, extent):
    """How much of the lineage is embedded is for the author to say; the manifest always has all."""
    cook(space, f'{RAIL}\ncredit = "Ada"', top=f'[release]\nlineage = "{extent}"')
    space.build()
    metadata = header_of(space)
    lineage, manifest = json.loads(metadata["sdbuild.lineage"]), manifest_of(space)

    assert ("steps" in lineage, "sd_merge_models" in metadata) == (extent == "full", extent == "full")
    assert ("Ada" in metadata["sdbuild.lineage"], "modelspec.merged_from" in metadata) == (extent != "none", extent != "none")
    assert ("0.3" in json.dumps(metadata)) == (extent == "full")
    assert manifest["step"][0]["formula"] == "0.3 * A + 0.7 * B"
    assert manifest["source"][0]["credit"] == "Ada"


def test_what_contributes_nothing_is_listed_and_binds_nobody(space: Space):
    """A parent whose ratio is nothing everywhere stands in the tree; its terms do not count, and with any ratio they do.

    They do as well where tensors that only it has would be kept, and where it is the first, whose constants are copied.
    """
    cook(space, RAIL, licensed("CC-BY-NC-ND-4.0"), step='extra = "drop"')
    space.edit('formula = "0.3 * A + 0.7 * B"', 'method = "weighted_sum"\na = "A"\nb = "B"\nalpha = { base = 0.0, blocks = { IN00 = 0.0 } }')
    nothing = terms_of(space)
    space.edit("IN00 = 0.0", "IN00 = 0.01")
    something = terms_of(space)
    space.edit("IN00 = 0.01", "IN00 = 0.0")
    space.edit('extra = "drop"', "")
    kept = terms_of(space)
    space.edit("base = 0.0, blocks = { IN00 = 0.0 }", "base = 1.0")
    first = terms_of(space)

    assert (kept["share"], first["ancestor"][0]["contributes"]) == ("no", True)
    assert [(a["name"], a["contributes"]) for a in nothing["ancestor"]] == [("A", True), ("B", False)]
    assert (nothing["share"], something["share"]) == ("on-terms", "no")


def test_an_unknown_licence_is_named_with_the_nearest_and_the_build_goes_on(space: Space):
    """A mistyped licence is no licence: the nearest known one is a hint, and nothing is concluded."""
    cook(space, licensed("CreativML Open RAIL-M"), licensed("other"))
    run = space.sdbuild("recipe.toml")
    notes = [note for a in manifest_of(space)["terms"]["ancestor"] for note in a.get("notes", [])]

    assert run.returncode == 0
    assert any("is not a licence that is known; did you mean `CreativeML Open RAIL-M`?" in note for note in notes)
    assert manifest_of(space)["terms"]["status"] == "unknown"


@pytest.mark.parametrize(
    ("permissions", "note"),
    [
        ('{ allowCommercialUse = ["Images"] }', "did you mean `Image`?"),
        ("{ allowNoCredit = 1 }", "`allowNoCredit` is of type int, not true or false"),
        ("{ allowEverything = true }", "`allowEverything` is no permission"),
        ('{ allowCommercialUse = "{Image,RentCivit}" }', ""),
    ],
)
def test_permissions_nobody_understands_conclude_nothing(space: Space, permissions, note):
    """Unknown members, wrong types and missing flags are told, and count as not known."""
    cook(space, f"{RAIL}\npermissions = {permissions}")
    terms = terms_of(space)
    [a] = [a for a in terms["ancestor"] if a["name"] == "A"]

    assert a["status"] == "unknown"
    assert note in " ".join(a.get("notes", []))
    assert terms["share"] == "no"


@pytest.mark.parametrize("field", ["sd_merge_models", "sd_merge_recipe", "sdbuild.lineage", "prompt", "mecha_recipe", "modelspec.license"])
@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{", '{"a": ' * 500 + "1" + "}" * 500, "\u202e\x1b[31mred", json.dumps({"x" * 70: {"name": "n" * 300_000}}), "[1e999, NaN]"],
    ids=["deep", "cut", "nested", "control", "huge", "numbers"],
)
def test_hostile_claims_of_a_parent_do_not_stop_a_build(space: Space, field, text):
    """Whatever a parent's header claims, the build goes on with what is known, and terminals are not obeyed."""
    cook(space)
    space.checkpoint("B", checkpoints.miniature("sd1", "B", every=40), {"format": "pt", field: text})
    space.build()
    shown = space.sdbuild("license", "out/mix.safetensors")

    assert shown.returncode in {0, 3}, shown.stderr
    assert "\x1b" not in shown.stdout
    assert "Traceback" not in shown.stderr


def test_a_file_is_judged_by_its_manifest_or_by_its_own_word(space: Space):
    """Beside its manifest a file has the terms it was built with; alone it has what its header claims; a stranger's has none."""
    cook(space, licensed("CC-BY-NC-4.0"))
    space.build()
    beside = terms_of(space, "out/mix.safetensors")
    (space.path / "out" / "mix.manifest.toml").unlink()
    alone = terms_of(space, "out/mix.safetensors")
    stranger = terms_of(space, "A.safetensors")

    assert (beside["status"], alone["status"], stranger["status"]) == ("known", "claimed", "unknown")
    assert beside["concluded"]["weights_commercial"] == alone["concluded"]["weights_commercial"] == "non-commercial"


def test_an_edited_manifest_cannot_confuse_the_tree(space: Space):
    """Ancestors that claim each other in a circle are drawn once; what has no form of terms is passed over."""
    cook(space)
    space.build()
    path = space.path / "out" / "mix.manifest.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('name = "A"\ncontributes', 'name = "A"\nclaimed_by = "A"\ncontributes'), encoding="utf-8")
    circle = space.sdbuild("license", "out/mix.safetensors")
    path.write_text(text.replace("summary = ", "summary_ = "), encoding="utf-8")
    broken = space.sdbuild("license", "out/mix.safetensors")

    assert (circle.returncode, broken.returncode) == (0, 0), circle.stderr + broken.stderr
    assert "Traceback" not in circle.stderr + broken.stderr


def test_a_licence_text_that_is_not_there_is_an_error_before_the_build(space: Space):
    """A `license_file` nobody can read is a mistake in the recipe, with its line."""
    cook(space, f'{RAIL}\nlicense_file = "nowhere.txt"')
    run = space.sdbuild("recipe.toml")

    assert run.returncode == 2
    assert "recipe.toml:10: the licence file `nowhere.txt` of source `A` cannot be read" in run.stderr
    assert not (space.path / "cache").exists()


CHILD = 'recipe = 1\narchitecture = "sd1"\n[source.{0}]\npath = "out/{0}.safetensors"\n[step.{1}]\nformula = "1.0 * {0}"\n'


def test_what_parents_headers_say_binds_grandchildren(space: Space):
    """Licences that only the parents' own headers name are handed on through every generation."""
    cook(space, "", "")
    for name, licence in (("A", "CC-BY-NC-4.0"), ("B", "CreativeML Open RAIL-M")):
        space.checkpoint(name, checkpoints.miniature("sd1", name, every=40), {"format": "pt", "modelspec.license": licence})
    space.build()
    for parent, child in (("mix", "child"), ("child", "grandchild")):
        space.write(f"{child}.toml", CHILD.format(parent, child))
        terms = terms_of(space, f"{child}.toml")
        assert terms["concluded"]["weights_commercial"] == "non-commercial"
        assert terms["concluded"]["use_restrictions"]
        assert terms["status"] == "claimed"
        space.build(f"{child}.toml")


@pytest.mark.parametrize("status", ["claimed", "known", "parents"])
def test_a_lineage_without_a_word_about_terms_permits_nothing(space: Space, status):
    """A header that names a parent and says no licence leaves it unknown, whatever it says of how well it is known."""
    lineage = json.dumps({"lineage": 1, "sources": [{"name": "x", "status": status}]})
    cook(space, RAIL, "")
    space.checkpoint("B", checkpoints.miniature("sd1", "B", every=40), {"format": "pt", "sdbuild.lineage": lineage})

    assert terms_of(space)["status"] == "unknown"


@pytest.mark.parametrize("text", ["x" * (2 << 20), json.dumps({"lineage": 1, "sources": [{"name": str(n), "license": "mit"} for n in range(1001)]})])
def test_a_lineage_that_is_not_read_whole_permits_nothing(space: Space, text):
    """What is too long or names too many is not known, though what can be read of it is MIT; evidence for the file itself settles it."""
    cook(space, RAIL, "")
    metadata = {"format": "pt", "sdbuild.lineage": text, "modelspec.license": "MIT"}
    space.checkpoint("B", checkpoints.miniature("sd1", "B", every=40), metadata)

    assert terms_of(space)["status"] == "unknown"


def test_a_lineage_that_was_left_out_permits_nothing(space: Space):
    """With `lineage = "none"` a file says nothing of its parents, so whoever uses it has to."""
    cook(space, licensed("CC-BY-4.0"), top='[release]\nlicense = "CC-BY-4.0 AND CreativeML Open RAIL-M"\nlineage = "none"')
    space.build()
    space.write("child.toml", CHILD.format("mix", "child"))
    before = terms_of(space, "child.toml")
    space.edit('path = "out/mix.safetensors"', f'path = "out/mix.safetensors"\n{licensed("CC-BY-4.0")}', name="child.toml")
    after = terms_of(space, "child.toml")

    assert (before["share"], after["share"]) == ("no", "on-terms")


def test_a_licence_text_outside_the_recipes_folder_is_refused(space: Space):
    """A recipe puts no other files of its reader into a release: not by an absolute path, not by dots, not by a link."""
    (space.path / "secret.txt").write_text("mine", encoding="utf-8")
    (space.path / "r").mkdir()
    (space.path / "r" / "link.txt").symlink_to(space.path / "secret.txt")
    for said in (str(space.path / "secret.txt"), "../secret.txt", "link.txt"):
        recipe = RECIPE.format(a=f'{RAIL}\nlicense_file = "{said}"', b=RAIL, top="", step="")
        space.write("r/recipe.toml", recipe)
        run = space.sdbuild("r/recipe.toml", "--rehearse", "--release")
        assert run.returncode == 2
        assert "it must lie in the recipe's folder, or below" in run.stderr


@pytest.mark.parametrize(
    "field", ['homepage = "https://me:hunter2@example.org/x"', 'evidence = { url = "https://example.org/?token=hunter2", date = 2026-11-01 }']
)
def test_addresses_with_secrets_are_refused(space: Space, field):
    """What is published holds no login and no token, and the message does not repeat it."""
    cook(space, f'license = "MIT"\n{field}')
    run = space.sdbuild("recipe.toml")

    assert run.returncode == 2
    assert "holds a login or a token" in run.stderr
    assert "hunter2" not in run.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('share = "on-terms"', 'share = "No"'),
        ('share = "on-terms"', "share = 2026-01-01"),
        ("contributes = true", "contributes = true\nnotes = 5"),
        ("contributes = true", "contributes = true\nclaimed_by = []"),
        ('kind = "', 'ancestors = 5\nkind_ = "'),
    ],
)
def test_an_edited_manifest_is_no_reason_for_a_traceback(space: Space, old, new):
    """What has not the form of terms is passed over, and only `on-terms` is success."""
    cook(space)
    space.build()
    path = space.path / "out" / "mix.manifest.toml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    for flags in ((), ("--json",)):
        run = space.sdbuild("license", "out/mix.safetensors", *flags)
        assert run.returncode in {0, 3}
        assert "Traceback" not in run.stderr
        assert run.returncode == 3 or '"No"' not in run.stdout


def test_with_keep_going_only_what_conflicts_is_left_out(space: Space):
    """One artifact that cannot be released does not stop another."""
    cook(space, RAIL, licensed("CC-BY-NC-ND-4.0"))
    space.edit("[step.mix]", '[step.alone]\nformula = "1.0 * A"\n\n[step.mix]')
    run = space.sdbuild("recipe.toml", "--release", "--keep-going")

    assert run.returncode == 3
    assert [path.name for path in sorted((space.path / "out" / "release").iterdir())] == ["alone"]
