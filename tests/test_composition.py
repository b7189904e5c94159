"""What a merge comes under: combinations by hand, each with the sentence it rests on, and properties over all others."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
import tomllib

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from test_licences import vectors

from sdmerge_build.licences import (
    Ancestor,
    Layer,
    Terms,
    conclude,
    licence_layer,
    licence_named,
    licences,
    meet,
    permissions_layer,
    read_permissions,
    unknown_layer,
)
from sdmerge_build.licences.terms import LADDERS, Cap

ALL = ("Image", "RentCivit", "Rent", "Sell", "SellMerge")


def flags(*withheld, credit=True, derivatives=True, different=True):
    """Permissions that grant everything but some commercial uses, and what is said."""
    return {
        "allowNoCredit": credit,
        "allowCommercialUse": [use for use in ALL if use not in withheld],
        "allowDerivatives": derivatives,
        "allowDifferentLicense": different,
    }


def parent(name, licence, permissions=None, **about):
    """A checkpoint under a licence, `?` for none that is known, with its author's permissions, if any."""
    layers = [unknown_layer("see the card") if licence == "?" else licence_layer(licence_named(licence), source="hub")]
    if permissions is not None:
        layers.append(permissions_layer(read_permissions(permissions), source="hub", credit=f"{name} by its author"))
    return Ancestor(name=name, layers=tuple(layers), **about)


def family(*parents):
    """Name the parents of a row A, B, C; a parent is a licence, or a licence and permissions."""
    return [parent(name, *(row if isinstance(row, tuple) else (row,))) for name, row in zip("ABC", parents, strict=False)]


SHORT = {
    "RAIL": "LicenseRef-CreativeML-OpenRAIL-M",
    "RAIL++": "LicenseRef-CreativeML-OpenRAIL-PP-M",
    "BIG": "LicenseRef-scancode-bigscience-open-rail-m",
    "SAI": "LicenseRef-scancode-stability-ai-community-2024",
    "SAI-NC": "LicenseRef-scancode-stability-ai-nc-2023-12-06",
    "FLUX": "LicenseRef-scancode-flux-1-nc",
    "FAIPL": "LicenseRef-FAIPL-1.0",
    "FAIPL-SD": "LicenseRef-scancode-fair-ai-public-1.0-sd",
    "PONY": "LicenseRef-Pony-V6-XL",
    "NOOB": "LicenseRef-NoobAI-XL",
    "GPL": "GPL-3.0-only",
    "AGPL": "AGPL-3.0-only",
}
RAIL, RAIL_PP, BIG, SAI, SAI_NC, FLUX = (SHORT[name] for name in ("RAIL", "RAIL++", "BIG", "SAI", "SAI-NC", "FLUX"))
FAIPL, FAIPL_SD, PONY, NOOB, GPL, AGPL = (SHORT[name] for name in ("FAIPL", "FAIPL-SD", "PONY", "NOOB", "GPL", "AGPL"))
SAME = flags(different=False)

