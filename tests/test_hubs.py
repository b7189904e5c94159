"""The stand-in for the hubs behaves as the hubs are documented to, and fails as its faults say."""

# ruff: noqa: F811  # the fixture `hubs` is imported, too
from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

import blake3
import pytest
from hubs import (
    HubFile,
    Hubs,
    chunked,
    cut,
    drop,
    empty,
    garbage,
    html,
    hubs,  # noqa: F401
    ignore_range,
    lying_range,
    new_etag,
    no_etag,
    slow,
    status,
    unsatisfiable,
    weak_etag,
    well,
    wrong_length,
    wrong_range,
)
from hubs import gzip as gzipped

DATA = bytes(n * n % 251 for n in range(5000))
COMMIT = "172a0d503c459df6e691926f929a3bad7eb31927"
CANARY = "canary"


@dataclass
class Got:
    """An answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    short: bool = False

    @property
    def json(self):
        """The body, understood."""
        return json.loads(self.body)


def get(url: str, *, method: str = "GET", context: ssl.SSLContext | None = None, **headers: str) -> Got:
    """Ask once, without following redirects."""
    parts = urlsplit(url)
    secure = {"context": context} if parts.scheme == "https" else {}
    connection = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[parts.scheme](parts.netloc, timeout=10, **secure)
    try:
        connection.request(
            method, f"{parts.path}?{parts.query}" if parts.query else parts.path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        answer = connection.getresponse()
        try:
            return Got(answer.status, answer.headers, answer.read())
        except http.client.IncompleteRead as error:
            return Got(answer.status, answer.headers, error.partial, short=True)
    finally:
        connection.close()


def on_the_cdn(running: Hubs, data=DATA, **more) -> str:
    """Publish a file on Civitai, and ask where it is."""
    running.civitai(7813, 25845, HubFile(19443, "viewer mix.safetensors", data, **more))
    return get(f"{running.url}/api/download/models/25845").headers["Location"]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_civitai_describes_models_and_versions(hubs):
    """Licences are the model's, files the version's; hashes are those that Civitai lists, upper-case."""
    hubs.civitai(
        7813,
        25845,
        HubFile(1, "a.safetensors", b"hello world"),
        commercial="{Image,RentCivit}",
        flags={"allowNoCredit": False, "allowDerivatives": ...},
    )
    model, version = get(f"{hubs.url}/api/v1/models/7813").json, get(f"{hubs.url}/api/v1/model-versions/25845").json

    assert (model["allowCommercialUse"], model["allowNoCredit"], "allowDerivatives" in model) == ("{Image,RentCivit}", False, False)
    assert model["modelVersions"][0]["files"] == version["files"]
    assert version["model"]["type"] == "Checkpoint"
    assert version["air"] == "urn:air:sd1:checkpoint:civitai:7813@25845"
    assert version["downloadUrl"] == f"{hubs.url}/api/download/models/25845"
    hashes = version["files"][0]["hashes"]
    assert hashes["SHA256"].startswith("B94D27B9")
    assert hashes["BLAKE3"].startswith("D74981EF")
    assert hashes["CRC32"] == "85114A0D"
    assert not {"AutoV1", "AutoV3"} & hashes.keys()
    assert get(f"{hubs.url}/api/v1/models/1").status == 404


def test_civitai_hashes_of_a_large_safetensors_file(hubs, tmp_path):
    """AutoV1 is of 64 KiB in the middle, AutoV3 of what follows the header; files are hashed as bytes are."""
    data = (2).to_bytes(8, "little") + b"{}" + bytes(range(256)) * 8192
    (tmp_path / "a").write_bytes(data)
    hubs.civitai(1, 2, HubFile(1, "a.safetensors", data))
    hubs.civitai(1, 3, HubFile(2, "a.safetensors", tmp_path / "a"))
    first, second = (version["files"][0]["hashes"] for version in get(f"{hubs.url}/api/v1/models/1").json["modelVersions"])

    assert first == second
    assert first["AutoV1"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8].upper()
    assert first["AutoV3"] == hashlib.sha256(data[10:]).hexdigest()[:12].upper()
    assert first["BLAKE3"] == blake3.blake3(data).hexdigest().upper()


def test_civitai_finds_versions_by_hash(hubs):
    """Any kind of hash in any case will do."""
    on_the_cdn(hubs)
    known = get(f"{hubs.url}/api/v1/model-versions/25845").json["files"][0]["hashes"]

    assert {get(f"{hubs.url}/api/v1/model-versions/by-hash/{value.lower()}").json["id"] for value in known.values()} == {25845}
    missing = get(f"{hubs.url}/api/v1/model-versions/by-hash/{'0' * 64}")
    assert (missing.status, missing.json) == (404, {"error": "Model not found"})


def test_civitai_downloads_the_file_that_was_asked_for(hubs):
    """The primary one, one by its traits, or one by its number; the query is in each file's address."""
    full = HubFile(2, "full.safetensors", b"full", primary=False, metadata={"format": "SafeTensor", "size": "full", "fp": "fp32"})
    hubs.civitai(1, 3, HubFile(1, "pruned.safetensors", b"pruned"), full)
    address = f"{hubs.url}/api/download/models/3"
    listed = [file["downloadUrl"] for file in get(f"{hubs.url}/api/v1/model-versions/3").json["files"]]

    for url, body in [(address, b"pruned"), (address + "?fileId=2", b"full"), (listed[0], b"pruned"), (listed[1], b"full")]:
        answer = get(url)
        assert (answer.status, get(answer.headers["Location"]).body) == (307, body)
    assert get(address + "?format=PickleTensor").status == get(address + "?fileId=9").status == 404


