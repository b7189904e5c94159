"""Release folders: documents that strangers' tools accept, whatever strangers wrote into the lineage, and folders that appear whole or not at all."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sdmerge_build.errors import IntegrityError, SdbuildError
from sdmerge_build.release import documents, sign, write_release
from sdmerge_build.release.writing import address, code, file_name, link, markdown

RAIL = {
    "title": "CreativeML Open RAIL-M",
    "id": "LicenseRef-CreativeML-OpenRAIL-M",
    "url": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
}
FLUX = {"title": "FLUX.1 [dev] Non-Commercial License", "id": "LicenseRef-scancode-flux-1-nc", "url": "https://bfl.ai/legal/flux-nc?v=1&x=2"}
APACHE = {"title": "Apache License 2.0", "id": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
CLAUSE = "§III.4.a: Use-based restrictions as referenced in paragraph 5 MUST be included as an enforceable provision"


def digest(text):
    return sha256(text.encode()).hexdigest()


def source(name, **said):
    return {"name": name, "size": 2132625462, "tensor_digest": digest(f"tensors of {name}"), **said}


def step(name, *inputs, formula=None, method="weighted_sum", **facts):
    roles = dict(zip("abcdefgh", inputs, strict=False))
    said = {"formula": formula} if formula else {}
    return {"name": name, "method": "formula" if formula else method, **said, "key": digest(f"key of {name}"), "inputs": roles, "facts": facts}


def artifact(name, **said):
    return {
        "name": name,
        "title": name,
        "size": 11,
        "sha256": sha256(b"safetensors").hexdigest(),
        "model_hash": sha256(b"safetensors").hexdigest()[:10],
        "tensor_digest": digest("result"),
        "key": digest("key"),
        "architecture": "sd1",
        "tensors": 1131,
        "parameters": 1066235307,
        "dtypes": {"F16": 1130, "I64": 1},
        **said,
    }


def ancestor(name, *layers, **said):
    return {
        "name": name,
        "contributes": True,
        "status": "known",
        "license": layers[0]["id"],
        "license_title": layers[0]["title"],
        "layer": [*layers],
    } | said


def manifest(name, sources, steps, **more):
    reproduce = {
        "command": f"sdbuild {name}.toml --only {name}",
        "recipe": f"{name}.toml",
        "recipe_digest": digest("recipe"),
        "versions": {"sdbuild": "0.1.0", "torch": "2.13.0"},
    }
    return {"manifest": 1, "artifact": artifact(name), "reproduce": reproduce, "source": sources, "step": steps, **more}


def estrilda():
    """Two parents from two hubs, one with permissions of its own."""
    flags = {
        "title": "permissions on Civitai",
        "id": "LicenseRef-Civitai-AttachmentB-0123456789ab",
        "url": "https://civitai.com/models/7813",
        "source": "recipe, with evidence",
    }
    terms = {
        "share": "on-terms",
        "policy": "strict",
        "license": "LicenseRef-CreativeML-OpenRAIL-M",
        "license_title": "CreativeML Open RAIL-M",
        "status": "known",
        "summary": "The texts allow sharing with credit and the use restrictions of CreativeML Open RAIL-M.",
        "advice": "This is what the texts say, not legal advice.",
        "concluded": {"sell_merge": "no", "credit": True, "use_restrictions": ["no medical advice", "no discrimination"]},
        "reason": [
            {
                "component": "use_restrictions",
                "value": "no medical advice",
                "ancestor": "viewer-mix_v1.7_v2",
                "license": RAIL["title"],
                "clause": CLAUSE,
                "url": RAIL["url"],
            },
            {
                "component": "credit",
                "value": "yes",
                "ancestor": "viewer-mix_v1.7_v2",
                "license": flags["title"],
                "clause": "Creator Credit",
                "url": flags["url"],
            },
        ],
        "conflict": [
            {
                "id": "C5",
                "level": "warning",
                "what": "two readings of “same permissions”",
                "ancestors": ["viewer-mix_v1.7_v2"],
                "hint": "ask",
                "rests_on": ["viewer: B"],
            }
        ],
        "duty": [
            {"kind": "credit", "what": "name viewer-mix by Someone", "ancestors": ["viewer-mix_v1.7_v2"], "url": flags["url"]},
            {"kind": "licence-copy", "what": "give a copy of CreativeML Open RAIL-M", "ancestors": ["meinapastel-v4"], "url": RAIL["url"]},
            {
                "kind": "pass-on",
                "what": "pass the use restrictions on as an enforceable provision",
                "ancestors": ["meinapastel-v4"],
                "url": RAIL["url"],
            },
            {"kind": "branding", "what": "Powered by Nobody", "ancestors": ["meinapastel-v4"], "url": ""},
        ],
        "ancestor": [
            ancestor("viewer-mix_v1.7_v2", RAIL, flags, credit="viewer-mix by Someone", notes=["asserted by the recipe's author"]),
            ancestor("meinapastel-v4", RAIL, homepage="https://huggingface.co/Meina/MeinaPastel"),
            ancestor("old-vae", APACHE, contributes=False),
        ],
    }
    sources = [
        source(
            "viewer-mix_v1.7_v2",
            share=0.3,
            sha256=digest("viewer"),
            blake3=digest("viewer b3"),
            uri="civitai:7813@25845",
            credit="viewer-mix by Someone",
        ),
        source("meinapastel-v4", share=0.7, share_least=0.5, share_most=1.0, uri="hf:Meina/MeinaPastel/MeinaPastelV4.safetensors@main"),
    ]
    steps = [step("estrilda", "viewer-mix_v1.7_v2", "meinapastel-v4", formula="0.3 * viewer-mix_v1.7_v2 + 0.7 * meinapastel-v4", dtype="fp16")]
    release = {"title": "EstrildaMix", "version": "1.0", "author": "Estrilda", "license": "CreativeML Open RAIL-M"}
    return manifest("estrilda", sources, steps, terms=terms, release=release)


def flux():
    """A merge under a licence that Hugging Face has no id for; nobody declares anything."""
    terms = {
        "share": "on-terms",
        "license": FLUX["id"],
        "license_title": FLUX["title"],
        "status": "known",
        "summary": "Non-commercial.",
        "concluded": {"weights_commercial": "non-commercial"},
        "ancestor": [ancestor("dev", FLUX), ancestor("schnell", APACHE)],
    }
    sources = [source("dev", uri="hf:black-forest-labs/FLUX.1-dev/flux1-dev.safetensors@main"), source("schnell", license="Apache-2.0")]
    return manifest("fusion", sources, [step("fusion", "dev", "schnell", **{"param.alpha": "0.5"})], terms=terms)


def chain():
    """Steps of steps that share ancestors, and ancestors that a parent's header claims."""
    sources = [source("one", sha256=digest("one")), source("two")]
    steps = [step("x", "one", "two"), step("y", "x", "two"), step("z", "x", "y", method="add_difference")]
    claimed = [{"by": "one", "sha256": digest("old"), "name": "animefull-latest"}, {"by": "two", "sha256": digest("old"), "name": "nai"}]
    terms = {
        "share": "no",
        "license": "LicenseRef-CreativeML-OpenRAIL-M AND Apache-2.0",
        "status": "unknown",
        "summary": "Nobody says what binds nai.",
        "conflict": [{"id": "C8", "level": "conflict", "what": "no terms are known", "ancestors": ["two"], "hint": "assert them"}],
        "ancestor": [
            ancestor("one", RAIL),
            {"name": "two", "contributes": True, "status": "unknown"},
            ancestor("animefull-latest", RAIL, claimed_by="one", status="claimed"),
        ],
    }
    return manifest("z", sources, steps, terms=terms, claimed=claimed)


