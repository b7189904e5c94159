"""Owns what must travel with a release: NOTICE, and a file for every licence that binds it.

Has never heard of model cards or signatures. No licence's text is in this program: one is copied where the recipe has a file of it, and
otherwise its title, id and address are written down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdmerge_build.licences import in_words
from sdmerge_build.release.reading import Manifest, author_of, binding_layers, license_ids, license_of, page, release_of, rests_on, terms_of, title_of
from sdmerge_build.release.writing import address, file_name, one_line

__all__ = ["DUTIES", "LicenceText", "licence_texts", "notice"]

DUTIES = {
    "branding": "Names and endorsement",
    "notice": "Notices that the texts ask to be kept",
    "credit": "Credits",
    "change-notice": "Statements of change",
    "pass-on": "Restrictions of use, to be passed on with every copy",
    "licence-copy": "Licences of which a copy is to be given",
    "source-offer": "Source",
    "filter": "Filters",
}
"""Kinds of duties, in the order in which they are printed, and their headings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LicenceText:
    """A file of LICENSES/: a copy of `path`, which must have this sha256, or what is known of a text that is read elsewhere."""

    name: str
    id: str
    title: str
    url: str
    binds: tuple[str, ...]
    path: Path | None = None
    sha256: str = ""

    def text(self) -> str:
        """Write down what this licence is, whom it binds and where it is read."""
        lines = [
            self.title,
            "",
            f"Id:       {self.id or 'none'}",
            f"Text:     {self.url or 'no address is known'}",
            f"Binds:    {', '.join(self.binds)}",
            "",
            "The text itself is read at this address; it is not repeated here." if self.url else "Nobody has said where this text is read.",
        ]
        return "\n".join(lines) + "\n"


def licence_texts(manifest: Manifest, base: Path = Path()) -> list[LicenceText]:
    """List the files of LICENSES/, by name. `base` is the folder that a layer's `license_file` is seen from."""
    binds: dict[tuple[str, str], list[str]] = defaultdict(list)
    layers: dict[tuple[str, str], list[Manifest]] = defaultdict(list)
    for ancestor, layer in _texts_of(manifest):
        named = one_line(layer.get("id") or layer.get("title") or "")
        if named and (layer.get("id") or layer.get("url") or layer.get("license_sha256")):  # otherwise there is no text, only that nobody names one
            key = (named, str(layer.get("license_sha256") or ""))
            binds[key].append(one_line(ancestor))
            layers[key].append(layer)
    with_file = {named for named, digest in layers if digest}
    for key in [key for key in layers if not key[1] and key[0] in with_file]:  # another ancestor brought the text itself
        copy = next(other for other in layers if other[0] == key[0] and other[1])
        binds[copy] += binds.pop(key)
        layers.pop(key)
    names = _file_names(list(layers))
    texts = [_text(names[key], key[1], layers[key], tuple(sorted({*binds[key]})), base) for key in layers]
    return sorted(texts, key=lambda text: text.name)


