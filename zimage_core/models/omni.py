"""S3-DiT with images among the text: reference images as latents and as vision features (Omni).

Per sample the stream holds pieces of the caption, images (the last of them is the target) and vision
features. Each has a flag: noisy tokens are modulated by the time of the step, clean ones by that of a
finished image, 1. Noisy tokens come first in our sequences and clean ones behind them, so that a block
modulates two segments and not every token. Attention does not depend on the order, since each token has its
position.

The mathematics is that of diffusers' ZImageTransformer2DModel in Omni mode; no weights were released that
could show more. ComfyUI's flags differ in one place: pads in place of the target's features are clean there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zimage_core.config import PAD_MULTIPLE, TransformerConfig
from zimage_core.errors import BadArgument, BadShape
from zimage_core.models import omni_sequence, sequence
from zimage_core.models.omni_block import OmniBlock
from zimage_core.models.ported import check_call
from zimage_core.models.transformer import After, Estimates, ZImageTransformer
from zimage_core.nn.layers import RMSNorm, Rotation
from zimage_core.nn.linear import Linear

CLEAN = 1.0
"""Network time of a finished image."""


class Reference(NamedTuple):
    """A clean image of the stream; what is missing is replaced by 32 pads.

    Args:
        latent: [in_channels, h, w], scaled as the latents of the run.
        features: Last hidden state of the vision tower as a map [h_s, w_s, siglip_feat_dim].
    """

    latent: Tensor | None = None
    features: Tensor | None = None


class OmniSample(NamedTuple):
    """What the steps of one sample share; pairs are of noisy and of clean tokens.

    Args:
        images: Embedded tokens of the images beside the target, a pair of [tokens, dim].
        rest: Refined captions and features, a pair of [tokens, dim].
        noisy: Whether the target is noisy.
        image_rotation: Rotation of all images in our order, the target first in its segment.
        rotation: Rotation of the joint sequence: noisy images and rest, clean images and rest.
    """

    images: tuple[Tensor, Tensor]
    rest: tuple[Tensor, Tensor]
    noisy: bool
    image_rotation: Rotation
    rotation: Rotation


class OmniPrepared(NamedTuple):
    """Values that the steps of a run share, computed by `OmniTransformer.prepare_omni`.

    Args:
        samples: Values of each sample.
        times: Network times of the steps.
        size: Height and width of the target's latents.
        blocks: Modulations of the blocks for noisy tokens [steps, blocks, 4 * dim] float32.
        final: Modulations of the final layer for noisy tokens [steps, dim].
        clean_blocks: Modulations of the blocks for clean tokens [blocks, 4 * dim] float32.
        clean_final: Modulation of the final layer for clean tokens [dim].
    """

    samples: tuple[OmniSample, ...]
    times: tuple[float, ...]
    size: tuple[int, int]
    blocks: Tensor
    final: Tensor
    clean_blocks: Tensor
    clean_final: Tensor


class OmniTransformer(ZImageTransformer):
    """S3-DiT with a vision branch; on a list of latents it is `ZImageTransformer`, to the bit."""

    block_class = OmniBlock
    positions = "trained"
    """How pieces of a caption are numbered, where a call does not say; see `config.POSITIONS`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        width = config.siglip_feat_dim
        if width is None:
            raise BadArgument("Omni transformer: its config lacks siglip_feat_dim, the width of the features")
        self.siglip_embedder = nn.Sequential(
            RMSNorm(width, config.norm_eps), Linear(width, config.dim, bias=True)
        )
        refiners = range(config.n_refiner_layers)
        self.siglip_refiner = nn.ModuleList(OmniBlock(config, modulated=False) for _ in refiners)
        self.siglip_pad_token = nn.Parameter(torch.zeros(1, config.dim))

    def forward(
        self,
        x: Sequence[Any],
        t: Tensor,
        cap_feats: Sequence[Any],
        return_dict: bool = True,
        after: After | None = None,
        siglip_feats: Sequence[Sequence[Tensor | None] | None] | None = None,
        image_noise_mask: Sequence[Sequence[int]] | None = None,
        positions: str | None = None,
        **others: Any,
    ) -> Estimates | tuple[Estimates]:
        """Run each sample alone, in order; time and sign as for `ZImageTransformer.forward`.

        Args:
            x: Per sample a list of images [in_channels, 1, h, w], None for a missing one; the last is the
                target. A list of latents instead is text to image (and `cap_feats` a list of captions).
            t: Times in [0, 1], float32 [samples].
            cap_feats: Per sample the pieces of its caption, each [L, cap_feat_dim]: one before each image,
                and any number behind the last.
            return_dict: False returns (list,), as in diffusers.
            after: As for `ZImageTransformer.predict`, in text to image alone.
            siglip_feats: Per sample the vision features of each image, [h_s, w_s, siglip_feat_dim], None for
                missing ones; None for a sample without such tokens, or for all.
            image_noise_mask: Per sample 1 for each noisy image and 0 for each clean one. A piece of the
                caption and the features have the flag of their image; pieces beyond the list are noisy.
                None: the target alone is noisy.
            positions: One of `config.POSITIONS`; None for the attribute.
            others: As for `ZImageTransformer.forward`.

        Returns:
            The estimate of each target, [in_channels, 1, h, w], in the model's dtype.

        Raises:
            BadShape: Numbers of pieces, images and features do not fit each other, or shapes the transformer.
            BadArgument: The stream is longer than the positions the model knows, or `positions` is unknown.
            Unsupported: An argument of diffusers has a value that means something.
        """
        if not x or isinstance(x[0], Tensor):
            given = {"siglip_feats": siglip_feats, "image_noise_mask": image_noise_mask, **others}
            return super().forward(x, t, cap_feats, return_dict, after, **given)
        check_call((), self.config.patch_size, {"after": after, **others})
        count = len(x)
        features = [None] * count if siglip_feats is None else siglip_feats
        masks = (
            [[0] * (len(images) - 1) + [1] for images in x] if image_noise_mask is None else image_noise_mask
        )
        if not count == len(cap_feats) == t.numel() == len(features) == len(masks):
            raise BadShape(
                f"omni: got {count} samples of images, {len(cap_feats)} of captions, {t.numel()} times, "
                f"{len(features)} samples of features and {len(masks)} noise masks"
            )
        out = Estimates()
        for images, time, pieces, maps, mask in zip(
            x, t.flatten().tolist(), cap_feats, features, masks, strict=True
        ):
            self._check_images(images)
            references = [None if image is None else image[:, 0] for image in images[:-1]]
            target = images[-1][:, 0]
            one = self._sample(pieces, references, maps, mask, target.shape[-2:], positions)
            prepared = self._with_times((one,), [time], target.shape[-2:])
            out.append(self.step_omni(target.to(self.dtype), prepared, 0).unsqueeze(1))
        return out if return_dict else (out,)

    def prepare_omni(
        self,
        pieces: Sequence[Sequence[Tensor]],
        references: Sequence[Sequence[Reference]],
        times: Sequence[float],
        size: tuple[int, int],
        positions: str | None = None,
    ) -> OmniPrepared:
        """Compute the values that the steps of a run share: all but what depends on the latents.

        Args:
            pieces: Per sample the pieces of its caption, each [L, cap_feat_dim]; see `forward`.
            references: Per sample its reference images. Without any it has no vision features; else the
                target's are pads.
            times: Network times of the steps, each a float32 value.
            size: Height and width of the target's latents.
            positions: One of `config.POSITIONS`; None for the attribute.

        Raises:
            BadShape, BadArgument: As for `forward`.
        """
        if len(pieces) != len(references):
            raise BadShape(f"omni: got {len(pieces)} samples of captions and {len(references)} of references")
        samples: dict[tuple[int, ...], OmniSample] = {}  # what occurs several times is prepared once
        keys = []
        for caption, images in zip(pieces, references, strict=True):
            tensors = [t for image in images for t in (image.latent, image.features)]
            keys.append(tuple(map(id, (*caption, *tensors))))
            if keys[-1] not in samples:
                samples[keys[-1]] = self._sample(
                    caption,
                    [image.latent for image in images],
                    [*(image.features for image in images), None] if images else None,
                    [0] * len(images) + [1],
                    size,
                    positions,
                )
        return self._with_times(tuple(samples[key] for key in keys), times, size)

    def step_omni(self, latent: Tensor, prepared: OmniPrepared, i: int, sample: int = 0) -> Tensor:
        """Estimate (clean - noise) of one sample's target in step i.

        Args:
            latent: [in_channels, h, w] of the prepared size, in the model's dtype.
            prepared: The result of `prepare_omni`.
            i: Index of the prepared time.
            sample: Index of the prepared sample.

        Returns:
            [in_channels, h, w].
        """
        one = prepared.samples[sample]
        noisy, clean = prepared.blocks[i].unbind(), prepared.clean_blocks.unbind()
        beside = len(one.images[0]) + len(one.images[1])
        target = self._embedded(latent, len(one.image_rotation[0]) - beside)
        order = (target, *one.images) if one.noisy else (one.images[0], target, one.images[1])
        split = len(one.images[0]) + (len(target) if one.noisy else 0)
        x = torch.cat(order)
        del target, order  # memory for the blocks
        for k, block in enumerate(self.noise_refiner):
            with self.stream.block(k):
                x = block(x, one.image_rotation, modulation=noisy[k], clean=clean[k], noisy=split)
        joint = torch.cat((x[:split], one.rest[0], x[split:], one.rest[1]))
        split += len(one.rest[0])
        del x
        for k, block in enumerate(self.layers, start=len(self.noise_refiner)):
            with self.stream.block(k):
                joint = block(joint, one.rotation, modulation=noisy[k], clean=clean[k], noisy=split)
        config, (height, width) = self.config, latent.shape[-2:]
        start = 0 if one.noisy else split
        count = (height // config.patch_size) * (width // config.patch_size)
        final = prepared.final[i] if one.noisy else prepared.clean_final
        out = self.all_final_layer[config.patch_key](joint[start : start + count], modulation=final)
        return sequence.unpatchify(out, height, width, config.patch_size)

    def _with_times(
        self, samples: tuple[OmniSample, ...], times: Sequence[float], size: tuple[int, int]
    ) -> OmniPrepared:
        blocks, final = self.modulate(torch.tensor([*times, CLEAN], dtype=torch.float32))
        own = tuple(times), (int(size[0]), int(size[1]))
        return OmniPrepared(samples, *own, blocks[:-1], final[:-1], blocks[-1], final[-1])

    def _sample(
        self,
        pieces: Sequence[Tensor],
        references: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None,
        mask: Sequence[int],
        size: Sequence[int],
        positions: str | None,
    ) -> OmniSample:
        """What the steps of one sample share; see `forward`. `references` are the images but the target."""
        config = self.config
        self._check_sample(pieces, references, features, mask)
        sides = [None if image is None else image.shape[-2:] for image in references]
        ids = omni_sequence.positions_of(
            [len(piece) for piece in pieces],
            [
                None if s is None else (s[0] // config.patch_size, s[1] // config.patch_size)
                for s in (*sides, size)
            ],
            [None if each is None else (each.shape[0], each.shape[1]) for each in features or ()],
            config.patch_size,
            omni_sequence.numbering(self.positions if positions is None else positions),
        )
        omni_sequence.check_positions(config, ids, sum(map(len, pieces)))
        flags = [bool(flag) for flag in (*mask, *[1] * len(pieces))]
        noisy = flags[len(references)]
        texts = self._refined(
            pieces, self.cap_embedder, self.cap_pad_token, self.context_refiner, torch.cat(ids.captions)
        )
        maps: Sequence[Tensor] = ()
        if features is not None:
            maps = self._refined(
                [None if each is None else _scrambled(each) for each in features],
                self.siglip_embedder, self.siglip_pad_token, self.siglip_refiner, torch.cat(ids.features),
            )  # fmt: skip
        rest_flags = (*flags[: len(texts)], *flags[: len(maps)])
        image_ids = _apart((ids.images[-1], *ids.images[:-1]), (noisy, *flags))
        rest_ids = _apart((*ids.captions, *ids.features), rest_flags)
        nothing = texts[0][:0]
        return OmniSample(
            _apart((nothing, *map(self._embedded, references)), (noisy, *flags)),
            _apart((*texts, *maps), rest_flags),
            noisy,
            self.rotation(torch.cat(image_ids)),
            self.rotation(torch.cat((image_ids[0], rest_ids[0], image_ids[1], rest_ids[1]))),
        )

    def _embedded(self, latent: Tensor | None, count: int | None = None) -> Tensor:
        """Latent [in_channels, h, w] -> tokens and pads [count, dim]; 32 pads for a missing one.

        By default `count` is the next multiple of 32.
        """
        if latent is None:
            return self.x_pad_token.expand(PAD_MULTIPLE, -1)
        config = self.config
        patches = sequence.patchify(latent.to(self.device, self.dtype), config.patch_size)
        tokens = self.all_x_embedder[config.patch_key](patches)
        pads = sequence.pad_count(len(tokens)) if count is None else count - len(tokens)
        return torch.cat((tokens, self.x_pad_token.expand(pads, -1)))

    def _refined(
        self, parts: Sequence[Tensor | None], embed: nn.Module, pad: Tensor, blocks: nn.Module, ids: Tensor
    ) -> Sequence[Tensor]:
        """Features [L, width] of each part -> its tokens with their pads [padded, dim]; 32 pads for None."""
        norm, project = embed.children()
        given = [part for part in parts if part is not None]
        tokens: list[Tensor] = []
        if given:
            # the norm comes before the cast, as for captions of a text-to-image call
            whole = torch.cat([part.to(given[0].device) for part in given]).to(self.device)
            embedded = project(norm(whole).to(self.dtype))
            tokens = list(embedded.split([len(part) for part in given]))
        padded = []
        for part in parts:
            own = pad[:0] if part is None else tokens.pop(0)
            pads = PAD_MULTIPLE if part is None else sequence.pad_count(len(own))
            padded.append(torch.cat((own, pad.expand(pads, -1))))
        x, rope = torch.cat(padded), self.rotation(ids)
        for block in blocks.children():
            with self.stream.once(block):
                x = block(x, rope)
        return torch.split(x, [len(part) for part in padded])

    def _check_sample(
        self,
        pieces: Sequence[Tensor],
        references: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None,
        mask: Sequence[int],
    ) -> None:
        config, count = self.config, len(references) + 1
        if len(pieces) < count:
            raise BadShape(
                f"omni: got {len(pieces)} pieces of text for {count} images, the target among them; "
                "wanted one before each image, and usually one behind the last"
            )
        if len(mask) < count or (features is not None and len(features) != count):
            sizes = f"{len(mask)} flags" + ("" if features is None else f" and {len(features)} features")
            raise BadShape(
                f"omni: got {sizes} for {count} images; wanted one for each, None for missing features"
            )
        for piece in pieces:
            self._check_caption(piece)
            if not len(piece):
                raise BadShape("omni: a piece of text has no tokens; wanted 1 or more")
        for image in references:
            if image is not None:
                self._check_latent(image.unsqueeze(1))
        for each in features or ():
            if each is not None and (
                each.ndim != 3 or not each.numel() or each.shape[-1] != config.siglip_feat_dim
            ):
                raise BadShape(
                    f"omni: got vision features of {tuple(each.shape)}, wanted "
                    f"[h, w, {config.siglip_feat_dim}]; use the vision tower that belongs to this transformer"
                )

    def _check_images(self, images: Sequence[Tensor | None]) -> None:
        """Refuse images of a call that do not fit, and a target that is missing."""
        if not isinstance(images, (list, tuple)) or not images or images[-1] is None:
            raise BadShape("omni: wanted a list of images for each sample, the last of them its target")
        for image in images:
            if image is not None:
                self._check_latent(image)


def _apart(parts: Sequence[Tensor], flags: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Rows of the parts with flag True, and of the others."""
    pairs = list(zip(parts, flags, strict=False))
    noisy, clean = ([part for part, own in pairs if own is flag] for flag in (True, False))
    return torch.cat((parts[0][:0], *noisy)), torch.cat((parts[0][:0], *clean))


def _scrambled(features: Tensor) -> Tensor:
    """Features [h, w, C] -> [h * w, C], in an order of numbers that is no list of tokens.

    The channels come first and the result is reshaped, not transposed. diffusers, DiffSynth and ComfyUI all
    do it, so a checkpoint was most likely trained so.
    """
    return features.permute(2, 0, 1).reshape(-1, features.shape[-1])
