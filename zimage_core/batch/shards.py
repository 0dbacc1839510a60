"""Shards of a dataset: WebDataset's tar files and Parquet files with the bytes of images.

The same samples give the same bytes: nothing of the time, the machine or the user goes into a shard.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zimage_core.batch.tables import import_parquet

PNG, WEBDATASET, PARQUET = FORMATS = ("png", "webdataset", "parquet")
ROW_GROUP = 32
"""Images of a Parquet file that are in memory at a time, here and in its readers."""


@dataclass(frozen=True)
class Sample:
    """A finished image.

    Args:
        name: Name of its files, without an ending and without dots.
        png: The PNG file.
        record: What the index says of it.
    """

    name: str
    png: Path
    record: Mapping[str, Any]


def write_tar(out: IO[bytes], samples: Sequence[Sample]) -> None:
    """Write a shard for the library webdataset: NAME.png, NAME.txt with the prompt, NAME.json."""
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            text = str(sample.record.get("prompt", "")).encode()
            members = {"png": sample.png.read_bytes(), "txt": text, "json": as_json(sample.record)}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{sample.name}.{ending}")  # time 0, user 0, no names
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_parquet(out: IO[bytes], samples: Sequence[Sample]) -> None:
    """Write a shard for Hugging Face datasets: `image` is a struct of bytes and path, as its Image feature.

    Columns: image, prompt, negative_prompt, seed, width, height, row, key, settings and columns, the last two
    as JSON.
    """
    parquet = import_parquet()
    import pyarrow

    types = {
        "image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        "prompt": pyarrow.string(), "negative_prompt": pyarrow.string(), "seed": pyarrow.uint64(),
        "width": pyarrow.int32(), "height": pyarrow.int32(), "row": pyarrow.int64(),
        "key": pyarrow.string(), "settings": pyarrow.string(), "columns": pyarrow.string(),
    }  # fmt: skip
    features: dict[str, Any] = {
        name: {"_type": "Value", "dtype": str(kind)} for name, kind in types.items() if name != "image"
    }
    described = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **features}}})
    schema = pyarrow.schema(list(types.items()), metadata={"huggingface": described})
    with parquet.ParquetWriter(out, schema) as writer:
        for first in range(0, len(samples), ROW_GROUP):
            rows = [_parquet_row(sample) for sample in samples[first : first + ROW_GROUP]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _parquet_row(sample: Sample) -> dict[str, Any]:
    record, settings = sample.record, sample.record["settings"]
    image = {"bytes": sample.png.read_bytes(), "path": sample.png.name}
    plain = {name: settings.get(name) for name in ("prompt", "negative_prompt", "seed", "width", "height")}
    texts = {name: as_json(record.get(name, {})).decode() for name in ("settings", "columns")}
    return {"image": image, **plain, "row": record["row"], "key": record["key"], **texts}


def as_json(value: Any) -> bytes:
    """JSON in UTF-8 on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


SHARDS: dict[str, tuple[str, Callable[[IO[bytes], Sequence[Sample]], None]]] = {
    WEBDATASET: ("{:06d}.tar", write_tar),
    PARQUET: ("part-{:05d}.parquet", write_parquet),
}
"""Format -> name of shard i, from 0, and the function that writes it."""