def bare():
    """A manifest from before there were terms."""
    return manifest("plain", [source("a")], [step("plain", "a", method="copy")])


SAMPLES = {"estrilda": estrilda, "flux": flux, "chain": chain, "bare": bare}


@pytest.fixture(params=SAMPLES)
def sample(request):
    return SAMPLES[request.param]()


def document(manifest, ending):
    return next(text for name, text in documents(manifest).items() if name.endswith(ending))


# ------------------------------------------------------------------ readers that know nothing of the writer


def front_matter(card) -> tuple[dict, str]:
    """Read front matter strictly: every value is one JSON string, every key stands once."""
    start, _, rest = card.partition("---\n")
    yaml, end, body = rest.partition("\n---\n")
    assert (start, end) == ("", "\n---\n")
    fields: dict = {}
    key = ""
    for line in yaml.split("\n"):
        if line.startswith("- "):
            fields[key].append(json.loads(line[2:]))
            continue
        key, _, value = line.partition(":")
        assert re.fullmatch("[a-z_]+", key)
        assert key not in fields
        fields[key] = json.loads(value) if value else []
    values = [v for value in fields.values() for v in (value if isinstance(value, list) else [value])]
    assert all(isinstance(v, str) and v.isprintable() for v in values)
    return fields, body


def tokens(markdown_text) -> Iterator:
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown_text):
        yield token
        yield from token.children or []


@functools.cache
def validator():
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6)


def schema_errors(text):
    return validator().validate_str(text)


def components(bill) -> Iterator[dict]:
    waiting = [bill["metadata"]["component"], *bill["components"]]
    while waiting:
        component = waiting.pop()
        yield component
        waiting += component.get("pedigree", {}).get("ancestors", [])


