"""The parts of a pipeline: where they come from, where they live, what suits them."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch

from zimage_core.errors import Unsupported, WrongModel
from zimage_core.memory.budget import read_bytes
from zimage_core.memory.plan import Plan, make_plan
from zimage_core.memory.rates import Rates
from zimage_core.memory.sizes import COMPONENTS, open_sizes
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.run import sources
from zimage_core.run.checks import read_device, read_dtype, read_path, shown
from zimage_core.run.nonfinite import guard_attention
from zimage_core.run.placement import Placement
from zimage_core.run.request import Limits
from zimage_core.sampling.schedule import BASE_SHIFT, FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.card import check_compatible
from zimage_core.weights.files import WeightFile
from zimage_core.weights.load import check_files, load_text_encoder, load_transformer, load_vae, weight_file

NATIVE_SIZE = 1024
SIZE_KEY = "zimage.sample_size"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
ALWAYS = ("low_cpu_mem_usage", "use_safetensors")
"""Arguments of diffusers whose wish is always met."""

PathLike = str | os.PathLike[str]
Self = TypeVar("Self", bound="Components")


class Components(Placement):
    """Three networks, a tokenizer and a scheduler that belong together.

    Args:
        scheduler: Noise levels; its shift tells the base checkpoint (6) from the distilled ones (any
            other, theirs is 3), here and once: a scheduler put in its place later changes no default.
        vae: Always in float32: the official code decodes so, and the model's own config asks for it.
        text_encoder: Its width is the transformer's caption width.
        tokenizer: The text encoder's.
        transformer: S3-DiT.
        sample_size: Default height and width in pixels.

    Raises:
        WrongModel: The parts do not fit each other.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerScheduler,
        vae: Autoencoder,
        text_encoder: TextEncoder,
        tokenizer: Tokenizer,
        transformer: ZImageTransformer,
        sample_size: int = NATIVE_SIZE,
    ) -> None:
        self.scheduler = scheduler
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.sample_size = sample_size
        self._running: dict[str, object] = {}
        self._interrupt = False
        self._guidance_scale = 0.0
        self._num_timesteps = 0
        self._base = scheduler.shift == BASE_SHIFT
        guard_attention(text_encoder, "text encoder")
        guard_attention(vae, "VAE")
        paths = {name: file.path for name, file in self.files().items()}
        check_compatible(transformer.config, text_encoder.config, vae.config, paths)
        rows = text_encoder.config.vocab_size
        if tokenizer.vocab_size > rows:
            raise WrongModel(
                paths.get("text_encoder", "text encoder"),
                f"it knows {rows} tokens, the tokenizer has {tokenizer.vocab_size}",
                "give the tokenizer that belongs to it",
            )

    @classmethod
    def from_files(
        cls: type[Self],
        transformer: PathLike,
        text_encoder: PathLike,
        vae: PathLike,
        tokenizer: PathLike | Tokenizer | None = None,
        *,
        scheduler: FlowMatchEulerScheduler | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
        mmap: bool = True,
        vram: int | str | None = None,
        ram: int | str | None = None,
    ) -> Self:
        """A pipeline from files (GGUF or safetensors) or folders of shards; contents decide, not names.

        Args:
            transformer: S3-DiT.
            text_encoder: Qwen3-4B or whatever the transformer was trained with.
            vae: FLUX.1's.
            tokenizer: tokenizer.json, a folder with one or with vocab.json and merges.txt, a GGUF, or an
                object. Default: the text encoder's own GGUF keys, else a tokenizer beside its file.
            scheduler: Default: shift 3, as in Turbo. Loose files of the base checkpoint look the same,
                so for those pass FlowMatchEulerScheduler(shift=6.0), which also sets 50 steps and
                guidance 4.
            dtype: Of the computation: float32, float16, bfloat16, as torch dtype or name. Default:
                float32 on a CPU, float16 on GPUs before Ampere, else bfloat16. Weights stay packed as they
                are in every case.
            torch_dtype: Another name for it, as in diffusers.
            device: Where to compute.
            mmap: Use the weights in place; the files must then not change. False reads them into memory.
            vram: Limit of GPU memory, such as "6GiB" or "auto"; see `limit_memory`.
            ram: Limit of host memory, likewise.

        Raises:
            BadArgument: A path is none; BadFile: a file cannot be read; WrongModel, BadWeights: it is another
                model or a damaged one.
        """
        where = read_device(device)
        kind = read_dtype(dtype, torch_dtype, where)
        paths = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        check_files({name: read_path(name, path) for name, path in paths.items()})
        limited = vram is not None or ram is not None
        home = torch.device("cpu") if limited else where  # under a limit, phases bring them to the device
        encoder = load_text_encoder(text_encoder, kind, home, mmap)
        words = sources.find_tokenizer(tokenizer, weight_file(encoder))
        net = load_transformer(transformer, kind, home, mmap)
        decoder = load_vae(vae, torch.float32, home, mmap)
        size = _sample_size(weight_file(net))
        pipe = cls(scheduler or FlowMatchEulerScheduler(), decoder, encoder, words, net, size)
        if limited:
            pipe.limit_memory(vram, ram, device=where)
        return pipe

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: PathLike,
        *,
        transformer: PathLike | None = None,
        text_encoder: PathLike | None = None,
        vae: PathLike | None = None,
        tokenizer: PathLike | Tokenizer | None = None,
        scheduler: FlowMatchEulerScheduler | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
        mmap: bool = True,
        vram: int | str | None = None,
        ram: int | str | None = None,
        **others: Any,
    ) -> Self:
        """A pipeline from a folder, or from a repository of the Hugging Face Hub.

        A folder is diffusers' layout, or holds loose files that are told apart by their contents. A
        repository is "org/repo", or "org/repo:Q4_K_M" to choose one quantisation; that needs the package
        huggingface_hub (`pip install zimage_core[hub]`) and downloads nothing when HF_HUB_OFFLINE is set.

        Args:
            pretrained_model_name_or_path: Folder or repository.
            transformer: Taken instead of its own, like the next three; a repository with quantised
                transformers alone needs the other parts from elsewhere.
            text_encoder: See there.
            vae: See there.
            tokenizer: See there.
            scheduler: Default: the folder's scheduler_config.json, else shift 3.
            dtype: See `from_files`, like the rest.
            torch_dtype: See there.
            device: See there.
            mmap: See there.
            vram: See there.
            ram: See there.
            others: What code written for diffusers also gives. `low_cpu_mem_usage` and `use_safetensors`
                ask for what is always so here; `revision`, `cache_dir`, `token` and `local_files_only` go
                to the Hub. Another one with a value is refused.

        Raises:
            BadArgument, BadFile, WrongModel, BadWeights: As `from_files`.
            Unsupported: An argument of diffusers that means nothing here; the message names it.
        """
        hub_options = {name: others.pop(name) for name in HUB_OPTIONS if others.get(name) is not None}
        for name, value in others.items():
            if value is not None and name not in ALWAYS:
                raise Unsupported(f"from_pretrained: {name}={shown(value)} means nothing here; leave it out")
        named = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        given = {name: path for name, path in named.items() if path is not None}
        found = sources.find(pretrained_model_name_or_path, given, hub_options)
        paths: dict[str, PathLike] = {**found.paths, **given}
        words = tokenizer if tokenizer is not None or text_encoder is not None else found.tokenizer
        return cls.from_files(
            paths["transformer"],
            paths["text_encoder"],
            paths["vae"],
            words,
            scheduler=scheduler or found.scheduler,
            dtype=dtype,
            torch_dtype=torch_dtype,
            device=device,
            mmap=mmap,
            vram=vram,
            ram=ram,
        )

    @classmethod
    def from_default(
        cls: type[Self],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
        vram: int | str | None = None,
        ram: int | str | None = None,
    ) -> Self:
        """The nano model inside the package: small pictures of shapes and letters, offline."""
        found = sources.embedded()
        net, encoder, vae = (found.paths[part] for part in sources.COMPONENTS)
        return cls.from_files(
            net, encoder, vae, dtype=dtype, torch_dtype=torch_dtype, device=device, vram=vram, ram=ram
        )

    @property
    def guidance_scale(self) -> float:
        """Of the run in progress, for callbacks."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the run in progress has a negative side."""
        return self._guidance_scale > 0

    @property
    def num_timesteps(self) -> int:
        """Steps of the run in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked the run in progress to stop (`pipe._interrupt = True`)."""
        return self._interrupt

    @property
    def limits(self) -> Limits:
        """What these parts allow, and the defaults that suit the checkpoint, Turbo or base."""
        base = self._base
        net, vae = self.transformer.config, self.vae.config
        return Limits(
            sample_size=self.sample_size,
            steps=50 if base else 8,
            guidance=4.0 if base else 0.0,
            distilled=not base,
            channels=net.in_channels,
            caption_width=net.cap_feat_dim,
            factor=vae.spatial_factor,
            patch=net.patch_size,
            rows=net.axes_lens[1],
            cols=net.axes_lens[2],
        )

    def files(self) -> dict[str, WeightFile]:
        """Component -> the open file whose bytes it uses; a component built in memory has none."""
        parts = {"transformer": self.transformer, "text_encoder": self.text_encoder, "vae": self.vae}
        found = {name: weight_file(part) for name, part in parts.items()}
        return {name: file for name, file in found.items() if file is not None}

    def plan(
        self,
        width: int | None = None,
        height: int | None = None,
        images: int = 1,
        caption_tokens: int = 128,
        *,
        vram: int | str | None = None,
        ram: int | str | None = None,
        rates: Rates | None = None,
        guidance: bool | None = None,
        steps: int | None = None,
    ) -> Plan:
        """What lies where in each phase of a run on a GPU, and how long it should take; nothing is run.

        Args:
            width: In pixels; default: this checkpoint's, like height, guidance and steps.
            height: In pixels.
            images: Pictures of the run.
            caption_tokens: Of each caption, template included.
            vram: GPU memory for the run, bytes or "6GiB"; None: without a limit.
            ram: Host memory, likewise; None: enough.
            rates: Of the machine, see `memory.rates.measure` and `known`; default: those known of sm_86.
            guidance: Whether there is a negative side.
            steps: Of the run.

        Raises:
            BadArgument: A number is out of range; OverBudget: the budget does not hold the least.
            Unsupported: A network was built in memory; there is no header to plan from.
        """
        files, limits = self.files(), self.limits
        if missing := [name for name in COMPONENTS if name not in files]:
            raise Unsupported(f"plan: {' and '.join(missing)} came from no file; load it from one")
        return make_plan(
            open_sizes(files, str(self.dtype).removeprefix("torch.")),
            limits.sample_size if width is None else width,
            limits.sample_size if height is None else height,
            images,
            caption_tokens,
            vram=None if vram is None else read_bytes("vram", vram),
            ram=None if ram is None else read_bytes("ram", ram),
            rates=rates,
            guidance=limits.guidance > 0 if guidance is None else guidance,
            steps=limits.steps if steps is None else steps,
        )

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, as diffusers has them: `ZImagePipeline(**pipe.components)` shares them."""
        names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer", "sample_size")
        return {name: getattr(self, name) for name in names}


def _sample_size(file: WeightFile | None) -> int:
    size = None if file is None else file.metadata.get(SIZE_KEY)
    return size if isinstance(size, int) and 16 <= size <= 8192 and size % 16 == 0 else NATIVE_SIZE
