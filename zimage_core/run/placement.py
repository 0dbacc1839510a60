"""Where the networks of a pipeline live and in what form: device, dtype, dense or packed, steps as graphs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from zimage_core.errors import Unsupported
from zimage_core.memory.arena import Arena, MemoryPlan
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.models.vae_tiles import TILE
from zimage_core.nn.cuda_graphs import StepGraphs
from zimage_core.nn.linear import Linear
from zimage_core.quant.dispatch import largest_that_fit
from zimage_core.quant.tensor import QuantTensor
from zimage_core.run.checks import read_device, read_dtype, whole

RESERVE = 2 << 30
"""Bytes of GPU memory that `make_resident` leaves for activations, scratch and the VAE."""

Self = TypeVar("Self", bound="Placement")


class Placement:
    """The part of a pipeline that moves its networks."""

    vae: Autoencoder
    text_encoder: TextEncoder
    transformer: ZImageTransformer
    _graphs: StepGraphs | None = None
    _arena: Arena | None = None
    _as_loaded = True

    @property
    def device(self) -> torch.device:
        """Where it computes: where the transformer is, or under a memory budget is brought to."""
        return self.transformer.device if self._arena is None else self._arena.device

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
        """Move the networks to a device, and (or) compute in another dtype; the VAE stays in float32.

        Raises:
            Unsupported: The pipeline has a memory budget and moves its networks itself.
        """
        self._refuse_budget("to")
        self._forget_graphs()
        for target in (*where, *(t for t in (device, dtype) if t is not None)):
            if isinstance(target, torch.dtype):
                self._as_loaded = False
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
            Unsupported: The transformer is not on a CUDA GPU, or has a memory budget.
        """
        if on:
            self._refuse_budget("capture")
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
            Unsupported: The pipeline has a memory budget, which decides what stays.
        """
        self._refuse_budget("make_resident")
        if budget is not None:
            budget = whole("budget", budget, 0, 1 << 50)
        elif self.device.type == "cuda":
            budget = max(0, torch.cuda.mem_get_info(self.device)[0] - RESERVE)
        else:
            return {}
        layers = {
            f"{name}.weight": module
            for name, module in self.transformer.named_modules()
            if isinstance(module, Linear) and isinstance(module.weight, QuantTensor)
        }
        size = self.dtype.itemsize
        growth = {
            name: module.in_features * module.out_features * size - module.weight.nbytes
            for name, module in layers.items()
        }
        chosen = largest_that_fit(growth, budget)
        for name in chosen:
            layers[name].dequantize_weight(self.dtype)
            self._as_loaded = False
        self._forget_graphs()
        return {name: growth[name] for name in chosen}

    def limit_memory(
        self,
        vram: int | str | None = None,
        ram: int | str | None = None,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        """Keep every run within a budget; without one, lift it.

        Networks come to the device phase by phase (text encoder, transformer, VAE). What does not fit is
        streamed from the files in every step, behind the computation; the VAE decodes in tiles where it must.
        `plan` says beforehand what a budget means.

        Args:
            vram: GPU memory for its tensors: bytes, "6GiB", "auto" for what is free when a run begins,
                "least" for the smallest that the picture allows.
            ram: Host memory of the process; the one that counts on a CPU.
            device: Where to compute; default: where the pipeline is.

        Raises:
            BadArgument: An amount cannot be read, or vram is given for a CPU.
            Unsupported: The networks are on a GPU already, or came from no files.
        """
        where = self.device if device is None else read_device(device)
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        if vram is None and ram is None:
            return
        if self.transformer.device.type != "cpu":
            raise Unsupported(
                "limit_memory: the networks are on the GPU already; give vram= when the pipeline is opened"
            )
        if not self._as_loaded:
            raise Unsupported(
                "limit_memory: weights were made resident or cast, so a plan from the files would be wrong; "
                "open the pipeline anew with vram= or ram="
            )
        networks = {"text_encoder": self.text_encoder, "transformer": self.transformer, "vae": self.vae}
        self._arena = Arena(networks, where, MemoryPlan(vram, ram))
        self._graphs = None

    def _refuse_budget(self, what: str) -> None:
        if self._arena is not None:
            raise Unsupported(
                f"{what}: this pipeline has a memory budget and moves its networks itself; "
                "call limit_memory() without arguments first, or open it anew"
            )

    def _phase(self, name: str) -> AbstractContextManager[None]:
        """Around "encode", "denoise" and "decode": their network is on the device inside."""
        return nullcontext() if self._arena is None else self._arena.phase(name)

    def _forget_graphs(self) -> None:
        """Graphs hold addresses of weights: record anew where those have changed."""
        if self._graphs is not None:
            self._graphs = StepGraphs(self.transformer.step)

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """For code written for diffusers: `limit_memory(vram="auto")` on the GPU.

        Without a GPU it does nothing: weights are mapped from their files and the system drops and rereads
        their pages as it needs; `limit_memory(ram=...)` sets a limit there.
        """
        if torch.cuda.is_available():
            self.limit_memory(vram="auto", device="cuda")

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """For code written for diffusers: `limit_memory(vram="least")` on the GPU; without one, nothing."""
        if torch.cuda.is_available():
            self.limit_memory(vram="least", device="cuda")

    def enable_vae_slicing(self) -> None:
        """For code written for diffusers: pictures of a batch are always decoded one by one here."""

    def enable_vae_tiling(self, tile: int | None = None) -> None:
        """Decode in tiles: less than half the memory at 1024 x 1024, the same picture, some more time.

        Args:
            tile: Latents a side, of 8 pixels each. Default: 32.

        Raises:
            BadArgument: tile is no whole number, or less than 1.
        """
        self.vae.tile = TILE if tile is None else whole("tile", tile, 1, 1 << 20)

    def disable_vae_tiling(self) -> None:
        """Decode whole pictures again."""
        self.vae.tile = None

    def enable_attention_slicing(self, *_: Any) -> None:
        """For code written for diffusers: attention is torch's fused one here, nothing to slice."""

    def set_progress_bar_config(self, **_: Any) -> None:
        """For code written for diffusers: there is no progress bar here, only callback_on_step_end."""
