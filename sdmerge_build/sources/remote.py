"""Owns getting files from elsewhere: which scheme an address is of, what is offered there, its header, and the files themselves.

Has never heard of steps. Nothing here is imported before something must really be asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from sdmerge_build.errors import IntegrityError, Issue, RecipeError, SdbuildError, SourceError, SpaceError, UnreachableError
from sdmerge_build.files import Snapshot, as_space_error, boot_id
from sdmerge_build.formats.folder import Part, assembly_layout, choose_parts
from sdmerge_build.lock import Entry
from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources.civitai import Civitai, known_as
from sdmerge_build.sources.download import Arrived, Expected, WrongFileError, download
from sdmerge_build.sources.foreign import kind_of
from sdmerge_build.sources.hashing import Digests
from sdmerge_build.sources.https import Https
from sdmerge_build.sources.huggingface import HuggingFace
from sdmerge_build.sources.memo import Memo
from sdmerge_build.sources.offers import Offer, Scheme
from sdmerge_build.sources.search import Wanted
from sdmerge_build.sources.stock import Stock
from sdmerge_build.sources.trust import GoneError, Trust, Unsteady, WebError
from sdmerge_build.sources.uri import Address, CivitaiAddress, HttpsAddress, HuggingFaceAddress, parse_uri
from sdmerge_build.sources.web import Web
from sdmerge_build.tensorfile import Header, header_length, parse_header

__all__ = ["Hubs", "Order"]

SCHEMES: Mapping[type, Scheme] = {CivitaiAddress: Civitai(), HuggingFaceAddress: HuggingFace(), HttpsAddress: Https()}
MIRRORS = {Civitai.home: "SDBUILD_CIVITAI_URL", HuggingFace.home: "HF_ENDPOINT"}
TOKENS = {Civitai.home: "CIVITAI_TOKEN", HuggingFace.home: "HF_TOKEN"}
AT_ONCE = 4  # downloads
PEEK = 512 << 10  # bytes of the first request: more than the header of any SD 1.x checkpoint
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A file to be downloaded for a source; `where` is the line of the recipe that asks for it."""

    name: str
    where: str
    offer: Offer
    expected: Expected

    @property
    def size(self) -> int | None:
        """Return the file's size in bytes, as far as anybody says."""
        return self.expected.size if self.expected.size is not None else self.offer.size


