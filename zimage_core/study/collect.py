"""Importance matrices from the real denoising loop: sums over the inputs of every weight matrix.

Forward hooks look at the inputs of the `Linear` layers while the pipeline draws; a picture drawn meanwhile is
the same to the bit. What is kept is one number a channel and bin of noise levels, never an activation.

Which rows count: those of the picture and of the caption. The learned pad tokens that fill a sequence up to a
multiple of 32 are left out: all are the same token, and their share depends on the size of the picture and
the length of the prompt, not on the model. What runs once a run (context refiner, caption and time embedders,
adaptive norms) has no noise level of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.models.sequence import pad_count
from zimage_core.models.transformer import Prepared
from zimage_core.nn.linear import Linear
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quantize.imatrix import LEVEL_EDGES, Imatrix, level_bin
from zimage_core.quantize.imatrix_files import Sums
from zimage_core.study.step_hook import StepHook
from zimage_core.weights.names import Table, text_encoder_table, transformer_table

COMPONENTS = ("transformer", "text_encoder")
TWINS = {
    "attention.to_k": "attention.to_q",
    "attention.to_v": "attention.to_q",
    "feed_forward.w3": "feed_forward.w1",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
"""Layers whose input is another layer's, which is looked at in their place."""
_OURS = ("prompt", "prompt_embeds", "seed", "generator", "latents", "output_type", "return_dict", "debug")
_SLAB = 1 << 20

OnPrompt = Callable[[int, Imatrix], None]
"""(prompts done, what was collected so far)."""
Rows = Callable[[Tensor], Iterator[Tensor]]
"""Input of a layer [L, K] -> those of its rows that count, in one or several pieces."""


