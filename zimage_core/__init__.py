"""Z-Image inference from GGUF files, written from scratch.

The public names are resolved at first use (PEP 562): importing the package loads neither torch nor any
network, so `zimage inspect` starts at once.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage_core.control.load import load_controlnet
    from zimage_core.control.model import ControlNet as ZImageControlNetModel
    from zimage_core.control_pipelines import ZImageControlNetInpaintPipeline, ZImageControlNetPipeline
    from zimage_core.errors import (
        BadArgument,
        BadFile,
        BadRows,
        BadShape,
        BadWeights,
        Busy,
        DeviceFault,
        NonFinite,
        OutOfMemory,
        OverBudget,
        RankFailed,
        UnknownFormat,
        Unsupported,
        WrongModel,
        ZImageError,
    )
    from zimage_core.export.converting import convert_file
    from zimage_core.export.pretrained import save_pretrained
    from zimage_core.export.quantizing import quantize_file
    from zimage_core.formats import FORMATS
    from zimage_core.image_pipelines import ZImageImg2ImgPipeline, ZImageInpaintPipeline
    from zimage_core.memory.phases import MemoryBudget
    from zimage_core.omni_pipelines import ZImageOmniPipeline
    from zimage_core.pipeline import ZImagePipeline
    from zimage_core.quant.dequantize import dequantize
    from zimage_core.quant.tensor import QuantTensor
    from zimage_core.quantize.encode import encode
    from zimage_core.run.sources import load_tokenizer
    from zimage_core.sampling.schedule import FlowMatchEulerScheduler
    from zimage_core.sampling.schedule import FlowMatchEulerScheduler as FlowMatchEulerDiscreteScheduler
    from zimage_core.text.tokenizer import Tokenizer
    from zimage_core.weights.identify import identify
    from zimage_core.weights.inspection import inspect_file
    from zimage_core.weights.language import load_language_model
    from zimage_core.weights.load import load_siglip, load_text_encoder, load_transformer, load_vae
    from zimage_core.weights.opened import open_weights

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "BadArgument",
    "BadFile",
    "BadRows",
    "BadShape",
    "BadWeights",
    "Busy",
    "DeviceFault",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchEulerScheduler",
    "MemoryBudget",
    "NonFinite",
    "OutOfMemory",
    "OverBudget",
    "QuantTensor",
    "RankFailed",
    "Tokenizer",
    "UnknownFormat",
    "Unsupported",
    "WrongModel",
    "ZImageControlNetInpaintPipeline",
    "ZImageControlNetModel",
    "ZImageControlNetPipeline",
    "ZImageError",
    "ZImageImg2ImgPipeline",
    "ZImageInpaintPipeline",
    "ZImageOmniPipeline",
    "ZImagePipeline",
    "convert_file",
    "dequantize",
    "encode",
    "identify",
    "inspect_file",
    "load_controlnet",
    "load_language_model",
    "load_siglip",
    "load_text_encoder",
    "load_tokenizer",
    "load_transformer",
    "load_vae",
    "open_weights",
    "quantize_file",
    "save_pretrained",
]

_MODULE = {  # public name -> module; all other public names are error classes
    "FORMATS": "formats",
    "FlowMatchEulerDiscreteScheduler": "sampling.schedule",
    "FlowMatchEulerScheduler": "sampling.schedule",
    "MemoryBudget": "memory.phases",
    "QuantTensor": "quant.tensor",
    "Tokenizer": "text.tokenizer",
    "ZImageImg2ImgPipeline": "image_pipelines",
    "ZImageInpaintPipeline": "image_pipelines",
    "ZImageControlNetInpaintPipeline": "control_pipelines",
    "ZImageControlNetModel": "control.model",
    "ZImageControlNetPipeline": "control_pipelines",
    "ZImageOmniPipeline": "omni_pipelines",
    "ZImagePipeline": "pipeline",
    "convert_file": "export.converting",
    "dequantize": "quant.dequantize",
    "encode": "quantize.encode",
    "identify": "weights.identify",
    "inspect_file": "weights.inspection",
    "load_controlnet": "control.load",
    "load_language_model": "weights.language",
    "load_siglip": "weights.load",
    "load_text_encoder": "weights.load",
    "load_tokenizer": "run.sources",
    "load_transformer": "weights.load",
    "load_vae": "weights.load",
    "open_weights": "weights.opened",
    "quantize_file": "export.quantizing",
    "save_pretrained": "export.pretrained",
}


_RENAMED = {"MemoryPlan": "MemoryBudget"}
"""Deprecated public name -> its replacement."""


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        warnings.warn(f"zimage_core.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
