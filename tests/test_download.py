"""A download ends with the right file or with an error, whatever the server does meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import blake3
import httpx
import pytest
import safetensors.torch
import torch
from hubs import (
    Fault,
    HubFile,
    Hubs,
    chunked,
    cut,
    drop,
    empty,
    garbage,
    gzip,
    html,
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdmerge_build.digest import tensor_digest
from sdmerge_build.sources import body as body_module
from sdmerge_build.sources import web as web_module
from sdmerge_build.sources.download import Arrived, Expected, WrongFileError, download
from sdmerge_build.sources.stock import Part, Stock
from sdmerge_build.sources.trust import Trust, WebError
from sdmerge_build.sources.web import Web


def checkpoint(seed: int, extra: int = 0) -> bytes:
    """Make a real safetensors file, as the library writes it."""
    values = {"a.weight": torch.arange(150 + extra).add(seed).to(torch.float16), "b.weight": torch.full((5, 5), float(seed))}
    return safetensors.torch.save(values, {"format": "pt"})


DATA, OTHER, LONGER = checkpoint(1), checkpoint(2), checkpoint(3, 30)
SMALL = safetensors.torch.save({"a": torch.arange(40).to(torch.float16), "b": torch.arange(3.0)}, {"format": "pt"})


def tensors_of(data: bytes) -> str:
    """Digest the tensors that the safetensors library reads."""
    kinds = {torch.float16: "F16", torch.float32: "F32"}
    return tensor_digest(
        [
            (name, kinds[value.dtype], tuple(value.shape), blake3.blake3(value.numpy().tobytes()).hexdigest())
            for name, value in safetensors.torch.load(data).items()
        ]
    )


TENSORS = tensors_of(DATA)
PINS = {
    "sha256": Expected(sha256=hashlib.sha256(DATA).hexdigest()),
    "blake3": Expected(blake3=blake3.blake3(DATA).hexdigest()),
    "sha256 and size": Expected(sha256=hashlib.sha256(DATA).hexdigest(), size=len(DATA)),
    "nothing": Expected(sha256_wanted=True),
}
PINNED = [name for name in PINS if name != "nothing"]
PATH = "/api/download/models/2"


class Delivery:
    """One file on Civitai, and a download of it; waits are noted and not waited for, nor are flushes to disk."""

    def __init__(self, hubs: Hubs, web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hubs, self.web, self.folder = hubs, web, folder
        self.waited: list[float] = []
        monkeypatch.setattr(Web, "wait", lambda _web, seconds: self.waited.append(seconds))
        monkeypatch.setattr("sdmerge_build.sources.sink.CHUNK", 128)  # so that small files take several buffers
        monkeypatch.setattr("sdmerge_build.sources.sink.BUFFERS", 3)
        monkeypatch.setattr("sdmerge_build.sources.download.os.fsync", lambda _handle: None)
        self.part = Part(path=folder / "x.part")
        self.publish()

    def publish(self, data: bytes = DATA) -> None:
        """Put the file on the hub, anew."""
        self.hubs.civitai(1, 2, HubFile(id=3, name="x.safetensors", data=data))

    def fetch(self, *faults: Fault, expected: Expected = PINS["sha256"]) -> Arrived:
        """Download, and check whatever arrives against the libraries that others write."""
        self.hubs.faults[:] = faults
        self.hubs.requests.clear()
        self.counted: list[int] = []
        self.part.path.touch()
        arrived = download(self.web, self.hubs.url + PATH, self.part, expected, self.counted.append)
        self.data = self.part.path.read_bytes()
        assert arrived.size == len(self.data) == sum(self.counted)
        assert arrived.blake3 == blake3.blake3(self.data).hexdigest()
        assert arrived.sha256 in {None, hashlib.sha256(self.data).hexdigest()}
        return arrived

    def asked(self) -> list[tuple[str | None, str | None]]:
        """Say which parts the CDN was asked for, and on which condition."""
        return [(request.headers.get("Range"), request.headers.get("If-Range")) for request in self.hubs.requests if request.host == "cdn"]

    def clear(self) -> None:
        """Forget what is left."""
        self.part.remove()


@pytest.fixture(scope="module")
def station():
    """One hub and one client for all tests here: both take longer to start than a download takes."""
    with Hubs() as running:
        yield running, Web(Trust({"CIVITAI_TOKEN": running.url}, allow_private=True))


@pytest.fixture
def delivery(station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Delivery:
    """Provide a hub with a file, and a way to it."""
    return Delivery(*station, tmp_path, monkeypatch)


def headers(**changed: str | None) -> Fault:
    """Change headers of the answer; none takes one away."""

    def change(answer):
        for name, value in changed.items():
            answer.headers.pop(name.replace("_", "-"), None)
            if value is not None:
                answer.headers[name.replace("_", "-")] = value

    return Fault(f"headers({changed})", change)


# ---------------------------------------------------------------- one fault, two, three


@pytest.mark.parametrize("pin", PINS)
def test_a_file_arrives_with_all_its_digests(delivery, pin):
    """Nothing goes wrong: one answer, one file, and its digests are those that other libraries compute."""
    arrived = delivery.fetch(expected=PINS[pin])

    assert delivery.data == DATA
    assert arrived.tensors == TENSORS
    assert arrived.sha256 == (None if pin == "blake3" else hashlib.sha256(DATA).hexdigest())
    assert delivery.asked() == [(None, None)]


@pytest.mark.parametrize("validator", [well(), no_etag(), weak_etag()], ids=["etag", "no etag", "weak etag"])
@pytest.mark.parametrize("pin", ["sha256", "nothing"])
def test_the_connection_may_die_at_every_byte(delivery, pin, validator):
    """Every byte offset of the file is once the place where the connection dies; the result is always the file."""
    expected = replace(PINS[pin], sha256=hashlib.sha256(SMALL).hexdigest() if pin == "sha256" else None)
    delivery.publish(SMALL)
    for k in range(len(SMALL)):
        arrived = delivery.fetch(validator + cut(k), validator, expected=expected)
        assert (delivery.data, arrived.tensors) == (SMALL, tensors_of(SMALL)), k
        (_, _), (span, condition) = delivery.asked()
        assert span == (f"bytes={k}-" if k and (pin == "sha256" or validator.name == "well") else None), k
        assert bool(condition) == (validator.name == "well" and bool(k)), k
        delivery.clear()


HEALED = [
    well(),
    cut(0),
    cut(300),
    chunked(),
    chunked() + cut(100),
    gzip(),
    gzip() + cut(100),
    wrong_length(7),
    wrong_range(),
    drop(),
    garbage(),
    empty(),
    empty() + chunked(),
    no_etag(),
    weak_etag(),
    slow(5_000, 0.1),
    headers(ETag='"\xe9"') + cut(300),
    headers(ETag="unquoted") + cut(300),
    *(status(code) for code in (400, 401, 403, 404, 408, 410, 425, 429, 500, 502, 503, 504)),
]


@pytest.mark.parametrize("pin", ["sha256", "blake3", "nothing"])
@pytest.mark.parametrize("fault", dict.fromkeys(HEALED), ids=str)
def test_one_fault_is_healed(delivery, fault, pin):
    """Whatever goes wrong once, at the first answer or while a cut download is resumed, the file arrives."""
    for before in ((), (cut(200),), (no_etag() + cut(200),)):
        arrived = delivery.fetch(*before, fault, expected=PINS[pin])
        assert delivery.data == DATA
        assert arrived.tensors in {TENSORS, None}
        delivery.clear()


@pytest.mark.parametrize("pin", PINS)
@pytest.mark.parametrize("fault", [ignore_range(), unsatisfiable(), ignore_range() + cut(100), ignore_range() + gzip()], ids=str)
def test_a_fault_while_resuming_is_healed(delivery, fault, pin):
    """A range that is ignored, or refused, begins the file anew where it must."""
    delivery.fetch(cut(400), fault, expected=PINS[pin])

    assert delivery.data == DATA


@pytest.mark.parametrize("pin", PINNED)
@pytest.mark.parametrize("faults", [[cut(300), lying_range()], [wrong_length(-5)], [cut(100), wrong_length(-5)]], ids=str)
def test_what_only_a_digest_can_tell_is_healed_where_one_is_pinned(delivery, faults, pin):
    """Bytes that are not what they claim to be, and lengths that are too short, are noticed by the digest and fetched again."""
    delivery.fetch(*faults, expected=PINS[pin])

    assert delivery.data == DATA


def test_a_file_cut_short_by_its_announced_length_is_no_checkpoint(delivery):
    """Where nothing is pinned, a length that is announced too short cannot be noticed; what arrives has no tensors' digest."""
    arrived = delivery.fetch(wrong_length(-5), expected=PINS["nothing"])

    assert (delivery.data, arrived.tensors) == (DATA[:-5], None)


