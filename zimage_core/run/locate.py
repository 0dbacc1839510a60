"""Finds what a user means by the name of a model: a folder, a file, the embedded model, a repository.

Nothing here loads torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from zimage_core.assets import named
from zimage_core.errors import BadFile, printable
from zimage_core.files import hub


def locate(
    source: str | os.PathLike[str], hub_options: Mapping[str, Any] | None = None, variant: str | None = None
) -> tuple[Path, str | None]:
    """The folder or file of a model, which is fetched first if it is a repository.

    A folder that exists comes before the embedded model and before a repository of its name. A path below a
    folder that exists is never looked for on the Hub.

    Args:
        source: Folder, file, "default" or repository "org/repo[:Q4_K_M]".
        hub_options: Options for `hub.fetch`.
        variant: The variant of the files, which is all that is fetched.

    Returns:
        The path, and the quantisation that the name of a repository asks for.

    Raises:
        BadFile: There is no such folder, file or repository.
    """
    path = Path(named(source))
    if os.fspath(source) and path.exists():  # "" would be the working folder
        return path, None
    tag = hub.REPO_ID.fullmatch(os.fspath(source))
    parent = os.fspath(source).partition("/")[0]
    alike = _alike(Path(tag["repo"]) if tag else path)
    if tag is None and alike:
        raise BadFile(path, "there is no such folder or file", alike)
    if tag is not None and Path(parent).is_dir():
        fault = (
            "there is no such folder or file, and no repository of the Hub is meant, "
            f"since {printable(parent)} is a folder here"
        )
        raise BadFile(path, fault, alike or "check the path")
    folder = hub.fetch(os.fspath(source), **(hub_options or {}), variant=variant)
    return folder, tag["tag"] if tag else None


def _alike(path: Path) -> str:
    """The name beside a path that does not exist which is most like its own; "" if there is none."""
    names: list[str] = []
    with suppress(OSError):  # a parent that is not there, or is not ours to read
        names = [each.name for each in islice(path.parent.iterdir(), 1000)]
    return "".join(
        f"did you mean {printable(path.with_name(name))}?" for name in get_close_matches(path.name, names, 1)
    )
