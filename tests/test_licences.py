"""Licences as data, terms as a lattice, and an author's permissions in every shape the hub has sent them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdmerge_build.licences import (
    ATTACHMENT_B,
    PERMISSIVE,
    UNKNOWN,
    Cap,
    PermissionsError,
    Terms,
    licence_for_base_model,
    licence_named,
    licences,
    meet,
    meet_all,
    nearest_licences,
    permissions_layer,
    read_permissions,
)
from sdmerge_build.licences.terms import COMPONENTS, HOSTS, LADDERS

RAIL = "LicenseRef-CreativeML-OpenRAIL-M"
RAIL_PP = "LicenseRef-CreativeML-OpenRAIL-PP-M"
OPENRAIL = "LicenseRef-OpenRAIL"
SAI = "LicenseRef-scancode-stability-ai-community-2024"
SAI_NC = "LicenseRef-scancode-stability-ai-nc-2023-12-06"
FLUX = "LicenseRef-scancode-flux-1-nc"
FAIPL_SD = "LicenseRef-scancode-fair-ai-public-1.0-sd"
PONY = "LicenseRef-Pony-V6-XL"
NOOB = "LicenseRef-NoobAI-XL"

NAMES = {
    "CreativeML Open RAIL-M": RAIL,
    "CreativeML-OpenRAIL-M": RAIL,
    "creativeml-openrail-m": RAIL,
    "CREATIVEML OPENRAIL M": RAIL,
    "CreativeML Open RAIL-M License": RAIL,
    "https://huggingface.co/spaces/CompVis/stable-diffusion-license": RAIL,
    "openrail++": RAIL_PP,
    "OpenRAIL++-M": RAIL_PP,
    "CreativeML Open RAIL++-M": RAIL_PP,
    "CreativeML Open RAIL++-M License": RAIL_PP,
    "openrail": OPENRAIL,
    "OpenRAIL-M": OPENRAIL,
    "bigscience-openrail-m": "LicenseRef-scancode-bigscience-open-rail-m",
    "SAI CLA": SAI,
    "stabilityai-ai-community": SAI,
    "Stability AI Community License": SAI,
    "sai-nc-community": SAI_NC,
    "sdxl turbo": SAI_NC,
    "flux1D": FLUX,
    "flux-1-dev-non-commercial-license": FLUX,
    "FLUX.1 [dev] Non-Commercial License": FLUX,
    "apache-2.0": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "mit": "MIT",
    "faipl-1.0": "LicenseRef-FAIPL-1.0",
    "faipl-1.0-sd": FAIPL_SD,
    "FAIPL-1.0-SD": FAIPL_SD,
    "Fair AI Public License 1.0-SD": FAIPL_SD,
    "Pony V6 XL": PONY,
    "NoobAI-XL": NOOB,
    "cc0-1.0": "CC0-1.0",
    "CC0": "CC0-1.0",
    "CC BY 4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "cc-by-nd-4.0": "CC-BY-ND-4.0",
    "cc-by-nc-nd-4.0": "CC-BY-NC-ND-4.0",
    "gpl-3.0": "GPL-3.0-only",
    "GPLv3": "GPL-3.0-only",
    "agpl-3.0": "AGPL-3.0-only",
    "OpenMDW-1.0": "OpenMDW-1.0",
}


@pytest.mark.parametrize(("written", "identifier"), NAMES.items())
def test_a_licence_is_found_as_people_write_it(written, identifier):
    """Ids of hubs, titles, addresses and habits all lead to one licence, whatever the capitals and hyphens."""
    assert licence_named(written).id == identifier
    assert licence_named(f"  {written.upper()} ").id == identifier


@pytest.mark.parametrize(
    "text", ["", " ", "unknown", "other", "Other", "see the card", "CC BY 4.0 (商用禁止)", "CC BY 5.0", "MIT-like", "x" * 10_000, "+"]
)
def test_what_is_not_a_known_text_is_no_licence(text):
    """`unknown` and `other` are the absence of a licence, and a remark behind a name is not overlooked."""
    assert licence_named(text) is None


def test_plus_signs_tell_two_texts_apart():
    """`openrail` and `openrail++` differ in nothing else."""
    assert licence_named("openrail").id != licence_named("openrail++").id


@pytest.mark.parametrize(
    ("text", "meant"),
    [("creativeml-openrial-m", "creativeml-openrail-m"), ("faipl-1.0-ds", "faipl-1.0-sd"), ("apache-2.1", "apache-2.0"), ("qqqq", "")],
)
def test_a_mistyped_licence_has_a_nearest_one(text, meant):
    """The hint names what was probably meant, and says nothing where nothing is near."""
    assert meant in nearest_licences(text).casefold()
    assert bool(meant) == bool(nearest_licences(text))


def test_no_name_belongs_to_two_licences():
    """Each name, as the index folds it, leads to exactly one licence."""
    owners: dict[str, set[str]] = {}
    for licence in licences():
        for name in licence.names():
            owners.setdefault("".join(c for c in name.casefold() if c.isalnum() or c == "+"), set()).add(licence.id)

    assert {name: ids for name, ids in owners.items() if len(ids) > 1} == {}


@pytest.mark.parametrize("licence", licences(), ids=lambda licence: licence.id)
def test_every_value_rests_on_a_clause(licence):
    """Each component that asks for something quotes why, and no clause is about anything else."""
    assert set(licence.terms.stricter()) == set(licence.clauses)
    assert all(licence.clauses.values())
    assert licence.url.startswith("https://")
    assert (licence.huggingface == "other") == bool(licence.license_name)


@pytest.mark.parametrize("licence", licences(), ids=lambda licence: licence.id)
def test_identifiers_and_values_are_of_known_forms(licence):
    """Ids are SPDX expressions' symbols; steps of ladders and hosts are known ones; a licence asks for its own copy, if for any."""
    assert re.fullmatch(r"(LicenseRef-)?[A-Za-z0-9.-]+", licence.id)
    assert all(getattr(licence.terms, name) in steps for name, steps in LADDERS.items())
    assert licence.terms.hosting <= HOSTS
    assert licence.terms.weights_commercial in ("free", "non-commercial") or isinstance(licence.terms.weights_commercial, Cap)
    assert licence.terms == PERMISSIVE or licence.id in licence.terms.license_copies
    assert bool(licence.terms.copyleft) == (licence.terms.relicense == "same-licence")
    assert bool(licence.note) == (licence.terms.status != "known")


