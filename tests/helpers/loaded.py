"""What a loaded module holds, and name conversions written apart from zimage_core.weights.names."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tests.helpers.model_files import TOY_DIT, Stored
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights import names

FUSED = names.checkpoint_shapes(names.transformer_table(TOY_DIT, "fused"))
SPLIT = names.checkpoint_shapes(names.transformer_table(TOY_DIT, "split"))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter as float32, packed ones dequantised."""
    found = {name: p.detach().float() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)) and isinstance(module.weight, QuantTensor):
            found[f"{name}.weight"] = module.weight.dequantize(torch.float32)
    return found


def split_names(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused names to diffusers', written out by hand and apart from names.py."""
    out = {}
    for name, value in values.items():
        if name.endswith("attention.qkv.weight"):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("qkv", f"to_{part}")] = piece
            continue
        for old, new in (
            ("attention.out.", "attention.to_out.0."),
            ("attention.q_norm.", "attention.norm_q."),
            ("attention.k_norm.", "attention.norm_k."),
        ):
            name = name.replace(old, new)
        if name.startswith(("x_embedder.", "final_layer.")):
            head, rest = name.split(".", 1)
            name = f"all_{head}.2-1.{rest}"
        out[name] = value
    return out


def assert_same(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    got = weights(model)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value.reshape(got[name].shape)), name
    assert not any(t.is_meta or t.requires_grad for t in (*model.parameters(), *model.buffers()))
    assert not model.training


def hf_to_gguf(config, content: Stored, permute: bool) -> Stored:
    """HF names to GGUF by the package of llama.cpp; q and k of llama permuted by its formula."""
    import gguf

    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, config.arch.upper()), config.num_layers)
    out = Stored()
    for name, (fmt, packed, shape) in content.tensors.items():
        stem, _, leaf = name.rpartition(".")
        for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if permute and stem.endswith(part):
                # convert_hf_to_gguf.py, LlamaModel.permute, on rows of bytes
                swapped = packed.reshape(heads, 2, packed.shape[0] // heads // 2, -1).swapaxes(1, 2)
                packed = np.ascontiguousarray(swapped.reshape(packed.shape))
        out.tensors[f"{table.get_name('model.' + stem) or stem}.{leaf}"] = (fmt, packed, shape)
    return out
