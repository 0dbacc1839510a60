"""Placement of a pipeline's networks: device, dtype, memory budget, dense or packed weights, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from zimage_core.config import NATIVE_SIZE, AutoencoderConfig
from zimage_core.errors import Unsupported
from zimage_core.memory import page_cache
from zimage_core.memory.activations import ITEMSIZE, decode_bytes, denoise_bytes
from zimage_core.memory.int8_rows import KeptRows, free_for_rows
from zimage_core.memory.phases import MemoryBudget, MemoryReport, PhaseManager
from zimage_core.memory.references import References
from zimage_core.models.transformer import Predict, ZImageTransformer
from zimage_core.nn.attention import Use, settings
from zimage_core.nn.cuda_graphs import StepGraphs
from zimage_core.nn.layers import has_hooks
from zimage_core.nn.linear import Linear, tensors_of
from zimage_core.quant.dispatch import largest_that_fit
from zimage_core.quant.gpu import free_bytes
from zimage_core.quant.tensor import QuantTensor
from zimage_core.run.capturing import AFTER, has_room, pays
from zimage_core.run.checks import read_device, read_dtype, whole
from zimage_core.run.request import Run
from zimage_core.weights.load import opened_file

RESERVE = 768 << 20
"""Bytes of GPU memory that `dequantize_weights` leaves beside the activations of decoding: gaps between
tensors, scratch, workspaces of libraries."""

OURS = ("zimage_core", "torch")
"""Packages whose modules do in every step what they did when it was recorded."""

_USES: dict[str, Use] = {
    "encode": "text encoder", "image": "VAE", "vision": "vision tower", "denoise": "transformer",
    "decode": "VAE",
}  # fmt: skip

Networks = Mapping[str, Any]
"""The pipeline's current transformer, text_encoder and vae by name."""


