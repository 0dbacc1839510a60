"""LoRA and its relatives on a pipeline, under names of its own and under those of diffusers.

`Adapted` is a base of the pipeline. Its methods import `adapters/` when they are called, so that a pipeline
without adapters pays nothing. Adapters belong to the networks: pipelines that share a transformer
(`from_pipe`) share its adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_core.assets import embedded_part
from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.run.checks import free_name, real
from zimage_core.run.components import networks, require
from zimage_core.run.loras import LoadedLora
from zimage_core.run.placement import Placement
from zimage_core.run.sharing import refuse_while_running

if TYPE_CHECKING:
    from zimage_core.adapters.applied import Applied, State

MAX_WEIGHT = 100.0
"""Largest weight of an adapter, of either sign."""
SHOWN = 5
"""Most names of tensors in the warning for those that match nothing."""
_TARGETS = ("transformer", "text_encoder")
_FILE = str | PathLike[str]


class Adapted:
    """The methods of `ZImagePipeline` for adapters."""

    _placement: Placement
    _running: dict[str, object]

    def load_lora(
        self,
        path: _FILE | Mapping[str, Any],
        weight: float = 1.0,
        name: str | None = None,
        merge: bool = False,
    ) -> str:
        """Load a LoRA, or another adapter, beside those that are active.

        Weights stay as they are, packed or dense: small products are computed beside those of the layers. See
        docs/guides/lora.md for the kinds and the programs whose names of tensors are known.

        Args:
            path: A file (safetensors or GGUF), a folder that holds one, tensors by name, or "outline", the
                LoRA of the embedded model.
            weight: Factor of what it changes; 0 is no change, and negative ones turn it round.
            name: Name for `set_adapters` and `unload_lora`; default: that of the file.
            merge: Merge it into the weights at once, which then are dense; see `fuse_lora`.

        Returns:
            Its name.

        Raises:
            BadFile, UnknownFormat: The file cannot be read.
            WrongModel, BadWeights: It belongs to another model, is incomplete, or holds NaN or infinity. The
                pipeline is as before, whatever the error.
            Unsupported: It is of a kind that is not applied, or `merge` is impossible.
            BadArgument: The name is taken, or the weight is no number in its range.
            Busy: A run has not ended.
        """
        added = self._load_adapter(
            path, real("weight", weight, -MAX_WEIGHT, MAX_WEIGHT), name, None, alone=False
        )
        if merge:
            try:
                self.fuse_lora(adapter_names=[added], dequantize=True)
            except BaseException:
                self.unload_lora(added)
                raise
        return added

    def unload_lora(self, name: str | None = None) -> None:
        """Unload an adapter, or all; the results are those from before it was loaded, to the bit.

        Args:
            name: Its name; None for all. Adapters that are merged then stay in the weights for good.

        Raises:
            BadArgument: There is none of that name.
            Unsupported: It is merged into the weights.
            Busy: A run has not ended.
        """
        if name is None:
            self._begin_change()
            for applied in self._applied().values():
                applied.settle()
            self._end_change()
            return
        self._refuse_fused("unload_lora", self._known("unload_lora", [name]))
        self._change(lambda state: state.without(name))

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Use these adapters with these weights from the next run on, and no others.

        Args:
            adapter_names: One name or several; none of them for no adapter.
            adapter_weights: One weight for all, or one each; default 1.

        Raises:
            BadArgument: There is no such adapter, or the numbers of names and weights differ.
            Unsupported: Weights for single blocks, as diffusers has them; or an adapter is merged.
            Busy: A run has not ended.
        """
        names = self._known("set_adapters", adapter_names)
        given: list[Any] = (
            list(adapter_weights) if isinstance(adapter_weights, (list, tuple)) else [adapter_weights]
        )
        if any(isinstance(weight, Mapping) for weight in given):
            raise Unsupported("set_adapters: weights for single blocks are not supported; give one number")
        weights = [1.0 if w is None else real("adapter_weights", w, -MAX_WEIGHT, MAX_WEIGHT) for w in given]
        if len(weights) == 1:
            weights *= len(names)
        if len(weights) != len(names):
            raise BadArgument(f"set_adapters: got {len(weights)} weights for {len(names)} names")
        chosen = dict(zip(names, weights, strict=True))
        self._refuse_fused("set_adapters")

        def changed(state: State) -> State:
            own = {name: weight for name, weight in chosen.items() if name in state.adapters}
            return replace(state, weights=own)

        self._change(changed)

    @property
    def loras(self) -> tuple[LoadedLora, ...]:
        """What is loaded, in the order of loading."""
        found: dict[str, LoadedLora] = {}
        for applied in self._applied().values():
            state = applied.state
            for name, adapter in state.adapters.items():
                facts, own = adapter.facts, found.get(name)
                fused = name in state.fused or (own is not None and own.fused)
                found[name] = LoadedLora(
                    name, state.weights.get(name), fused, facts.title, facts.kinds, facts.ranks,
                    facts.layers, facts.tensors, facts.unmatched,
                    adapter.nbytes + (0 if own is None else own.nbytes), facts.file,
                )  # fmt: skip
        return tuple(found.values())

    # --- names of diffusers ---

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: _FILE | Mapping[str, Any],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **others: Any,
    ) -> None:
        """`load_lora` as diffusers calls it: the new adapter, with weight 1, is the only active one.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder, or tensors by name.
            adapter_name: Its name; default: default_0, default_1 ...
            hotswap: Replace the adapter of that name, and keep its weight.
            weight_name: Name of the file in the folder.
            subfolder: Folder inside of the folder.
            others: Further arguments of diffusers; those about downloads and speed are ignored.

        Raises:
            BadFile: There is no such file; a repository of the Hub has to be downloaded first.
            Unsupported: An argument of diffusers is not supported.
        """
        ignored = {
            "low_cpu_mem_usage", "use_safetensors", "local_files_only", "cache_dir", "token", "revision",
            "force_download", "proxies", "return_lora_metadata",
        }  # fmt: skip
        if strange := sorted(
            key for key, value in others.items() if key not in ignored and value is not None
        ):
            raise Unsupported(f"load_lora_weights: {strange[0]}= means nothing here; leave it out")
        given = pretrained_model_name_or_path_or_dict
        if not isinstance(given, Mapping) and subfolder:
            given = Path(given, subfolder)
        taken = {each.name: each.weight for each in self.loras}
        if adapter_name is None:
            adapter_name = next(n for i in range(len(taken) + 1) if (n := f"default_{i}") not in taken)
        if hotswap and adapter_name in taken:
            active = {each.name: each.weight for each in self.loras if each.weight is not None}
            self._load_adapter(
                given, active.get(adapter_name, 1.0), adapter_name, weight_name, False, swap=True
            )
            return
        self._load_adapter(given, 1.0, adapter_name, weight_name, alone=True)

    def unload_lora_weights(self) -> None:
        """Unload all adapters; see `unload_lora`."""
        self.unload_lora()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unload adapters by name.

        Raises:
            BadArgument: There is none of a name; then all stay.
        """
        names = self._known("delete_adapters", adapter_names)
        self._refuse_fused("delete_adapters", names)
        for name in names:
            self._change(lambda state, name=name: state.without(name))  # type: ignore[misc]

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [each.name for each in self.loras if each.weight is not None]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Network -> names of the adapters that change it."""
        return {name: list(own.state.adapters) for name, own in self._applied().items() if own.state.adapters}

    def disable_lora(self) -> None:
        """Let no adapter have an effect until `enable_lora`; they stay loaded."""
        self._refuse_fused("disable_lora")
        self._change(lambda state: replace(state, enabled=False))

    def enable_lora(self) -> None:
        """Let the active adapters have their effect again."""
        self._change(lambda state: replace(state, enabled=True))

    def fuse_lora(
        self,
        components: Sequence[str] = _TARGETS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool = False,
    ) -> None:
        """Merge active adapters into the weights of their layers, which are dense from then on.

        A step then costs no more than without adapters; but packed weights grow to the dtype of the
        computation, and switching takes as long as the merging.

        Args:
            components: Networks whose weights are changed.
            lora_scale: Factor of the adapters' weights.
            safe_fusing: Accepted, as merged weights are always checked for NaN and infinity.
            adapter_names: Those that are merged; default: all that are active.
            dequantize: Whether packed weights may become dense.

        Raises:
            BadArgument: There is no such adapter or network, or the adapter is not active.
            BadWeights: A merged weight is not finite in this dtype.
            Unsupported: Weights are packed and `dequantize` is off, there is a memory budget, or adapters are
                disabled.
            Busy: A run has not ended.
        """
        if wrong := [name for name in components if name not in _TARGETS]:
            raise BadArgument(f"fuse_lora: {printable(wrong[0], 40)!r} is none of {', '.join(_TARGETS)}")
        active = self.get_active_adapters()
        names = self._known("fuse_lora", active if adapter_names is None else adapter_names)
        self._refuse_fused("fuse_lora", names)
        if idle := [name for name in names if name not in active]:
            raise BadArgument(
                f"fuse_lora: {printable(idle[0], 80)!r} is not active; call set_adapters() with it first"
            )
        if not all(applied.state.enabled for applied in self._applied().values()):
            raise Unsupported(
                "fuse_lora: adapters have no effect since disable_lora(); call enable_lora() first"
            )
        scale = real("lora_scale", lora_scale, -MAX_WEIGHT, MAX_WEIGHT)
        self._placement.refuse_budget("fuse_lora")
        chosen = {name: own for name, own in self._applied().items() if name in components}
        for network, applied in chosen.items():
            own = [name for name in names if name in applied.state.adapters]
            if (packed := applied.packed(own)) and not dequantize:
                raise Unsupported(
                    f"fuse_lora: {len(packed)} layers of the {network.replace('_', ' ')} have packed "
                    f"weights, such as {packed[0]}; leave the adapter beside them, which gives the same "
                    "images, or pass dequantize=True, which makes them dense"
                )
        self._begin_change()
        ready = [
            applied.fuse([name for name in names if name in applied.state.adapters], scale)
            for applied in chosen.values()
        ]
        self._commit(ready)
        self._end_change(weights=True)

    def unfuse_lora(self, components: Sequence[str] = _TARGETS, **_: Any) -> None:
        """Put back the weights from before `fuse_lora`, to the bit; its adapters are branches again."""
        self._begin_change()
        for name, applied in self._applied().items():
            if name in components and applied.state.fused:
                applied.unfuse()
        self._end_change(weights=True)

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters that are merged into weights."""
        return {each.name for each in self.loras if each.fused}

    @property
    def num_fused_loras(self) -> int:
        """Number of them."""
        return len(self.fused_loras)

    # --- steps that these methods share ---

    def _targets(self) -> dict[str, Any]:
        """The networks that adapters may change, without the wrapper of torch.compile."""
        found = networks(self)
        return {name: getattr(found[name], "_orig_mod", found[name]) for name in _TARGETS if name in found}

    def _applied(self) -> dict[str, Applied]:
        """The adapters of each network that ever had some."""
        return {name: net.adapted for name, net in self._targets().items() if net.adapted is not None}

    def _load_adapter(
        self,
        given: Any,
        weight: float,
        name: Any,
        file_name: str | None,
        alone: bool,
        swap: bool = False,
    ) -> str:
        from zimage_core.adapters.applied import Applied
        from zimage_core.adapters.reading import read_adapter

        require("transformer", self.transformer)  # type: ignore[attr-defined]
        if not isinstance(given, (str, PathLike, Mapping)) or given == "":
            raise BadArgument(
                f"load_lora: got {printable(repr(given), 60)}, wanted a path or a dict of tensors"
            )
        if not isinstance(given, Mapping):
            given = embedded_part(given) or given
        taken = [each.name for each in self.loras]
        if name is None:
            stem = "lora" if isinstance(given, Mapping) else Path(fspath(given)).stem
            name = free_name(stem or "lora", taken)
        elif not isinstance(name, str) or not name or (name in taken and not swap):
            raise BadArgument(
                f"name: got {printable(repr(name), 80)}, wanted one that is not taken ({_listed(taken)})"
            )
        self._refuse_fused("load_lora", [name] if swap else [])
        targets = self._targets()
        self._begin_change()
        found = read_adapter(given, name, targets, file_name)
        ready = []
        enabled = all(own.state.enabled for own in self._applied().values())
        for component, network in targets.items():
            applied = network.adapted
            part = found.parts.get(component)
            if applied is None and part is None:
                continue
            applied = Applied(network) if applied is None else applied
            state = applied.state.without(name) if swap and part is None else applied.state
            adapters = {**state.adapters, name: part} if part is not None else state.adapters
            weights = {} if alone else dict(state.weights)
            if part is not None:
                weights[name] = weight
            after = replace(state, adapters=adapters, weights=weights, enabled=enabled)
            ready.append((network, applied, applied.use(after)))
        self._warn_of(found.facts.unmatched, name)  # which raises where warnings are errors
        self._commit([commit for *_, commit in ready])
        for network, applied, _ in ready:
            network.adapted = applied
        self._end_change()
        return str(name)

    @staticmethod
    def _warn_of(unmatched: Sequence[str], name: str) -> None:
        if unmatched:
            shown = ", ".join(printable(each, 100) for each in unmatched[:SHOWN])
            more = f" and {len(unmatched) - SHOWN} more" if len(unmatched) > SHOWN else ""
            warnings.warn(
                f"LoRA {printable(name, 80)!r}: {len(unmatched)} of its tensors match no layer and are "
                f"not used: {shown}{more}",
                UserWarning,
                stacklevel=4,
            )

    def _known(self, what: str, given: str | Sequence[str]) -> list[str]:
        """Names of loaded adapters, given as one or several."""
        names: list[Any] = list(given) if isinstance(given, (list, tuple, set)) else [given]
        taken = [each.name for each in self.loras]
        for name in names:
            if name not in taken:
                raise BadArgument(
                    f"{what}: there is no adapter {printable(repr(name), 80)}; loaded are {_listed(taken)}"
                )
        if len(set(names)) < len(names):
            raise BadArgument(f"{what}: a name occurs twice in {_listed(names)}")
        return names

    def _refuse_fused(self, what: str, names: Sequence[str] | None = None) -> None:
        """Refuse to change how adapters are used that are merged; names None for any of them."""
        fused = self.fused_loras if names is None else self.fused_loras & set(names)
        if fused:
            raise Unsupported(
                f"{what}: {printable(min(fused), 80)!r} is merged into the weights; call unfuse_lora() first"
            )

    def _change(self, changed: Callable[[State], State]) -> None:
        """Bring the adapters of all networks into another state, or none."""
        self._begin_change()
        self._commit([applied.use(changed(applied.state)) for applied in self._applied().values()])
        self._end_change()

    def _commit(self, ready: Sequence[Callable[[], None]]) -> None:
        self._begin_change()  # again, since another thread's run may have begun while files were read
        for commit in ready:
            commit()

    def _begin_change(self) -> None:
        refuse_while_running(self, self._targets().values())
        self._placement.put_away()

    def _end_change(self, weights: bool = False) -> None:
        """Forget what repeats an older state; `weights` says whether weights were changed."""
        if weights:
            self._placement.weights_changed()
        else:
            self._placement.forget_graphs(weights=False)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(printable(name, 60) for name in names) or "none"
