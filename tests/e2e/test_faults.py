"""The real command against hubs that fail: killed, starved of disk, given other files, refused; and no secret in anything it writes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import NOWHERE, Space
from hubs import Fault, HubFile, Hubs, cut, drop, html, ignore_range, slow, status, well

RECIPE = """
recipe = 1
architecture = "generic"

[source.MeinaPastel]
uri = "{uri}"
{pin}

[step.mix]
formula = "0.5 * MeinaPastel + 0.5 * MeinaPastel"
"""
NAME = "meinapastel_v4AnimeIllustration.safetensors"
COMMIT = "4479821af492b5b965b9388866a368ef04f6aff7"
URI = "civitai:11866@27135"
CANARIES = {"CIVITAI_TOKEN": "canary-civitai-8d1f", "HF_TOKEN": "canary-hf-2ab7", "netrc": "canary-netrc-90c4"}


def checkpoint(seed: int, layers: int = 2, width: int = 1000) -> bytes:
    """Make a checkpoint whose size does not tell it from another."""
    values = torch.arange(width, dtype=torch.float32).add(seed).remainder(977).div(977).to(torch.float16)
    return safetensors.torch.save({f"layer.{n}.weight": values.clone() for n in range(layers)}, {"format": "pt"})


DATA, OTHER = checkpoint(1), checkpoint(2)
LARGE = checkpoint(3, 8, 500_000)


HASTY = "from sdmerge_build.sources import web; web.Web.wait = lambda *_: None"
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))"
BROKEN = """
from sdmerge_build.sources import web
def crash(*_args, **_kwargs):
    raise ZeroDivisionError("on purpose")
