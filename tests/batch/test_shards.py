"""Shards are what the libraries of others read."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow
import webdataset
from PIL import Image
from pyarrow import parquet

from zimage_core.batch.shards import Sample, write_parquet, write_tar
from zimage_core.files import png


def samples(folder, count=5):
    found = []
    for i in range(count):
        settings = {"prompt": f"a red circle {i} 红", "seed": 2**64 - 1 - i, "width": 16, "height": 16}
        path = folder / f"{i:08d}-abc.png"
        path.write_bytes(png.encode(Image.new("RGB", (16, 16), (i, 0, 0)), settings))
        record = {"row": i + 1, "key": f"{i:064x}", "prompt": settings["prompt"], "settings": settings}
        found.append(Sample(path.stem, path, record))
    return found


def test_webdataset_reads_images_texts_and_settings(tmp_path):
    given = samples(tmp_path)
    with (tmp_path / "000000.tar").open("wb") as out:
        write_tar(out, given)
    data = webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode("pil")
    found = list(data.to_tuple("__key__", "png", "txt", "json"))
    assert [key for key, *_ in found] == [sample.name for sample in given]
    assert [image.getpixel((0, 0))[0] for _, image, *_ in found] == list(range(5))
    assert found[2][2] == "a red circle 2 红"
    assert found[2][3]["settings"]["seed"] == 2**64 - 3


def test_a_tar_says_nothing_of_time_and_user(tmp_path):
    out = io.BytesIO()
    write_tar(out, samples(tmp_path))
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_parquet_has_the_bytes_of_images_and_the_features_of_datasets(tmp_path):
    given = samples(tmp_path, 40)  # more than a row group
    with (tmp_path / "a.parquet").open("wb") as out:
        write_parquet(out, given)
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.num_rows == 40
    row = table.slice(33, 1).to_pylist()[0]
    assert row["image"] == {"bytes": given[33].png.read_bytes(), "path": given[33].png.name}
    assert (row["prompt"], row["seed"]) == ("a red circle 33 红", 2**64 - 34)
    assert json.loads(row["settings"])["width"] == 16
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert {name: kind.get("dtype") for name, kind in features.items() if name != "image"} == {
        field.name: str(field.type) for field in table.schema if field.name != "image"
    }


def test_a_prompt_with_a_lone_surrogate_or_none_is_written(tmp_path):
    sample = samples(tmp_path, 1)[0]
    record = {**sample.record, "settings": {"seed": None}, "prompt": ""}
    out = io.BytesIO()
    write_parquet(out, [Sample(sample.name, sample.png, record)])
    assert parquet.read_table(pyarrow.BufferReader(out.getvalue())).to_pylist()[0]["seed"] is None
