"""Reads an adapter from a file, a folder or tensors, and checks all of it before anything is changed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zimage_core.adapters import kinds
from zimage_core.adapters.applied import Adapter, Facts
from zimage_core.adapters.change import Change
from zimage_core.adapters.dialects import Group, Matched, Target, match
from zimage_core.adapters.foreign import named
from zimage_core.cpu.numbers import DTYPES
from zimage_core.errors import (
    BadArgument,
    BadFile,
    BadWeights,
    Unsupported,
    WrongModel,
    ZImageError,
    printable,
)
from zimage_core.files.untrusted import read_json
from zimage_core.nn.linear import Linear
from zimage_core.weights.adapters import identify_adapter
from zimage_core.weights.identify import identify
from zimage_core.weights.opened import open_weights
from zimage_core.weights.source import WeightFile

PEFT_KEY = "lora_adapter_metadata"
"""Key of a safetensors file under which diffusers writes PEFT's configuration as JSON."""
PEFT_CONFIG = "adapter_config.json"
"""File beside an adapter in PEFT's own folders."""
PEFT_STEM = "adapter_model"
"""Stem of the adapter there."""
TEXT_ENCODER = "text_encoder."
"""Prefix of the text encoder's layers, and of its part of that configuration."""
CHANGED_BASES = ("pissa", "olora", "corda")
"""Starts of PEFT's LoRAs that take a part out of the base's weights, which the file is no change of then."""
MOST_JSON = 1 << 20
FLOATS = ("F32", "F16", "BF16")
"""Types of tensors that are kept as they are stored; any other becomes float32."""
NORM = {"diff": False, "w_norm": False, "set_weight": True}
"""Tensor of a norm or pad token -> whether it replaces the numbers instead of being added."""
BIAS = "diff_b"


class Tensors(Protocol):
    """The tensors of an adapter, by the names that it gives them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, of a float type."""


