"""Reader of safetensors files, single or in shards with an index.

Layout: the header's length (u64), the header (JSON), the data. The tensors must fill the data exactly,
without gaps, overlaps or trailing bytes.

Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from zimage_core.errors import BadFile, printable
from zimage_core.files import json_kinds
from zimage_core.files.untrusted import MAX_DIGITS
from zimage_core.formats import FORMATS, BlockFormat, Field
from zimage_core.weights.magic import refuse_known
from zimage_core.weights.safetensors_header import MAX_NAME, MAX_TENSORS, HeaderParser
from zimage_core.weights.source import AGAIN, Source, TensorInfo, WeightFile, check_text

MAX_HEADER = 100_000_000
MAX_SHARDS = 1000
MAX_INDEX = 32 << 20


def _plain(name: str, code: str) -> BlockFormat:
    """A type of counters, masks or shared exponents; no weight has it, and GGUF has no such type."""
    field = Field("w", code)
    return BlockFormat(name, None, 1, field.nbytes, (field,))


_SHARED = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8")
_OTHERS = {"F8_E8M0": "u1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "u1"}
DTYPES: dict[str, BlockFormat] = {name: FORMATS[name] for name in _SHARED}
DTYPES |= {name: _plain(name, code) for name, code in _OTHERS.items()}

_SHARD = re.compile(r"-(\d{3,6})-of-(\d{3,6})(?:\.[a-z]\w{0,31})?\.(?:safetensors|sft)$", re.IGNORECASE)


class SafetensorsFile(WeightFile):
    """One safetensors file; the header is read and checked, the data is not touched.

    Args:
        path: The file, or an open Source that this object takes over.
        mmap: Hand out tensors as views of a private map; False reads each into its own memory.
        alone: False opens the file as one of several shards.

    Raises:
        BadFile: The file is not safetensors, is damaged or cut, or is one shard of several.
    """

    kind = "safetensors"

    def __init__(self, path: str | PathLike[str] | Source, mmap: bool = True, alone: bool = True) -> None:
        super().__init__(path, mmap)
        try:
            self._read_header()
            if alone:
                self._refuse_shard()
        except BaseException:
            self.close()
            raise

    def _fail(self, fault: str) -> NoReturn:
        raise BadFile(self.path, fault, AGAIN)

    def _read_header(self) -> None:
        if self.size < 8:
            self._fail(f"truncated: {self.size} bytes, the header of a safetensors file has at least 10")
        length = int.from_bytes(self.source.read_at(0, 8), "little")
        if length > self.size - 8:
            # `open_weights` does not look at shards
            refuse_known(self.path, bytes(self.source.read_at(0, min(64, self.size))))
            self._fail(f"truncated or damaged: header of length {length}, {self.size - 8} bytes remain")
        if not 2 <= length <= MAX_HEADER:
            self._fail(f"header of length {length}, from 2 to {MAX_HEADER} bytes are allowed")
        metadata, entries = HeaderParser(self.path, self.source.read_at(8, length)).parse()
        self.metadata = metadata
        self.data_start = 8 + length
        end = 0
        for name, (dtype, shape, (first, last)) in entries.items():
            info = self._info(name, dtype, shape, first, last)
            self.tensors[name] = info
            end = max(end, last)
        available = self.size - self.data_start
        if end > available:
            needed = self.data_start + end
            self._fail(
                f"truncated: the tensors need {needed} bytes by their offsets, the file has {self.size}"
            )
        expected = self.data_start
        for info in sorted(self.tensors.values(), key=lambda info: (info.offset, info.nbytes)):
            if info.offset != expected:
                what = "overlaps the one before it" if info.offset < expected else "leaves a hole before it"
                self._fail(f"invalid offset: tensor {printable(info.name, 80)} {what}")
            expected = info.offset + info.nbytes
        if expected != self.size:
            self._fail(
                f"{self.size - expected} bytes after the last tensor, beyond what offsets describe: "
                "a download that was resumed wrongly"
            )

    def _info(self, name: str, dtype: str, shape: list[int], first: int, last: int) -> TensorInfo:
        shown = printable(name, 80)
        fmt = DTYPES.get(dtype)
        if fmt is None:
            fault = f"tensor {shown} has the unknown dtype {printable(dtype, 40)}"
            raise BadFile(self.path, fault, f"get the model in one of {', '.join(DTYPES)}")
        # refuse sizes that no array can have, even if a dimension of 0 makes the product 0
        if math.prod(size for size in shape if size) >= 1 << 60:
            self._fail(f"tensor {shown} has a shape whose size exceeds any file")
        nbytes = math.prod(shape) * fmt.nbytes
        if first > last:
            self._fail(f"tensor {shown} has invalid offsets: it ends at {last}, before its start at {first}")
        if nbytes != last - first:
            self._fail(
                f"tensor {shown} of shape {printable(shape, 60)} and dtype {dtype} needs {nbytes} bytes, "
                f"its offsets give {last - first}"
            )
        return TensorInfo(name, tuple(shape), fmt, self.data_start + first, nbytes)

    def _refuse_shard(self) -> None:
        """Refuse a shard that is opened alone, under its own name or renamed: it lacks tensors."""
        hint = "open the folder or its index with all shards beside it"
        numbers = _SHARD.search(self.path)
        if numbers and int(numbers[2]) > 1:
            fault = f"shard {int(numbers[1])} of {int(numbers[2])}, incomplete without the others"
            raise BadFile(self.path, fault, hint)
        for index in sorted(Path(self.path).parent.glob("*.safetensors.index.json"))[:MAX_SHARDS]:
            try:
                shards = read_index(index)
            except BadFile:
                continue  # a damaged index says nothing about this file
            if len(shards) > 1 and any(set(names) == set(self.tensors) for names in shards.values()):
                fault = f"incomplete: exactly one of the {len(shards)} shards of {printable(index.name)}"
                raise BadFile(self.path, fault, hint)


class ShardedSafetensors(WeightFile):
    """Several safetensors files that are one model.

    With an index, the shards must hold exactly the tensors that it lists.

    Args:
        path: The index, `*.safetensors.index.json`, or an open Source that this object takes over. Without
            an index, the first shard.
        mmap: Hand out tensors as views of a private map; False reads each into its own memory.
        shards: Paths of all shards in one folder, if no index lists them.

    Raises:
        BadFile: A shard is missing or damaged, the index and the shards disagree on a tensor, two shards hold
            the same tensor, or an entry of the index is a path instead of the name of a file in the same
            folder.
    """

    kind = "safetensors"

    def __init__(
        self, path: str | PathLike[str] | Source, mmap: bool = True, shards: Sequence[str] = ()
    ) -> None:
        super().__init__(path, mmap)
        self.shards: dict[str, SafetensorsFile] = {}
        self._shard_of: dict[str, str] = {}
        self._indexed = not shards
        try:
            if self._indexed:
                for shard, names in read_index(self.source).items():
                    self._add(shard, names, self.source.mapped)
            for place in shards:
                self._join(place, self.source.mapped)
        except BaseException:
            self.close()
            raise
        self.size = sum(shard.size for shard in self.shards.values())

    def _join(self, place: str, mmap: bool) -> None:
        shard = Path(place).name
        file = self.shards[shard] = SafetensorsFile(place, mmap, alone=False)
        if twice := self.tensors.keys() & file.tensors.keys():
            fault = f"tensor {printable(min(twice), 80)} is in an earlier shard, too"
            raise BadFile(place, fault, "download all shards again, from one revision")
        self._take(shard, file)

    def _take(self, shard: str, file: SafetensorsFile) -> None:
        self.tensors |= file.tensors
        self._shard_of |= dict.fromkeys(file.tensors, shard)
        self.metadata = {**file.metadata, **self.metadata}

    def _add(self, shard: str, names: list[str], mmap: bool) -> None:
        place = os.path.join(os.path.dirname(self.path), shard)  # noqa: PTH118, PTH120 - bytes-exact
        if not os.path.lexists(place):
            fault = f"the shard {printable(shard, 80)} is missing, which holds {len(names)} tensors"
            raise BadFile(self.path, fault, "download it to the same folder")
        file = SafetensorsFile(place, mmap, alone=False)
        self.shards[shard] = file
        missing = [name for name in names if name not in file.tensors]
        if missing:
            fault = f"tensor {printable(missing[0], 80)} and {len(missing) - 1} more of the index are missing"
            raise BadFile(place, fault, "download index and shards again, from one revision")
        if len(names) != len(file.tensors):
            extra = next(name for name in file.tensors if name not in set(names))
            fault = f"holds tensor {printable(extra, 80)}, which the index does not place in it"
            raise BadFile(place, fault, "download index and shards again, from one revision")
        self._take(shard, file)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The index, if there is one, and the shards."""
        index = (self.source,) if self._indexed else ()
        return (*index, *(shard.source for shard in self.shards.values()))

    def source_of(self, name: str) -> Source:
        """The shard that holds the tensor's bytes."""
        return self.shards[self._shard_of[name]].source

    def check_unchanged(self) -> None:
        """Raise BadFile if a shard was written to or cut since it was opened."""
        for shard in self.shards.values():
            shard.check_unchanged()

    def close(self) -> None:
        """Close all files. Tensors that were handed out stay valid."""
        super().close()
        for shard in self.shards.values():
            shard.close()