def test_civitai_sends_strangers_to_the_login_page(hubs):
    """Without the token, a download ends at a page of HTML with status 200."""
    hubs.civitai(1, 3, HubFile(1, "a.safetensors", DATA), needs_token=CANARY)
    address = f"{hubs.url}/api/download/models/3"

    answer = get(address, **bearer("wrong"))
    assert (answer.status, answer.headers["Location"].partition("?")[0]) == (302, "/login")
    page = get(hubs.url + answer.headers["Location"])
    assert (page.status, page.headers.get_content_type()) == (200, "text/html")
    assert get(get(address, **bearer(CANARY)).headers["Location"]).body == DATA


def test_what_civitai_archived_has_no_files(hubs):
    """The version is still described."""
    hubs.civitai(1, 3, HubFile(1, "a.safetensors", DATA), mode="Archived")

    assert get(f"{hubs.url}/api/v1/models/1").json["mode"] == "Archived"
    version = get(f"{hubs.url}/api/v1/model-versions/3").json
    assert (version["files"], "downloadUrl" in version) == ([], False)
    assert get(f"{hubs.url}/api/download/models/3").status == 410


def test_the_cdn_wants_its_own_signature_and_no_other_token(hubs):
    """Addresses are fresh each time, expire together, and a hub's token is refused as R2 does."""
    first, second = on_the_cdn(hubs), on_the_cdn(hubs)
    assert first != second
    assert get(first).body == get(second).body == DATA

    leaked = get(first, **bearer(CANARY))
    assert (leaked.status, b"Missing x-amz-content-sha256" in leaked.body) == (400, True)
    assert hubs.requests[-1].headers["authorization"] == f"Bearer {CANARY}"
    assert get(first.replace("19443", "19444")).status == 403

    hubs.expire()
    assert [get(url).status for url in (first, second)] == [403, 403]
    assert b"Request has expired" in get(first).body
    assert get(on_the_cdn(hubs)).status == 200


