"""Sources in the hands of somebody hostile, or merely unlucky: files swapped between looks, prepared leftovers, damaged stores, odd surroundings."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import pytest
import torch
from conftest import PAIR, Space, states
from hubs import HubFile, Hubs
from safetensors.torch import load_file, save_file

from sdmerge_build.errors import IntegrityError, RecipeError
from sdmerge_build.sources.stock import Stock
from sdmerge_build.sources.trust import Trust, WebError
from sdmerge_build.sources.uri import UriError, parse_uri

COMMIT = "4479821af492b5b965b9388866a368ef04f6aff7"


@pytest.fixture
def pickled(space: Space):
    """A pair of which B is a pickle."""
    space.pair(PAIR.replace("B.safetensors", "B.ckpt"))
    torch.save({"state_dict": load_file(space.path / "B.safetensors")}, space.path / "B.ckpt")
    return space


@pytest.fixture
def sharded(space: Space):
    """A pair of which B lies in two shards."""
    space.pair(PAIR.replace("B.safetensors", "B.safetensors.index.json"))
    for name, data in shards(space).items():
        (space.path / name).write_bytes(data)
    return space


def shards(space: Space, change: float = 0.0) -> dict[str, bytes]:
    """Cut B into two shards with an index."""
    whole = load_file(space.path / "B.safetensors")
    names = sorted(whole)
    files = {}
    for n in range(2):
        held = {name: whole[name] + change if whole[name].is_floating_point() else whole[name] for name in names[n::2]}
        save_file(held, space.path / "one")
        files[f"B-{n}.safetensors"] = (space.path / "one").read_bytes()
    index = {"weight_map": {name: f"B-{n}.safetensors" for n in range(2) for name in names[n::2]}}
    return files | {"B.safetensors.index.json": json.dumps(index).encode()}


def test_a_pickle_swapped_after_it_was_hashed_is_refused(pickled, monkeypatch):
    """What is converted is what was hashed: another pickle in its place is noticed, and nothing is kept under the first one's digest."""
    from sdmerge_build.sources import foreign

    honest = foreign.owner_tag

    def swap():
        torch.save({"state_dict": checkpoints.miniature("sd1", "other", every=40)}, pickled.path / "B.ckpt")
        return honest()

    monkeypatch.setattr(foreign, "owner_tag", swap)
    with pytest.raises(IntegrityError, match="changed while it was being converted"):
        pickled.build()
    assert not list((pickled.path / "cache" / "sources").rglob("*.safetensors"))


def test_a_shard_swapped_after_it_was_hashed_is_refused(sharded, monkeypatch):
    """The same for the files of a sharded checkpoint."""
    from sdmerge_build.sources import foreign

    honest = foreign.owner_tag

    def swap():
        (sharded.path / "B-1.safetensors").write_bytes(shards(sharded, 0.5)["B-1.safetensors"])
        return honest()

    monkeypatch.setattr(foreign, "owner_tag", swap)
    with pytest.raises(IntegrityError, match="changed while it was being converted"):
        sharded.build()
    assert not list((sharded.path / "cache" / "sources").rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "folder"])
def test_a_converted_file_that_is_damaged_is_made_again(pickled, damage):
    """What the store keeps of a pickle is not believed for its name: damaged, it is converted once more, with the same result."""
    first = pickled.build().wishes[0].stored.sha256
    [made] = (pickled.path / "cache" / "sources").rglob("*.pickle1.safetensors")
    data = made.read_bytes()
    made.chmod(0o644)
    if damage == "folder":
        made.unlink()
        made.mkdir()
    else:
        made.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "flipped" else data[:-9])
    (pickled.path / "cache" / "artifacts").rename(pickled.path / "old")

    assert pickled.build().wishes[0].stored.sha256 == first


@pytest.mark.parametrize("pin", ['sha256 = "' + "00" * 32 + '"', "size = 1"])
def test_pins_of_one_file_are_refused_for_several(sharded, pin):
    """A digest or a size cannot pin a sharded checkpoint, and is not passed over."""
    sharded.edit('path = "B.safetensors.index.json"', f'path = "B.safetensors.index.json"\n{pin}')
    with pytest.raises(RecipeError, match="is several files"):
        sharded.build()


