"""Whom we talk to, what we show them, and what we make of their answers."""

from __future__ import annotations

import base64
import socket
import traceback
from pathlib import Path

import pytest
from hubs import Fault, HubFile, Hubs, cut, drop, empty, garbage, gzip, html, ignore_range, status, unsatisfiable, wrong_range
from hypothesis import given
from hypothesis import strategies as st

from sdmerge_build.sources.trust import Key, Trust, WebError, origin_of
from sdmerge_build.sources.web import MOST_JSON, Web

DATA = bytes(n * n % 251 for n in range(3000))
CANARY = "canary-71f3b0"
DOWNLOAD = "/api/download/models/2"


@pytest.fixture
def web(hubs: Hubs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Web:
    """Provide a client that may ask private addresses, does not wait, and knows no tokens; and a hub with one file."""
    for name in ("CIVITAI_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(Web, "wait", lambda _web, _seconds: None)
    hubs.civitai(1, 2, HubFile(id=3, name="x.safetensors", data=DATA))
    return Web(Trust({"CIVITAI_TOKEN": hubs.url}, allow_private=True))


@pytest.fixture
def secure(hubs: Hubs, monkeypatch: pytest.MonkeyPatch, web: Web) -> Web:
    """Provide a client that accepts the certificate of the https host, too."""
    hubs.https("/x.safetensors", DATA)
    monkeypatch.setenv("SSL_CERT_FILE", str(hubs.ca_file))
    return Web(web.trust)


def get(web: Web, url: str) -> bytes:
    """Ask for a file once."""
    with web.stream(url) as body:
        return b"".join(body.pieces())


def sent_keys(hubs: Hubs, host: str) -> set[str | None]:
    """Say which keys a host was shown."""
    return {request.headers.get("Authorization") for request in hubs.requests if request.host == host}


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("source", ["variable", "netrc", "both"])
def test_a_token_is_shown_to_its_hub_and_not_to_the_cdn(hubs, web, monkeypatch, tmp_path, source):
    """A token from its variable, or else from netrc, goes to the named host as a header; the CDN sees none and serves the file."""
    if source != "netrc":
        monkeypatch.setenv("CIVITAI_TOKEN", f" {CANARY}\n")
    if source != "variable":
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {CANARY if source == 'netrc' else 'other'}\n")

    assert get(web, hubs.url + DOWNLOAD) == DATA
    assert web.json(hubs.url + "/api/v1/models/1")["id"] == 1
    assert sent_keys(hubs, "api") == {f"Bearer {CANARY}"}
    assert sent_keys(hubs, "cdn") == {None}
    assert all(CANARY not in request.path for request in hubs.requests)


def test_a_host_that_is_no_hub_is_shown_its_own_entry_in_netrc_alone(hubs, secure, monkeypatch, tmp_path):
    """Any other host gets login and password of its entry in netrc; an entry for all hosts, and another hub's token, are shown to nobody."""
    monkeypatch.setenv("CIVITAI_TOKEN", CANARY)
    get(secure, hubs.tls_url + "/x.safetensors")
    (tmp_path / "netrc").write_text(f"default login me password {CANARY}\n")
    get(secure, hubs.tls_url + "/x.safetensors")
    assert sent_keys(hubs, "tls") == {None}
    hubs.requests.clear()
    (tmp_path / "netrc").write_text(f"machine localhost login me password {CANARY}\n")
    get(secure, hubs.tls_url + "/x.safetensors")

    assert sent_keys(hubs, "tls") == {"Basic " + base64.b64encode(f"me:{CANARY}".encode()).decode()}


@pytest.mark.parametrize("text", ["machine", "machine 127.0.0.1 login", "\0\xff", "machine 127.0.0.1 login a password"])
def test_a_netrc_that_cannot_be_read_is_none(hubs, web, tmp_path, text):
    """Whatever lies where netrc should be, files that need no token are fetched."""
    (tmp_path / "netrc").write_text(text, encoding="latin-1")

    assert get(web, hubs.url + DOWNLOAD) == DATA


def test_a_token_does_not_come_back_after_a_detour(hubs, web, monkeypatch):
    """Once redirected to another host, a request has no token any more, not even when it is sent back; on its own host it keeps it."""
    monkeypatch.setenv("CIVITAI_TOKEN", CANARY)
    hubs.redirect("/a", "/b")
    hubs.redirect("/b", hubs.cdn_url + "/c")
    hubs.redirect("/c", hubs.url + DOWNLOAD)

    assert get(web, hubs.url + "/a") == DATA
    seen = [(request.host, request.headers.get("Authorization")) for request in hubs.requests]
    assert seen == [("api", f"Bearer {CANARY}"), ("api", f"Bearer {CANARY}"), ("cdn", None), ("api", None), ("cdn", None)]


@pytest.mark.parametrize(
    ("url", "is_shown"),
    [
        ("https://hub.example/x", True),
        ("https://HUB.example:443/x", True),
        ("http://hub.example/x", False),
        ("https://hub.example:444/x", False),
        ("https://hub.example.evil.org/x", False),
        ("https://sub.hub.example/x", False),
        ("https://evil.org/https://hub.example/", False),
        ("https://hub.example@evil.org/", False),
    ],
)
def test_a_token_belongs_to_scheme_host_and_port(monkeypatch, url, is_shown):
    """No other scheme, host or port than the hub's own sees its token."""
    monkeypatch.setenv("CIVITAI_TOKEN", CANARY)
    trust = Trust({"CIVITAI_TOKEN": "https://hub.example"}, allow_private=True)

    assert trust.key_of(url).value == (f"Bearer {CANARY}" if is_shown else "")


@pytest.mark.parametrize(
    ("hub", "is_shown"), [("http://hub.example", False), ("http://127.0.0.1:8", True), ("http://localhost:8", True), ("http://[::1]", True)]
)
def test_without_tls_a_token_does_not_leave_this_machine(monkeypatch, hub, is_shown):
    """A hub that is asked without TLS sees a token only on loopback; nor does netrc go elsewhere."""
    monkeypatch.setenv("CIVITAI_TOKEN", CANARY)

    assert bool(Trust({"CIVITAI_TOKEN": hub}, allow_private=True).key_of(hub + "/x").value) is is_shown


@pytest.mark.parametrize("token", [f"{CANARY}\nX-Other: 1", f"{CANARY} two", f"{CANARY}é", f"{CANARY}\x7f"])
def test_a_token_that_is_none_is_refused_without_being_quoted(hubs, web, monkeypatch, token):
    """What would break a header never gets into one, and the message names the variable alone."""
    monkeypatch.setenv("CIVITAI_TOKEN", token)
    with pytest.raises(WebError) as caught:
        get(web, hubs.url + DOWNLOAD)

    assert caught.value.what == "CIVITAI_TOKEN holds characters that no token has"
    assert hubs.requests == []


def test_no_repr_and_no_traceback_shows_a_token(hubs, web, monkeypatch):
    """Keys are not shown where they are printed, nor in what a crash prints, with the request's headers in a frame."""
    monkeypatch.setenv("CIVITAI_TOKEN", CANARY)
    key = web.trust.key_of(hubs.url)
    assert CANARY in key.value
    assert CANARY not in f"{key} {web.trust!r} {vars(web)}"

    def crash(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(web, "_check", crash)
    with pytest.raises(ZeroDivisionError) as caught:
        get(web, hubs.url + DOWNLOAD)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_cookies_are_not_kept(hubs, web):
    """What a host hands out with its answers is not handed back, to it or to its neighbours."""
    hubs.api_faults += [Fault("cookie", lambda answer: answer.headers.update({"Set-Cookie": f"session={CANARY}; Path=/; Domain=127.0.0.1"}))]
    web.json(hubs.url + "/api/v1/models/1")
    get(web, hubs.url + DOWNLOAD)

    assert [request.headers.get("Cookie") for request in hubs.requests] == [None] * 3


# ---------------------------------------------------------------- what refusals say


def test_a_login_page_says_which_token_to_set_or_that_it_does_not_help(hubs, web, monkeypatch):
    """Without a token its variable is named; with one that is not accepted, that is said; with the right one the file comes."""
    hubs.civitai(1, 2, HubFile(id=3, name="x.safetensors", data=DATA), needs_token="right")  # noqa: S106
    with pytest.raises(WebError) as caught:
        get(web, hubs.url + DOWNLOAD)
    assert "web page instead of the file" in caught.value.what
    assert caught.value.hint == "if it needs an account, set CIVITAI_TOKEN"
    monkeypatch.setenv("CIVITAI_TOKEN", CANARY)
    with pytest.raises(WebError) as caught:
        get(web, hubs.url + DOWNLOAD)
    assert "CIVITAI_TOKEN was sent, and does not open this file" in caught.value.hint
    assert CANARY not in f"{caught.value!r}{caught.value.hint}"
    monkeypatch.setenv("CIVITAI_TOKEN", "right")

    assert get(web, hubs.url + DOWNLOAD) == DATA


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_says_what_the_host_says_and_which_token_to_set(hubs, web, code):
    """The host's own reason is quoted; a host that is no hub is opened by netrc."""
    hubs.api_faults += [status(code, {"X-Error-Message": "You are not in the list."})]
    with pytest.raises(WebError, match=rf"127\.0\.0\.1 refuses \({code}\): You are not in the list\.") as caught:
        web.json(hubs.url + "/api/v1/models/1")

    assert caught.value.hint == "if it needs an account, set CIVITAI_TOKEN"
    assert web.trust.advice("https://other.example/x") == "if it needs an account, set an entry for other.example in netrc"


@pytest.mark.parametrize(
    ("code", "said"), [(404, "there is no such file or model"), (410, "there is no such file or model"), (418, "answers 418"), (204, "answers 204")]
)
def test_other_answers_are_final(hubs, web, code, said):
    """A status that no second try would change is an error at once."""
    hubs.api_faults += [status(code)]
    with pytest.raises(WebError, match=said):
        web.json(hubs.url + "/api/v1/models/1")

    assert len(hubs.requests) == 1


@pytest.mark.parametrize("fault", [drop(), garbage(), cut(20), status(429), status(503, {"Retry-After": "1"}), status(500)], ids=str)
def test_a_passing_failure_of_an_api_is_tried_again(hubs, web, fault):
    """What may pass is tried again a few times, and not for ever."""
    hubs.api_faults += [fault, fault]
    assert web.json(hubs.url + "/api/v1/models/1")["id"] == 1
    hubs.api_faults += [fault] * 50
    with pytest.raises(WebError):
        web.json(hubs.url + "/api/v1/models/1")

    assert len(hubs.requests) <= 3 + 7


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "what is not JSON"),
        (b"<!DOCTYPE html>", "what is not JSON"),
        (b'{"id": 1', "what is not JSON"),
        (b"[" * 200_000, "what is not JSON"),
        (b'{"a":' * 200_000, "what is not JSON"),
        (b"\xff\xfe\xfa", "what is not JSON"),
        (b"9" * 10_000, "what is not JSON"),
        (b'"' + b"a" * MOST_JSON + b'"', "too long to be believed"),
    ],
    ids=["nothing", "html", "cut", "deep lists", "deep tables", "no text", "a long number", "huge"],
)
def test_what_is_no_json_is_said(hubs, web, body, said):
    """An answer that is no JSON, or too much of it, is an error and never a crash."""
    hubs.api_faults += [status(200, {"Content-Type": "application/json"}, body)]
    with pytest.raises(WebError, match=said):
        web.json(hubs.url + "/api/v1/models/1")


