"""What code written for diffusers calls on a network, and the names that are refused by one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

import zimage_core
from zimage_core.errors import Unsupported
from zimage_core.nn.linear import packed_weights

Self = TypeVar("Self", bound="Network")

_LORA = "adapters are loaded by the pipeline: pipe.load_lora(path) or pipe.load_lora_weights(path)"
_MEMORY = "give vram= or ram= when the pipeline is opened, or call limit_memory(vram=...)"
_ATTENTION = (
    "attention is torch's fused one; torch.nn.attention.sdpa_kernel(...) around the call chooses another"
)

REFUSED = {
    "load_lora_weights": _LORA,
    "load_lora_adapter": _LORA,
    "load_lora_into_transformer": _LORA,
    "save_lora_weights": "adapters are not trained here; keep the file that was loaded",
    "set_lora_device": "adapters are where their network is",
    "unload_lora_weights": _LORA,
    "fuse_lora": _LORA,
    "unfuse_lora": _LORA,
    "set_adapters": _LORA,
    "delete_adapters": _LORA,
    "disable_lora": _LORA,
    "enable_lora": _LORA,
    "get_active_adapters": _LORA,
    "get_list_adapters": _LORA,
    "load_textual_inversion": "write the words into the prompt, or give prompt_embeds=",
    "load_ip_adapter": "images cannot be given to this model; describe them in the prompt",
    "enable_layerwise_casting": "load a transformer whose weights are stored in 8 bits or fewer instead",
    "enable_group_offload": _MEMORY,
    "enable_freeu": "FreeU is for U-Nets; this model is a transformer",
    "disable_freeu": "FreeU is for U-Nets; this model is a transformer",
    "set_attention_backend": _ATTENTION,
    "reset_attention_backend": _ATTENTION,
    "set_attn_processor": _ATTENTION,
    "attn_processors": _ATTENTION,
    "fuse_qkv_projections": "files with fused and with split weights both load; products need no fusing",
    "unfuse_qkv_projections": "files with fused and with split weights both load; products need no fusing",
    "add_adapter": _LORA,
    "enable_gradient_checkpointing": "wrap single blocks in torch.utils.checkpoint.checkpoint",
    "quantize": "write a GGUF with zimage_core.quantize_file and load that",
}
"""Names of diffusers that are not here -> what to do instead."""


class MissingName(Unsupported, AttributeError):
    """A name of diffusers that does not exist here; `hasattr` is false for it."""


def refuse(owner: object, name: str) -> NoReturn:
    """Raise the error for a name that an object does not have.

    Raises:
        MissingName: The name is one of diffusers'; the message says what to do instead.
        AttributeError: Any other name.
    """
    if name in REFUSED:
        raise MissingName(f"{name}: {type(owner).__name__} does not have it; {REFUSED[name]}")
    raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}")


def check_call(x: Sequence[Any], patch_size: int, others: Mapping[str, Any]) -> None:
    """Refuse what a call of diffusers' transformer asks for and this one does not do.

    Args:
        x: Its images: a tensor for each, since lists of images are Omni's.
        patch_size: Latents a side of the transformer's patches.
        others: Its further arguments.

    Raises:
        Unsupported: x holds lists of images, or an argument has a value that means something.
    """
    if len(x) and isinstance(x[0], (list, tuple)):
        raise Unsupported(
            "transformer: this checkpoint has no vision branch (siglip_embedder, siglip_refiner and "
            "siglip_pad_token are missing), so it takes one latent for each image; give an Omni checkpoint"
        )
    usual = {"patch_size": patch_size, "f_patch_size": 1}
    if wrong := [name for name, value in others.items() if value and value != usual.get(name)]:
        raise Unsupported(f"transformer: {wrong[0]}= means nothing here; leave it out")


class Network(nn.Module):
    """A network with the methods of diffusers' models that do not compute anything."""

    loader = ""
    """Function of `zimage_core` that loads this network."""
    compute = "exact"
    """In which numbers its blocks multiply; see `nn.compute.set_compute`, which sets it."""
    opened: object | None = None
    """The file that it was loaded from, a `weights.opened.Opened`."""
    adapted: Any = None
    """Its adapters, an `adapters.applied.Applied`; None if there never were any."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in REFUSED:
                refuse(self, name)
            raise

    @classmethod
    def from_pretrained(
        cls: type[Self],
        folder: str | PathLike[str],
        subfolder: str = "",
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load the network from a folder or file, as `zimage_core.load_transformer` and the others do.

        Args:
            folder: Folder or file.
            subfolder: Folder inside of it, such as "transformer".
            torch_dtype: Dtype of the computation; default: float32.
            options: Further arguments of the function that loads.

        Raises:
            Unsupported: An argument is not one of that function.
        """
        load = getattr(zimage_core, cls.loader)
        if torch_dtype is not None:
            options["dtype"] = torch_dtype
        if unknown := sorted(set(options) - {"dtype", "device", "mmap"}):
            raise Unsupported(f"from_pretrained: {unknown[0]}= means nothing here; leave it out")
        found: Self = load(Path(folder, subfolder) if subfolder else fspath(folder), **options)
        return found

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """Write the network with its present weights; see `zimage_core.save_pretrained`."""
        zimage_core.save_pretrained(self, folder, **options)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of weights, packed ones included.

        `parameters()` does not have the packed weights, because they are bytes and not numbers.

        Args:
            only_trainable: Count only those with a gradient; packed weights have none.
        """
        dense = sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)
        packed = 0 if only_trainable else sum(math.prod(q.shape) for q in packed_weights(self))
        return dense + packed

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile each block alone by `torch.compile`, which takes less time than the whole network.

        Args:
            options: Arguments of torch.compile.

        Raises:
            Unsupported: The network is no stack of blocks.
        """
        blocks = getattr(self, "blocks", ())
        if not blocks:
            raise Unsupported(f"compile_repeated_blocks: {type(self).__name__} is no stack of equal blocks")
        for block in blocks:
            block.compile(**options)
