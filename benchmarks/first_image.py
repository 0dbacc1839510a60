"""Seconds from a fresh checkout to the first image, by the command of README.md, and what pip installs.

    python -m benchmarks.first_image

Clones this repository into an empty folder and runs the command there, with pip's cache off. The time of
the downloads is that of this machine's package index; the sizes are those of the wheels.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from benchmarks.report import ROOT, arguments, write


def command() -> str:
    """The marked line of README.md."""
    readme = (ROOT / "README.md").read_text("utf-8")
    return re.search(r"<!-- command: generate -->\n```sh\n(.*?)\n```", readme, re.S)[1]  # type: ignore[index]


def measure() -> dict[str, Any]:
    """Seconds of each part of the command, the sizes in MB, and the index that was used."""
    seconds, packages = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkout"
        parts = ["git clone --quiet", *command().split(" && ")]
        for part in parts:
            name = " ".join(part.split()[:2]).replace(".venv/bin/", "")
            run, where = shlex.split(part), place
            if part.startswith("git"):
                run, where = [*run, str(ROOT), str(place)], Path(folder)
            start = time.perf_counter()
            if "/pip " in part:
                run += ["--no-cache-dir", "--report", str(place / "report.json")]
            subprocess.run(run, cwd=where, check=True, capture_output=True)
            seconds[name] = round(time.perf_counter() - start, 2)
        for each in json.loads((place / "report.json").read_text("utf-8"))["install"]:
            packages[each["metadata"]["name"]] = each["metadata"]["version"]
            path = Path(unquote(urlparse(each["download_info"]["url"]).path))
            if each["metadata"]["name"] == "torch" and path.is_file():
                packages["torch wheel, MB"] = round(path.stat().st_size / 1e6)
        installed = sum(p.stat().st_size for p in (place / ".venv").rglob("*") if p.is_file())
    seconds["all"] = round(sum(seconds.values()), 2)
    return {"seconds": seconds, "installed_mb": round(installed / 1e6), "packages": packages}


def main() -> None:
    """Measure and write the figures."""
    args = arguments(__doc__, "first_image.json").parse_args()
    figures = {**measure(), "index": "a mirror on the machine's own network"}
    print(json.dumps(figures, indent=1))
    write(args.out, figures)


if __name__ == "__main__":
    main()