def test_files_that_an_earlier_download_left_are_verified(space: Space, hubs: Hubs):
    """A leftover of a sharded checkpoint's download counts only where it is what the hub says: a made-up one is downloaded anew."""
    space.pair()
    files = shards(space)
    hubs.huggingface("a/b", COMMIT, files)
    space.edit('path = "B.safetensors"', f'uri = "hf:a/b/B.safetensors.index.json@{COMMIT}"')
    stock = Stock(space.path / "cache")
    bundle = stock.bundle(f"https://huggingface.co/a/b/resolve/{COMMIT}/B.safetensors.index.json")
    forged = bundle.with_name(
        bundle.name.split(".")[0] + "." + bundle.name.split(".")[1].rpartition("-")[0].rpartition("-")[0] + "-999999999-x.bundle"
    )
    bundle.rename(forged)
    for name, data in shards(space, 0.5).items():
        (forged / name).write_bytes(data)
    run = space.sdbuild("lock", "recipe.toml", "--allow-private", env=hubs.env)
    assert run.returncode == 0, run.stderr
    plain = space.sdbuild("recipe.toml", "--locked", "--offline", "--json", env=hubs.env)
    space.edit(f'uri = "hf:a/b/B.safetensors.index.json@{COMMIT}"', 'path = "B.safetensors"')
    [artifact] = space.reports("recipe.toml", "--store", "other")

    assert json.loads(plain.stdout)["reports"][0]["artifacts"][0]["tensor_digest"] == artifact["tensor_digest"]
    assert not list((space.path / "cache" / "downloads").iterdir())


def test_a_prepared_part_that_is_a_link_is_not_followed(space: Space, hubs: Hubs):
    """A leftover that leads elsewhere is nobody's download: the file it names stays as it is."""
    space.pair()
    data = (space.path / "B.safetensors").read_bytes()
    hubs.civitai(1, 2, HubFile(id=3, name="B.safetensors", data=data))
    space.edit('path = "B.safetensors"', f'uri = "civitai:1@2"\nsha256 = "{hashlib.sha256(data).hexdigest()}"')
    (space.path / "B.safetensors").unlink()
    victim = space.path / "victim"
    victim.write_text("mine")
    with Stock(space.path / "cache").part("https://civitai.com/api/download/models/2", hashlib.sha256(data).hexdigest(), None) as part:
        key = part.path.name.split(".")[0]
    for suffix in ("part", "json"):
        (space.path / "cache" / "downloads" / f"{key}.released-1.{suffix}").symlink_to(victim)
    run = space.sdbuild("recipe.toml", "--allow-private", env=hubs.env)

    assert run.returncode == 0, run.stderr
    assert victim.read_text() == "mine"


def test_builds_that_start_at_once_all_succeed(space: Space, hubs: Hubs):
    """Several processes that download and convert the same at once do not take each other's files away."""
    space.pair(PAIR.replace("B.safetensors", "B.ckpt"))
    torch.save({"state_dict": load_file(space.path / "B.safetensors")}, space.path / "B.ckpt")
    data = (space.path / "A.safetensors").read_bytes()
    hubs.civitai(1, 2, HubFile(id=3, name="A.safetensors", data=data))
    space.edit('path = "A.safetensors"', f'uri = "civitai:1@2"\nsha256 = "{hashlib.sha256(data).hexdigest()}"')
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda n: space.sdbuild("recipe.toml", "--allow-private", "--out", f"out{n}", env=hubs.env), range(4)))

    assert [run.returncode for run in runs] == [0] * 4, [run.stderr for run in runs]


def test_what_several_sources_ask_for_is_downloaded_once(space: Space, hubs: Hubs):
    """Two sources of one address are one download."""
    space.pair()
    data = (space.path / "B.safetensors").read_bytes()
    hubs.civitai(1, 2, HubFile(id=3, name="B.safetensors", data=data))
    uri = f'uri = "civitai:1@2"\nsha256 = "{hashlib.sha256(data).hexdigest()}"'
    space.edit('path = "B.safetensors"', uri)
    space.edit('path = "A.safetensors"', uri)
    run = space.sdbuild("fetch", "recipe.toml", "--allow-private", env=hubs.env)

    assert run.returncode == 0, run.stderr
    whole = [r for r in hubs.requests if r.host == "cdn" and r.method == "GET" and not r.headers.get("range")]
    assert len(whole) == 1


def test_a_pickle_without_a_suffix_is_found_again(pickled, hubs: Hubs):
    """A pickle from an address that names no suffix is kept as what it is, and is there offline."""
    data = (pickled.path / "B.ckpt").read_bytes()
    uri = hubs.https("/download/12345", data)
    pickled.edit('path = "B.ckpt"', f'uri = "{uri}"\nsha256 = "{hashlib.sha256(data).hexdigest()}"')
    env = {"SSL_CERT_FILE": str(hubs.ca_file)}
    assert pickled.sdbuild("recipe.toml", "--allow-private", env=env).returncode == 0
    (pickled.path / "cache" / "artifacts").rename(pickled.path / "old")

    assert pickled.sdbuild("recipe.toml", "--offline", env=env).returncode == 0