VECTORS = {  # standards D1, by hand: weights, outputs, relicense, shareable, hosts, status
    RAIL: ("free", "free", "respect-use-restrictions", True, 3, "known"),
    RAIL_PP: ("free", "free", "respect-use-restrictions", True, 3, "known"),
    OPENRAIL: ("free", "free", "respect-use-restrictions", True, 3, "claimed"),
    "LicenseRef-scancode-bigscience-open-rail-m": ("free", "free", "respect-use-restrictions", True, 3, "known"),
    SAI: ("up to US$1,000,000 a year, registered", "no-competitor-training", "no-sublicense", True, 3, "known"),
    SAI_NC: ("non-commercial", "free", "no-sublicense", True, 1, "known"),
    FLUX: ("non-commercial", "no-competitor-training", "no-sublicense", True, 1, "known"),
    "Apache-2.0": ("free", "free", "any", True, 3, "known"),
    "MIT": ("free", "free", "any", True, 3, "known"),
    "LicenseRef-FAIPL-1.0": ("free", "free", "same-licence", True, 3, "known"),
    FAIPL_SD: ("free", "free", "same-licence", True, 3, "known"),
    PONY: ("free", "free", "same-licence", True, 2, "disputed"),
    NOOB: ("non-commercial", "non-commercial", "same-licence", True, 1, "disputed"),
    "CC0-1.0": ("free", "free", "any", True, 3, "known"),
    "CC-BY-4.0": ("free", "free", "any", True, 3, "known"),
    "CC-BY-SA-4.0": ("free", "free", "same-licence", True, 3, "known"),
    "CC-BY-NC-4.0": ("non-commercial", "free", "any", True, 1, "known"),
    "CC-BY-NC-SA-4.0": ("non-commercial", "free", "same-licence", True, 1, "known"),
    "CC-BY-ND-4.0": ("free", "free", "any", False, 3, "known"),
    "CC-BY-NC-ND-4.0": ("non-commercial", "free", "any", False, 1, "known"),
    "GPL-3.0-only": ("free", "free", "same-licence", True, 3, "known"),
    "AGPL-3.0-only": ("free", "free", "same-licence", True, 3, "known"),
    "OpenMDW-1.0": ("free", "free", "any", True, 3, "known"),
}


