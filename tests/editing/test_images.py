"""Images of any kind become the same pixels, by diffusers' resize; what is no image is refused by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from zimage_core.editing import images
from zimage_core.editing.images import open_images, read_image
from zimage_core.errors import BadArgument, BadFile, BadShape

H, W = 21, 34  # of no tile


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def as_float(pixels):
    return torch.from_numpy(2.0 * (pixels.astype(np.float32) / 255.0).transpose(2, 0, 1)[None] - 1.0)


def forms(pixels, folder):
    """Ways to give the same pixels."""
    image, unit = Image.fromarray(pixels), pixels.astype(np.float32) / 255
    image.save(folder / "a.png")
    image.save(folder / "a.webp", lossless=True)
    yield "a path", folder / "a.png"
    yield "a name", str(folder / "a.webp")
    yield "Pillow", image
    yield "NumPy", pixels
    yield "NumPy batch", pixels[None]
    yield "NumPy floats", unit
    yield "float64", unit.astype(np.float64)
    yield "tensor", torch.from_numpy(pixels).permute(2, 0, 1)
    yield "tensor floats", torch.from_numpy(unit).permute(2, 0, 1)[None]
    yield "16 bits", pixels.astype(np.uint16) * 257
    yield "opaque", np.dstack([pixels, np.full((H, W, 1), 255, np.uint8)])
    yield "opaque floats", np.dstack([unit, np.ones((H, W, 1), np.float32)])
    yield "a list", [image]


def test_every_form_gives_the_same_pixels(pixels, tmp_path):
    want = as_float(pixels)
    for name, form in forms(pixels, tmp_path):
        assert torch.equal(read_image(form, "image"), want), name


def test_lists_and_batches_are_batches(pixels):
    got = read_image([Image.fromarray(pixels), pixels[None, ::-1].copy(), np.stack([pixels] * 2)], "image")
    assert got.shape == (4, 3, H, W)
    assert torch.equal(got[0], got[2])
    assert torch.equal(got[1], as_float(pixels[::-1])[0])


@pytest.mark.parametrize("form", ["pil", "np", "pt"])
@pytest.mark.parametrize("size", [(16, 32), (48, 16), (None, None)])
def test_a_resize_is_that_of_diffusers(pixels, form, size):
    from diffusers.image_processor import VaeImageProcessor

    unit = pixels.astype(np.float32) / 255
    value = {"pil": Image.fromarray(pixels), "np": unit, "pt": torch.from_numpy(unit).permute(2, 0, 1)}[form]
    want = VaeImageProcessor(vae_scale_factor=16).preprocess(value, *size)
    assert torch.equal(read_image(value, "image", *want.shape[-2:]), want)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_masks_resize_is_that_of_diffusers(pixels, mode):
    from diffusers.image_processor import VaeImageProcessor

    mask = Image.fromarray(pixels).convert(mode)
    theirs = VaeImageProcessor(vae_scale_factor=16, do_normalize=False, do_convert_grayscale=True)
    assert torch.equal(open_images(mask, "mask_image", gray=True).at(16, 48), theirs.preprocess(mask, 16, 48))


def test_a_photo_is_turned_as_exif_asks(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png", "image"), as_float(np.rot90(pixels, -1)))


def test_transparent_parts_are_white_and_black_in_a_mask(pixels):
    alpha = np.zeros((H, W, 1), np.uint8)
    alpha[:10] = 255
    seen = np.where(alpha > 0, pixels, 255).astype(np.uint8)
    clear = np.dstack([pixels, alpha])
    for form in (Image.fromarray(clear), clear, clear.astype(np.float32) / 255):
        assert torch.equal(read_image(form, "image"), as_float(seen))
    mask = open_images(Image.fromarray(clear), "mask_image", gray=True).at(H, W)
    assert float(mask[..., 10:, :].max()) == 0 < float(mask[..., :10, :].max())


def test_half_transparent_is_half_white():
    grey = read_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "image")
    assert torch.allclose(grey, torch.tensor(2 * 127 / 255 - 1), atol=1e-6)


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    image.info["transparency"] = 0
    got = read_image(image, "image")
    assert got[0, :, 0, 0].tolist() == [1, 1, 1]
    assert got[0, :, 1, 1].tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
)
def test_every_mode_gives_an_image_that_is_white(mode, tmp_path):
    white = {"I": 65535, "F": 255.0, "I;16": 65535, "CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128),
             "HSV": (0, 0, 255), "P": 0, "1": 1, "L": 255, "LA": (255, 255), "RGB": (255,) * 3}  # fmt: skip
    image = Image.new(mode, (5, 3), white.get(mode, (255,) * 4))
    if mode == "P":
        image.putpalette([255, 255, 255])
    assert torch.equal(read_image(image, "image"), torch.ones(1, 3, 3, 5))


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    values = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    want = torch.from_numpy((values / 257).round() / 255 * 2 - 1).float()
    for form in (tmp_path / "a.png", values):
        assert torch.allclose(read_image(form, "image")[0, 1], want, atol=1e-6)


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif", "image")[0, :, 0, 0].tolist() == [1, -1, -1]


def test_the_callers_image_stays_as_it_was(pixels):
    image = Image.fromarray(pixels).convert("RGBA")
    before = image.tobytes(), image.size, image.mode
    read_image(image, "image", 16, 16)
    assert before == (image.tobytes(), image.size, image.mode)


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path, pixels):
    import hashlib

    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert open_images(tmp_path / "a.png", "image").sha256 == (
        hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest(),
    )
    one, two = (open_images(p, "image").sha256 for p in (pixels, pixels[::-1]))
    assert one != two
    assert one == open_images(pixels.copy(), "image").sha256


# --- bad input ---


def png(width, height, data=b"", depth=8, colour=2):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def whole():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


FILES = {
    "empty": b"", "text": b"not an image", "cut": whole()[:700], "cut in its head": whole()[:20],
    "bomb": png(60000, 60000), "bomb of one bit": png(13000, 13000, bytes(100), 1, 0),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no pixels": png(0, 5),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_one_sentence(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(FILES[kind])
    with pytest.raises(BadFile) as error:
        read_image(tmp_path / "a.png", "image")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_bomb_takes_no_memory(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(13000, 13000, bytes(100), 1, 0))
    monkeypatch.setattr(images, "_flat", lambda *_: pytest.fail("the image was decoded"))
    with pytest.raises(BadFile, match="13000 x 13000"):
        read_image(tmp_path / "a.png", "image")


def test_a_bomb_beyond_pillows_own_limit_is_named_and_not_called_damaged(tmp_path):
    (tmp_path / "a.png").write_bytes(png(60000, 60000))
    with pytest.raises(BadFile, match="claims more than 67 million pixels; make it smaller first"):
        read_image(tmp_path / "a.png", "image")


@pytest.mark.parametrize("place", ["nothing.png", ".", "/dev/zero"])
def test_what_is_no_file_is_refused(place, tmp_path):
    with pytest.raises(BadFile, match="not a file"):
        read_image(tmp_path / place, "image")


BAD = [
    None, 5, b"bytes", "", "a\0b", [], {}, object(), [[]], [None], np.array(["a"]), np.zeros(5),
    np.zeros((3, 0, 3), np.uint8), np.zeros((4, 4, 7)), np.zeros((1, 1, 1, 1, 1)), np.zeros((4, 4), np.int64),
    np.full((4, 4), 200.0), np.full((4, 4), np.nan), torch.zeros(5), torch.zeros(5, 4, 4),
    torch.zeros(0, 3, 4, 4), torch.full((3, 4, 4), torch.inf), torch.zeros(3, 4, 4, dtype=torch.complex64),
    torch.zeros(3, 4, 4, dtype=torch.int64), Image.new("RGB", (0, 5)),
    [np.zeros((4, 4, 3), np.uint8), 3],
]  # fmt: skip


@pytest.mark.parametrize("value", BAD, ids=lambda v: f"{type(v).__name__}-{getattr(v, 'shape', '')}")
def test_a_bad_value_is_one_sentence_that_names_the_argument(value):
    with pytest.raises((BadArgument, BadShape)) as error:
        read_image(value, "image")
    text = str(error.value)
    assert text.startswith("image")
    assert "\n" not in text
    assert len(text) < 300


def test_damaged_files_give_an_image_or_one_sentence(tmp_path):
    """Bytes changed at random: never another exception."""
    rng, noise = np.random.default_rng(1), Image.effect_noise((40, 24), 60).convert("RGB")
    path, sound, damaged = tmp_path / "a", 0, []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        buffer = io.BytesIO()
        noise.save(buffer, format=kind)
        for _ in range(40):
            data = bytearray(buffer.getvalue())
            for place in rng.integers(0, min(len(data), 300), 3):
                data[place] = rng.integers(256)
            path.write_bytes(data)
            try:
                sound += len(read_image(path, "image", 16, 16))
            except BadFile as error:
                damaged.append(str(error))
    assert not any("\n" in text for text in damaged)
    assert min(sound, len(damaged)) > 20
