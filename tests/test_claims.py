"""What headers claim of their origin: the dialects of the field, as their tools write them, and everything that is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.claims import CLAIMS, MAX_CLAIM, MAX_CLAIMS, Claimed, Claims, read_claims, webui_models

ANIME, PHOTO, BASE, EXTRA, LORA = ("a1" * 32, "b2" * 32, "c3" * 32, "d4" * 32, "e5" * 32)


def webui_recipe(*parents: str | None, **said: Any) -> dict[str, Any]:
    """What AUTOMATIC1111 writes of its last merge."""
    hashes = dict(zip(("primary_model_hash", "secondary_model_hash", "tertiary_model_hash"), (*parents, None, None), strict=False))
    rest = {"save_as_half": True, "custom_name": "", "config_source": 0, "bake_in_vae": "None", "discard_weights": "", "is_inpainting": False}
    return {"type": "webui", **hashes, "interp_method": "Weighted sum", "multiplier": 0.3, **rest, "is_instruct_pix2pix": False} | said


def webui_header() -> dict[str, str]:
    """A merge of two, the second of which was merged itself: its recipe is a table, for that tool parses what it reads."""
    inner = webui_recipe(BASE, EXTRA, BASE, interp_method="Add difference", multiplier=1.0)
    models = {
        ANIME: {"name": "anime/animeMix_v2.safetensors", "legacy_hash": "89d59c3d", "sd_merge_recipe": None},
        PHOTO: {"name": "photoMix.safetensors [b2b2b2b2b2]", "legacy_hash": "0a1b2c3d", "sd_merge_recipe": inner},
        BASE: {"name": "v1-5-pruned.ckpt", "legacy_hash": "e1441589", "sd_merge_recipe": None},
        EXTRA: {"name": "extra.safetensors", "legacy_hash": None, "sd_merge_recipe": None},
    }
    recipe = webui_recipe(ANIME, PHOTO, bake_in_vae="vae-ft-mse-840000.safetensors")
    return {"format": "pt", "sd_merge_recipe": json.dumps(recipe), "sd_merge_models": json.dumps(models)}


def named(claims: Claims) -> list[tuple[str, str]]:
    """Who is claimed: names and the beginnings of their hashes."""
    return [(claimed.name, claimed.sha256[:2] or claimed.short_hash) for claimed in claims.ancestors]


def test_a_merge_of_a_merge_by_automatic1111_names_its_whole_ancestry():
    """Parents, grandparents and the VAE that was baked in, each once, with the recipe of the parent that has one."""
    claims = read_claims(webui_header())

    assert "AUTOMATIC1111" == claims.made_by
    assert "Weighted sum, multiplier 0.3, bake in vae vae-ft-mse-840000.safetensors" == claims.recipe
    assert [
        ("anime/animeMix_v2.safetensors", "a1"),
        ("photoMix.safetensors", "b2"),
        ("v1-5-pruned.ckpt", "c3"),
        ("extra.safetensors", "d4"),
        ("vae-ft-mse-840000.safetensors", ""),
    ] == named(claims)
    assert ["", "Add difference, multiplier 1.0", "", "", ""] == [claimed.recipe for claimed in claims.ancestors]
    assert ["89d59c3d", "0a1b2c3d", "e1441589", "", ""] == [claimed.short_hash for claimed in claims.ancestors]
    assert ("sd_merge_models", "sd_merge_recipe") == (claims.ancestors[0].said_in, claims.ancestors[-1].said_in)
    assert () == claims.notes


def test_the_tables_within_tables_of_newer_forge_are_read():
    """It puts a parent's recipe and models under fixed names beside the parents; who is only in a recipe is known by its hash."""
    oldest = {EXTRA: {"name": "extra", "legacy_hash": None}, "sd_merge_recipe": webui_recipe(LORA)}
    older = json.dumps({BASE: {"name": "base", "legacy_hash": None}, "sd_merge_models": oldest})
    models = {ANIME: {"name": "anime", "legacy_hash": "89d59c3d"}, "sd_merge_models": older, "sd_merge_recipe": webui_recipe(BASE)}
    recipe = {"type": "Neo", "interp_method": "Weighted sum", "multiplier": 0.5, "primary_model_hash": ANIME, "secondary_model_hash": PHOTO}

    claims = read_claims({"sd_merge_recipe": json.dumps(recipe), "sd_merge_models": json.dumps(models)})

    assert [("anime", "a1"), ("base", "c3"), ("extra", "d4"), (LORA[:10], "e5"), (PHOTO[:10], "b2")] == named(claims)
    assert ("Forge Neo", ()) == (claims.made_by, claims.notes)


