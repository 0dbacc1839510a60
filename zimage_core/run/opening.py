"""The ways to build a pipeline: from files, from a folder or a repository, from the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.run import sources
from zimage_core.run.checks import Compute, Dtype, read_computes, read_device, read_dtypes, read_path
from zimage_core.run.components import FOLDERS
from zimage_core.run.loading import PathLike, find_components, load_components
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from zimage_core.models.vision_tower import VisionTower

Self = TypeVar("Self", bound="Opening")


class Opening:
    """The constructors of `ZImagePipeline`."""

    limit_memory: Callable[..., None]
    _compute_in: Callable[..., None]

    @classmethod
    def from_files(
        cls: type[Self],
        transformer: PathLike | ZImageTransformer,
        text_encoder: PathLike | TextEncoder,
        vae: PathLike | Autoencoder,
        tokenizer: PathLike | Tokenizer | None = None,
        *,
        scheduler: FlowMatchEulerScheduler | None = None,
        dtype: Dtype = None,
        torch_dtype: Dtype = None,
        compute: Compute = None,
        device: str | torch.device = "cpu",
        mmap: bool = True,
        vram: int | str | None = None,
        ram: int | str | None = None,
        siglip: PathLike | VisionTower | None = None,
    ) -> Self:
        """Build a pipeline from files (GGUF or safetensors) or folders of shards, identified by contents.

        Each network may also be an object of this library, which is used as it is.

        Args:
            transformer: The S3-DiT.
            text_encoder: Qwen3-4B, or the text encoder that the transformer was trained with.
            vae: FLUX.1's VAE.
            tokenizer: A tokenizer.json, a folder with one or with vocab.json and merges.txt, a GGUF, or a
                Tokenizer. Default: the text encoder's own GGUF keys, else a tokenizer beside its file.
            scheduler: The schedule; default: shift 3, as for Turbo. Files of the base checkpoint cannot be
                told from Turbo's, so pass FlowMatchEulerScheduler(shift=6.0) for them, or shift=6 in each
                call; both also set the defaults of 50 steps and guidance 4.
            dtype: Dtype of the computation: float32, float16 or bfloat16, as torch dtype or name. Default:
                float32 on a CPU, float16 on GPUs before Ampere, else bfloat16. It does not change packed
                weights. A dict gives one for "transformer", "text_encoder", "siglip" and "default"; the VAE
                is always float32.
            torch_dtype: Another name of `dtype`, as in diffusers.
            compute: In which numbers the blocks multiply: "exact" (the default), "bfloat16", "int8", or
                "auto": int8 for a large transformer with packed weights if the device gains over 1.5 times,
                else exact. A dict gives one for "transformer", "text_encoder" and "default".
                docs/benchmarks/quality.md shows what it costs.
            device: Device of the computation.
            mmap: Use the weights in place; the files must then not change. False reads them into memory.
            vram: Limit of GPU memory, such as "6GiB" or "auto"; see `limit_memory`.
            ram: Limit of host memory, in the same form.
            siglip: The vision tower of an Omni checkpoint, which sees reference images.

        Raises:
            BadArgument: A path is no path.
            BadFile: A file cannot be read.
            WrongModel, BadWeights: A file is another model or a damaged one.
        """
        paths: dict[str, Any] = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        for name, value in paths.items():
            if value is None:  # no network at all is for from_pretrained, whose callers say so on purpose
                read_path(name, value)
        paths["siglip"] = siglip
        kinds, where = (dtype, torch_dtype, read_computes(compute)), read_device(device)
        return cls._load(paths, tokenizer, scheduler, kinds, where, mmap, vram, ram)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: PathLike,
        *,
        transformer: PathLike | ZImageTransformer | None = FOLDERS,
        text_encoder: PathLike | TextEncoder | None = FOLDERS,
        vae: PathLike | Autoencoder | None = FOLDERS,
        siglip: PathLike | VisionTower | None = FOLDERS,
        tokenizer: PathLike | Tokenizer | None = None,
        scheduler: FlowMatchEulerScheduler | None = None,
        dtype: Dtype = None,
        torch_dtype: Dtype = None,
        compute: Compute = None,
        device: str | torch.device = "cpu",
        mmap: bool = True,
        vram: int | str | None = None,
        ram: int | str | None = None,
        variant: str | None = None,
        **others: Any,
    ) -> Self:
        """Build a pipeline from a folder, or from a repository of the Hugging Face Hub.

        A folder has diffusers' layout, or holds single files that are identified by their contents; one file
        that holds all three networks serves as well. A repository is "org/repo", or "org/repo:Q4_K_M" to
        choose one quantisation; it needs the package huggingface_hub (`pip install zimage_core[hub]`), and
        nothing is downloaded if HF_HUB_OFFLINE is set.

        Args:
            pretrained_model_name_or_path: Folder, file with all components, repository, or "default" for
                the embedded model.
            transformer: A transformer to use instead of the folder's: a path, an object, or None for none.
            text_encoder: A text encoder to use instead, in the same form. A repository that holds only
                quantised transformers needs the other components from elsewhere.
            vae: A VAE to use instead, in the same form.
            siglip: A vision tower to use instead, in the same form; most folders have none.
            tokenizer: Path of a tokenizer, or a Tokenizer, to use instead.
            scheduler: The schedule; default: the folder's scheduler_config.json, else shift 3.
            dtype: Dtype of the computation, as for `from_files`.
            torch_dtype: Another name of `dtype`.
            compute: In which numbers the blocks multiply, as for `from_files`.
            device: Device of the computation.
            mmap: Use the weights in place, as views of the files.
            vram: Limit of GPU memory; see `limit_memory`.
            ram: Limit of host memory, in the same form.
            variant: Variant of the files in diffusers' layout, such as "fp16"; default: those without one.
            others: Further arguments of diffusers. `low_cpu_mem_usage` and `use_safetensors` are ignored,
                since they ask for what is always done here; `revision`, `cache_dir`, `token` and
                `local_files_only` go to the Hub. Any other argument with a value is refused.

        Raises:
            BadArgument, BadFile, WrongModel, BadWeights: A path or file is refused, as by `from_files`.
            Unsupported: An argument of diffusers is not supported; the message names it.
        """
        named = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "siglip": siglip}
        given = {name: value for name, value in named.items() if value is not FOLDERS}
        paths, tokenizer, scheduler = find_components(
            pretrained_model_name_or_path, given, tokenizer, scheduler, mmap, variant, others
        )
        kinds, where = (dtype, torch_dtype, read_computes(compute)), read_device(device)
        return cls._load(paths, tokenizer, scheduler, kinds, where, mmap, vram, ram)

    @classmethod
    def from_default(
        cls: type[Self],
        *,
        dtype: Dtype = None,
        torch_dtype: Dtype = None,
        compute: Compute = None,
        device: str | torch.device = "cpu",
        vram: int | str | None = None,
        ram: int | str | None = None,
        omni: bool = False,
    ) -> Self:
        """Build a pipeline with the nano model inside the package: small images of shapes and letters.

        With `omni` it is the model's Omni sibling, which takes colours from reference images;
        docs/explanation/nano.md.
        """
        paths = sources.embedded(omni).paths
        scheduler = FlowMatchEulerScheduler()  # stated, because this is a distilled model
        kinds, where = (dtype, torch_dtype, read_computes(compute)), read_device(device)
        return cls._load(paths, None, scheduler, kinds, where, True, vram, ram)

    @classmethod
    def from_text_encoder(
        cls: type[Self],
        text_encoder: PathLike | TextEncoder,
        tokenizer: PathLike | Tokenizer | None = None,
        *,
        dtype: Dtype = None,
        torch_dtype: Dtype = None,
        compute: Compute = None,
        device: str | torch.device = "cpu",
        mmap: bool = True,
    ) -> Self:
        """Build a pipeline that draws nothing, for `encode_prompt` and `enhance_prompt`.

        Arguments and errors are those of `from_files`.
        """
        paths = {"transformer": None, "text_encoder": text_encoder, "vae": None}
        kinds, where = (dtype, torch_dtype, read_computes(compute)), read_device(device)
        return cls._load(paths, tokenizer, None, kinds, where, mmap, None, None)

    @classmethod
    def _load(
        cls: type[Self],
        paths: Mapping[str, Any],
        tokenizer: PathLike | Tokenizer | None,
        scheduler: FlowMatchEulerScheduler | None,
        kinds: tuple[Dtype, Dtype, Mapping[str, str]],
        where: torch.device,
        mmap: bool,
        vram: int | str | None,
        ram: int | str | None,
    ) -> Self:
        """Load what the other constructors found, and set the memory budget."""
        limited = vram is not None or ram is not None
        load_device = torch.device("cpu") if limited else where  # with a limit, each phase moves its network
        dtype, torch_dtype, computes = kinds
        found = read_dtypes(dtype, torch_dtype, where)
        pipe = cls(**load_components(paths, tokenizer, scheduler, found, load_device, mmap))
        pipe._compute_in(computes, where)
        if limited:
            pipe.limit_memory(vram, ram, device=where)
        return pipe
