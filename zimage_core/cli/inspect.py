"""`zimage inspect FILE...`: what a file is, without loading it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from zimage_core.assets import named
from zimage_core.errors import ZImageError, printable
from zimage_core.files.units import in_bytes, in_count
from zimage_core.weights.inspection import PARTS, Inspection, dumps, inspect_file


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "inspect",
        parents=[common],
        help="say what a file is, what it holds and what it lacks",
        description="Say what a file or folder is, what it holds and what it lacks to make an image.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="GGUF, safetensors, folder, tokenizer.json, imatrix, config, recipe or PNG",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--full", action="store_true", help="read all data and warn of NaN, infinity, fp16 overflow, zeros"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Describe every file; one that cannot be read does not keep the others from being described."""
    found: list[Inspection] = []
    status = 0
    for path in args.files:
        try:
            inspection = inspect_file(named(path), full=args.full)
        except ZImageError as error:
            if args.traceback:
                raise
            sys.stdout.flush()
            sys.stderr.write(f"error: {printable(error, 2000)}\n")
            status = 1
            continue
        if args.json:
            found.append(inspection)
        else:
            sys.stdout.write("\n".join(describe(inspection, args.tensors)) + "\n")
    if args.json and found:
        sys.stdout.write(dumps(found, args.tensors) + "\n")
    return status


def describe(item: Inspection, tensors: bool = False, indent: str = "") -> list[str]:
    """An inspection as lines of text; whatever came from the file is escaped."""
    lines = [
        f"{printable(item.path)}: {printable(item.title, 400)}, {item.container}, {in_bytes(item.nbytes)}"
    ]
    if item.container == "png":
        lines += _settings(item)
    elif item.config:
        facts = (
            f"{key}={printable(list(value) if isinstance(value, tuple) else value, 100)}"
            for key, value in item.config.items()
            if value is not None
        )
        lines.append(f"  config    {', '.join(facts)}")
    for entry in item.types:
        amount = f"{entry.tensors} tensors, {in_count(entry.weights)} weights, {in_bytes(entry.nbytes)}"
        lines.append(f"  {entry.format:<9} {amount}")
    lines += _metadata(item)
    lines += [f"  note      {printable(note, 1000)}" for note in item.notes]
    if item.problem:
        lines.append(f"  problem   {printable(item.problem, 4000)}")
    lines += [f"  warning   {printable(warning, 1000)}" for warning in item.warnings]
    if item.usable and item.kind in (*PARTS, "pipeline", "collection"):
        lines.append(f"  to run    {_to_run(item)}")
    if tensors:
        width = min(60, max(map(len, item.tensors), default=0))
        lines += [
            f"    {printable(name, 1024):<{width}}  {fmt:<8} {list(shape)}  {in_bytes(nbytes)}"
            for name, (fmt, shape, nbytes) in item.tensors.items()
        ]
    for part in item.parts:
        lines += describe(part, tensors, "  ")
    return [indent + line for line in lines]


def _to_run(item: Inspection) -> str:
    if item.kind == "pipeline":
        return "nothing is missing: zimage generate PROMPT --model FOLDER"
    if not item.needs:
        return "nothing is missing"
    return "needs also " + ", ".join(name.replace("_", " ") for name in item.needs)


def _metadata(item: Inspection) -> list[str]:
    if item.container == "png" or not item.metadata:
        return []
    shown = [key for key in item.metadata if key.startswith("general.")][:12]
    pairs = ", ".join(f"{printable(key, 60)}={printable(item.metadata[key], 60)}" for key in shown)
    return [f"  metadata  {len(item.metadata)} keys{': ' + pairs if pairs else ''}"]


def _settings(item: Inspection) -> list[str]:
    """The texts of an image: line by line, JSON indented."""
    lines: list[str] = []
    for keyword, text in item.metadata.items():
        lines.append(f"  {printable(keyword, 80)}")
        shown = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, indent=2)
        lines += [f"    {printable(line, 20_000)}" for line in shown.split("\n")]
    return lines