RECIPES = {
    "supermerger": (
        {"type": "sd-webui-supermerger", "weights_alpha": None, "model_a": ANIME, "model_b": PHOTO, "model_c": None, "base_alpha": 0, "base_beta": 0.25}
        | {"mode": "Weight sum:A*(1-alpha)+B*alpha", "mbw": False, "elemental_merge": [], "calcmode": "cosineA", "Off": []},
        "Weight sum:A*(1-alpha)+B*alpha, base alpha 0, base beta 0.25, calcmode cosineA",
        [(ANIME[:10], "a1"), (PHOTO[:10], "b2")],
    ),
    "Chattiori": (
        {"type": "merge-models-chattiori", "primary_model_hash": ANIME, "secondary_model_hash": PHOTO, "tertiary_model_hash": None}
        | {"merge_method": "Weighted Sum", "block_weights": False, "alpha_info": "0.45", "calculation": "Normal", "bake_in_vae": False},
        "Weighted Sum, alpha info 0.45, calculation Normal",
        [(ANIME[:10], "a1"), (PHOTO[:10], "b2")],
    ),
    "model-mixer": (
        {"type": "sd-webui-model-mixer", "mode": ["Sum", "Add-Diff"], "alpha": [0.5, 1.0], "model_a": "anime.safetensors [a1a1a1a1a1]"}
        | {"model_b": "photo.safetensors", "base_model": None, "uses": [True, False], "calcmode": ["Normal"], "mbw": [False]},
        "Sum,Add-Diff, alpha 0.5,1.0, calcmode Normal",
        [("anime.safetensors", "a1a1a1a1a1"), ("photo.safetensors", "")],
    ),
    "SD.Next": (
        {"type": "SDNext", "primary_model_hash": ANIME, "secondary_model_hash": PHOTO, "tertiary_model_hash": None}
        | {"merge_mode": "weighted_sum", "alpha": 0.5, "beta": None, "precision": "fp16", "custom_name": "mix"},
        "weighted_sum, alpha 0.5",
        [(ANIME[:10], "a1"), (PHOTO[:10], "b2")],
    ),
    "somebody-else": (
        {"type": "somebody-else", "primary_model_hash": None, "multiplier": None},
        "",
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("maker", RECIPES)
def test_recipes_of_other_mergers_name_their_parents(maker):
    """Even without the table of models: by the hashes and names in the recipe."""
    recipe, line, parents = RECIPES[maker]
    claims = read_claims({"sd_merge_recipe": json.dumps(recipe)})

    assert (maker, line, parents) == (claims.made_by, claims.recipe, named(claims))
    assert () == claims.notes


def test_a_lora_baked_in_by_chattiori_is_an_ancestor():
    """Its recipe stands where the models would; names and ancestors come from the headers it copies."""
    models = {"type": "pluslora-chattiori", "checkpoint_hash": ANIME, "lora_hash": f"{LORA},{EXTRA}", "alpha_info": "style:0.8", "output_name": "x"}
    checkpoint = {"format": "pt", "sd_merge_models": {BASE: {"name": "base"}}}
    fields = {"sd_merge_models": models, "checkpoint": checkpoint, "lora": {LORA: {"ss_output_name": "style"}}}

    claims = read_claims({name: json.dumps(value) for name, value in fields.items()})

    assert ("Chattiori", "LoRA baked in, alpha info style:0.8", ()) == (claims.made_by, claims.recipe, claims.notes)
    assert [(ANIME[:10], "a1"), ("style", "e5"), (EXTRA[:10], "d4"), ("base", "c3")] == named(claims)


def test_files_that_comfyui_loaded_for_the_saved_model_are_ancestors():
    """Loaders that only made a picture beside it are none; nor is a LoRA that is switched off."""
    graph = {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sdxl\\anime.safetensors"}},
        "10": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "photo.ckpt"}},
        "11": {"class_type": "ModelMergeBlocks", "inputs": {"model1": ["4", 0], "model2": ["12", 0], "input": 1.0, "middle": 0.5, "out": 0}},
        "12": {"class_type": "Power Lora Loader", "inputs": {"lora_1": {"on": True, "lora": "s.safetensors"}, "model": ["10", 0]}},
        "13": {"class_type": "CheckpointSave", "inputs": {"model": ["11", 0], "clip": ["4", 1], "vae": ["14", 0], "filename_prefix": "mix"}},
        "14": {"class_type": "VAELoader", "inputs": {"vae_name": "vae.pt"}},
        "15": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "4x.pth"}},
        "16": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "other.safetensors"}},
    }
    graph["12"]["inputs"]["lora_2"] = {"on": False, "lora": "t.safetensors"}
    claims = read_claims({"prompt": json.dumps(graph), "workflow": "{}"})

    assert ["sdxl\\anime.safetensors", "photo.ckpt", "s.safetensors", "vae.pt"] == [claimed.name for claimed in claims.ancestors]
    assert ("ComfyUI", "ModelMergeBlocks, input 1.0, middle 0.5, out 0") == (claims.made_by, claims.recipe)

    del graph["13"]
    everything = {claimed.name for claimed in read_claims({"prompt": json.dumps(graph)}).ancestors}
    assert {"sdxl\\anime.safetensors", "photo.ckpt", "s.safetensors", "vae.pt", "other.safetensors"} == everything