def test_the_catalogue_says_what_the_texts_say():
    """Every licence of the facts is there with its vector, and no other."""
    found = {
        x.id: (
            str(x.terms.weights_commercial),
            x.terms.outputs_commercial,
            x.terms.relicense,
            x.terms.share_derivative,
            len(x.terms.hosting),
            x.terms.status,
        )
        for x in licences()
    }

    assert found == VECTORS


def test_both_texts_of_creativeml_and_faipl_sd_have_the_same_eleven_restrictions():
    """RAIL-M, RAIL++-M and FAIPL-1.0-SD share one list; BigScience's is another, and plain FAIPL-1.0 has none."""
    lists = {name: licence_named(name).terms.use_restrictions for name in (RAIL, RAIL_PP, FAIPL_SD, "bigscience-openrail-m", "faipl-1.0")}

    assert lists[RAIL] == lists[RAIL_PP] == lists[FAIPL_SD] == {f"railA:{n}" for n in range(1, 12)}
    assert not lists["bigscience-openrail-m"] & lists[RAIL]
    assert lists["faipl-1.0"] == frozenset()


@pytest.mark.parametrize(
    ("base_model", "identifier"),
    [
        ("SD 1.5", RAIL),
        ("sdxl 1.0", RAIL_PP),
        ("SDXL Lightning", RAIL_PP),
        ("PixArt E", RAIL_PP),
        ("Pony", PONY),
        ("SDXL Turbo", SAI_NC),
        ("SD 3.5 Large", SAI),
        ("Flux.1 D", FLUX),
        ("Flux.1 Kontext", FLUX),
        ("Flux.1 S", "Apache-2.0"),
        ("Chroma", "Apache-2.0"),
        ("Illustrious", FAIPL_SD),
        ("NoobAI", NOOB),
        ("HiDream", "MIT"),
    ],
)
def test_base_models_hint_at_licences(base_model, identifier):
    """Civitai's table is followed, but for Pony, where the author's own text is stricter than the table."""
    assert licence_for_base_model(base_model).id == identifier


@pytest.mark.parametrize("base_model", ["", "Other", "Kolors", "Hunyuan 1", "SDXL 0.9", "Pony V7"])
def test_base_models_without_a_known_text_hint_at_nothing(base_model):
    """Own licences that are not in the catalogue, and what is no base model."""
    assert licence_for_base_model(base_model) is None


some = st.frozensets(st.sampled_from(["a", "b", "c"]), max_size=3)
caps = st.builds(Cap, amount=st.sampled_from([1, 2]), inclusive=st.booleans(), registered=some)
vectors = st.builds(
    Terms,
    weights_commercial=st.sampled_from(["free", "non-commercial"]) | caps,
    hosting=st.frozensets(st.sampled_from(sorted(HOSTS))),
    territory=st.none() | some,
    **{name: st.booleans() for name in ("sell_model", "sell_merge", "share_derivative")},
    **{name: st.sampled_from(steps) for name, steps in LADDERS.items()},
    **dict.fromkeys(("use_restrictions", "copyleft", "credit", "notices", "license_copies", "branding", "change_notice", "source_offer"), some),
    filters=some,
)