# parents; what the result comes under (attachments left out); conflicts, with `w` behind warnings; the sentence that decides
TABLE = [
    ([RAIL, RAIL], "RAIL", "", "D1: RAIL, other terms allowed respecting §4.a"),
    ([RAIL, RAIL_PP], "RAIL AND RAIL++", "", "D3: RAIL-M + RAIL++-M → union of restrictions, two licence copies"),
    ([RAIL, "Apache-2.0"], "RAIL", "", "D3: Apache/MIT/CC0 + RAIL → RAIL terms + notices"),
    ([RAIL, "MIT"], "RAIL", "", "D3: Apache/MIT/CC0 + RAIL → RAIL terms + notices"),
    ([RAIL_PP, "CC0-1.0"], "RAIL++", "", "D3: Apache/MIT/CC0 + RAIL → RAIL terms + notices"),
    ([RAIL, "MIT", "Apache-2.0"], "RAIL", "", "D3: Apache/MIT/CC0 + RAIL → RAIL terms + notices"),
    (["Apache-2.0", "MIT"], "Apache-2.0 AND MIT", "", "D1: Apache, yes for your own changes; each text's notices stay"),
    (["CC0-1.0", "MIT"], "MIT", "", "D1: CC0 asks for nothing"),
    (["OpenMDW-1.0", "CC0-1.0"], "OpenMDW-1.0", "", "C5: OpenMDW is an SPDX text; permissive"),
    ([RAIL, "CC-BY-4.0"], "RAIL", "", "D1: CC-BY asks for attribution, and lets derivatives come under other texts"),
    (["Apache-2.0", FLUX], "FLUX", "", "D3: schnell + FLUX-dev NC → FLUX-NC for the whole"),
    ([RAIL, FLUX], "RAIL AND FLUX", "", "D1: FLUX, no terms that limit; RAIL, restrictions passed on; no conflict is listed"),
    (["CC-BY-NC-4.0", FLUX], "FLUX", "", "D3: max of weights; CC-BY-NC lets derivatives come under stricter texts"),
    ([FLUX, SAI], "FLUX AND SAI", "", "D3: caps and non-commercial, max; C6 needs a copyleft text"),
    ([FAIPL_SD, RAIL], "FAIPL-SD", "", "D3: RAIL + FAIPL-SD → result must be FAIPL-SD, plus RAIL copy/notices"),
    ([FAIPL_SD, RAIL_PP, RAIL], "FAIPL-SD", "", "D3 C2: FAIPL-1.0-SD and RAIL is fine (same list)"),
    ([FAIPL_SD, FAIPL_SD], "FAIPL-SD", "", "D1: copyleft, this license"),
    ([FAIPL_SD, "MIT"], "FAIPL-SD", "", "D1: copyleft, this license"),
    ([FAIPL_SD, "CC-BY-4.0"], "FAIPL-SD", "", "D1: attribution alone limits nothing that FAIPL allows"),
    ([FAIPL_SD, "CC-BY-NC-4.0"], "CC-BY-NC-4.0 AND FAIPL-SD", "C1", "D3 C1: FAIPL and weights NC"),
    ([FAIPL_SD, FLUX], "FLUX AND FAIPL-SD", "C1 C6", "D3 C1: weights NC, outputs limited; C6: BFL is no-sublicense"),
    ([FAIPL_SD, SAI], "FAIPL-SD AND SAI", "C1 C6", "D3 C1: revenue cap; C6: SAI is no-sublicense"),
    ([FAIPL_SD, SAI_NC], "FAIPL-SD AND SAI-NC", "C1 C6", "D3 C1: weights NC; C6"),
    ([FAIPL_SD, (RAIL_PP, flags("Rent"))], "FAIPL-SD", "C1", "D3 C1: hosting ⊂ all"),
    ([FAIPL_SD, (RAIL_PP, flags("SellMerge"))], "FAIPL-SD", "C1", "D3 C1: sell_* = no"),
    ([FAIPL_SD, (RAIL_PP, flags("Sell"))], "FAIPL-SD", "C1", "D3 C1: sell_* = no"),
    ([FAIPL_SD, (RAIL_PP, flags("Image"))], "FAIPL-SD", "C1", "D3 C1: outputs limited"),
    ([FAIPL_SD, (RAIL_PP, flags(credit=False))], "FAIPL-SD", "", "D3 C1 does not name credit"),
    ([(FAIPL_SD, flags("Rent"))], "FAIPL-SD", "", "D1 NoobAI: limits added to FAIPL by one author are disputed; C1 needs another ancestor"),
    ([(FAIPL_SD, flags("Rent")), FAIPL_SD], "FAIPL-SD", "C1", "D3 C1: hosting limited by another ancestor than the FAIPL one"),
    ([FAIPL_SD, PONY], "PONY AND FAIPL-SD", "C1", "D1 Pony: no monetised inference, applies to merges; D3 C1: hosting ⊂ all"),
    ([PONY, PONY], "PONY", "", "D1 Pony: both under one text, which allows what it allows"),
    ([PONY, RAIL_PP], "PONY", "", "D1 Pony: modified FAIPL-SD; D3: RAIL + FAIPL-SD"),
    ([NOOB, FAIPL_SD], "NOOB AND FAIPL-SD", "C1", "D1 NoobAI: prohibits commercialization; D3 C1"),
    ([NOOB, RAIL_PP], "NOOB", "", "D1 NoobAI: record both, act on the stricter"),
    ([FAIPL, RAIL], "RAIL AND FAIPL", "C2", "D3 C2: FAIPL-1.0 (non-SD) and a RAIL use restriction"),
    ([GPL, RAIL], "RAIL AND GPL", "C2", "D3 C2: GPL, further restrictions"),
    ([AGPL, RAIL_PP], "AGPL AND RAIL++", "C2", "D3 C2: AGPL, further restrictions"),
    ([GPL, BIG], "GPL AND BIG", "C2", "D3 C2: any RAIL use restriction"),
    ([FAIPL_SD, BIG], "BIG AND FAIPL-SD", "C2", "D3 C2: fine because it is the same list, and BigScience's is another"),
    ([GPL, "MIT"], "GPL", "", "D1: MIT lets derivatives come under other texts"),
    ([GPL, AGPL], "AGPL AND GPL", "", "§13 of both texts: a combined work is allowed"),
    ([GPL, "CC-BY-NC-4.0"], "CC-BY-NC-4.0 AND GPL", "C2", "D3 C2: further restrictions, here of use"),
    ([FAIPL_SD, FAIPL], "FAIPL AND FAIPL-SD", "C2 C4", "D3 C2: plain FAIPL and the -SD list; C4: not the same"),
    ([FAIPL_SD, "CC-BY-SA-4.0"], "CC-BY-SA-4.0 AND FAIPL-SD", "C2 C4", "D3 C4: FAIPL vs CC-BY-SA; CC-BY-SA §3(b): no additional restrictions"),
    ([FAIPL_SD, GPL], "GPL AND FAIPL-SD", "C2 C4", "D3 C4: FAIPL vs GPL; C2: the -SD list"),
    ([FAIPL, GPL], "GPL AND FAIPL", "C4", "D3 C4: FAIPL vs GPL"),
    (["CC-BY-SA-4.0", "CC-BY-NC-SA-4.0"], "CC-BY-NC-SA-4.0 AND CC-BY-SA-4.0", "C1 C4", "D3 C4: CC-BY-SA vs CC-BY-NC-SA"),
    ([FAIPL_SD, "CC-BY-NC-SA-4.0"], "CC-BY-NC-SA-4.0 AND FAIPL-SD", "C1 C2 C4", "D3 C1: weights NC; C4: FAIPL vs CC-BY-NC-SA"),
    (["CC-BY-NC-SA-4.0", "CC-BY-NC-4.0"], "CC-BY-NC-SA-4.0", "", "D1: CC-BY-NC, attribution; SA is the stricter and adds no conflict"),
    (["CC-BY-SA-4.0", "CC-BY-4.0"], "CC-BY-SA-4.0", "", "D1: CC-BY lets derivatives come under SA"),
    (["CC-BY-SA-4.0", FLUX], "CC-BY-SA-4.0 AND FLUX", "C1 C6", "D3 C6: BFL is no-sublicense; CC-BY-SA §3(b): no additional restrictions"),
    ([GPL, SAI], "GPL AND SAI", "C2 C6", "D3 C6: SAI is no-sublicense"),
    ([RAIL, "CC-BY-ND-4.0"], "CC-BY-ND-4.0 AND RAIL", "C3", "D3 C3: CC *-ND, private build only"),
    (["MIT", "CC-BY-NC-ND-4.0"], "CC-BY-NC-ND-4.0", "C3", "D3 C3: CC *-ND, private build only"),
    ([RAIL, (RAIL, flags(derivatives=False))], "RAIL", "C3", "D3 C3: allowDerivatives=false"),
    ([FAIPL_SD, (RAIL_PP, flags(derivatives=False))], "FAIPL-SD", "C1 C3", "D2: nor run a service on a merge, so hosting ⊂ all; D3 C3"),
    ([RAIL, (RAIL, SAME)], "RAIL", "", "D3 C5: the meet equals A's own flags"),
    ([(RAIL, SAME), (RAIL, flags("Rent"))], "RAIL", "C5w", "D3 C5: meet ≠ A's own flags, warn"),
    ([(RAIL, SAME), (RAIL, flags("SellMerge", different=False))], "RAIL", "C5w", "D3 C5: only the one with fewer limits differs"),
    ([(RAIL, flags("Rent", different=False)), (RAIL, flags("Rent", different=False))], "RAIL", "", "D3 C5: both ask the same"),
    ([(RAIL, SAME), (RAIL, flags(credit=False))], "RAIL", "C5w", "D2: allowNoCredit is one of the permissions"),
    ([(RAIL, SAME), "CC-BY-NC-4.0"], "CC-BY-NC-4.0 AND RAIL", "C5w", "D3 C5: limits of any ancestor change the meet"),
    ([RAIL, "?"], "RAIL", "C8", "D3 C8: any unknown, cannot conclude"),
    (["?", "?"], "", "C8", "D1: unknown, no permission to share"),
    ([FAIPL_SD, FLUX, "?"], "FLUX AND FAIPL-SD", "C1 C6 C8", "D3: every conflict is told"),
    ([RAIL, (RAIL, flags(credit=None))], "RAIL", "C8", "D3 C8: a flag that is not stated is unknown"),
    ([RAIL, (RAIL, {"allowNoCredit": True})], "RAIL", "C3 C8", "D3 C8; what is not stated is not granted, sharing merges neither"),
    ([SAI, RAIL_PP], "RAIL++ AND SAI", "", "D1: SAI under US$1M, registered; RAIL restrictions passed on"),
    (["openrail", RAIL], "RAIL AND LicenseRef-OpenRAIL", "", "C3: openrail is an id of its own; claimed"),
]


