"""Where the networks of a pipeline live and in what form: device, dtype, dense or packed, steps as graphs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from zimage_core.checks import read_device, read_dtype, whole
from zimage_core.errors import Unsupported
from zimage_core.graphs import StepGraphs
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Linear
from zimage_core.paths import resident_set

RESERVE = 2 << 30
"""Bytes of GPU memory that `make_resident` leaves for activations, scratch and the VAE."""

Self = TypeVar("Self", bound="Placement")


class Placement:
    """The part of a pipeline that moves its networks."""

    vae: Autoencoder
    text_encoder: TextEncoder
    transformer: ZImageTransformer
    _graphs: StepGraphs | None = None

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer's computation."""
        return self.transformer.dtype

    def to(
        self: Self,
        *where: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move the networks to a device, and (or) compute in another dtype; the VAE stays in float32."""
        self._forget_graphs()
        for target in (*where, *(t for t in (device, dtype) if t is not None)):
            if isinstance(target, torch.dtype):
                kind = read_dtype(target, None, self.device)
                self.transformer.to(kind)
                self.text_encoder.to(kind)
            else:
                place = read_device(target)
                for part in (self.transformer, self.text_encoder, self.vae):
                    part.to(place)
        return self

    def capture(self, on: bool = True) -> None:
        """Record the steps of the runs to come as CUDA graphs, one for each picture size and caption length.

        A graph is recorded at the first step with new shapes and replayed from then on, in later runs too; it
        holds the activations of a step. What is computed is the same.

        Raises:
            Unsupported: The transformer is not on a CUDA GPU.
        """
        if on and self.device.type != "cuda":
            raise Unsupported(f"capture: steps can be recorded on a CUDA GPU only, not on {self.device}")
        self._graphs = StepGraphs(self.transformer.step) if on else None

    def make_resident(self, budget: int | None = None) -> dict[str, int]:
        """Dequantise weights of the transformer once and keep them dense: no work for them in any step.

        The largest come first, as far as the budget reaches; the others stay packed. What is computed is the
        same as with packed weights.

        Args:
            budget: Bytes that the weights may grow by. Default: what is free on the GPU less 2 GiB for the
                rest of a run; on a CPU nothing, where packed weights are mapped from their file.

        Returns:
            Names of the weights that are dense now, with the bytes that each grew by.

        Raises:
            BadArgument: budget is negative or no whole number.
        """
        if budget is not None:
            budget = whole("budget", budget, 0, 1 << 50)
        elif self.device.type == "cuda":
            budget = max(0, torch.cuda.mem_get_info(self.device)[0] - RESERVE)
        else:
            return {}
        layers = {
            f"{name}.weight": module
            for name, module in self.transformer.named_modules()
            if isinstance(module, Linear) and module.quant is not None
        }
        size = self.dtype.itemsize
        growth = {
            name: module.in_features * module.out_features * size - module.quant.nbytes
            for name, module in layers.items()
            if module.quant is not None
        }
        chosen = resident_set(growth, budget)
        for name in chosen:
            layers[name].make_resident(self.dtype)
        self._forget_graphs()
        return {name: growth[name] for name in chosen}

    def _forget_graphs(self) -> None:
        """Graphs hold addresses of weights: record anew where those have changed."""
        if self._graphs is not None:
            self._graphs = StepGraphs(self.transformer.step)

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """For code written for diffusers: keeps one network at a time on the GPU there.

        Does nothing here yet. On a CPU there is nothing to move: weights are mapped from their files and the
        system drops and rereads their pages as it needs.
        """

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """For code written for diffusers: keeps one layer at a time on the GPU. Nothing here yet."""

    def enable_vae_slicing(self) -> None:
        """For code written for diffusers: pictures of a batch are always decoded one by one here."""

    def enable_vae_tiling(self) -> None:
        """For code written for diffusers. Pictures are decoded whole; tiles are not implemented yet."""

    def enable_attention_slicing(self, *_: Any) -> None:
        """For code written for diffusers: attention is torch's fused one here, nothing to slice."""

    def set_progress_bar_config(self, **_: Any) -> None:
        """For code written for diffusers: there is no progress bar here, only callback_on_step_end."""
