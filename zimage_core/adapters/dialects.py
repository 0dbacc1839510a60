"""From the tensor names of an adapter file to the layers of this library's networks.

Programs that train differ in the prefix, in '.' or '_' between the parts of a name, and in whether q, k and v
are one layer. A name is therefore compared without prefix, with '_' for '.' and '-', with the names that
`weights.names` computes for every layout of a checkpoint. Which tensor of a layer it is (the first factor,
alpha ...) is told by `weights.adapters.split_name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from zimage_core.config import TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadWeights, printable
from zimage_core.weights import names
from zimage_core.weights.adapters import split_name


@dataclass(frozen=True)
class Target:
    """A layer, norm or pad token that an adapter may change.

    Args:
        component: "transformer" or "text_encoder".
        module: Name of the module, or of the parameter if it is a pad token.
        rows: (start, stop) of its rows in the layer that the file names, if that is a fused one; else None.
        total: Rows of that fused layer; 0 if it is not fused.
    """

    component: str
    module: str
    rows: tuple[int, int] | None = None
    total: int = 0


@dataclass
class Group:
    """The tensors of an adapter for one layer as the file names it.

    Args:
        name: Name of the layer in the file.
        targets: What it changes; three for a fused layer.
        tensors: Which tensor, as `weights.adapters.split_name` says -> its name in the file.
    """

    name: str
    targets: tuple[Target, ...]
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass
class Matched:
    """An adapter's tensors by the layers that they change.

    Args:
        groups: One for each layer that the file names.
        unmatched: Names of tensors that belong to no layer of these networks.
        unused: Number of tensors for the last layer of the text encoder, which is never run.
    """

    groups: list[Group]
    unmatched: list[str]
    unused: int = 0


Configs = Mapping[str, TransformerConfig | TextEncoderConfig]
"""Component -> sizes of its network."""


def flat(name: str) -> str:
    """A name with '_' between its parts, as kohya's programs write it."""
    return name.replace(".", "_").replace("-", "_").replace("processor_", "")


def targets_of(configs: Configs) -> dict[str, tuple[Target, ...]]:
    """Flat name of every layer, norm and pad token, in all layouts of checkpoints -> what it is here."""
    found: dict[str, tuple[Target, ...]] = {}
    for component, config in configs.items():
        if isinstance(config, TransformerConfig):
            layouts = ("split", "fused")
            tables = [names.transformer_table(config, layout) for layout in layouts]
        else:
            tables = [names.text_encoder_table(config, "hf")]
            if config.arch != "llama":  # its q and k have another order of rows there
                tables.append(names.text_encoder_table(config, "gguf"))
        for table in tables:
            for checkpoint, entries in names.sources(table).items():
                stem = checkpoint.removesuffix(".weight")
                if not checkpoint.endswith(".bias"):
                    found.setdefault(flat(stem), tuple(_target(component, entry) for entry in entries))
    for name, targets in list(found.items()):
        if name.endswith("_to_out_0"):  # diffusers' own name of the whole, in some files
            found.setdefault(name.removesuffix("_0"), targets)
    return found


def _target(component: str, entry: names.Entry) -> Target:
    return Target(component, entry.module.removesuffix(".weight"), entry.rows, entry.total_rows)


def match(tensors: Iterable[str], configs: Configs) -> Matched:
    """Sort the tensors of an adapter by the layers that they change.

    Args:
        tensors: Names of all tensors of the file.
        configs: Sizes of the networks that it may change.

    Raises:
        BadWeights: Two tensors are the same part of one layer.
    """
    known, last = targets_of(configs), _last_layers(configs)
    groups: dict[str, Group] = {}
    unmatched: list[str] = []
    unused = 0
    for name in tensors:
        parts = split_name(name)
        found = None if parts is None else _found(flat(parts[0]), known)
        if parts is None or found is None:
            if parts is not None and any(mark in f"_{flat(parts[0])}_" for mark in last):
                unused += 1
            else:
                unmatched.append(name)
            continue
        group = groups.setdefault(found, Group(parts[0], known[found]))
        if parts[1] in group.tensors:
            raise BadWeights(
                f"the adapter has {printable(group.tensors[parts[1]], 100)!r} and {printable(name, 100)!r}, "
                "which are the same part of one layer; keep one of them"
            )
        group.tensors[parts[1]] = name
    return Matched(_without_doubles(groups), unmatched, unused)


def _found(name: str, known: Mapping[str, object]) -> str | None:
    """The longest end of a flat name that is a known one; what stands before it may be any prefix."""
    name = name.removesuffix("_weight")
    prefix = ""
    while name not in known:
        head, separator, name = name.partition("_")
        prefix += head + separator
        if not separator:
            return None
    # the layers of CLIP and of vision models end as Qwen3's do, and those of ControlNets as the S3-DiT's
    other = prefix.endswith(("encoder_", "control_")) and not prefix.endswith("text_encoder_")
    return None if other else name


def _last_layers(configs: Configs) -> list[str]:
    """Pieces of flat names of the text encoder's last layer, which files have and no run uses."""
    encoder = configs.get("text_encoder")
    if not isinstance(encoder, TextEncoderConfig):
        return []
    last = encoder.num_layers - 1
    return [f"_layers_{last}_self_attn_", f"_layers_{last}_mlp_", f"_blk_{last}_"]


def _without_doubles(groups: Mapping[str, Group]) -> list[Group]:
    """The groups without fused layers whose parts the file has as well, as Anime-Z's files do."""
    split = {target for group in groups.values() for target in group.targets if target.rows is None}
    kept = []
    for group in groups.values():
        whole = [Target(target.component, target.module) for target in group.targets]
        if len(whole) == 1 or not all(target in split for target in whole):
            kept.append(group)
    return kept
