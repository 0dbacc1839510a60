"""What each standing figure should be, from the model of a step, for the GPU that it is measured on."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import cases, int8_model
from benchmarks import step_model as model
from benchmarks.step_model import CUDNN, FLASH, Gpu, Range
from zimage_core.formats import FORMATS
from zimage_core.nn.attention import attention_backends
from zimage_core.quant.dispatch import ARCHITECTURES

Prediction = Callable[[Gpu], Range]

Q4_K = FORMATS["Q4_K"]
SHAPE, (ROWS, WIDTH) = next(iter(cases.shapes().items()))
"""The matrix of the figures on one product: the largest of a block."""
FEW, MANY = cases.padded(cases.CAPTION), cases.stages()[0][1]
"""Rows of x: a caption, and the joint sequence at 1024 px."""
MAIN = ("Q4_K", "Q6_K", "Q8_0")
"""Formats with figures of their own."""
SMALL = 512
"""Side of the smaller image, whose step the host can hold up."""


def _product(rows: int) -> cases.LinearCase:
    return cases.LinearCase(SHAPE, ROWS, WIDTH, rows)


def _dequantised(gpu: Gpu) -> Range:
    return model.dequantised(ROWS * WIDTH, Q4_K, gpu)


def _others(gpu: Gpu) -> Range:
    """The slowest of the other formats."""
    found = [model.of_copy(fmt, gpu) for fmt in FORMATS.values() if fmt.weights > 1 and fmt.name not in MAIN]
    return Range(min(each.low for each in found), min(each.high for each in found))


def _few(gpu: Gpu) -> Range:
    """Seconds of the fused product of few rows: reading packed weights and decoding them."""
    weights = ROWS * WIDTH
    memory = weights * Q4_K.nbytes / Q4_K.weights / gpu.copy
    issue = weights * model.fused_instructions("Q4_K", gpu.architecture) / gpu.issue
    return model.busy(memory, issue, "fused")


def _efficiency(gpu: Gpu) -> Range:
    """The fused kernel's rate for many rows over a large product's."""
    assumed, spread = ARCHITECTURES[gpu.architecture].efficiency, model.FUSED_SPREAD
    return Range(assumed - spread, min(0.95, assumed + spread))


def _crossover(gpu: Gpu) -> Range:
    """Rows at which the fused kernel's inefficiency costs what dequantising does."""
    row, found, rate = 2 * ROWS * WIDTH / gpu.flops, _dequantised(gpu), _efficiency(gpu)
    return Range(found.low / ((1 / rate.low - 1) * row), found.high / ((1 / rate.high - 1) * row))


def _slowed(rest: Range, more: Range) -> Range:
    """(rest + more) / rest, where `rest` is the same in both."""
    return Range(1 + more.low / rest.middle, 1 + more.high / rest.middle)


def _resident(gpu: Gpu) -> Range:
    """A block's speed over that with dense weights; the parts of a step are those of its blocks."""
    cost = model.step(gpu)
    slowed = _slowed(cost.dense(), cost.dequantise)
    return Range(1 / slowed.high, 1 / slowed.low)


def _diffusers(gpu: Gpu) -> Range:
    """diffusers' GGUFLinear moves its weights several times; the rest of the block is ours."""
    cost = model.step(gpu)
    weights = sum(case.weights for case in cases.step_linears())
    theirs = cost.dense().middle + weights * model.EAGER_BYTES / gpu.copy
    ours = (cost.dense().middle + end for end in (cost.dequantise.high, cost.dequantise.low))
    return Range(*(theirs / each for each in ours))


def _launched(pixels: int) -> Prediction:
    def found(gpu: Gpu) -> Range:
        cost = model.step(gpu, pixels=pixels)
        whole, host = cost.replayed(), cost.host
        return Range(max(1.0, host.low / whole.high), max(1.0, host.high / whole.low))

    return found


def _elementwise(name: str) -> Prediction:
    """The bytes of plain torch at the speed of a copy over the kernel's time."""

    def found(gpu: Gpu) -> Range:
        case = next(case for case in cases.elementwise(MANY) if case.name == name)
        seconds = case.numbers * model.TORCH_BYTES[name] / gpu.copy
        return Range(seconds, seconds).over(model.stepped(case, gpu))

    return found


def _part(name: str, pixels: int = cases.PIXELS) -> Prediction:
    return lambda gpu: getattr(model.step(gpu, pixels=pixels), name).times(1e3)


def _attention(backend: str) -> Prediction:
    return lambda gpu: model.step(gpu).attention[backend].times(1e3)