def test_a_workflow_of_comfyui_is_read_where_there_is_no_prompt():
    """Its nodes have values without names; those that are bypassed loaded nothing."""
    nodes = [
        {"type": "CheckpointLoaderSimple", "mode": 0, "widgets_values": ["anime.safetensors"]},
        {"type": "LoraLoader", "mode": 4, "widgets_values": ["off.safetensors", 1, 1]},
        {"type": "ControlNetLoader", "widgets_values": ["control.safetensors"]},
        {"type": "Note", "widgets_values": ["see other.safetensors"]},
    ]
    claims = read_claims({"workflow": json.dumps({"nodes": nodes})})

    assert (["anime.safetensors"], "ComfyUI") == ([claimed.name for claimed in claims.ancestors], claims.made_by)


def test_models_of_a_mecha_recipe_are_ancestors():
    """By name; of absolute paths, which tell of their author's machine, the file's name alone."""
    recipe = """version 0.1.0
model "C:\\\\Users\\\\estrilda\\\\models\\\\anime \\"v2\\".safetensors" model_config="sd1-ldm" merge_space="weight"
model "/home/estrilda/photo.safetensors" model_config="sd1-ldm" merge_space="weight"
model "loras/style.safetensors" model_config="sd1-kohya" merge_space="weight"
literal 0.3 model_config="singleton-mecha" merge_space="param"
merge "add_difference" &0 &1 alpha=&3
merge "weighted_sum" &4 &2 alpha=&3"""
    claims = read_claims({"mecha_recipe": recipe})

    assert ['anime "v2".safetensors', "photo.safetensors", "loras/style.safetensors"] == [claimed.name for claimed in claims.ancestors]
    assert ("sd-mecha", "add_difference, weighted_sum", ()) == (claims.made_by, claims.recipe, claims.notes)


def test_a_model_that_kohya_trained_on_is_an_ancestor():
    """By name, sha256 and the short hash of old."""
    header = {"ss_sd_model_name": "anime.safetensors", "ss_sd_model_hash": "e6e99610", "ss_new_sd_model_hash": ANIME, "ss_network_dim": "32"}
    claims = read_claims(header)

    assert (Claimed(name="anime.safetensors", sha256=ANIME, short_hash="e6e99610", said_in="ss_sd_model_name"),) == claims.ancestors
    assert "kohya" == claims.made_by


