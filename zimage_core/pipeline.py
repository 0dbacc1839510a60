"""The pipeline: from a prompt to images, in a few steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from zimage_core.config import COMPONENTS, AutoencoderConfig
from zimage_core.errors import BadArgument, Busy, Unsupported, ZImageError
from zimage_core.files.units import parse_bytes
from zimage_core.memory.beside import adapted, tower_of, weighed
from zimage_core.memory.nets import Beside
from zimage_core.memory.plan import Plan
from zimage_core.memory.planner import make_plan
from zimage_core.memory.rates import Rates
from zimage_core.memory.sizes import sizes_of
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.compute import set_compute
from zimage_core.parallel.calls import Parallel
from zimage_core.run.adapted import Adapted
from zimage_core.run.batch import Batch, Encoding
from zimage_core.run.checks import (
    StepCallback,
    read_computes,
    read_device,
)
from zimage_core.run.components import check_components, check_kinds, networks, require
from zimage_core.run.controlled import Controlled, control_files
from zimage_core.run.decode import decode, encode_images
from zimage_core.run.denoise import Denoiser, denoise
from zimage_core.run.device_faults import explained
from zimage_core.run.enhancing import Enhancing
from zimage_core.run.image_calls import ImageCalls
from zimage_core.run.loading import (
    keep_sample_size,
    known_of,
    stated_scheduler,
)
from zimage_core.run.nonfinite import checked, guard_attention
from zimage_core.run.opening import Opening
from zimage_core.run.placement import Placement
from zimage_core.run.ported import Ported
from zimage_core.run.referenced import Referenced
from zimage_core.run.request import Limits, Request, Run, encoding, make_batch, prepare
from zimage_core.run.result import Clock, Timings, ZImageResult, peak_memory, settings_of, to_output
from zimage_core.run.sharing import note_run
from zimage_core.run.unlearned import unlearned
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.load import opened_file
from zimage_core.weights.opened import Opened
from zimage_core.weights.source import WeightFile

if TYPE_CHECKING:
    from zimage_core.models.vision_tower import VisionTower

Self = TypeVar("Self", bound="ZImagePipeline")


class ZImagePipeline(Parallel, ImageCalls, Adapted, Opening, Controlled, Referenced, Enhancing, Ported):
    """Z-Image text to image. The call and its argument names are those of diffusers' ZImagePipeline.

    One object serves one run at a time: a second call, from another thread or from the callback, gets `Busy`.
    Build one with `from_files`, `from_pretrained` or `from_default`. A component may be None; a call that
    needs it says so.

    Args:
        scheduler: Schedule of the noise levels; None for the one that the transformer's file states, else
            shift 3. Its shift decides the defaults of the call: a shift of 6 means the base checkpoint, any
            other a distilled one (they have 3). Where none is given or stated, the `shift` of a call decides
            instead. Replacing the scheduler later changes no default.
        vae: The VAE, which always runs in float32, as in the official code and the model's own config; its
            convolutions are TF32 where torch allows it, as by default on Ampere and newer.
        text_encoder: The text encoder; its width must be the transformer's caption width.
        tokenizer: The text encoder's tokenizer.
        transformer: The S3-DiT.
        sample_size: Default height and width in pixels. Default: that of the transformer, or 1024 if it
            states none.
        siglip: The vision tower that sees reference images, for an Omni transformer.

    Raises:
        BadArgument: A component is an object of another kind, such as a module of diffusers.
        WrongModel: The components do not fit each other.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerScheduler | None = None,
        vae: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
        tokenizer: Tokenizer | None = None,
        transformer: ZImageTransformer | None = None,
        sample_size: int | None = None,
        siglip: VisionTower | None = None,
    ) -> None:
        given = {"scheduler": scheduler, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        check_kinds({**given, "transformer": transformer, "siglip": siglip})
        scheduler = scheduler or stated_scheduler(known_of(transformer))
        # None is refused by name where a component is needed, so the types leave it out
        self.scheduler = FlowMatchEulerScheduler() if scheduler is None else scheduler
        self.vae = cast(Autoencoder, vae)
        self.text_encoder = cast(TextEncoder, text_encoder)
        self.tokenizer = cast(Tokenizer, tokenizer)
        self.transformer = cast(ZImageTransformer, transformer)
        self.siglip = siglip
        self.sample_size = keep_sample_size(transformer, sample_size)
        self._placement = Placement()
        self._controlnets = {}
        self._running: dict[str, object] = {}
        self._interrupt = False
        self._guidance_scale = 0.0
        self._num_timesteps = 0
        self._stated_shift = None if scheduler is None else scheduler.shift
        if text_encoder is not None:
            guard_attention(text_encoder, "text encoder")
        if vae is not None:
            guard_attention(vae, "VAE")
        if siglip is not None:
            guard_attention(siglip, "vision tower")
        check_components(self, {name: file.path for name, file in self.files().items()})

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        cfg_normalization: float | bool = False,
        cfg_truncation: float | None = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: Sequence[torch.Tensor] | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        seed: int | None = None,
        cfg: float | None = None,
        shift: float | None = None,
        enable_thinking: bool = True,
        prompt_template: str | None = None,
        debug: bool = False,
        sampler: str | None = None,
        schedule: str | None = None,
        variety: float = 0.0,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        mask_blur: float = 0.0,
        outpaint: Sequence[int] | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = 0.75,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        reference_images: Any = None,
        positions: str | None = None,
    ) -> ZImageResult | tuple[Any]:
        """Make images.

        Args:
            prompt: One prompt or several.
            height: Height in pixels, a multiple of 16; default: that of `image`, else the checkpoint's own
                size, or 1024 if it states none.
            width: Width in pixels, with the same default.
            num_inference_steps: Steps, each one call of the network (two with the sampler "heun"); default
                8, or 50 for the base checkpoint.
            sigmas: Noise levels before the shift, falling, in (0, 1]; they replace the number of steps.
            guidance_scale: g in pos + g (pos - neg), so 0 is off; default 0, or 4 for the base checkpoint.
            cfg_normalization: Largest norm of the guided prediction as a multiple of the unguided one; False
                or 0 means no limit.
            cfg_truncation: Guidance is off while 1 - sigma is above this; 1 or None means never.
            negative_prompt: Prompt to move away from; has no effect without guidance.
            num_images_per_prompt: Images of each prompt; they are adjacent in the batch.
            generator: One generator, or one per image, that draws the noise exactly as in diffusers.
            latents: Starting noise [B, 16, height / 8, width / 8] instead of a generator.
            prompt_embeds: Caption features instead of a prompt, a list of [L, cap_feat_dim].
            negative_prompt_embeds: Caption features instead of a negative prompt.
            output_type: "pil", "np" [B, H, W, 3], "pt" [B, 3, H, W] (both in [0, 1]) or "latent".
            return_dict: False returns (images,).
            joint_attention_kwargs: Accepted for diffusers' attention processors, which do not exist here:
                None or empty.
            callback_on_step_end: f(pipe, step, timestep, tensors) -> dict of tensors to replace, or None.
                An exception in it ends the run and is raised unchanged; setting `pipe._interrupt = True` ends
                the denoising and decodes the latents so far.
            callback_on_step_end_tensor_inputs: Any of latents, prompt_embeds, negative_prompt_embeds and
                denoised, the step's estimate of the clean latents, for previews; it cannot be replaced.
            max_sequence_length: Most prompt tokens, up to 1504.
            seed: Image i is drawn from seed + i (modulo 2^64), with the same noise on every device and in
                every batch position; between devices and numbers of threads images differ by rounding.
                Without seed, generator and latents, a seed is drawn from torch's global generator.
            cfg: The scale of other programs, which is guidance_scale + 1, so 1 is off. Give only one of the
                two.
            shift: Shift of the noise levels, 3 for Turbo and 6 for the base checkpoint. Default: that of the
                scheduler. Where no scheduler was given or found, as with loose files, 6 also sets the base
                checkpoint's defaults of 50 steps and guidance 4.
            enable_thinking: False appends an empty <think> block to the prompt; the model was trained
                with True.
            prompt_template: Text that contains `{prompt}` once, instead of Qwen3's chat template.
            debug: Check the output of every block for NaN and infinity as it runs; slower.
            sampler: Name of the method that follows the velocity; default "euler". docs/guides/sampling.md
                has all.
            schedule: Name of the noise levels' grid; default "linear", that of the checkpoints.
            variety: How far the prompt's embedding is moved for each seed, since Turbo's images of one prompt
                are alike; 0 is not at all, 0.1 a usual value.
            image: Image to begin from: a path, a Pillow image, an array or a tensor; docs/guides/editing.md.
            mask_image: Where to paint anew, white on black; the rest of `image` stays as it is.
            strength: Share of the noise levels that `image` goes through, 0 to 1; default 0.6, or 1 with a
                mask.
            mask_blur: Width in pixels over which the mask's edge is blended.
            outpaint: Pixels by which `image` grows at the left, top, right and bottom.
            control_image: Image, or several, that the loaded ControlNets follow; docs/guides/control.md.
            controlnet_conditioning_scale: Strength of the control, one for each image or for all.
            control_guidance_start: Share of the steps after which the control begins, in the same form.
            control_guidance_end: Share of the steps after which it ends, in the same form.
            reference_images: Images that the prompt speaks of, for an Omni checkpoint: any number for
                all prompts, or a list for each; docs/guides/omni.md. `image` without strength and mask means
                the same where the pipeline has a `siglip`.
            positions: How their places are numbered: "trained" (the default) or "diffusers".

        Returns:
            The images with seeds, noise levels, timings and memory; see `ZImageResult`.

        Raises:
            BadArgument: An argument is outside its range; raised before any weight is used.
            Busy: Another run of this object has not ended.
            Unsupported: The pipeline lacks a component that the call needs; the message names it.
            BadFile: A model file was changed since it was opened.
            OverBudget: The memory budget is too small for this image.
            OutOfMemory: The GPU has too little memory; if only the decoding failed, even in tiles, the error
                has the latents.
            DeviceFault: The GPU or its driver failed.
            NonFinite: NaN or infinity; the message names the step, the block and, if a weight holds it, the
                tensor.
        """
        request = Request(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            cfg_normalization=cfg_normalization,
            cfg_truncation=cfg_truncation,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            joint_attention_kwargs=joint_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            seed=seed,
            cfg=cfg,
            shift=shift,
            enable_thinking=enable_thinking,
            prompt_template=prompt_template,
            debug=debug,
            sampler=sampler,
            schedule=schedule,
            variety=variety,
            image=image,
            mask_image=mask_image,
            strength=strength,
            mask_blur=mask_blur,
            outpaint=outpaint,
            control_image=control_image,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=control_guidance_start,
            control_guidance_end=control_guidance_end,
            reference_images=reference_images,
            positions=positions,
        )
        return self._run(request, return_dict)

    def _run(self, request: Request, return_dict: bool) -> ZImageResult | tuple[Any]:
        """Serve one call, and refuse a second one until it has ended."""
        token = object()
        try:
            if self._running.setdefault("run", token) is not token:
                raise Busy(
                    "this pipeline is already running, in another thread or around this callback; wait, or "
                    "build a second one (mapped files are shared, so it costs little memory)"
                )
            with torch.no_grad():
                try:
                    result = (self._generate if self._ranks is None else self._together)(request)
                    return result if return_dict else (result.images,)
                except RuntimeError as error:
                    fault = self._explained(error)
            raise fault  # outside of the handler, since torch's error holds the frames that hold the memory
        finally:
            # no function is called here, so a second Ctrl-C cannot interrupt it and leave the object busy
            if "run" in self._running and self._running["run"] is token:
                del self._running["run"]

    def _generate(self, request: Request) -> ZImageResult:
        """Run the steps of a call: check, encode, denoise, decode, report."""
        clock = Clock()
        note_run(self)
        check_kinds({**networks(self), "scheduler": self.scheduler})
        request = self._with_own_references(request)
        run = prepare(self.limits, self.scheduler, request)
        if self._controlnets or request.control_image is not None:
            run = self._with_controls(run, request)
        self._check_references(run)
        if run.output_type != "latent" or (run.edit is not None and run.edit.encodes):
            require("vae", self.vae)
        for remark in (*run.remarks, *unlearned(self.text_encoder, run.batch.prompts)):
            warnings.warn(remark, UserWarning, stacklevel=4)
        opened = {**self._opened(), **control_files(run)}
        if run.references is None or not run.references.different():
            opened.pop("siglip", None)
        for part in opened.values():
            part.file.check_unchanged()
        identities = {name: part.file.identity() for name, part in opened.items()}
        self._interrupt, self._guidance_scale, self._num_timesteps = False, run.guidance_scale, run.steps
        ids = self._tokenize(run.batch, run.encoding)
        longest = max(len(each) for each in (*ids.values(), *run.batch.given()))
        self._placement.begin(networks(self), run, longest, self._planned_references(run, ids))
        limited = self._placement.memory is not None
        place = torch.device("cpu") if limited else self.transformer.device
        captions = self._encode(run.batch, ids, run.encoding, run.debug, place)
        if run.variety:
            from zimage_core.sampling.variety import vary

            pairs = zip(captions[0], run.later_seeds, strict=True)
            captions = [vary(caption, seed, run.variety) for caption, seed in pairs], captions[1]
        if run.edit is not None and run.edit.encodes:
            run = self._with_image(run)
        if run.controls:
            run = self._with_control_latents(run)
        if run.references is not None:
            run = self._with_encoded_references(run)
        parallel = None
        if self._ranks is not None:
            run, parallel = self._ranks.ready(run, self.transformer), self._ranks.ulysses
        encoded = clock.lap()
        with self._placement.phase("denoise", self.transformer):
            predict = self._placement.predict(self.transformer, run, longest)
            denoiser = Denoiser(self.transformer, *captions, run, predict, parallel)
            images: Any = denoise(self, denoiser, run, clock.step, clock.lap).cpu()
            del predict, denoiser, captions  # frees what they hold before the decoder needs the memory
        steps = clock.steps()
        if run.output_type != "latent":
            images = self._pixels(images, run.output_type, run.debug, run.edit)
        timings = Timings(encoded, steps, decode=clock.lap(), total=clock.total())
        return ZImageResult(
            images=images,
            seeds=run.seeds,
            sigmas=run.sigmas,
            timings=timings,
            peak_memory=peak_memory(self.device),
            settings=settings_of(run, self.dtype, networks(self), self._ranks),
            interrupted=self._interrupt,
            memory=self._placement.report(),
            files=identities,
            opened=opened,
        )

    def _pixels(self, latents: torch.Tensor, output_type: str, debug: bool, edit: Any = None) -> Any:
        """Latents [B, C, h, w] of a run as images of an output type."""
        with self._placement.phase("decode", self.vae):
            keep = None if self._placement.memory is None else self._placement.memory.keep
            pixels = decode(self.vae, latents.to(self.vae.device), debug, keep, self._ranks)
            return to_output(pixels, output_type, edit)

    def _with_image(self, run: Run) -> Run:
        """The run with the latents of the image that it begins from."""
        config, memory = self.vae.config, self._placement.memory
        keep = None if memory is None else memory.keep
        with self._placement.phase("image", self.vae):
            moments = partial(encode_images, self.vae, debug=run.debug, keep=keep)
            edit = run.edit.encoded(moments, config.scaling_factor, config.shift_factor)
        return replace(run, edit=edit)

    def _explained(self, error: RuntimeError) -> ZImageError:
        """The error to raise instead of one of torch, or that one again if it is of another kind."""
        return explained(error, self.device, self._placement.memory is not None)

    def _tokenize(self, batch: Batch, options: Encoding) -> dict[str, torch.Tensor]:
        """Each text that has to be encoded, with its token ids [L] int64."""
        found = {}
        if batch.texts():
            require("text_encoder", self.text_encoder)
            require("tokenizer", self.tokenizer)
        for text, ids in batch.token_ids(self.tokenizer, options).items():
            if not ids:
                raise BadArgument(
                    "prompt: an empty one gives no tokens in this prompt_template; write something"
                )
            found[text] = torch.tensor(ids, dtype=torch.int64)
        return found

    def _encode(
        self,
        batch: Batch,
        ids: dict[str, torch.Tensor],
        options: Encoding,
        debug: bool,
        device: torch.device,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Captions [L, cap_feat_dim] of both sides; a text that occurs twice is encoded once."""
        features = {}
        # under a budget a tensor that stays on the device would keep the whole memory of the phase there
        out = device if self._placement.memory is None else torch.device("cpu")
        with self._placement.phase("encode", self.text_encoder) if ids else nullcontext():
            for text, each in ids.items():
                call = partial(self.text_encoder, each)
                features[text] = checked(self.text_encoder, "text encoder", call, debug).to(out)
        return batch.sides({text: each.to(device) for text, each in features.items()}, options, device)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: str | torch.device | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Sequence[torch.Tensor] | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor] | None = None,
        max_sequence_length: int = 512,
        enable_thinking: bool = True,
        prompt_template: str | None = None,
        debug: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Caption features of prompts and negative prompts.

        Args:
            prompt: One prompt or several; the list is not modified.
            device: Device of the features; default: that of the transformer.
            do_classifier_free_guidance: Whether to return negative features.
            negative_prompt: One for all prompts, or one for each; None means the empty prompt.
            prompt_embeds: Features to return instead of encoding the prompts.
            negative_prompt_embeds: Features to return instead of encoding the negative prompts.
            max_sequence_length: Most tokens, template included; a warning shows text that is cut off.
            enable_thinking: False appends an empty <think> block; the model was trained with True.
            prompt_template: Text that contains `{prompt}` once, instead of Qwen3's chat template.
            debug: Check every block of the text encoder for NaN and infinity.

        Returns:
            Two lists of tensors [L, cap_feat_dim], where L may differ; the second is empty without guidance.
        """
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            enable_thinking=enable_thinking,
            prompt_template=prompt_template,
        )
        return self._encode_alone(request, do_classifier_free_guidance, device, debug)

    @torch.no_grad()
    def _encode_alone(
        self,
        request: Request,
        guided: bool,
        device: str | torch.device | None,
        debug: bool,
        references: int | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Captions of both sides outside a run; `references` is the number of images in an Omni prompt."""
        if "transformer" in networks(self):
            width = self.transformer.config.cap_feat_dim
        else:  # a text encoder alone can encode
            require("text_encoder", self.text_encoder)
            width = self.text_encoder.config.hidden_size
        batch, options = make_batch(request, guided, width), encoding(request)
        if references is not None:
            batch = replace(batch, references=(references,) * batch.images)
        ids = self._tokenize(batch, options)
        where = self.device if device is None else torch.device(device)
        try:
            return self._encode(batch, ids, options, debug, where)
        except RuntimeError as error:
            fault = self._explained(error)
        raise fault

    @property
    def limits(self) -> Limits:
        """Limits of these components, and the defaults of the checkpoint, Turbo or base."""
        require("transformer", self.transformer)
        vae = networks(self).get("vae")
        config = None if vae is None else vae.config
        return Limits.of(self.transformer.config, config, self.sample_size, self._stated_shift)

    def files(self) -> dict[str, WeightFile]:
        """Component -> the open file whose bytes it uses; components built in memory are left out."""
        return {name: part.file for name, part in self._opened().items()}

    def _opened(self) -> dict[str, Opened]:
        found = {name: opened_file(network) for name, network in networks(self).items()}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, as in diffusers: `ZImagePipeline(**pipe.components)` shares them."""
        names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
        found = {name: getattr(self, name) for name in names}
        return found if self.siglip is None else {**found, "siglip": self.siglip}

    # --- placement ---

    @property
    def device(self) -> torch.device:
        """Device of the computation: that of the transformer, or the one of the memory budget."""
        memory = self._placement.memory
        if memory is not None:
            return memory.device
        for network in networks(self).values():
            return network.device  # type: ignore[no-any-return]
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer's computation."""
        require("transformer", self.transformer)
        return self.transformer.dtype

    @property
    def compute(self) -> str:
        """In which numbers the transformer's blocks multiply: "exact", "bfloat16" or "int8"."""
        require("transformer", self.transformer)
        return self.transformer.compute

    def set_compute(self, compute: str | Mapping[str, str]) -> None:
        """Let the blocks multiply in other numbers from the next run on.

        Args:
            compute: "exact", "bfloat16", "int8" or "auto", or a dict, as for `from_files`; a network that the
                dict leaves out keeps its mode.

        Raises:
            BadArgument: There is no such mode, or no such network.
            Unsupported: The pipeline has a memory budget, whose plan depends on it.
        """
        self._placement.refuse_budget("set_compute")
        self._compute_in(read_computes(compute), self.device)

    def _compute_in(self, computes: Mapping[str, str], device: torch.device) -> None:
        for name, mode in computes.items():
            network = networks(self).get(name)
            if network is not None:
                set_compute(network, mode, device)
        self._placement.forget_graphs()

    def to(
        self: Self,
        *where: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move the networks to a device, compute in another dtype, or both; the VAE stays in float32.

        Raises:
            Unsupported: The pipeline has a memory budget and moves its networks itself.
        """
        targets = (*where, *(target for target in (device, dtype) if target is not None))
        self._placement.to(networks(self), targets)
        return self

    def capture(self, on: bool | None = True) -> None:
        """Record the steps of later runs as CUDA graphs, one for each image size and caption length.

        A graph is recorded at the first step with new shapes and then replayed, in later runs too. The graphs
        share memory for the activations of a step. Results do not change. A graph repeats what was recorded:
        call this again after replacing functions that the network calls.

        Args:
            on: True records always, False never. None, the initial state, records from the ninth step with
                the same shapes on, on NVIDIA GPUs where a step is expected to wait for the host; never with a
                memory budget, hooks, a callback, `debug`, or compiled or replaced modules. If that fails, a
                warning says so and the steps run one by one.

        Raises:
            Unsupported: The transformer is not on a CUDA GPU, or has a memory budget.
        """
        require("transformer", self.transformer)
        self._placement.capture(self.transformer, on)

    def dequantize_weights(self, budget: int | None = None) -> dict[str, int]:
        """Dequantise weights of the transformer once and keep them dense, which saves the work in each step.

        The largest weights come first, until the budget is used; the others stay packed. Results do not
        change.

        Args:
            budget: Bytes by which the weights may grow. Default: free GPU memory less what it takes to decode
                an image of the model's own size; 0 on a CPU, where packed weights are mapped from their file.

        Returns:
            Name of each weight that is dense now -> bytes by which it grew.

        Raises:
            BadArgument: budget is negative or no whole number.
            Unsupported: The pipeline has a memory budget, which places the weights.
        """
        require("transformer", self.transformer)
        vae = networks(self).get("vae")
        config = AutoencoderConfig() if vae is None else vae.config
        return self._placement.dequantize_weights(self.transformer, budget, config)

    def make_resident(self, budget: int | None = None) -> dict[str, int]:
        """Deprecated name of `dequantize_weights`."""
        warnings.warn("make_resident is now dequantize_weights", DeprecationWarning, stacklevel=2)
        return self.dequantize_weights(budget)

    def limit_memory(
        self,
        vram: int | str | None = None,
        ram: int | str | None = None,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        """Set a memory budget for every run; without arguments, remove it.

        Networks are moved to the device phase by phase (text encoder, transformer, VAE). Weights that do not
        fit are streamed from the files in every step, while the GPU computes; the VAE decodes in tiles if
        necessary. `plan` shows the effect of a budget before a run.

        Args:
            vram: GPU memory of a run, beside the driver's own: bytes, "6GiB", "auto" for what is free when
                it begins, or "least" for the smallest budget that the image allows.
            ram: Host memory of the process; on a CPU, this is the limit that applies.
            device: Device of the computation; default: that of the pipeline.

        Raises:
            BadArgument: An amount cannot be parsed, or vram is given for a CPU.
            Unsupported: The networks are on a GPU already, or were not loaded from files.
        """
        where = self.device if device is None else read_device(device)
        for name in COMPONENTS if vram is not None or ram is not None else ():
            require(name, getattr(self, name))
        self._placement.limit_memory(networks(self), vram, ram, where)

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
        references: int = 0,
    ) -> Plan:
        """Plan a run on a GPU without running it: the contents of memory and the expected time of each phase.

        Loaded adapters count, and loaded ControlNets with one control image each.

        Args:
            width: Width in pixels; default: the checkpoint's, also for height, guidance and steps.
            height: Height in pixels.
            images: Number of images.
            caption_tokens: Tokens of each caption, template included.
            vram: GPU memory for the run, in bytes or as "6GiB"; None for no limit.
            ram: Host memory, in the same form; None for no limit.
            rates: Speeds of the machine, from `memory.rates.measure` or `known`; default: those of sm_86.
            guidance: Whether there is a negative side.
            steps: Number of steps.
            references: Number of reference images, each as large as the image that is made.

        Raises:
            BadArgument: A number is out of range.
            OverBudget: The budget is too small for the run.
            Unsupported: A network was built in memory, so that there is no header to plan from.
        """
        opened, limits = self._opened(), self.limits
        if missing := [name for name in COMPONENTS if name not in opened]:
            raise Unsupported(f"plan: {' and '.join(missing)} came from no file; load it from one")
        width = limits.sample_size if width is None else width
        height = limits.sample_size if height is None else height
        sizes = sizes_of(opened, str(self.dtype).removeprefix("torch."))
        guided = limits.guidance > 0 if guidance is None else guidance
        shown = self._usual_references(references, width, height, caption_tokens, images * (1 + guided))
        seen = (width, height, caption_tokens) if shown is None else shown.seen(sizes, width, height)
        return make_plan(
            adapted(sizes, networks(self), *seen),
            width,
            height,
            images,
            caption_tokens,
            vram=None if vram is None else parse_bytes("vram", vram),
            ram=None if ram is None else parse_bytes("ram", ram),
            rates=rates,
            guidance=guided,
            steps=limits.steps if steps is None else steps,
            compute=self.transformer.compute,
            encoder_compute=self.text_encoder.compute,
            nets=Beside(tuple(map(weighed, self.controlnets.values())), len(self.controlnets)),
            references=shown,
            tower=None if shown is None or self.siglip is None else tower_of(self.siglip, shown),
        )
