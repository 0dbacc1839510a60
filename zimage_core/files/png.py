"""Writes an image's settings into its PNG file, and reads them back without decoding the pixels.

There are two text chunks: `parameters` in the form that most galleries and web interfaces show, and `zimage`,
the same settings as JSON. Pillow writes them. Reading uses the standard library alone, because importing
Pillow would take longer than the reading, and checks every length.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zimage_core.errors import BadFile, printable

if TYPE_CHECKING:
    from PIL.Image import Image

AGAIN = "copy or download it again"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
JSON_KEYWORD = "zimage"
A1111_KEYWORD = "parameters"
MAX_TEXT = 16 * 1024
"""Most bytes of the text chunks together; a longer prompt is cut in the file, not when the image is made."""
READ_LIMIT = 1 << 20
"""Most bytes of decompressed text that are read from an image of unknown origin."""
_ITXT_BYTES = 17
"""Bytes of an uncompressed iTXt chunk without keyword and text: length, type, five zeros, checksum."""


@dataclass(frozen=True)
class PngText:
    """Size and text chunks of a PNG.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        text: Keyword -> text of every text chunk; the first one if a keyword occurs twice.
    """

    width: int
    height: int
    text: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> str | None:
        """The `parameters` text of A1111 and its successors; None when there is none."""
        return self.text.get(A1111_KEYWORD)

    @property
    def settings(self) -> dict[str, Any] | None:
        """The `zimage` chunk as a dict; None when there is none or it is not a JSON object."""
        try:
            value = json.loads(self.text.get(JSON_KEYWORD, "null"))
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


def read_metadata(path: str | os.PathLike[str]) -> PngText:
    """Read size and text chunks of a PNG without decoding it.

    Raises:
        BadFile: The file is no PNG, or a chunk is cut, damaged or unreasonably large.
    """
    try:
        if not Path(path).is_file():
            raise BadFile(path, "is not a file", "give the name of a PNG")
        with Path(path).open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error.strerror or error})") from None


def _read(path: str | os.PathLike[str], file: BinaryIO) -> PngText:
    size = os.fstat(file.fileno()).st_size
    if file.read(8) != SIGNATURE:
        raise BadFile(path, "is not a PNG", "only PNG files carry settings here")
    text: dict[str, str] = {}
    width = height = spent = 0
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise BadFile(path, "ends in the middle of a PNG", AGAIN)
        length, kind = struct.unpack(">I4s", head)
        if length + 4 > size - file.tell():
            raise BadFile(path, f"chunk {printable(kind)} is longer than the file", AGAIN)
        if not width:
            if kind != b"IHDR" or length != 13:
                raise BadFile(path, "does not begin with a PNG header chunk", AGAIN)
            width, height = struct.unpack(">II", _chunk(path, file, kind, length)[:8])
            if not (0 < width < 1 << 31 and 0 < height < 1 << 31):
                raise BadFile(path, f"claims a size of {width} x {height}", AGAIN)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            spent += length
            if spent > READ_LIMIT:
                raise BadFile(
                    path, f"holds more than {READ_LIMIT} bytes of text", "this program did not write it"
                )
            entry = _entry(kind, _chunk(path, file, kind, length))
            if entry is not None:
                spent += len(entry[1])
                text.setdefault(*entry)
        elif kind == b"IEND":
            return PngText(width, height, text)
        else:
            file.seek(length + 4, os.SEEK_CUR)


def _chunk(path: str | os.PathLike[str], file: BinaryIO, kind: bytes, length: int) -> bytes:
    data = file.read(length)
    if file.read(4) != struct.pack(">I", zlib.crc32(kind + data)):
        raise BadFile(path, f"chunk {printable(kind)} fails its checksum", AGAIN)
    return data


def _entry(kind: bytes, data: bytes) -> tuple[str, str] | None:
    """One text chunk -> (keyword, text); None if it violates section 11.3.3 of the PNG specification."""
    keyword, nul, rest = data.partition(b"\0")
    if not nul or not 1 <= len(keyword) <= 79:
        return None
    name = keyword.decode("latin-1")
    if kind == b"tEXt":
        return name, rest.decode("latin-1")
    if kind == b"zTXt":
        unpacked = _unpack(rest[1:]) if rest[:1] == b"\0" else None
        return None if unpacked is None else (name, unpacked.decode("latin-1"))
    parts = rest[2:].split(b"\0", 2)
    if len(rest) < 2 or len(parts) != 3 or rest[0] > 1:
        return None
    body = _unpack(parts[2]) if rest[0] == 1 else parts[2]
    return None if body is None else (name, body.decode("utf-8", "replace"))


def _unpack(data: bytes) -> bytes | None:
    """The decompressed data; None if it is damaged or has more than `READ_LIMIT` bytes."""
    unzip = zlib.decompressobj()
    try:
        out = unzip.decompress(data, READ_LIMIT)
    except zlib.error:
        return None
    return out if unzip.eof else None


def encode(image: Image, settings: Mapping[str, Any] | None = None) -> bytes:
    """Encode an image and its settings as PNG; the same input gives the same bytes.

    Args:
        image: RGB image.
        settings: Settings of the run, as for `text_chunks`. None writes no text chunks.
    """
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in text_chunks(settings).items() if settings is not None else ():
        info.add_itxt(keyword, text)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def text_chunks(settings: Mapping[str, Any]) -> dict[str, str]:
    """Keyword -> text to write; prompts are cut until the chunks have at most `MAX_TEXT` bytes.

    Args:
        settings: `prompt`, `negative_prompt`, `steps`, `guidance_scale`, `seed`, `width`, `height`, `shift`,
            `version`, `files` (component -> {"name", "size", "sha256" or "fingerprint"}) and any other values
            that JSON can hold.
    """
    limit = MAX_TEXT
    while limit:
        cut = {k: _cut(v, limit) if k in ("prompt", "negative_prompt") else v for k, v in settings.items()}
        texts = {
            A1111_KEYWORD: _a1111(cut),
            JSON_KEYWORD: json.dumps(cut, ensure_ascii=False, allow_nan=False, separators=(",", ":")),
        }
        encoded = {keyword: text.encode("utf-8", "replace") for keyword, text in texts.items()}
        if sum(_ITXT_BYTES + len(keyword) + len(text) for keyword, text in encoded.items()) <= MAX_TEXT:
            return {keyword: text.decode() for keyword, text in encoded.items()}
        limit //= 2
    return {}  # the file names alone are too long, and incomplete JSON is worse than none


def _cut(text: Any, limit: int) -> Any:
    if not isinstance(text, str) or len(text) <= limit:
        return text
    return text[: limit - 1] + "…"


_A1111_SAMPLERS = {
    "euler": "Euler", "heun": "Heun", "res_multistep": "Res Multistep", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "euler_ancestral": "Euler a", "lcm": "LCM",
}  # fmt: skip
_A1111_SCHEDULES = {"linear": "Simple", "simple": "Simple", "beta": "Beta", "bong_tangent": "Bong Tangent"}
"""Names of samplers and schedules in A1111 and Forge; their "Simple" is nearest to the official grid."""


def _a1111(settings: Mapping[str, Any]) -> str:
    """The text in A1111's form: prompt, negative prompt, then one line of `Name: value` pairs."""
    lines = [str(settings.get("prompt") or "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    model = settings.get("files", {}).get("transformer", {})
    guidance = settings.get("guidance_scale")
    pairs = {
        "Steps": settings.get("steps"),
        "Sampler": _A1111_SAMPLERS.get(settings.get("sampler", "euler")),
        "Schedule type": _A1111_SCHEDULES.get(settings.get("schedule", "linear")),
        # in A1111 a scale of 1 means no guidance
        "CFG scale": None if guidance is None else f"{guidance + 1:g}",
        "Shift": None if settings.get("shift") is None else f"{settings['shift']:g}",
        "Seed": settings.get("seed"),
        "Denoising strength": settings.get("strength"),
        "Hires upscale": settings.get("hires"),
        "Hires steps": settings.get("hires_steps"),
        "Size": f"{settings['width']}x{settings['height']}" if "width" in settings else None,
        "Model hash": (model.get("sha256") or model.get("fingerprint") or "")[:10] or None,
        "Model": json.dumps(model["name"], ensure_ascii=False) if "name" in model else None,
        "Version": settings.get("version"),
    }
    lines.append(", ".join(f"{k}: {v}" for k, v in pairs.items() if v is not None))
    return "\n".join(lines)