@pytest.mark.parametrize("first", [cut(100), chunked() + cut(150), no_etag() + cut(200), drop(), status(429)], ids=str)
@pytest.mark.parametrize("second", [ignore_range() + cut(50), cut(64), gzip(), wrong_range(), status(403), weak_etag() + cut(70)], ids=str)
@pytest.mark.parametrize("pin", ["sha256", "nothing"])
def test_three_faults_in_a_row_are_healed(delivery, first, second, pin):
    """Faults may follow one another: what has arrived is kept where that is safe, and the file is right."""
    delivery.fetch(first, second, cut(33), expected=PINS[pin])

    assert delivery.data == DATA


FAULTS = st.one_of(
    st.integers(0, len(DATA) + 5).map(cut),
    st.integers(0, len(DATA)).map(lambda k: no_etag() + cut(k)),
    st.integers(0, len(DATA)).map(lambda k: weak_etag() + cut(k)),
    st.integers(0, len(DATA)).map(lambda k: ignore_range() + cut(k)),
    st.integers(0, len(DATA)).map(lambda k: chunked() + cut(k)),
    st.integers(0, len(DATA)).map(lambda k: gzip() + cut(k)),
    st.integers(1, 50).map(wrong_length),
    st.sampled_from([new_etag(OTHER), new_etag(LONGER), new_etag(LONGER) + no_etag(), new_etag(OTHER) + cut(99)]),
    st.sampled_from([unsatisfiable(), wrong_range(), gzip(), chunked(), drop(), garbage(), empty(), html(), status(503), status(403)]),
)


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, max_size=7), pin=st.sampled_from(sorted(PINS)), lies=st.booleans())
def test_any_faults_end_in_the_right_file_or_an_error(delivery, faults, pin, lies):
    """
    Whatever the server does, the file is right or there is an error; without a pin, it is one of the files that the server had, whole.
    """
    delivery.clear()
    delivery.publish()
    try:
        arrived = delivery.fetch(*faults, *[lying_range()] * (lies and pin != "nothing"), expected=PINS[pin])
    except WebError:
        return

    assert delivery.data in ({DATA} if pin != "nothing" else {DATA, OTHER, LONGER})
    assert arrived.tensors in {TENSORS, None} or delivery.data != DATA


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(st.lists(FAULTS, min_size=7, max_size=9), max_size=4), pin=st.sampled_from(sorted(PINS)))
def test_any_number_of_runs_that_fail_end_in_the_right_file(delivery, runs, pin):
    """
    What one run leaves, the next one takes up; when the server behaves at last, the file is one of those it had, whole.
    """
    delivery.clear()
    delivery.publish()
    for faults in runs:
        try:
            delivery.fetch(*faults, expected=PINS[pin])
        except WebError:
            continue
        assert delivery.data in {DATA, OTHER, LONGER}
    delivery.publish()
    delivery.fetch(expected=PINS[pin])

    assert delivery.data == DATA or (pin == "nothing" and delivery.data in {OTHER, LONGER})