class _Running:
    """Sums of one layer's inputs, on the device where they are, in float64."""

    def __init__(self, width: int, bins: int, device: torch.device) -> None:
        self.squares = torch.zeros(bins or 1, width, dtype=torch.float64, device=device)
        self.counts = [0] * (bins or 1)
        self.leveled = bins > 0

    def add(self, x: Tensor, bin: int) -> None:
        """Rows [..., K], in slabs: temporaries stay small, and float32 sums a few rows, float64 the slabs."""
        rows = x.detach().reshape(-1, x.shape[-1])
        step = max(1, _SLAB // rows.shape[-1])
        for start in range(0, len(rows), step):
            self.squares[bin] += rows[start : start + step].float().square().sum(0)
        self.counts[bin] += len(rows)

    def sums(self) -> Sums:
        squares = self.squares.cpu()
        total, count = squares.sum(0), sum(self.counts)
        if not self.leveled:
            return Sums(total, count)
        return Sums(total, count, squares.clone(), torch.tensor(self.counts))


class Collector:
    """Looks on while a pipeline runs; a context manager that takes its hooks back, whatever happens.

        with Collector(pipe) as collector:
            pipe("a red circle", seed=1)
        write_imatrix("nano.gguf", collector.imatrix())

    Args:
        pipe: Whose networks to look at.
        components: Of transformer and text_encoder.
        edges: Noise levels between the bins.

    Raises:
        BadArgument: An unknown component, or none.
        Unsupported: The pipeline computes in float16, where parts of the branches run scaled, or replays its
            steps as graphs, which no hook sees.
    """

    def __init__(
        self,
        pipe: ZImagePipeline,
        components: Sequence[str] = ("transformer",),
        edges: tuple[float, ...] = LEVEL_EDGES,
    ) -> None:
        if not components or not set(components) <= set(COMPONENTS):
            given = printable(", ".join(map(str, components)) or "none", 80)
            raise BadArgument(f"components: got {given}, wanted {' or '.join(COMPONENTS)}, or both")
        if pipe.dtype == torch.float16:
            raise Unsupported("imatrix: float16 scales parts of a block; use float32 or bfloat16 (--dtype)")
        if pipe._placement.graphs is not None:
            raise Unsupported("imatrix: captured steps run no hooks; collect before `capture`, or build anew")
        self.edges = edges
        self._pipe = pipe
        self._components = components
        self._running: dict[str, _Running] = {}
        self._handles: list[Any] = []
        self._level = 0
        self._picture = self._caption = 0  # tokens that are no pads

    def __enter__(self) -> Collector:
        try:
            if "transformer" in self._components:
                self._watch_transformer()
            if "text_encoder" in self._components:
                net = self._pipe.text_encoder
                self._watch(net, text_encoder_table(net.config, "gguf"), lambda _: (self._all, False))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def imatrix(self, datasets: Sequence[str] = (), chunks: int = 1) -> Imatrix:
        """What was seen so far.

        Args:
            datasets: Names of where the prompts are from.
            chunks: Pictures that were drawn.
        """
        entries = {name: running.sums() for name, running in self._running.items()}
        return Imatrix(entries, tuple(datasets), chunks, self.edges)

    # --- hooks ---

    def _watch(self, net: nn.Module, table: Table, seen: Callable[[str], tuple[Rows, bool]]) -> None:
        """A hook on every Linear that has an input of its own.

        Args:
            net: A network.
            table: Its tensors.
            seen: Module name -> which rows of its input count, and whether they belong to a noise level.
        """
        for module, names in observed(net, table).items():
            hook = self._hook(names, *seen(module))
            self._handles.append(net.get_submodule(module).register_forward_pre_hook(hook))

    def _hook(
        self, names: Sequence[str], rows: Rows, leveled: bool
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            running = self._running.get(names[0])
            if running is None:
                running = _Running(x.shape[-1], len(self.edges) + 1 if leveled else 0, x.device)
                self._running.update(dict.fromkeys(names, running))
            for part in rows(x):
                running.add(part, self._level if leveled else 0)

        return look

    def _watch_transformer(self) -> None:
        net = self._pipe.transformer
        # these two come first: the hooks on layers use what they note
        self._handles += [
            StepHook(net, before=self._begin_step),
            net.cap_embedder[1].register_forward_pre_hook(self._begin_caption),
        ]
        stacks = {
            "all_x_embedder": (self._all, True),
            "noise_refiner": (self._of_picture, True),
            "layers": (self._of_both, True),
            "all_final_layer": (self._all, True),
            "context_refiner": (self._of_caption, False),
        }
        once = (self._all, False)

        def seen(module: str) -> tuple[Rows, bool]:
            return once if "adaLN" in module else stacks.get(module.partition(".")[0], once)

        self._watch(net, transformer_table(net.config, "fused"), seen)

    def _begin_step(self, latent: Tensor, prepared: Prepared, step: int, caption: int) -> None:
        self._level = level_bin(1 - prepared.times[step], self.edges)
        self._picture = latent.shape[-2] * latent.shape[-1] // self._pipe.transformer.config.patch_size**2
        self._caption = len(prepared.captions[caption])

    def _begin_caption(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._caption = len(args[0])

    def _all(self, x: Tensor) -> Iterator[Tensor]:
        yield x

    def _of_picture(self, x: Tensor) -> Iterator[Tensor]:
        yield x[: self._picture]

    def _of_caption(self, x: Tensor) -> Iterator[Tensor]:
        yield x[: self._caption]

    def _of_both(self, x: Tensor) -> Iterator[Tensor]:
        """The joint sequence is picture, its pads, caption, its pads."""
        start = self._picture + pad_count(self._picture)
        yield x[: self._picture]
        yield x[start : start + self._caption]


def observed(net: nn.Module, table: Table) -> dict[str, tuple[str, ...]]:
    """Linear layer to look at -> the file's tensors that have its input."""
    known = {name for name, module in net.named_modules() if isinstance(module, Linear)}
    found: dict[str, dict[str, None]] = {}
    for entry in table:
        module, _, leaf = entry.module.rpartition(".")
        if leaf == "weight" and module in known:
            head, _, tail = module.rpartition(".")
            stem, _, parent = head.rpartition(".")
            twin = TWINS.get(f"{parent}.{tail}")
            leader = f"{stem}.{twin}" if twin else module
            found.setdefault(leader, {})[entry.checkpoint] = None
    return {module: tuple(names) for module, names in found.items()}


def collect_imatrix(
    pipe: ZImagePipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    components: Sequence[str] = ("transformer",),
    dataset: str = "",
    on_prompt: OnPrompt | None = None,
    **options: Any,
) -> Imatrix:
    """Draw a picture of every prompt and collect how large the inputs of each matrix were.

    Args:
        pipe: The model, as close to its original weights as there is.
        prompts: Typical of what the model will be asked; some dozens are enough, see docs/quantizing.md.
        seed: Of the first picture; every picture has the next one.
        components: Of transformer and text_encoder; without the first nothing is denoised.
        dataset: Name of where the prompts are from, for the file.
        on_prompt: Called after each prompt; an exception in it ends the collection.
        options: Further arguments of the pipeline's call: size, steps, guidance, num_images_per_prompt.

    Raises:
        BadArgument, Unsupported: An argument that the collection chooses itself, see also `Collector` and the
            pipeline's call.
    """
    if taken := [name for name in _OURS if name in options]:
        raise BadArgument(f"{taken[0]}: chosen by the collection itself; leave it out")
    if not prompts:
        raise BadArgument("prompts: there are none; give at least one")
    each = int(options.get("num_images_per_prompt", 1))
    datasets = (dataset,) if dataset else ()
    with Collector(pipe, components) as collector:
        for i, prompt in enumerate(prompts):
            if "transformer" in components:
                pipe(prompt, seed=(seed + i * each) % 2**64, output_type="latent", **options)
            else:
                pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **_encoding(options))
            if on_prompt is not None:
                on_prompt(i + 1, collector.imatrix(datasets, (i + 1) * each))
    return collector.imatrix(datasets, len(prompts) * each)


def _encoding(options: dict[str, Any]) -> dict[str, Any]:
    names = ("max_sequence_length", "enable_thinking", "prompt_template")
    return {name: options[name] for name in names if name in options}
