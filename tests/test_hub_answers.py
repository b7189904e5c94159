"""What is made of the answers that Civitai and Hugging Face give, in all their shapes, and of addresses."""

from __future__ import annotations

import hashlib
import json
from urllib.parse import parse_qsl, urlsplit

import blake3
import pytest
import tomli_w
from hubs import EVERYTHING, HubFile, Hubs, html, status
from hypothesis import given, settings
from hypothesis import strategies as st

from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources.civitai import Civitai, known_as
from sdmerge_build.sources.https import Https
from sdmerge_build.sources.huggingface import HuggingFace
from sdmerge_build.sources.offers import Offer, expect, hex_or_none, is_plain, tables, text_of
from sdmerge_build.sources.trust import Trust, WebError
from sdmerge_build.sources.uri import (
    CivitaiAddress,
    HttpsAddress,
    HuggingFaceAddress,
    RecipeAddress,
    UriError,
    page_of,
    parse_uri,
    without_secrets,
)
from sdmerge_build.sources.web import Web

DATA, OTHER = bytes(range(256)) * 9, bytes(range(255, -1, -1)) * 8
SHA256, BLAKE3 = hashlib.sha256(DATA).hexdigest(), blake3.blake3(DATA).hexdigest()
COMMIT, OLDER = "4479821af492b5b965b9388866a368ef04f6aff7", "172a0d503c459df6e691926f929a3bad7eb31927"
MAIN = HubFile(id=11, name="viewer.safetensors", data=DATA)
SECOND = HubFile(id=12, name="viewer-full.ckpt", data=OTHER, primary=False, metadata={"format": "PickleTensor", "size": "full", "fp": "fp32"})


@pytest.fixture
def web(hubs: Hubs, monkeypatch: pytest.MonkeyPatch) -> Web:
    """Provide a client that does not wait."""
    monkeypatch.setattr(Web, "wait", lambda _web, _seconds: None)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.delenv("TOKEN", raising=False)
    return Web(Trust({"TOKEN": hubs.url}, allow_private=True))


def civitai(web: Web, hubs: Hubs, uri: str = "civitai:7813@25845", *, with_terms: bool = False, **said: str) -> Offer:
    """Ask Civitai what an address means."""
    return Civitai().offer(web, hubs.url, parse_uri(uri), SourceTable(uri=uri, **said), with_terms=with_terms)


def huggingface(web: Web, hubs: Hubs, uri: str, *, with_terms: bool = False) -> Offer:
    """Ask Hugging Face what an address means."""
    return HuggingFace().offer(web, hubs.url, parse_uri(uri), SourceTable(uri=uri), with_terms=with_terms)


# ---------------------------------------------------------------- Civitai


@pytest.mark.parametrize(
    "uri", ["civitai:7813@25845", "civitai:7813@25845#11", "urn:air:sd1:checkpoint:civitai:7813@25845", "sdxl:lora:civitai:7813@25845+11.safetensors"]
)
def test_civitai_offers_a_file_of_a_version(hubs, web, uri):
    """Every spelling of the address leads to the same file, with exact size and lower-case digests, at the hub's own address."""
    hubs.civitai(7813, 25845, MAIN)
    offer = civitai(web, hubs, uri)

    assert offer == Offer(
        address="https://civitai.com/api/download/models/25845",
        filename="viewer.safetensors",
        size=len(DATA),
        sha256=SHA256,
        blake3=BLAKE3,
        page="https://civitai.com/models/7813?modelVersionId=25845",
    )
    assert len(hubs.requests) == 1