@given(vectors, vectors, vectors)
def test_meet_is_a_meet(a, b, c):
    """Associative, commutative, idempotent, with the permissive vector as identity: the order of merging cannot count."""
    assert meet(a, b) == meet(b, a)
    assert meet(a, meet(b, c)) == meet(meet(a, b), c)
    assert meet(a, a) == a
    assert meet(a, PERMISSIVE) == a == meet_all([a])
    assert meet_all([c, a, b, a]) == meet(meet(a, b), c)


def test_each_component_combines_to_the_stricter_one():
    """One example of each kind of order, by hand."""
    strict = meet(
        Terms(weights_commercial=Cap(amount=5, registered=frozenset({"X"})), hosting=frozenset({"civitai", "own-free"}), sell_merge=False),
        Terms(weights_commercial=Cap(amount=3, inclusive=False, registered=frozenset({"Y"})), hosting=frozenset({"own-free", "other-paid"})),
    )

    assert strict.weights_commercial == Cap(amount=3, inclusive=False, registered=frozenset({"X", "Y"}))
    assert strict.hosting == {"own-free"}
    assert not strict.sell_merge
    assert strict.sell_model
    assert meet(Terms(weights_commercial=Cap(amount=5)), Terms(weights_commercial="non-commercial")).weights_commercial == "non-commercial"
    assert meet(Terms(outputs_commercial="no-competitor-training"), Terms(outputs_commercial="non-commercial")).outputs_commercial == "non-commercial"
    assert meet(Terms(relicense="same-permissions"), Terms(relicense="same-licence")).relicense == "same-licence"
    assert meet(Terms(status="disputed"), UNKNOWN).status == "unknown"
    assert meet(Terms(status="claimed"), Terms(status="disputed")).status == "disputed"
    assert meet(Terms(territory=frozenset({"EU", "US"})), Terms(territory=frozenset({"US"}))).territory == {"US"}
    assert meet(Terms(credit=frozenset({"A"})), Terms(credit=frozenset({"B"}))).credit == {"A", "B"}


def test_a_vector_writes_down_only_what_it_asks():
    """The permissive vector is empty, in the table and by name; values are texts, truths and sorted lists."""
    assert PERMISSIVE.plain() == {}
    assert COMPONENTS[-1] == "status"
    assert Terms(sell_merge=False, credit=frozenset("ba")).plain() == {"sell_merge": False, "credit": ["a", "b"]}
    assert Terms(use_restrictions=licence_named(RAIL).terms.use_restrictions | {"x:3", "bfl:4"}).plain() == {
        "use_restrictions": ["bfl:4", "railA:1..11", "x:3"]
    }
    assert Terms(use_restrictions=frozenset({"a:9", "a:10", "a:2", "a:02", "a:b"})).plain() == {"use_restrictions": ["a:2", "a:9..10", "a:02", "a:b"]}
    assert Terms(weights_commercial=Cap(amount=10, inclusive=False)).plain() == {"weights_commercial": "below US$10 a year"}


GRANTED = {"allowNoCredit": True, "allowCommercialUse": ["Image", "RentCivit", "Rent", "Sell", "SellMerge"], "allowDerivatives": True} | {
    "allowDifferentLicense": True
}


def flags(**said):
    """Read permissions that grant everything but what is said."""
    return read_permissions(GRANTED | said)


@pytest.mark.parametrize(
    ("sent", "uses"),
    [
        ([], ""),
        ("None", ""),
        (["None"], ""),
        ("{}", ""),
        ("{None}", ""),
        ("[]", ""),
        ({"Image", "Rent"}, "Image Rent"),
        (("Image",), "Image"),
        (["Image", "Image"], "Image"),
        ('["Image", "RentCivit"]', "Image RentCivit"),
        ("{Image,RentCivit}", "Image RentCivit"),
        ('{ "Image" , RentCivit }', "Image RentCivit"),
        ("{RentCivit}", "RentCivit"),
        ("Image", "Image"),
        ("RentCivit", "Image RentCivit"),
        ("Rent", "Image RentCivit Rent"),
        ("Sell", "Image RentCivit Rent Sell"),
        (" Sell ", "Image RentCivit Rent Sell"),
        ("SellMerge", "SellMerge"),
        (["Rent"], "Rent"),
        (["Sell"], "Sell"),
        ("{Sell}", "Sell"),
        (["Image", "RentCivit", "Rent", "Sell", "SellMerge"], "Image RentCivit Rent Sell SellMerge"),
    ],
)
def test_every_shape_of_the_hub_is_read(sent, uses):
    """Single strings of 2023 include what is below them; members of lists stand for themselves."""
    assert flags(allowCommercialUse=sent).commercial == set(uses.split())