def test_a_file_that_changes_on_its_way_is_never_mixed(delivery):
    """Where the file becomes another one half-way, the new one arrives whole; pinned, it is refused with both digests."""
    delivery.fetch(cut(300), new_etag(OTHER), expected=PINS["nothing"])
    assert delivery.data == OTHER
    delivery.clear()
    delivery.publish()
    with pytest.raises(WrongFileError) as caught:
        delivery.fetch(cut(300), new_etag(OTHER))

    wanted, actual = (hashlib.sha256(data).hexdigest() for data in (DATA, OTHER))
    assert caught.value.what == f"its sha256 is {actual}, not {wanted}"
    assert list(delivery.folder.iterdir()) == []


def test_another_size_half_way_begins_anew_even_where_no_validator_says_so(delivery):
    """A server that ignores If-Range and gives no ETag is found out by the size of the whole."""

    def unconditional(asked):
        asked.content.replace(LONGER)
        asked.condition = None

    delivery.fetch(cut(300), *[Fault("replaced", before=unconditional) + no_etag()] * 50, expected=PINS["nothing"])

    assert delivery.data == LONGER
    assert delivery.asked() == [(None, None), ("bytes=300-", delivery.asked()[1][1]), (None, None)]


def test_a_server_that_ignores_the_condition_is_found_out_by_the_new_etag(delivery):
    """A part of another file that comes with another ETag begins the file anew."""

    def unconditional(asked):
        asked.content.replace(OTHER)
        asked.condition = None

    delivery.fetch(cut(300), Fault("replaced", before=unconditional), expected=PINS["nothing"])

    assert delivery.data == OTHER


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("pin", PINS)
def test_a_login_page_is_not_the_file(delivery, pin):
    """A web page instead of the file is refused at once, and what has arrived before is kept."""
    with pytest.raises(WebError, match="answers with a web page instead of the file"):
        delivery.fetch(cut(300), html(), expected=PINS[pin])

    assert delivery.part.path.read_bytes() == DATA[:300]