def reference(component):
    mentions = [p["value"] for p in component.get("properties", []) if p["name"] == "sdbuild:ref"]
    return component.get("bom-ref") or mentions[0]


def pedigree(bill) -> dict[str, set[str]]:
    """The graph as nesting tells it."""
    whole = {c["bom-ref"]: c for c in components(bill) if "bom-ref" in c}
    return {ref: {reference(a) for a in c.get("pedigree", {}).get("ancestors", [])} for ref, c in whole.items()}


# ------------------------------------------------------------------ the model card


def test_the_card_of_a_merge_says_what_the_hub_wants_to_know():
    fields, _ = front_matter(document(estrilda(), "README.md"))

    assert fields == {
        "license": "creativeml-openrail-m",
        "base_model": ["Meina/MeinaPastel"],
        "base_model_relation": "merge",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["merge", "sdbuild", "sd1", "stable-diffusion"],
    }


def test_a_licence_the_hub_has_no_id_for_is_named_and_linked():
    fields, _ = front_matter(document(flux(), "README.md"))

    assert fields["license"] == "other"
    assert fields["license_name"] == "flux-1-dev-non-commercial-license"
    assert fields["license_link"] == FLUX["url"]
    assert fields["base_model"] == ["black-forest-labs/FLUX.1-dev"]


def test_an_expression_is_other_and_points_to_the_notice():
    fields, _ = front_matter(document(chain(), "README.md"))

    assert (fields["license"], fields["license_link"]) == ("other", "NOTICE")
    assert "base_model" not in fields


def test_a_licence_nobody_knows_is_unknown():
    assert front_matter(document(bare(), "README.md"))[0]["license"] == "unknown"


def test_the_card_tells_people_how_of_what_and_on_which_terms():
    _, body = front_matter(document(estrilda(), "README.md"))
    shown = " ".join(t.content for t in tokens(body) if t.type in {"text", "code_inline", "fence"})

    for said in (
        "EstrildaMix", "by Estrilda", "0.3 * viewer-mix_v1.7_v2 + 0.7 * meinapastel-v4", "30 %", "from 50 % to 100 % of a tensor", "viewer-mix by Someone",
        CLAUSE, "no discrimination", "two readings", "asserted by the recipe's author", "sdbuild estrilda.toml --only estrilda", digest("recipe"), digest("result"),
        "not legal advice", "Powered by Nobody", "1,066,235,307",
    ):  # fmt: skip
        assert said in shown
    links = {t.attrs["href"] for t in tokens(body) if t.type == "link_open"}
    assert {"https://civitai.com/models/7813?modelVersionId=25845", RAIL["url"], "https://civitai.com/models/7813"} <= links


def test_a_clause_that_many_ancestors_have_is_quoted_once():
    shared = estrilda()
    shared["terms"]["reason"] += [shared["terms"]["reason"][0] | {"ancestor": "meinapastel-v4"}]
    card = document(shared, "README.md")

    assert card.count(CLAUSE) == 1
    assert "— forbidden uses, from viewer-mix\\_v1.7\\_v2 and meinapastel-v4" in card


def test_a_card_without_permission_to_share_says_so():
    assert "do not say that it can be shared" in document(chain(), "README.md")
    assert "do not say that it can be shared" not in document(estrilda(), "README.md")


def test_a_long_list_of_claims_is_cut_in_the_card_and_whole_in_the_bill():
    many = chain() | {"claimed": [{"by": "one", "sha256": digest(str(n)), "name": f"m{n}"} for n in range(300)]}

    assert "and 200 more" in document(many, "README.md")
    assert "m299" not in document(many, "README.md")
    assert sum(c.get("bom-ref", "").startswith("claimed:") for c in components(json.loads(document(many, ".cdx.json")))) == 300


# ------------------------------------------------------------------ NOTICE and LICENSES


def test_the_notice_holds_every_duty_credit_and_restriction():
    text = documents(estrilda())["NOTICE"]

    for duty in estrilda()["terms"]["duty"]:
        assert duty["what"] in text
    for said in (
        CLAUSE,
        "no medical advice",
        "Changed files",
        "viewer-mix by Someone",
        "EstrildaMix 1.0",
        "contributes no tensor",
        "not legal advice",
    ):
        assert said in text
    assert text.index("Powered by Nobody") < text.index("name viewer-mix by Someone")


