"""Owns the permissions that an author sets on Civitai: every shape in which the hub has sent them, and what each asks when it is withheld.

Has never heard of hubs, recipes or base licences. Restrictions are made by absence: a clause stands in the supplement for every value
that is not granted. Source: civitai/civitai, `addAdditionalLicensePermissions` ("Attachment B").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdmerge_build.errors import named_briefly, nearest
from sdmerge_build.licences.terms import HOSTS, Terms

__all__ = ["ATTACHMENT_B", "FLAGS", "Permissions", "PermissionsError", "read_permissions"]

ATTACHMENT_B = "LicenseRef-Civitai-AttachmentB-"
FLAGS = ("allowNoCredit", "allowCommercialUse", "allowDerivatives", "allowDifferentLicense")
BESIDE = frozenset({"model", "creator"})  # names that a lock's snapshot keeps beside the flags
USES = ("Image", "RentCivit", "Rent", "Sell", "SellMerge")
OLD_USES = ("Image", "RentCivit", "Rent", "Sell")  # single strings of 2023: each includes those before it
MAX_TEXT = 1000
CREDIT = "the model and its address, the creator and their address, the address of the licence"

_CLAUSES = {
    "allowNoCredit": ("credit", "to use or distribute it, the model, its creator and its licence must be credited, each with its address"),
    "Image": ("outputs_commercial", "no sale or licensing of generated images, nor of products that use them"),
    "RentCivit": ("hosting", "not on the Civitai generator"),
    "Rent": ("hosting", "no service that generates for a fee, nor an ad-supported platform"),
    "Sell": ("sell_model", "do not sell or license the model for a fee; the newer text adds: this does not apply to a merge"),
    "SellMerge": ("sell_merge", "Sale of Merges: do not sell or license a merge for a fee"),
    "allowDerivatives": (
        "share_derivative",
        "do not share or make available a merge, nor run a service on one; making one privately is not forbidden",
    ),
    "allowDifferentLicense": ("relicense", "no clause is printed, and the badge reads: same permissions required on merges"),
}


class PermissionsError(ValueError):
    """Permissions that cannot be understood, and therefore conclude nothing; `hint` says what was probably meant."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """What an author grants beside the base licence. A flag that is `None` was not stated, so nothing is granted and nothing is concluded."""

    no_credit: bool | None
    commercial: frozenset[str] | None  # of Image, RentCivit, Rent, Sell, SellMerge
    derivatives: bool | None
    different_license: bool | None
    notes: tuple[str, ...] = ()

    title = "permissions on Civitai"

    @property
    def id(self) -> str:
        """Identify the supplement by what it says, in whatever shape it was sent: 12 hex digits of a sha256 behind `ATTACHMENT_B`."""
        uses = None if self.commercial is None else sorted(self.commercial)
        said = dict(zip(FLAGS, (self.no_credit, uses, self.derivatives, self.different_license), strict=True))
        return ATTACHMENT_B + hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def missing(self) -> tuple[str, ...]:
        """Name the fields that were not stated."""
        said = (self.no_credit, self.commercial, self.derivatives, self.different_license)
        return tuple(flag for flag, value in zip(FLAGS, said, strict=True) if value is None)

    @property
    def withheld(self) -> tuple[str, ...]:
        """Name the flags and commercial uses that are not granted, stated or not."""
        uses = self.commercial or frozenset()
        flags = {"allowNoCredit": self.no_credit, "allowDerivatives": self.derivatives, "allowDifferentLicense": self.different_license}
        return tuple(name for name in _CLAUSES if not flags.get(name, name in uses))

    @property
    def clauses(self) -> dict[str, str]:
        """Quote, per component of `Terms`, the clauses that stand there because something is withheld."""
        found: dict[str, list[str]] = {}
        for name in self.withheld:
            component, clause = _CLAUSES[name]
            flag = "allowCommercialUse" if name in USES else name
            said = f"`{flag}` is not stated, so not granted" if flag in self.missing else _refusal(name)
            found.setdefault(component, []).append(f"{said}: {clause}")
        if self.derivatives is not True:
            found.setdefault("hosting", []).append("`allowDerivatives` is not granted: no service may run on a merge")
        if self.missing:
            found["status"] = [f"{named_briefly(self.missing)} {'is' if len(self.missing) == 1 else 'are'} not stated"]
        return {component: "; ".join(clauses) for component, clauses in found.items()}

    def terms(self, credit: str = "") -> Terms:
        """Say what is asked of a merge; `credit` is whom and what to credit, where crediting is asked."""
        uses = self.commercial or frozenset()
        hosts = HOSTS - ({"civitai"} if "RentCivit" not in uses else set()) - ({"other-paid"} if "Rent" not in uses else set())
        return Terms(
            outputs_commercial="free" if "Image" in uses else "non-commercial",
            hosting=hosts if self.derivatives else frozenset(),
            sell_model="Sell" in uses,
            sell_merge="SellMerge" in uses,
            share_derivative=self.derivatives is True,
            relicense="any" if self.different_license else "same-permissions",
            credit=frozenset() if self.no_credit else frozenset({credit or CREDIT}),
            status="unknown" if self.missing else "known",
        )


def read_permissions(raw: Any) -> Permissions:
    """Read the four flags as the hub names them; what is absent or null is not stated. What is contradictory or not known is refused."""
    if not isinstance(raw, Mapping):
        raise PermissionsError("permissions are a table of the hub's four fields", f"fields: {', '.join(FLAGS)}")
    if strange := sorted(str(name) for name in raw if name not in BESIDE and name not in FLAGS):
        raise PermissionsError(f"`{strange[0][:80]}` is no permission", nearest(strange[0][:80], FLAGS) or f"fields: {', '.join(FLAGS)}")
    uses = None if raw.get("allowCommercialUse") is None else _uses(raw["allowCommercialUse"])
    notes: tuple[str, ...] = ()
    if uses is not None and "Sell" in uses and "SellMerge" not in uses:
        notes = (
            "`Sell` without `SellMerge`: until 2026-09-16 one value meant both, and since then selling merges is withheld; it counts as withheld",
        )
    return Permissions(
        no_credit=_truth(raw, "allowNoCredit"),
        commercial=uses,
        derivatives=_truth(raw, "allowDerivatives"),
        different_license=_truth(raw, "allowDifferentLicense"),
        notes=notes,
    )


def _refusal(name: str) -> str:
    return f"`allowCommercialUse` lacks `{name}`" if name in USES else f"`{name}` is false"


def _truth(raw: Mapping[str, Any], flag: str) -> bool | None:
    value = raw.get(flag)
    if value is None or isinstance(value, bool):
        return value
    raise PermissionsError(f"`{flag}` is {_shown(value)}, not true or false")


def _uses(value: Any) -> frozenset[str]:
    """Make a set of whichever shape was sent; a member that is not known may be a permission or a prohibition, so it is refused."""
    if not isinstance(value, str):
        return _members(value, value)
    text = value.strip()
    if text.startswith("{") and text.endswith("}"):
        inside = text[1:-1].strip()
        return _members([part.strip().strip('"') for part in inside.split(",")] if inside else [], value)
    if text.startswith("["):
        return _members(_json(text), value)
    (use,) = _members([text], value) or ("None",)
    return frozenset(OLD_USES[: OLD_USES.index(use) + 1]) if use in OLD_USES else frozenset({use} - {"None"})


def _json(text: str) -> Any:
    """Read a JSON array; what is none, or longer than any that lists five words, is nothing."""
    try:
        return json.loads(text) if len(text) <= MAX_TEXT else None
    except (ValueError, RecursionError):
        return None


def _members(value: Any, sent: Any) -> frozenset[str]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in value):
        raise PermissionsError(f"`allowCommercialUse` is {_shown(sent)}, not a list of texts", 'write ["Image", "RentCivit"]')
    for use in sorted(value):
        if use not in {*USES, "None"}:
            hint = nearest(use[:80], (*USES, "None")) or f"known: {', '.join(USES)}, None"
            raise PermissionsError(f"`allowCommercialUse` has the member `{use[:80]}`, which is not known", hint)
    if "None" in value and set(value) != {"None"}:
        raise PermissionsError(f"`allowCommercialUse` is {_shown(sent)}, which grants nothing and something", "leave `None` out, or write []")
    return frozenset(value) - {"None"}


def _shown(value: Any) -> str:
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    return f"`{value}`" if len(value) <= 80 else f"`{value[:80]}…`"
