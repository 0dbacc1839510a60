"""Defends: planes hold the bits of the blocks in the order that kernels/planar.py describes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.blocks import assert_same_bits
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.kernels import planar, tiles
from zimage_core.kernels.decode.table import DECODERS
from zimage_core.kernels.planar import (
    Planes,
    can_repack,
    plane_shapes,
    repack,
)
from zimage_core.quant import dispatch
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import finite_scales

# the interpreter computes in NumPy, which warns of overflow and NaN; here they are in the bytes
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

TAIL = 256  # elements behind each plane that no program may touch

# written once more by hand: bits of a code, the code of level 0, weights under a small scale (0: none),
# whether there is a minimum
LAYOUT: dict[str, tuple[int, int, int, bool]] = {
    "Q4_0": (4, 8, 0, False),
    "Q4_1": (4, 0, 0, True),
    "Q5_0": (5, 16, 0, False),
    "Q5_1": (5, 0, 0, True),
    "Q8_0": (8, 0, 0, False),
    "Q2_K": (2, 0, 16, True),
    "Q3_K": (3, 4, 16, False),
    "Q4_K": (4, 0, 32, True),
    "Q5_K": (5, 0, 32, True),
    "Q6_K": (6, 32, 16, False),
    "IQ4_NL": (4, 0, 0, False),
    "IQ4_XS": (4, 0, 32, False),
    "TQ2_0": (2, 1, 0, False),
    "MXFP4": (4, 0, 0, False),
    "NVFP4": (4, 0, 16, False),
    "Q2_0": (2, 1, 0, False),
    "Q2_0_128": (2, 1, 0, False),
}
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
LEVELS = {"IQ4_NL": IQ4, "IQ4_XS": IQ4, "MXFP4": E2M1_DOUBLED, "NVFP4": E2M1_DOUBLED}
"""Levels of the codes that are not code - zero."""
STEP = {name: 128 if bits in (2, 3, 6) else 64 for name, (bits, *_) in LAYOUT.items()}

every_planar = pytest.mark.parametrize("fmt", [FORMATS[name] for name in LAYOUT], ids=LAYOUT)


def read_planes(planes: Planes, fmt: BlockFormat, width: int) -> np.ndarray:
    """Weights [N, K] in float64, which holds every product and difference here exactly."""
    bits, zero, group, minimum = LAYOUT[fmt.name]
    codes, two_bit, top, d, small = (plane.cpu().numpy() for plane in planes)
    k = np.arange(width)
    code = np.zeros((d.shape[1], width), np.int64)
    if bits == 8:
        code[:] = codes[k // 32, :, k % 32].T.view(np.int8)
    elif bits >= 4:
        code |= (codes[k // 64, :, k % 32].T >> (k % 64 // 32 * 4)) & 15
    if bits in (2, 3, 6):
        code |= ((two_bit[k // 128, :, k % 32].T >> (k % 128 // 32 * 2)) & 3).astype(np.int64) << (
            bits // 6 * 4
        )
    if bits in (3, 5):
        code |= (top.view(np.uint32)[k // 32].T.astype(np.int64) >> (k % 32) & 1) << (bits - 1)
    level = LEVELS[fmt.name][code] if fmt.name in LEVELS else code - zero
    if fmt.name == "MXFP4":
        return level * (d.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[k // 32].T.astype(
            np.float64
        )
    halves = d.view(np.uint16).reshape(*d.shape, -1)[k // fmt.weights].astype(np.uint16).view(np.float16)
    scale = halves[..., 0].T.astype(np.float64)
    if group:
        kind = np.float16 if fmt.name == "NVFP4" else np.uint8 if minimum else np.int8
        parts = small.view(kind).reshape(*small.shape, -1)[k // group]
        scale *= parts[..., 0].T
    weights = level * scale
    if minimum:
        low = halves[..., 1].T.astype(np.float64)
        weights -= low * parts[..., 1].T if group else low
    return weights


def run(
    packed: torch.Tensor, fmt: BlockFormat, weights_a_program: int | None = None, fill: int = 0x55
) -> Planes:
    """Planes written over bytes `fill`, which must still stand behind each of them."""
    rooms: list[torch.Tensor] = []

    def filled(fmt: BlockFormat, rows: int, width: int, device: torch.device) -> Planes:
        shapes = plane_shapes(fmt, rows, width).values()
        for shape, dtype in shapes:
            count = (math.prod(shape) + TAIL) * dtype.itemsize
            rooms.append(torch.full((count,), fill, dtype=torch.uint8, device=device))
        pairs = zip(rooms, shapes, strict=True)
        return Planes(*(room.view(dtype)[:-TAIL].view(shape) for room, (shape, dtype) in pairs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planar, "uninitialised", filled)
        if weights_a_program:
            patch.setattr(tiles, "repack_weights", lambda: weights_a_program)
        planes = repack(packed, fmt)
    for name, plane, room in zip(Planes._fields, planes, rooms, strict=True):
        assert (room[plane.numel() * plane.element_size() :] == fill).all(), f"{fmt.name}: {name} overruns"
    return planes


def check(packed: np.ndarray, fmt: BlockFormat, device: torch.device, weights_a_program: int | None = None):
    planes = run(torch.from_numpy(packed).to(device), fmt, weights_a_program)
    width = packed.shape[1] // fmt.nbytes * fmt.weights
    assert_same_bits(read_planes(planes, fmt, width).astype(np.float32), reference(packed, fmt), fmt)


def random_rows(fmt: BlockFormat, rows: int, width: int, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (rows, fmt.row_bytes(width)), dtype=np.uint8)
    return finite_scales(raw, fmt)


def unit_width(fmt: BlockFormat) -> int:
    return max(fmt.weights, STEP[fmt.name])


def same(a: Planes, b: Planes) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@st.composite
def rows_of_steps(draw, fmt: BlockFormat) -> np.ndarray:
    """Any bytes, in rows of one step or a few; half of the examples have finite scales."""
    rows, steps = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (3, 2), (9, 1), (1, 9)]))
    size = rows * fmt.row_bytes(steps * unit_width(fmt))
    packed = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(rows, -1)
    return finite_scales(packed, fmt) if draw(st.booleans()) else packed.copy()


@every_planar
@given(data=st.data())
def test_planes_give_the_weights_of_the_reference(fmt, device, data):
    """Bit for bit from any bytes; at 1,024 weights a program nine steps are one program to three."""
    check(data.draw(rows_of_steps(fmt)), fmt, device, weights_a_program=1024)


@every_planar
def test_every_byte_value_in_every_place(fmt, device):
    row = np.repeat(np.arange(256, dtype=np.uint8)[:, None], fmt.row_bytes(unit_width(fmt)), 1)
    check(row, fmt, device)


@every_planar
def test_every_bit_of_every_plane_is_written(fmt, device):
    """By several programs too, the last one part empty: what was there before is gone."""
    packed = torch.from_numpy(random_rows(fmt, 3, 3 * unit_width(fmt))).to(device)
    whole = run(packed, fmt, fill=0x00)
    assert same(whole, run(packed, fmt, fill=0xFF))
    assert same(whole, run(packed, fmt, weights_a_program=4 * unit_width(fmt), fill=0xFF))


@every_planar
def test_rows_keep_their_planes_beside_other_rows(fmt, device):
    """Planes of two weights below each other are theirs side by side: axis 1 is the row."""
    packed = torch.from_numpy(random_rows(fmt, 5, 2 * unit_width(fmt))).to(device)
    parts = [run(packed[rows], fmt) for rows in (slice(0, 2), slice(2, 5))]
    assert same(run(packed, fmt), Planes(*(torch.cat(pair, 1) for pair in zip(*parts, strict=True))))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q2_0"])
def test_rows_may_start_at_an_odd_address_and_lie_apart(name, device):
    """Words of 4 bytes and of 2; the copy that aligns them is not the weight that stays."""
    fmt = FORMATS[name]
    packed = torch.from_numpy(random_rows(fmt, 6, unit_width(fmt))).to(device)
    room = torch.zeros(packed.numel() + 1, dtype=torch.uint8, device=device)
    room[1:] = packed.view(-1)
    wanted = run(packed, fmt)
    assert same(run(room[1:].view(6, -1), fmt), wanted)
    assert same(run(packed[::2], fmt), Planes(*(plane[:, ::2] for plane in wanted)))


@every_planar
def test_planes_share_memory_and_do_not_overlap(fmt, device):
    """One tensor for torch's allocator, which would give small planes segments that no plan counts."""
    shapes = plane_shapes(fmt, 5, 3 * unit_width(fmt))
    planes = planar.uninitialised(fmt, 5, 3 * unit_width(fmt), torch.device(device))
    for number, (plane, (shape, dtype)) in enumerate(zip(planes, shapes.values(), strict=True)):
        assert (plane.shape, plane.dtype, plane.is_contiguous()) == (shape, dtype, True)
        assert plane.storage_offset() * plane.element_size() % 256 == 0
        plane.view(-1).view(torch.uint8).fill_(number)
    for number, plane in enumerate(planes):
        assert (plane.view(-1).view(torch.uint8) == number).all()
    assert len({plane.untyped_storage().data_ptr() for plane in planes}) == 1


