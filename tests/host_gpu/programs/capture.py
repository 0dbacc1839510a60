"""Is there no forbidden call while steps are recorded as graphs?

    capture.py [--files FOLDER] [--pixels 128]

Pictures of several sizes are made with capture on: each step must be a replay. Then a synchronisation is
put into a block: it must be seen, or this program is blind.
"""

from __future__ import annotations

import sys

import fake_cuda
import project
import torch

from zimage_core.errors import ZImageError

STEPS = 3


def main():
    parser = project.arguments(__doc__)
    args = parser.parse_args()
    project.patch_out()
    pipe = project.open_pipeline(args.files, device="cuda")
    side = args.pixels or pipe.sample_size
    pipe.capture()
    sizes = []
    for pixels in (side, side // 32 * 16, side):  # the last one has its graph already
        before, held = fake_cuda.counts(), fake_cuda.used()
        project.picture(pipe, pixels, STEPS, output_type="latent")
        torch.cuda.synchronize()
        calls = fake_cuda.counts() - before
        sizes.append(
            {
                "pixels": pixels,
                "steps": STEPS,
                "replays": calls["graph_launch"],
                "launches": calls["launch"] + calls["blas"],
                "forbidden": calls["forbidden"],
                "grown": fake_cuda.used() - held,
            }
        )
    # in the attention of a block: `capture` leaves graphs out where blocks or the transformer have hooks
    original = torch.nn.functional.scaled_dot_product_attention

    def stopping(*arguments, **options):
        torch.cuda.synchronize()
        return original(*arguments, **options)

    torch.nn.functional.scaled_dot_product_attention = stopping
    pipe.capture()  # forgets the graphs
    before, error = fake_cuda.counts(), ""
    try:
        project.picture(pipe, side, STEPS, output_type="latent")
    except (RuntimeError, ZImageError) as found:
        error = str(found).splitlines()[0]
    project.answer(sizes=sizes, mutated=(fake_cuda.counts() - before)["forbidden"], error=error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
