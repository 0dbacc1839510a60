"""The drawing procedure: scenes, the images they give, and the prompts that describe them.

A scene is a handful of attributes; `draw` turns it into an 80x80 image with a little jitter and
`describe` turns it into an English or Chinese sentence. Masks are drawn once, supersampled, and
pasted at whole pixels, so that an image costs well under a millisecond.

    python -m benchmarks.nano.draw grid.png     # a sheet of samples with their prompts on stdout
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 80
"""Side of every image, in pixels."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 60),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "purple": (140, 60, 180),
    "orange": (245, 140, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
POSITIONS = {"center": (0, 0), "left": (-17, 0), "right": (17, 0), "top": (0, -17), "bottom": (0, 17)}
RADII = {"small": (10, 11), "medium": (15, 16), "big": (20, 21)}
"""Radii in pixels; a prompt without a size means medium."""
LINE = 5
"""Width of an outline in pixels; the VAE blurs thinner ones."""
FARTHEST = 19
"""Largest offset in pixels of a shape that stands anywhere."""

HAN = "人大小中山水火木土日月天王田心手口上下文东西龙福"
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "0123456789" + HAN
GLYPH_HEIGHT = 52
LATIN_FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf"
HAN_FONT = "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc"

ZH = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色",
    "black": "黑色", "white": "白色", "purple": "紫色", "orange": "橙色",
    "circle": "圆形", "square": "方形", "triangle": "三角形",
    "star": "星形", "cross": "十字形", "ring": "圆环",
    "center": "中间", "left": "左边", "right": "右边", "top": "上方", "bottom": "下方",
    "small": "小", "big": "大", 2: "两个", 3: "三个", "": "",
}  # fmt: skip
SHORT = {"三角形": "三角", "圆形": "圆", "星形": "星星", "十字形": "十字", "方形": "方块"}
"""What `loosen` says for a shape."""
WORDS = {2: "two", 3: "three"}
PLACES = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "": ("",),
}
"""What prompts say for a position; "" is one that the prompt leaves open, which no drawing has."""


@dataclass(frozen=True)
class Scene:
    """What an image shows; `glyph` replaces shape, size and position, `count` size and position."""

    colour: str
    background: str
    shape: str = ""
    position: str = "center"
    size: str = "medium"
    count: int = 1
    glyph: str = ""

    @property
    def held_out(self) -> bool:
        """One combination of attributes in ten is kept out of training, by hash."""
        place = f"{self.position}/{self.size}/{self.count}/{self.glyph}"
        key = f"{self.colour}/{self.background}/{self.shape}/{place}"
        return hashlib.sha256(key.encode()).digest()[0] % 10 == 0


def _shape_polygon(shape: str, r: float) -> list[tuple[float, float]]:
    """Corners about the origin, y downwards."""
    if shape == "square":
        s = 0.86 * r
        return [(-s, -s), (s, -s), (s, s), (-s, s)]
    if shape == "triangle":
        return [(0, -r), (r, 0.8 * r), (-r, 0.8 * r)]
    if shape == "star":
        corners = [(math.pi * k / 5, (0.44 if k % 2 else 1.1) * r) for k in range(10)]
        return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in corners]
    a, b = 0.34 * r, r  # cross
    quarter = [(-a, -b), (a, -b), (a, -a)]
    turns = (lambda x, y: (x, y)), (lambda x, y: (-y, x)), (lambda x, y: (-x, -y)), (lambda x, y: (y, -x))
    return [turn(x, y) for turn in turns for x, y in quarter]


@functools.cache
def shape_mask(shape: str, radius: float, outline: bool = False) -> np.ndarray:
    """Coverage [2 * SIZE, 2 * SIZE] in [0, 1], the shape's origin in the middle; 8x supersampled.

    An outline follows the border, half of LINE on each side; a ring is one already and stays as it is.
    """
    scale, side = 8, 2 * SIZE
    image = Image.new("L", (side * scale, side * scale))
    pen, mid, r = ImageDraw.Draw(image), side * scale / 2, radius * scale
    line = LINE * scale if outline and shape != "ring" else 0
    if shape in ("circle", "ring"):
        outer = r + line / 2
        inner = 0.58 * r if shape == "ring" else r - line / 2 if line else 0
        pen.ellipse([mid - outer, mid - outer, mid + outer, mid + outer], fill=255)
        if inner:
            pen.ellipse([mid - inner, mid - inner, mid + inner, mid + inner], fill=0)
    else:
        corners = [(mid + x, mid + y) for x, y in _shape_polygon(shape, r)]
        if line:
            pen.line([*corners, *corners[:2]], fill=255, width=line, joint="curve")
        else:
            pen.polygon(corners, fill=255)
    return np.asarray(image.reduce(scale), dtype=np.float32) / 255


