"""Recognises files that are not models by their first bytes, and says what to do about them."""

from __future__ import annotations

from zimage_core.errors import BadFile, printable
from zimage_core.weights.source import AGAIN

CONVERT = "get the model as GGUF or safetensors"
# first bytes -> what the file is, what to do
_KNOWN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint is one, and holds a pickle)", CONVERT),
    (b"PK\x07\x08", "the first part of a zip archive in parts", "get all parts and unpack them together"),
    (b"PK\x05\x06", "an empty zip archive", CONVERT),
    (b"\x80\x02", "a pickle, which could run code and is never opened", CONVERT),
    (b"\x80\x03", "a pickle, which could run code and is never opened", CONVERT),
    (b"\x80\x04", "a pickle, which could run code and is never opened", CONVERT),
    (b"\x80\x05", "a pickle, which could run code and is never opened", CONVERT),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (b"version https://hawser", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (b"lmgg", "a legacy ggml model (magic lmgg)", "get it as GGUF"),
    (b"fmgg", "a legacy ggml model (magic fmgg)", "get it as GGUF"),
    (b"tjgg", "a legacy ggml model (magic tjgg)", "get it as GGUF"),
    (b"algg", "a legacy ggml adapter (magic algg)", "get it as GGUF"),
    (b"ggml", "a legacy ggml model (magic ggml)", "get it as GGUF"),
    (b"ggmf", "a legacy ggml model (magic ggmf)", "get it as GGUF"),
    (b"ggjt", "a legacy ggml model (magic ggjt)", "get it as GGUF"),
    (b"ggla", "a legacy ggml adapter (magic ggla)", "get it as GGUF"),
    (b"GGLA", "a legacy ggml adapter (magic GGLA)", "get it as GGUF"),
    (b"FUGG", "a GGUF file with its bytes swapped (magic FUGG)", AGAIN),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "an lz4 archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!", "a rar archive", "unpack it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", CONVERT),
    (b"\x93NUMPY", "a NumPy array", CONVERT),
    (b"\x89PNG", "a PNG image", "name a model file"),
    (b"\xff\xd8\xff", "a JPEG image", "name a model file"),
    (b"GIF8", "a GIF image", "name a model file"),
    (b"RIFF", "a RIFF file (WebP, WAV)", "name a model file"),
    (b"%PDF", "a PDF document", "name a model file"),
    (b"\x7fELF", "an ELF program", "name a model file"),
    (b"MZ", "a Windows program", "name a model file"),
    (b"#!", "a script", "name a model file"),
    (b"<?xml", "an XML page, likely an error message saved by the download", AGAIN),
)


def refuse_known(path: str, head: bytes) -> None:
    """Refuse a file whose first bytes are those of a known other kind of file.

    Raises:
        BadFile: The message says what the file is and what to do.
    """
    if len(head) >= 8 and not head.strip(b"\x00"):
        raise BadFile(path, f"starts with {len(head)} zero bytes, no magic: an unfinished download", AGAIN)
    for magic, what, hint in _KNOWN:
        if head.startswith(magic):
            raise BadFile(path, f"{what}, not a GGUF or safetensors file", hint)
    page = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if page.startswith((b"<!doctype", b"<html", b"<head", b"<!--")):
        fault = "an HTML page, not a model: the download saved a web page (an error, a login or a preview)"
        raise BadFile(path, fault, "download the file itself, with your token if it is gated")
    if head[257:262] == b"ustar":
        raise BadFile(path, "a tar archive, not a GGUF or safetensors file", "unpack it")


def refuse_text(path: str, head: bytes) -> None:
    """Refuse a file that begins as plain text, such as the short message of a server.

    Raises:
        BadFile: The message quotes the text.
    """
    try:
        text = head.decode().strip()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if len(head) - error.start < 4 else ""  # the end cuts a character
    if len(text) >= 12 and " " in text and all(c.isprintable() or c in "\t\r\n" for c in text):
        fault = f"a text, not a model, likely a message saved by the download: {printable(text, 120)!r}"
        raise BadFile(path, fault, "download the file itself, with your token if it is gated")