@pytest.mark.parametrize(
    ("said", "flags"),
    [
        ({"commercial": EVERYTHING}, {"allowCommercialUse": EVERYTHING}),
        ({"commercial": "Sell"}, {"allowCommercialUse": "Sell"}),
        ({"commercial": "{Image,RentCivit}"}, {"allowCommercialUse": "{Image,RentCivit}"}),
        ({"commercial": []}, {"allowCommercialUse": []}),
        ({"commercial": ...}, None),
        ({"commercial": None}, None),
        ({"commercial": {"a": 1}}, None),
        ({"commercial": [1, 2]}, None),
        ({"commercial": "\ud800"}, None),
    ],
    ids=str,
)
def test_terms_are_taken_as_they_are_sent(hubs, web, said, flags):
    """A string, an array and a Postgres literal are taken as they are; what cannot be written down is left out."""
    if said.get("commercial") is ...:
        said = {"flags": {"allowCommercialUse": ...}}
    hubs.civitai(7813, 25845, MAIN, **said)
    terms = dict(civitai(web, hubs, with_terms=True).terms)

    others = {
        "baseModel": "SD 1.5",
        "allowNoCredit": True,
        "allowDerivatives": True,
        "allowDifferentLicense": True,
        "model": "viewer-mix",
        "creator": "someone",
    }
    assert terms == others | (flags or {})
    tomli_w.dumps(terms).encode()


@pytest.mark.parametrize(
    ("hashes", "sha256", "blake3_"),
    [
        ({}, None, None),
        ({"SHA256": SHA256.upper()}, SHA256, None),
        ({"SHA256": SHA256, "BLAKE3": BLAKE3}, SHA256, BLAKE3),
        ({"SHA256": SHA256[:10], "BLAKE3": "z" * 64}, None, None),
        ({"SHA256": 7, "BLAKE3": [BLAKE3]}, None, None),
    ],
    ids=["none", "upper", "lower", "garbage", "types"],
)
def test_hashes_in_any_case_or_none(hubs, web, hashes, sha256, blake3_):
    """Digests are read in either case; what is no digest is none."""
    hubs.civitai(7813, 25845, HubFile(id=11, name="x.safetensors", data=DATA, hashes=hashes))
    offer = civitai(web, hubs)

    assert (offer.sha256, offer.blake3) == (sha256, blake3_)


def test_of_several_files_nobody_guesses(hubs, web):
    """Several files and nothing that tells which: the error lists the addresses that do, and each of them leads to its file."""
    hubs.civitai(7813, 25845, MAIN, SECOND)
    with pytest.raises(WebError, match="version 25845 has 2 files on Civitai") as caught:
        civitai(web, hubs)
    assert caught.value.hint == "say which: `civitai:7813@25845#11` (viewer.safetensors), `civitai:7813@25845#12` (viewer-full.ckpt)"
    first, second = (civitai(web, hubs, f"civitai:7813@25845#{number}") for number in (11, 12))

    assert (first.sha256, second.sha256) == (SHA256, hashlib.sha256(OTHER).hexdigest())
    for offer, data in ((first, DATA), (second, OTHER)):
        with web.stream(hubs.url + offer.address.removeprefix("https://civitai.com")) as body:
            assert b"".join(body.pieces()) == data


@pytest.mark.parametrize(
    "said",
    [{"sha256": hashlib.sha256(OTHER).hexdigest().upper()}, {"blake3": blake3.blake3(OTHER).hexdigest()}, {"filename": "VIEWER-full.ckpt"}],
    ids=list,
)
def test_a_pin_or_a_name_chooses_among_files(hubs, web, said):
    """A pinned digest, or the file's name, says which of several files is meant."""
    hubs.civitai(7813, 25845, MAIN, SECOND)

    assert civitai(web, hubs, **said).filename == "viewer-full.ckpt"


def test_files_that_are_no_weights_are_not_offered(hubs, web):
    """A version's training data and its config are no models; a version of nothing else offers no file."""
    data, vae = (HubFile(id=n, name=f"{n}.zip", data=OTHER, type=kind, primary=False) for n, kind in ((3, "Training Data"), (4, "VAE")))
    hubs.civitai(7813, 25845, data, MAIN, vae)
    assert civitai(web, hubs).filename == "viewer.safetensors"
    hubs.civitai(7813, 25845, data)
    with pytest.raises(WebError, match="offers no file for version 25845"):
        civitai(web, hubs)