@every_planar
def test_no_rows_are_empty_planes(fmt, device):
    planes = run(torch.empty(0, fmt.row_bytes(unit_width(fmt)), dtype=torch.uint8, device=device), fmt)
    assert planes.nbytes == 0


@every_planar
def test_bytes_are_counted_without_making_planes(fmt, device):
    """kernels/planar.py counts by shapes, quant/dispatch.py by a table that needs no import of kernels."""
    width = unit_width(fmt)
    planes = run(torch.from_numpy(random_rows(fmt, 5, width)).to(device), fmt)
    assert planes.nbytes == sum(p.numel() * p.element_size() for p in planes)
    for rows, steps in ((5, 1), (1, 1), (3, 7), (3840, 10)):
        assert dispatch.planar_bytes(fmt, rows, steps * width) * 5 == planes.nbytes * rows * steps
    assert dispatch.PLANAR_BITS[fmt.name] == 8 * planes.nbytes / (5 * width)
    for name, (shape, dtype) in plane_shapes(fmt, 5, width).items():
        assert getattr(planes, name).shape == shape
        assert getattr(planes, name).dtype == dtype


def test_tables_agree_on_the_formats_with_planes():
    fused = {name for name, decoder in DECODERS.items() if decoder.bits}
    assert fused == set(dispatch.PLANAR_BITS) == set(LAYOUT)
    assert {name: DECODERS[name].bits for name in fused} == {name: LAYOUT[name][0] for name in fused}
    assert dispatch.PLANAR_BITS["Q4_K"] == 4.625


def test_paths_and_kernel_agree_on_the_widths_with_planes():
    """`paths` sends a weight to the fused kernel exactly where `can_repack` says that it can go."""
    for fmt in FORMATS.values():
        for width in range(fmt.weights, 1025, fmt.weights):
            if fmt.weights == 1 and width > 256:
                break
            obstacle = dispatch._why_not_fused(fmt, width, "sm_90", "float16")
            assert (not obstacle) == can_repack(fmt, width), f"{fmt.name}, {width} weights: {obstacle!r}"


@pytest.mark.parametrize(("name", "width"), [("Q4_0", 96), ("Q2_0", 192), ("Q4_K", 128), ("IQ2_XXS", 256)])
def test_a_row_that_ends_inside_a_step_has_no_planes(name, width):
    assert not can_repack(FORMATS[name], width)