def test_a_web_page_instead_of_json_names_the_token(hubs, web):
    """A login page where an API should be is recognised by its kind."""
    hubs.api_faults += [html()]
    with pytest.raises(WebError, match="web page") as caught:
        web.json(hubs.url + "/api/v1/models/1")

    assert "CIVITAI_TOKEN" in caught.value.hint


def test_an_unknown_certificate_is_refused(hubs, web):
    """A host that cannot prove who it is is not asked for anything."""
    hubs.https("/x", DATA)
    with pytest.raises(WebError, match="localhost cannot prove who it is: its certificate is not accepted"):
        get(web, hubs.tls_url + "/x")

    assert hubs.requests == []


@pytest.mark.parametrize("url", ["localhost:8080/x", "ftp://127.0.0.1/x", "http://127.0.0.1\x01/"])
def test_an_address_that_cannot_be_opened_is_said_at_once(web, url):
    """Who sets a mirror to what is no address hears so, without tries and waits."""
    with pytest.raises(WebError, match="is not an address that can be opened"):
        web.json(url)


# ---------------------------------------------------------------- redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_five_redirects_are_followed_and_six_are_not(hubs, web, code):
    """Five redirects are enough for everybody; the sixth ends in an error, and so does a circle."""
    for n in range(6):
        hubs.redirect(f"/{n}", f"/{n + 1}" if n < 5 else "/api/v1/models/1", code)
    assert web.json(hubs.url + "/1")["id"] == 1
    with pytest.raises(WebError, match="redirects more than 5 times"):
        web.json(hubs.url + "/0")
    hubs.redirect("/circle", "/circle", code)
    hubs.requests.clear()
    with pytest.raises(WebError, match="redirects more than 5 times"):
        web.json(hubs.url + "/circle")

    assert len(hubs.requests) == 6