def test_a_file_that_the_version_does_not_have(hubs, web):
    """A file's number that the version does not have is an error."""
    hubs.civitai(7813, 25845, MAIN)
    with pytest.raises(WebError, match="Civitai knows no file 99 of version 25845"):
        civitai(web, hubs, "civitai:7813@25845#99")


def test_a_version_of_another_model_is_refused(hubs, web):
    """Model and version in an address must belong together."""
    hubs.civitai(7813, 25845, MAIN)
    with pytest.raises(WebError, match="says that version 25845 belongs to model 7813, not 7814"):
        civitai(web, hubs, "civitai:7814@25845")


@pytest.mark.parametrize("mode", ["Archived", "TakenDown"])
def test_a_model_that_is_gone_says_what_to_do(hubs, web, mode):
    """A version whose files were withdrawn is an error that says how a file one has is found."""
    hubs.civitai(7813, 25845, MAIN, mode=mode)
    with pytest.raises(WebError, match="offers no file for version 25845") as caught:
        civitai(web, hubs)

    assert "can be found by its sha256" in caught.value.hint


def test_a_version_that_nobody_knows(hubs, web):
    """A version that is not there is an error that names the host and the status."""
    with pytest.raises(WebError, match=r"127\.0\.0\.1 answers 404"):
        civitai(web, hubs)


def test_a_login_page_instead_of_an_answer(hubs, web):
    """A web page where the API should be names the token."""
    hubs.api_faults += [html()]
    with pytest.raises(WebError) as caught:
        civitai(web, hubs)

    assert "TOKEN" in caught.value.hint


def test_a_hub_tells_whose_a_file_is(hubs, web):
    """A digest that the hub knows leads to a name and an address; one it does not know, or an answer of any other shape, to nothing."""
    hubs.civitai(7813, 25845, MAIN, name="viewer-mix", version_name="v1.7_v2")
    assert known_as(web, hubs.url, SHA256) == "Civitai knows it as viewer-mix v1.7_v2 (civitai:7813@25845)"
    assert known_as(web, hubs.url, "ab" * 32) == ""
    for body in (b"[]", b"7", b"{", b'{"modelId": 1, "id": 2, "model": [], "name": {}}'):
        hubs.api_faults += [status(200, {"Content-Type": "application/json"}, body)]
        assert "None" not in known_as(web, hubs.url, SHA256)


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("revision", ["main", COMMIT, "release"])
@pytest.mark.parametrize("with_terms", [True, False])
def test_hugging_face_offers_a_file_at_a_commit(hubs, web, revision, with_terms):
    """A branch, a tag and a commit lead to the same file, at the address of the commit; a commit need not be asked for."""
    for branch in ("main", "release"):
        hubs.huggingface("Meina/MeinaPastel", COMMIT, {"Meina Pastel V4.safetensors": DATA, "x.safetensors": DATA}, branch=branch)
    offer = huggingface(web, hubs, f"hf:Meina/MeinaPastel/x.safetensors@{revision}", with_terms=with_terms)

    assert offer == Offer(
        address=f"https://huggingface.co/Meina/MeinaPastel/resolve/{COMMIT}/x.safetensors",
        filename="x.safetensors",
        size=len(DATA),
        sha256=SHA256,
        revision=COMMIT,
        page=f"https://huggingface.co/Meina/MeinaPastel/blob/{COMMIT}/x.safetensors",
        terms={"license": "creativeml-openrail-m"} if with_terms else {},
    )
    assert [request.method for request in hubs.requests] == (["HEAD"] if revision == COMMIT and not with_terms else ["GET", "HEAD"])


def test_a_branch_that_moves_means_another_commit(hubs, web):
    """What a branch means is asked for each time."""
    hubs.huggingface("o/r", OLDER, {"x.safetensors": OTHER})
    assert huggingface(web, hubs, "hf:o/r/x.safetensors@main").revision == OLDER
    hubs.huggingface("o/r", COMMIT, {"x.safetensors": DATA})

    assert huggingface(web, hubs, "hf:o/r/x.safetensors@main").revision == COMMIT
    assert huggingface(web, hubs, f"hf:o/r/x.safetensors@{OLDER}").sha256 == hashlib.sha256(OTHER).hexdigest()


