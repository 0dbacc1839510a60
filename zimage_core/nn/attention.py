"""Attention, and the settings of torch that a network on a GPU computes with.

torch has several ways to compute attention. `attention_backends` says which are right for a GPU and a use,
and `settings` asks torch for them, for a phase of a run. The unfused way keeps the matrix of all scores, 2 GB
a block at 1024 px. On a GPU `attention` never takes it: it repeats heads of k and v where that makes a fused
kernel possible, else it takes the queries in chunks. In int8 mode q k^T may be a product of int8 instead, on
GPUs by a kernel of this library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.backends import cuda as backends
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimage_core.cpu import attention as int8_on_cpu
from zimage_core.quant import gpu_int8
from zimage_core.quant.dispatch import family
from zimage_core.quant.gpu import architecture, kernels_run

Use = Literal["transformer", "text encoder", "vision tower", "VAE"]

CUDNN = ("sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
"""Where cuDNN is faster than flash attention for long sequences without mask, as others measured: pytorch
#192799 (sm_86, sm_89), transformers #48163 (sm_90), sglang #33655 (sm_100) and #36479 (sm_120, heads of 128
channels, 4,096 tokens). On sm_80 the two are equal."""
SCORES = 128 << 20
"""Most bytes of float32 scores at a time where no fused kernel exists."""

_BACKENDS: dict[str, tuple[SDPBackend, Callable[[], bool]]] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, backends.cudnn_sdp_enabled),
    "flash": (SDPBackend.FLASH_ATTENTION, backends.flash_sdp_enabled),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, backends.mem_efficient_sdp_enabled),
    "math": (SDPBackend.MATH, backends.math_sdp_enabled),
}
_ways: dict[tuple[object, ...], str] = {}  # kind of attention -> "fused", "repeat" or "chunks"


def attention_backends(
    architecture: str, use: Use, dtype: str = "bfloat16", head_dim: int = 128
) -> tuple[str, ...]:
    """The fused kernels to ask torch for, best first.

    Args:
        architecture: "sm_90", "gfx942" ...; the nearest known one counts.
        use: The transformer has one length in a run. A text encoder has another for each prompt, and cuDNN
            builds a plan anew for each length (pytorch #155958).
        dtype: Name of the dtype of q.
        head_dim: Channels of a head.

    Returns:
        Some of "cudnn", "flash" and "efficient"; none if the queries have to be taken in chunks. On AMD, the
        ones that torch may have been built with.
    """
    arch = family(architecture)
    if arch.startswith("gfx"):
        return ("flash", "efficient")
    old = arch in ("sm_50", "sm_70", "sm_75")  # flash attention begins with sm_80
    if old and dtype == "bfloat16":
        return ()
    if old or dtype == "float32" or head_dim > 256:
        return ("efficient",)
    if use == "transformer" and arch in CUDNN and head_dim <= 128:
        return ("cudnn", "flash", "efficient")
    return ("flash", "efficient")


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, in_int8: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for each head.

    `causal` is the only mask: a sequence holds the tokens of one image only, and its pad tokens are attended
    to by design.

    Args:
        q: [..., L, H, D].
        k: [..., L, H_kv, D] with H a multiple of H_kv.
        v: Shape of k.
        causal: Whether a token sees only itself and those before it.
        in_int8: Multiply q k^T in int8 where the device gains by it.

    Returns:
        [..., L, H * D].
    """
    if in_int8 and not causal and _int8_pays(q, k, v):
        return _by_int8(q, k, v)
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    alone = q.ndim == 3
    if alone:  # torch's fused kernels need four axes; with three, torch builds the whole matrix of scores
        q, k, v = q[None], k[None], v[None]
    grouped = q.shape[-3] != k.shape[-3]
    way = _way(q, k, v, causal, grouped) if q.is_cuda and not torch.compiler.is_compiling() else "fused"
    if way != "fused":
        k, v = _repeated(q, k, v)
        grouped = False
    if way == "chunks":
        out = _in_chunks(q, k, v, causal)
    else:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    out = out.transpose(-3, -2).flatten(-2)
    return out[0] if alone else out


def _int8_pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q k^T in int8 is possible and faster than torch's attention."""
    if q.shape != k.shape or k.shape != v.shape or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    if kernels_run(q.device):
        return gpu_int8.attention_pays(q)
    return q.device.type == "cpu" and q.ndim == 3 and int8_on_cpu.pays(q.shape[-3])


def _by_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [..., L, H, D] -> [..., L, H * D]."""
    if kernels_run(q.device):
        return gpu_int8.attention(q, k, v)
    return int8_on_cpu.attention(*(t.transpose(0, 1) for t in (q, k, v))).transpose(0, 1).flatten(-2)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with as many heads as q: kernels that take no groups then serve, too."""
    times = q.shape[-3] // k.shape[-3]
    return (k, v) if times == 1 else (k.repeat_interleave(times, -3), v.repeat_interleave(times, -3))


def _way(q: Tensor, k: Tensor, v: Tensor, causal: bool, grouped: bool) -> str:
    """How torch has a fused kernel for these heads; asked once for each kind of them."""
    kind = (q.device, q.dtype, q.shape[-1], causal, grouped)
    found = _ways.get(kind)
    if found is None:
        found = "fused"
        if not _has_kernel(q, k, v, causal, grouped):
            found = "repeat" if grouped and _has_kernel(q, *_repeated(q, k, v), causal, False) else "chunks"
        _ways[kind] = found
    return found


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, grouped: bool) -> bool:
    asked = backends.SDPAParams(q, k, v, None, 0.0, causal, grouped)
    return (
        backends.can_use_flash_attention(asked)
        or backends.can_use_efficient_attention(asked)
        or backends.can_use_cudnn_attention(asked)
    )


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of some queries after others, so that at most SCORES bytes of scores exist at a time."""
    length = q.shape[-2]
    height = max(1, SCORES // (4 * q.shape[:-2].numel() * max(k.shape[-2], 1)))
    out = torch.empty_like(q)
    for start in range(0, length, height):
        stop = min(start + height, length)
        mask = None
        if causal:
            places = torch.arange(stop, device=q.device)
            mask = places <= places[start:, None]
        last = stop if causal else k.shape[-2]
        part = q[..., start:stop, :]
        seen = (k[..., :last, :], v[..., :last, :])
        out[..., start:stop, :] = functional.scaled_dot_product_attention(part, *seen, attn_mask=mask)
    return out


class _Settings:
    """torch's settings are the process's: the first who enters saves them, the last who leaves restores."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.saved = ExitStack()

    def enter(self, order: tuple[str, ...]) -> None:
        with self.lock:
            if not self.inside:
                for name in ("fp16", "bf16"):
                    self._sum_in_float32(f"allow_{name}_reduced_precision_reduction")
                # those that the user switched off stay off
                known = (*order, *(name for name in _BACKENDS if name not in order))
                wanted = [_BACKENDS[name][0] for name in known if _BACKENDS[name][1]()]
                self.saved.enter_context(sdpa_kernel(wanted, set_priority=True))
            self.inside += 1

    def _sum_in_float32(self, name: str) -> None:
        products: Any = backends.matmul
        now, split = getattr(products, name), getattr(products, f"{name}_split_k", None)
        # torch 2.10 and newer set both at once
        before, wanted = (now, False) if split is None else ((now, split), (False, split))
        self.saved.callback(setattr, products, name, before)
        setattr(products, name, wanted)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.saved.close()


_settings = _Settings()


@contextmanager
def settings(device: torch.device, use: Use, dtype: torch.dtype) -> Iterator[None]:
    """torch's settings for a network on a GPU, restored at the end; on a CPU nothing is changed.

    Products of half precision are summed in float32 throughout: by default torch allows a library to add
    partial sums in float16 or bfloat16. Attention asks for `attention_backends` in this order. These settings
    are the process's own, so they hold in all threads until the last network leaves; a network that enters
    meanwhile, in another thread, keeps the order of the first.

    Args:
        device: Device of the network.
        use: What the network is.
        dtype: Dtype of its attention.
    """
    if device.type != "cuda":
        yield
        return
    _settings.enter(attention_backends(architecture(device), use, str(dtype).removeprefix("torch.")))
    try:
        yield
    finally:
        _settings.leave()
