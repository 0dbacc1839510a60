"""Defends: linear and embedding over packed weights are the same operations over their dequantised rows."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.helpers.blocks import every_format
from zimage_core.cpu import workspace as workspaces
from zimage_core.errors import BadArgument, BadShape, UnknownFormat, Unsupported
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant import ops
from zimage_core.quant.dequantize import dequantize
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import random_blocks

EPS = 2.0**-24
WEIGHTS = [name for name, fmt in FORMATS.items() if not fmt.is_integer]
every_weight = pytest.mark.parametrize("name", WEIGHTS)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def quant(name: str, rows: int, width: int, scale: torch.Tensor | None = None) -> QuantTensor:
    fmt = FORMATS[name]
    packed = random_blocks(fmt, (rows, width), np.random.default_rng(rows + width))
    return QuantTensor(torch.from_numpy(packed), fmt, (rows, width), scale)


def dense(weight: QuantTensor) -> torch.Tensor:
    """By the NumPy reference, so that no code is shared with what is tested."""
    values = torch.from_numpy(reference(weight.packed.numpy(), weight.format.name))
    return values if weight.scale is None else values * weight.scale.view(-1, 1)


def assert_close(
    got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """|got - exact| <= K eps |x| |W|: the bound of any order of K float32 additions and products."""
    exact = x.double() @ w.double().T
    room = (x.shape[-1] + 2) * EPS * (x.double().abs() @ w.double().abs().T)
    if bias is not None:
        exact = exact + bias.double()
        room = room + 2 * EPS * (exact.abs() + bias.double().abs())
    wrong = (got.double() - exact).abs() > room
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.numel()} elements are off, worst {(got - exact).abs().max()}"
    )


@every_weight
def test_linear_multiplies_the_dequantised_rows(name):
    weight = quant(name, 37, 256)
    x = torch.randn(5, 256)
    got = ops.linear(x, weight)
    assert got.shape == (5, 37)
    assert got.dtype == torch.float32
    assert_close(got, x, dense(weight))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 8, 17, 63, 64, 257])
def test_slab_and_thread_borders_do_not_show(rows, threads, monkeypatch, two_threads):
    """Slabs of 8 rows of an odd block size: last slabs of every length, ranges of every thread."""
    monkeypatch.setattr(ops, "SLAB_BYTES", 8 * 4 * 512)
    monkeypatch.setattr(ops, "SPREAD_FROM", 0)
    torch.set_num_threads(threads)
    weight, x = quant("Q6_K", rows, 512), torch.randn(3, 512)
    assert_close(ops.linear(x, weight), x, dense(weight))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (2, 1, 3, 256)])
def test_leading_axes_are_kept(shape):
    weight, x = quant("Q4_0", 9, 256), torch.randn(shape)
    got = ops.linear(x, weight)
    assert got.shape == (*shape[:-1], 9)
    assert torch.equal(got.reshape(-1, 9), ops.linear(x.reshape(-1, 256), weight))


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
def test_no_tokens_give_no_rows(shape):
    assert ops.linear(torch.empty(shape), quant("Q4_K", 9, 256)).shape == (*shape[:-1], 9)


def test_strides_of_x_do_not_matter():
    weight, x = quant("Q4_K", 9, 512), torch.randn(6, 1024)
    for view in (x[:, ::2], x[::2, 512:], torch.randn(512, 6).t(), torch.randn(1, 512).expand(4, -1)):
        assert torch.equal(ops.linear(view, weight), ops.linear(view.contiguous(), weight))


def test_bias_is_added_once():
    weight, x, bias = quant("Q4_K", 70, 256), torch.randn(4, 256), torch.randn(70)
    assert torch.equal(ops.linear(x, weight, bias), ops.linear(x, weight) + bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["Q8_0", "F32", "F16", "BF16"])
def test_other_dtypes_of_x_compute_in_float32_and_round_once(dtype, name, monkeypatch):
    monkeypatch.setattr(ops, "bfloat16_pays", lambda: False)
    weight, x, bias = quant(name, 9, 256), torch.randn(4, 256).to(dtype), torch.randn(9).to(dtype)
    got = ops.linear(x, weight, bias)
    assert got.dtype == dtype
    assert torch.equal(got, ops.linear(x.float(), weight, bias.float()).to(dtype))


@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_weights_of_another_dtype_than_x(wide, narrow, monkeypatch):
    monkeypatch.setattr(ops, "bfloat16_pays", lambda: False)
    weight, x = torch.randn(9, 64).to(wide), torch.randn(4, 64).to(narrow)
    got = ops.linear(x, weight)
    assert got.dtype == narrow
    assert torch.equal(got, torch.nn.functional.linear(x.float(), weight.float()).to(narrow))


@pytest.mark.parametrize("kind", ["Q4_K", "F32", "BF16", "F8_E4M3", "dense float32", "dense bfloat16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bfloat16_where_it_pays(kind, with_bias, monkeypatch, two_threads):
    """Both operands are rounded to bfloat16, the sums are float32 and the result is rounded once."""
    monkeypatch.setattr(ops, "bfloat16_pays", lambda: True)
    monkeypatch.setattr(ops, "SPREAD_FROM", 0)
    if kind.startswith("dense"):
        weight = torch.randn(70, 512).to(getattr(torch, kind.split()[1]))
        wide = weight.float()
    else:
        weight = quant(kind, 70, 512, torch.rand(70) + 0.5 if kind == "F8_E4M3" else None)
        wide = dense(weight)
    x, bias = torch.randn(5, 512).bfloat16(), torch.randn(70) if with_bias else None
    with torch.no_grad():
        got = ops.linear(x, weight, None if bias is None else bias.bfloat16())
    exact = x.double() @ wide.bfloat16().double().T + (0 if bias is None else bias.bfloat16().double())
    room = 2.0**-8 * exact.abs() + 514 * EPS * (x.double().abs() @ wide.double().abs().T)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= room).all()


def test_bfloat16_rounds_weights_only_where_it_pays(monkeypatch):
    """Products of 1 and 1 + 2^-8, a tie that goes down to 1; 256 of them show it."""
    weight, x = torch.full((8, 256), 1 + 2.0**-8), torch.ones(1, 256).bfloat16()
    for pays, wanted in ((True, 256.0), (False, 257.0)):
        monkeypatch.setattr(ops, "bfloat16_pays", lambda pays=pays: pays)
        bias = torch.full((8,), -256.0)
        assert torch.equal(ops.linear(x, weight, bias), torch.full((1, 8), wanted - 256).bfloat16())


def test_a_nan_weight_stays_in_its_row():
    weight = quant("Q8_0", 40, 64)
    weight.packed[17, 0:2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)  # the scale of row 17: NaN
    bad = ops.linear(torch.randn(3, 64), weight).isnan()
    assert bad[:, 17].all()
    assert bad.sum() == 3


@pytest.mark.parametrize("scale", [torch.tensor(3.0), torch.rand(9) + 0.5], ids=["one", "by row"])
def test_an_fp8_scale_multiplies_the_rows(scale):
    weight, x = quant("F8_E4M3", 9, 64, scale), torch.randn(4, 64)
    assert_close(ops.linear(x, weight), x, dense(weight))
    torch.testing.assert_close(weight.dequantize(), dense(weight), rtol=0, atol=0)
    torch.testing.assert_close(
        ops.embedding(torch.tensor([8, 0]), weight), dense(weight)[[8, 0]], rtol=0, atol=0
    )
    cut = weight.rows(3, 6)
    torch.testing.assert_close(cut.dequantize(), dense(weight)[3:6], rtol=0, atol=0)


def test_dense_weights_are_used_in_place_and_trained():
    weight, x = torch.randn(9, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    ops.linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, x.detach().sum(0).expand(9, -1))
    assert torch.equal(x.grad, weight.detach().sum(0).expand(4, -1))


def test_gradients_through_packed_weights_are_refused_not_forgotten():
    x = torch.randn(4, 256, requires_grad=True)
    with pytest.raises(Unsupported, match="no_grad"):
        ops.linear(x, quant("Q4_K", 9, 256))
    with torch.no_grad():
        assert not ops.linear(x, quant("Q4_K", 9, 256)).requires_grad


def test_inference_mode_reaches_the_threads(monkeypatch, two_threads):
    monkeypatch.setattr(ops, "SPREAD_FROM", 0)
    weight, x = quant("Q4_K", 64, 256), torch.randn(4, 256)
    with torch.inference_mode():
        got = ops.linear(x, weight)
    assert got.is_inference()
    assert torch.equal(got, ops.linear(x, weight))


def test_a_fault_in_a_thread_is_raised_by_the_caller(monkeypatch, two_threads):
    monkeypatch.setattr(ops, "SPREAD_FROM", 0)

    def fault(*_: object) -> None:
        raise ArithmeticError("planted")

    monkeypatch.setattr(ops.cpu, "slabs", fault)
    with pytest.raises(ArithmeticError, match="planted"):
        ops.linear(torch.randn(4, 256), quant("Q4_K", 64, 256))


def test_two_callers_at_once_get_their_own_results(monkeypatch, two_threads):
    monkeypatch.setattr(ops, "SPREAD_FROM", 0)
    weights = [quant("Q4_K", 200, 512), quant("IQ4_XS", 200, 512)]
    x = torch.randn(16, 512)
    wanted = [ops.linear(x, weight) for weight in weights]
    wrong = []

    def call(which: int) -> None:
        for _ in range(10):
            if not torch.equal(ops.linear(x, weights[which]), wanted[which]):
                wrong.append(which)

    threads = [threading.Thread(target=call, args=(which,)) for which in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_scratch_of_a_thread_stays_below_16_mb():
    def held() -> int:
        ops.linear(torch.randn(1, 4096), quant("Q4_K", 2048, 4096))
        return sum(workspaces.workspace(use, torch.device("cpu")).nbytes for use in ("slab", "tile"))

    with ThreadPoolExecutor(1) as fresh:  # scratch belongs to a thread; this one's may have grown elsewhere
        assert fresh.submit(held).result() <= 16 << 20


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(4, 128), quant("Q4_K", 9, 256)),
        (torch.randn(4, 128), torch.randn(9, 64)),
        (torch.randn(()), torch.randn(9, 64)),
        (torch.randn(4, 64), torch.randn(64)),
    ],
)
def test_shapes_that_do_not_fit_name_both(x, weight):
    with pytest.raises(BadShape, match="linear: x has shape"):
        ops.linear(x, weight)


@every_weight
def test_embedding_reads_only_the_rows_asked_for(name):
    weight = quant(name, 50, 256)
    ids = torch.tensor([[3, 3, 49], [0, 7, 3]])
    wanted = dense(weight)[ids]
    kept = torch.zeros(50, dtype=torch.bool)
    kept[ids] = True
    weight.packed[~kept] = 255
    assert torch.equal(ops.embedding(ids, weight), wanted)


def test_embedding_of_nothing_and_of_other_integers():
    weight = quant("Q8_0", 5, 64)
    assert ops.embedding(torch.empty(0, dtype=torch.long), weight).shape == (0, 64)
    assert torch.equal(ops.embedding(torch.tensor([4], dtype=torch.int32), weight), dense(weight)[[4]])
    assert ops.embedding(torch.tensor([4]), weight, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize("table", [quant("Q8_0", 50, 64), torch.randn(50, 64)], ids=["packed", "dense"])
def test_ids_outside_the_table_are_named(bad, table):
    with pytest.raises(BadArgument, match=f"token id {bad} is outside the table of 50 rows"):
        ops.embedding(torch.tensor([0, bad]), table)


@every_format
def test_public_dequantize_is_the_reference(fmt: BlockFormat):
    packed = random_blocks(fmt, (2, 3, 2 * fmt.weights), np.random.default_rng(0))
    got = dequantize(torch.from_numpy(packed), fmt.name)
    assert got.shape == (2, 3, 2 * fmt.weights)
    assert np.array_equal(got.numpy(), reference(packed, fmt.name), equal_nan=True)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dequantize(torch.zeros(18, dtype=torch.uint8), "Q4_9"), UnknownFormat, "Q4_K"),
        (lambda: dequantize(torch.zeros(17, dtype=torch.uint8), "Q4_0"), BadShape, "blocks of 18"),
        (lambda: dequantize(torch.zeros(18), "Q4_0"), BadShape, "uint8"),
        (lambda: dequantize(b"\0" * 18, "Q4_0"), BadArgument, "torch.Tensor"),
        (
            lambda: dequantize(torch.zeros(18, dtype=torch.uint8), "Q4_0", torch.int8),
            BadArgument,
            "dtype",
        ),
        (lambda: dequantize(torch.zeros(18, dtype=torch.uint8), "Q4_0", "float32"), BadArgument, "dtype"),
    ],
)
def test_bad_arguments_of_dequantize_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("packed", "shape", "scale"),
    [
        (torch.zeros(2, 18, dtype=torch.uint8), (2, 64), None),
        (torch.zeros(3, 18, dtype=torch.uint8), (2, 32), None),
        (torch.zeros(2, 18, dtype=torch.int8), (2, 32), None),
        (torch.zeros(2, 18, dtype=torch.uint8), (2, 31), None),
        (torch.zeros(2, 18, dtype=torch.uint8), (2, 32), torch.ones(3)),
        (torch.zeros(2, 18, dtype=torch.uint8), (2, 32), torch.ones(2).half()),
    ],
)
def test_a_quant_tensor_that_lies_cannot_be_made(packed, shape, scale):
    with pytest.raises(BadShape, match="Q4_0"):
        QuantTensor(packed, FORMATS["Q4_0"], shape, scale)


def test_quant_tensor_cuts_moves_and_counts():
    weight = quant("Q6_K", 9, 512)
    assert weight.nbytes == 9 * 420
    cut = weight.rows(2, 5)
    assert cut.packed.data_ptr() == weight.packed[2:].data_ptr()
    assert torch.equal(cut.dequantize(), dense(weight)[2:5])
    assert weight.to("cpu").device == torch.device("cpu")
    with pytest.raises(BadShape, match="rows 5 to 10"):
        weight.rows(5, 10)
    number = QuantTensor(torch.tensor([1.5]).view(torch.uint8), FORMATS["F32"], ())
    assert number.dequantize().shape == ()
    assert number.dequantize() == 1.5


@torch.no_grad()
def test_packed_weights_compile_whole_on_a_cpu():
    """No break at a packed weight, whose widths and rows of x vary; the same bits as without a compiler."""
    weights = [quant("Q4_K", 512, 256), quant("Q8_0", 256, 512), quant("F16", 768, 256)]

    def work(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = ops.linear(x, weight)
        return x + weights[1].dequantize()[0, 0] + dequantize(weights[2].packed, "F16")[0, 0]

    torch._dynamo.reset()
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for rows in (5, 9, 31):
        x = torch.randn(rows, 256)
        assert torch.equal(compiled(x), work(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("pays", [False, True])
def test_gradients_pass_from_bfloat16_through_a_float32_weight(pays, monkeypatch):
    monkeypatch.setattr(ops, "bfloat16_pays", lambda: pays)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    weight = torch.randn(8, 64)
    ops.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad[0].float(), weight.sum(0), rtol=0.01, atol=0.01)