def test_a_file_in_a_folder_and_one_outside_lfs(hubs, web):
    """Names keep their folders; a small file outside LFS is offered without a digest."""
    hubs.huggingface("o/r", COMMIT, {"a/b c+d.safetensors": DATA, "small.bin": b"x"})
    info = HuggingFaceAddress("o/r", "a/b c+d.safetensors", COMMIT)
    offer = HuggingFace().offer(web, hubs.url, info, SourceTable(), with_terms=False)
    assert (offer.address, offer.filename) == (f"https://huggingface.co/o/r/resolve/{COMMIT}/a/b%20c%2Bd.safetensors", "b c+d.safetensors")
    small = huggingface(web, hubs, f"hf:o/r/small.bin@{COMMIT}")

    assert (small.sha256, small.size) == (None, None)


def test_a_repository_with_one_checkpoint_needs_no_file(hubs, web):
    """An AIR urn names no file: the only checkpoint of the repository is meant, or the error lists what there is."""
    uri = "urn:air:sd1:checkpoint:huggingface:o/r@main"
    hubs.huggingface("o/r", COMMIT, {"README.md": b"x", "x.safetensors": DATA, "vae/y.safetensors": DATA})
    assert huggingface(web, hubs, uri).filename == "x.safetensors"
    hubs.huggingface("o/r", COMMIT, {"x.safetensors": DATA, "y.ckpt": DATA})
    with pytest.raises(WebError, match="o/r holds 2 checkpoints") as caught:
        huggingface(web, hubs, uri)
    assert caught.value.hint == "say which: hf:o/r/FILE@REVISION; there are `x.safetensors`, `y.ckpt`"
    hubs.huggingface("o/r", COMMIT, {"README.md": b"x"})
    with pytest.raises(WebError, match="o/r holds 0 checkpoints"):
        huggingface(web, hubs, uri)


@pytest.mark.parametrize(
    ("uri", "kind", "said"),
    [
        ("hf:o/r/none.safetensors@main", {}, "answers 404: the repository has no such file"),
        ("hf:o/r/x.safetensors@nowhere", {}, "answers 404: the repository has no such commit"),
        (f"hf:o/r/x.safetensors@{OLDER}", {}, "answers 404: the repository has no such commit"),
        ("hf:o/none/x.safetensors@main", {}, "answers 404: there is no such repository"),
        ("hf:o/r/x.safetensors@main", {"needs_token": "right"}, r"refuses \(401\): Invalid username or password"),
        ("hf:o/r/x.safetensors@main", {"needs_token": "right", "gated": "auto"}, r"refuses \(401\): Access to model o/r is restricted"),
    ],
)
def test_refusals_quote_the_hub(hubs, web, uri, kind, said):
    """What is not there, private or gated is said in the hub's own words, with what to do."""
    hubs.huggingface("o/r", COMMIT, {"x.safetensors": DATA}, **kind)
    with pytest.raises(WebError, match=said) as caught:
        huggingface(web, hubs, uri)

    assert caught.value.hint == ("if it needs an account, set TOKEN" if kind else "it may have been renamed or taken down")


@pytest.mark.parametrize(("token", "opens"), [("right", True), ("wrong", False)])
def test_a_gate_opens_with_the_right_token(hubs, web, monkeypatch, token, opens):
    """The right token opens a gated file; another one is told to be of no help."""
    hubs.huggingface("o/r", COMMIT, {"x.safetensors": DATA}, needs_token="right", gated="manual")  # noqa: S106
    monkeypatch.setenv("TOKEN", token)
    if opens:
        assert huggingface(web, hubs, "hf:o/r/x.safetensors@main").sha256 == SHA256
        return
    with pytest.raises(WebError, match=r"refuses \(403\)") as caught:
        huggingface(web, hubs, "hf:o/r/x.safetensors@main")

    assert "TOKEN was sent, and does not open this file" in caught.value.hint


