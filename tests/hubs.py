"""A stand-in on loopback for Civitai, Hugging Face, the CDN that both redirect to, and any https host: well behaved, unless told to fail."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import socket
import ssl
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from gzip import compress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import blake3
import pytest
import trustme

Data = bytes | Path

COMPUTED = '"…"'  # an ETag made from the content
BLOCK = 256 * 1024
FLIPPED = bytes(255 - n for n in range(256))
EVERYTHING = ["Image", "RentCivit", "Rent", "Sell", "SellMerge"]
ECOSYSTEMS = {"SD 1.4": "sd1", "SD 1.5": "sd1", "SD 2.1": "sd2", "SDXL 1.0": "sdxl", "Pony": "sdxl"}
PUBLISHED = "2023-03-19T10:11:12.131Z"
LOGIN = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body><form>Please log in to download this asset</form></body></html>\n"


# ---------------------------------------------------------------- bytes and digests


def size_of(data: Data) -> int:
    """Count bytes."""
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def blocks(data: Data, start: int = 0, length: int = sys.maxsize, block: int = BLOCK) -> Iterator[bytes | memoryview]:
    """Give a part of the data in pieces."""
    if isinstance(data, bytes):
        view = memoryview(data)[start : start + length]
        yield from (view[at : at + block] for at in range(0, len(view), block))
        return
    with data.open("rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(block, length))):
            length -= len(piece)
            yield piece


def sha256_of(data: Data, start: int = 0, length: int = sys.maxsize) -> str:
    """Digest a part of the data; files are read once."""
    if isinstance(data, Path):
        return _sha256_of_file(data, data.stat().st_mtime_ns, start, length)
    return hashlib.sha256(data[start : start + length]).hexdigest()


@lru_cache
def _sha256_of_file(path: Path, _changed: int, start: int, length: int) -> str:
    digest = hashlib.sha256()
    for piece in blocks(path, start, length, 1 << 20):
        digest.update(piece)
    return digest.hexdigest()


@lru_cache
def _cheap_hashes(data: Data, _changed: int) -> tuple[str, str]:
    quick, crc = blake3.blake3(), 0
    for piece in blocks(data):
        quick.update(piece)
        crc = zlib.crc32(piece, crc)
    return quick.hexdigest(), crc.to_bytes(4, "little").hex()  # Civitai writes its bytes in this order


def civitai_hashes(data: Data) -> dict[str, str]:
    """Compute the hashes that Civitai lists, upper-case; AutoV1 only from 2 MiB, AutoV3 only of safetensors files."""
    sha256, size = sha256_of(data), size_of(data)
    quick, crc = _cheap_hashes(data, data.stat().st_mtime_ns if isinstance(data, Path) else 0)
    hashes = {"SHA256": sha256, "AutoV2": sha256[:10], "BLAKE3": quick, "CRC32": crc}
    if size >= 2 << 20:
        hashes["AutoV1"] = sha256_of(data, 0x100000, 0x10000)[:8]
    head = b"".join(blocks(data, 0, 9))
    tensors = 8 + int.from_bytes(head[:8], "little")
    if head[8:] == b"{" and tensors <= size:
        hashes["AutoV3"] = sha256_of(data, tensors)[:12]
    return {name: value.upper() for name, value in hashes.items()}


def etag_of(data: Data) -> str:
    """Make a strong ETag, as S3 does: of small things from the bytes; of files one that changes with them."""
    if isinstance(data, bytes):
        return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
    facts = f"{data} {data.stat().st_size} {data.stat().st_mtime_ns}"
    return f'"{hashlib.md5(facts.encode(), usedforsecurity=False).hexdigest()}-7"'


def git_blob(data: Data) -> str:
    """Name a file as git does."""
    digest = hashlib.sha1(b"blob %d\0" % size_of(data), usedforsecurity=False)
    for piece in blocks(data):
        digest.update(piece)
    return digest.hexdigest()


# ---------------------------------------------------------------- questions and answers


@dataclass
class Request:
    """What was received, and how many bytes of body went out for it."""

    host: str  # "api", "cdn" or "tls"
    method: str
    path: str  # with the query
    headers: Mapping[str, str]  # names in any case; get() for what may be missing
    status: int | None = None  # of the answer; None where there was none
    sent_so_far: int = 0
    done: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def sent(self) -> int:
        """The bytes of body that were handed to the system, once the answer is over (or goes on for two more seconds)."""
        self.done.wait(2)
        return self.sent_so_far

    @property
    def query(self) -> dict[str, str]:
        """The query, decoded."""
        return dict(parse_qsl(urlsplit(self.path).query))

    @property
    def name(self) -> str:
        """The path without the query, decoded."""
        return unquote(urlsplit(self.path).path)

    @property
    def token(self) -> str | None:
        """The bearer token."""
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if kind.lower() == "bearer" else None


@dataclass
class Answer:
    """What will be sent: bytes `start` to `start + length` of the data. Faults change it."""

    status: int
    headers: dict[str, str]
    data: Data = b""
    start: int = 0
    length: int = 0
    raw: bytes | None = None  # instead of everything
    cut_at: int | None = None
    flipped: bool = False
    chunked: bool = False
    slow: tuple[float, float] | None = None
    close: bool = False

    def become(self, status: int, data: Data, **headers: str) -> None:
        """Be another answer altogether; underscores in names of headers are hyphens."""
        self.status, self.data, self.start, self.length = status, data, 0, size_of(data)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"Content-Length": str(self.length)}

    def window(self, start: int, length: int) -> None:
        """Be a part of the data, and say so."""
        self.status, self.start, self.length = 206, start, length
        self.headers |= {"Content-Length": str(length), "Content-Range": f"bytes {start}-{start + length - 1}/{size_of(self.data)}"}

    def pieces(self, length: int) -> Iterator[bytes | memoryview]:
        """Give the first bytes of the body, in pieces that suit the pace."""
        block = BLOCK if self.slow is None else max(1, min(BLOCK, int(self.slow[0] / 10)))
        pieces = blocks(self.data, self.start, length, block)
        return (bytes(piece).translate(FLIPPED) for piece in pieces) if self.flipped else pieces


def answered(status: int, data: Data, kind: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Make an answer of a whole thing."""
    length = size_of(data)
    return Answer(status, {"Content-Type": kind, **(headers or {}), "Content-Length": str(length)}, data, 0, length)


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    """Make an answer as APIs give it; underscores in names of headers are hyphens."""
    more = {name.replace("_", "-"): text for name, text in headers.items()}
    return answered(status, json.dumps(value).encode(), "application/json; charset=utf-8", more)