def short(expression):
    """Write an expression with the table's abbreviations, without attachments, sorted as the table is."""
    names = {identifier: name for name, identifier in SHORT.items()}
    return {names.get(part, part) for part in expression.split(" AND ") if "AttachmentB" not in part} - {""}


@pytest.mark.parametrize(("parents", "licence", "ids", "rests_on"), TABLE, ids=[f"{n:02} {row[3][:50]}" for n, row in enumerate(TABLE)])
def test_a_combination_concludes_what_the_texts_say(parents, licence, ids, rests_on):
    """In every order of the parents: the licence the result comes under, the conflicts with their level, and whether it is shared."""
    for order in itertools.permutations(family(*parents)):
        found = conclude(order)
        said = [conflict.id + ("w" if conflict.level == "warning" else "") for conflict in found.conflicts]

        assert short(found.license) == set(licence.split(" AND ")) - {""}, rests_on
        assert sorted(set(said)) == ids.split(), rests_on
        assert found.share == ("no" if any(not word.endswith("w") for word in said) else "on-terms")


def test_the_table_is_large_enough():
    """At least forty different combinations of two and three parents, each with a sentence."""
    assert len({str(row[0]) for row in TABLE if len(row[0]) in {2, 3}}) >= 40
    assert all(row[3] for row in TABLE)