@pytest.mark.parametrize(
    "card", [{"license": None}, {"license": "other", "license_name": "x", "license_link": "LICENSE"}, {"license": "mit"}], ids=str
)
def test_licences_of_a_card(hubs, web, card):
    """The licence fields of the model's card are taken as they are."""
    hubs.huggingface("o/r", COMMIT, {"x.safetensors": DATA}, **card)

    assert huggingface(web, hubs, "hf:o/r/x.safetensors@main", with_terms=True).terms == {k: v for k, v in card.items() if v}


def test_a_plain_address_offers_itself():
    """Of a plain address nothing is known but its name."""
    offer = Https().offer(None, "", HttpsAddress("https://example.org/a/My%20mix.ckpt?x=1"), SourceTable(), with_terms=True)  # type: ignore[arg-type]

    assert offer == Offer(address="https://example.org/a/My%20mix.ckpt?x=1", filename="My mix.ckpt", page="https://example.org/a/My%20mix.ckpt?x=1")


# ---------------------------------------------------------------- answers of any shape


def anything(names: list[str]) -> st.SearchStrategy:
    """Make any JSON, with names that mean something somewhere in it."""
    leaves = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([*names, SHA256, COMMIT, "\ud83d", "Model"])
    )
    keys = st.sampled_from(names) | st.text(max_size=5)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6), max_leaves=20)


class Answering:
    """A client to whom every address gives the same answer."""

    def __init__(self, value, headers=()):
        self.value, self.headers = json.loads(json.dumps(value)), dict(headers)

    def json(self, _url):
        """Give the answer."""
        return self.value

    def head(self, _url):
        """Give the headers."""
        return self.headers


FILE_NAMES = ["id", "name", "type", "sizeKB", "hashes", "SHA256", "BLAKE3", "downloadUrl", "primary", "metadata"]
MODEL_NAMES = ["modelId", "model", "files", "creator", "username", "allowCommercialUse", "allowNoCredit", "allowDerivatives"]
CIVITAI_FILE = st.fixed_dictionaries(
    {"type": st.just("Model") | anything(FILE_NAMES)}, optional={name: anything(FILE_NAMES) for name in FILE_NAMES if name != "type"}
)
CIVITAI_VERSION = st.fixed_dictionaries(
    {"modelId": st.just(1) | anything(["id"]), "files": st.lists(CIVITAI_FILE | anything(FILE_NAMES), max_size=3) | anything(FILE_NAMES)},
    optional={name: anything(FILE_NAMES) for name in [*MODEL_NAMES[3:], "id", "name", "model"]},
)
HF_INFO = st.fixed_dictionaries(
    {"sha": st.just(COMMIT) | anything([COMMIT])},
    optional={
        "siblings": st.lists(st.fixed_dictionaries({"rfilename": st.just("x.ckpt") | anything(["rfilename"])}) | anything(["rfilename"]), max_size=3)
        | anything(["x"]),
        "cardData": anything(["license", "license_name"]),
        "author": anything(["x"]),
    },
)


def sound(offer: Offer) -> None:
    """See that an offer can be believed as far as its types go, and written into a lock."""
    assert isinstance(offer.filename, str)
    assert offer.size is None or (type(offer.size) is int and offer.size >= 0)
    for digest in (offer.sha256, offer.blake3):
        assert digest is None or (len(digest) == 64 and digest == digest.lower())
    assert urlsplit(offer.address).hostname in {"civitai.com", "huggingface.co"}
    tomli_w.dumps({"filename": offer.filename, "address": offer.address, "terms": dict(offer.terms)}).encode()


@settings(max_examples=150, deadline=None)
@given(
    answer=CIVITAI_VERSION | anything([*FILE_NAMES, *MODEL_NAMES]),
    file=st.none() | st.integers(0, 3),
    filename=st.none() | st.text(min_size=1, max_size=9),
)
def test_civitai_may_answer_anything(answer, file, filename):
    """Whatever Civitai answers, there is an offer that can be written down, or a `WebError`."""
    source = SourceTable.model_construct(**{**SourceTable().model_dump(), "filename": filename})
    try:
        sound(Civitai().offer(Answering(answer), "", CivitaiAddress(1, 2, file), source, with_terms=True))
    except WebError as error:
        f"{error.what}{error.hint}".encode()
    known_as(Answering(answer), "", SHA256).encode()