def xml_error(status: int, code: str, message: str) -> Answer:
    """Make the refusal that S3 and R2 give."""
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return answered(status, text.encode(), "application/xml")


def redirection(to: str, status: int, headers: Mapping[str, str] | None = None) -> Answer:
    """Send a client elsewhere."""
    return answered(status, b"Redirecting\n", "text/plain; charset=utf-8", {"Location": to, **(headers or {})})


@dataclass
class Asked:
    """The part of a request for data that a fault may change before it is answered."""

    content: Content
    span: str | None
    condition: str | None


class Content:
    """The bytes behind an address."""

    def __init__(self, data: Data, *, etag: str | None = COMPUTED, ranges: bool = True, headers: Mapping[str, str] | None = None) -> None:
        self.data, self.ranges, self.headers = data, ranges, dict(headers or {})
        self.etag = etag_of(data) if etag == COMPUTED else etag

    def replace(self, data: Data) -> None:
        """Be other bytes from now on, with another ETag."""
        self.data, self.etag = data, etag_of(data)

    def answer(self, asked: Asked) -> Answer:
        """Give the whole, or the part asked for."""
        offers = ({"ETag": self.etag} if self.etag else {}) | ({"Accept-Ranges": "bytes"} if self.ranges else {})
        answer = answered(200, self.data, "application/octet-stream", self.headers | offers)
        span = self.span(asked, answer.length)
        if span and span[0] >= span[1]:
            answer.become(416, b"", Content_Range=f"bytes */{answer.length}", **offers)
        elif span:
            answer.window(span[0], span[1] - span[0])
        return answer

    def span(self, asked: Asked, size: int) -> tuple[int, int] | None:
        """Say which part is asked for: none for the whole, an empty one for what is not there."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.span or "")
        changed = asked.condition is not None and (asked.condition != self.etag or asked.condition.startswith("W/"))
        if not self.ranges or not match or match[0] == "bytes=-" or changed:
            return None
        first, last = match.groups()
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(size, int(last) + 1) if last else size


# ---------------------------------------------------------------- faults


@dataclass(frozen=True, repr=False)
class Fault:
    """One way in which one answer goes wrong; `cut(9) + no_etag()` is two at once."""

    name: str
    after: Callable[[Answer], object] = lambda _answer: None
    before: Callable[[Asked], object] = lambda _asked: None
    closes: bool = True

    def __add__(self, other: Fault) -> Fault:
        return Fault(
            f"{self.name} + {other.name}",
            lambda answer: (self.after(answer), other.after(answer)),
            lambda asked: (self.before(asked), other.before(asked)),
        )

    def __repr__(self) -> str:
        return self.name


def well() -> Fault:
    """Behave well this time."""
    return Fault("well", closes=False)


def cut(at: int) -> Fault:
    """Let the connection die after this many bytes of body."""
    return Fault(f"cut({at})", lambda answer: setattr(answer, "cut_at", at))


def wrong_length(delta: int) -> Fault:
    """Announce more or fewer bytes than are sent."""
    return Fault(f"wrong_length({delta})", lambda answer: answer.headers.update({"Content-Length": str(max(0, answer.length + delta))}))


def ignore_range() -> Fault:
    """Answer 200 with the whole to a Range request."""
    return Fault("ignore_range", before=lambda asked: setattr(asked, "span", None))


def unsatisfiable() -> Fault:
    """Answer 416 to anything."""
    return Fault("unsatisfiable", lambda answer: answer.become(416, b"", Content_Range=f"bytes */{size_of(answer.data)}"))


def _from_elsewhere(answer: Answer) -> None:
    if answer.status in (200, 206):
        start = answer.start // 2 if answer.start else size_of(answer.data) // 2
        answer.window(start, answer.start + answer.length - start)


def wrong_range() -> Fault:
    """Answer 206 with a part that begins earlier (of the beginning: at the middle), and say so; even where no Range was asked."""
    return Fault("wrong_range", _from_elsewhere)


def _other_bytes(answer: Answer) -> None:
    if answer.status in (200, 206):
        answer.window(answer.start, answer.length)
        answer.flipped = True


def lying_range() -> Fault:
    """Answer 206 that claims to be what was asked for, with other bytes (every bit flipped); even where no Range was asked."""
    return Fault("lying_range", _other_bytes)


def new_etag(data: Data) -> Fault:
    """Let the file be other bytes with another ETag, from this request on."""
    return Fault("new_etag", before=lambda asked: asked.content.replace(data))


def _compressed(answer: Answer) -> None:
    data = compress(b"".join(answer.pieces(answer.length)), 1)
    answer.data, answer.start, answer.length = data, 0, len(data)
    answer.headers |= {"Content-Encoding": "gzip", "Content-Length": str(len(data))}


def gzip() -> Fault:
    """Compress the body, even though identity was asked for."""
    return Fault("gzip", _compressed)


def slow(bytes_per_second: float, total_seconds_cap: float) -> Fault:
    """Trickle for so long (0 bytes a second: say nothing after the headers), then send the rest at full speed."""
    return Fault(f"slow({bytes_per_second})", lambda answer: setattr(answer, "slow", (bytes_per_second, total_seconds_cap)))


def html() -> Fault:
    """Answer 200 with a login page."""
    return Fault("html", lambda answer: answer.become(200, LOGIN, Content_Type="text/html; charset=utf-8"))


def status(code: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Fault:
    """Answer with this status."""
    return Fault(f"status({code})", lambda answer: answer.become(code, body, **(headers or {})))


def drop() -> Fault:
    """Close the connection before any answer."""
    return Fault("drop", lambda answer: setattr(answer, "raw", b""))


def garbage() -> Fault:
    """Answer bytes that are no HTTP."""
    return Fault("garbage", lambda answer: setattr(answer, "raw", b"\x00\xff\x16\x03 this is no HTTP \r\n\r\n" * 9))


def chunked() -> Fault:
    """Use Transfer-Encoding: chunked, which announces no length."""

    def change(answer: Answer) -> None:
        answer.chunked = True
        answer.headers = {k: v for k, v in answer.headers.items() if k != "Content-Length"} | {"Transfer-Encoding": "chunked"}

    return Fault("chunked", change)


def no_etag() -> Fault:
    """Leave the ETag out."""
    return Fault("no_etag", lambda answer: answer.headers.pop("ETag", None))


def weak_etag() -> Fault:
    """Give a weak ETag."""
    return Fault("weak_etag", lambda answer: answer.headers.update({k: f"W/{v}" for k, v in answer.headers.items() if k == "ETag"}))


def empty() -> Fault:
    """Answer 200 with nothing."""
    return Fault("empty", lambda answer: answer.become(200, b"", Content_Type="application/octet-stream"))


# ---------------------------------------------------------------- Civitai


@dataclass(frozen=True)
class HubFile:
    """A file of a version on Civitai: what the API says of it, and (where they differ) what is served."""

    id: int
    name: str
    data: Data
    type: str = "Model"
    primary: bool = True
    metadata: Mapping[str, Any] = field(default_factory=lambda: {"format": "SafeTensor", "size": "pruned", "fp": "fp16"})
    hashes: Mapping[str, str] | None = None  # computed when first asked for
    served: Data | None = None

    def traits(self) -> dict[str, str]:
        """What can be asked of a download without naming the file."""
        return {"type": self.type} | {key: str(self.metadata[key]) for key in ("format", "size", "fp") if self.metadata.get(key)}


@dataclass
class Version:
    """A version on Civitai."""

    id: int
    model: int
    name: str
    base_model: str
    needs_token: str | None
    files: dict[int, tuple[HubFile, Content]]

    def chosen(self, query: Mapping[str, str]) -> tuple[HubFile, Content] | None:
        """Find the file that a download asks for, the primary one if several would do."""
        if "fileId" in query:
            return self.files.get(int(query["fileId"])) if query["fileId"].isdigit() else None
        wanted = {key: value.lower() for key, value in query.items() if key in ("type", "format", "size", "fp")}
        fitting = [pair for pair in self.files.values() if wanted.items() <= {k: v.lower() for k, v in pair[0].traits().items()}.items()]
        return max(fitting, key=lambda pair: pair[0].primary, default=None)


class Civitai:
    """Civitai's API, as far as a download needs it."""

    def __init__(self, hubs: Hubs) -> None:
        self.hubs = hubs
        self.models: dict[int, dict[str, Any]] = {}  # the model's own fields, as the API gives them
        self.versions: dict[int, Version] = {}

    def answer(self, request: Request) -> Answer:
        """Answer a request to Civitai."""
        match = re.fullmatch(r"/api/(v1/models|v1/model-versions/by-hash|v1/model-versions|download/models)/(\w+)", request.name)
        if not match:
            return json_answer({"error": "Not found"}, 404)
        place, name = match.groups()
        number = int(name) if name.isdecimal() else -1
        if place == "v1/models":
            return self.model(number)
        if place == "v1/model-versions":
            return self.version(self.versions.get(number), f"No version with id {name}")
        if place == "download/models":
            return self.download(number, request)
        return self.version(self.by_hash(name), "Model not found")

    def model(self, number: int) -> Answer:
        """Describe a model, the newest version first."""
        if number not in self.models:
            return json_answer({"error": f"No model with id {number}"}, 404)
        versions = sorted((v for v in self.versions.values() if v.model == number), key=lambda v: -v.id)
        return json_answer(self.models[number] | {"modelVersions": [self.described(version) for version in versions]})

    def version(self, version: Version | None, otherwise: str) -> Answer:
        """Describe a version; licences are the model's, and not said here."""
        if version is None:
            return json_answer({"error": otherwise}, 404)
        model = self.models[version.model]
        return json_answer({"modelId": version.model} | self.described(version) | {"model": {key: model[key] for key in ("name", "type", "nsfw")}})

    def by_hash(self, name: str) -> Version | None:
        """Find the version that has a file with this hash of any kind."""
        for version in self.versions.values():
            for file, _ in version.files.values():
                if name.upper() in (str(value).upper() for value in self.hashes(file).values()):
                    return version
        return None

    def hashes(self, file: HubFile) -> Mapping[str, str]:
        """Give a file's hashes."""
        return civitai_hashes(file.data) if file.hashes is None else file.hashes

    def described(self, version: Version) -> dict[str, Any]:
        """Say what both endpoints say of a version."""
        gone = "mode" in self.models[version.model]
        kind = self.models[version.model]["type"].lower()
        ecosystem = ECOSYSTEMS.get(version.base_model, version.base_model.lower().replace(" ", ""))
        said = {
            "id": version.id,
            "name": version.name,
            "baseModel": version.base_model,
            "baseModelType": "Standard",
            "air": f"urn:air:{ecosystem}:{kind}:civitai:{version.model}@{version.id}",
            "publishedAt": PUBLISHED,
            "availability": "Public",
            "usageControl": "Download",
            "files": [] if gone else [self.file(version, file) for file, _ in version.files.values()],
        }
        return said if gone else said | {"downloadUrl": self.address(version)}

    def file(self, version: Version, file: HubFile) -> dict[str, Any]:
        """Describe a file."""
        return {
            "id": file.id,
            "name": file.name,
            "type": file.type,
            "sizeKB": size_of(file.data) / 1024,
            "metadata": dict(file.metadata),
            "pickleScanResult": "Success",
            "virusScanResult": "Success",
            "hashes": dict(self.hashes(file)),
            "downloadUrl": self.address(version) + ("" if file.primary else "?" + urlencode(file.traits())),
            **({"primary": True} if file.primary else {}),
        }

    def address(self, version: Version) -> str:
        """Where a version's primary file is downloaded."""
        return f"{self.hubs.url}/api/download/models/{version.id}"

    def download(self, number: int, request: Request) -> Answer:
        """Send to the file on the CDN, or to the login page."""
        version = self.versions.get(number)
        if version and "mode" in self.models[version.model]:
            return json_answer({"error": "Model archived, not available for download"}, 410)
        chosen = version.chosen(request.query) if version else None
        if not version or not chosen:
            return json_answer({"error": "File not found"}, 404)
        if version.needs_token not in (None, request.token):
            return redirection(f"/login?returnUrl=/models/{version.model}&reason=download-auth", 302)
        file, content = chosen
        return redirection(self.hubs.presigned(f"/civitai-delivery/model/{version.id}/{file.id}/{file.name}", content), 307)