def fonts_installed() -> bool:
    """Whether glyphs can be drawn here; Debian has the fonts in fonts-dejavu-core and fonts-wqy-zenhei."""
    return Path(LATIN_FONT).exists() and Path(HAN_FONT).exists()


@functools.cache
def glyph_mask(glyph: str) -> np.ndarray:
    """Coverage [2 * SIZE, 2 * SIZE], the glyph's bounding box centred and scaled to GLYPH_HEIGHT."""
    scale, side = 4, 2 * SIZE
    han = glyph in HAN
    font = ImageFont.truetype(HAN_FONT if han else LATIN_FONT, 80 * scale)
    canvas, middle = Image.new("L", (200 * scale, 200 * scale)), (100 * scale, 100 * scale)
    stroke = 2 * scale if han else 0
    ImageDraw.Draw(canvas).text(middle, glyph, fill=255, font=font, anchor="mm", stroke_width=stroke)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {glyph!r}")
    cut = canvas.crop(box)
    zoom = GLYPH_HEIGHT * scale / max(cut.height, cut.width)
    cut = cut.resize((round(cut.width * zoom), round(cut.height * zoom)), Image.Resampling.LANCZOS)
    image = Image.new("L", (side * scale, side * scale))
    image.paste(cut, ((side * scale - cut.width) // 2, (side * scale - cut.height) // 2))
    return np.asarray(image.reduce(scale), dtype=np.float32) / 255


def shifted(mask: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The SIZE x SIZE window of a mask whose origin lands on (SIZE / 2 + dx, SIZE / 2 + dy)."""
    top, left = SIZE // 2 - dy, SIZE // 2 - dx
    return mask[top : top + SIZE, left : left + SIZE]


def centres(count: int) -> list[tuple[int, int]]:
    """Where the objects of a counted scene stand, as offsets from the middle."""
    return {1: [(0, 0)], 2: [(-17, 0), (17, 0)], 3: [(-26, 0), (0, 0), (26, 0)]}[count]


def coverage(
    scene: Scene, rng: np.random.Generator, outline: bool = False, anywhere: bool = False
) -> np.ndarray:
    """How much of each pixel is ink [SIZE, SIZE] float32, with jitter of place and radius from `rng`.

    Args:
        scene: What is drawn.
        rng: Source of the jitter.
        outline: Shapes as outlines; glyphs stay as they are.
        anywhere: A single shape stands anywhere in the image, in any size, instead of where the scene says.
    """
    if scene.glyph:
        dx, dy = rng.integers(-1, 2, 2)
        return shifted(glyph_mask(scene.glyph), int(dx), int(dy))
    if scene.count > 1:
        jx, jy = rng.integers(-1, 2, 2)
        small = shape_mask(scene.shape, int(rng.choice(RADII["small"])), outline)
        mask = np.zeros((SIZE, SIZE), np.float32)
        for x, y in centres(scene.count):
            mask = np.maximum(mask, shifted(small, x + int(jx), y + int(jy)))
        return mask
    if anywhere:
        radius = int(rng.integers(RADII["small"][0], RADII["big"][-1] + 1))
        room = min(SIZE // 2 - 1 - round(1.1 * radius), FARTHEST)
        x, y = (int(v) for v in rng.integers(-room, room + 1, 2))
        return shifted(shape_mask(scene.shape, radius, outline), x, y)
    jx, jy = rng.integers(-2, 3, 2)
    x, y = POSITIONS[scene.position]
    mask = shape_mask(scene.shape, int(rng.choice(RADII[scene.size])), outline)
    return shifted(mask, x + int(jx), y + int(jy))


def paint(scene: Scene, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image [SIZE, SIZE, 3] uint8 of a coverage in the scene's colours, which `rng` varies a little."""
    ink, paper = (np.array(COLOURS[c]) + rng.uniform(-6, 6, 3) for c in (scene.colour, scene.background))
    image = paper + mask[:, :, None] * (ink - paper)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def draw(scene: Scene, rng: np.random.Generator, outline: bool = False) -> np.ndarray:
    """The image [SIZE, SIZE, 3] uint8, with jitter of place, radius and colour from `rng`."""
    return paint(scene, coverage(scene, rng, outline), rng)


def edges(mask: np.ndarray) -> np.ndarray:
    """White lines on black where a coverage begins and ends, two pixels wide; uint8 [SIZE, SIZE, 3]."""
    grey = Image.fromarray(np.rint(255 * mask).astype(np.uint8))
    near = [
        np.asarray(grey.filter(kind(3)), np.int16) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
    ]
    return np.repeat((near[0] - near[1])[:, :, None], 3, 2).astype(np.uint8)


def random_scene(
    rng: np.random.Generator, held_out: bool, glyphs: float = 0.25, counts: float = 0.1
) -> Scene:
    """A scene of the training set, or with `held_out` one of those kept out of it."""
    while True:
        colour, background = (str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
        kind = rng.random()
        if kind < glyphs:
            scene = Scene(colour, background, glyph=str(rng.choice(list(GLYPHS))))
        elif kind < glyphs + counts:
            shape = str(rng.choice(SHAPES))
            scene = Scene(colour, background, shape, size="small", count=int(rng.integers(2, 4)))
        else:
            kinds = (SHAPES, list(POSITIONS), list(RADII))
            scene = Scene(colour, background, *(str(rng.choice(kind)) for kind in kinds))
        if scene.held_out == held_out:
            return scene


def _article(phrase: str) -> str:
    return ("an " if phrase.startswith(tuple("aeio")) else "a ") + phrase


def _english(scene: Scene, pick: np.random.Generator, background: bool, colour: bool) -> str:
    ink = scene.colour if colour else ""
    paper = f"{scene.background} background" if background else ""
    if scene.glyph:
        kind = "digit" if scene.glyph.isdigit() else "letter" if scene.glyph.isascii() else "character"
        noun = str(pick.choice([f"the {kind} {scene.glyph}", f"the {kind} {scene.glyph}", scene.glyph]))
        behind = ink and pick.random() < 0.5
        thing = f"{noun} in {ink}" if behind else f"{ink} {noun.removeprefix('the ')}".strip()
        if thing.startswith(kind):
            thing = "the " + thing
        elif ink and thing.startswith(ink):
            thing = _article(thing)
        return pick.choice([f"{thing} on {_article(paper)}", f"{paper}, {thing}"]) if paper else thing
    if scene.count > 1:
        plural = scene.shape.replace("cross", "crosse") + "s"
        thing = " ".join(w for w in (WORDS[scene.count], ink, plural) if w)
        forms = [f"{thing} on {_article(paper)}", f"{_article(paper)} with {thing}", f"{paper}, {thing}"]
        return pick.choice(forms) if paper else thing
    size = "" if scene.size == "medium" else scene.size
    if size == "big" and pick.random() < 0.2:
        size = "large"
    words = [w for w in (size, ink, scene.shape) if w]
    thing = _article(" ".join(words))
    place = (
        "" if scene.position == "center" and pick.random() < 0.5 else str(pick.choice(PLACES[scene.position]))
    )
    if not paper:
        return f"{thing} {place}".strip()
    if not place:
        forms = [f"{thing} on {_article(paper)}", f"{_article(paper)} with {thing}", f"{paper}, {thing}"]
    else:
        forms = [
            f"{thing} {place} of {_article(paper)}",
            f"{thing} {place} of {_article(paper)}",
            f"{_article(paper)} with {thing} {place}",
            f"on {_article(paper)}, {thing} {place}",
            f"{thing} {place}, {paper}",
            f"{paper}, {thing} {place}",
        ]
    return str(pick.choice(forms))


def _chinese(scene: Scene, pick: np.random.Generator, background: bool, colour: bool) -> str:
    ink = ZH[scene.colour] if colour else ""
    paper = ZH[scene.background] + "背景" if background else ""
    comma = str(pick.choice([",", "，"]))  # noqa: RUF001
    if scene.glyph:
        kind = "数字" if scene.glyph.isdigit() else "字母" if scene.glyph.isascii() else "汉字"
        of = "的" if ink and pick.random() < 0.5 else ""
        thing = f"{ink}{of}{kind}{scene.glyph}"
        forms = [f"{paper}上的{thing}", f"{paper}{comma}{thing}", f"{thing}{comma}{paper}"]
        return str(pick.choice(forms if paper else [thing]))
    if scene.count > 1:
        thing = f"{ZH[scene.count]}{ink}{ZH[scene.shape]}"
        forms = [f"{paper}上有{thing}", f"{paper}{comma}{thing}", f"{thing}{comma}{paper}"]
        return str(pick.choice(forms if paper else [thing]))
    size = "" if scene.size == "medium" else ZH[scene.size]
    order = [f"{size}{ink}{ZH[scene.shape]}", f"{size}{ink}{ZH[scene.shape]}"]
    if size and ink:
        order.append(f"{ink}的{size}{ZH[scene.shape]}")
    thing = str(pick.choice(order))
    place = "" if scene.position == "center" and pick.random() < 0.5 else ZH[scene.position]
    if not paper:
        forms = [f"{place}有一个{thing}", f"一个{thing}在{place}"]
        return str(pick.choice(forms)) if place else f"一个{thing}"
    if not place:
        forms = [f"{paper}上有一个{thing}", f"{paper}{comma}一个{thing}", f"一个{thing}{comma}{paper}"]
    else:
        forms = [
            f"{paper}{place}有一个{thing}",
            f"{paper}{place}有一个{thing}",
            f"{paper}{place}一个{thing}",
            f"一个{thing}在{paper}的{place}",
            f"{paper}的{place}有一个{thing}",
            f"{paper}{comma}{place}有一个{thing}",
            f"{place}有一个{thing}{comma}{paper}",
        ]
    return str(pick.choice(forms))


def describe(scene: Scene, rng: np.random.Generator, chinese: bool, omit: float = 0.0) -> str:
    """A sentence for the scene; each of the two colours is left out with probability `omit`."""
    background, colour = rng.random() >= omit, rng.random() >= omit
    return sentence(scene, rng, chinese, background, colour)


def sentence(scene: Scene, rng: np.random.Generator, chinese: bool, background: bool, colour: bool) -> str:
    """A sentence for the scene that names its background, its colour, both or neither."""
    text = (_chinese if chinese else _english)(scene, rng, background, colour)
    if not chinese and not scene.glyph and rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    return text


def loosen(text: str, rng: np.random.Generator) -> str:
    """Now and then drop what people leave out: articles, 形 after a shape, 色 after a colour."""
    if text.isascii():
        return re.sub(r"\b(an?|the) ", "", text) if rng.random() < 0.15 else text
    if rng.random() < 0.15:
        for full, short in SHORT.items():
            text = text.replace(full, short)
    return re.sub("色(?!背景|的)", "", text) if rng.random() < 0.1 else text


def words() -> dict[str, list[str]]:
    """The words of all prompts by kind, as `zimage_core.assets.words` reads them."""
    plural = [shape.replace("cross", "crosse") + "s" for shape in SHAPES]
    chinese = [ZH[shape] for shape in SHAPES]
    colours = [ZH[colour] for colour in COLOURS]
    return {
        "colours": [*COLOURS, *colours, *(colour.removesuffix("色") for colour in colours)],
        "shapes": [*SHAPES, *plural, *chinese, *SHORT.values()],
        "sizes": ["small", "big", "large", ZH["small"], ZH["big"]],
        "places": ["left", "right", "top", "bottom", "center", "middle", *(ZH[place] for place in POSITIONS)],
        "counts": [*WORDS.values(), ZH[2], ZH[3]],
        "kinds": ["letter", "digit", "character", "字母", "数字", "汉字"],
        "others": [
            *("a", "an", "the", "on", "in", "at", "of", "with", "background", ","),
            *("，", "背景", "一个", "有", "在", "的", "上"),  # noqa: RUF001
        ],
        "glyphs": [*GLYPHS],
    }


def sheet(drawn: Sequence[np.ndarray], columns: int = 10) -> Image.Image:
    """Images [SIZE, SIZE, 3] uint8 side by side."""
    step = SIZE + 4
    out = Image.new("RGB", (columns * step, -(-len(drawn) // columns) * step), "gray")
    for k, one in enumerate(drawn):
        out.paste(Image.fromarray(one), (k % columns * step, k // columns * step))
    return out


def main() -> None:
    rng, drawn = np.random.default_rng(0), []
    for k in range(60):
        scene = random_scene(rng, held_out=False)
        drawn.append(draw(scene, rng))
        print(describe(scene, rng, chinese=bool(k % 2), omit=0.1))
    sheet(drawn).save(sys.argv[1] if len(sys.argv) > 1 else "grid.png")


if __name__ == "__main__":
    main()