@pytest.mark.parametrize(
    ("asked", "status", "span", "body"),
    [
        ("bytes=100-199", 206, "bytes 100-199/5000", DATA[100:200]),
        ("bytes=4990-", 206, "bytes 4990-4999/5000", DATA[4990:]),
        ("bytes=4990-9999", 206, "bytes 4990-4999/5000", DATA[4990:]),
        ("bytes=-10", 206, "bytes 4990-4999/5000", DATA[4990:]),
        ("bytes=5000-", 416, "bytes */5000", b""),
        ("lines=1-2", 200, None, DATA),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_ranges(hubs, tmp_path, kind, asked, status, span, body):
    """Ranges are given as RFC 9110 says, of bytes and of files."""
    (tmp_path / "data").write_bytes(DATA)
    got = get(on_the_cdn(hubs, DATA if kind == "bytes" else tmp_path / "data"), Range=asked)

    assert (got.status, got.headers["Content-Range"], got.body, got.headers["Accept-Ranges"]) == (status, span, body, "bytes")
    assert hubs.requests[-1].sent == len(body)


def test_ranges_of_what_has_changed(hubs):
    """If-Range gives the rest only of the same file; a file has the ETag of its bytes."""
    url = on_the_cdn(hubs)
    head = get(url, method="HEAD")
    assert (head.body, head.headers["Content-Length"], hubs.requests[-1].sent) == (b"", "5000", 0)

    assert get(url, Range="bytes=9-", If_Range=head.headers["ETag"]).status == 206
    for other in ('"other"', "W/" + head.headers["ETag"]):
        assert get(url, Range="bytes=9-", If_Range=other).body == DATA
    hubs.faults = [new_etag(DATA[::-1])]
    changed = get(url, Range="bytes=9-", If_Range=head.headers["ETag"])
    assert (changed.status, changed.body, changed.headers["ETag"] != head.headers["ETag"]) == (200, DATA[::-1], True)
    assert get(url).body == DATA[::-1]


def test_hugging_face(hubs, tmp_path):
    """Large files are in LFS, known by their sha256 and on the CDN; small ones are served directly."""
    (tmp_path / "data").write_bytes(DATA)
    hubs.huggingface(
        "Fallere/MMK-E", COMMIT, {"sub dir/a b.safetensors": tmp_path / "data", "README.md": b"hello\n"}, license="other", license_name="faipl-1.0-sd"
    )
    info = get(f"{hubs.url}/api/models/Fallere/MMK-E/revision/main").json
    assert (info["id"], info["sha"], info["private"], info["gated"]) == ("Fallere/MMK-E", COMMIT, False, False)
    assert "license:other" in info["tags"]
    assert info["cardData"] == {"license": "other", "license_name": "faipl-1.0-sd"}
    assert info["siblings"] == [{"rfilename": "sub dir/a b.safetensors"}, {"rfilename": "README.md"}]
    assert get(f"{hubs.url}/api/models/Fallere/MMK-E").json == info

    for method in ("HEAD", "GET"):
        large = get(f"{hubs.url}/Fallere/MMK-E/resolve/{COMMIT}/sub%20dir/a%20b.safetensors", method=method)
        assert (large.status, large.headers["X-Repo-Commit"], large.headers["X-Linked-Size"]) == (302, COMMIT, "5000")
        assert large.headers["X-Linked-Etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'
    assert get(large.headers["Location"]).body == DATA
    small = get(f"{hubs.url}/Fallere/MMK-E/resolve/main/README.md")
    assert (small.status, small.body, small.headers["ETag"]) == (200, b"hello\n", '"ce013625030ba8dba906f756967f9e9ca394464a"')


def test_hugging_face_refuses(hubs):
    """Refusals carry a code; of what is gated, only the files are."""
    hubs.huggingface("a/open", COMMIT, {"a": DATA})
    hubs.huggingface("a/gated", COMMIT, {"a": DATA}, gated="manual", needs_token=CANARY)
    hubs.huggingface("a/private", COMMIT, {"a": DATA}, needs_token=CANARY)

    def said(path, **headers):
        got = get(hubs.url + path, **headers)
        return got.status, got.headers["X-Error-Code"]

    assert said("/a/open/resolve/main/b") == (404, "EntryNotFound")
    assert said("/a/open/resolve/v2/a") == said("/api/models/a/open/revision/v2") == (404, "RevisionNotFound")
    assert said("/a/none/resolve/main/a") == said("/api/models/a/none") == (404, "RepoNotFound")
    assert said("/api/models/a/gated") == (200, None)
    assert said("/a/gated/resolve/main/a") == (401, "GatedRepo")
    assert said("/a/gated/resolve/main/a", **bearer("wrong")) == (403, "GatedRepo")
    assert said("/api/models/a/private") == said("/a/private/resolve/main/a") == (401, "RepoNotFound")
    for repo in ("gated", "private"):
        assert said(f"/a/{repo}/resolve/main/a", **bearer(CANARY)) == (302, None)


def test_the_https_host(hubs, tmp_path):
    """It has a certificate of its own authority, serves files directly, and redirects anywhere."""
    (tmp_path / "data").write_bytes(DATA)
    url = hubs.https("/models/a.safetensors", tmp_path / "data")
    hubs.https("/plain", DATA, etag=None, ranges=False)
    hubs.redirect("/models/b", "file:///etc/passwd", 301)
    context = ssl.create_default_context(cafile=str(hubs.ca_file))

    assert get(url, context=context, Range="bytes=9-").body == DATA[9:]
    assert hubs.requests[-1].sent == len(DATA) - 9
    plain = get(f"{hubs.tls_url}/plain", context=context, Range="bytes=9-")
    assert (plain.status, plain.headers["ETag"], plain.headers["Accept-Ranges"]) == (200, None, None)
    hop = get(f"{hubs.tls_url}/models/b?x=1", context=context)
    assert (hop.status, hop.headers["Location"]) == (301, "file:///etc/passwd")
    assert get(f"{hubs.tls_url}/none", context=context).status == 404
    with pytest.raises(ssl.SSLCertVerificationError):
        get(url, context=ssl.create_default_context())
    hubs.faults = [cut(100)]
    assert get(url, context=context).body == DATA[:100]


REST = DATA[1000:]
OTHER = bytes(255 - n for n in REST)
FAULTS = [
    (well(), 206, REST, {"Content-Length": "4000"}),
    (cut(7), 206, REST[:7], {"Content-Length": "4000"}),
    (wrong_length(9), 206, REST, {"Content-Length": "4009"}),
    (wrong_length(-9), 206, REST[:-9], {"Content-Length": "3991"}),
    (ignore_range(), 200, DATA, {"Content-Range": None}),
    (unsatisfiable(), 416, b"", {"Content-Range": "bytes */5000"}),
    (wrong_range(), 206, DATA[500:], {"Content-Range": "bytes 500-4999/5000"}),
    (lying_range(), 206, OTHER, {"Content-Range": "bytes 1000-4999/5000"}),
    (new_etag(b"x" * 1001), 206, b"x", {"Content-Range": "bytes 1000-1000/1001"}),
    (html(), 200, re.compile(b"<!DOCTYPE html>"), {"Content-Type": "text/html; charset=utf-8"}),
    (status(429, {"Retry-After": "1"}, b"slow down"), 429, b"slow down", {"Retry-After": "1"}),
    (chunked(), 206, REST, {"Content-Length": None, "Transfer-Encoding": "chunked"}),
    (chunked() + cut(7), 206, REST[:7], {"Transfer-Encoding": "chunked"}),
    (no_etag(), 206, REST, {"ETag": None}),
    (weak_etag() + no_etag(), 206, REST, {"ETag": None}),
    (weak_etag(), 206, REST, {"ETag": f'W/"{hashlib.md5(DATA, usedforsecurity=False).hexdigest()}"'}),
    (empty(), 200, b"", {"Content-Length": "0"}),
    (slow(40_000, 5), 206, REST, {"Content-Length": "4000"}),
]


@pytest.mark.parametrize(("fault", "code", "body", "headers"), FAULTS, ids=lambda value: str(value) if hasattr(value, "after") else "")
def test_faults(hubs, fault, code, body, headers):
    """Each fault spoils one request for data, and the next is answered well."""
    url = on_the_cdn(hubs)
    hubs.faults = [fault]
    got = get(url, Range="bytes=1000-")

    assert got.status == code
    assert body.match(got.body) if isinstance(body, re.Pattern) else got.body == body
    assert {name: got.headers[name] for name in headers} == headers
    assert got.short is (fault.name in ("cut(7)", "wrong_length(9)", "chunked + cut(7)"))
    assert got.headers["Connection"] == (None if fault.name == "well" else "close")
    assert hubs.faults == []
    if fault.name != "new_etag":
        assert get(url).body == DATA


def test_faults_that_are_no_answers(hubs):
    """A connection is closed, or says what is no HTTP; what is compressed is whole when inflated."""
    url = on_the_cdn(hubs)
    hubs.faults = [drop(), garbage(), gzipped()]
    with pytest.raises(http.client.RemoteDisconnected):
        get(url)
    with pytest.raises(http.client.BadStatusLine):
        get(url)
    got = get(url, Accept_Encoding="identity")
    assert (got.headers["Content-Encoding"], gzip.decompress(got.body)) == ("gzip", DATA)
    assert [request.status for request in hubs.requests] == [307, None, None, 200]


def test_faults_wait_for_the_request_they_are_meant_for(hubs):
    """Those of the API, of redirects and of data do not disturb each other; one after the other is taken."""
    url = on_the_cdn(hubs)
    hubs.faults, hubs.api_faults, hubs.redirect_faults = [cut(7), status(503)], [status(500), garbage()], [status(429)]

    assert [get(f"{hubs.url}/api/download/models/25845").status for _ in range(2)] == [429, 307]
    assert get(f"{hubs.url}/api/v1/models/7813").status == 500
    with pytest.raises(http.client.BadStatusLine):
        get(f"{hubs.url}/api/v1/models/7813")
    assert get(url, method="HEAD").status == 200
    assert [(got.status, len(got.body)) for got in (get(url), get(url), get(url))] == [(200, 7), (503, 0), (200, 5000)]


def test_redirects_in_a_circle(hubs):
    """A client that follows redirects sees the loop, and each step is on record."""
    hubs.redirect("/a", "/b")
    hubs.redirect("/b", "/a", 307)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    with pytest.raises(urllib.error.HTTPError, match="infinite loop") as caught:
        opener.open(hubs.url + "/a")
    caught.value.close()
    assert [request.path for request in hubs.requests][:4] == ["/a", "/b", "/a", "/b"]


def test_clients_that_vanish_and_servers_that_stop(tmp_path):
    """Neither a client that hangs up in the middle nor one that is still waiting keeps the hubs from stopping at once."""
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 28)
    with Hubs() as running:
        address = urlsplit(on_the_cdn(running, tmp_path / "big", hashes={}))
        impatient, waiting = (http.client.HTTPConnection(address.netloc, timeout=10) for _ in range(2))
        impatient.request("GET", f"{address.path}?{address.query}")
        assert len(impatient.getresponse().read(100)) == 100
        impatient.close()
        assert running.requests[-1].sent < 1 << 28
        running.faults = [slow(0, 60)]
        waiting.request("GET", f"{address.path}?{address.query}")
        waiting.getresponse()
        before = time.monotonic()
    assert time.monotonic() - before < 1
    waiting.close()


def test_files_are_sent_fast(hubs, tmp_path):
    """Files need no memory and little time."""
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 26)
    parts = urlsplit(on_the_cdn(hubs, tmp_path / "big", hashes={}))
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    connection.request("GET", f"{parts.path}?{parts.query}")
    answer, buffer, count = connection.getresponse(), bytearray(1 << 20), 0
    while got := answer.readinto(buffer):
        count += got
    connection.close()

    assert count == hubs.requests[-1].sent == 1 << 26