def read_index(place: str | PathLike[str] | Source) -> dict[str, list[str]]:
    """Read an index of shards: name of a shard -> names of its tensors.

    Raises:
        BadFile: The file is no index of shards, or an entry is not a plain file name.
    """
    if not isinstance(place, Source):
        source = Source(place)
        try:
            return read_index(source)
        finally:
            source.close()
    import json

    path = place.path
    if place.size > MAX_INDEX:
        raise BadFile(path, f"an index of {place.size} bytes, at most {MAX_INDEX} are allowed", AGAIN)
    try:
        document = json.loads(
            place.read_at(0, place.size).decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(path, pairs),
            parse_int=lambda digits: int(digits[: MAX_DIGITS + 1]),
            parse_float=str,
            parse_constant=str,
        )
    except (ValueError, RecursionError) as error:
        fault = "is not valid JSON" if isinstance(error, ValueError) else "is JSON nested too deep"
        raise BadFile(path, f"the index {fault}", AGAIN) from None
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places:
        name = json_kinds.name_of(document) if isinstance(document, dict) else ""
        fault = "not an index of shards: no weight_map" + (f" (this is {name})" if name else "")
        raise BadFile(path, fault, "name a model file or its folder")
    if len(places) > MAX_TENSORS:
        raise BadFile(path, f"the index lists {len(places)} tensors, {MAX_TENSORS} are allowed", AGAIN)
    shards: dict[str, list[str]] = {}
    for name, shard in places.items():
        check_text(path, "tensor name", name, MAX_NAME)
        plain = (
            isinstance(shard, str)
            and shard.isprintable()
            and shard.lower().endswith((".safetensors", ".sft"))
        )
        if not plain or shard.startswith(".") or not {"/", "\\", ":"}.isdisjoint(shard) or len(shard) > 255:
            fault = f"the index places a tensor in {printable(shard, 80)}, a name in its own folder is wanted"
            raise BadFile(path, fault, AGAIN)
        shards.setdefault(shard, []).append(name)
    if len(shards) > MAX_SHARDS:
        raise BadFile(path, f"the index lists {len(shards)} shards, {MAX_SHARDS} are allowed", AGAIN)
    return shards


def shard_names(index: str | PathLike[str]) -> set[str]:
    """Names of the files that an index of shards lists; an empty set if it cannot be read."""
    try:
        return set(read_index(index))
    except BadFile:
        return set()


def _unique(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadFile(path, "the index has a duplicate key", AGAIN)
    return result