web.Web._check = crash
"""


class Shop:
    """A scratch project whose recipe asks for one file of a hub."""

    def __init__(self, space: Space, hubs: Hubs) -> None:
        self.space, self.hubs, self.path = space, hubs, space.path
        (self.path / "netrc").write_text(f"machine localhost login me password {CANARIES['netrc']}\n")
        self.env = {"SDBUILD_CIVITAI_URL": hubs.url, "HF_ENDPOINT": hubs.url.replace("127.0.0.1", "localhost")}

    def wants(self, data: bytes | None, uri: str = URI) -> None:
        """Write the recipe; without data, nothing is pinned."""
        self.space.write("recipe.toml", RECIPE.format(uri=uri, pin=f'sha256 = "{hashlib.sha256(data).hexdigest()}"' if data else ""))

    def run(self, *args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command."""
        return self.space.sdbuild(*args, "recipe.toml", "--allow-private", env=self.env | dict(env or {}))

    def run_after(self, code: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run `sdbuild fetch` in a process that has run this code before."""
        code += "\nimport sys; sys.argv[0] = 'sdbuild'; from sdmerge_build.__main__ import main; main()"
        surroundings = {key: value for key, value in os.environ.items() if not key.startswith(("SDBUILD_", "HF_", "CIVITAI_"))} | NOWHERE | self.env
        command = [sys.executable, "-c", code, "fetch", "recipe.toml", "--allow-private"]
        return subprocess.run(command, cwd=self.path, env=surroundings | dict(env or {}), capture_output=True, text=True, check=False, timeout=100)

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Start the command."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SDBUILD_", "HF_", "CIVITAI_"))} | NOWHERE | self.env
        command = [sys.executable, "-m", "sdmerge_build", *args, "recipe.toml", "--allow-private"]
        return subprocess.Popen(command, cwd=self.path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def source(self) -> bytes:
        """Read the only finished source of the store, and see that nothing else of it is left."""
        assert list((self.path / "cache" / "downloads").iterdir()) == []
        [path] = self.finished()
        return path.read_bytes()

    def finished(self) -> list[Path]:
        """List what lies in the store under a final name."""
        return [path for path in (self.path / "cache" / "sources").rglob("*") if path.is_file()]

    def parts(self) -> list[Path]:
        """List what is half-way."""
        return list((self.path / "cache" / "downloads").glob("*.part"))


@pytest.fixture
def shop(space: Space, hubs: Hubs) -> Shop:
    """Provide a project and a hub with its file."""
    hubs.civitai(11866, 27135, HubFile(id=1, name=NAME, data=DATA), name="MeinaPastel", version_name="V4")
    shop = Shop(space, hubs)
    shop.wants(DATA)
    return shop


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("faults", [[well(), cut(900), ignore_range() + cut(99), drop()], [cut(10), cut(2000), status(403)]], ids=str)
def test_faults_are_healed(shop, faults):
    """Connections that die and links that expire are healed, and the file in the store is the right one."""
    shop.hubs.faults += faults
    run = shop.run_after(HASTY)

    assert run.returncode == 0, run.stderr
    assert shop.source() == DATA


def killed(shop: Shop, at: int) -> None:
    """Start a slow download and kill it once so many bytes are on disk."""
    shop.hubs.faults[:] = [well(), slow(8_000_000, 60)]  # the first answer is for the header
    child = shop.start("fetch")
    deadline = time.monotonic() + 60
    while max((path.stat().st_size for path in shop.parts() if path.exists()), default=0) < at:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    child.communicate()
    shop.hubs.faults.clear()


def test_kill_9_twice_costs_little_more_than_one_download(shop):
    """
    SIGKILL in the middle, twice, with links that expire in between: the third run goes on where the second was, and the file is right.
    """
    shop.hubs.civitai(11866, 27135, HubFile(id=1, name=NAME, data=LARGE))
    shop.wants(LARGE)
    for at in (2_000_000, 5_000_000):
        killed(shop, at)
        assert shop.finished() == []
        assert len(shop.parts()) == 1
        shop.hubs.expire()
    shop.hubs.requests.clear()
    run = shop.run("fetch")

    assert run.returncode == 0, run.stderr
    assert shop.source() == LARGE
    sent = [request.sent for request in shop.hubs.requests if request.host == "cdn"]
    assert sum(sent) < len(LARGE) - 5_000_000 + 2_000_000  # the rest, and the header


def test_two_who_download_the_same_at_once_both_succeed(shop):
    """Two commands that need the same file have a part each, one file is left, and nothing else."""
    shop.hubs.faults += [well(), well(), slow(20_000, 0.3), slow(20_000, 0.3)]
    children = [shop.start("fetch") for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]

    assert [child.returncode for child in children] == [0, 0], outputs
    assert shop.source() == DATA


def test_a_full_disk_is_said_and_the_download_goes_on_later(shop):
    """A file that the system does not let grow ends with exit code 7; with more room, what arrived is not fetched again."""
    shop.hubs.civitai(11866, 27135, HubFile(id=1, name=NAME, data=LARGE))
    shop.wants(LARGE)
    run = shop.run_after(FULL)
    assert (run.returncode, shop.finished()) == (7, []), run.stderr
    assert "a file is larger than this system allows" in run.stderr
    [part] = shop.parts()
    assert part.read_bytes() == LARGE[: part.stat().st_size]
    have = part.stat().st_size
    again = shop.run("fetch")

    assert again.returncode == 0, again.stderr
    assert shop.source() == LARGE
    assert f"bytes={have}-" in [request.headers.get("Range") for request in shop.hubs.requests]


# ---------------------------------------------------------------- the wrong file


def test_another_file_of_the_same_name_and_size_is_refused(shop):
    """
    The wrong MeinaPastel: a file of the same name and size with other content is refused with both digests and with what it is.
    """
    assert len(DATA) == len(OTHER)
    shop.hubs.civitai(11866, 27135, HubFile(id=1, name=NAME, data=DATA, served=OTHER), name="MeinaPastel", version_name="V4")
    shop.hubs.civitai(1, 2, HubFile(id=9, name=NAME, data=OTHER), name="MeinaPastel", version_name="V4 without VAE")
    run = shop.run("fetch")

    assert run.returncode == 4
    for part in (hashlib.sha256(DATA).hexdigest(), hashlib.sha256(OTHER).hexdigest(), "MeinaPastel V4 without VAE (civitai:1@2)", "recipe.toml:5"):
        assert part in run.stderr
    assert (shop.finished(), shop.parts()) == ([], [])


def test_a_hub_that_lists_another_file_is_refused_before_it_is_downloaded(shop):
    """Where the hub itself says that the file is another one, both digests are quoted, and nothing is fetched."""
    shop.hubs.civitai(11866, 27135, HubFile(id=1, name=NAME, data=OTHER), name="MeinaPastel", version_name="V4 without VAE")
    run = shop.run("fetch")

    assert run.returncode == 4
    for part in (hashlib.sha256(DATA).hexdigest(), hashlib.sha256(OTHER).hexdigest(), "MeinaPastel V4 without VAE (civitai:11866@27135)"):
        assert part in run.stderr
    assert [request.host for request in shop.hubs.requests if request.host == "cdn"] == []
    assert (shop.finished(), shop.parts()) == ([], [])


# ---------------------------------------------------------------- refusals, and what is never written


def search(shop: Shop, run: subprocess.CompletedProcess[str], *, leaves: int) -> None:
    """Search everything that was written for a canary."""
    assert "canary" not in run.stdout + run.stderr
    written = [path for path in shop.path.rglob("*") if path.is_file() and path.name != "netrc"]
    assert len(written) > leaves
    for path in written:
        assert b"canary" not in path.read_bytes(), path
    assert not [request.path for request in shop.hubs.requests if "canary" in request.path]


def secrets(shop: Shop) -> dict[str, str]:
    """Name the canaries as a person does."""
    return {
        "CIVITAI_TOKEN": CANARIES["CIVITAI_TOKEN"],
        "HF_TOKEN": CANARIES["HF_TOKEN"],
        "NETRC": str(shop.path / "netrc"),
        "SSL_CERT_FILE": str(shop.hubs.ca_file),
    }


def shown(hubs: Hubs, host: str) -> set[str | None]:
    """Say which keys a host has seen."""
    return {request.headers.get("Authorization") for request in hubs.requests if request.host == host}


@pytest.mark.parametrize("command", [(), ("lock",), ("fetch",)], ids=str)
def test_tokens_go_to_their_hub_and_nowhere_else(shop, command):
    """Building, locking and fetching show each token to its own hub, and write none of them anywhere."""
    run = shop.run(*command, env=secrets(shop))
    assert run.returncode == 0, run.stderr
    assert shown(shop.hubs, "api") == {f"Bearer {CANARIES['CIVITAI_TOKEN']}"}
    search(shop, run, leaves=2)
    shop.hubs.requests.clear()
    shop.hubs.huggingface("Meina/MeinaPastel", COMMIT, {NAME: OTHER})
    shop.wants(OTHER, f"hf:Meina/MeinaPastel/{NAME}@main")
    run = shop.run(*command, env=secrets(shop))
    assert run.returncode == 0, run.stderr
    assert shown(shop.hubs, "api") == {f"Bearer {CANARIES['HF_TOKEN']}"}
    assert shown(shop.hubs, "cdn") == {None}
    search(shop, run, leaves=3)


def test_netrc_opens_a_host_that_is_no_hub(shop):
    """Login and password of a host's entry go to that host alone, and are written nowhere."""
    url = shop.hubs.https("/x.safetensors", DATA)
    shop.wants(DATA, url)
    run = shop.run("lock", env=secrets(shop))

    assert run.returncode == 0, run.stderr
    [key] = shown(shop.hubs, "tls")
    assert key is not None
    assert key.startswith("Basic ")
    assert shown(shop.hubs, "api") | shown(shop.hubs, "cdn") == set()
    search(shop, run, leaves=3)
    assert key.removeprefix("Basic ") not in run.stdout + run.stderr + (shop.path / "recipe.lock").read_text()


def test_a_crash_shows_no_token(shop):
    """What is printed when sdbuild itself is wrong holds no token, though a request with one was on its way."""
    run = shop.run_after(BROKEN, secrets(shop))

    assert "BUG:" in run.stderr
    assert "ZeroDivisionError" in run.stderr
    assert shown(shop.hubs, "api") == {f"Bearer {CANARIES['CIVITAI_TOKEN']}"}
    search(shop, run, leaves=0)


REFUSALS = {
    "login page": (None, "web page instead of the file"),
    "login page half-way": ([well(), cut(1500), html()], "web page instead of the file"),
    "expired for ever": ([status(403)] * 50, "the link that 127.0.0.1 gave is no longer good (403)"),
    "away": ("ftp://127.0.0.1/x", "redirects to `ftp:`, which is not followed"),
    "a circle": ("/api/download/models/27135", "redirects more than 5 times"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_write_no_token(shop, kind):
    """However a download is refused, the message says why, nothing gets a final name, and no token is written."""
    how, said = REFUSALS[kind]
    if how is None:
        shop.hubs.civitai(11866, 27135, HubFile(id=1, name=NAME, data=DATA), needs_token="another")  # noqa: S106
    elif isinstance(how, str):
        shop.hubs.redirect("/api/download/models/27135", how)
    else:
        shop.hubs.faults += [*([well()] if kind == "expired for ever" else []), *how]
    run = shop.run_after(HASTY, secrets(shop))

    assert run.returncode == 5, run.stderr
    assert said in run.stderr
    assert shop.finished() == []
    assert bool(shop.parts()) == (kind == "login page half-way")
    search(shop, run, leaves=0)
    if kind.startswith("login page"):
        assert "CIVITAI_TOKEN was sent, and does not open this file" in run.stderr


def test_a_file_that_needs_an_account_names_the_variable_and_comes_with_the_token(shop):
    """Without a token, the variable to set is named; with the right one, the file comes."""
    shop.hubs.civitai(11866, 27135, HubFile(id=1, name=NAME, data=DATA), needs_token=CANARIES["CIVITAI_TOKEN"])
    run = shop.run("fetch")
    assert run.returncode == 5
    assert "set CIVITAI_TOKEN" in run.stderr
    run = shop.run("fetch", env=secrets(shop))

    assert run.returncode == 0, run.stderr
    assert shop.source() == DATA


def test_private_addresses_need_permission(shop):
    """Without --allow-private, a hub that redirects to a private address is not followed."""
    run = shop.space.sdbuild("fetch", "recipe.toml", env=shop.env)

    assert run.returncode == 5
    assert "127.0.0.1 is a private address (127.0.0.1), which is not asked" in run.stderr
    assert "--allow-private" in run.stderr
    assert {request.host for request in shop.hubs.requests} == {"api"}


def test_a_secret_in_a_recipe_is_refused_without_being_quoted(shop):
    """An address with a token in it is a mistake in the recipe, and the message does not repeat it."""
    shop.wants(DATA, f"https://civitai.com/api/download/models/27135?token={CANARIES['CIVITAI_TOKEN']}")
    run = shop.run("fetch")

    assert run.returncode == 2
    assert "holds a secret" in run.stderr
    assert "canary" not in run.stdout + run.stderr
    assert shop.hubs.requests == []


def test_a_name_with_half_a_character_can_be_locked(shop):
    """A hub's texts may hold halves of characters, which no file can hold; they are locked all the same."""
    named = Fault(
        "named", lambda answer: answer.become(200, answer.data.replace(b'"MeinaPastel"', b'"Meina\\ud83d"'), Content_Type="application/json")
    )
    shop.hubs.api_faults += [named, named]
    run = shop.run("lock")

    assert run.returncode == 0, run.stderr
    assert 'model = "Meina?"' in (shop.path / "recipe.lock").read_text()