def test_every_text_that_binds_has_a_file_and_the_others_have_none():
    files = {name: text for name, text in documents(estrilda()).items() if name.startswith("LICENSES/")}

    assert sorted(files) == ["LICENSES/LicenseRef-Civitai-AttachmentB-0123456789ab.txt", "LICENSES/LicenseRef-CreativeML-OpenRAIL-M.txt"]
    rail = files["LICENSES/LicenseRef-CreativeML-OpenRAIL-M.txt"]
    assert RAIL["url"] in rail
    assert "meinapastel-v4, viewer-mix_v1.7_v2" in rail


def test_a_licence_that_only_the_result_is_under_has_a_file_too():
    declared = flux() | {"release": {"license": "CC-BY-NC-4.0"}}

    assert "the result" in documents(declared)["LICENSES/CC-BY-NC-4.0.txt"]


def with_licence_file(text, folder, name="rail.txt", **more):
    (folder / name).write_bytes(text)
    changed = estrilda()
    layer = RAIL | {"license_file": name, "license_sha256": sha256(text).hexdigest()} | more
    changed["terms"]["ancestor"][0]["layer"][0] = layer
    return changed


def test_a_licence_file_of_the_recipe_is_copied_and_binds_all_who_have_that_licence(tmp_path):
    changed = with_licence_file(b"CreativeML Open RAIL-M\n\nall of it\n", tmp_path)

    assert documents(changed, tmp_path)["LICENSES/LicenseRef-CreativeML-OpenRAIL-M.txt"] == tmp_path / "rail.txt"
    assert "OpenRAIL-M.txt: CreativeML Open RAIL-M, which binds meinapastel-v4, viewer-mix_v1.7_v2" in documents(changed, tmp_path)["NOTICE"]


def test_two_texts_of_one_licence_have_two_files(tmp_path):
    changed = with_licence_file(b"one", tmp_path)
    (tmp_path / "two.txt").write_bytes(b"two")
    changed["terms"]["ancestor"][1]["layer"] = [RAIL | {"license_file": "two.txt", "license_sha256": sha256(b"two").hexdigest()}]

    copied = [path for path in documents(changed, tmp_path).values() if not isinstance(path, str)]
    assert sorted(path.name for path in copied) == ["rail.txt", "two.txt"]


def test_names_that_differ_only_in_case_do_not_share_a_file():
    changed = flux()
    changed["terms"]["ancestor"][0]["layer"].append(APACHE | {"id": "apache-2.0"})

    names = [name.casefold() for name in documents(changed) if name.startswith("LICENSES/")]
    assert len(names) == len(set(names)) == 3


@given(st.one_of(st.text(max_size=300), st.sampled_from(["CON", "nul.txt", "..", "", ".", "a/../b", "C:\\x", "x" * 300, "COM1", "é", "a.", "-rf"])))
def test_any_text_makes_a_safe_file_name(text):
    name = file_name(text)

    assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,128}", name)
    assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    assert not name.endswith(".")
    assert file_name(name) == name or len(name) > 120


# ------------------------------------------------------------------ in-toto


def test_the_statement_names_the_file_the_recipe_and_every_parent(sample):
    text = document(sample, ".intoto.jsonl")
    statement = json.loads(text)
    definition = statement["predicate"]["buildDefinition"]

    assert text.count("\n") == 1
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement["subject"] == [{"name": f"{sample['artifact']['name']}.safetensors", "digest": {"sha256": sample["artifact"]["sha256"]}}]
    assert definition["buildType"] == "https://github.com/sdbuild/sdbuild/buildtypes/merge/v1"
    assert definition["externalParameters"]["target"] == sample["artifact"]["name"]
    recipe, *parents = definition["resolvedDependencies"]
    assert recipe["digest"] == {"blake3": digest("recipe")}
    assert [p["annotations"]["tensorDigest"] for p in parents] == [s["tensor_digest"] for s in sample["source"]]
    assert all(p["digest"] for p in parents)
    assert statement["predicate"]["runDetails"]["builder"]["id"]


def test_the_statement_has_digests_of_files_where_they_are_pinned_and_licences():
    _, viewer, meina = json.loads(document(estrilda(), ".intoto.jsonl"))["predicate"]["buildDefinition"]["resolvedDependencies"]

    assert viewer["digest"] == {"sha256": digest("viewer"), "blake3": digest("viewer b3")}
    assert viewer["uri"] == "civitai:7813@25845"
    assert viewer["annotations"]["license"] == RAIL["id"]
    assert meina["digest"] == {"sdbuildTensorsV1": digest("tensors of meinapastel-v4")}


def test_no_document_knows_a_time_or_a_level(sample):
    for ending in (".intoto.jsonl", ".cdx.json"):
        text = document(sample, ending)
        assert not re.search(r"startedOn|finishedOn|timestamp|timeStart|[12]\d{3}-\d\d-\d\dT|SLSA_BUILD|Build L\d", text)


# ------------------------------------------------------------------ CycloneDX


