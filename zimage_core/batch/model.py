"""The model of a batch as a description: small enough to send to another process, which loads it there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_core.assets import DEFAULT
from zimage_core.config import COMPONENTS, NATIVE_SIZE, AutoencoderConfig, TransformerConfig
from zimage_core.cpu.threads import SMALL_STEP
from zimage_core.errors import BadArgument, WrongModel
from zimage_core.memory.rates import step_flops
from zimage_core.run.checks import shown
from zimage_core.weights.opened import open_weights

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline
    from zimage_core.run.request import Limits

EDGES = "edges"
"""The ControlNet of the embedded model."""
PATHS = ("model", *COMPONENTS, "tokenizer", "siglip")


@dataclass(frozen=True)
class Model:
    """Which model draws, and how it computes; the names are those of the options of `zimage generate`.

    Args:
        model: Folder, repository "org/repo[:Q4_K_M]", or "default"; None for the embedded model, or for the
            three files.
        variant: Variant of the files in the folder.
        transformer: File of the transformer.
        text_encoder: File of the text encoder.
        vae: File of the VAE.
        tokenizer: File or folder of the tokenizer.
        siglip: File of the vision tower of an Omni checkpoint.
        dtype: "auto", "float32", "float16" or "bfloat16".
        compute: "auto", "exact", "bfloat16" or "int8".
        device: "auto", "cpu", "cuda", "cuda:1" ...
        vram: Limit of GPU memory.
        ram: Limit of host memory.
        controlnets: ControlNets to load, in their order.
        omni: Whether the embedded model is its Omni sibling.
    """

    model: str | None = None
    variant: str | None = None
    transformer: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    siglip: str | None = None
    dtype: str = "auto"
    compute: str = "auto"
    device: str = "auto"
    vram: str | int | None = None
    ram: str | int | None = None
    controlnets: tuple[str, ...] = ()
    omni: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Model:
        """A description from arguments; paths become absolute, so that other folders can use them.

        Raises:
            BadArgument: There is no such argument, or files that need each other are missing.
        """
        known = [field.name for field in fields(cls)]
        if strange := [name for name in options if name not in known]:
            raise BadArgument(f"{strange[0]}: no argument of a model; known are {', '.join(known)}")
        found = {name: value for name, value in options.items() if value is not None}
        for name in PATHS:
            if name in found:
                found[name] = _absolute(name, found[name])
        nets = found.get("controlnets", ())
        nets = nets if isinstance(nets, (list, tuple)) else (nets,)
        found["controlnets"] = tuple(_absolute("controlnets", each) for each in nets)
        model = cls(**found)
        parts = [name for name in COMPONENTS if getattr(model, name) is not None]
        if model.model is None and 0 < len(parts) < len(COMPONENTS):
            missing = [name for name in COMPONENTS if name not in parts]
            raise BadArgument(f"{' and '.join(parts)} alone cannot draw: give {' and '.join(missing)} too")
        return model

    @property
    def embedded(self) -> bool:
        """Whether it is the model inside the package."""
        return self.model in (None, DEFAULT) and not self._parts()

    def _parts(self) -> dict[str, Any]:
        return {name: value for name in PATHS[1:] if (value := getattr(self, name)) is not None}

    def placed(self) -> Model:
        """The same model with its device decided: the first GPU that torch can use, or the CPU."""
        if self.device != "auto":
            return self
        from zimage_core.run.checks import read_device

        where = read_device("auto")
        limits: dict[str, Any] = (
            {"vram": "auto"} if where.type == "cuda" and self.vram is None and self.ram is None else {}
        )
        return replace(self, device=str(where), **limits)

    def load(self) -> ZImagePipeline:
        """Load the pipeline and its ControlNets.

        Raises:
            ZImageError: What the constructors of the pipeline raise.
        """
        from zimage_core.pipeline import ZImagePipeline

        placed = self.placed()
        options: dict[str, Any] = {"device": placed.device, "compute": self.compute}
        for name in ("vram", "ram"):
            if (limit := getattr(placed, name)) is not None:
                options[name] = limit
        if self.dtype != "auto":
            options["dtype"] = self.dtype
        parts = self._parts()
        if self.model is not None:
            pipe = ZImagePipeline.from_pretrained(self.model, **parts, **options, variant=self.variant)
        elif parts:
            pipe = ZImagePipeline.from_files(**parts, **options)
        else:
            pipe = ZImagePipeline.from_default(**options, omni=self.omni)
        stems = [Path(net).stem for net in self.controlnets]
        for i, (net, stem) in enumerate(zip(self.controlnets, stems, strict=True)):
            pipe.load_controlnet(net, stem if stems.index(stem) == i else f"{stem}-{i + 1}")
        return pipe

    def survey(self) -> Survey:
        """What the headers of the files say, without loading a weight.

        Raises:
            BadFile, WrongModel: A file cannot be used.
        """
        from zimage_core.run.loading import find_components, stated_scheduler
        from zimage_core.run.request import Limits
        from zimage_core.run.sources import embedded
        from zimage_core.weights.components import open_pipeline
        from zimage_core.weights.facts import facts

        parts: Mapping[str, Any] = {
            name: value for name, value in self._parts().items() if name in COMPONENTS
        }
        scheduler, tower = None, self.siglip
        if self.model is not None:
            parts, _, scheduler = find_components(self.model, parts, None, None, False, self.variant, {})
            tower = tower or parts.get("siglip")
            parts = {name: value for name, value in parts.items() if name in COMPONENTS}
        paths = parts or {n: p for n, p in embedded(self.omni).paths.items() if n in COMPONENTS}
        opened = open_pipeline(paths)
        try:
            net, vae = opened["transformer"].card.config, opened["vae"].card.config
            if not isinstance(net, TransformerConfig) or not isinstance(vae, AutoencoderConfig):
                raise WrongModel(opened["transformer"].file.path, "the size of the model cannot be told")
            known = facts(opened["transformer"])
            scheduler = scheduler or stated_scheduler(known)
            size = known.get("sample_size", NATIVE_SIZE)
            limits = Limits.of(net, vae, size, None if scheduler is None else scheduler.shift)
            files = {name: part.file.identity() for name, part in opened.items()}
        finally:
            for part in opened.values():
                part.file.close()
        if tower is not None:
            files["siglip"] = hash_of(tower)
        return Survey(limits, files, is_small(net, limits))


@dataclass(frozen=True)
class Survey:
    """What is known of a model before it is loaded.

    Args:
        limits: Limits and defaults of a call.
        files: Component -> name, size and hash of its file.
        small: Whether a step is too small for a second thread.
    """

    limits: Limits
    files: Mapping[str, Mapping[str, Any]]
    small: bool


def is_small(config: TransformerConfig, limits: Limits) -> bool:
    """Whether a step at the model's own size is too small for a second thread."""
    side = limits.sample_size // limits.factor
    return step_flops(config, side, side, 128) < SMALL_STEP


def hash_of(file: Any) -> dict[str, Any]:
    """Size and hash of a file of weights, as in an image's settings; it may be open already.

    Raises:
        BadFile: It is no file of weights.
    """
    opened = getattr(file, "file", None) or open_weights(file, mmap=False)
    try:
        return nameless(opened.identity())
    finally:
        opened.close()


def nameless(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Size and hash of a file, without its name."""
    return {name: value for name, value in identity.items() if name != "name"}


def _absolute(name: str, value: Any) -> str:
    """The absolute path of a file or folder that exists; any other name as it is, such as a repository."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str):
        raise BadArgument(f"{name}: got {shown(value)}, wanted a path or the name of a model")
    return str(Path(path).absolute()) if path and os.path.lexists(path) else path