@pytest.mark.parametrize(
    "surroundings",
    [
        {"HF_ENDPOINT": "http://127.0.0.1:99999"},
        {"SDBUILD_CIVITAI_URL": "http://[::1"},
        {"SDBUILD_CIVITAI_URL": "foo"},
        {"HF_ENDPOINT": "file:///etc"},
        {"HTTPS_PROXY": "socks5://127.0.0.1:1", "HTTP_PROXY": "socks5://127.0.0.1:1"},
        {"HTTPS_PROXY": "http://u:p@x:abc", "HTTP_PROXY": "http://u:p@x:abc"},
        {"HTTPS_PROXY": "foo://x", "HTTP_PROXY": "foo://x"},
        {"NETRC": "/dev/zero"},
        {"SSL_CERT_FILE": "/nowhere.pem"},
    ],
    ids=str,
)
def test_nonsense_in_the_environment_is_a_plain_error(space: Space, surroundings):
    """Odd mirrors, proxies, certificates and netrc files end in one message, without a traceback and without waiting for ever."""
    space.pair()
    space.edit('path = "B.safetensors"', f'uri = "civitai:1@2"\nsha256 = "{"ab" * 32}"')
    run = space.sdbuild("recipe.toml", env=surroundings)

    assert run.returncode in {2, 5}
    assert "Traceback" not in run.stderr
    assert run.stderr.count("error: ") == 1


def test_a_token_is_not_shown_to_a_proxy_in_the_clear(monkeypatch):
    """A mirror on loopback is safe without TLS only as long as nobody stands between."""
    trust = Trust({"CIVITAI_TOKEN": "http://127.0.0.1:1"}, allow_private=True)
    monkeypatch.setenv("CIVITAI_TOKEN", "canary")
    assert trust.key_of("http://127.0.0.1:1/x").value == "Bearer canary"
    monkeypatch.setenv("HTTP_PROXY", "http://other:1")
    monkeypatch.setenv("http_proxy", "http://other:1")
    monkeypatch.delenv("NO_PROXY", raising=False)

    assert trust.key_of("http://127.0.0.1:1/x").value == ""


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0x7f000001", "localhost.", "169.254.169.254."])
def test_private_addresses_are_refused_behind_a_proxy_in_any_spelling(host, monkeypatch):
    """What is an address to some system is judged as one, proxy or not."""
    monkeypatch.setenv("https_proxy", "http://other:1")
    with pytest.raises(WebError, match="is a private address"):
        Trust({}, allow_private=False).vet(f"https://{host}/")


def test_a_host_that_goes_past_the_proxy_is_vetted(monkeypatch):
    """Who decides whether there is a proxy also decides whom we may reach: NO_PROXY with a port counts for both."""
    monkeypatch.setenv("https_proxy", "http://other:1")
    monkeypatch.setenv("no_proxy", "name.example:8443")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", 8443))])
    with pytest.raises(WebError, match="is a private address"):
        Trust({}, allow_private=False).vet("https://name.example:8443/")


@pytest.mark.parametrize("query", ["rlkey=a", "authkey=a", "code=a", "sas=a", "JSESSIONID=a", "subscription-key=a", "hmac=a"])
def test_more_names_of_secrets_are_known(query):
    """Addresses that hold what opens them for one person are refused, whoever named the parameter."""
    with pytest.raises(UriError):
        parse_uri(f"https://example.org/x.safetensors?{query}")


def test_half_made_conversions_of_dead_processes_are_swept(pickled):
    """What a killed conversion left is gone after the next build."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True).stdout.strip()
    from sdmerge_build.files import owner_tag

    folder = pickled.path / "cache" / "sources" / "ab"
    folder.mkdir(parents=True)
    left = folder / f".{owner_tag().replace(f'-{os.getpid()}-', f'-{dead}-')}.making"
    left.write_bytes(b"half")

    assert states(pickled.build()) == {"mix": "built"}
    assert not left.exists()


def test_reading_a_download_again_does_not_put_it_on_disk(space: Space, monkeypatch):
    """What is vouched for until the system stops stays so when more is learned of it: after a restart it is hashed anew."""
    from sdmerge_build.files import Snapshot
    from sdmerge_build.sources import memo as module
    from sdmerge_build.sources.hashing import Digests

    path = space.checkpoint("A", {"w": torch.zeros(4)})
    memo, snapshot = module.Memo(space.path / "digests.json"), Snapshot.of(path)
    monkeypatch.setattr(module, "boot_id", lambda: "today")
    memo.remember(path, Digests(tensors="ab" * 32, blake3="cd" * 32), snapshot, "today")
    memo.remember(path, Digests(tensors="ab" * 32, sha256="ef" * 32), snapshot)
    assert memo.recall(path) == Digests(tensors="ab" * 32, sha256="ef" * 32, blake3="cd" * 32)
    monkeypatch.setattr(module, "boot_id", lambda: "tomorrow")

    assert memo.recall(path) is None


def test_a_memo_that_knows_no_tensors_of_a_checkpoint_is_no_knowledge(space: Space):
    """A safetensors file of which only the whole is remembered is read for its tensors; nothing is merged under an empty digest."""
    space.pair()
    first = space.build().wishes[0].stored.sha256
    memo = space.path / "cache" / "digests.json"
    table = json.loads(memo.read_text())
    for entry in table["files"].values():
        entry["digests"]["tensors"] = ""
    memo.write_text(json.dumps(table))
    (space.path / "cache" / "artifacts").rename(space.path / "old")

    assert space.build().wishes[0].stored.sha256 == first
