"""From a prompt to pictures: the main job as a list of steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from zimage_core.errors import BadArgument, Busy, NonFinite, OutOfMemory
from zimage_core.files.png import file_identity
from zimage_core.models.conditioning import Conditioning
from zimage_core.models.vae_tiles import DecodeWay, ways_to_decode
from zimage_core.run.batch import Batch, make_batch
from zimage_core.run.checks import StepCallback
from zimage_core.run.loading import Components
from zimage_core.run.nonfinite import checked, explain, watch
from zimage_core.run.request import Run, call_back, describe, encoding, prepare
from zimage_core.run.result import Clock, Timings, ZImageResult, peak_memory, to_output
from zimage_core.sampling.euler import network_time, sample
from zimage_core.sampling.guidance import Guided, Network
from zimage_core.text.prompt import prompt_ids


class ZImagePipeline(Components):
    """Z-Image text to image. The call and its argument names are those of diffusers' ZImagePipeline.

    One object serves one run at a time: a second call, from another thread or from the callback, gets `Busy`.
    Models, tokenizer and scheduler are the attributes `transformer`, `text_encoder`, `vae`, `tokenizer` and
    `scheduler`; see `from_files`, `from_pretrained` and `from_default` for ways to build one.
    """

    @torch.no_grad()
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
            prompt: One or several; the list is not modified.
            device: Where the features go; default: where the transformer is.
            do_classifier_free_guidance: Whether negative features are wanted.
            negative_prompt: One for all, or one for each prompt; None means the empty prompt.
            prompt_embeds: Returned in place of the encoded prompts.
            negative_prompt_embeds: Returned in place of the encoded negative prompts.
            max_sequence_length: Most tokens, template included; what is cut off is warned about.
            enable_thinking: As the model was trained; see `text.prompt.render`.
            prompt_template: Text with `{prompt}` in the place of the chat template.
            debug: Check every block of the text encoder.

        Returns:
            Two lists of [L, cap_feat_dim] tensors of different L; the second is empty without guidance.
        """
        given = {
            "prompt": prompt, "negative_prompt": negative_prompt, "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds, "max_sequence_length": max_sequence_length,
            "enable_thinking": enable_thinking, "prompt_template": prompt_template,
        }  # fmt: skip
        batch = make_batch(given, 1, do_classifier_free_guidance, self.transformer.config.cap_feat_dim)
        return self._encode(batch, encoding(given), debug, device)

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
        enable_thinking: bool = True,
        prompt_template: str | None = None,
        debug: bool = False,
    ) -> ZImageResult | tuple[Any]:
        """Make pictures.

        Args:
            prompt: One or several.
            height: Pixels, a multiple of 16; default: the checkpoint's own size, 1024 if it names none.
            width: The same.
            num_inference_steps: Calls of the network; default 8, or 50 for the base checkpoint.
            sigmas: Own noise levels before the shift, falling, in (0, 1]; take the place of the steps.
            guidance_scale: pos + g (pos - neg), so 0 is off; default 0, or 4 for the base checkpoint.
            cfg_normalization: Cap on the guided norm as a multiple of the unguided one; False or 0:
                none.
            cfg_truncation: Guidance is off where 1 - sigma is above this; 1 or None: never.
            negative_prompt: What to move away from; without effect at guidance 0.
            num_images_per_prompt: Pictures of each prompt, neighbours in the batch.
            generator: Draws the noise exactly as diffusers does; one, or one a picture.
            latents: Starting noise [B, 16, height / 8, width / 8] in place of a generator.
            prompt_embeds: Caption features in place of a prompt, a list of [L, cap_feat_dim].
            negative_prompt_embeds: The same for the negative side.
            output_type: "pil", "np" [B, H, W, 3], "pt" [B, 3, H, W] (both in [0, 1]) or "latent".
            return_dict: False returns (images,).
            joint_attention_kwargs: diffusers' attention processors; there are none here, so None or
                empty.
            callback_on_step_end: f(pipe, step, timestep, tensors) -> dict of tensors to replace, or
                None. An exception in it ends the run and comes out unchanged; setting `pipe._interrupt =
                True` ends the denoising and decodes what is there.
            callback_on_step_end_tensor_inputs: Of latents, prompt_embeds, negative_prompt_embeds.
            max_sequence_length: Most prompt tokens, up to 1504.
            seed: Picture i is drawn from seed + i (modulo 2^64), the same on every device and in every
                batch position. Without seed, generator and latents, one is drawn from torch's global
                generator.
            cfg: The scale of other programs, guidance_scale + 1, so 1 is off; not together with it.
            enable_thinking: False appends an empty <think> block to the prompt; the model was trained
                with True.
            prompt_template: Text with `{prompt}` once, in place of Qwen3's chat template.
            debug: Check the output of every block for NaN and infinity as it runs; slower.

        Returns:
            The pictures with seeds, noise levels, timings and memory; see `ZImageResult`.

        Raises:
            BadArgument: Any argument outside its range, before a weight is touched.
            Busy: Another run of this object has not ended.
            BadFile: A model file changed since it was opened.
            OverBudget: The memory budget does not hold the least that this picture needs.
            OutOfMemory: The GPU cannot hold the decoding, not even in tiles; the error carries the latents.
            NonFinite: NaN or infinity; names the step, the block and, if a weight is to blame, the tensor.
        """
        given = dict(locals())  # every argument by its name, before any other local exists
        token = object()
        try:
            if self._running.setdefault("run", token) is not token:
                raise Busy(
                    "this pipeline is already running, in another thread or around this callback; wait, or "
                    "build a second one (mapped files are shared, so it costs little memory)"
                )
            with torch.no_grad():
                result = self._generate(given)
            return result if return_dict else (result.images,)
        finally:
            # no call in here, so no point at which a second Ctrl-C could leave the object busy for ever
            if "run" in self._running and self._running["run"] is token:
                del self._running["run"]

    def _generate(self, given: dict[str, Any]) -> ZImageResult:
        """The main job: check, encode, denoise, decode, report."""
        clock = Clock()
        run = prepare(self.limits, self.scheduler, given)
        files = self.files()
        for file in files.values():
            file.check_unchanged()
        identities = {name: file_identity(file.places) for name, file in files.items()}
        self._interrupt, self._guidance_scale, self._num_timesteps = False, run.scale, run.steps
        self._begin(run)
        positive, negative = self._encode(run.batch, run.encoding, run.debug)
        encoded = clock.lap()
        denoise = Guided(
            self._network(run), positive, negative, run.scale,
            run.cfg_normalization, run.cfg_truncation, self.transformer.dtype,
        )  # fmt: skip
        with self._phase("denoise"):
            latents = self._denoise(run, denoise, clock)
        del denoise  # and what it remembers of the run, before the decoder needs the memory
        steps = clock.steps()
        images: Any = latents.cpu()
        if run.output_type != "latent":
            with self._phase("decode"):
                images = to_output(self._decode(latents, run.debug), run.output_type)
        timings = Timings(encoded, steps, decode=clock.lap(), total=clock.total())
        return ZImageResult(
            images=images,
            seeds=run.seeds,
            sigmas=run.sigmas,
            timings=timings,
            peak_memory=peak_memory(self.device),
            settings=describe(run, self.scheduler.shift, self.dtype),
            interrupted=self._interrupt,
            memory=None if self._arena is None else self._arena.report(),
            files=identities,
            places={name: file.places for name, file in files.items()},
        )

    def _encode(
        self, batch: Batch, options: dict[str, Any], debug: bool, device: str | torch.device | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Captions of both sides; a text that comes twice is encoded once."""
        known: dict[str, torch.Tensor] = {}
        where = torch.device(device) if device is not None else self.transformer.device

        def features(texts: list[str] | None, given: list[torch.Tensor] | None) -> list[torch.Tensor]:
            if given is not None:
                return [member.to(where) for member in given]
            for text in texts or ():
                if text not in known:
                    known[text] = self._caption(text, options, debug).to(where)
            return [known[text] for text in texts or ()]

        given = (batch.prompt_embeds, batch.negative_prompt_embeds)
        texts = (batch.prompts, batch.negative_prompts)
        words = any(text and embeds is None for text, embeds in zip(texts, given, strict=True))
        with self._phase("encode") if words else nullcontext():
            return features(texts[0], given[0]), features(texts[1], given[1])

    def _begin(self, run: Run) -> None:
        """Plan the run where memory is limited."""
        if self._arena is None:
            return
        batch = run.batch
        tokens = [len(each) for each in (*(batch.prompt_embeds or ()), *(batch.negative_prompt_embeds or ()))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cut prompts: encoding says it again
            for text in {*(batch.prompts or ()), *(batch.negative_prompts or ())}:
                tokens.append(len(prompt_ids(self.tokenizer, text, **run.encoding)))
        self._arena.begin(run.width, run.height, batch.images, max(1, *tokens, 1), run.scale > 0, run.steps)

    def _caption(self, text: str, options: dict[str, Any], debug: bool) -> torch.Tensor:
        """One prompt -> [L, cap_feat_dim]."""
        ids = torch.tensor(prompt_ids(self.tokenizer, text, **options), dtype=torch.int64)
        if len(ids) == 0:
            raise BadArgument("prompt: an empty one gives no tokens in this prompt_template; write something")
        return checked(self.text_encoder, "text encoder", partial(self.text_encoder, ids), debug)

    def _network(self, run: Run) -> Network:
        """The transformer as `Guided` calls it; it remembers what the steps of this run have in common."""
        if self._graphs is not None and self._graphs.step != self.transformer.step:
            self._forget_graphs()  # the transformer was replaced
        known = Conditioning(self.transformer, [float(network_time(sigma)) for sigma in run.sigmas[:-1]])

        def network(
            x: list[torch.Tensor], t: torch.Tensor, captions: list[torch.Tensor]
        ) -> list[torch.Tensor]:
            if run.debug:
                with watch(self.transformer, "transformer"):
                    return self.transformer.forward(x, t, captions, known)
            out: list[torch.Tensor] = self.transformer(x, t, captions, known, self._graphs)
            return out

        return network

    def _denoise(self, run: Run, denoise: Guided, clock: Clock) -> torch.Tensor:
        """Starting noise -> latents, with the caller's callback after each step."""

        def step_end(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            clock.step()
            if run.callback is not None:
                latents = call_back(self, run, denoise, step, timestep, latents)
                clock.lap()
            return latents

        def stop() -> bool:
            return self._interrupt

        start = run.latents.to(self.transformer.device)
        try:
            return sample(denoise, start, run.sigmas, step_end, stop)
        except NonFinite as error:
            if denoise.last is None:
                raise
            if run.debug:
                done = len(clock.steps())
                raise NonFinite(f"step {done + 1} of {run.steps}: {error}") from None
            latents, time = denoise.last
            denoise.network = self.transformer  # all of it runs again, nothing remembered
            reason = explain(self.transformer, "transformer", lambda: denoise(latents, time, 0))
            raise NonFinite(f"{error}; {reason}") from None

    def _decode(self, latents: torch.Tensor, debug: bool) -> torch.Tensor:
        """Latents [B, 16, h, w] -> pixels [B, 3, 8 h, 8 w] float32 about [-1, 1]; one picture at a time.

        Where the memory of a GPU is too small: in smaller and smaller tiles, then with whole maps on the CPU.
        The pictures are the same.
        """
        config = self.vae.config
        h, w = latents.shape[2:]
        size = f"a picture of {config.spatial_factor * w} x {config.spatial_factor * h}"
        ways = ways_to_decode(h, w, self.vae.tile)
        if self._arena is not None and self._arena.keep is not None:
            ways = [DecodeWay(self.vae.tile, self._arena.keep)]
        left = [z[None] for z in latents / config.scaling_factor + config.shift_factor]
        pictures: list[torch.Tensor] = []
        while left:
            try:
                decode = partial(self.vae.decode, left[0], ways[0].tile, ways[0].keep)
                pictures.append(checked(self.vae, "VAE", decode, debug))
                del left[0]
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            # behind the handler: the exception held the frames that held the memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(ways) == 1:
                raise OutOfMemory(
                    f"VAE: no memory to decode {size}, not even in the smallest tiles ({reason}); the "
                    "finished latents are in the attribute `latents` of this error: save them, then free "
                    "memory or call pipe.vae.to('cpu'), and pipe.vae.decode(error.latents / "
                    "pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor) gives pixels in [-1, 1]",
                    latents.cpu(),
                )
            if ways[0] == DecodeWay():  # the first time
                warnings.warn(
                    f"VAE: no memory to decode {size} with tile = {self.vae.tile}; it is decoded again in "
                    "smaller tiles, which takes longer and gives the same picture; "
                    "pipe.enable_vae_tiling() before the run saves the failed attempt",
                    stacklevel=4,
                )
            del ways[0]
        return torch.cat(pictures)