def test_a_packing_that_was_not_asked_for_and_cannot_be_undone_is_refused(delivery):
    """Brotli cannot be undone here, so that it must not pass for the file."""
    with pytest.raises(WebError, match=r"packed in a way that was not asked for \(br\)"):
        delivery.fetch(headers(Content_Encoding="br"), expected=PINS["nothing"])


def unbounded() -> Fault:
    """Say nowhere how long the body is; its end is that of the connection."""
    return headers(Content_Length=None)


def test_a_body_whose_end_cannot_be_told_from_a_lost_connection_needs_a_pinned_size(delivery):
    """Without a length and without chunks, a lost connection looks like the end; only a pinned size tells."""
    with pytest.raises(WebError, match="does not say where the file ends"):
        delivery.fetch(unbounded() + cut(300), expected=PINS["nothing"])
    delivery.clear()
    delivery.fetch(unbounded() + cut(300), unbounded() + cut(200), expected=PINS["sha256 and size"])

    assert delivery.data == DATA


@pytest.mark.parametrize("data", [OTHER, LONGER], ids=["same size", "longer"])
@pytest.mark.parametrize("pin", PINNED)
def test_another_file_is_refused_and_leaves_nothing(delivery, pin, data):
    """A whole file that is not the pinned one is downloaded once, refused with both digests, and removed."""
    delivery.publish(data)
    with pytest.raises(WebError) as caught:
        delivery.fetch(expected=PINS[pin])

    if pin == "sha256 and size" and data is LONGER:
        assert caught.value.what == f"the server offers a file of {len(LONGER)} bytes, not of {len(DATA)}"
        assert sum(request.sent for request in delivery.hubs.requests if request.host == "cdn" and request.status == 200) <= 2 * len(LONGER)
        return
    name = pin.partition(" ")[0]
    assert f"its {name} is {digest_named(name, data)}, not {getattr(PINS[pin], name)}" in caught.value.what
    assert [request.status for request in delivery.hubs.requests if request.host == "cdn"] == [200, 206]  # the second for one byte
    assert list(delivery.folder.iterdir()) == []