class Hubs:
    """Everything beyond this machine, as the environment says where it is."""

    def __init__(self, *, allow_private: bool) -> None:
        self._bases = {home: _base(home, variable) for home, variable in MIRRORS.items()}
        trust = Trust({variable: self._bases[home] for home, variable in TOKENS.items()}, allow_private=allow_private)
        self._web = Web(trust)

    def offer(self, name: str, where: str, uri: str, source: SourceTable, *, with_terms: bool) -> Offer:
        """Find out what an address means today. Raises `SourceError`, and `IntegrityError` when it is another file than the recipe pins."""
        address: Address = parse_uri(uri)
        scheme = SCHEMES[type(address)]
        try:
            offer = scheme.offer(self._web, self._bases.get(scheme.home, ""), address, source, with_terms=with_terms)
        except WebError as error:
            raise _refusal(where, name, error) from None
        for field in ("sha256", "blake3"):
            said, pin = getattr(offer, field), getattr(source, field)
            if said and pin and said != pin.lower():
                what = f"source `{name}`: `{uri}` is another file: its {field} is {said} there, not {pin.lower()} as the recipe says"
                raise IntegrityError(Issue(where=where, what=what, hint=self.known_as(offer.sha256)))
        return offer

    @staticmethod
    def locked_offer(entry: Entry) -> Offer:
        """Take the offer that a lock wrote down; the hub need not be asked again."""
        return Offer(
            address=entry.address, filename=entry.filename, size=entry.size, sha256=entry.sha256 or None, blake3=entry.blake3, page=entry.page
        )

    @staticmethod
    def order(wanted: Wanted, offer: Offer, *, learns_all: bool) -> Order:
        """Order what is offered, to be what the source says."""
        table = wanted.table
        expected = Expected(size=table.size, sha256=_lower(table.sha256), blake3=_lower(table.blake3), sha256_wanted=learns_all)
        return Order(name=wanted.name, where=wanted.where, offer=offer, expected=expected)

    def peek(self, order: Order) -> tuple[Header | None, int | None]:
        """Read the header of a remote safetensors file by two ranged requests at most; None when it is no safetensors file.

        Returns the file's size in bytes as well, where the server says it.
        """
        if order.offer.parts:
            return self._peek_parts(order)
        url, shown = self._real(order.offer.address), f"source `{order.name}` at {order.offer.page or order.offer.address}"
        try:
            start, total = self._web.read(url, 0, PEEK)
            size = order.expected.size if order.expected.size is not None else total
            if order.expected.size is not None and total is not None and total != order.expected.size:
                what = f"source `{order.name}`: {order.offer.address} is another file: it has {total} bytes, not {order.expected.size}"
                raise IntegrityError(Issue(where=order.where, what=what))
            if size is None or not _has_header(start):
                return None, size
            length = header_length(start[:16], size, shown)
            raw = start[8 : 8 + length]
            if len(raw) < length:
                raw += self._web.read(url, 8 + len(raw), length - len(raw))[0]
        except WebError as error:
            raise self._failure(order, error) from None
        return parse_header(raw, size, shown), size

    def _peek_parts(self, order: Order) -> tuple[Header | None, int | None]:
        """Read the headers of every file of a sharded or diffusers checkpoint, and tell what they make together."""
        names = {name for name, _ in order.offer.parts}
        entry = order.offer.filename
        sizes = 0
        headers: dict[Part, Header] = {}
        offers = dict(order.offer.parts)
        for part in choose_parts(entry, names, lambda name: self._small(order, offers[name])):
            header, size = self.peek(replace(order, offer=offers[part.path], expected=Expected()))
            if header is None:
                raise IntegrityError(Issue(where=order.where, what=f"source `{order.name}`: {part.path} is no safetensors file"))
            headers[part] = header
            sizes += size or 0
        layout = assembly_layout(headers)
        tensors = {spec.name: spec for spec in layout.specs}
        return Header(tensors=tensors, metadata={}, data_start=len(layout.header), file_size=layout.size), sizes

    def _small(self, order: Order, offer: Offer) -> bytes:
        """Read a small file whole."""
        try:
            return self._web.whole(self._real(offer.address))
        except WebError as error:
            raise self._failure(order, error) from None

    def fetch(self, orders: Sequence[Order], stock: Stock, memo: Memo, watch: Callable[[int], None]) -> dict[str, Path | SdbuildError]:
        """Download several files at once into the stock; return where each is, or why it is not."""
        pool = ThreadPoolExecutor(AT_ONCE)
        results: dict[str, Future[Path]] = {}
        same: dict[tuple[str, Expected], Future[Path]] = {}  # what several sources ask for is downloaded once
        try:
            for order in orders:
                wish = order.offer.address, order.expected
                results[order.name] = same[wish] = same.get(wish) or pool.submit(self._fetch, order, stock, memo, watch)
            while not all(result.done() for result in results.values()):
                wait_for(results.values(), timeout=_POLL_SECONDS)  # in short waits, so that Ctrl-C is heard
        except BaseException:
            self._web.stopping.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            memo.save()
        return {name: _path_or_error(result) for name, result in results.items()}

    def known_as(self, digest: str | None) -> str:
        """Say whose file this is, by its sha256 or blake3, where a hub knows it."""
        return known_as(self._web, self._bases[Civitai.home], digest) if digest else ""

    def _fetch(self, order: Order, stock: Stock, memo: Memo, advanced: Callable[[int], None]) -> Path:
        if not order.offer.parts:
            return self._fetch_file(order, stock, memo, advanced)
        folder = stock.bundle(order.offer.address)
        for name, offer in order.offer.parts:
            part = replace(order, offer=offer, expected=Expected(sha256=offer.sha256))
            if not stock.holds(folder / name, offer.sha256):  # what an earlier download left counts only if it is what the hub says
                stock.give_out(self._fetch_file(part, stock, memo, advanced), folder / name)
        return folder / order.offer.filename

    def _fetch_file(self, order: Order, stock: Stock, memo: Memo, advanced: Callable[[int], None]) -> Path:
        expected = order.expected
        with stock.part(order.offer.address, expected.sha256, expected.blake3) as part:
            try:
                with as_space_error(part.path.parent, order.size or 0):
                    arrived = download(self._web, self._real(order.offer.address), part, expected, advanced)
            except SpaceError:
                if not order.size:
                    part.remove()  # nobody said that it ends
                raise
            except WrongFileError as error:
                raise self._wrong(order, error) from None
            except WebError as error:
                raise self._failure(order, error) from None
            path = stock.keep(part.path, arrived.blake3, _suffix(part.path, arrived))
        digests = Digests(tensors=arrived.tensors or "", sha256=arrived.sha256, blake3=arrived.blake3)
        memo.remember(path, digests, Snapshot.of(path), boot_id())
        return path

    def _wrong(self, order: Order, error: WrongFileError) -> IntegrityError:
        what = f"source `{order.name}`: what {order.offer.address} sends is another file: {error.what}"
        known = self.known_as(error.arrived.sha256 or error.arrived.blake3)
        advice = f"look at {order.offer.page or order.offer.address}; where another file is meant now, `sdbuild lock` notes it"
        return IntegrityError(Issue(where=order.where, what=what, hint=known or advice))

    def _failure(self, order: Order, error: WebError) -> SourceError:
        page = f"; its page is {order.offer.page}" if order.offer.page and order.offer.page != order.offer.address else ""
        return _refusal(order.where, order.name, error, page)

    def _real(self, address: str) -> str:
        """Turn a hub's own address into that of the mirror that stands for it, where one does."""
        for home, base in self._bases.items():
            if address.startswith(f"{home}/"):
                return base + address.removeprefix(home)
        return address