def test_modelspec_says_title_author_licence_and_parents():
    """Its list of parents is one of titles; a licence may be a whole text."""
    header = {"title": "Estrilda\nMix", "author": "Estrilda", "license": "CreativeML Open RAIL-M", "merged_from": "Anime Mix, photo ,, None"}
    claims = read_claims({f"modelspec.{name}": text for name, text in header.items()})

    assert ("Estrilda Mix", "Estrilda", "CreativeML Open RAIL-M", "") == (claims.title, claims.author, claims.license, claims.made_by)
    assert [("Anime Mix", ""), ("photo", "")] == named(claims)


def our_header(*sources: dict[str, Any]) -> dict[str, str]:
    """What a build of ours writes."""
    facts = {"method": "formula", "param.formula": "0.3 * [0] + 0.7 * [1]"}
    step = {"name": "mix", "facts": facts, "inputs": {"0": "anime", "1": "photo"}}
    return {"sdbuild.lineage": json.dumps({"lineage": 1, "sources": sources, "steps": [step]})}


def test_a_parent_of_ours_brings_the_terms_of_its_sources_along():
    """Licence, credit, page, permissions and their evidence; the tables for other tools name the same sources, and add nobody."""
    permissions = {"allowNoCredit": False, "allowCommercialUse": ["Image", "RentCivit"]}
    evidence = {"url": "https://civitai.com/models/1", "date": "2026-11-01"}
    said = {"license": "openrail++", "credit": "Ada", "homepage": "https://a.example", "uri": "civitai:1@2"}
    header = our_header(
        {"name": "anime", "sha256": ANIME, "tensors": "0", "permissions": permissions, "evidence": evidence, **said}, {"name": "photo"}
    )
    models = {ANIME: {"name": "anime", "legacy_hash": "89d59c3d", "sd_merge_recipe": None}, BASE: {"name": "base"}}

    claims = read_claims(header | {"sd_merge_models": json.dumps(models), "modelspec.merged_from": "anime, photo"})

    first = Claimed(
        name="anime",
        sha256=ANIME,
        short_hash="89d59c3d",
        said_in="sdbuild.lineage",
        permissions=permissions,
        evidence=evidence,
        status="unknown",
        **said,
    )
    assert first == claims.ancestors[0]
    assert [("anime", "a1"), ("photo", ""), ("base", "c3")] == named(claims)
    assert ("sdbuild", "0.3 * anime + 0.7 * photo") == (claims.made_by, claims.recipe)

    recipe = {"type": "sdbuild", "formula": "0.5 * anime + 0.5 * photo", "multiplier": None}
    assert "0.5 * anime + 0.5 * photo" == read_claims(header | {"sd_merge_recipe": json.dumps(recipe)}).recipe


def test_an_ancestor_with_two_licences_counts_under_both():
    """Nobody's terms are lost because somebody else's were said of the same file first, or because it has no name."""
    sources = [{"name": "anime", "sha256": ANIME, "license": "mit"}, {"name": "x", "sha256": ANIME, "license": "cc-by-nc-4.0"}, {"license": "?"}, {}]
    claims = read_claims(our_header(*sources, *sources))

    assert ["mit", "cc-by-nc-4.0", "?", ""] == [claimed.license for claimed in claims.ancestors]
    assert ["anime", "x", "(unnamed)", "(unnamed)"] == [claimed.name for claimed in claims.ancestors]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (None, {}),
        ({}, {}),
        ("none", {"…": "none"}),
        ([], {"…": []}),
        ({"allowCommercialUse": ["x"] * 51}, {"allowCommercialUse": "…"}),
        ({str(n): True for n in range(51)}, {"…": "…"}),
        ({"a": {"b": {"c": {"d": 1}}}}, {"a": {"b": {"c": "…"}}}),
        ({"a\x1b": "\ud800"}, {"a\\x1b": "\\ud800"}),
    ],
)
def test_permissions_beyond_limits_are_never_taken_for_none(said, kept):
    """What is left of them says so, for whoever judges them must refuse."""
    assert kept == read_claims(our_header({"name": "a", "permissions": said})).ancestors[0].permissions


