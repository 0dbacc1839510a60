"""Chooses and downloads the files of a pipeline from the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from zimage_core.config import COMPONENTS, OPTIONAL_COMPONENTS
from zimage_core.errors import BadArgument, BadFile, Unsupported, printable
from zimage_core.files.model_names import SUFFIXES, parse

REPO_ID = re.compile(r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?::(?P<tag>[\w.-]{1,64}))?")
"""org/repo, or org/repo:Q4_K_M as llama.cpp and Ollama write it."""

TIMEOUT = 10.0
"""Seconds to wait for the Hub's list of files."""

_NO_FOLDER = "there is no such folder here, and as a repository of the Hub"

_TAG = re.compile(
    r"(?:^|[-_.])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4|NVFP4|BF16|FP?16|FP?32|FP8[A-Z0-9_]*))(?=[-.]|$)",
    re.IGNORECASE,
)
_FOLDERS = (*COMPONENTS, *OPTIONAL_COMPONENTS, "tokenizer", "scheduler", "siglip_processor")
_TEXTS = (".json", ".txt", ".model")


def quant_tag(name: str) -> str | None:
    """The quantisation in a file's name, e.g. "Q4_K_M", or None; only used to choose files to download."""
    found = _TAG.findall(Path(name).stem)
    return str(found[-1]).upper() if found else None


def select(files: Sequence[str], tag: str | None, repo: str, variant: str | None = None) -> list[str]:
    """Choose the files of a repository that a pipeline needs.

    From a diffusers repository these are the folders of its components; from any other, its safetensors
    files, its GGUF files of the wanted quantisation, and its small text files.

    Args:
        files: Names of all files of the repository.
        tag: The wanted quantisation, e.g. "Q4_K_M"; None if there is only one.
        repo: The repository, for messages.
        variant: The wanted variant of a diffusers repository, e.g. "fp16"; None for files without one.

    Raises:
        BadArgument: There are several quantisations and no tag, or none has that tag; the message lists them.
    """
    weights = [f for f in files if f.lower().endswith(SUFFIXES)]
    if tag is None and "model_index.json" in files:
        inside = [
            f for f in files if f.split("/")[0] in _FOLDERS and f.lower().endswith((*SUFFIXES, *_TEXTS))
        ]
        return ["model_index.json", *_of_variant(inside, variant)]
    tags = sorted({t for f in weights if f.lower().endswith(".gguf") and (t := quant_tag(f))})
    if tag is None and len(tags) > 1:
        raise BadArgument(
            f"{repo} has {len(tags)} quantisations: choose one, e.g. {repo}:{tags[0]}; {_listed(tags)}"
        )
    if tag is not None and tag.upper() not in {quant_tag(f) for f in weights}:
        raise BadArgument(f"{repo} has no file of quantisation {tag}; it has {_listed(tags) or 'none'}")
    wanted = (None, tag.upper() if tag else None)
    chosen = [f for f in weights if tag is None or not f.lower().endswith(".gguf") or quant_tag(f) in wanted]
    return chosen + [f for f in files if f.endswith(_TEXTS)]


def _of_variant(files: Sequence[str], variant: str | None) -> list[str]:
    """The files without the weights of other variants; a folder without the variant keeps its plain ones."""
    variants: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        if (parsed := parse(name)) is not None:
            variants.setdefault(folder, set()).add(parsed.variant)
    found = []
    for file in files:
        folder, _, name = file.rpartition("/")
        parsed = parse(name)
        have = variants.get(folder, set())
        wish = variant if variant in have else "" if "" in have else None
        if parsed is None or wish is None or parsed.variant == wish:
            found.append(file)
    return found


def fetch(
    source: str,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
) -> Path:
    """Download the files of a pipeline into the cache, unless they are there, and return their folder.

    Nothing is downloaded when HF_HUB_OFFLINE is set.

    Args:
        source: "org/repo" or "org/repo:TAG".
        revision: Branch, tag or commit.
        cache_dir: Folder to use instead of the Hub's own cache.
        token: Access token of a user who may read the repository.
        local_files_only: Download nothing, as if HF_HUB_OFFLINE were set.
        variant: The variant of the files, as for `select`.

    Raises:
        Unsupported: The package huggingface_hub is not installed.
        BadArgument: `source` is not a repository's name, or the tag does not exist.
        BadFile: The repository cannot be reached and is not in the cache.
    """
    match = REPO_ID.fullmatch(source)
    if match is None:
        raise BadArgument(
            f"{printable(source)!r} is neither a folder here nor a repository's name; give a folder, "
            "org/repo, org/repo:Q4_K_M, or default for the embedded model"
        )
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise Unsupported(
            f"{source} is no folder here, and to fetch it from the Hub: pip install zimage_core[hub]"
        ) from None
    repo, tag = match["repo"], match["tag"]
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    if constants.HF_HUB_OFFLINE or local_files_only:
        local = _cached(repo, where)
        if local is None:
            asked = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
            fault = f"{_NO_FOLDER} it is not in the cache and {asked} is set"
            raise BadFile(source, fault, "unset it or give a folder")
        return local
    try:
        # asked once, where list_repo_files would try again for half a minute
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, token=token, timeout=TIMEOUT)
        files = [file.rfilename for file in info.siblings or ()]
    except Exception as error:
        # the errors of requests, httpx and the package itself have no narrower base class in common
        reason = _first_line(error)
        local = _cached(repo, where)
        if local is None:
            fault = f"{_NO_FOLDER} it is not in the cache and cannot be asked for: {reason}"
            raise BadFile(source, fault, "check the path, or the network and your token") from error
        return local
    chosen = select(files, tag, repo, variant)
    try:
        patterns = [_escape(f) for f in chosen]
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns, token=token, **where))
    except Exception as error:
        fault = f"could not be downloaded: {_first_line(error)}"
        raise BadFile(repo, fault, "try again; what arrived is kept") from error


def _cached(repo: str, where: Mapping[str, Any]) -> Path | None:
    """Folder of the files that were downloaded earlier, or None."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True, **where))
    except LocalEntryNotFoundError as error:
        # the Hub's package calls a snapshot incomplete if only the chosen files were downloaded
        folder = Path(getattr(error, "snapshot_path", None) or "")
        return folder if folder.is_absolute() and folder.is_dir() else None


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0] or type(error).__name__)


def _escape(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _listed(tags: Sequence[str]) -> str:
    return ", ".join(tags[:20]) + (", ..." if len(tags) > 20 else "")