def digest_named(name: str, data: bytes) -> str:
    """Compute a digest of a name."""
    return {"sha256": hashlib.sha256, "blake3": blake3.blake3}[name](data).hexdigest()


# ---------------------------------------------------------------- servers that get nowhere


@pytest.mark.parametrize("pin", PINS)
@pytest.mark.parametrize(
    "faults",
    [
        [ignore_range() + cut(300)],
        [unsatisfiable()],
        [cut(300), unsatisfiable()],
        [wrong_range()],
        [cut(50), wrong_range()],
        [wrong_length(7)],
        [drop()],
        [garbage()],
        [empty()],
        [status(429, {"Retry-After": "0"})],
        [status(429, {"Retry-After": "999999999"})],
        [status(503)],
        [status(403)],
        [html()],
        [gzip() + cut(50)],
        [chunked() + ignore_range() + cut(300)],
        [cut(300), new_etag(OTHER) + cut(100), new_etag(DATA) + cut(100)],
    ],
    ids=str,
)
def test_a_server_that_gets_nowhere_is_given_up(delivery, faults, pin):
    """The same faults for ever end in an error after a handful of tries, whatever is pinned."""
    with pytest.raises(WebError):
        delivery.fetch(*faults * 100, expected=PINS[pin])

    assert len(delivery.asked()) < 20
    assert all(seconds <= web_module.LONGEST_DELAY for seconds in delivery.waited)


@pytest.mark.parametrize("pin", PINNED)
@pytest.mark.parametrize("faults", [[cut(300), lying_range()], [cut(300), new_etag(OTHER) + cut(200), well()]], ids=str)
def test_wrong_bytes_in_pieces_for_ever_are_given_up(delivery, faults, pin):
    """A server that always sends another file, and never in one piece, is asked for the file twice and no more."""
    with pytest.raises(WebError):
        delivery.fetch(*faults * 100, expected=PINS[pin])

    assert len(delivery.asked()) < 20


def test_sizes_that_keep_changing_are_given_up(delivery):
    """A server that offers another size each time is given up, and what was pinned is never replaced."""
    with pytest.raises(WebError):
        delivery.fetch(*(new_etag(DATA + bytes(n)) for n in range(1, 100)), expected=PINS["sha256 and size"])

    assert len(delivery.asked()) < 10


def test_a_trickle_is_given_up(delivery, monkeypatch):
    """A server that sends almost nothing for long is taken for dead; what it sent is kept."""
    monkeypatch.setattr(body_module, "STALLED_SECONDS", 0.01)
    with pytest.raises(WebError, match="has all but stopped sending"):
        delivery.fetch(*[slow(50, 60)] * 50)

    left = delivery.part.path.read_bytes()
    assert left
    assert left == DATA[: len(left)]


def test_a_server_that_falls_silent_is_given_up(delivery, monkeypatch):
    """A server that says nothing after its headers is taken for dead, and asked again."""
    monkeypatch.setattr(delivery.web._client("http://127.0.0.1:1/"), "timeout", httpx.Timeout(0.1))
    with pytest.raises(WebError, match=r"the connection to 127\.0\.0\.1 was lost"):
        delivery.fetch(*[slow(0, 60)] * 50)

    delivery.fetch(slow(0, 60))
    assert delivery.data == DATA


def test_progress_makes_up_for_failures(delivery, monkeypatch):
    """A connection that dies often is no reason to give up while the file grows."""
    monkeypatch.setattr("sdmerge_build.sources.download.PROGRESS", 10)
    delivery.fetch(*[cut(10)] * 30)

    assert delivery.data == DATA
    assert len(delivery.asked()) == 31


