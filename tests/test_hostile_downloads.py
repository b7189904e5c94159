"""Downloads under pressure: links, damaged leftovers, pins that do not fit, servers that never end, bodies that do."""

from __future__ import annotations

import hashlib
import json
import socket
import threading

import blake3
import pytest
from conftest import Space
from hubs import Hubs, chunked, cut, slow
from shop import COMMIT, Shop, model, sha256, shop  # noqa: F401
from test_download import DATA, KEY, delivery, station  # noqa: F401
from test_web import web  # noqa: F401

from sdmerge_build.errors import IntegrityError, RecipeError, SdbuildError
from sdmerge_build.sources.body import Flow
from sdmerge_build.sources.download import Expected
from sdmerge_build.sources.stock import Part, Stock
from sdmerge_build.sources.trust import Trust, Unsteady, WebError
from sdmerge_build.sources.web import Web


@pytest.mark.parametrize("linked", ["part", "json"])
def test_a_leftover_of_which_one_half_is_a_link_is_not_taken_over(tmp_path, linked):
    """Either half of a leftover may lead elsewhere: it is left alone, and what it leads to stays as it is."""
    stock, victim = Stock(tmp_path), tmp_path / "victim"
    victim.write_text("mine")
    with stock.part(*KEY) as part:
        left = part.path.with_name(f"{part.path.name.partition('.')[0]}.released-1.part")
    left.write_bytes(b"begun")
    Part(path=left).note('"etag"', 99)
    half = left.with_suffix(f".{linked}")
    half.unlink()
    half.symlink_to(victim)
    with stock.part(*KEY) as part:
        assert part.path.read_bytes() == b""
        part.path.write_bytes(b"new")
        part.note('"new"', 7)

    assert victim.read_text() == "mine"


def test_only_a_plain_file_with_the_right_digest_is_held(tmp_path):
    """What lies in a bundle counts when it is a file of its own and its digest is known and right."""
    data, file = b"a shard", tmp_path / "shard"
    file.write_bytes(data)
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "folder").mkdir()
    digest = hashlib.sha256(data).hexdigest()

    assert Stock.holds(file, digest)
    assert not Stock.holds(file, "00" * 32)
    assert not Stock.holds(file, None)
    assert not Stock.holds(file, "")
    assert not any(Stock.holds(tmp_path / name, digest) for name in ("link", "folder", "nothing"))


@pytest.mark.parametrize("note", [b"\xff", b"x" * 2000, b""], ids=["no text", "too long", "nothing"])
def test_a_note_that_cannot_be_read_vouches_for_nothing(tmp_path, note):
    """The digest beside a converted file is believed when it is there and the same; anything else has the file made again."""
    made = tmp_path / "x.pickle1.safetensors"
    assert Stock.vouches(made, "ab" * 32)
    assert Stock.vouches(made, "ab" * 32)
    assert not Stock.vouches(made, "cd" * 32)
    made.with_suffix(".tensors").write_bytes(note)
    assert not Stock.vouches(made, "ab" * 32)
    made.with_suffix(".tensors").unlink()
    made.with_suffix(".tensors").mkdir()
    assert not Stock.vouches(made, "ab" * 32)


def test_a_damaged_file_does_not_keep_the_right_one_from_its_place(tmp_path):
    """What lies under a file's name stays only when it holds the same bytes, not when it is merely as long."""
    stock, digest = Stock(tmp_path), blake3.blake3(DATA).hexdigest()
    place = stock.place_of(digest, ".safetensors")
    place.parent.mkdir(parents=True)
    place.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    arrived = tmp_path / "arrived"
    arrived.write_bytes(DATA)

    assert stock.keep(arrived, digest, ".safetensors").read_bytes() == DATA
    assert not arrived.exists()


def sharded(data: dict[str, bytes]) -> dict[str, bytes]:
    """Put an index beside two shards."""
    from safetensors.torch import load

    index = {"weight_map": {name: file for file, held in data.items() for name in load(held)}}
    return data | {"B.safetensors.index.json": json.dumps(index).encode()}


def halves(seed: str) -> dict[str, bytes]:
    """Cut a checkpoint into two shards with an index."""
    from safetensors.torch import load, save

    whole = load(model(seed))
    names = sorted(whole)
    return sharded({f"B-{n}.safetensors": save({name: whole[name] for name in names[n::2]}) for n in range(2)})