def test_the_bill_is_valid(sample):
    assert schema_errors(document(sample, ".cdx.json")) is None


def test_the_check_of_bills_sees_a_wrong_one():
    bill = json.loads(document(estrilda(), ".cdx.json"))
    bill["metadata"]["component"]["type"] = "checkpoint"

    assert schema_errors(json.dumps(bill)) is not None


def test_pedigree_and_dependencies_both_tell_the_graph_of_the_steps():
    bill = json.loads(document(chain(), ".cdx.json"))
    expected = {
        "model:z": {"step:x", "step:y"},
        "step:y": {"step:x", "source:two"},
        "step:x": {"source:one", "source:two"},
        "source:one": {f"claimed:{digest('old')}"},
        "source:two": {f"claimed:{digest('old')}"},
        f"claimed:{digest('old')}": set(),
    }

    assert pedigree(bill) == expected
    assert {d["ref"]: set(d["dependsOn"]) for d in bill["dependencies"]} == expected
    assert len(bill["components"]) == 0


def test_every_reference_in_a_bill_is_defined_once(sample):
    text = document(sample, ".cdx.json")
    defined = re.findall(r'"bom-ref":("(?:[^"\\]|\\.)*")', text)
    used = re.findall(r'"ref":("(?:[^"\\]|\\.)*")', text)

    assert len(defined) == len(set(defined))
    assert set(used) <= set(defined)


def test_claimed_ancestors_are_marked_as_claims():
    bill = json.loads(document(chain(), ".cdx.json"))
    claim = next(c for c in components(bill) if c.get("bom-ref", "").startswith("claimed:"))

    assert {"name": "sdbuild:claimed_by", "value": "one"} in claim["properties"]
    assert {"name": "sdbuild:verified", "value": "no"} in claim["properties"]
    assert claim["licenses"][0]["license"]["name"] == RAIL["id"]


def test_shared_ancestors_do_not_multiply():
    """Sixty steps, each of the two before it: 2^40 paths, and every component once."""
    names = ["s0", "s1"] + [f"t{n}" for n in range(60)]
    steps = [step(names[n], names[n - 2], names[n - 1]) for n in range(2, len(names))]
    bill = document(manifest(names[-1], [source("s0"), source("s1")], steps), ".cdx.json")

    assert len(bill) < 200_000
    assert len(pedigree(json.loads(bill))) == 62
    assert schema_errors(bill) is None


def test_a_chain_of_two_thousand_steps_can_be_read_by_anybody():
    names = ["s", *(f"t{n}" for n in range(2000))]
    steps = [step(child, parent, method="copy") for parent, child in itertools.pairwise(names)]
    text = document(manifest(names[-1], [source("s")], steps), ".cdx.json")
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)

    graph = pedigree(json.loads(text))
    assert deepest < 64
    assert graph["model:t1999"] == {"step:t1998"}
    assert graph["step:t0"] == {"source:s"}
    assert len(graph) == 2001


def test_licences_of_the_result_are_concluded_and_declared():
    both = json.loads(document(estrilda(), ".cdx.json"))["metadata"]["component"]["licenses"]
    alone = json.loads(document(chain(), ".cdx.json"))["metadata"]["component"]["licenses"]

    assert [(entry["license"]["acknowledgement"], entry["license"]["name"]) for entry in both] == [
        ("concluded", RAIL["id"]),
        ("declared", RAIL["id"]),
    ]
    assert alone == [{"expression": "LicenseRef-CreativeML-OpenRAIL-M AND Apache-2.0", "acknowledgement": "concluded"}]


def test_spdx_ids_are_ids_and_all_others_names():
    parents = {
        c["name"]: c["licenses"][0]["license"] for c in components(json.loads(document(flux(), ".cdx.json"))) if c["name"] in {"dev", "schnell"}
    }

    assert parents["schnell"]["id"] == "Apache-2.0"
    assert parents["dev"]["name"] == FLUX["id"]
    assert parents["dev"]["url"] == FLUX["url"]


def test_a_version_longer_than_the_format_allows_is_cut():
    assert schema_errors(document(estrilda() | {"release": {"version": "1" * 1100}}, ".cdx.json")) is None


def test_the_serial_number_follows_the_content():
    again = estrilda()
    again["terms"]["summary"] = "something else"
    serials = {json.loads(document(m, ".cdx.json"))["serialNumber"] for m in (estrilda(), estrilda(), again)}

    assert len(serials) == 2


# ------------------------------------------------------------------ texts of strangers