def _package_attention(gpu: Gpu) -> Range:
    """Time of the backend that the package asks for over that of the fastest."""
    cost = model.step(gpu).attention
    chosen, *others = (cost.pop(attention_backends(gpu.architecture, "transformer")[0]), *cost.values())
    over = [chosen.over(other) for other in others]
    return Range(*(max(1.0, *(getattr(each, end) for each in over)) for end in ("low", "high")))


def _attention_int8(gpu: Gpu) -> Range:
    """Time of attention with q k^T in int8 over that of cuDNN, the two as far apart as int8 rates may be."""
    case = next(case for case in cases.step_attention() if case.length == MANY)
    half, fast = int8_model.attended(case, gpu), int8_model.smoothed(case, gpu)
    ratios = sorted((fast.low / half.low, fast.high / half.high))
    return Range(ratios[0] * int8_model.RATE.low, ratios[1] * int8_model.RATE.high)


def _whole(pixels: int) -> Prediction:
    return lambda gpu: model.step(gpu, pixels=pixels).replayed().times(1e3)


def _int8(name: str) -> Prediction:
    """Milliseconds of a whole step in int8, over `packed` weights or `kept` rows."""
    return lambda gpu: getattr(int8_model.step(gpu), name).times(1e3)


def _int8_rate(gpu: Gpu) -> Range:
    case = _product(MANY)
    seconds = int8_model.product(case, gpu)
    return Range(case.flops / seconds.high, case.flops / seconds.low).times(1e-12)


def _per_cent(name: str) -> Prediction:
    return lambda gpu: model.of_copy(FORMATS[name], gpu).times(100)


PREDICTIONS: dict[str, Prediction] = {
    **{f"dequantise_{name.lower()}": _per_cent(name) for name in MAIN},
    "dequantise_q4_k_us": lambda gpu: _dequantised(gpu).times(1e6),
    "dequantise_others": lambda gpu: _others(gpu).times(100),
    "fused_32_ratio": lambda gpu: (_dequantised(gpu) + model.product(_product(FEW), gpu)).over(_few(gpu)),
    "fused_32_us": lambda gpu: _few(gpu).times(1e6),
    "dequantise_matmul_4128": lambda gpu: _slowed(model.product(_product(MANY), gpu), _dequantised(gpu)),
    "fused_4128_tflops": lambda gpu: _efficiency(gpu).times(gpu.flops / 1e12),
    "crossover": _crossover,
    "block_diffusers": _diffusers,
    "block_resident": _resident,
    "step_linears": _part("linears"),
    "step_attention_cudnn": _attention(CUDNN),
    "step_attention_flash": _attention(FLASH),
    "step_dequantise": _part("dequantise"),
    "step_elementwise": _part("elementwise"),
    "step_gaps": _part("gaps"),
    "step_replayed": _whole(cases.PIXELS),
    "step_eager": _launched(cases.PIXELS),
    "step_512_replayed": _whole(SMALL),
    "step_512_eager": _launched(SMALL),
    "int8_4128_tops": _int8_rate,
    "int8_step": _int8("packed"),
    "int8_step_kept": _int8("kept"),
    **{f"elementwise_{name}": _elementwise(name) for name in cases.STREAMS},
    "attention": _package_attention,
    "attention_int8": _attention_int8,
}
"""By the identity of a standing figure, in its unit."""

NONE: dict[str, str] = {}
"""Figures without a prediction, and why."""


def text(value: Range) -> str:
    """`60 to 63`: with two digits, three where two do not tell the ends apart."""
    for digits in (2, 3):
        low, high = (_shown(end, digits) for end in (value.low, value.high))
        if low != high:
            return f"{low} to {high}"
    return low


def _shown(value: float, digits: int) -> str:
    size = float(f"{value:.{digits}g}")
    return f"{size:.0f}" if size >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def shown(name: str, gpu_name: str = "") -> str:
    """The prediction of a figure with the GPU that it is for, or why there is none.

    Args:
        name: Identity of the figure.
        gpu_name: The GPU of its measurement; for one that the model does not know, the main one's is shown.
    """
    if name not in PREDICTIONS:
        return f"none: {NONE[name]}"
    gpu = model.gpu_named(gpu_name) or model.MAIN
    return f"{text(PREDICTIONS[name](gpu))} ({gpu.name})"


def meets(name: str, gpu_name: str, value: float) -> str:
    """How a measured value compares: `as predicted`, `below the prediction` or `above`; empty without one."""
    gpu = model.gpu_named(gpu_name)
    if gpu is None or name not in PREDICTIONS:
        return ""
    predicted = PREDICTIONS[name](gpu)
    if predicted.holds(value):
        return "as predicted"
    return "below the prediction" if value < predicted.low else "above the prediction"
