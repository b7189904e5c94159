"""Owns signatures of release folders: OpenSSF model signing, over every file of the folder.

Has never heard of manifests. The package that signs is an extra, and is imported only when somebody signs.
"""

from __future__ import annotations

import contextlib
import importlib
import uuid
from pathlib import Path
from typing import Any

from sdmerge_build.errors import Issue, SdbuildError
from sdmerge_build.files import read_regular, sync_folder

__all__ = ["SIGNATURE", "refuse_unsigned", "sign"]

SIGNATURE = "model.sig"


def sign(folder: Path, key: Path | None = None) -> Path:
    """Sign all files of a release folder and return the signature in it, `model.sig`; an older signature is replaced.

    With `key`, a private elliptic key (PEM: P-256, P-384 or P-521); otherwise through Sigstore, which asks in a browser who signs.
    Raises `SdbuildError` where the extra is not installed, or nothing could be signed.
    """
    hashing, signing = _packages()
    signature = folder / SIGNATURE
    part = folder.parent / f".{SIGNATURE}.{uuid.uuid4().hex}.part"  # beside the folder, whose every file is signed
    try:
        config = signing.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=[signature.resolve()], ignore_git_paths=True))
        config = config.use_elliptic_key_signer(private_key=key) if key else config.use_sigstore_signer()
        config.sign(folder.resolve(), part)
        part.replace(signature)
    except Exception as error:  # whatever keys, networks and identity providers raise
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        hint = f"--sign KEY wants a private elliptic key in PEM, without a password; is `{key.name}` one?" if key else "sign with a key of your own"
        raise SdbuildError(Issue(where=str(folder), what=f"cannot be signed: {type(error).__name__}: {error}", hint=hint)) from error
    sync_folder(folder)
    return signature


def refuse_unsigned(key: Path | None) -> None:
    """Raise `SdbuildError` where nothing can be signed, before anything is built: the extra is not installed, or there is no such key."""
    hint = "--sign wants a private elliptic key in PEM without a password, as `openssl ecparam -genkey -name prime256v1 -noout` makes one"
    if key and not key.is_file():
        raise SdbuildError(Issue(where=str(key), what="there is no such key", hint=f"{hint}, or the word sigstore"))
    _packages()
    if key and not _is_elliptic(key):
        raise SdbuildError(Issue(where=str(key), what="this is no key that can sign", hint=hint))


def _is_elliptic(key: Path) -> bool:
    """Tell whether a file holds a private elliptic key; the library that reads it comes with the one that signs."""
    serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
    elliptic = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    try:
        return isinstance(serialization.load_pem_private_key(read_regular(key, 1 << 20), password=None), elliptic.EllipticCurvePrivateKey)
    except (OSError, ValueError, TypeError):  # TypeError: it has a password
        return False


def _packages() -> tuple[Any, ...]:
    try:
        return tuple(importlib.import_module(f"model_signing.{name}") for name in ("hashing", "signing"))
    except ImportError as error:
        what = "signing needs a package that is not installed"
        raise SdbuildError(Issue(where="--sign", what=what, hint='pip install "sdbuild[sign]"')) from error