class Placement:
    """State of a pipeline's placement: memory budget, recorded graphs, dequantised weights."""

    def __init__(self) -> None:
        self.memory: PhaseManager | None = None
        self.graphs: StepGraphs | None = None  # those that `capture` asked for
        self._own: StepGraphs | None = None  # those recorded where it pays
        self._may_record = True
        self._as_loaded = True
        self._addresses: list[int] = []  # of the weights that the graphs read, after the adapters' version
        self.rows = KeptRows()
        self._read: set[int] = set()  # files that were read ahead
        self._room = (0, False)  # bytes for those, and whether weights are mapped

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles.

        Raises:
            Unsupported: There is a memory budget, whose threads and devices belong to one pipeline.
        """
        if self.memory is not None:
            raise Unsupported(
                "a pipeline with a memory budget is not copied or pickled: call limit_memory() without "
                "arguments first, or open the model a second time (mapped files are shared)"
            )
        return {**self.__dict__, "_own": None, "rows": KeptRows()}

    def to(self, networks: Networks, targets: tuple[str | torch.device | torch.dtype, ...]) -> None:
        """Move the networks to devices, or cast transformer and text encoder to dtypes, in this order."""
        self.refuse_budget("to")
        self.forget_graphs()
        for target in targets:
            if isinstance(target, torch.dtype):
                self._as_loaded = False
                dtype = read_dtype(target, None, torch.device("cpu"))
                for name in {"transformer", "text_encoder", "siglip"} & set(networks):
                    networks[name].to(dtype)
            else:
                place = read_device(target)
                for network in networks.values():
                    network.to(place)

    def capture(self, transformer: ZImageTransformer, on: bool | None) -> None:
        """Record steps always, never, or where it pays (None); see `ZImagePipeline.capture`."""
        if on:
            self.refuse_budget("capture")
        if on and transformer.device.type != "cuda":
            raise Unsupported(
                f"capture: steps can be recorded on a CUDA GPU only, not on {transformer.device}"
            )
        self.graphs = StepGraphs(transformer.predict) if on else None
        self._own, self._may_record = None, on is None

    def predict(self, transformer: ZImageTransformer, run: Run, caption_tokens: int) -> Predict | None:
        """Function to call instead of `transformer.predict`: recorded graphs, a compiled one, or None."""
        if run.references is not None:
            return None
        graphs = self.graphs
        if graphs is None:
            # torch.compile(pipe.transformer) compiles the module's call, but a run calls its methods
            compiled = getattr(transformer, "dynamo_ctx", None)
            if compiled is not None:
                function: Predict = compiled(transformer.predict)
                return function
            if not self._records_unasked(transformer, run, caption_tokens):
                return None
            graphs = self._own
        adapters = 0 if transformer.adapted is None else transformer.adapted.version
        addresses = [adapters, *(tensor.data_ptr() for tensor in tensors_of(transformer))]
        replaced = graphs is not None and len(graphs) > 0 and addresses != self._addresses
        if graphs is None or graphs.step != transformer.predict or replaced:
            graphs = self._new_graphs(transformer)
        self._addresses = addresses
        # a graph is replayed without Python, so that no hook would be called
        hooked = any(has_hooks(module) for module in transformer.modules())
        return None if hooked else graphs

    def _records_unasked(self, transformer: ZImageTransformer, run: Run, caption_tokens: int) -> bool:
        """Whether steps are recorded though `capture` did not ask for it."""
        # a callback may put in hooks and other weights between steps
        if not self._may_record or self.memory is not None or run.debug or run.callback is not None:
            return False
        # a module that was replaced or compiled, or whose forward was, may do what no graph repeats: the
        # factor of a LoRA, say, is a number of Python
        for m in transformer.modules():
            ours = type(m).__module__.partition(".")[0] in OURS
            if not ours or "forward" in vars(m) or m._compiled_call_impl is not None:
                return False
        size = (*run.latents.shape[-2:], caption_tokens)
        recorded = self._own is not None and len(self._own) > 0
        return pays(transformer, *size) and (recorded or has_room(transformer, *size))

    def _new_graphs(self, transformer: ZImageTransformer) -> StepGraphs:
        """Empty graphs, as recorded ones hold the addresses of weights."""
        if self.graphs is not None:
            self.graphs = graphs = StepGraphs(transformer.predict)
        else:
            self._own = graphs = StepGraphs(transformer.predict, after=AFTER, asked=False)
        return graphs

    def dequantize_weights(
        self, transformer: ZImageTransformer, budget: int | None, vae: AutoencoderConfig
    ) -> dict[str, int]:
        """Keep the largest weights dense; see `ZImagePipeline.dequantize_weights`."""
        self.refuse_budget("dequantize_weights")
        if budget is not None:
            budget = whole("budget", budget, 0, 1 << 50)
        elif transformer.device.type == "cuda":
            side = (transformer.sample_size or NATIVE_SIZE) // vae.spatial_factor
            free = free_bytes(transformer.device)
            budget = max(0, free - decode_bytes(vae, side, side) - RESERVE)
        else:
            return {}
        layers = {
            f"{name}.weight": module
            for name, module in transformer.named_modules()
            if isinstance(module, Linear) and isinstance(module.weight, QuantTensor)
        }
        dtype = transformer.dtype
        growth = {
            name: layer.in_features * layer.out_features * dtype.itemsize - layer.weight.nbytes
            for name, layer in layers.items()
        }
        chosen = largest_that_fit(growth, budget)
        for name in chosen:
            layers[name].dequantize_weight(dtype)
            self._as_loaded = False
        self.forget_graphs()
        return {name: growth[name] for name in chosen}

    def limit_memory(
        self, networks: Networks, vram: int | str | None, ram: int | str | None, device: torch.device
    ) -> None:
        """Keep every run within a budget; see `ZImagePipeline.limit_memory`."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        self.rows.drop()
        if vram is None and ram is None:
            return
        if networks["transformer"].device.type != "cpu":
            raise Unsupported(
                "limit_memory: the networks are on the GPU already; give vram= when the pipeline is opened"
            )
        if not self._as_loaded:
            raise Unsupported(
                "limit_memory: weights were dequantised or cast, so a plan from the files would be wrong; "
                "open the pipeline anew with vram= or ram="
            )
        found = {name: opened_file(network) for name, network in networks.items()}
        opened = {name: each for name, each in found.items() if each is not None}
        self.memory = PhaseManager(networks, opened, device, MemoryBudget(vram, ram))
        self.graphs = self._own = None

    def begin(
        self, networks: Networks, run: Run, caption_tokens: int, references: References | None = None
    ) -> None:
        """Plan a run where memory is limited; else find how much of it int8 rows may take.

        Args:
            networks: The pipeline's networks.
            run: The checked arguments of the call.
            caption_tokens: Tokens of the longest text that is encoded.
            references: The reference images, where the run has some.
        """
        images, guided = run.batch.images, run.guidance_scale > 0
        if self.memory is not None:
            self.memory.check_networks(networks)
            self.memory.begin(
                width=run.width, height=run.height, images=images, caption_tokens=caption_tokens,
                guidance=guided, steps=run.steps,
                image=bool(run.controls) or (run.edit is not None and run.edit.encodes),
                controlnets=tuple({each.net: None for each in run.controls}),
                control_images=len(run.controls), references=references,
            )  # fmt: skip
        elif networks["transformer"].compute == "int8":
            transformer, vae = networks["transformer"], networks.get("vae")
            height, width = run.latents.shape[-2:]
            dtype = str(transformer.dtype).removeprefix("torch.")
            dtype = dtype if dtype in ITEMSIZE else "float32"
            seen = (height, width, caption_tokens)
            if references is not None:
                seen = references.stream(transformer.config, height, width)
            live = denoise_bytes(transformer.config, *seen, dtype, images, 1 + guided, run.steps)
            if references is not None:
                live += references.beside(transformer.config, height, width, dtype)
            if vae is not None:
                live = max(live, decode_bytes(vae.config, height, width, vae.tile))
            self._room = free_for_rows(networks.values(), transformer.device, live)

    @contextmanager
    def phase(self, name: str, network: Any) -> Iterator[None]:
        """Context in which the network of "encode", "image", "vision", "denoise" or "decode" is ready.

        torch's settings are those that the network needs there; see `nn.attention.settings`.
        """
        device = network.device if self.memory is None else self.memory.device
        moved = self._rows_for(name, network) if self.memory is None else self.memory.phase(name)
        with settings(device, _USES[name], network.dtype), self._reading(network), moved:
            yield

    def _reading(self, network: Any) -> AbstractContextManager[None]:
        """Context in which the rest of a mapped file is read while the first layers of its network run."""
        opened = opened_file(network)
        elsewhere = self.memory is not None or network.device.type != "cpu"  # its weights were read already
        if elsewhere or opened is None or id(opened) in self._read:
            return nullcontext()
        self._read.add(id(opened))
        return page_cache.reading_ahead(opened.file)

    def _rows_for(self, name: str, network: Any) -> AbstractContextManager[None]:
        """Context in which layers that multiply int8 read rows that are kept."""
        if name != "denoise":
            return nullcontext()
        if network.compute != "int8":
            self.rows.drop()  # of another transformer, or from before it was set otherwise
            return nullcontext()
        return self.rows.bound(network, *self._room)

    def put_away(self) -> None:
        """Take the networks off the device, where there is a memory budget, so that they can be changed."""
        if self.memory is not None:
            self.memory.close()

    def weights_changed(self) -> None:
        """Note that weights are not those of their files any more."""
        self._as_loaded = False
        self.forget_graphs()

    def report(self) -> MemoryReport | None:
        """Report of what was planned and moved in the last run; None without a budget."""
        return None if self.memory is None else self.memory.report()

    def refuse_budget(self, what: str) -> None:
        """Raise Unsupported if there is a memory budget, which places the weights."""
        if self.memory is not None:
            raise Unsupported(
                f"{what}: this pipeline has a memory budget and moves its networks itself; "
                "call limit_memory() without arguments first, or open it anew"
            )

    def forget_graphs(self, weights: bool = True) -> None:
        """Drop recorded graphs and int8 rows, whose memory would otherwise stay until the next run.

        Args:
            weights: Whether weights may have changed; if only adapters did, the rows stay.
        """
        self._own = None
        if weights:
            self.rows.drop()
        if self.graphs is not None:
            self.graphs = StepGraphs(self.graphs.step)
