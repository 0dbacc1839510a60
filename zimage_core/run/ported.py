"""What code written for diffusers calls: methods that do the same here, and names that are refused.

`Ported` is a base of the pipeline. Nothing in a run uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, TypeVar

import torch

import zimage_core
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.ported import refuse
from zimage_core.run.checks import CALLBACK_TENSORS
from zimage_core.run.components import check_kind, require
from zimage_core.run.placement import Placement

Self = TypeVar("Self", bound="Ported")


class Ported:
    """Names of diffusers' ZImagePipeline; see each method for what it does here."""

    _callback_tensor_inputs = CALLBACK_TENSORS
    _optional_components: tuple[str, ...] = ()
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    vae: Autoencoder
    limit_memory: Callable[..., None]
    _interrupt: bool
    _guidance_scale: float
    _num_timesteps: int
    _placement: Placement
    _running: dict[str, object]

    def __getattr__(self, name: str) -> Any:
        refuse(self, name)

    @classmethod
    def from_pipe(cls: type[Self], pipeline: Any, **changes: Any) -> Self:
        """A second pipeline that shares the components of a first one; `changes` are other components.

        A memory budget holds for both, if nothing is changed; they then serve one run at a time together.

        Raises:
            BadArgument: The pipeline is none of this library.
        """
        if not isinstance(pipeline, Ported):
            kind = type(pipeline).__name__
            raise BadArgument(f"from_pipe: got {kind}, wanted a ZImagePipeline of zimage_core")
        made = cls(**{**pipeline.components, **changes})
        if not changes and pipeline._placement.memory is not None:
            made._placement, made._running = pipeline._placement, pipeline._running
        return made

    @classmethod
    def from_single_file(
        cls: type[Self],
        path: Any,
        *,
        text_encoder: Any = None,
        vae: Any = None,
        config: None = None,
        **options: Any,
    ) -> Self:
        """`from_files` with one checkpoint for all networks that are not given.

        Args:
            path: A file with a transformer, and with the text encoder and VAE that are not given.
            text_encoder: Path or object of a text encoder.
            vae: Path or object of a VAE.
            config: Refused, since the tensors say what a file is.
            options: Further arguments of `from_files`.
        """
        if config is not None:
            raise Unsupported(
                "from_single_file: config= is not needed, the file says what it is; leave it out"
            )
        encoder = path if text_encoder is None else text_encoder
        return cls.from_files(path, encoder, path if vae is None else vae, **options)  # type: ignore[attr-defined,no-any-return]

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """Write the pipeline with its present weights; see `zimage_core.save_pretrained`."""
        zimage_core.save_pretrained(self, folder, **options)

    def register_modules(self, **components: Any) -> None:
        """Replace components by name, as assigning the attributes does."""
        for name, value in components.items():
            check_kind(name, value)
            setattr(self, name, value)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the run in progress, for callbacks."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the run in progress has a negative side."""
        return self._guidance_scale > 0

    @property
    def joint_attention_kwargs(self) -> None:
        """None, because there are no attention processors here."""

    @property
    def num_timesteps(self) -> int:
        """Steps of the run in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked the run in progress to stop (`pipe._interrupt = True`)."""
        return self._interrupt

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """`limit_memory(vram="auto")` on the GPU.

        Without a GPU this does nothing: weights are mapped from their files, and the system drops and rereads
        their pages as needed; `limit_memory(ram=...)` sets a limit.
        """
        if torch.cuda.is_available():
            self.limit_memory(vram="auto", device="cuda")

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """`limit_memory(vram="least")` on the GPU; without one, nothing."""
        if torch.cuda.is_available():
            self.limit_memory(vram="least", device="cuda")

    def remove_all_hooks(self) -> None:
        """Remove the memory budget: `limit_memory()`."""
        self.limit_memory()

    def reset_device_map(self) -> None:
        """Remove the memory budget: `limit_memory()`."""
        self.limit_memory()

    def maybe_free_model_hooks(self) -> None:
        """Does nothing: a memory budget puts each network away after its phase."""

    def enable_vae_slicing(self) -> None:
        """Does nothing, because images are always decoded one by one."""

    def disable_vae_slicing(self) -> None:
        """Does nothing, because images are always decoded one by one."""

    def enable_vae_tiling(self, tile: int | None = None) -> None:
        """Decode in tiles, in less than half the memory at 1024 x 1024; see `Autoencoder.enable_tiling`."""
        require("vae", self.vae)
        self.vae.enable_tiling(tile=tile)

    def disable_vae_tiling(self) -> None:
        """Decode whole images again."""
        require("vae", self.vae)
        self.vae.disable_tiling()

    def enable_attention_slicing(self, slice_size: int | str | None = "auto") -> None:
        """Does nothing, because attention is torch's fused one, which holds no matrix of scores."""

    def disable_attention_slicing(self) -> None:
        """Does nothing."""

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Does nothing, because attention is torch's fused one, which takes as little memory."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Does nothing."""

    def set_progress_bar_config(self, **_: Any) -> None:
        """Does nothing; there is no progress bar, only callbacks."""
