"""The strip of README.md: eight images of the embedded model in a row, at a seed fixed before they were seen.

python -m benchmarks.strip      # writes docs/images/strip.png
"""

from __future__ import annotations

from PIL import Image

from benchmarks.report import ROOT
from zimage_core import ZImagePipeline

PROMPTS = (
    "a small red circle on the left of a blue background",
    "a big yellow star in the middle of a black background",
    "黑色字母 Z 紫色背景",
    "two green squares on a white background",
    "橙色背景右边有一个小黑色三角形",
    "a white ring at the top of a red background",
    "白色汉字 龙 蓝色背景",
    "a big purple cross at the bottom of a yellow background",
)
SEED, SIDE, GAP = 1, 80, 4


def main() -> None:
    """Draw the images and put them side by side, with nothing between them but a transparent gap."""
    pipe = ZImagePipeline.from_default()
    strip = Image.new("RGBA", (len(PROMPTS) * (SIDE + GAP) - GAP, SIDE))
    for place, prompt in enumerate(PROMPTS):
        strip.paste(pipe(prompt, seed=SEED).images[0], (place * (SIDE + GAP), 0))
    strip.save(ROOT / "docs/images/strip.png", optimize=True)


if __name__ == "__main__":
    main()