def test_rail_and_faipl_sd_keep_the_copies_of_both():
    """The result is FAIPL-1.0-SD; recipients get both texts, the notices of RAIL, and the source."""
    found = conclude(family(RAIL, FAIPL_SD))
    said = {(duty.kind, duty.what) for duty in found.duties}

    assert ("licence-copy", "pass on a copy of CreativeML Open RAIL-M") in said
    assert ("licence-copy", "pass on a copy of Fair AI Public License 1.0-SD") in said
    assert ("pass-on", "pass on the use restrictions of CreativeML Open RAIL-M as an enforceable provision") in said
    assert {"notice", "change-notice", "source-offer"} <= {kind for kind, _ in said}


def test_stability_asks_for_a_fixed_sentence_and_its_name():
    """The Notice file has the sentence word for word; `Powered by Stability AI` is shown; the cap needs registration."""
    found = conclude(family(SAI, "MIT"))
    said = {duty.kind: duty.what for duty in found.duties if duty.ancestors == ("A",)}

    assert "Copyright © Stability AI Ltd. All Rights Reserved" in said["notice"]
    assert "Powered by Stability AI" in said["branding"]
    assert found.table()["concluded"]["weights_commercial"] == "up to US$1,000,000 a year, registered"


def test_flux_asks_for_filters_and_no_endorsement():
    """Copy, attribution notice, statement of change, filters, and a name that is not misused."""
    kinds = {duty.kind for duty in conclude(family("Apache-2.0", FLUX)).duties}

    assert kinds == {"licence-copy", "notice", "change-notice", "filter", "branding", "pass-on"}