HOSTILE = [
    "---\nlicense: mit\n---", 'a"\nlicense: "mit', "<script>alert(1)</script>", "</p><img src=x onerror=alert(1)>", "[x](javascript:alert(1))",
    "![x](https://evil.example/p.png)", "https://evil.example/", "www.evil.example", "<https://evil.example>", "# heading", "1. one", "- item", "+ item",
    "```\ncode", "`", "``` ` ``", "~~~", "| a | b |", "\\", "\\(x\\)", "$$x$$", "&lt;b&gt;", "&#60;b>", "@everyone", "\x1b[31mred", "\u202egnp.exe", "\ud800", "\x00",
    "a\r\nb", "\u2028", "\ufeff", "*", "**b**", "_", "=", "===", "> quote", "[ref]: https://evil.example", "{{x}}", "%0a", "", " ", "null", "yes", "~", "!!python/object:os.system",
    "javascript:alert(1)", "https://user:pw@evil.example/", "http://[::1", "https://a b/", 'https://good.example/(x)<y>&copy;"', "https://x.example/#a#b%zz", "urn:cdx:x/1",
    "../../etc/passwd", "x" * 5000, "模型", "😀\u200d",
]  # fmt: skip
FIXED = {"on-terms", "no", "credit", "pass-on", "licence-copy", "branding"}


def haunted(manifest, texts):
    """Put strangers' texts wherever a manifest has a text that a stranger wrote; equal texts stay equal, different ones different."""
    replaced: dict[str, str] = {}

    def new(text):
        if text in FIXED or re.fullmatch("[0-9a-f]{64}|[0-9a-f]{10}", text):
            return text
        if text not in replaced:
            candidate = texts[len(replaced) % len(texts)]
            replaced[text] = candidate if candidate not in replaced.values() else f"{candidate}{len(replaced)}"
        return replaced[text]

    def walk(value):
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else new(value) if isinstance(value, str) else value

    return walk(copy.deepcopy(manifest)), replaced


hostile_texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*SAMPLES]), hostile_texts)
def test_whatever_strangers_write_the_documents_stay_documents(which, texts):
    """YAML holds strings, Markdown holds no HTML, no image and no heading of theirs, JSON is valid by its schema, names stay in the folder."""
    haunting, _ = haunted(SAMPLES[which](), texts)
    made = documents(haunting)

    _, body = front_matter(document(haunting, "README.md"))
    seen = [t for t in tokens(body) if t.type in {"html_block", "html_inline", "image", "heading_open", "table_open", "hr"}]
    _, honest = front_matter(document(SAMPLES[which](), "README.md"))
    assert [t.tag for t in seen] == [t.tag for t in tokens(honest) if t.type == "heading_open"]
    hrefs = [t.attrs["href"] for t in tokens(body) if t.type == "link_open"]
    assert all(re.match(r"https?://[A-Za-z0-9.:-]+(?:[/?#]|$)", href) for href in hrefs)
    for ending in (".intoto.jsonl", ".cdx.json"):
        json.dumps(json.loads(document(haunting, ending)), ensure_ascii=False).encode()  # no half of a pair
    bill = document(haunting, ".cdx.json")
    assert schema_errors(bill) is None
    assert len(pedigree(json.loads(bill))) == sum("bom-ref" in c for c in components(json.loads(bill)))
    assert all(re.fullmatch(r"(LICENSES/)?[A-Za-z0-9_][A-Za-z0-9._+-]*", name) for name in made)
    assert len({name.casefold() for name in made}) == len(made)
    for text in made.values():
        assert all(c.isprintable() or c == "\n" for c in text)
        text.encode()


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_a_text_and_does_nothing_else(text):
    shown = [t for t in tokens(f"before {markdown(text)} after\n\n- {markdown(text)}") if not t.hidden]

    assert {t.type for t in shown if t.nesting == 0} <= {"inline", "text", "text_special"}
    assert {t.type for t in shown if t.nesting == 1} <= {"paragraph_open", "bullet_list_open", "list_item_open"}
    assert all(t.type != "bullet_list_open" or t.level == 0 for t in shown)
    first = next(t for t in shown if t.type == "inline")
    joined = "".join(c.content for c in first.children)
    assert not re.search(r"(?i)https?://|www\.", markdown(text)), "GitHub's dialect makes links of bare addresses"
    assert joined.startswith("before ")
    if text.isprintable() and text == " ".join(text.split()):
        assert joined == f"before {text} after".replace("  ", " ") or not text


def test_a_link_leads_where_it_was_said_to_lead():
    url = "https://good.example/a(b)?x=1&copy;=2"
    (opened,) = [t for t in tokens(link("a] b", url)) if t.type == "link_open"]

    assert opened.attrs["href"] == "https://good.example/a%28b%29?x=1&copy;=2"
    assert link("text", "javascript:alert(1)") == "text"


