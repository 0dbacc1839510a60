"""Lets mkdocstrings see zimage_core.kernels and zimage_core.reference, which have no `__init__.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import griffe


class LinkedFolders(griffe.Extension):
    """Adds the modules of the two linked folders to the package, where griffe leaves them out."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Visit each file of the folders, once the package itself is there."""
        if pkg.path != "zimage_core":
            return
        for name in ("kernels", "reference"):
            folder = Path(str(pkg.filepath)).parent / name
            package = griffe.Module(name, filepath=folder / "__init__.py", parent=pkg)
            pkg.set_member(name, package)
            for path in sorted(folder.glob("*.py")):
                found = griffe.visit(
                    path.stem,
                    filepath=path,
                    code=path.read_text("utf-8"),
                    extensions=loader.extensions,
                    parent=package,
                    lines_collection=loader.lines_collection,
                    modules_collection=loader.modules_collection,
                )
                package.set_member(path.stem, found)