def _refusal(where: str, name: str, error: WebError, page: str = "") -> SourceError:
    """Say why a source cannot be had; whether anybody answered makes a difference to what can be done."""
    kind = UnreachableError if isinstance(error, Unsteady | GoneError) else SourceError
    return kind(Issue(where=where, what=f"source `{name}`: {error.what}", hint=(error.hint + page).removeprefix("; ")))


def _base(home: str, variable: str) -> str:
    """Return a hub's base address, or its mirror's, which the environment may name. Raises `RecipeError` for what is no address."""
    base = (os.environ.get(variable) or home).rstrip("/")
    try:
        parts = urlsplit(base)
        is_sound = (
            parts.scheme in {"https", "http"} and bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment or parts.username)
        )
    except ValueError:
        is_sound = False
    if not is_sound or not re.fullmatch(r"[!-~]+", base):
        raise RecipeError(Issue(where=variable, what="is not the address of a mirror", hint="write https://HOST, or unset it"))
    return base


def _lower(digest: str | None) -> str | None:
    return digest.lower() if digest else None


def _has_header(start: bytes) -> bool:
    return len(start) >= 16 and start[8:9] == b"{"


def _suffix(path: Path, arrived: Arrived) -> str:
    """Name a file after what it is, not after what its address ends with, so that it is found again."""
    return ".safetensors" if arrived.tensors else ".ckpt" if kind_of(path) == "pickle" else ".file"


def _path_or_error(result: Future[Path]) -> Path | SdbuildError:
    error = result.exception()
    if error is None or isinstance(error, SdbuildError):
        return error or result.result()
    raise error