# ---------------------------------------------------------------- Hugging Face


@dataclass
class Pushed:
    """A file of a commit: what the hub says of it stays, whatever a fault makes of the content."""

    data: Data
    content: Content
    large: bool  # in LFS
    given: str | None = None

    @property
    def sha256(self) -> str:
        """The digest by which LFS knows it."""
        return self.given or sha256_of(self.data)

    @property
    def blob(self) -> str:
        """The name by which git knows it, or LFS's pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size_of(self.data)}\n" if self.large else ""
        return git_blob(pointer.encode() if self.large else self.data)


@dataclass
class Repo:
    """A repository on Hugging Face."""

    name: str
    needs_token: str | None
    gated: bool | str
    branches: dict[str, str] = field(default_factory=dict)
    cards: dict[str, dict[str, str]] = field(default_factory=dict)  # by commit
    files: dict[str, dict[str, Pushed]] = field(default_factory=dict)  # by commit

    def commit(self, revision: str) -> str | None:
        """Resolve a branch, or a commit's full name."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.files else None


class HuggingFace:
    """Hugging Face's API, as far as a download needs it."""

    def __init__(self, hubs: Hubs) -> None:
        self.hubs = hubs
        self.repos: dict[str, Repo] = {}

    def answer(self, request: Request) -> Answer | Content:
        """Answer a request to Hugging Face."""
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", request.name):
            return self.info(match[1], match[2] or "main", request)
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", request.name):
            return self.resolve(*match.groups(), request)
        return json_answer({"error": "Not found"}, 404)

    def refusal(self, status: int, code: str, message: str) -> Answer:
        """Make a refusal as the hub does."""
        return json_answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def hidden(self, repo: Repo | None, request: Request) -> Answer | None:
        """Refuse what is not there, or is private."""
        if repo is None:
            return self.refusal(404, "RepoNotFound", "Repository not found")
        if repo.needs_token and not repo.gated and request.token != repo.needs_token:
            return self.refusal(401, "RepoNotFound", "Invalid username or password.")
        return None

    def locked(self, repo: Repo, request: Request) -> Answer | None:
        """Refuse what is gated; of that, only the files are."""
        if not repo.gated or (repo.needs_token and request.token == repo.needs_token):
            return None
        if request.token is None:
            return self.refusal(401, "GatedRepo", f"Access to model {repo.name} is restricted. You must have access to it and be authenticated.")
        return self.refusal(403, "GatedRepo", f"Access to model {repo.name} is restricted and you are not in the authorized list.")

    def info(self, name: str, revision: str, request: Request) -> Answer:
        """Describe a repository at a revision."""
        repo = self.repos.get(name)
        if refused := self.hidden(repo, request):
            return refused
        commit = repo.commit(revision)
        if commit is None:
            return self.refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        card = repo.cards[commit]
        said = {
            "_id": hashlib.sha256(name.encode()).hexdigest()[:24],
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": bool(repo.needs_token and not repo.gated),
            "gated": repo.gated,
            "disabled": False,
            "tags": ["stable-diffusion", *([f"license:{card['license']}"] if "license" in card else []), "region:us"],
            "siblings": [self.sibling(name, file, request) for name, file in repo.files[commit].items()],
        }
        return json_answer(said | ({"cardData": card} if card else {}))

    def sibling(self, name: str, file: Pushed, request: Request) -> dict[str, Any]:
        """List a file; `?blobs=true` asks for more than its name."""
        said: dict[str, Any] = {"rfilename": name}
        if request.query.get("blobs", "").lower() in ("true", "1"):
            said |= {"size": size_of(file.data), "blobId": file.blob}
            said |= {"lfs": {"sha256": file.sha256, "size": size_of(file.data), "pointerSize": 135}} if file.large else {}
        return said

    def resolve(self, name: str, revision: str, file: str, request: Request) -> Answer | Content:
        """Serve a small file, or send to a large one on the CDN."""
        repo = self.repos.get(name)
        if refused := self.hidden(repo, request) or self.locked(repo, request):
            return refused
        commit = repo.commit(revision)
        if commit is None:
            return self.refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        found = repo.files[commit].get(file)
        if found is None:
            return self.refusal(404, "EntryNotFound", "Entry not found")
        if not found.large:
            return found.content
        said = {"X-Linked-Etag": f'"{found.sha256}"', "X-Linked-Size": str(size_of(found.data))}
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"} | said
        return redirection(self.hubs.presigned(f"/repos/{name}/{commit}/{file}", found.content), 302, headers)


