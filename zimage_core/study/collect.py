"""Collects importance matrices from the real denoising loop: sums over the inputs of every weight matrix.

Forward hooks see the inputs of the `Linear` layers while the pipeline generates images, which stay bit for
bit the same. Only one number per channel is kept, never an activation.

The rows of the image and of the caption are counted. The learned pad tokens that fill a sequence up to a
multiple of 32 are left out: they are all the same token, and their share depends on the size of the image and
the length of the prompt, not on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.models.sequence import pad_count
from zimage_core.models.transformer import Prepared
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quantize.imatrix import Imatrix
from zimage_core.quantize.imatrix_files import Sums
from zimage_core.study.step_hook import StepHook
from zimage_core.study.swap import linear_weights
from zimage_core.weights.names import Table, text_encoder_table, transformer_table

COMPONENTS = ("transformer", "text_encoder")
SHARED_INPUT = {
    "attention.to_k": "attention.to_q",
    "attention.to_v": "attention.to_q",
    "feed_forward.w3": "feed_forward.w1",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
"""Layer -> a sibling layer with the same input, which is observed instead."""
_TAKEN = ("prompt", "prompt_embeds", "seed", "generator", "latents", "output_type", "return_dict", "debug")
_SLAB = 1 << 20

OnPrompt = Callable[[int, Imatrix], None]
"""(number of prompts done, importance matrix collected so far) -> None."""
Rows = Callable[[Tensor], Iterator[Tensor]]
"""Input of a layer [L, K] -> the rows that are counted, in one or several pieces."""


class Accumulator:
    """Sums over the inputs of one layer, in float64 on the layer's device.

    Args:
        width: Number of input channels K.
        device: Device of the inputs.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add rows [..., K] in slabs, so that temporaries are small and float32 sums few rows."""
        rows = x.detach().reshape(-1, x.shape[-1])
        step = max(1, _SLAB // rows.shape[-1])
        for start in range(0, len(rows), step):
            self.squares += rows[start : start + step].float().square().sum(0)
        self.count += len(rows)


class Collector:
    """Collects sums while a pipeline runs; a context manager that always removes its hooks.

        with Collector(pipe) as collector:
            pipe("a red circle", seed=1)
        write_imatrix("nano.gguf", collector.imatrix())

    Args:
        pipe: The pipeline whose networks are observed.
        components: "transformer", "text_encoder", or both.

    Raises:
        BadArgument: A component is unknown, or there is none.
        Unsupported: The pipeline computes in float16, where parts of the branches are scaled, or it replays
            its steps as graphs, in which hooks do not run.
    """

    def __init__(self, pipe: ZImagePipeline, components: Sequence[str] = ("transformer",)) -> None:
        if not components or not set(components) <= set(COMPONENTS):
            given = printable(", ".join(map(str, components)) or "none", 80)
            raise BadArgument(f"components: got {given}, wanted {' or '.join(COMPONENTS)}, or both")
        if pipe.dtype == torch.float16:
            raise Unsupported("imatrix: float16 scales parts of a block; use float32 or bfloat16 (--dtype)")
        if pipe._placement.graphs is not None:
            raise Unsupported("imatrix: captured steps run no hooks; collect before `capture`, or build anew")
        self._pipe = pipe
        self._components = components
        self._sums: dict[str, Accumulator] = {}
        self._handles: list[Any] = []
        self._image = self._caption = 0  # number of tokens without pads

    def __enter__(self) -> Collector:
        try:
            if "transformer" in self._components:
                self._watch_transformer()
            if "text_encoder" in self._components:
                net = self._pipe.text_encoder
                self._watch(net, text_encoder_table(net.config, "gguf"), {})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def imatrix(self, datasets: Sequence[str] = (), chunks: int = 1) -> Imatrix:
        """The importance matrix of everything collected so far.

        Args:
            datasets: Names of the sources of the prompts.
            chunks: Number of images that were drawn.
        """
        entries = {
            name: Sums(sums.squares.to("cpu", copy=True), sums.count) for name, sums in self._sums.items()
        }
        return Imatrix(entries, tuple(datasets), chunks)

    # --- hooks ---

    def _watch(self, net: nn.Module, table: Table, stacks: Mapping[str, Rows]) -> None:
        """Put a hook on every Linear that has an input of its own.

        Args:
            net: A network.
            table: Its tensors.
            stacks: First part of a module's name -> rows of its input that are counted; default: all.
        """
        for module, names in observed(net, table).items():
            rows = None if "adaLN" in module else stacks.get(module.partition(".")[0])
            handle = net.get_submodule(module).register_forward_pre_hook(self._hook(names, rows))
            self._handles.append(handle)

    def _hook(
        self, names: Sequence[str], rows: Rows | None
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            sums = self._sums.get(names[0])
            if sums is None:
                sums = Accumulator(x.shape[-1], x.device)
                self._sums.update(dict.fromkeys(names, sums))
            for part in (x,) if rows is None else rows(x):
                sums.add(part)

        return look

    def _watch_transformer(self) -> None:
        net = self._pipe.transformer
        # these come first: they record the lengths that the hooks on layers use
        self._handles += [
            StepHook(net, before=self._begin_step),
            net.cap_embedder[1].register_forward_pre_hook(self._begin_caption),
        ]
        stacks = {
            "noise_refiner": self._image_rows,
            "layers": self._joint_rows,
            "context_refiner": self._caption_rows,
        }
        self._watch(net, transformer_table(net.config, "fused"), stacks)

    def _begin_step(self, latent: Tensor, prepared: Prepared, step: int, caption: int) -> None:
        self._image = latent.shape[-2] * latent.shape[-1] // self._pipe.transformer.config.patch_size**2
        self._caption = len(prepared.captions[caption])

    def _begin_caption(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._caption = len(args[0])

    def _image_rows(self, x: Tensor) -> Iterator[Tensor]:
        yield x[: self._image]

    def _caption_rows(self, x: Tensor) -> Iterator[Tensor]:
        yield x[: self._caption]

    def _joint_rows(self, x: Tensor) -> Iterator[Tensor]:
        """Rows of image and caption in the joint sequence: image, its pads, caption, its pads."""
        start = self._image + pad_count(self._image)
        yield x[: self._image]
        yield x[start : start + self._caption]


def observed(net: nn.Module, table: Table) -> dict[str, tuple[str, ...]]:
    """Name of a Linear to observe -> the tensors of the file whose matrices have the same input."""
    found: dict[str, dict[str, None]] = {}
    for module, name in linear_weights(net, table):
        head, _, tail = module.rpartition(".")
        stem, _, parent = head.rpartition(".")
        shared = SHARED_INPUT.get(f"{parent}.{tail}")
        found.setdefault(f"{stem}.{shared}" if shared else module, {})[name] = None
    return {module: tuple(names) for module, names in found.items()}


def widths(pipe: ZImagePipeline, components: Sequence[str]) -> dict[str, int]:
    """Tensor of a file -> the number of its input channels, for every matrix that is observed."""
    tables = {
        "transformer": lambda: transformer_table(pipe.transformer.config, "fused"),
        "text_encoder": lambda: text_encoder_table(pipe.text_encoder.config, "gguf"),
    }
    return {
        name: getattr(pipe, part).get_submodule(module).in_features
        for part in components
        for module, name in linear_weights(getattr(pipe, part), tables[part]())
    }


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
    """Generate an image of every prompt and collect the mean squares of the inputs of each matrix.

    Args:
        pipe: The model, with weights as close to the original ones as possible.
        prompts: Prompts that are typical of the model's use; some dozens are enough
            (docs/guides/quantizing.md).
        seed: Seed of the first image; each next image has the next seed.
        components: "transformer", "text_encoder", or both; without the transformer nothing is denoised.
        dataset: Name of the source of the prompts, for the file.
        on_prompt: Called after each prompt; an exception in it ends the collection.
        options: Further arguments of the pipeline's call: size, steps, guidance, num_images_per_prompt.

    Returns:
        Sums of squares for each tensor, float64 [K], under its name in a GGUF file.

    Raises:
        BadArgument: There is no prompt, or an argument is one that the collection sets itself. `Collector`
            and the pipeline's call raise it too.
        Unsupported: `Collector` cannot observe the pipeline.
    """
    if taken := [name for name in _TAKEN if name in options]:
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