def test_a_substring_grants_nothing():
    """`Rent` is part of the text `{Image,RentCivit}`, and is not granted by it."""
    terms = flags(allowCommercialUse="{Image,RentCivit}").terms()

    assert terms.hosting == {"civitai", "own-free"}


@pytest.mark.parametrize(
    ("raw", "what", "hint"),
    [
        ({"allowCommercialUse": ["Imagee"]}, "`Imagee`, which is not known", "Image"),
        ({"allowCommercialUse": "{Image,RentCivitt}"}, "`RentCivitt`, which is not known", "RentCivit"),
        ({"allowCommercialUse": ["image"]}, "`image`, which is not known", "Image"),
        ({"allowCommercialUse": "SellMerges"}, "`SellMerges`, which is not known", "SellMerge"),
        ({"allowCommercialUse": '["Lease"]'}, "`Lease`, which is not known", ""),
        ({"allowCommercialUse": ""}, "``, which is not known", "Image"),
        ({"allowCommercialUse": ["None", "Image"]}, "grants nothing and something", "None"),
        ({"allowCommercialUse": "{None,Sell}"}, "grants nothing and something", "None"),
        ({"allowCommercialUse": "[Image"}, "not a list", "Image"),
        ({"allowCommercialUse": "[" * 500}, "not a list", "Image"),
        ({"allowCommercialUse": "[" * 500_000}, "not a list", "Image"),
        ({"allowCommercialUse": [["Image"]]}, "not a list of texts", "Image"),
        ({"allowCommercialUse": [1]}, "not a list of texts", "Image"),
        ({"allowCommercialUse": {"Image": True}}, "not a list of texts", "Image"),
        ({"allowCommercialUse": True}, "of type bool, not a list of texts", "Image"),
        ({"allowDerivatives": "yes"}, "`allowDerivatives` is `yes`, not true or false", ""),
        ({"allowNoCredit": 1}, "`allowNoCredit` is of type int, not true or false", ""),
        ({"allowDifferentLicense": []}, "not true or false", ""),
        ({"allowComercialUse": []}, "`allowComercialUse` is no permission", "allowCommercialUse"),
        ({"sell": True}, "`sell` is no permission", "allow"),
        (["Image"], "a table", "allowNoCredit"),
        (None, "a table", "allowNoCredit"),
    ],
)
def test_what_cannot_be_understood_concludes_nothing(raw, what, hint):
    """A member, field or value that is not known is refused, with what was probably meant; nothing hostile gets longer on its way."""
    with pytest.raises(PermissionsError) as caught:
        read_permissions(GRANTED | raw if isinstance(raw, dict) else raw)

    assert what in str(caught.value)
    assert hint in caught.value.hint
    assert len(str(caught.value)) < 300


def test_nothing_withheld_asks_for_nothing():
    """All values granted is the permissive vector; no clause is printed."""
    assert flags().terms("Meina") == PERMISSIVE
    assert flags().clauses == {}
    assert flags().withheld == flags().missing == flags().notes == ()