# ---------------------------------------------------------------- the servers


class Handler(BaseHTTPRequestHandler):
    """Sends what the hubs answer, as badly as the answer says."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def reply(self) -> None:
        """Answer a request of any method."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.server.host, self.command, self.path, self.headers)
        self.server.hubs.requests.append(request)
        try:
            self.send(self.server.hubs.answer(request), request)
        finally:
            request.done.set()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = reply  # noqa: N815

    def send(self, answer: Answer, request: Request) -> None:
        """Send an answer."""
        self.close_connection |= answer.close
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            return
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.close:
            self.send_header("Connection", "close")
        self.end_headers()
        if request.method != "HEAD":
            self.body(answer, request)

    def body(self, answer: Answer, request: Request) -> None:
        """Send the body, or the beginning of it, and count."""
        length = answer.length if answer.cut_at is None else min(answer.cut_at, answer.length)
        plain = not (answer.flipped or answer.chunked or answer.slow or isinstance(self.connection, ssl.SSLSocket))
        if plain and isinstance(answer.data, Path):
            self.file(answer.data, answer.start, length, request)
            return
        until = time.monotonic() + answer.slow[1] if answer.slow else 0
        if answer.slow and answer.slow[0] <= 0:
            self.server.hubs.over.wait(answer.slow[1])
        for piece in answer.pieces(length):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if answer.chunked else piece)
            request.sent_so_far += len(piece)
            if answer.slow and (left := until - time.monotonic()) > 0:
                self.server.hubs.over.wait(min(left, len(piece) / answer.slow[0]))
        if answer.chunked and answer.cut_at is None:
            self.wfile.write(b"0\r\n\r\n")

    def file(self, path: Path, start: int, length: int, request: Request) -> None:
        """Send a part of a file without reading it here."""
        with path.open("rb") as file:
            try:
                if length:
                    self.connection.sendfile(file, start, length)
            finally:
                request.sent_so_far = max(0, file.tell() - start)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """One host on loopback; quiet, quick to stop, and not impressed by clients that vanish."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hubs: Hubs, host: str, tls: ssl.SSLContext | None = None) -> None:
        self.hubs, self.host, self.tls = hubs, host, tls
        self.live: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"hubs {host}", daemon=True)
        self.thread.start()

    def server_bind(self) -> None:
        """Bind without asking a name server who we are."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Take a connection; hands are shaken by the thread that serves it."""
        connection, address = super().get_request()
        if self.tls:
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self.live.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        super().shutdown_request(request)
        self.live.discard(request)

    def handle_error(self, _request: Any, _address: Any) -> None:
        """Keep what is not the client's doing for the end of the test."""
        error = sys.exception()
        if not isinstance(error, OSError) and not self.hubs.over.is_set():
            self.hubs.broken.append(error)

    def stop(self) -> None:
        """Stop listening, and hang up on everybody."""
        self.shutdown()
        self.thread.join()
        until = time.monotonic() + 2
        while self.live and time.monotonic() < until:
            for connection in list(self.live):
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
            time.sleep(0.001)
        self.server_close()