@pytest.mark.parametrize(
    "there",
    [
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://127.0.0.1/x",
        "data:text/plain,x",
        "gopher://127.0.0.1/",
        "javascript:alert(1)",
        "ws://127.0.0.1/",
    ],
)
def test_redirects_off_http_are_refused(hubs, web, there):
    """Nothing but http and https is followed."""
    hubs.redirect("/away", there)
    with pytest.raises(WebError, match=r"redirects to `\w+:`, which is not followed"):
        get(web, hubs.url + "/away")
    with pytest.raises(WebError, match="which is not followed"):
        web.head(hubs.url + "/away")


@pytest.mark.parametrize("there", ["http://[::1", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://[bad]/"])
def test_redirects_that_cannot_be_read_are_refused(hubs, web, there):
    """An address that is none ends in an error that names who sent it."""
    hubs.redirect("/away", there)
    with pytest.raises(WebError, match=r"127\.0\.0\.1 redirects to an address that cannot be read"):
        get(web, hubs.url + "/away")


def test_a_redirect_without_an_address_is_no_redirect(hubs, web):
    """A 302 that names no address is an answer like any other, and final."""
    hubs.api_faults += [status(302)]
    with pytest.raises(WebError, match="answers 302"):
        web.json(hubs.url + "/api/v1/models/1")


def test_a_redirect_away_from_tls_is_refused(hubs, secure):
    """From https nothing leads to http, not even on the same machine, and not on a detour; from http to https is fine."""
    hubs.redirect("/down", hubs.url + DOWNLOAD)
    hubs.redirect("/up", hubs.tls_url.replace("https:", "HTTPS:") + "/down")
    hubs.redirect("/fine", hubs.tls_url + "/x.safetensors")
    for url in (hubs.tls_url + "/down", hubs.url + "/up"):
        with pytest.raises(WebError, match="localhost redirects to an address without encryption, which is not followed"):
            get(secure, url)

    assert get(secure, hubs.url + "/fine") == DATA


PRIVATE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost", "10.0.0.8", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "0.0.0.0", "0", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:a00:8]", "[::127.0.0.1]",  # noqa: S104
    "[fe80::1]", "[fc00::1]", "[fec0::1]", "[ff02::1]", "[64:ff9b::10.0.0.8]", "[2002:0a00:0008::]", "[2001:db8::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused_however_they_are_spelled(hubs, web, host):
    """Neither an address nor a redirect leads to a machine that only we can reach, unless that is allowed."""
    strict = Web(Trust({"CIVITAI_TOKEN": hubs.url}, allow_private=False))
    url = f"https://{host}/latest/meta-data"
    hubs.redirect("/away", url)
    for ask in (lambda: get(strict, url), lambda: get(strict, hubs.url + "/away"), lambda: strict.read(url, 0, 9)):
        with pytest.raises(WebError, match="is a private address") as caught:
            ask()
        assert caught.value.hint == "if that is meant, say --allow-private"
    web.trust.vet(url)

    assert {request.host for request in hubs.requests} == {"api"}


@pytest.mark.parametrize("host", ["93.184.216.34", "[2606:2800:220:1:248:1893:25c8:1946]", "[64:ff9b::5db8:d822]"])
def test_public_addresses_are_asked(host):
    """An address that anybody can reach needs no permission."""
    Trust({}, allow_private=False).vet(f"https://{host}/x")


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let every name have these addresses, as far as vetting is concerned."""

    class Names:
        SOCK_STREAM = socket.SOCK_STREAM

        @staticmethod
        def getaddrinfo(_host, port, **_kwargs):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr("sdmerge_build.sources.trust.socket", Names)


@pytest.mark.parametrize("addresses", [["10.0.0.8"], ["93.184.216.34", "10.0.0.8"], ["fe80::1%eth0"]])
def test_a_name_of_a_private_address_is_refused(monkeypatch, addresses):
    """A public name is no cover: one private address among those it has is enough to refuse it."""
    resolving(monkeypatch, *addresses)
    with pytest.raises(WebError, match=r"rebind\.example is a private address"):
        Trust({}, allow_private=False).vet("https://rebind.example/x")


def test_a_name_that_is_looked_up_anew_does_not_lead_to_a_private_address(hubs, secure, monkeypatch):
    """Where vetting saw a public address and the connection goes to a private one, its answer is not used."""
    resolving(monkeypatch, "93.184.216.34")
    strict = Web(Trust({}, allow_private=False))
    with pytest.raises(WebError, match="localhost is a private address") as caught:
        get(strict, hubs.tls_url + "/x.safetensors")

    assert "--allow-private" in caught.value.hint
    assert get(secure, hubs.tls_url + "/x.safetensors") == DATA


def test_a_name_without_an_address_is_said(monkeypatch):
    """A name that nobody knows is an error that names it."""

    class Nothing:
        SOCK_STREAM = socket.SOCK_STREAM

        @staticmethod
        def getaddrinfo(*_args, **_kwargs):
            raise socket.gaierror

    monkeypatch.setattr("sdmerge_build.sources.trust.socket", Nothing)
    with pytest.raises(WebError, match=r"there is no host `nowhere\.example`, or no network"):
        Trust({}, allow_private=False).vet("https://nowhere.example/x")


def test_behind_a_proxy_names_are_its_business_and_addresses_are_ours(monkeypatch):
    """A proxy looks names up itself; a private address is refused all the same."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    trust = Trust({}, allow_private=False)
    trust.vet("https://name-that-only-the-proxy-knows.example/x")
    trust.vet_peer("https://name-that-only-the-proxy-knows.example/x", "10.0.0.1")
    for host in ("10.0.0.8", "[::1]", "localhost", "a.localhost"):
        with pytest.raises(WebError):
            trust.vet(f"https://{host}/x")


# ---------------------------------------------------------------- parts of files


@pytest.mark.parametrize(("start", "length"), [(0, 10), (0, 3000), (0, 9000), (100, 200), (2990, 500), (2999, 1)])
@pytest.mark.parametrize("fault", [None, ignore_range(), drop(), cut(1), wrong_range(), status(403), empty()], ids=str)
def test_a_part_of_a_file_is_read(hubs, web, start, length, fault):
    """Some bytes of a file are those bytes, and the size is that of the whole, whatever goes wrong once."""
    hubs.faults += [fault] if fault else []

    assert web.read(hubs.url + DOWNLOAD, start, length) == (DATA[start : start + length], len(DATA))


@pytest.mark.parametrize(("start", "length"), [(0, 10), (100, 200)])
def test_a_later_part_than_was_asked_for_is_not_taken(hubs, web, start, length):
    """A server that sends the file's end instead of the part, and says so, is asked again."""
    hubs.faults += [Fault("later", lambda answer: answer.window(1500, 1500))]

    assert web.read(hubs.url + DOWNLOAD, start, length) == (DATA[start : start + length], len(DATA))


def test_a_packed_answer_to_a_part_is_unpacked_or_refused(hubs, web):
    """A packed beginning is unpacked, without a size; a packed part from elsewhere is asked for again."""
    hubs.faults += [gzip()]
    assert web.read(hubs.url + DOWNLOAD, 0, 100) == (DATA[:100], None)
    hubs.faults += [gzip()]
    assert web.read(hubs.url + DOWNLOAD, 50, 100) == (DATA[50:150], len(DATA))


@pytest.mark.parametrize("fault", [unsatisfiable(), html(), wrong_range()], ids=str)
def test_a_part_that_never_comes_is_an_error(hubs, web, fault):
    """A server that never sends what was asked for is given up."""
    hubs.faults += [fault] * 50
    with pytest.raises(WebError):
        web.read(hubs.url + DOWNLOAD, 0, 100)

    assert len(hubs.requests) <= 20


def test_a_head_is_not_followed_elsewhere(hubs, web):
    """What a hub itself says of a file is in the answer that redirects to the CDN, which is not asked."""
    hubs.huggingface("o/r", "a" * 40, {"x.safetensors": DATA})
    assert web.head(f"{hubs.url}/o/r/resolve/main/x.safetensors")["x-linked-size"] == str(len(DATA))
    hubs.redirect("/old", "/o/r/resolve/main/x.safetensors")
    assert web.head(hubs.url + "/old")["x-linked-size"] == str(len(DATA))

    assert {(request.host, request.method) for request in hubs.requests} == {("api", "HEAD")}


@given(st.text(max_size=40))
def test_origins_are_told_apart(text):
    """An address with anything after its host has the host's origin, or none that could be another's."""
    try:
        origin = origin_of(f"https://hub.example{text}")
    except ValueError:
        return

    if text[:1] in {"", "/", "?", "#"}:
        assert origin == "https://hub.example:443"


def test_a_key_without_a_value_opens_nothing():
    """A key knows its name, and shows no value."""
    assert repr(Key("CIVITAI_TOKEN", CANARY)) == "Key(name='CIVITAI_TOKEN')"