@given(st.text(alphabet="` ab\n", max_size=12))
def test_code_spans_hold_any_text(text):
    spans = [t for t in tokens(f"x {code(text)} y") if t.type == "code_inline"]

    assert [s.content.strip() for s in spans] == ([" ".join(text.split())] if text.split() else [])


@given(st.one_of(st.text(), st.from_regex(r"https?://[a-z.]{1,9}(/[^\n]{0,20})?", fullmatch=True)))
def test_an_address_has_only_characters_that_addresses_have(text):
    url = address(text)

    assert url == "" or re.fullmatch(r"https?://[A-Za-z0-9.-]+(:\d+)?([/?#](?:[A-Za-z0-9/?:@!$&'*+,;=._~#-]|%[0-9A-Fa-f]{2})*)?", url)
    assert url.count("#") <= 1
    assert address(url) == url


# ------------------------------------------------------------------ the folder


@pytest.fixture
def made(tmp_path):
    """An artifact in out/, its manifest beside it, and the place of its release."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "estrilda.safetensors").write_bytes(b"safetensors")
    text = tomli_w.dumps(estrilda())
    (out / "estrilda.manifest.toml").write_text(f"# Written by sdbuild\n{text}", encoding="utf-8")
    return out / "release" / "estrilda", out / "estrilda.safetensors", out / "estrilda.manifest.toml"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_release_is_the_artifact_its_manifest_and_every_document(made):
    folder, artifact, path = made
    written = write_release(*made, estrilda())

    found = contents(folder)
    assert sorted(str(p.relative_to(folder)) for p in written) == sorted(found)
    assert {"estrilda.safetensors", "estrilda.manifest.toml", "NOTICE", "README.md", "estrilda.intoto.jsonl", "estrilda.cdx.json"} <= {*found}
    assert found["estrilda.safetensors"] == artifact.read_bytes()
    assert found["estrilda.manifest.toml"] == path.read_bytes()
    assert all(found[name] == text.encode() for name, text in documents(estrilda()).items())
    assert names(folder.parent) == ["estrilda"]


def test_the_same_manifest_gives_the_same_bytes(made):
    write_release(*made, estrilda())
    before = contents(made[0])
    write_release(*made, tomllib.loads(made[2].read_text(encoding="utf-8")))

    assert contents(made[0]) == before


def test_the_documents_do_not_depend_on_hash_seeds_or_the_place():
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); import test_release as t; print(json.dumps([t.documents(f()) for f in t.SAMPLES.values()]))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env=os.environ | {"PYTHONHASHSEED": seed, "TZ": zone},
            capture_output=True, check=True, cwd=place,
        ).stdout
        for seed, zone, place in (("1", "UTC", "/"), ("2", "Asia/Tokyo", str(Path(__file__).parent)))
    }  # fmt: skip

    assert len(outputs) == 1


def test_an_older_release_is_replaced_whole(made):
    folder, *_ = made
    write_release(*made, flux() | {"artifact": artifact("older")})
    (folder / "model.sig").write_text("{}")
    write_release(*made, estrilda())

    assert not any("older" in name or name == "model.sig" for name in contents(folder))
    assert names(folder.parent) == ["estrilda"]


@pytest.mark.parametrize("stranger", ["preview.png", "LICENSES/mine.md", ".git/config", "NOTICE.bak"])
def test_a_release_somebody_added_to_is_left_alone(made, stranger):
    folder, *_ = made
    write_release(*made, estrilda())
    (folder / stranger).parent.mkdir(exist_ok=True)
    (folder / stranger).write_text("mine")
    before = contents(folder)

    with pytest.raises(SdbuildError, match=re.escape(stranger.removesuffix("/config"))) as refused:
        write_release(*made, estrilda())
    assert refused.value.issues[0].hint
    assert contents(folder) == before


def test_a_folder_that_is_not_ours_is_refused(made, tmp_path):
    folder, *_ = made
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("my own notes")

    with pytest.raises(SdbuildError, match=r"README\.md"):
        write_release(*made, estrilda())
    shutil.rmtree(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(SdbuildError, match="not a folder"):
        write_release(*made, estrilda())
    folder.unlink()
    folder.write_text("a file")
    with pytest.raises(SdbuildError, match="not a folder"):
        write_release(*made, estrilda())


def test_a_link_among_the_licences_is_a_stranger(made):
    write_release(*made, estrilda())
    (made[0] / "LICENSES" / "mine.txt").symlink_to(made[1])

    with pytest.raises(SdbuildError, match=r"mine\.txt"):
        write_release(*made, estrilda())


def test_an_empty_folder_is_filled(made):
    made[0].mkdir(parents=True)
    write_release(*made, estrilda())

    assert (made[0] / "NOTICE").exists()


@pytest.mark.parametrize("call", ["place", "bill_of_materials", "_swap", "read_regular"])
def test_a_release_that_fails_leaves_the_old_one_and_nothing_else(made, call, monkeypatch):
    folder, *_ = made
    write_release(*made, flux() | {"artifact": artifact("older")})
    before = contents(folder)

    def fail(*_args, **_keywords):
        raise RuntimeError("power cut")

    monkeypatch.setattr(f"sdmerge_build.release.folder.{call}", fail)
    with pytest.raises(RuntimeError):
        write_release(*made, estrilda())
    assert contents(folder) == before
    assert names(folder.parent) == ["estrilda"]


def test_the_old_release_comes_back_when_the_new_one_cannot_take_its_place(made, monkeypatch):
    folder, *_ = made
    write_release(*made, estrilda())
    before = contents(folder)
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (_ for _ in ()).throw(PermissionError(13, "in use")) if self.parent.suffix == ".part" else rename(self, to)
    )

    with pytest.raises(PermissionError):
        write_release(*made, estrilda())
    assert contents(folder) == before
    assert names(folder.parent) == ["estrilda"]


def test_what_a_process_that_is_gone_left_behind_is_removed(made):
    from sdmerge_build.files import owner_tag

    folder, *_ = made
    child = subprocess.run(
        [sys.executable, "-c", "from sdmerge_build.files import owner_tag; print(owner_tag())"], capture_output=True, text=True, check=True
    )
    gone, living = (folder.with_name(f".estrilda.{tag}.part") for tag in (child.stdout.strip(), owner_tag()))
    for left in (gone, living):
        left.mkdir(parents=True)
    write_release(*made, estrilda())

    assert (gone.exists(), living.exists()) == (False, True)


def test_an_artifact_that_is_not_the_manifests_is_refused(made):
    made[1].write_bytes(b"another one, and longer")

    with pytest.raises(IntegrityError, match="23 bytes"):
        write_release(*made, estrilda())
    assert not made[0].exists()


def test_a_licence_file_that_has_changed_is_refused(made):
    changed = with_licence_file(b"the text", made[2].parent)
    write_release(*made, changed)
    assert (made[0] / "LICENSES" / "LicenseRef-CreativeML-OpenRAIL-M.txt").read_bytes() == b"the text"
    before = contents(made[0])

    (made[2].parent / "rail.txt").write_bytes(b"the text, altered")
    with pytest.raises(IntegrityError, match="changed"):
        write_release(*made, changed)
    (made[2].parent / "rail.txt").unlink()
    with pytest.raises(SdbuildError, match="cannot be read"):
        write_release(*made, changed)
    assert contents(made[0]) == before


# ------------------------------------------------------------------ signatures


needs_signing = pytest.mark.skipif(not importlib.util.find_spec("model_signing"), reason="the extra [sign] is not installed")


def test_signing_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    for name in ("model_signing", "model_signing.hashing", "model_signing.signing"):  # another test may have imported them
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(SdbuildError) as refused:
        sign(tmp_path, tmp_path / "key.pem")
    assert refused.value.issues[0].hint == 'pip install "sdbuild[sign]"'


@pytest.fixture
def keys(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def is_signed(folder, public):
    """Verify as a stranger would, with the package's own command."""
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        str(folder),
        "--signature",
        str(folder / "model.sig"),
        "--public_key",
        str(public),
    ]
    return subprocess.run(command, capture_output=True, check=False, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}).returncode == 0