def test_shards_that_arrived_before_are_not_downloaded_again(shop: Shop):  # noqa: F811
    """Of a checkpoint of several files, what an earlier run that failed brought here is not asked for once more."""
    files = halves("big")
    last = "B-1.safetensors"
    shop.hubs.huggingface("a/b", COMMIT, files)
    shop.recipe(B=f'uri = "hf:a/b/B.safetensors.index.json@{COMMIT}"')
    shop.hubs.huggingface("a/b", COMMIT, files | {last: files[last][:-1] + bytes([files[last][-1] ^ 1])}, sha256={last: sha256(files[last])})
    with pytest.raises(IntegrityError, match="is another file"):
        shop.lock()
    [bundle] = (shop.path / "cache" / "downloads").glob("*.bundle")
    key, _, tag = bundle.name.removesuffix(".bundle").partition(".")
    host, _pid, rest = tag.rsplit("-", 2)
    bundle.rename(bundle.with_name(f"{key}.{host}-999999999-{rest}.bundle"))  # whoever began it is gone
    shop.hubs.huggingface("a/b", COMMIT, files)
    shop.forget()
    shop.lock()

    assert [request.name.rpartition("/")[2] for request in shop.downloads if request.host == "cdn"].count("B-0.safetensors") == 0
    assert [request.name.rpartition("/")[2] for request in shop.downloads if request.host == "cdn"].count(last) == 1


@pytest.mark.parametrize("kept", [True, False], ids=["what was made is here", "what was made is gone"])
def test_a_memo_that_knows_no_tensors_of_parts_or_of_what_was_made_is_no_knowledge(shop: Shop, kept):  # noqa: F811
    """No shard, and nothing that was made of shards, is known by an empty digest: two checkpoints would be one."""
    for name, data in halves("big").items():
        shop.put(name, data)
    shop.recipe(B='path = "B.safetensors.index.json"')
    first = shop.build().wishes[0]
    cache = shop.path / "cache"
    [made] = (cache / "sources").rglob("*.safetensors")
    table = json.loads((cache / "digests.json").read_text())
    for entry in table["files"].values():
        entry["digests"]["tensors"] = ""
    (cache / "digests.json").write_text(json.dumps(table))
    (cache / "artifacts").rename(shop.path / "old")
    made.with_suffix(".tensors").unlink()
    if not kept:
        made.unlink()
    again = shop.build().wishes[0]

    assert again.artifact_key == first.artifact_key
    assert again.stored.sha256 == first.stored.sha256
    assert list((cache / "sources").rglob("*.safetensors")) == [made]


def test_a_file_that_changes_between_its_header_and_its_hash_is_refused(space: Space, monkeypatch):
    """What is hashed is the file whose header was read."""
    from sdmerge_build.sources import search

    space.pair()
    honest = search.learn_digests

    def change(requests, *rest):
        path = space.path / "A.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return honest(requests, *rest)

    monkeypatch.setattr(search, "learn_digests", change)
    with pytest.raises(IntegrityError, match=r"A\.safetensors: the file changed while it was being read"):
        space.build()
    assert not (space.path / "out").exists()


@pytest.mark.parametrize("pin", ["sha256", "blake3", "size"])
def test_pins_of_one_file_are_refused_for_several_before_they_are_downloaded(shop: Shop, pin):  # noqa: F811
    """A checkpoint of several files on a hub cannot be pinned as one, not even by its index; that is said before a shard is asked for."""
    files = halves("big")
    index = files["B.safetensors.index.json"]
    pins = {"sha256": f'"{sha256(index)}"', "blake3": f'"{blake3.blake3(index).hexdigest()}"', "size": len(index)}
    shop.hubs.huggingface("a/b", COMMIT, files)
    shop.recipe(B=f'uri = "hf:a/b/B.safetensors.index.json@{COMMIT}"\n{pin} = {pins[pin]}')
    with pytest.raises(RecipeError, match=f"is several files, which `{pin}` cannot pin"):
        shop.lock()

    assert [request for request in shop.downloads if request.name.endswith(".safetensors") and request.host == "cdn"] == []


@pytest.mark.parametrize("pin", ['sha256 = "' + "00" * 32 + '"', 'blake3 = "' + "00" * 32 + '"', "size = 1"])
def test_pins_of_one_file_are_refused_for_several_that_are_here(shop: Shop, pin):  # noqa: F811
    """Nor can one that is here, whichever pin it is. (In test_hostile_sources.py: add blake3 to `pin`.)"""
    for name, data in halves("big").items():
        shop.put(name, data)
    shop.recipe(B=f'path = "B.safetensors.index.json"\n{pin}')
    with pytest.raises(RecipeError, match="is several files"):
        shop.build()