def test_what_is_fetched_again_and_again_is_no_progress(delivery, monkeypatch):
    """A server that always sends the same beginning gets nowhere, however much it sends."""
    monkeypatch.setattr("sdmerge_build.sources.download.PROGRESS", 10)
    with pytest.raises(WebError):
        delivery.fetch(*[ignore_range() + cut(300)] * 100)

    assert len(delivery.asked()) < 10


def test_waits_grow_and_heed_the_server(delivery):
    """The first failure is tried again at once, later ones after growing waits, or after as long as the server says."""
    delivery.fetch(*[drop()] * 5)
    assert delivery.waited == sorted(delivery.waited)
    assert len(delivery.waited) == 4
    assert all(later == 2 * sooner for sooner, later in pairwise(delivery.waited))
    delivery.waited.clear()
    delivery.clear()
    delivery.fetch(status(429, {"Retry-After": "7"}), status(503, {"Retry-After": "Wed, 21 Oct 2065 07:28:00 GMT"}))

    assert delivery.waited[0] == 7
    assert delivery.waited[1] < 60


def test_stopping_ends_a_download_and_keeps_what_arrived(delivery):
    """When everything is being stopped, a download ends at its next bytes, and can be resumed."""
    delivery.web.stopping.set()
    with pytest.raises(WebError, match="stopped"):
        delivery.fetch()
    delivery.web.stopping.clear()
    delivery.fetch()

    assert delivery.data == DATA