def test_a_credit_names_whom():
    """Credits come once per ancestor, with what is known of it."""
    a = parent("A", "CC-BY-4.0", credit="Ann", homepage="https://example.org/a")
    b = parent("B", RAIL, flags(credit=False))
    owed = {duty.ancestors: duty for duty in conclude([a, b]).duties if duty.kind == "credit"}

    assert owed["A",].what == "credit A: the author, the title, and where it is (Ann, https://example.org/a)"
    assert owed["A",].url == "https://example.org/a"
    assert {duty.url for duty in conclude([parent("C", "CC-BY-4.0")]).duties} == {licence_named("CC-BY-4.0").url}
    assert owed["B",].what == "credit B: B by its author"


def test_every_reason_names_ancestor_text_and_clause():
    """Each concluded component rests on at least one clause of one ancestor, and on none that asks for less."""
    found = conclude([parent("A", RAIL, flags("Rent")), parent("B", FLUX), parent("C", "CC-BY-NC-4.0")])
    by_component = {name: {entry.ancestor for entry in found.reasons if entry.component == name} for name in found.terms.stricter()}

    assert by_component["weights_commercial"] == {"B", "C"}
    assert by_component["relicense"] == {"B"}
    assert by_component["hosting"] == {"A", "B", "C"}
    assert by_component["credit"] == {"C"}
    assert all(by_component.values())
    assert all(entry.clause for entry in found.reasons)
    assert all(entry.url.startswith("https://") for entry in found.reasons if entry.layer != "permissions on Civitai")


def test_a_conflict_quotes_both_sides():
    """C1 names the copyleft text and every limit, with their clauses."""
    (found,) = conclude(family(FAIPL_SD, "CC-BY-NC-4.0")).conflicts

    assert found.ancestors == ("A", "B")
    assert {(entry.ancestor, entry.component) for entry in found.reasons} == {
        ("A", "relicense"),
        ("B", "weights_commercial"),
        ("B", "hosting"),
        ("B", "sell_model"),
        ("B", "sell_merge"),
    }
    assert "allows everything this license allows" in found.reasons[0].clause
    assert found.hint


def test_same_permissions_name_both_readings():
    """C5 is a warning, for the clause and the badge say different things."""
    (found,) = conclude(family((RAIL, SAME), (RAIL, flags("Rent")))).conflicts

    assert (found.id, found.level, found.ancestors) == ("C5", "warning", ("A",))
    assert "nothing is modified or eliminated" in found.what
    assert "same permissions required on merges" in found.what


def test_an_input_that_does_not_contribute_binds_nothing():
    """It is listed, and its terms, conflicts and duties are left out."""
    a, b = family(RAIL, FLUX)
    found = conclude([a, dataclasses.replace(b, contributes=False)])

    assert found.terms == conclude([a]).terms
    assert found.duties == conclude([a]).duties
    assert [(row["name"], row["contributes"]) for row in found.table()["ancestor"]] == [("A", True), ("B", False)]