def test_one_source_that_is_pinned_wrongly_does_not_spoil_another_of_the_same_address(shop: Shop, monkeypatch):  # noqa: F811
    """What is downloaded once for several sources is what all of them mean: with other pins it is another wish."""
    monkeypatch.setenv("SSL_CERT_FILE", str(shop.hubs.ca_file))
    data = model("viewer")
    uri = f'uri = "{shop.hubs.https("/x.safetensors", data)}"'
    shop.recipe(wrong=f'{uri}\nblake3 = "{"00" * 32}"', right=f'{uri}\nsha256 = "{sha256(data)}"')
    with pytest.raises(SdbuildError) as caught:
        shop.fetch()

    assert "`wrong`" in str(caught.value)
    assert "`right`" not in str(caught.value)
    assert [path.read_bytes() for path in (shop.path / "cache" / "sources").rglob("*.safetensors")] == [data]


def test_a_server_that_drips_headers_is_hung_up_on(monkeypatch):
    """Bytes that keep coming do not keep an answer alive whose headers never end: it is we who hang up, and soon."""
    monkeypatch.setattr("sdmerge_build.sources.web.HEADER_SECONDS", 0.3)
    monkeypatch.setattr("sdmerge_build.sources.web.DELAYS", ())
    listener = socket.create_server(("127.0.0.1", 0))
    dripped: list[int] = []
    over = threading.Event()

    def drip():
        connection, _ = listener.accept()
        with connection:
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                for n in range(200):
                    connection.sendall(b"X-%d: y\r\n" % n)
                    dripped.append(n)
                    over.wait(0.05)
            except OSError:
                pass
            over.set()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener, pytest.raises(WebError, match="was lost"):
        Web(Trust({"X": base}, allow_private=True)).json(f"{base}/x")
    thread.join()

    assert len(dripped) < 200


def test_a_body_may_take_longer_than_headers_may(delivery, monkeypatch):  # noqa: F811
    """The deadline is for headers alone: whoever sent them in time is listened to for as long as bytes come."""
    monkeypatch.setattr("sdmerge_build.sources.web.HEADER_SECONDS", 0.3)
    delivery.fetch(slow(len(DATA), 1.0))

    assert delivery.data == DATA
    assert len(delivery.asked()) == 1


def test_a_file_that_is_longer_than_it_may_be_is_not_cut_to_length(delivery):  # noqa: F811
    """A server that does not announce a length and sends more than the file has does not send the file."""
    with pytest.raises(WebError, match="sends more than the file has"):
        delivery.fetch(*[chunked()] * 50, expected=Expected(size=len(DATA) - 5, sha256_wanted=True))

    assert len(delivery.asked()) < 20


@pytest.fixture
def pair():
    """Two ends of a connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_flow_ends_where_its_length_says(pair):
    """What a server sends after the announced length is no part of the body, and stays on the connection."""
    ours, theirs = pair
    theirs.sendall(b"cdeMORE")
    flow = Flow(iter([b"ab"]), ours, 5, threading.Event(), "host")
    memory, have = memoryview(bytearray(100)), b""
    while count := flow(memory):
        have += bytes(memory[:count])

    assert have == b"abcde"
    assert ours.recv(100) == b"MORE"


@pytest.mark.parametrize("end", ["closed", "reset"])
def test_a_flow_that_breaks_off_is_not_at_its_end(pair, end):
    """A connection that is lost before the announced length looks like no end."""
    ours, theirs = pair
    theirs.sendall(b"cd")
    if end == "closed":
        theirs.close()
    else:
        theirs.shutdown(socket.SHUT_WR)
    flow = Flow(iter([b"ab"]), ours, 5, threading.Event(), "host")
    memory = memoryview(bytearray(100))
    assert [flow(memory), flow(memory)] == [2, 2]
    with pytest.raises(Unsteady, match="the connection to host was lost"):
        flow(memory)


def test_a_document_that_breaks_off_is_asked_for_again(hubs: Hubs, web):  # noqa: F811
    """Small files are read whole or not at all, also where they are larger than what comes with the headers."""
    text = json.dumps(list(range(60_000))).encode()
    hubs.huggingface("a/b", COMMIT, {"x.json": text}, lfs=[])
    hubs.faults += [cut(len(text) - 1000)]

    assert web.whole(f"{hubs.url}/a/b/resolve/main/x.json") == text
    assert len(hubs.requests) == 2
