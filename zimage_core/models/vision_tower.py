"""SigLIP2's vision tower (NaFlex) up to its last hidden state, without the pooling head.

Source: Tschannen et al. 2025, arXiv 2502.14786; transformers' Siglip2VisionModel. An image is not padded and
needs no mask. Parameter names are those of transformers, without the prefixes `vision_model.` and `encoder.`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zimage_core.config import VisionConfig
from zimage_core.errors import BadShape
from zimage_core.models.block_source import RESIDENT, BlockSource
from zimage_core.models.ported import Network
from zimage_core.nn.attention import attention
from zimage_core.nn.linear import Linear, ready


class LayerNorm(nn.Module):
    """Mean 0 and variance 1, then a learned weight and bias; computed in float32, returned in x's dtype.

    Source: Ba et al. 2016, arXiv 1607.06450, with the biased variance.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return functional.layer_norm(x.to(wide), self.weight.shape, weight, bias, self.eps).to(x.dtype)


class PositionTable(nn.Module):
    """Learned embeddings of a square grid, resized to the grid of an image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.weight = nn.Parameter(torch.empty(config.num_patches, config.hidden_size))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)

    def forward(self, height: int, width: int) -> Tensor:
        """The embeddings of a grid of height x width patches: [height * width, hidden], dtype of the table.

        Bilinear, with antialias where the grid shrinks, pixel centres at halves; computed in float32.
        """
        table = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        maps = table.view(self.grid, self.grid, -1).permute(2, 0, 1).unsqueeze(0)
        resized = functional.interpolate(
            maps, (height, width), mode="bilinear", align_corners=False, antialias=True
        )
        return resized[0].flatten(1).T.to(self.weight.dtype)


class Embeddings(nn.Module):
    """Patches to tokens: a linear map of the pixels of a patch, plus the embedding of its place."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.patch_dim, config.hidden_size, bias=True)
        self.position_embedding = PositionTable(config)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches [h_s * w_s, patch_dim] -> [h_s * w_s, hidden]."""
        tokens: Tensor = self.patch_embedding(patches)
        places: Tensor = self.position_embedding(*grid)
        return tokens + places


class Attention(nn.Module):
    """Attention of all patches to all patches, with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head_dim = hidden // config.num_heads
        self.q_proj = Linear(hidden, hidden, bias=True)
        self.k_proj = Linear(hidden, hidden, bias=True)
        self.v_proj = Linear(hidden, hidden, bias=True)
        self.out_proj = Linear(hidden, hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [L, hidden] -> [L, hidden]."""
        x = ready(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(attention(q, k, v))
        return out


class MLP(nn.Module):
    """fc2(gelu(fc1 x)), with the approximation of gelu by tanh."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [L, hidden] -> [L, hidden]."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class Layer(nn.Module):
    """Pre-norm attention and MLP on a residual stream."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [L, hidden] -> [L, hidden] in x's dtype; the branches compute in `dtype`."""
        x = x + self.self_attn(self.layer_norm1(x).to(dtype)).to(x.dtype)
        branch: Tensor = self.mlp(self.layer_norm2(x).to(dtype))
        return x + branch.to(x.dtype)


class VisionTower(Network):
    """Patches of an image to its features."""

    loader = "load_siglip"
    processor: object | None = None
    """The image processor that it was loaded with, a `vision.processor.Processor`."""
    few_rows = True
    """A tower runs once for an image: making int8 rows takes longer than their products save."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.stream: BlockSource = RESIDENT

    @property
    def blocks(self) -> tuple[Layer, ...]:
        """The layers in their order."""
        return tuple(self.layers)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation; the packed weights do not depend on it."""
        return self.post_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self.post_layernorm.weight.device

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The last hidden state, after the last norm.

        Args:
            patches: [h_s * w_s, patch_size^2 * num_channels], row by row; in a patch the channels of a pixel
                come last. Of any float dtype; `vision.processor.patches_of` makes them.
            grid: (h_s, w_s), the patches along each side.

        Returns:
            [h_s * w_s, hidden]; float32 when the tower is float16, whose residual stream is float32 too.

        Raises:
            BadShape: The patches do not fit the grid or the tower.
        """
        height, width = grid
        if min(grid) < 1 or patches.shape != (height * width, self.config.patch_dim):
            raise BadShape(
                f"vision tower: got patches {tuple(patches.shape)} for a grid of {height} x {width}, "
                f"wanted ({height * width}, {self.config.patch_dim}), and one patch or more"
            )
        stream = torch.float32 if self.dtype == torch.float16 else self.dtype
        x = self.embeddings(patches.to(self.device, self.dtype), grid).to(stream)
        for i, layer in enumerate(self.layers):
            with self.stream.block(i):
                x = layer(x, self.dtype)
        out: Tensor = self.post_layernorm(x)
        return out