@settings(max_examples=150, deadline=None)
@given(
    answer=HF_INFO | anything(["sha", "siblings", "rfilename", "cardData", "license", "author"]),
    file=st.sampled_from(["", "x.ckpt"]),
    headers=st.dictionaries(
        st.sampled_from(["x-linked-size", "x-linked-etag"]), st.text(max_size=9) | st.sampled_from([f'"{SHA256}"', "2048", "9" * 30])
    ),
)
def test_hugging_face_may_answer_anything(answer, file, headers):
    """Whatever Hugging Face answers, there is an offer that can be written down, or a `WebError`."""
    try:
        sound(HuggingFace().offer(Answering(answer, headers), "", HuggingFaceAddress("o/r", file, "main"), SourceTable(), with_terms=True))
    except WebError as error:
        f"{error.what}{error.hint}".encode()


@given(anything(["name"]))
def test_the_readers_of_answers_take_anything(value):
    """No value of any kind makes a reader of answers fail otherwise than it says."""
    value = json.loads(json.dumps(value))
    text_of(value).encode()
    assert all(isinstance(table, dict) for table in tables(value))
    assert hex_or_none(value) is None or value.strip('" ').lower() == SHA256
    assert is_plain(value) in {True, False}
    for kind in (int, str, bool):
        try:
            assert type(expect(value, "name", kind, "Hub")) is kind
        except WebError as error:
            assert "answers in a form that is not known (`name`)" in error.what


# ---------------------------------------------------------------- addresses

WORD = st.from_regex(r"[A-Za-z0-9_][\w.-]{0,8}", fullmatch=True).filter(str.isascii)
NUMBER = st.integers(0, 10**12 - 1)
ADDRESSES = st.one_of(
    st.builds(lambda model, version: (f"civitai:{model}@{version}", CivitaiAddress(model, version)), NUMBER, NUMBER),
    st.builds(lambda model, version, file: (f"civitai:{model}@{version}#{file}", CivitaiAddress(model, version, file)), NUMBER, NUMBER, NUMBER),
    st.builds(lambda model, version: (f"urn:air:sd1:checkpoint:civitai:{model}@{version}", CivitaiAddress(model, version)), NUMBER, NUMBER),
    st.builds(
        lambda model, version, file: (f"sd1:lora:civitai:{model}@{version}+{file}.pt", CivitaiAddress(model, version, file)), NUMBER, NUMBER, NUMBER
    ),
    st.builds(lambda o, r, f, v: (f"hf:{o}/{r}/{f}@{v}", HuggingFaceAddress(f"{o}/{r}", f, v)), WORD, WORD, WORD, WORD),
    st.builds(lambda f, s: (f"recipe:{f}.toml#{s}", RecipeAddress(f"{f}.toml", s)), WORD, WORD),
    st.builds(lambda h, p: (f"https://{h}.example/{p}", HttpsAddress(f"https://{h}.example/{p}")), st.from_regex("[a-z]{1,9}", fullmatch=True), WORD),
)


@given(ADDRESSES)
def test_addresses_are_read_back(pair):
    """What an address is written from is what is read of it, and it has a page."""
    uri, address = pair

    assert parse_uri(uri) == address
    assert page_of(uri)


@settings(max_examples=150)
@given(
    st.text(max_size=30)
    | st.builds(
        lambda a, b, c: a + b + c,
        st.sampled_from(["https://", "civitai:", "hf:a/b/", "urn:air:sd1:x:civitai:", "recipe:"]),
        st.text(max_size=20),
        st.sampled_from(["", "@1", "@main", ".toml#x", "/x"]),
    )
)
def test_any_text_is_an_address_or_is_refused(text):
    """Any text is an address that can be printed, or a `UriError`."""
    try:
        address = parse_uri(text)
    except UriError:
        return

    assert text.isprintable()
    if isinstance(address, HttpsAddress):
        assert text.isascii()
        assert urlsplit(text).username is None
    if isinstance(address, HuggingFaceAddress):
        assert not {"", ".", ".."} & set(f"{address.repo}/{address.revision}".split("/"))


