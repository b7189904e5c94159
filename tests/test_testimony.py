"""Who says what of a source's terms: recipes, hubs, headers and base models that agree, differ or say nothing."""

from __future__ import annotations

import datetime as dt

import pytest

from sdmerge_build.ancestry import concluded
from sdmerge_build.claims import read_claims
from sdmerge_build.facts import Facts
from sdmerge_build.licences import meet_all
from sdmerge_build.plan import plan_file
from sdmerge_build.recipe import Evidence, SourceTable
from sdmerge_build.testimony import Testimony as Hearing

SHOWN = Evidence(url="https://example.org/terms", date=dt.date(2026, 11, 1))
ALL = {
    "allowNoCredit": True,
    "allowCommercialUse": ["Image", "RentCivit", "Rent", "Sell", "SellMerge"],
    "allowDerivatives": True,
    "allowDifferentLicense": True,
}


def heard(table: SourceTable, hub: dict | None = None, header: dict | None = None) -> tuple[str, list[str]]:
    testimony = Hearing("A", table, hub or {}, read_claims(header or {}))
    return meet_all(layer.terms for layer in testimony.layers).status, [layer.id or layer.title for layer in testimony.layers]


@pytest.mark.parametrize(
    ("said", "hub", "header", "status", "layers"),
    [
        ({}, {}, {}, "unknown", ["no licence is said"]),
        ({"license": "MIT"}, {}, {}, "unknown", ["MIT"]),
        ({"license": "MIT", "evidence": SHOWN}, {}, {}, "known", ["MIT"]),
        ({"license": "MIT"}, {"license": "mit"}, {}, "known", ["MIT"]),
        ({"license": "MIT"}, {}, {"modelspec.license": "MIT"}, "claimed", ["MIT"]),
        ({}, {"license": "mit"}, {}, "known", ["MIT"]),
        ({}, {}, {"modelspec.license": "MIT License"}, "claimed", ["MIT"]),
        ({}, {"license": "other", "license_name": "evil-nc"}, {"modelspec.license": "MIT"}, "unknown", ["evil-nc", "MIT"]),
        ({"license": "MIT", "evidence": SHOWN}, {"license": "other", "license_name": "evil-nc"}, {}, "disputed", ["MIT", "evil-nc"]),
        ({"license": "MIT", "evidence": SHOWN}, {"license": "other"}, {}, "known", ["MIT"]),
        ({}, {"license": ["mit", "cc-by-nc-nd-4.0"]}, {}, "disputed", ["MIT", "CC-BY-NC-ND-4.0"]),
        ({"license": "MIT", "evidence": SHOWN}, {"license": "cc-by-nc-4.0"}, {}, "disputed", ["MIT", "CC-BY-NC-4.0"]),
        ({}, ALL | {"baseModel": "SD 1.5"}, {"modelspec.license": "Strictly private"}, "unknown", None),
        ({"license": "openrail++", "evidence": SHOWN}, ALL | {"baseModel": "Pony"}, {}, "disputed", None),
        ({"license": "FAIPL-1.0-SD", "evidence": SHOWN}, ALL | {"baseModel": "NoobAI"}, {}, "disputed", None),
        ({"license": "MIT", "evidence": SHOWN}, ALL | {"baseModel": "Flux.1 D"}, {}, "disputed", None),
        ({"license": "CreativeML Open RAIL-M"}, ALL | {"baseModel": "SD 1.5"}, {}, "claimed", None),
        ({"license": "MIT", "evidence": SHOWN, "uri": "https://civitai.com/api/download/models/9213"}, {}, {}, "unknown", None),
        ({"license": "MIT", "evidence": SHOWN, "homepage": "https://civitai.com/models/9213"}, {}, {}, "unknown", None),
        ({"license": "MIT", "evidence": SHOWN, "permissions": {}}, {}, {}, "unknown", None),
        ({"license": "MIT", "evidence": SHOWN, "permissions": ALL}, {}, {}, "known", None),
        ({"license": "MIT", "evidence": SHOWN, "permissions": ALL}, ALL | {"allowDerivatives": False}, {}, "disputed", None),
    ],
)
def test_nothing_that_anybody_says_is_dropped(said, hub, header, status, layers):
    """The status that follows, and every text that counts."""
    found = heard(SourceTable(path="a.safetensors", **said), hub, header)

    assert found[0] == status
    assert layers is None or found[1] == layers


def test_everything_that_is_heard_is_handed_on():
    """Each text has a row, with its status; reading the rows again gives terms that are no looser."""
    table = SourceTable(path="a.safetensors", license="MIT", evidence=SHOWN)
    testimony = Hearing("A", table, ALL | {"allowDerivatives": False, "license": "cc-by-nc-4.0"}, read_claims({"modelspec.license": "openrail++"}))

    assert [row.get("license") for row in testimony.rows[:3]] == ["MIT", "CC-BY-NC-4.0", "LicenseRef-CreativeML-OpenRAIL-PP-M"]
    assert testimony.rows[-1]["permissions"]["allowDerivatives"] is False
    assert len(testimony.rows) == len(testimony.layers)


def test_foundations_of_another_family_are_warned_of(tmp_path):
    """Stability's community licence with weights that a hub says come from elsewhere is C9, a warning; with its own family it is none."""
    text = 'recipe = 1\narchitecture = "sdxl"\n'
    for name, licence in (("A", "Stability AI Community License"), ("B", "MIT")):
        text += f'[source.{name}]\npath = "{name}.safetensors"\nlicense = "{licence}"\nevidence = {{ url = "https://e.org", date = 2026-11-01 }}\n'
    (tmp_path / "r.toml").write_text(text + '[step.mix]\nformula = "0.5 * A + 0.5 * B"\n', encoding="utf-8")
    plan = plan_file(tmp_path / "r.toml")

    def found(base: str) -> list[tuple[str, str]]:
        known = {"tensors": "0", "size": 1, "sha256": None, "blake3": None, "kind": "", "made": "", "claims": {}}
        facts = {"A": Facts(**known, terms={"baseModel": "SDXL Turbo"}), "B": Facts(**known, terms={"baseModel": base})}
        return [(c.id, c.level) for c in concluded(plan, plan.steps["mix"], facts).conflicts if c.id == "C9"]

    assert found("AuraFlow") == [("C9", "warning")]
    assert found("SDXL 1.0") == []
    assert found("") == []