def test_what_is_named_again_is_one_ancestor():
    """By sha256 in any case, by short hash, by its title or file name; another digest is another file."""
    header = our_header({"name": "anime", "sha256": ANIME.upper()}) | {"ss_sd_model_name": "models/ANIME.safetensors"}
    assert [("anime", "a1"), ("models/ANIME.safetensors", "")] == named(read_claims(header))
    assert [("anime", "a1")] == named(read_claims(header | {"ss_sd_model_name": "ANIME.safetensors"}))
    assert [("anime", "a1")] == named(
        read_claims(our_header({"name": "anime", "sha256": f"0x{ANIME}"}) | {"modelspec.merged_from": "b [a1a1a1a1a1]"})
    )
    assert [("anime", "a1"), ("anime", "b2b2b2b2b2")] == named(
        read_claims(our_header({"name": "anime", "sha256": ANIME}) | {"modelspec.merged_from": "anime [b2b2b2b2b2]"})
    )
    assert [("anime", ""), ("anime", "a1")] == named(read_claims(our_header({"name": "anime"}, {"name": "anime", "sha256": ANIME})))


DEEP = "[" * 100_000
MODELS = {ANIME: {"name": "anime"}}


@pytest.mark.parametrize(
    ("field", "text", "note"),
    [
        ("sd_merge_models", "x" * (MAX_CLAIM + 1), "`sd_merge_models` has 1048577 characters; no more than 1048576 are read"),
        ("sd_merge_models", DEEP, "`sd_merge_models` is nested more than 64 deep"),
        ("prompt", '{"a":' * 65 + "1" + "}" * 65, "`prompt` is nested more than 64 deep"),
        ("sd_merge_recipe", "not JSON", "`sd_merge_recipe` is not JSON"),
        ("sd_merge_recipe", '{"type": "webui"', "`sd_merge_recipe` is not JSON"),
        ("sd_merge_recipe", "[1]", "`sd_merge_recipe` is not a table"),
        ("sd_merge_recipe", "1e999", "`sd_merge_recipe` is not a table"),
        ("sd_merge_models", json.dumps(MODELS | {"junk": 3, BASE: 4}), "`sd_merge_models` has entries that are no model under its sha256"),
        ("sd_merge_models", json.dumps({ANIME: {"sd_merge_recipe": DEEP}}), "a recipe within `sd_merge_models` is nested more than 64 deep"),
        ("sd_merge_models", json.dumps({ANIME: {}, "sd_merge_models": 3}), "the table within `sd_merge_models` is not a table"),
        ("sdbuild.lineage", '{"sources": 3}', "`sdbuild.lineage` has no list of sources"),
        ("sdbuild.lineage", '{"sources": [3]}', "`sdbuild.lineage` has a source that is not a table"),
        ("sdbuild.lineage", '{"lineage": 1, "omitted": "ab"}', "`sdbuild.lineage` is left out of the header: it is in the file's manifest"),
        ("mecha_recipe", "merge this with that", "`mecha_recipe` does not begin with a version"),
        ("modelspec.title", 3, "`modelspec.title` is not text"),
        ("modelspec.merged_from", ",".join(map(str, range(100_000))), "more ancestors are named than are read: 1000 are listed"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_once_and_the_rest_is_read(field, text, note):
    """One clear message, and the claims of the other fields are there."""
    claims = read_claims({"ss_sd_model_name": "base", field: text})

    assert (note,) == claims.notes
    assert "base" in [claimed.name for claimed in claims.ancestors]
    assert webui_models({field: text}).keys() <= {ANIME}


def test_brackets_in_strings_nest_nothing():
    """A name may be full of them."""
    models = {ANIME: {"name": "[" * 200 + '\\"' + "{" * 200}}
    assert () == read_claims({"sd_merge_models": json.dumps(models)}).notes


@pytest.mark.parametrize("number", ["1e999", "-Infinity", "NaN", "1" * 100_000, "0." + "3" * 100_000])
def test_numbers_that_no_float_holds_stay_text(number):
    """They spoil nothing beside them, and what is handed on is JSON for everybody."""
    text = f'{{"type": "webui", "multiplier": {number}, "interp_method": "Weighted sum", "primary_model_hash": "{ANIME}"}}'
    claims = read_claims({"sd_merge_recipe": text})
    assert claims.recipe.startswith(f"Weighted sum, multiplier {number[:30]}")
    assert [ANIME] == [claimed.sha256 for claimed in claims.ancestors]

    models = webui_models({"sd_merge_models": f'{{"{ANIME}": {{"name": "a", "legacy_hash": {number}}}}}'})
    json.dumps(models, allow_nan=False)


FLOODS = {
    "models": ("sd_merge_models", json.dumps({f"{n:064x}": {"name": "a"} for n in range(12_000)})),
    "the same over again": ("sd_merge_models", "{" + ",".join(f'"{ANIME}": {{"name": "{n}"}}' for n in range(10_000)) + "}"),
    "entries": ("sd_merge_models", json.dumps(dict.fromkeys(map(str, range(80_000)), 1))),
    "commas": ("modelspec.merged_from", "," * MAX_CLAIM),
    "hashes": ("sd_merge_recipe", json.dumps({"lora_hash": ",".join(f"{n:064x}" for n in range(15_000))})),
    "commas in a recipe": ("sd_merge_recipe", json.dumps({"lora_hash": "," * 1_000_000})),
    "sources": ("sdbuild.lineage", json.dumps({"sources": [{}] * 250_000})),
    "licences": ("sdbuild.lineage", json.dumps({"sources": [{"name": "a", "license": str(n)} for n in range(25_000)]})),
    "nodes": ("prompt", json.dumps({str(n): {"class_type": "Load", "inputs": {"a": [str(n + 1), 0], "b": f"{n}.pt"}} for n in range(12_000)})),
    "lines": ("mecha_recipe", "version\n" + "".join(f'model "{n}"\n' for n in range(60_000))),
    "quotes": ("mecha_recipe", 'version\nmodel "' + "\\a" * 500_000),
    "empty tables": ("workflow", json.dumps({"nodes": [{}] * 250_000})),
    "strings": ("prompt", '["' + '\\"' * 500_000),
    "brackets": ("prompt", "[]" * 500_000),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_is_read_as_far_as_a_thousand_ancestors(flood, monkeypatch):
    """The work is bounded, counted in mentions that are registered."""
    from sdmerge_build.claims import Register

    field, text = FLOODS[flood]
    added = []
    monkeypatch.setattr("sdmerge_build.claims.Register.add", lambda self, claimed, add=Register.add: added.append(1) or add(self, claimed))
    assert len(text) <= MAX_CLAIM

    claims = read_claims({field: text})

    assert len(added) <= 10 * MAX_CLAIMS
    assert len(claims.ancestors) <= MAX_CLAIMS
    assert len(webui_models({field: text})) <= MAX_CLAIMS
    assert len(claims.notes) <= 2


def test_recipes_within_recipes_end():
    """Tables within tables are read for some generations; text within text grows too fast to go on."""
    table: Any = {ANIME: {"name": "oldest"}}
    for n in range(20):
        table = {f"{n:064x}": {"name": str(n)}, "sd_merge_models": table}
    claims = read_claims({"sd_merge_models": json.dumps(table)})
    assert ("`sd_merge_models` has more than 16 tables within each other",) == claims.notes
    assert [str(n) for n in range(19, 3, -1)] == [claimed.name for claimed in claims.ancestors]


def test_models_are_handed_on_in_the_form_of_automatic1111():
    """Sorted, in lower case, with whatever their recipes are; nothing but models under their sha256."""
    recipe = webui_recipe(BASE)
    models = {PHOTO.upper(): {"name": "half \ud800", "legacy_hash": "x", "sd_merge_recipe": recipe, "more": 1}, ANIME: {"name": "anime"}}
    strays = {"junk": 3, BASE: {"name": 3}, EXTRA: 4, LORA[1:]: {"name": "short"}}

    handed_on = webui_models({"sd_merge_models": json.dumps(models | strays)})

    assert [ANIME, PHOTO] == list(handed_on)
    assert {"name": "anime", "legacy_hash": None, "sd_merge_recipe": None} == handed_on[ANIME]
    assert {"name": "half ?", "legacy_hash": "x", "sd_merge_recipe": recipe} == handed_on[PHOTO]
    many = {f"{n:064x}": {"name": "a"} for n in range(1200)}
    assert sorted(many)[:MAX_CLAIMS] == list(webui_models({"sd_merge_models": json.dumps(many)}))
    assert {} == webui_models({"sd_merge_models": "[1]"}) == webui_models({}) == webui_models({"sd_merge_models": "x" * (MAX_CLAIM + 1)})


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.sampled_from(
        [ANIME, PHOTO.upper(), "a1a1a1a1a1", "a.safetensors", "/x/a.safetensors", "a [a1a1a1a1a1]", "None", 'version\nmodel "\ud800"', "[0]"]
    ),
)
NAMES = st.one_of(
    TEXT,
    st.sampled_from(
        (
            *("type", "sources", "steps", "facts", "inputs", "name", "sha256", "license", "permissions", "sd_merge_models", "sd_merge_recipe"),
            *("class_type", "nodes", "widgets_values", "on", "primary_model_hash", "lora_hash", "multiplier", "mode", "param.formula", "method"),
        ),
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=8,
)
LINEAGES = st.fixed_dictionaries(
    {},
    optional={
        "sources": st.lists(st.dictionaries(NAMES, JSON, max_size=6), max_size=4),
        "steps": st.lists(st.fixed_dictionaries({"facts": st.dictionaries(NAMES, JSON), "inputs": st.dictionaries(NAMES, JSON)}), max_size=2),
    },
)
GRAPHS = st.dictionaries(TEXT, st.fixed_dictionaries({"class_type": JSON, "inputs": st.dictionaries(TEXT, JSON, max_size=4)}), max_size=4)
TABLES = st.dictionaries(NAMES, JSON, max_size=5) | LINEAGES | GRAPHS
HEADERS = st.dictionaries(st.sampled_from(CLAIMS), TEXT | JSON.map(json.dumps) | TABLES.map(json.dumps))


JSON_FIELDS = ["sdbuild.lineage", "sd_merge_models", "sd_merge_recipe", "checkpoint", "lora", "prompt", "workflow"]


def texts(value: Any) -> list[str]:
    """Every text in a value, however deep."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for text in texts(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts(item)]
    return [text for name in type(value).__slots__ for text in texts(getattr(value, name))] if isinstance(value, (Claims, Claimed)) else []


@settings(max_examples=150, deadline=None)
@given(HEADERS)
def test_no_header_is_too_strange(header):
    """Whatever stands in it: nothing is raised, and all that comes out can be printed and written to files."""
    claims = read_claims(header)
    said = texts(claims)
    assert [] == [text for text in said if not text.isprintable()]
    "".join(said).encode()
    assert all(claimed.name and claimed.said_in in CLAIMS and len(claimed.name) <= 300 for claimed in claims.ancestors)
    keys = [(claimed.sha256, claimed.license, repr(claimed.permissions)) for claimed in claims.ancestors if claimed.sha256]
    assert len(keys) == len(set(keys))
    json.dumps(webui_models(header), allow_nan=False)


def turned(value: Any) -> Any:
    """The same JSON, its members in the opposite order."""
    if isinstance(value, dict):
        return {name: turned(value[name]) for name in reversed(value)}
    return [turned(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(JSON_FIELDS), TABLES))
def test_the_order_of_members_changes_nothing(tables):
    """Neither that of a header's fields nor that of the members of the JSON in it."""
    header = {name: json.dumps(table) for name, table in tables.items()}
    mirrored = {name: json.dumps(turned(tables[name])) for name in reversed(tables)}

    assert read_claims(header) == read_claims(mirrored)
    assert list(webui_models(header).items()) == list(webui_models(mirrored).items())
