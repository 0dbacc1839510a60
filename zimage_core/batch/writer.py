"""The writer of a dataset, which alone touches its folder.

A finished image is on the disk at once: its record in `.zimage-batch/`, its PNG beside that or, in the format
png, at its final place. Images become part of the dataset in the order of the rows, whatever order they were
finished in, so the shards of one process, of several, and of a run that was killed and started again are
equal. A line of index.jsonl makes an image part of the dataset; it is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zimage_core.batch.folder import Folder
from zimage_core.batch.shards import PNG, SHARDS, Sample, as_json
from zimage_core.batch.worker import Done, Failed, Row
from zimage_core.errors import BadFile
from zimage_core.files.atomic import atomic_file, write_atomically

PACKING = "packing.json"
"""What is being packed: written before a shard, removed after its lines are in the index."""


class Writer:
    """Writes the images of a run into a folder, and takes up what an earlier run left there.

    Args:
        out: The folder; new, empty, or that of an earlier run.
        form: One of `shards.FORMATS`.
        shard_size: Images of a shard.

    Raises:
        BadFile: The folder holds something else or another format, is in use, or cannot be written.
    """

    def __init__(self, out: Path, form: str, shard_size: int) -> None:
        self.folder = Folder(out, form)
        self._form, self._size = form, shard_size
        self._staged: dict[str, Sample] = {}  # finished, not yet in the index, by key
        self._failed: dict[str, Failed] = {}
        self._order: list[str] = []
        self._next = 0
        self._ready: list[Sample] = []
        try:
            self._finish_packing()
            self._take_up()
        except BaseException:
            self.folder.close()
            raise

    def begin(self, rows: Iterable[Row]) -> list[Row]:
        """Tell the rows of this run, in their order.

        Returns:
            Those whose images are not finished yet; of equal rows the first.
        """
        wanted: list[Row] = []
        known: set[str] = set()
        for row in rows:
            if row.key in known or row.key in self.folder.done:
                continue
            known.add(row.key)
            self._order.append(row.key)
            if row.key not in self._staged:
                wanted.append(row)
        return wanted

    def add(self, outcome: Done | Failed) -> None:
        """Take an image, or the failure of a row, in any order.

        Raises:
            BadFile: The disk is full, or refuses to be written.
        """
        key = outcome.row.key
        if isinstance(outcome, Failed):
            self._failed[key] = outcome
        elif key not in self._staged and key not in self.folder.done:
            self._staged[key] = self._stage(outcome)
        self._advance()

    def finish(self) -> None:
        """Pack what is left, after the last row."""
        self._advance()
        packed = {sample.name for sample in self._ready}
        rest = [sample for sample in self._staged.values() if sample.name not in packed]
        self._ready += sorted(rest, key=lambda sample: sample.name)  # of rows that are no longer in the table
        while self._ready:
            self._pack()

    def close(self) -> None:
        """Write failures.jsonl, and let another process use the folder."""
        try:
            path = self.folder.out / "failures.jsonl"
            if self._failed:
                lines = ({"row": f.row.number, "key": f.row.key, "reason": f.reason, "call": dict(f.row.call)}
                         for f in self.failures())  # fmt: skip
                write_atomically(path, (as_json(line) + b"\n" for line in lines), overwrite=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            self.folder.close()

    def failures(self) -> tuple[Failed, ...]:
        """Rows that failed, by their number."""
        return tuple(sorted(self._failed.values(), key=lambda failed: failed.row.number))

    # --- one image ---

    def _stage(self, done: Done) -> Sample:
        name = f"{done.row.number:08d}-{done.row.key[:16]}"
        settings = done.settings
        record: dict[str, Any] = {
            "row": done.row.number,
            "key": done.row.key,
            "prompt": settings.get("prompt", ""),
            "seed": settings.get("seed"),
            "settings": dict(settings),
        }
        if done.row.kept:
            record["columns"] = dict(done.row.kept)
        sample = Sample(name, self._png(name), record)
        # the PNG last: where it is, the record is too
        write_atomically(self.folder.work / f"{name}.json", as_json(record), overwrite=True)
        write_atomically(sample.png, done.png, overwrite=True)
        return sample

    def _png(self, name: str) -> Path:
        return (self.folder.out if self._form == PNG else self.folder.work) / f"{name}.png"

    def _advance(self) -> None:
        """Take finished images in the order of the rows, up to the first that is neither done nor failed."""
        while self._next < len(self._order):
            key = self._order[self._next]
            if key in self._staged:
                self._ready.append(self._staged[key])
            elif key not in self._failed:
                break
            self._next += 1
            if len(self._ready) >= (1 if self._form == PNG else self._size):
                self._pack()

    # --- a shard ---

    def _pack(self) -> None:
        """Make the first images that are ready part of the dataset."""
        if self._form == PNG:
            samples = self._ready
            self._enter([(sample, sample.png.name) for sample in samples])
        else:
            samples = self._ready[: self._size]
            pattern, write = SHARDS[self._form]
            number = self.folder.shards
            while os.path.lexists(self.folder.out / pattern.format(number)):
                number += 1
            name = pattern.format(number)
            names = [sample.name for sample in samples]
            journal = as_json({"file": name, "names": names})
            write_atomically(self.folder.work / PACKING, journal, overwrite=True)
            with atomic_file(self.folder.out / name) as out:
                write(out, samples)
            self._enter([(sample, name) for sample in samples])
            self.folder.shards = number + 1
            (self.folder.work / PACKING).unlink()
        self._ready = self._ready[len(samples) :]

    def _enter(self, samples: Sequence[tuple[Sample, str]]) -> None:
        """Write the lines of the index, then remove what was kept until now."""
        fresh = [(sample, file) for sample, file in samples if sample.record["key"] not in self.folder.done]
        self.folder.append([{**sample.record, "file": file} for sample, file in fresh])
        for sample, _ in samples:
            self._forget(sample)

    def _forget(self, sample: Sample) -> None:
        self._staged.pop(sample.record["key"], None)
        if self._form != PNG:
            sample.png.unlink(missing_ok=True)
        (self.folder.work / f"{sample.name}.json").unlink(missing_ok=True)

    # --- what an earlier run left ---

    def _finish_packing(self) -> None:
        """Enter a shard that was written by a run that was killed before it wrote the index."""
        journal = self.folder.work / PACKING
        note = _read(journal, {"file": str, "names": list})
        if note is not None and (self.folder.out / note["file"]).is_file():
            samples = [self._sample(name) for name in note["names"]]
            self._enter([(sample, note["file"]) for sample in samples if sample is not None])
        journal.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Find finished images that are not part of the dataset yet; remove what is left of others."""
        for path in sorted(self.folder.work.glob("*-*.json")):
            sample = self._sample(path.stem)
            if sample is None:
                path.unlink()
            elif sample.record["key"] in self.folder.done:
                self._forget(sample)
            else:
                self._staged[sample.record["key"]] = sample
        names = {sample.name for sample in self._staged.values()}
        for path in self.folder.work.glob("*.png"):
            if path.stem not in names:
                path.unlink()

    def _sample(self, name: str) -> Sample | None:
        record = _read(self.folder.work / f"{name}.json", {"key": str, "row": int, "settings": dict})
        png = self._png(name)
        return None if record is None or not png.is_file() else Sample(name, png, record)


def _read(path: Path, needs: Mapping[str, type]) -> Any:
    """The JSON object of a file of ours, which has these keys; None if there is no file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), each) for key, each in needs.items()
    ):
        raise BadFile(path, "is damaged; this program wrote it", "remove it, its image is made again")
    return found
