"""Train the ControlNet "edges": white edges on black say where the shape is, how large and of which outline.

    python -m benchmarks.nano.train_control --runs RUNS

The layout is Union 1.0's with one control layer and no refiner. The latents of the edges are embedded, joined
with the refined caption, added to the base's tokens and run through a block that starts as a copy of the
base's first; the result is added to the base's tokens after that one. Half of the single shapes stand
anywhere in any size, and most prompts do not say where. Writes RUNS/edges.pt, RUNS/edges.png and, into the
package, edges.gguf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor, nn

from benchmarks.nano.draw import Scene, coverage, edges, paint
from benchmarks.nano.model import TRANSFORMER, Control, Nano
from benchmarks.nano.tune import Tuner, arguments, base, single
from zimage_core.models import sequence
from zimage_core.models.transformer import TransformerBlock

NAME = "edges"
ANYWHERE = 0.5
"""Share of single shapes that stand anywhere."""
UNSAID = 0.5
"""Share of the others whose prompt names neither place nor size."""
PLACE = 0
"""Main layer of the base after which the hint is added."""


def edged(scene: Scene, rng: np.random.Generator) -> tuple[Scene, list[np.ndarray]]:
    """The scene as its prompt describes it, its drawing and the edges in that."""
    anywhere = single(scene) and rng.random() < ANYWHERE
    mask = coverage(scene, rng, anywhere=anywhere)
    images = [paint(scene, mask, rng), edges(mask)]
    if single(scene) and (anywhere or rng.random() < UNSAID):
        scene = replace(scene, position="", size="")
    return scene, images


class ControlLayer(TransformerBlock):
    """A block between two projections."""

    def __init__(self) -> None:
        super().__init__(TRANSFORMER, modulated=True)
        self.before_proj = nn.Linear(TRANSFORMER.dim, TRANSFORMER.dim)
        self.after_proj = nn.Linear(TRANSFORMER.dim, TRANSFORMER.dim)


class Edges(nn.Module):
    """The ControlNet; its parameters have the names of the file."""

    def __init__(self, model: Nano) -> None:
        super().__init__()
        dim = TRANSFORMER.dim
        self.control_all_x_embedder = nn.ModuleDict({"2-1": nn.Linear(TRANSFORMER.patch_dim, dim)})
        self.control_layers = nn.ModuleList([ControlLayer()])
        layer = self.control_layers[0]
        layer.load_state_dict(model.transformer.layers[0].state_dict(), strict=False)
        nn.init.eye_(layer.before_proj.weight)
        for zero in (layer.after_proj.weight, layer.after_proj.bias, layer.before_proj.bias):
            nn.init.zeros_(zero)
        self.model = [model]  # in a list, so that it is none of its parameters

    def condition(self, latents: Tensor, scale: Tensor | float = 1.0) -> Control:
        """Unit-variance latents of the control images [B, 16, h, w] -> what a pass of the base calls."""
        nano, layer = self.model[0], self.control_layers[0]
        tokens = self.control_all_x_embedder["2-1"](sequence.patchify(latents, 2)).float()
        pads = nano.transformer.x_pad_token.expand(len(tokens), sequence.pad_count(tokens.shape[1]), -1)
        image = torch.cat((tokens, pads), 1)

        def hints(joint: Tensor, text: Tensor, temb: Tensor) -> Mapping[int, Tensor]:
            c = layer.before_proj(torch.cat((image, text), 1)) + joint
            return {PLACE: scale * layer.after_proj(layer(c, nano.joint_angles, temb))}

        return hints


def export(part: Edges, path: Path) -> None:
    """Write the file: Q5_0 where rows are whole blocks of 32, F16 for w2, F32 for vectors."""
    writer = GGUFWriter(path, "lumina2")
    writer.add_name("Nano Z-Image ControlNet: edges")
    writer.add_license("apache-2.0")
    writer.add_description("Edges to shapes, for the toy Z-Image (benchmarks/nano)")
    writer.add_file_type(LlamaFileType.MOSTLY_Q5_0)
    writer.add_quantization_version(2)
    writer.add_array("places", [PLACE])
    for name, weight in part.state_dict().items():
        values, kind = weight.float().numpy(), GGMLQuantizationType.Q5_0
        if values.ndim == 1:
            writer.add_tensor(name, values)
        elif values.shape[1] % 32:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def main() -> None:
    args = arguments(steps=1300, lr=1e-3)
    nano, vae = base()
    part = Edges(nano)
    tuner = Tuner(args, NAME, part, (nano, vae), edged, kinds=2, condition=part.condition)
    try:
        tuner.run()
    finally:
        tuner.keep()
    tuner.finish()
    export(part, args.to / f"{NAME}.gguf")


if __name__ == "__main__":
    main()
