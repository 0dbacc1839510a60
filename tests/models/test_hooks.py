"""Hooks fire on every module of a network; without them a norm stays fused and no bit changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import tiny
from zimage_core.models import block_norms
from zimage_core.models.block_norms import NAMES
from zimage_core.nn.linear import Linear

RUN = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent", "seed": 0}
CALL = ([torch.randn(16, 1, 4, 4)], torch.tensor([0.5]), [torch.randn(3, 24)])


def runs(module):
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def test_every_module_of_a_run_is_seen_and_hooks_that_watch_change_nothing():
    pipe = tiny.pipeline()
    plain = pipe("a", **RUN).images
    seen, handles = set(), []
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    for part, network in parts.items():
        for name, module in network.named_modules():
            if runs(module):
                handles.append(module.register_forward_hook(lambda *_, at=(part, name): seen.add(at)))
                handles.append(module.register_forward_pre_hook(lambda *_, at=(part, name): seen.add(at)))
    watched = pipe("a", **RUN).images
    wanted = {(p, n) for p, net in parts.items() for n, m in net.named_modules() if runs(m)}
    # the parts of a caption's embedder run one by one, because the norm comes before the cast
    assert wanted - seen <= {("transformer", "cap_embedder")}
    torch.testing.assert_close(watched, plain, rtol=0, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert torch.equal(pipe("a", **RUN).images, plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["forward", "pre", "replaced"])
def test_a_hook_on_a_norm_may_change_its_result(name, kind):
    net = tiny.transformer()
    plain = net(*CALL)[0]
    block = net.layers[0]
    owner = block.attention if name.startswith("norm") else block
    norm = getattr(owner, name)
    with torch.no_grad():
        norm.weight.mul_(-2)
        wanted = net(*CALL)[0]
        norm.weight.mul_(-0.5)
    assert float((wanted - plain).abs().max()) > 1e-4
    if kind == "forward":
        norm.register_forward_hook(lambda module, inputs, output: -2 * output)
    elif kind == "pre":
        norm.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))
        norm.weight.data.mul_(2)
    else:
        other = nn.RMSNorm(len(norm.weight), eps=norm.eps)
        other.weight.data.copy_(norm.weight * -2)
        setattr(owner, name, other.requires_grad_(False))
    torch.testing.assert_close(net(*CALL)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_with_hooks_keep_the_range_of_half_precision(dtype):
    net = tiny.transformer().to(dtype)
    plain = net(*CALL)[0].float()
    for name, module in net.named_modules():
        if name.rpartition(".")[2] in NAMES:
            module.register_forward_hook(lambda *_: None)
    assert float((net(*CALL)[0].float() - plain).abs().max()) < 0.05 * float(plain.abs().max())


def test_full_backward_hooks_fire_on_norms_and_layers():
    net, seen = tiny.transformer(), set()
    for name, module in net.layers.named_modules():
        if name.rpartition(".")[2] in NAMES or isinstance(module, Linear):
            module.register_full_backward_hook(lambda *_, at=name: seen.add(at))
    wanted = {n for n, m in net.layers.named_modules() if m._backward_hooks and "adaLN" not in n}
    latent = CALL[0][0].clone().requires_grad_()
    net([latent], *CALL[1:])[0].sum().backward()
    assert wanted <= seen
    assert bool(latent.grad.abs().sum() > 0)


def test_without_hooks_norms_stay_fused(monkeypatch):
    def fail(*_):
        raise AssertionError("a norm ran as a module")

    net = tiny.transformer()
    for name, module in net.named_modules():
        if name.rpartition(".")[2] in NAMES:
            monkeypatch.setattr(module, "forward", fail)
            assert block_norms.is_plain(module)
    net(*CALL)