def test_who_contributes_anywhere_contributes():
    """The same ancestor at a ratio of zero in one step, and of a half in another."""
    a = parent("A", FLUX)
    found = conclude([dataclasses.replace(a, contributes=False), a])

    assert len(found.ancestors) == 1
    assert found.terms.weights_commercial == "non-commercial"


@pytest.mark.parametrize("ancestors", [[], [parent("A", RAIL, contributes=False)], [Ancestor(name="A")]])
def test_where_nothing_is_known_nothing_is_shared(ancestors):
    """No ancestor, none that contributes, or one without any text."""
    found = conclude(ancestors)

    assert [conflict.id for conflict in found.conflicts] == ["C8"]
    assert found.share == "no"
    assert found.license == ""


def test_disputed_texts_say_so():
    """Pony, NoobAI, and limits that an author adds to a text that forbids them."""
    for ancestor in (parent("A", PONY), parent("A", NOOB), parent("A", FAIPL_SD, flags("Rent"))):
        found = conclude([ancestor])
        assert found.terms.status == "disputed"
        assert "disputed" in found.summary
        assert [entry.clause for entry in found.reasons if entry.component == "status"] != [""]
    assert found.table()["ancestor"][0]["notes"] == [
        "limits beside Fair AI Public License 1.0-SD, which allows none to be added: permissions on Civitai"
    ]


def test_foundation_weights_of_two_families_are_warned_of():
    """C9: Stability's text forbids improving other foundation models; within one family there is nothing to say."""
    a, b = parent("A", SAI, family="sd3"), parent("B", "Apache-2.0", family="flux")
    (found,) = conclude([a, b]).conflicts

    assert (found.id, found.level, found.ancestors) == ("C9", "warning", ("A",))
    assert conclude([a, b]).share == "on-terms"
    for same in ("sd3", ""):
        assert conclude([a, dataclasses.replace(b, family=same)]).conflicts == ()
    assert conclude([dataclasses.replace(a, family=""), b]).conflicts == ()


@pytest.mark.parametrize(
    ("parents", "declared", "collides"),
    [
        ([RAIL, RAIL], "creativeml-openrail-m", False),
        ([RAIL, "MIT"], "CreativeML Open RAIL-M", False),
        ([RAIL, RAIL_PP], "openrail++", False),
        ([RAIL, RAIL], "faipl-1.0-sd", False),
        ([RAIL, RAIL], "MIT", True),
        ([RAIL, RAIL], "cc0-1.0", True),
        ([FAIPL_SD, RAIL], "creativeml-openrail-m", True),
        ([FAIPL_SD, RAIL], "faipl-1.0-sd", False),
        ([FLUX, "Apache-2.0"], "apache-2.0", True),
        ([FLUX, "Apache-2.0"], "flux-1-dev-non-commercial-license", False),
        ([FLUX, FLUX], "cc-by-nc-4.0", True),
        ([SAI, SAI], "apache-2.0", True),
        ([SAI, SAI], "SAI CLA", False),
        (["CC-BY-NC-4.0", "MIT"], "cc-by-4.0", True),
        (["CC-BY-NC-4.0", "MIT"], "cc-by-nc-sa-4.0", False),
        ([(RAIL, flags("Rent"))], "creativeml-openrail-m", True),
        ([(RAIL, SAME)], "creativeml-openrail-m", False),
        ([RAIL, FLUX], f"{FLUX} AND {RAIL}", False),
        ([RAIL, FLUX], FLUX, True),
        ([RAIL], "my own licence", True),
        ([RAIL], "creativeml-openrial-m", True),
        ([RAIL], "", True),
        ([RAIL], "other", True),
    ],
)
def test_a_declared_licence_is_not_looser_than_the_concluded_one(parents, declared, collides):
    """C7, in any component that a licence can hold; one that nobody knows cannot be compared."""
    found = conclude(family(*parents), declared=declared)

    assert [(conflict.id, conflict.level) for conflict in found.conflicts] == [("C7", "conflict")] * collides
    assert found.share == ("no" if collides else "on-terms")