def test_nobody_listens(delivery):
    """A port where nobody listens is an error that names the host, soon."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    delivery.part.path.touch()
    with pytest.raises(WebError, match=r"no answer from 127\.0\.0\.1"):
        download(delivery.web, f"http://127.0.0.1:{port}/x", delivery.part, PINS["sha256"], lambda _n: None)


# ---------------------------------------------------------------- resuming what an earlier process left


def interrupted(delivery: Delivery, at: int, expected: Expected) -> None:
    """Leave a part of the file behind, as a process does that gives up."""
    with pytest.raises(WebError):
        delivery.fetch(cut(at), html(), expected=expected)
    assert delivery.part.path.read_bytes() == DATA[:at]


@pytest.mark.parametrize("pin", PINS)
def test_a_part_is_resumed_with_its_validator(delivery, pin):
    """What an earlier process left is not fetched again, and the tensors are digested as if it had come in one piece."""
    interrupted(delivery, 300, PINS[pin])
    arrived = delivery.fetch(expected=PINS[pin])

    assert (delivery.data, arrived.tensors) == (DATA, TENSORS)
    assert [request.sent for request in delivery.hubs.requests if request.host == "cdn"] == [len(DATA) - 300]
    assert delivery.asked()[0][1].startswith('"')


@pytest.mark.parametrize("pin", PINS)
def test_a_part_of_a_file_that_has_changed_is_not_resumed(delivery, pin):
    """Where the file is another one meanwhile, it begins anew, and pinned it is refused."""
    interrupted(delivery, 300, PINS[pin])
    delivery.publish(OTHER)
    if pin in PINNED:
        with pytest.raises(WrongFileError):
            delivery.fetch(expected=PINS[pin])
        return
    delivery.fetch(expected=PINS[pin])

    assert delivery.data == OTHER


@pytest.mark.parametrize("pin", PINS)
def test_an_expired_link_is_resolved_anew(delivery, pin):
    """A link that expires while the file is fetched, or between two processes, is asked for again, and the file resumed."""
    interrupted(delivery, 300, PINS[pin])
    delivery.hubs.expire()
    expire = Fault("expire", before=lambda _asked: delivery.hubs.expire())
    delivery.fetch(expire + cut(100), status(403), expected=PINS[pin])

    assert delivery.data == DATA
    assert [request.host for request in delivery.hubs.requests] == ["api", "cdn"] * 3
    assert delivery.asked()[-1][0] == "bytes=400-"


@pytest.mark.parametrize("pin", PINS)
@pytest.mark.parametrize(
    "left",
    [b"", b"\0", DATA[:-1], DATA, DATA + b"\0", OTHER, OTHER[:300], bytes(len(DATA) - 1), bytes(3 * len(DATA)), DATA[:200] + bytes(100)],
    ids=["nothing", "a zero", "all but one", "all", "more", "another", "of another", "zeros", "many zeros", "a damaged end"],
)
def test_whatever_lies_in_the_part_the_result_is_right(delivery, left, pin):
    """A part that holds anything at all, of a process that noted nothing of it, never spoils the file."""
    delivery.part.path.write_bytes(left)
    delivery.fetch(expected=PINS[pin])

    assert delivery.data == DATA


@pytest.mark.parametrize("left", [DATA, DATA[:-1], OTHER[:100], bytes(3 * len(DATA))], ids=["all", "all but one", "of another", "too long"])
@pytest.mark.parametrize("pin", PINNED)
def test_a_part_that_is_not_what_was_noted_of_it_never_spoils_a_pinned_file(delivery, left, pin):
    """The note may speak of the right file while the bytes are others: the digest decides, and the file is fetched again."""
    interrupted(delivery, 300, PINS[pin])
    delivery.part.path.write_bytes(left)
    delivery.fetch(expected=PINS[pin])

    assert delivery.data == DATA


def test_a_whole_part_that_nobody_vouches_for_is_fetched_again(delivery):
    """Without a pin, a whole file that an earlier process left may be an old one."""
    interrupted(delivery, 300, PINS["nothing"])
    delivery.part.path.write_bytes(DATA)
    delivery.publish(OTHER)
    delivery.fetch(expected=PINS["nothing"])

    assert delivery.data == OTHER


NOTES = [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"etag": 7}', b'{"etag": "\\u00e9", "size": true}', b'{"etag": "\\n", "size": -1}', b"x" * 20_000]


@pytest.mark.parametrize("note", [*NOTES, b'{"etag": "\\"x\\"", "size": 3}', b'{"etag": "\\"x\\"", "size": 9999999999999999999999}'])
@pytest.mark.parametrize("pin", PINS)
def test_a_note_that_cannot_be_read_is_no_note(delivery, note, pin):
    """Whatever lies where a part's note should be, the file arrives."""
    interrupted(delivery, 300, PINS[pin])
    delivery.part.path.with_suffix(".json").write_bytes(note)
    delivery.fetch(expected=PINS[pin])

    assert delivery.data == DATA


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    note=st.fixed_dictionaries({}, optional={name: st.none() | st.booleans() | st.integers() | st.text(max_size=9) for name in ("etag", "size")}),
    have=st.integers(0, len(DATA) + 9),
)
def test_any_note_and_any_length_end_in_the_right_file(delivery, note, have):
    """Any note beside any beginning of the file ends in the file."""
    delivery.part.path.write_bytes((DATA + bytes(9))[:have])
    delivery.part.path.with_suffix(".json").write_text(json.dumps(note))
    delivery.fetch()

    assert delivery.data == DATA


# ---------------------------------------------------------------- whose part it is

KEY = ("https://example.org/x", "ab" * 32, None)
DEAD = "import os, sys; sys.path.insert(0, sys.argv[1]); from sdmerge_build.files import owner_tag; print(owner_tag())"


def dead_tag() -> str:
    """Get the tag of a process that is gone."""
    root = str(Path(__file__).parent.parent)
    return subprocess.run([sys.executable, "-c", DEAD, root], capture_output=True, text=True, check=True).stdout.strip()


def leave(stock: Stock, tag: str, data: bytes, etag: str = "") -> Path:
    """Leave a part behind under a tag."""
    with stock.part(*KEY) as part:
        path = part.path.with_name(f"{part.path.name.partition('.')[0]}.{tag}.part")
    path.write_bytes(data)
    Part(path=path).note(etag, 99)
    return path