class OfFile:
    """Tensors of an open file; each is read into memory, so that the file may go afterwards."""

    def __init__(self, file: WeightFile) -> None:
        self.file = file
        self.shapes: dict[str, tuple[int, ...]] = {name: info.shape for name, info in file.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in its own type if that is a float of 16 or 32 bits."""
        stored = self.file.tensor(name)
        dtype = DTYPES[stored.format.name] if stored.format.name in FLOATS else torch.float32
        dense: Tensor = stored.dequantize(dtype)
        return dense


class OfDict:
    """Tensors that a caller gives, as `load_lora_weights(state_dict)` does."""

    def __init__(self, tensors: Mapping[Any, Any]) -> None:
        for name, value in tensors.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise BadArgument(
                    f"a LoRA given as a dict holds {printable(repr(name), 60)}: {type(value).__name__}, "
                    "wanted names with torch tensors"
                )
        self._tensors = tensors
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(value.shape) for name, value in tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """A copy of one tensor on the CPU."""
        value = self._tensors[name].detach()
        kept = value.dtype in (torch.float32, torch.float16, torch.bfloat16)
        copy: Tensor = value.to("cpu", value.dtype if kept else torch.float32, copy=True)
        return copy


@dataclass(frozen=True)
class Found:
    """An adapter before it is applied.

    Args:
        facts: What is known of it.
        parts: Component -> what it does to that network.
    """

    facts: Facts
    parts: Mapping[str, Adapter] = field(default_factory=dict)


def read_adapter(
    given: str | PathLike[str] | Mapping[str, Any],
    name: str,
    networks: Mapping[str, nn.Module],
    file_name: str | None = None,
) -> Found:
    """Read and check an adapter.

    Args:
        given: A file (safetensors or GGUF), a folder that holds one, or tensors by name.
        name: Its name in the pipeline.
        networks: "transformer" and "text_encoder", as far as there are some.
        file_name: Name of the file in a folder that holds several.

    Raises:
        BadFile, UnknownFormat: The file cannot be read.
        WrongModel: Nothing in it belongs to these networks, or its sizes are those of another model.
        BadWeights: It is incomplete, or holds NaN or infinity.
        Unsupported: It is of a kind that is not applied.
    """
    if isinstance(given, Mapping):
        return _checked(OfDict(given), {}, "the given tensors", name, networks, {})
    path = _file_in(given, file_name)
    file = open_weights(path, mmap=False)
    try:
        config = _peft_config(file)
        return _checked(OfFile(file), config, file.path, name, networks, file.identity(), file)
    finally:
        file.close()


def _file_in(given: str | PathLike[str], file_name: str | None) -> Path:
    """The file of an adapter: itself, or the one in a folder.

    Raises:
        BadFile: A folder holds no such file, or several.
        BadArgument: `file_name` leads out of the folder.
    """
    path = Path(given)
    if file_name is not None:
        if Path(file_name).is_absolute() or ".." in Path(file_name).parts:
            raise BadArgument(
                f"weight_name: got {printable(file_name, 80)}, wanted the name of a file in the folder"
            )
        return path / file_name
    if not path.is_dir():
        return path
    found = _weights_in(path)
    if len(found) != 1:
        what = f"{len(found)} files that may be one" if found else "no LoRA: no .safetensors and no .gguf"
        raise BadFile(path, f"a folder with {what}", "name the file, or give weight_name=")
    return found[0]


def _weights_in(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix in (".safetensors", ".sft", ".gguf"))


def _peft_config(file: WeightFile) -> dict[str, Any]:
    """PEFT's configuration, from the file's own metadata or from the file beside it."""
    stated = file.metadata.get(PEFT_KEY)
    if isinstance(stated, str):
        if len(stated) > MOST_JSON:
            raise BadFile(
                file.path, f"{PEFT_KEY} has {len(stated)} characters, at most {MOST_JSON} are allowed"
            )
        try:
            config = json.loads(stated)
        except (ValueError, RecursionError):
            raise BadFile(file.path, f"its {PEFT_KEY} is not valid JSON", "save the LoRA again") from None
        return config if isinstance(config, dict) else {}
    path = Path(file.path)
    beside = path.with_name(PEFT_CONFIG)
    if not beside.is_file() or (path.stem != PEFT_STEM and len(_weights_in(path.parent)) > 1):
        return {}  # there is none, or it is another file's
    return read_json(beside)


def scaling_of(config: Mapping[str, Any], where: str, metadata: Mapping[str, Any]) -> kinds.Scaling:
    """Scales that a configuration of PEFT states; keys may begin with "transformer." or "text_encoder."."""
    encoder = {
        key.removeprefix(TEXT_ENCODER): own for key, own in config.items() if key.startswith(TEXT_ENCODER)
    }
    bare = {key.removeprefix("transformer."): own for key, own in config.items()}
    given = metadata.get("adapter.lora.alpha")
    begin, terms = (
        str(bare.get("init_lora_weights")),
        bare.get("num_cayley_neumann_terms", kinds.NEUMANN_TERMS),
    )
    if begin.lower().startswith(CHANGED_BASES):
        raise Unsupported(
            f"it was trained beside weights that {printable(begin, 40)} changed; convert it by PEFT"
        )
    if terms != kinds.NEUMANN_TERMS and bare.get("use_cayley_neumann", True):
        raise Unsupported(
            f"its turns are series of {printable(terms, 40)} terms, wanted {kinds.NEUMANN_TERMS}"
        )
    (whole, pattern), of_encoder = _alphas(bare, where, given), _alphas({**bare, **encoder}, where, given)
    full = 1.0
    if bare.get("peft_type") in ("LOHA", "LOKR"):  # PEFT's name of the alpha of these
        whole, rank = _number(bare.get("alpha"), where), _number(bare.get("r"), where)
        of_encoder = whole, pattern
        full = whole / rank if whole is not None and rank else 1.0

    def alpha(layer: str) -> float | None:
        usual, own = of_encoder if layer.startswith(TEXT_ENCODER) else (whole, pattern)
        return next((v for key, v in own.items() if layer == key or layer.endswith(f".{key}")), usual)

    return kinds.Scaling(
        alpha, bool(bare.get("use_rslora")), full, bare.get("use_cayley_neumann", True) is not False
    )


def _alphas(
    config: Mapping[str, Any], where: str, given: object
) -> tuple[float | None, dict[str, float | None]]:
    """The alpha of all layers, and those of layers that are named."""
    patterns = config.get("alpha_pattern")
    named = patterns if isinstance(patterns, dict) else {}
    whole = _number(config.get("lora_alpha", given), where)
    return whole, {key: _number(value, where) for key, value in named.items()}


def _number(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadFile(
            where, f"states {printable(value, 40)} for alpha, wanted a number", "save the LoRA again"
        )
    return float(value)


def _checked(
    tensors: Tensors,
    config: Mapping[str, Any],
    where: str,
    name: str,
    networks: Mapping[str, nn.Module],
    identity: Mapping[str, Any],
    file: WeightFile | None = None,
) -> Found:
    """Match, read and check all tensors; the errors name the file."""
    card = identify_adapter(tensors.shapes)
    if card is None:
        what = "tensors of no adapter" if file is None else f"this is {identify(file).title}"
        raise WrongModel(
            where, f"a LoRA was wanted, {what}", "give the file of a LoRA or one of its relatives"
        )
    for kind in ("IA3", "VeRA", "BOFT", "GLoRA"):
        if kind in card.title:
            raise Unsupported(
                f"{printable(where)}: {card.title}, a kind that is not applied; merge it by the program that "
                "made it"
            )
    configs = {component: network.config for component, network in networks.items()}
    try:
        matched = match(tensors.shapes, configs)  # type: ignore[arg-type]
        _refuse_strangers(matched, where, name=card.title, shapes=tensors.shapes)
        scaling = scaling_of(config, where, {} if file is None else file.metadata)
        return _read(tensors, matched, scaling, card.title, name, networks, identity)
    except (BadWeights, Unsupported) as error:
        if str(error).startswith(printable(where)):
            raise
        raise type(error)(f"{printable(where)}: {error}") from None


def _refuse_strangers(matched: Matched, where: str, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file in which nothing belongs here, or that is mostly of another model."""
    used = sum(len(group.tensors) for group in matched.groups) + matched.unused
    model = named(shapes)
    if used and not (model and len(matched.unmatched) > used):
        return
    shown = f"{name}, which changes {model}" if model else name
    if not used:
        shown += ": none of its layers is one of this pipeline's"
    raise WrongModel(where, shown, "get a LoRA for Z-Image")


def _read(
    tensors: Tensors,
    matched: Matched,
    scaling: kinds.Scaling,
    title: str,
    name: str,
    networks: Mapping[str, nn.Module],
    identity: Mapping[str, Any],
) -> Found:
    changes: dict[str, dict[str, Change]] = {component: {} for component in networks}
    values: dict[str, dict[str, tuple[Tensor, bool]]] = {component: {} for component in networks}
    ranks: list[int] = []
    used = 0
    for group in matched.groups:
        # refused by their shapes, before large tensors are read
        if kind := kinds.not_built({leaf: tensors.shapes[each] for leaf, each in group.tensors.items()}):
            raise Unsupported(
                f"{printable(group.name, 100)!r} is {kind}, which is not applied; merge it by the "
                "program that made it"
            )
        own = {leaf: _finite(tensors, each) for leaf, each in group.tensors.items()}
        used += len(own)
        for target in group.targets:
            module = networks[target.component]
            _apply_values(group, own, target, module, values[target.component])
            place = _linear(module, target)
            if place is None or (BIAS in own and own.keys() <= {BIAS, "alpha", "rank"}):
                continue
            rest = {leaf: each for leaf, each in own.items() if leaf not in (BIAS, "rank", "scale")}
            change = kinds.change_of(group.name, rest, target, place, scaling)
            if target.module in changes[target.component]:
                raise BadWeights(
                    f"{printable(group.name, 100)!r} changes {target.module}, which another one "
                    "changes too; keep one of them"
                )
            changes[target.component][target.module] = change
            ranks += [change.rank] if change.rank else []
    parts = {
        component: (changes[component], values[component])
        for component in networks
        if changes[component] or values[component]
    }
    if not parts:
        raise BadWeights("nothing in the adapter changes anything")
    facts = Facts(
        name=name,
        title=title,
        file=dict(identity),
        kinds=tuple(sorted({_kind(change) for made, _ in parts.values() for change in made.values()})),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        layers={component: len(made) + len(own) for component, (made, own) in parts.items()},
        tensors=used,
        unmatched=tuple(matched.unmatched),
    )
    return Found(facts, {component: Adapter(facts, *part) for component, part in parts.items()})


def _finite(tensors: Tensors, name: str) -> Tensor:
    try:
        value = tensors.read(name)
    except ZImageError:
        raise
    except (KeyError, RuntimeError) as error:  # a type that no weight has
        raise BadWeights(
            f"{printable(name, 100)!r} cannot be read as numbers: {printable(error, 80)}"
        ) from None
    if not bool(torch.isfinite(value).all()):
        raise BadWeights(f"{printable(name, 100)!r} holds NaN or infinite numbers; get the file again")
    return value


def _linear(network: nn.Module, target: Target) -> Linear | None:
    """The Linear layer that a target is; None for a norm or pad token."""
    try:
        module = network.get_submodule(target.module)
    except AttributeError:
        return None
    return module if isinstance(module, Linear) else None


def _apply_values(
    group: Group,
    own: Mapping[str, Tensor],
    target: Target,
    network: nn.Module,
    values: dict[str, tuple[Tensor, bool]],
) -> None:
    """Note the changes of parameters without a product: biases, norms and pad tokens."""
    layer = _linear(network, target)
    if layer is not None:
        wanted = {BIAS: (f"{target.module}.bias", layer.bias, False)}
    else:
        alone = target.module in dict(network.named_parameters(recurse=False))
        name = target.module if alone else f"{target.module}.weight"
        parameter = _parameter(network, name)
        wanted = {leaf: (name, parameter, absolute) for leaf, absolute in NORM.items()}
        if strange := own.keys() - NORM.keys() - {"alpha", "rank"}:
            raise BadWeights(
                f"{printable(group.name, 100)!r} is a norm or pad token and has a {min(strange)}"
            )
    for leaf, (name, parameter, absolute) in wanted.items():
        if leaf not in own:
            continue
        value = own[leaf]
        if parameter is None or target.rows is not None:
            raise BadWeights(f"{printable(group.name, 100)!r} has a {leaf}, and that layer has no bias")
        if value.numel() != parameter.numel():
            raise BadWeights(
                f"{printable(group.name, 100)!r} has {value.numel()} numbers in its {leaf}, this model has "
                f"{parameter.numel()} there: it was made for another model"
            )
        if name in values:
            raise BadWeights(f"{printable(group.name, 100)!r} changes {name} twice; keep one of them")
        values[name] = value, absolute


def _parameter(network: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return network.get_parameter(name)
    except AttributeError:
        return None


def _kind(change: Change) -> str:
    """What a user calls a change."""
    names = {"down": "low rank", "w1": "Kronecker", "dense": "dense", "turn_in": "OFT", "turn_out": "OFT"}
    for part, kind in names.items():
        if getattr(change, part) is not None:
            return kind + (", DoRA" if change.gain is not None or change.scale_in is not None else "")
    return "scale"