def _texts_of(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield what binds the result through its ancestors, and the licences it comes under itself."""
    yield from binding_layers(manifest)
    known = {layer.get("id") for _, layer in binding_layers(manifest)}
    terms = terms_of(manifest)
    ids = license_ids(str(terms.get("license") or ""))
    for id_ in dict.fromkeys(ids + license_ids(license_of(manifest))):
        if id_ not in known:
            yield "the result", {"id": id_, "title": terms.get("license_title") if ids == [id_] else id_}


def _text(name: str, digest: str, layers: list[Manifest], binds: tuple[str, ...], base: Path) -> LicenceText:
    def first(field: str) -> Any:
        return next((layer[field] for layer in layers if layer.get(field)), "")

    where = str(first("license_file"))
    return LicenceText(
        name=name,
        id=one_line(first("id")),
        title=one_line(first("title") or first("id")),
        url=address(first("url")),
        binds=binds,
        path=base / where if where and digest else None,
        sha256=digest,
    )


def _file_names(keys: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Give each text a file name of its own, on file systems that ignore case too."""
    wanted: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in keys:
        wanted[file_name(key[0]).casefold()].append(key)
    names = {}
    for rivals in wanted.values():
        for key in rivals:
            tag = sha256("\0".join(key).encode("utf-8", "backslashreplace")).hexdigest()[:12]
            names[key] = f"{file_name(key[0])}-{tag}.txt" if len(rivals) > 1 else f"{file_name(key[0])}.txt"
    return names


def notice(manifest: Manifest) -> str:
    """Write NOTICE: what was changed, who is to be credited, what must be kept, shown and passed on."""
    title = f"{title_of(manifest)} {one_line(release_of(manifest).get('version') or '')}".strip()
    author = author_of(manifest)
    blocks = [
        [title, "=" * min(len(title), 78)] + ([f"by {author}"] if author else []),
        _changes(manifest),
        ["Models it was made of", *_parents(manifest)],
        *_duties(manifest),
        *_restrictions(manifest),
        *_licences(manifest),
        *_conflicts(manifest),
        [one_line(terms_of(manifest).get("advice") or "This is what the texts say, not legal advice.")],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _changes(manifest: Manifest) -> list[str]:
    """Say prominently that files were changed, as most licences ask."""
    lines = ["Changed files: the tensors of this model were computed from those of the models below, by sdbuild, as follows."]
    for step in manifest.get("step", []):
        how = one_line(step.get("formula") or f"{step['method']} of {', '.join(map(str, step.get('inputs', {}).values()))}")
        lines.append(f"- {one_line(step['name'])} = {how}")
    return lines


def _parents(manifest: Manifest) -> Iterator[str]:
    ancestors = terms_of(manifest).get("ancestor", [])
    pages = {source["name"]: page(source) for source in manifest.get("source", [])}
    for entry in ancestors or manifest.get("source", []):
        said = [one_line(entry.get("credit") or ""), address(entry.get("homepage") or "") or pages.get(entry["name"], "")]
        said += [one_line(entry.get("license_title") or entry.get("license") or "")]
        said += [f"claimed by {one_line(entry['claimed_by'])}, not verified"] if entry.get("claimed_by") else []
        said += [] if entry.get("contributes", True) else ["contributes no tensor"]
        yield f"- {one_line(entry['name'])}" + "".join(f"; {text}" for text in said if text)


def _duties(manifest: Manifest) -> Iterator[list[str]]:
    duties = terms_of(manifest).get("duty", [])
    kinds = [*DUTIES, *sorted({str(duty["kind"]) for duty in duties} - {*DUTIES})]
    for kind in kinds:
        lines = []
        for duty in (duty for duty in duties if duty["kind"] == kind):
            through = ", ".join(one_line(name) for name in duty.get("ancestors", []))
            where = address(duty.get("url") or "")
            where = "" if where in duty["what"] else where
            lines.append(f"- {one_line(duty['what'])}" + (f" ({through})" if through else "") + (f" {where}" if where else ""))
        if lines:
            yield [DUTIES.get(kind, one_line(kind)), *dict.fromkeys(lines)]


def _restrictions(manifest: Manifest) -> Iterator[list[str]]:
    restrictions = terms_of(manifest).get("concluded", {}).get("use_restrictions", [])
    if restrictions:
        yield ["Restrictions of use that bind everybody who receives this model", *(f"- {one_line(in_words(text))}" for text in restrictions)]
        clauses = [
            f"- {one_line(r.get('license', ''))}: {one_line(r.get('clause', ''))} {address(r.get('url') or '')}".rstrip()
            for r in rests_on(manifest, "use_restrictions")
        ]
        if clauses:
            yield ["They rest on", *dict.fromkeys(clauses)]


def _licences(manifest: Manifest) -> Iterator[list[str]]:
    lines = [
        f"- LICENSES/{text.name}: {text.title}, which binds {', '.join(text.binds)}" + (f" {text.url}" if text.url else "")
        for text in licence_texts(manifest)
    ]
    if lines:
        yield ["Licences", *lines]


def _conflicts(manifest: Manifest) -> Iterator[list[str]]:
    conflicts = terms_of(manifest).get("conflict", [])
    if conflicts:
        yield ["What the texts do not agree on", *(f"- {one_line(c['id'])} ({one_line(c['level'])}): {one_line(c['what'])}" for c in conflicts)]