def test_the_part_of_a_dead_process_is_taken_over_with_its_note(tmp_path):
    """Of what dead processes left, the largest is taken over and the others are removed."""
    stock = Stock(tmp_path)
    leave(stock, dead_tag(), b"little")
    leave(stock, dead_tag(), b"much more", '"etag"')
    with stock.part(*KEY) as part:
        assert (part.path.read_bytes(), part.noted) == (b"much more", ('"etag"', 99))
        assert len(list((tmp_path / "downloads").glob("*.part"))) == 1
        part.path.rename(tmp_path / "done")

    assert list((tmp_path / "downloads").iterdir()) == []


def test_the_part_of_a_living_process_is_left_alone(tmp_path):
    """Two who download the same at once have a part each."""
    stock = Stock(tmp_path)
    with stock.part(*KEY) as first:
        first.path.write_bytes(b"first")
        with Stock(tmp_path).part(*KEY) as second:
            assert second.path.read_bytes() == b""
            assert second.path != first.path
        assert first.path.read_bytes() == b"first"
    elsewhere = leave(stock, f"elsewhere-{os.getpid()}-abc", b"of another machine")
    with stock.part(*KEY) as third:
        assert third.path.read_bytes() == b"first"

    assert elsewhere.read_bytes() == b"of another machine"


def test_what_one_download_leaves_the_next_one_takes_up(tmp_path):
    """A part that was not finished waits for the next, note and all; an empty one is removed; another file's is not taken."""
    stock = Stock(tmp_path)
    with stock.part(*KEY) as part:
        part.path.write_bytes(b"begun")
        part.note('"etag"', 7)
    with stock.part("https://example.org/y", None, None) as other:
        assert other.path.read_bytes() == b""
    with stock.part(*KEY) as part:
        assert (part.path.read_bytes(), part.noted) == (b"begun", ('"etag"', 7))
        part.path.write_bytes(b"")

    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_finished_file_gets_its_name_by_one_rename(tmp_path):
    """A file is kept under its digest, read-only, and nothing else of it remains."""
    stock, digest = Stock(tmp_path), blake3.blake3(DATA).hexdigest()
    with stock.part(*KEY) as part:
        part.path.write_bytes(DATA)
        part.note("", None)
        kept = stock.keep(part.path, digest, ".safetensors")

    assert kept == tmp_path / "sources" / digest[:2] / f"{digest}.safetensors"
    assert kept.read_bytes() == DATA
    assert not kept.stat().st_mode & 0o222
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_disk_that_is_full_keeps_a_part_that_can_be_resumed(delivery, monkeypatch):
    """A write that fails ends the download with the system's error; what was written before is resumed later."""
    from sdmerge_build.sources import sink as module

    honest, room = module.Sink._write, [500]

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, view):
            if not room[0]:
                raise OSError(28, "No space left on device")
            count = self.file.write(view[: room[0]])
            room[0] -= count
            return count

    def write(sink, view, piece):
        if not isinstance(sink._file, Full):
            sink._file = Full(sink._file)
        honest(sink, view, piece)

    monkeypatch.setattr(module.Sink, "_write", write)
    with pytest.raises(OSError, match="No space left on device"):
        delivery.fetch()
    assert delivery.part.path.read_bytes() == DATA[:500]
    room[0] = 10_000
    delivery.fetch()

    assert delivery.data == DATA
    assert delivery.asked()[-1][0] == "bytes=500-"


def test_pins_may_be_several(delivery):
    """All that is pinned is compared, and all that differs is said."""
    wrong = replace(PINS["sha256"], blake3="ab" * 32)
    with pytest.raises(WrongFileError) as caught:
        delivery.fetch(expected=wrong)

    assert caught.value.what == f"its blake3 is {blake3.blake3(DATA).hexdigest()}, not {'ab' * 32}"
    assert caught.value.arrived.size == len(DATA)