@needs_signing
@pytest.mark.filterwarnings("ignore")
def test_a_signed_release_is_verified_until_a_byte_of_it_changes(made, keys):
    folder, *_ = made
    private, public = keys
    write_release(*made, estrilda())

    assert sign(folder, private) == folder / "model.sig"
    assert is_signed(folder, public)
    assert sign(folder, private)
    assert is_signed(folder, public)
    assert names(folder.parent) == ["estrilda"]
    for name in ("estrilda.safetensors", "NOTICE", "LICENSES/LicenseRef-CreativeML-OpenRAIL-M.txt"):
        path = folder / name
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not is_signed(folder, public), name
        path.write_bytes(whole)
    assert is_signed(folder, public)
    (folder / "added.txt").write_text("x")
    assert not is_signed(folder, public)


@needs_signing
@pytest.mark.filterwarnings("ignore")
def test_a_key_that_is_none_is_refused_and_nothing_is_left(made, tmp_path):
    write_release(*made, estrilda())
    before = contents(made[0])
    (tmp_path / "key.pem").write_text("no key")

    with pytest.raises(SdbuildError, match="cannot be signed"):
        sign(made[0], tmp_path / "key.pem")
    assert contents(made[0]) == before
    assert names(made[0].parent) == ["estrilda"]