def test_the_concluded_expression_can_be_declared():
    """What `sdbuild license` concludes is accepted as the declaration, attachments included."""
    parents = family((RAIL, flags("Rent", "SellMerge")), (RAIL_PP, flags(credit=False)))

    assert conclude(parents, declared=conclude(parents).license).conflicts == ()


def test_a_text_that_nobody_can_pass_on_is_not_declared_away():
    """Rights that are granted directly, and no other limit: MIT is looser still, and the text itself is not."""
    direct = Ancestor(name="A", layers=(Layer(title="X", id="LicenseRef-X", terms=Terms(relicense="no-sublicense")),))

    assert [conflict.id for conflict in conclude([direct], declared="MIT").conflicts] == ["C7"]
    assert conclude([direct], declared="LicenseRef-X").conflicts == ()


def test_an_unknown_declaration_has_a_nearest_one():
    """The hint of C7 names the licence that was probably meant."""
    (found,) = conclude(family(RAIL), declared="creativeml-openrial-m").conflicts

    assert "creativeml-openrail-m" in found.hint.casefold()


def test_minimal_drops_what_may_be_dropped_and_says_which():
    """Flags go where their author allows other permissions on merges; base licences and all other flags stay."""
    parents = [parent("A", RAIL, flags("Rent", credit=False)), parent("B", RAIL, flags("Image", different=False))]
    strict, minimal = conclude(parents), conclude(parents, policy="minimal")

    assert strict.terms.hosting == {"civitai", "own-free"}
    assert minimal.terms.hosting == {"civitai", "own-free", "other-paid"}
    assert minimal.terms.outputs_commercial == "non-commercial"
    assert [(entry.ancestor, entry.component) for entry in minimal.dropped] == [("A", "hosting"), ("A", "credit")]
    assert minimal.table()["dropped"][0]["clause"]
    assert "hosting, credit" in minimal.table()["ancestor"][0]["notes"][0]
    assert strict.dropped == ()
    assert "dropped" not in strict.table()


def test_minimal_never_drops_a_refusal_to_share_nor_the_unknown():
    """Other permissions are about sharing a derivative; where that is refused, or not stated, there is nothing to change."""
    refused = conclude(family((RAIL, flags("Rent", derivatives=False))), policy="minimal")
    unknown = conclude(family((RAIL, {"allowDifferentLicense": True})), policy="minimal")

    assert [conflict.id for conflict in refused.conflicts] == ["C3"]
    assert refused.terms.hosting == frozenset()
    assert [conflict.id for conflict in unknown.conflicts if conflict.level == "conflict"] == ["C3", "C8"]
    assert unknown.dropped == ()


def test_a_policy_that_does_not_exist_is_refused():
    """Only two are known."""
    with pytest.raises(ValueError, match="`lax` is no policy"):
        conclude([], policy="lax")


def test_a_conclusion_never_says_that_you_may():
    """It says what the texts say, and that this is no legal advice."""
    table = conclude([*family((FAIPL_SD, flags("Rent")), (FLUX, SAME), "?"), parent("D", SAI, family="x")], declared="MIT").table()

    assert "you may" not in str(table).casefold()
    assert table["advice"] == "This is what the texts say, not legal advice."


named = st.sampled_from([licence.id for licence in licences()])
raw = st.fixed_dictionaries(
    {},
    optional={
        "allowNoCredit": st.booleans(),
        "allowCommercialUse": st.lists(st.sampled_from(ALL), unique=True),
        "allowDerivatives": st.booleans(),
        "allowDifferentLicense": st.booleans(),
    },
)
about = {"contributes": st.booleans(), "family": st.sampled_from(["", "sdxl", "flux"])}
real = st.builds(parent, st.sampled_from("ABCDE"), named | st.just("?"), st.none() | raw, **about)
made = st.builds(
    Ancestor,
    name=st.sampled_from("ABCDE"),
    layers=st.lists(st.builds(Layer, title=st.sampled_from("XYZ"), id=st.sampled_from(["", "x", "y"]), terms=vectors), max_size=2).map(tuple),
    **about,
)
ancestry = st.lists(real | made, max_size=5)
policies = st.sampled_from(["strict", "minimal"])
declarations = st.none() | named | st.just("none of them")


