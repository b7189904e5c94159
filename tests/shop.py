"""The scratch project whose sources lie on hubs, and what those hubs are asked."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import httpx
import pytest
import torch
from conftest import Space, hubs  # noqa: F401  a fixture
from hubs import HubFile, Hubs, Request
from safetensors.torch import save

from sdmerge_build.build import build, plan_build
from sdmerge_build.events import Silent
from sdmerge_build.lock import Entry, lock_path, read_lock
from sdmerge_build.prepare import Options
from sdmerge_build.provision import Locked, fetch_sources, lock_sources
from sdmerge_build.report import Report
from sdmerge_build.sources import Found
from sdmerge_build.supply import Reach

COMMIT, LATER = "4479821af492b5b965b9388866a368ef04f6aff7", "172a0d503c459df6e691926f929a3bad7eb31927"
HEAD = 'recipe = 1\narchitecture = "sd1"\n\n'
VIEWER, MEINA = "civitai:7813@25845", "hf:Meina/MeinaPastel/MeinaPastelV4.safetensors@main"


@functools.cache
def model(seed: str, architecture: str = "sd1", every: int = 40, metadata: str = "") -> bytes:
    """Make the bytes of a checkpoint that other tools wrote."""
    tensors = checkpoints.miniature(architecture, seed, every=every)
    return save(tensors, {"format": "pt"} | ({"sd_merge_models": metadata} if metadata else {}))


@functools.cache
def pickled(seed: str) -> bytes:
    """Make the bytes of a checkpoint as they were before safetensors."""
    file = io.BytesIO()
    torch.save({"state_dict": checkpoints.miniature("sd1", seed, every=40)}, file)
    return file.getvalue()


def sha256(data: bytes) -> str:
    """Digest bytes."""
    return hashlib.sha256(data).hexdigest()


class Listening(Silent):
    """A watcher that remembers what a person would have been told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.begun: list[str] = []

    def started(self, what: str, _nbytes: int) -> None:
        """Remember what began."""
        self.begun.append(what)

    def note(self, message: str) -> None:
        """Remember a note."""
        self.notes.append(message)


class Shop(Space):
    """A project and its hubs."""

    def __init__(self, path: Path, hubs: Hubs) -> None:  # noqa: F811
        super().__init__(path)
        self.hubs, self.watcher = hubs, Listening()

    @property
    def env(self) -> dict[str, str]:
        """What a command needs to know of the hubs."""
        return {**self.hubs.env, "SSL_CERT_FILE": str(self.hubs.ca_file)}

    @property
    def lock_file(self) -> Path:
        """The recipe's lock."""
        return self.path / "recipe.lock"

    def put(self, name: str, data: bytes) -> Path:
        """Put a file into the project."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def on_civitai(self, data: bytes, name: str = "viewer.safetensors", model_id: int = 7813, version: int = 25845, **said: Any) -> None:
        """Publish a version of one file."""
        self.hubs.civitai(model_id, version, HubFile(id=version, name=name, data=data), **said)

    def on_huggingface(self, data: bytes, commit: str = COMMIT, name: str = "MeinaPastelV4.safetensors") -> None:
        """Push a commit of one file."""
        self.hubs.huggingface("Meina/MeinaPastel", commit, {name: data})

    def recipe(self, name: str = "recipe.toml", steps: str = "", **sources: str) -> Path:
        """Write a recipe that averages its sources; each is given by its fields, as TOML."""
        tables = "\n".join(f"[source.{source}]\n{fields}\n" for source, fields in sources.items())
        formula = " + ".join(f"{1 / len(sources)!r} * {source}" for source in sources)
        return self.write(name, HEAD + tables + (steps or f'\n[step.mix]\nformula = "{formula}"\n'))

    def _options(self, said: dict[str, Any]) -> Options:
        folders = {"folders": said.pop("models", ()), "jobs": said.pop("jobs", 2)}
        reach = Reach(**folders, allow_private=True, **{key: said.pop(key) for key in ("locked", "offline") if key in said})
        return Options(**{"store": self.path / "cache", "out": self.path / "out", "reach": reach} | said)

    def build(self, recipe: str = "recipe.toml", **said: Any) -> Report:
        """Build in this process."""
        return build(self.path / recipe, self._options(said), self.watcher)

    def plan(self, recipe: str = "recipe.toml", **said: Any) -> Report:
        """Say what would be built."""
        return plan_build(self.path / recipe, self._options(said), self.watcher)

    def lock(self, recipe: str = "recipe.toml", **said: Any) -> Locked:
        """Write the lock."""
        options = self._options(said)
        return lock_sources(self.path / recipe, options.store, options.reach, self.watcher)

    def fetch(self, recipe: str = "recipe.toml", **said: Any) -> dict[str, tuple[Found, bool]]:
        """Get the sources."""
        options = self._options(said)
        return fetch_sources(self.path / recipe, options.store, options.reach, self.watcher)

    def entries(self, recipe: str = "recipe.toml") -> dict[str, Entry]:
        """Read the lock."""
        return dict(read_lock(lock_path(self.path / recipe)).entries)

    def forget(self) -> None:
        """Forget what the hubs were asked, and what was noted."""
        self.hubs.requests.clear()
        self.watcher = Listening()

    @property
    def notes(self) -> str:
        """What a person was told, line by line."""
        return "\n".join(self.watcher.notes)

    def _data(self, *, ranged: bool) -> list[Request]:
        return [r for r in self.hubs.requests if r.host != "api" and r.method == "GET" and bool(r.headers.get("Range")) is ranged]

    @property
    def looks(self) -> list[Request]:
        """The requests for a part of a file."""
        return self._data(ranged=True)

    @property
    def downloads(self) -> list[Request]:
        """The requests for a whole file."""
        return self._data(ranged=False)


@pytest.fixture
def shop(tmp_path: Path, hubs: Hubs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:  # noqa: F811
    """A project without a recipe, and two hubs that have a checkpoint each; this process asks them, too."""
    clients: list[httpx.Client] = []

    class Client(httpx.Client):
        def __init__(self, *args: Any, **said: Any) -> None:
            super().__init__(*args, **said)
            clients.append(self)

    monkeypatch.setattr(httpx, "Client", Client)
    for variable in ("SDBUILD_STORE", "SDBUILD_MODELS", "CIVITAI_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    made = Shop(tmp_path, hubs)
    for variable, value in hubs.env.items():
        monkeypatch.setenv(variable, value)
    made.on_civitai(model("viewer"))
    made.on_huggingface(model("meina"))
    yield made
    for client in clients:  # a command leaves that to the end of its process
        client.close()


@pytest.fixture
def web(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """The same, with an https host that this process trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(shop.hubs.ca_file))
    return shop