@pytest.mark.parametrize(
    "uri",
    [
        "urn:air:sd1:checkpoint:civitai:" + "9" * 5000 + "@1",
        "urn:air:sd1:checkpoint:civitai:7813",
        "urn:air:sd1:checkpoint:huggingface:12@3",
        "urn:air:sd1:checkpoint:huggingface:../..@main",
        "hf:../../x.safetensors@main",
        "hf:o/r/../../x@main",
        "hf:o/r/x.safetensors@../main",
        "hf:o/r//x@main",
        "hf:o/r/x\x1b[2J.safetensors@main",
        "https://example.org/a b",
        "https://example.org:0/x",
        "https://example.org:99999/x",
        "https://[::1/x",
        "https:///x",
        "https://exämple.org/x",
        "HTTP://example.org/x",
    ],
)
def test_addresses_that_lead_nowhere_or_elsewhere_are_refused(uri):
    """Numbers that are none, ways out of a repository, and what no client could open are refused, in text that can be printed."""
    with pytest.raises(UriError) as caught:
        parse_uri(uri)

    assert str(caught.value).isprintable()


CANARY = "canary-5c1f"


@pytest.mark.parametrize(
    "uri",
    [
        *(f"https://civitai.com/api/download/models/1?{name}={CANARY}" for name in ("token", "api_key", "apikey", "api-key", "access_key", "X-Amz-Signature", "x-amz-credential", "sig", "Signature", "key", "auth", "jwt", "password", "X-Goog-Credential", "%74oken")),
        f"https://example.org/x?a=1;token={CANARY}",
        f"https://example.org/x#access_token={CANARY}",
        f"https://me:{CANARY}@example.org/x",
        f"https://{CANARY}@example.org/x",
        f"https://me:a/{CANARY}@example.org/x",
        f"https://me:{CANARY}@/x",
        f"civitai:7813@25845?token={CANARY}",
        f"hf:o/r/x@main?token={CANARY}",
        f"civitai.com/models/1?token={CANARY}",
        f"http://civitai.com/models/1?token={CANARY}",
        f"https://example.org/x y?token={CANARY}",
    ],
)  # fmt: skip
def test_secrets_in_addresses_are_refused_without_being_quoted(uri):
    """An address that holds a secret would be published with every artifact; it is refused, and the message does not hold the secret."""
    with pytest.raises(UriError) as caught:
        parse_uri(uri)

    assert CANARY not in str(caught.value)


@given(st.from_regex(r"[a-z]{1,5}://([a-z:/]{0,9}@)?[a-z.]{1,9}(/[a-z@]{0,5})?([?][a-z=&#]{0,9})?", fullmatch=True))
def test_what_is_shown_of_an_address_holds_no_user_and_no_query(url):
    """Of an address of a host, user, query and fragment are not shown; the rest is."""
    shown = without_secrets(url)

    assert "?" not in shown
    assert "@" not in shown
    assert shown.startswith(url.partition("://")[0] + "://")


@given(st.dictionaries(st.sampled_from(["type", "format", "size", "fp", "fileId", "token", "x"]), st.text(max_size=9)))
def test_a_download_address_keeps_what_chooses_the_file_alone(query):
    """Of the address that the API gives, only what says which file is meant is kept, never a secret or another host."""
    from urllib.parse import urlencode

    answer = {"modelId": 1, "files": [{"id": 3, "type": "Model", "downloadUrl": f"https://evil.example/api?{urlencode(query)}#{CANARY}"}]}
    address = Civitai().offer(Answering(answer), "", CivitaiAddress(1, 2), SourceTable(), with_terms=False).address

    assert address.startswith("https://civitai.com/api/download/models/2")
    assert dict(parse_qsl(urlsplit(address).query)) == {k: v for k, v in query.items() if v and k not in {"token", "x"}}
