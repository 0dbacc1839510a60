"""Runs that ControlNets steer: loading them into a pipeline, and the control images of a call.

The work is done in `control/`, which is imported when a ControlNet is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.run.checks import choice, free_name, read_path
from zimage_core.run.components import require
from zimage_core.run.decode import encode_images
from zimage_core.run.request import Request, Run
from zimage_core.weights.load import opened_file

if TYPE_CHECKING:
    from zimage_core.control.model import ControlNet
    from zimage_core.models.autoencoder import Autoencoder
    from zimage_core.models.transformer import ZImageTransformer
    from zimage_core.run.loading import PathLike
    from zimage_core.run.placement import Placement
    from zimage_core.weights.opened import Opened


class Controlled:
    """The methods of `ZImagePipeline` for ControlNets."""

    transformer: ZImageTransformer
    vae: Autoencoder
    _placement: Placement
    _controlnets: dict[str, ControlNet]

    def load_controlnet(
        self,
        controlnet: PathLike | ControlNet,
        name: str | None = None,
        *,
        hints: str = "trainer",
        mmap: bool = True,
    ) -> ControlNet:
        """Load a ControlNet, which a call's `control_image` then steers with; docs/guides/control.md.

        Args:
            controlnet: A GGUF or safetensors file, or a ControlNet that `zimage_core.load_controlnet` made.
            name: Name for `unload_controlnet`, for a dict as `control_image`, and for the settings of images;
                default: that of the file, with a number if another file has it. One of the same name is
                replaced, and one that is loaded again is renamed.
            hints: Where hints of 2.x for the noise refiner go: "trainer", or "diffusers" for its place.
            mmap: Use the weights in place; the file must then not change.

        Returns:
            The ControlNet.

        Raises:
            BadFile: The file cannot be read.
            WrongModel, BadWeights: It is another model, a damaged one, or made for another transformer.
            BadArgument: The name is no text, or `hints` is none of the two.
        """
        from zimage_core.control.apply import HINTS
        from zimage_core.control.inputs import check_fits
        from zimage_core.control.load import load_controlnet
        from zimage_core.control.model import ControlNet

        require("transformer", self.transformer)
        choice("hints", hints, HINTS)
        wished: Any = name
        if wished is not None and not (isinstance(wished, str) and wished):
            raise BadArgument(f"name: got {printable(repr(wished), 60)}, wanted a text")
        base = self.transformer
        if isinstance(controlnet, ControlNet):
            net = controlnet
        else:
            net = load_controlnet(read_path("controlnet", controlnet), base.dtype, "cpu", mmap)
        try:
            check_fits(net, base.config)
        except BaseException:
            opened = opened_file(net)
            if net is not controlnet and opened is not None:
                opened.file.close()
            raise
        name = name or net.name or self._name_for(net)
        net.name, net.hints = name, hints
        # a net has one name and one place for its hints
        self._controlnets = {key: own for key, own in self._controlnets.items() if own is not net}
        self._controlnets[name] = net
        return net

    def _name_for(self, net: ControlNet) -> str:
        """The name that its file has already, or the stem of the file, with a number if that is taken."""
        found = opened_file(net)
        if found is None:
            return free_name("controlnet", self._controlnets)
        files = {name: opened_file(own) for name, own in self._controlnets.items()}
        same = (name for name, own in files.items() if own is not None and own.file.path == found.file.path)
        return next(same, None) or free_name(printable(Path(found.name).stem, 100), files)

    def unload_controlnet(self, name: str | None = None) -> None:
        """Remove a ControlNet, or all of them.

        Raises:
            BadArgument: There is none of that name.
        """
        if name is None:
            self._controlnets.clear()
        elif self._controlnets.pop(name, None) is None:
            known = ", ".join(self._controlnets) or "none is loaded"
            raise BadArgument(f"name: there is no ControlNet {printable(repr(name), 60)}; loaded: {known}")

    @property
    def controlnets(self) -> Mapping[str, ControlNet]:
        """The loaded ControlNets by name, in the order in which they were loaded."""
        return dict(self._controlnets)

    def _with_controls(self, run: Run, request: Request) -> Run:
        """The run with its control images, opened and checked; their nets are like the transformer."""
        if request.control_image is None:
            names = ", ".join(self._controlnets)
            remark = (
                f"the ControlNet {names} has no effect without control_image; give one, or call "
                "unload_controlnet()"
            )
            return replace(run, remarks=(*run.remarks, remark))
        from zimage_core.control.apply import place_beside
        from zimage_core.control.inputs import check_fits, read_controls, remarks_on

        where = None if self._placement.memory is None else torch.device("cpu")
        controls = read_controls(
            request.control_image,
            self._controlnets,
            request.controlnet_conditioning_scale,
            request.control_guidance_start,
            request.control_guidance_end,
            run.steps,
            run.batch.images,
            None if run.edit is None or run.edit.mask is None else (run.edit.canvas, run.edit.mask.pixels),
        )
        if self.vae is None:
            raise Unsupported("control_image: this pipeline has no VAE, which encodes it; vae= is needed")
        for each in controls:
            check_fits(each.net, self.transformer.config)
        for each in controls:  # before memory is planned
            place_beside(each.net, self.transformer, where)
        remarks = (*run.remarks, *remarks_on(controls, run.height, run.width))
        return replace(run, controls=controls, remarks=remarks)

    def _with_control_latents(self, run: Run) -> Run:
        """The run with its control images encoded by the VAE."""
        config, memory = self.vae.config, self._placement.memory
        keep = None if memory is None else memory.keep
        with self._placement.phase("image", self.vae):
            moments = partial(encode_images, self.vae, debug=run.debug, keep=keep)
            size = (run.height, run.width, run.batch.images)
            controls = tuple(
                each.encoded(moments, config.scaling_factor, config.shift_factor, *size)
                for each in run.controls
            )
        return replace(run, controls=controls)


def control_files(run: Run) -> dict[str, Opened]:
    """The files of the ControlNets of a run, by a name for the settings of its images."""
    nets = {each.net.name: opened_file(each.net) for each in run.controls}
    return {f"controlnet {name}": opened for name, opened in nets.items() if opened is not None}