@pytest.mark.parametrize(
    ("said", "component", "value", "clause"),
    [
        ({"allowNoCredit": False}, "credit", {"MeinaPastel by Meina"}, "must be credited"),
        ({"allowCommercialUse": ["RentCivit", "Rent", "Sell", "SellMerge"]}, "outputs_commercial", "non-commercial", "generated images"),
        ({"allowCommercialUse": ["Image", "Rent", "Sell", "SellMerge"]}, "hosting", {"other-paid", "own-free"}, "Civitai generator"),
        ({"allowCommercialUse": ["Image", "RentCivit", "Sell", "SellMerge"]}, "hosting", {"civitai", "own-free"}, "ad-supported"),
        ({"allowCommercialUse": ["Image", "RentCivit", "Rent", "SellMerge"]}, "sell_model", False, "does not apply to a merge"),
        ({"allowCommercialUse": ["Image", "RentCivit", "Rent", "Sell"]}, "sell_merge", False, "Sale of Merges"),
        ({"allowDifferentLicense": False}, "relicense", "same-permissions", "same permissions required"),
    ],
)
def test_each_withheld_value_asks_for_one_thing(said, component, value, clause):
    """One clause stands there for each value that is not granted (standards D2)."""
    permissions = flags(**said)

    assert permissions.terms("MeinaPastel by Meina") == dataclasses.replace(PERMISSIVE, **{component: value})
    assert list(permissions.clauses) == [component]
    assert clause in permissions.clauses[component]


def test_derivatives_refused_are_neither_shared_nor_served():
    """The clause forbids running a service on a merge, too."""
    terms = flags(allowDerivatives=False).terms()

    assert terms == dataclasses.replace(PERMISSIVE, share_derivative=False, hosting=frozenset())
    assert set(flags(allowDerivatives=False).clauses) == {"share_derivative", "hosting"}


@pytest.mark.parametrize("sent", ["Sell", ["Sell"], "{Image,Sell}"])
def test_selling_without_selling_merges_is_withheld_with_a_note(sent):
    """Old rows meant both, new rows mean one: it counts as withheld, and says so."""
    permissions = flags(allowCommercialUse=sent)

    assert permissions.terms().sell_model
    assert not permissions.terms().sell_merge
    assert "2026-09-16" in permissions.notes[0]


@pytest.mark.parametrize("field", GRANTED)
@pytest.mark.parametrize("absent", [True, False])
def test_a_flag_that_is_not_stated_is_not_granted(field, absent):
    """Absent and null are the same: unknown, nothing granted, and the field is named."""
    raw = {name: value for name, value in GRANTED.items() if name != field} | ({} if absent else {field: None})
    permissions = read_permissions(raw)

    assert permissions.missing == (field,)
    assert permissions.terms().status == "unknown"
    assert field in permissions.clauses["status"]
    assert len(permissions.terms().stricter()) > 1
    assert set(permissions.clauses) == set(permissions.terms().stricter())


def test_names_beside_the_flags_are_left_alone():
    """A lock's snapshot names the model and its creator too."""
    assert read_permissions(GRANTED | {"model": "MeinaPastel", "creator": "Meina"}) == flags()


def test_permissions_are_identified_by_what_they_say():
    """The same permissions in another shape or order have the same id; others have another; the id is an SPDX reference."""
    shapes = [["Image", "RentCivit"], ["RentCivit", "Image"], "{Image,RentCivit}", '["Image","RentCivit"]', "RentCivit"]
    ids = {flags(allowCommercialUse=shape).id for shape in shapes}

    assert len(ids) == 1
    assert re.fullmatch(re.escape(ATTACHMENT_B) + "[0-9a-f]{12}", *ids)
    assert len({flags(**{name: False}).id for name in ("allowNoCredit", "allowDerivatives", "allowDifferentLicense")} | ids) == 4


def test_every_combination_of_flags_has_a_clause_for_each_value():
    """2^8 combinations, in JSON as the hub sends it: what a layer asks, it quotes."""
    uses = ("Image", "RentCivit", "Rent", "Sell", "SellMerge")
    for bits in itertools.product([False, True], repeat=8):
        raw = dict(zip(("allowNoCredit", "allowDerivatives", "allowDifferentLicense"), bits[:3], strict=True))
        raw["allowCommercialUse"] = [use for use, bit in zip(uses, bits[3:], strict=True) if bit]
        layer = permissions_layer(read_permissions(json.loads(json.dumps(raw))), source="hub")
        assert set(layer.clauses) == set(layer.terms.stricter())