@settings(deadline=None)
@given(ancestry, policies, declarations, st.randoms(use_true_random=False))
def test_order_nesting_and_repetition_never_count(ancestors, policy, declared, shuffle):
    """The same ancestors in any order, and any number of times, give the same table to the letter; TOML can hold it."""
    table = conclude(ancestors, policy=policy, declared=declared).table()
    again = ancestors + [ancestor for ancestor in ancestors if shuffle.random() < 0.5]
    shuffle.shuffle(again)

    assert list(conclude(again, policy=policy, declared=declared).table().items()) == list(table.items())
    assert tomllib.loads(tomli_w.dumps({"terms": table})) == {"terms": table}


@settings(deadline=None)
@given(ancestry, real | made, policies, declarations)
def test_another_ancestor_never_loosens_anything(ancestors, other, policy, declared):
    """Adding an ancestor keeps every component as strict, every conflict, and never turns `no` into `on-terms`."""
    before = conclude(ancestors, policy=policy, declared=declared)
    after = conclude([*ancestors, other], policy=policy, declared=declared)

    assert meet(before.terms, after.terms) == after.terms
    if any(ancestor.contributes for ancestor in ancestors):
        conflicts = {conflict.id for conflict in before.conflicts if conflict.level == "conflict"}
        assert conflicts <= {conflict.id for conflict in after.conflicts if conflict.level == "conflict"}
        assert before.share == "on-terms" or after.share == "no"


@settings(deadline=None)
@given(ancestry)
def test_policies_differ_only_by_what_is_dropped(ancestors):
    """The strict policy is never looser than the minimal one, and both agree where nothing is dropped."""
    strict, minimal = conclude(ancestors), conclude(ancestors, policy="minimal")

    assert meet(strict.terms, minimal.terms) == strict.terms
    assert minimal.dropped or strict.terms == minimal.terms


@settings(deadline=None)
@given(ancestry)
def test_every_component_and_conflict_is_accounted_for(ancestors):
    """What is concluded has a reason, what is claimed of ancestors is about contributing ones, and the summary is one line."""
    found = conclude(ancestors)
    names = {ancestor.name for ancestor in found.ancestors if ancestor.contributes}

    assert {entry.component for entry in found.reasons} == set(found.terms.stricter())
    assert all(set(conflict.ancestors) <= names for conflict in found.conflicts)
    assert all(duty.ancestors and set(duty.ancestors) <= names for duty in found.duties)
    assert "\n" not in found.summary


def test_limits_that_no_licence_of_the_catalogue_has_count_too():
    """A territory, and an exclusive cap, collide with copyleft as the others do."""
    for terms in (Terms(territory=frozenset({"EU"})), Terms(weights_commercial=Cap(amount=1, inclusive=False))):
        limited = Ancestor(name="B", layers=(Layer(title="X", id="LicenseRef-X", terms=terms),))
        assert [conflict.id for conflict in conclude([parent("A", FAIPL_SD), limited]).conflicts] == ["C1"]
    assert set(LADDERS["status"]) == {"known", "claimed", "disputed", "unknown"}


def test_hundreds_of_ancestors_take_no_time():
    """Twice as many ancestors take about twice as long, not four times, and the table stays one that can be written."""
    chance = random.Random(4)
    ancestors = [
        parent(f"m{n}", chance.choice(licences()).id, flags(*(use for use in ALL if chance.random() < 0.3), different=chance.random() < 0.5))
        for n in range(800)
    ]
    seconds = []
    for count in (400, 800):
        start = time.process_time()
        tomli_w.dumps(conclude(ancestors[:count]).table())
        seconds.append(time.process_time() - start)

    assert seconds[1] < 3.5 * seconds[0] + 0.2
    assert seconds[1] < 5