class Hubs:
    """The hubs: what they have, what they are asked, and how they fail."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []  # of GETs that are answered with a file, one for each
        self.api_faults: list[Fault] = []  # of answers in JSON
        self.redirect_faults: list[Fault] = []  # of Civitai's download endpoint, and of Hugging Face's resolve where it redirects or refuses
        self.broken: list[BaseException | None] = []  # mistakes of this module
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._civitai, self._huggingface = Civitai(self), HuggingFace(self)
        self._hops: dict[str, tuple[str, int]] = {}
        self._signed: dict[str, tuple[str, Content]] = {}
        self._expired: set[str] = set()
        self._files: dict[str, Content] = {}  # of the https host

    def __enter__(self) -> Self:
        self._resources = contextlib.ExitStack()
        self._api, self._cdn = self._started("api"), self._started("cdn")
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in (self._api, self._cdn))
        self.env = {"SDBUILD_CIVITAI_URL": self.url, "HF_ENDPOINT": self.url}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        self.over.set()
        self._resources.close()
        if kind is None and self.broken:
            raise AssertionError("tests/hubs.py is broken") from self.broken[0]

    def _started(self, host: str, tls: ssl.SSLContext | None = None) -> Server:
        server = Server(self, host, tls)
        self._resources.callback(server.stop)
        return server

    @cached_property
    def _tls(self) -> tuple[str, Path]:
        authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
        ca_file = Path(self._resources.enter_context(tempfile.TemporaryDirectory())) / "ca.pem"
        authority.cert_pem.write_to_path(str(ca_file))
        return f"https://localhost:{self._started('tls', context).server_port}", ca_file

    @property
    def tls_url(self) -> str:
        """The https host, started on first use."""
        return self._tls[0]

    @property
    def ca_file(self) -> Path:
        """The certificate that vouches for the https host, for SSL_CERT_FILE."""
        return self._tls[1]

    # what there is

    def civitai(
        self,
        model: int,
        version: int,
        *files: HubFile,
        name: str = "viewer-mix",
        version_name: str = "v1.7_v2",
        base_model: str = "SD 1.5",
        flags: Mapping[str, Any] | None = None,
        commercial: Any = EVERYTHING,
        needs_token: str | None = None,
        mode: str | None = None,
        type: str = "Checkpoint",  # noqa: A002
    ) -> None:
        """Publish a version of a model, or change both; a flag of `...` is left out of the answer."""
        told = {"allowNoCredit": True, "allowCommercialUse": commercial, "allowDerivatives": True, "allowDifferentLicense": True} | dict(flags or {})
        said = {"id": model, "name": name, "description": None, "type": type, "nsfw": False, "creator": {"username": "someone"}}
        said |= {key: value for key, value in told.items() if value is not ...}
        self._civitai.models[model] = said | ({"mode": mode} if mode else {})
        contents = {file.id: (file, self._downloadable(file.data if file.served is None else file.served, file.name)) for file in files}
        self._civitai.versions[version] = Version(version, model, version_name, base_model, needs_token, contents)

    def huggingface(
        self,
        repo: str,
        commit: str,
        files: Mapping[str, Data],
        *,
        branch: str = "main",
        license: str | None = "creativeml-openrail-m",  # noqa: A002
        license_name: str | None = None,
        license_link: str | None = None,
        needs_token: str | None = None,
        gated: bool | str = False,
        lfs: Collection[str] | None = None,
        sha256: Mapping[str, str] | None = None,
    ) -> None:
        """Push a commit to a repository; a token without a gate makes it private."""
        known = self._huggingface.repos.setdefault(repo, Repo(repo, needs_token, gated))
        known.needs_token, known.gated = needs_token, gated
        known.branches[branch] = commit
        card = {"license": license, "license_name": license_name, "license_link": license_link}
        known.cards[commit] = {key: value for key, value in card.items() if value is not None}
        known.files[commit] = {}
        for name, data in files.items():
            large = size_of(data) > 1000 if lfs is None else name in lfs
            content = self._downloadable(data, name) if large else Content(data, etag=f'"{git_blob(data)}"', headers={"X-Repo-Commit": commit})
            known.files[commit][name] = Pushed(data, content, large, (sha256 or {}).get(name))

    def https(self, path: str, data: Data, *, etag: str | None = COMPUTED, ranges: bool = True) -> str:
        """Put a file on the https host; returns its address."""
        self._files[unquote(path)] = Content(data, etag=etag, ranges=ranges)
        return self.tls_url + path

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        """Redirect a path of every host, with this query or with any, whatever else may be there."""
        self._hops[path] = (to, status)

    def expire(self) -> None:
        """Let all addresses on the CDN that were given out so far expire."""
        with self._lock:
            self._expired |= self._signed.keys()
            self._signed.clear()

    def presigned(self, path: str, content: Content) -> str:
        """Give out an address on the CDN."""
        signature = hashlib.sha256(f"{path} {next(self._numbers)}".encode()).hexdigest()
        self._signed[signature] = (path, content)
        return f"{self.cdn_url}{quote(path)}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=86400&X-Amz-Signature={signature}"

    def _downloadable(self, data: Data, name: str) -> Content:
        return Content(data, headers={"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name.rpartition('/')[2], safe='')}"})

    # what is answered

    def answer(self, request: Request) -> Answer:
        """Answer a request, with the fault that is due."""
        hop = self._hops.get(request.path) or self._hops.get(urlsplit(request.path).path)
        if hop:
            return redirection(*hop)
        if request.method not in ("GET", "HEAD"):
            return json_answer({"error": "Method not allowed"}, 405)
        found = {"api": self._of_api, "cdn": self._of_cdn, "tls": self._of_tls}[request.host](request)
        fault = self._due(found, request)
        if isinstance(found, Content):
            asked = Asked(found, request.headers.get("Range"), request.headers.get("If-Range"))
            fault.before(asked)
            found = found.answer(asked)
        fault.after(found)
        found.close = fault.closes
        return found

    def _due(self, found: Answer | Content, request: Request) -> Fault:
        if isinstance(found, Content):
            faults = self.faults if request.method == "GET" else []
        elif request.host != "api":
            faults = []
        elif request.name.startswith(("/api/v1/", "/api/models/")):
            faults = self.api_faults
        else:
            faults = self.redirect_faults if request.name.startswith("/api/download/") or "/resolve/" in request.name else []
        with self._lock:
            return faults.pop(0) if faults else well()

    def _of_api(self, request: Request) -> Answer | Content:
        if request.name == "/login":
            return answered(200, LOGIN, "text/html; charset=utf-8")
        civitai = request.name.startswith(("/api/v1/", "/api/download/"))
        return self._civitai.answer(request) if civitai else self._huggingface.answer(request)

    def _of_cdn(self, request: Request) -> Answer | Content:
        if request.headers.get("Authorization"):
            return xml_error(400, "InvalidRequest", "Missing x-amz-content-sha256")
        signature = request.query.get("X-Amz-Signature")
        if signature in self._expired:
            return xml_error(403, "AccessDenied", "Request has expired")
        path, content = self._signed.get(signature or "", (None, None))
        if content is None or path != request.name:
            return xml_error(403, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided.")
        return content

    def _of_tls(self, request: Request) -> Answer | Content:
        return self._files.get(request.name) or answered(404, b"not found\n", "text/plain")


@pytest.fixture
def hubs() -> Iterator[Hubs]:
    """Provide hubs that have nothing yet and behave well."""
    with Hubs() as running:
        yield running
