"""Owns the addresses that sources come from: reads them, and names the page a person would open.

Has never heard of the network. Forms: `https:`, `civitai:MODEL@VERSION[#FILE]`, AIR urns, `hf:OWNER/REPO/FILE@REVISION`,
`recipe:OTHER.toml#STEP`. AIR: https://github.com/civitai/civitai/wiki/AIR; ecosystems are not compared, for hubs disagree on their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

__all__ = ["Address", "CivitaiAddress", "HttpsAddress", "HuggingFaceAddress", "RecipeAddress", "UriError", "page_of", "parse_uri", "without_secrets"]


_FORMS = "write https://…, civitai:MODEL@VERSION, hf:OWNER/REPO/FILE@REVISION or recipe:OTHER.toml#STEP"


class UriError(ValueError):
    """An address cannot be read; its text never quotes a secret. `hint` says what to write."""

    def __init__(self, what: str, hint: str = _FORMS) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class HttpsAddress:
    """A file at an address of its own."""

    url: str


@dataclass(frozen=True, slots=True)
class CivitaiAddress:
    """A version of a model on Civitai, and which of its files, where that is said."""

    model: int
    version: int
    file: int | None = None


@dataclass(frozen=True, slots=True)
class HuggingFaceAddress:
    """A file of a repository on Hugging Face, at a commit, tag or branch; no file means the only checkpoint there."""

    repo: str
    file: str
    revision: str


@dataclass(frozen=True, slots=True)
class RecipeAddress:
    """A step of another recipe; `file` is seen from the folder of the recipe that says so."""

    file: str
    step: str


Address = HttpsAddress | CivitaiAddress | HuggingFaceAddress | RecipeAddress

_CIVITAI = re.compile(r"civitai:(\d{1,12})@(\d{1,12})(?:#(\d{1,12}))?", re.ASCII)
_AIR = re.compile(
    r"(?:urn:)?(?:air:)?[a-z0-9_-]+:[a-z]+:(?P<hub>civitai|huggingface):(?P<model>[^@\s+:]+)@(?P<version>[^\s+:.]+)(?:\+(?P<file>\d{1,12}))?(?:\.\w+)?",
    re.IGNORECASE | re.ASCII,
)
_REPO = r"[\w.-]+/[\w.-]+"
_HF = re.compile(rf"hf:(?P<repo>{_REPO})/(?P<file>[^@\s?#]+)@(?P<revision>[\w./-]+)")
_CIVITAI_PAGE = re.compile(
    r"https://(?:www\.)?civitai\.com/models/(?P<model>\d{1,12})(?:/[^?#]*)?(?:\?(?:[^#]*&)?modelVersionId=(?P<version>\d{1,12})(?:&[^#]*)?|\?[^#]*)?(?:#.*)?"
)
_HF_PAGE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/(?!api/|datasets/|spaces/)(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)/?(?:tree/[^?#]*|(?:blob|resolve)/(?P<revision>[\w.-]+)/(?P<file>[^?#@\s%]+))?(?:[?#].*)?"
)
_RECIPE = re.compile(r"recipe:(?P<file>[^#]+\.toml)#(?P<step>\S+)")
_SECRETS = re.compile(
    r"(?i)token|secret|password|passwd|signature|credential|hmac|cookie|ticket|session|(?:api|access|auth|private|share|user|subscription|rl|s)[-_]?key"
    r"|^(?:sig|key|auth|authorization|jwt|bearer|pass|pwd|pw|sas|code|access-?code|otp|sid)$|^key-pair-id$"
)


def parse_uri(uri: str) -> Address:
    """Read an address. Raises `UriError`."""
    if not uri.isprintable():
        raise UriError(f"`{without_secrets(uri)[:200]!a}` holds characters that no address has")
    if match := _CIVITAI.fullmatch(uri):
        return CivitaiAddress(int(match[1]), int(match[2]), int(match[3]) if match[3] else None)
    if (match := _HF.fullmatch(uri)) and not {"", ".", ".."} & {part for name in ("repo", "file", "revision") for part in match[name].split("/")}:
        return HuggingFaceAddress(match["repo"], match["file"], match["revision"])
    if match := _RECIPE.fullmatch(uri):
        return RecipeAddress(match["file"], match["step"])
    if match := _AIR.fullmatch(uri):
        if match["hub"].casefold() == "huggingface" and re.fullmatch(_REPO, match["model"]) and not {".", ".."} & {*match["model"].split("/")}:
            return HuggingFaceAddress(match["model"], "", match["version"])
        if match["hub"].casefold() == "civitai" and re.fullmatch(r"\d{1,12}@\d{1,12}", f"{match['model']}@{match['version']}"):
            return CivitaiAddress(int(match["model"]), int(match["version"]), int(match["file"]) if match["file"] else None)
    if uri.startswith("https://"):
        plain = _https(uri)
        return _page(uri) or plain
    raise UriError(f"`{without_secrets(uri)[:200]}` is not an address sdbuild knows", _advice(uri))


def _page(uri: str) -> Address | None:
    """Read the addresses of pages on the hubs, as people copy them from a browser; those of files on other hosts are none."""
    if match := _CIVITAI_PAGE.fullmatch(uri):
        if match["version"]:
            return CivitaiAddress(int(match["model"]), int(match["version"]))
        raise UriError(f"`{without_secrets(uri)[:200]}` is a model's page, and a model has several versions", _advice(f"civitai:{match['model']}"))
    if match := _HF_PAGE.fullmatch(uri):
        if match["file"]:
            return HuggingFaceAddress(match["repo"], match["file"], match["revision"])
        advice = f"write hf:{match['repo']}/FILE@REVISION, or hf:{match['repo']}/model_index.json@REVISION for a diffusers folder"
        raise UriError(f"`{without_secrets(uri)[:200]}` is a repository's page, not a file", advice)
    return None


def _advice(uri: str) -> str:
    """Say what was probably meant."""
    scheme, _, rest = uri.partition(":")
    match scheme.lower():
        case "civitai" if re.fullmatch(r"\d+", rest):
            return f"add the version: civitai:{rest}@VERSION, the number behind `modelVersionId=` in the page's address"
        case "civitai" if "#" in rest:
            return "behind # stands the file's number; leave it out to be told which there are"
        case "hf" if "@" not in rest:
            return "add the revision, such as @main"
        case "http":
            return "only https: is downloaded from"
        case "recipe":
            return "write recipe:OTHER.toml#STEP"
        case "civitai" | "hf" if scheme != scheme.lower():
            return f"write {scheme.lower()}: in small letters"
    if uri.endswith((".safetensors", ".ckpt")) and not rest.startswith("//"):
        return "a file of your own is a `path`"
    return _FORMS


def _https(uri: str) -> HttpsAddress:
    try:
        parts = urlsplit(uri)
        is_sound = bool(parts.hostname) and parts.port != 0 and uri.isascii() and uri.isprintable() and " " not in uri
    except ValueError:
        is_sound = False
    if not is_sound:
        raise UriError(f"`{without_secrets(uri)[:200]}` is not an address that can be opened")
    said = parse_qsl(f"{parts.query}&{parts.fragment}".replace(";", "&"), keep_blank_values=True)
    if parts.username is not None or any(_SECRETS.search(name) for name, _ in said):
        raise UriError(f"`{without_secrets(uri)[:200]}` holds a secret, which would be published with every artifact; leave it out, and set a token")
    return HttpsAddress(uri)


def without_secrets(url: str) -> str:
    """Cut from an address what may hold a secret: user, query and fragment; a fragment of our own schemes is none."""
    plain = re.split(r"[?#]" if "://" in url else r"[?]", url, maxsplit=1)[0]
    return re.sub(r"://.*@", "://", plain, flags=re.DOTALL)


def page_of(uri: str) -> str:
    """Name the page of an address, for a message; a recipe's address is its own page. Raises `UriError`."""
    match parse_uri(uri):
        case CivitaiAddress(model, version):
            return f"https://civitai.com/models/{model}?modelVersionId={version}"
        case HuggingFaceAddress(repo, "", revision):
            return f"https://huggingface.co/{repo}/tree/{revision}"
        case HuggingFaceAddress(repo, file, revision):
            return f"https://huggingface.co/{repo}/blob/{revision}/{file}"
    return uri
