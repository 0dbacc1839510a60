"""Byte layout of every tensor type that a GGUF file can hold, and of the two fp8 types of safetensors.

This is the layout only: how many weights a block holds and what its bytes mean. The arithmetic is in
`reference/` (NumPy, slow, readable) and in `cpu/` (torch, fast), and property tests compare the two. Offsets,
row sizes, structured dtypes, test strategies and the table in docs/explanation/formats.md all derive from the
descriptors below.

Source: ggml/src/ggml-common.h (the block structs) and ggml/include/ggml.h (the type numbers).
"""

from __future__ import annotations

from dataclasses import dataclass

from zimage_core.errors import BadShape, UnknownFormat, printable

DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Name of the torch dtype with the same bytes, for each format of plain numbers."""
_INTEGERS = ("I8", "I16", "I32", "I64")


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a block: `count` little-endian numbers of the NumPy type `code` ("f2", "u1", "i1")."""

    name: str
    code: str
    count: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole field."""
        return int(self.code[1:]) * self.count


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One tensor type: `weights` values stored in the bytes of `fields`, in order and without gaps.

    Args:
        name: ggml's name of the type, the key in FORMATS.
        ggml_type: Number of the type in a GGUF file; None if no number always means this type.
        weights: Values in one block; 1 for plain numbers.
        nbytes: Bytes of one block.
        fields: The fields of a block, in order.
        codebook: Name in zimage_core.codebooks, for formats that store indices.

    Raises:
        ValueError: The fields do not add up to nbytes, or two fields share a name.
    """

    name: str
    ggml_type: int | None
    weights: int
    nbytes: int
    fields: tuple[Field, ...]
    codebook: str | None = None

    def __post_init__(self) -> None:
        laid_out = sum(field.nbytes for field in self.fields)
        if laid_out != self.nbytes:
            raise ValueError(f"{self.name}: fields cover {laid_out} bytes, block is {self.nbytes}")
        if len({field.name for field in self.fields}) != len(self.fields):
            raise ValueError(f"{self.name}: two fields share a name")

    def offset(self, field: str) -> int:
        """Byte offset of a field from the start of a block; KeyError lists the fields."""
        position = 0
        for candidate in self.fields:
            if candidate.name == field:
                return position
            position += candidate.nbytes
        raise KeyError(f"{self.name} has no field {field!r}; it has {[f.name for f in self.fields]}")

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, including the block's overhead: 4.5 for Q4_K."""
        return 8 * self.nbytes / self.weights

    @property
    def is_float(self) -> bool:
        """True for F64, F32, F16 and BF16: one IEEE-style number a weight, no scale (fp8 needs one)."""
        return self.name in ("F64", "F32", "F16", "BF16")

    @property
    def is_integer(self) -> bool:
        """True for I8, I16, I32 and I64."""
        return self.name in _INTEGERS

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights; BadShape when k is negative or not a whole number of blocks."""
        if k < 0 or k % self.weights:
            raise BadShape(
                f"a row of {k} weights cannot be stored as {self.name}; "
                f"its length must be a multiple of {self.weights}"
            )
        return k // self.weights * self.nbytes


def _number(name: str, ggml_type: int | None, code: str) -> BlockFormat:
    """A type without blocks: one number a weight, in the field `w`."""
    field = Field("w", code)
    return BlockFormat(name, ggml_type, 1, field.nbytes, (field,))


_D = Field("d", "f2")
_DMIN = Field("dmin", "f2")

# fmt: off
_ALL = (
    _number("F32", 0, "f4"),
    _number("F16", 1, "f2"),
    BlockFormat("Q4_0", 2, 32, 18, (_D, Field("qs", "u1", 16))),
    BlockFormat("Q4_1", 3, 32, 20, (_D, Field("m", "f2"), Field("qs", "u1", 16))),
    BlockFormat("Q5_0", 6, 32, 22, (_D, Field("qh", "u1", 4), Field("qs", "u1", 16))),
    BlockFormat("Q5_1", 7, 32, 24, (_D, Field("m", "f2"), Field("qh", "u1", 4), Field("qs", "u1", 16))),
    BlockFormat("Q8_0", 8, 32, 34, (_D, Field("qs", "i1", 32))),
    BlockFormat("Q2_K", 10, 256, 84, (Field("scales", "u1", 16), Field("qs", "u1", 64), _D, _DMIN)),
    BlockFormat("Q3_K", 11, 256, 110, (
        Field("hmask", "u1", 32), Field("qs", "u1", 64), Field("scales", "u1", 12), _D)),
    BlockFormat("Q4_K", 12, 256, 144, (_D, _DMIN, Field("scales", "u1", 12), Field("qs", "u1", 128))),
    BlockFormat("Q5_K", 13, 256, 176, (
        _D, _DMIN, Field("scales", "u1", 12), Field("qh", "u1", 32), Field("qs", "u1", 128))),
    BlockFormat("Q6_K", 14, 256, 210, (
        Field("ql", "u1", 128), Field("qh", "u1", 64), Field("scales", "i1", 16), _D)),
    # qs: per 32 weights two words, four grid indices and then four sign indices under a 4-bit scale
    BlockFormat("IQ2_XXS", 16, 256, 66, (_D, Field("qs", "u4", 16)), "iq2_xxs"),
    BlockFormat("IQ2_XS", 17, 256, 74, (_D, Field("qs", "u2", 32), Field("scales", "u1", 8)), "iq2_xs"),
    BlockFormat("IQ3_XXS", 18, 256, 98, (_D, Field("qs", "u1", 64), Field("gas", "u4", 8)), "iq3_xxs"),
    BlockFormat("IQ1_S", 19, 256, 50, (_D, Field("qs", "u1", 32), Field("qh", "u2", 8)), "iq1"),
    BlockFormat("IQ4_NL", 20, 32, 18, (_D, Field("qs", "u1", 16)), "iq4_nl"),
    BlockFormat("IQ3_S", 21, 256, 110, (
        _D, Field("qs", "u1", 64), Field("qh", "u1", 8), Field("signs", "u1", 32),
        Field("scales", "u1", 4)), "iq3_s"),
    BlockFormat("IQ2_S", 22, 256, 82, (
        _D, Field("qs", "u1", 32), Field("signs", "u1", 32), Field("qh", "u1", 8),
        Field("scales", "u1", 8)), "iq2_s"),
    BlockFormat("IQ4_XS", 23, 256, 136, (
        _D, Field("scales_h", "u2"), Field("scales_l", "u1", 4), Field("qs", "u1", 128)), "iq4_nl"),
    _number("I8", 24, "i1"),
    _number("I16", 25, "i2"),
    _number("I32", 26, "i4"),
    _number("I64", 27, "i8"),
    _number("F64", 28, "f8"),
    # no field d: the float16 scale is spread over the top nibbles of the four words of `scales`
    BlockFormat("IQ1_M", 29, 256, 56, (
        Field("qs", "u1", 32), Field("qh", "u1", 16), Field("scales", "u2", 4)), "iq1"),
    _number("BF16", 30, "u2"),  # the upper half of a float32; NumPy has no such type
    BlockFormat("TQ1_0", 34, 256, 54, (Field("qs", "u1", 48), Field("qh", "u1", 4), _D)),
    BlockFormat("TQ2_0", 35, 256, 66, (Field("qs", "u1", 64), _D)),
    # e: an E8M0 exponent. NVFP4's d: unsigned E4M3 scales
    BlockFormat("MXFP4", 39, 32, 17, (Field("e", "u1"), Field("qs", "u1", 16)), "e2m1"),
    BlockFormat("NVFP4", 40, 64, 36, (Field("d", "u1", 4), Field("qs", "u1", 32)), "e2m1"),
    BlockFormat("Q1_0", 41, 128, 18, (_D, Field("qs", "u1", 16))),
    BlockFormat("Q2_0", 42, 64, 18, (_D, Field("qs", "u1", 16))),
    # a fork of llama.cpp writes this block under number 42: see q2_0_variant
    BlockFormat("Q2_0_128", None, 128, 34, (_D, Field("qs", "u1", 32))),
    # safetensors only; the scale of the tensor or of its rows is kept beside the bytes
    _number("F8_E4M3", None, "u1"),
    _number("F8_E5M2", None, "u1"),
)
# fmt: on

FORMATS: dict[str, BlockFormat] = {fmt.name: fmt for fmt in _ALL}
_BY_GGML_TYPE = {fmt.ggml_type: fmt for fmt in _ALL if fmt.ggml_type is not None}

_NOT_WEIGHTS = {9: "Q8_1", 15: "Q8_K"}
_REMOVED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip


def by_ggml_type(ggml_type: int) -> BlockFormat:
    """The format with this GGUF type number.

    Raises:
        UnknownFormat: ggml never used the number, has dropped it, or keeps it for activations;
            the message says which.
    """
    fmt = _BY_GGML_TYPE.get(ggml_type)
    if fmt is not None:
        return fmt
    if ggml_type in _NOT_WEIGHTS:
        fault = f"({_NOT_WEIGHTS[ggml_type]}) is for activations and no file should hold it"
    elif ggml_type in _REMOVED:
        fault = f"({_REMOVED[ggml_type]}) was dropped by ggml; get the file in a type that is still in use"
    else:
        fault = f"is not known; the last one described here is {max(_BY_GGML_TYPE)}"
    raise UnknownFormat(f"GGUF tensor type {printable(ggml_type)} {fault}")


def by_name(name: object) -> BlockFormat:
    """The format of that name ("Q4_K"); UnknownFormat lists the names."""
    fmt = FORMATS.get(name) if isinstance(name, str) else None
    if fmt is None:
        raise UnknownFormat(f"unknown format {printable(repr(name))}; known are {', '.join(FORMATS)}")
    return fmt


def q2_0_variant(k: int, weights: int, space: int) -> BlockFormat:
    """Decide by its size in bytes which of the two formats with GGUF type number 42 a tensor has.

    ggml's Q2_0 stores 64 weights in 18 bytes; a fork stores 128 in 34 under the same number. Below 2,048
    weights the padding to 32 bytes hides the difference, so call this for the largest such tensor of a file
    and use the result for all of them.

    Args:
        k: Length of the tensor's rows in weights.
        weights: Number of weights of the tensor.
        space: Bytes from the tensor's start to the next tensor's start or to the end of the data.

    Returns:
        Q2_0_128 if only that one fits, else Q2_0 (the reader reports an error if neither fits).
    """
    ours, fork = FORMATS["Q2_0"], FORMATS["Q2_0_128"]
    if k % fork.weights or space >= weights // ours.weights * ours.nbytes:
        return ours
    return fork if space >= weights // fork.weights * fork.nbytes else ours
