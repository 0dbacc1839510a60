"""formats.py agrees with ggml on numbers, sizes and offsets, and refuses unknown types."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import format_table
from tests.helpers.blocks import every_format
from zimage_core.codebooks import CODEBOOK_NAMES
from zimage_core.errors import BadShape, UnknownFormat
from zimage_core.formats import FORMATS, BlockFormat, Field, by_ggml_type, by_name, q2_0_variant

# read off the structs of ggml-common.h by hand: offset of every field of the block types
OFFSETS = {
    "Q4_0": {"d": 0, "qs": 2},
    "Q4_1": {"d": 0, "m": 2, "qs": 4},
    "Q5_0": {"d": 0, "qh": 2, "qs": 6},
    "Q5_1": {"d": 0, "m": 2, "qh": 4, "qs": 8},
    "Q8_0": {"d": 0, "qs": 2},
    "Q2_K": {"scales": 0, "qs": 16, "d": 80, "dmin": 82},
    "Q3_K": {"hmask": 0, "qs": 32, "scales": 96, "d": 108},
    "Q4_K": {"d": 0, "dmin": 2, "scales": 4, "qs": 16},
    "Q5_K": {"d": 0, "dmin": 2, "scales": 4, "qh": 16, "qs": 48},
    "Q6_K": {"ql": 0, "qh": 128, "scales": 192, "d": 208},
    "IQ2_XXS": {"d": 0, "qs": 2},
    "IQ2_XS": {"d": 0, "qs": 2, "scales": 66},
    "IQ3_XXS": {"d": 0, "qs": 2, "gas": 66},
    "IQ1_S": {"d": 0, "qs": 2, "qh": 34},
    "IQ4_NL": {"d": 0, "qs": 2},
    "IQ3_S": {"d": 0, "qs": 2, "qh": 66, "signs": 74, "scales": 106},
    "IQ2_S": {"d": 0, "qs": 2, "signs": 34, "qh": 66, "scales": 74},
    "IQ4_XS": {"d": 0, "scales_h": 2, "scales_l": 4, "qs": 8},
    "IQ1_M": {"qs": 0, "qh": 32, "scales": 48},
    "TQ1_0": {"qs": 0, "qh": 48, "d": 52},
    "TQ2_0": {"qs": 0, "d": 64},
    "MXFP4": {"e": 0, "qs": 1},
    "NVFP4": {"d": 0, "qs": 4},
    "Q1_0": {"d": 0, "qs": 2},
    "Q2_0": {"d": 0, "qs": 2},
    "Q2_0_128": {"d": 0, "qs": 2},
}
IN_USE = {*range(4), 6, 7, 8, *range(10, 15), *range(16, 31), 34, 35, *range(39, 43)}


def test_every_number_that_ggml_still_uses_for_weights_is_described():
    assert {fmt.ggml_type for fmt in FORMATS.values()} - {None} == IN_USE


def test_formats_are_in_the_order_of_their_numbers():
    numbers = [fmt.ggml_type for fmt in FORMATS.values() if fmt.ggml_type is not None]
    assert numbers == sorted(numbers)
    assert list(FORMATS) == [fmt.name for fmt in FORMATS.values()]


def test_names_and_sizes_are_those_of_the_gguf_package():
    from gguf import GGML_QUANT_SIZES

    compared = 0
    for number, (weights, nbytes) in GGML_QUANT_SIZES.items():
        if number.name in ("Q8_1", "Q8_K"):
            continue
        fmt = by_ggml_type(int(number))
        assert (fmt.name, fmt.weights, fmt.nbytes) == (number.name, weights, nbytes)
        compared += 1
    assert compared >= 31


def test_fields_lie_where_the_structs_of_ggml_have_them():
    found = {
        fmt.name: {field.name: fmt.offset(field.name) for field in fmt.fields}
        for fmt in FORMATS.values()
        if fmt.weights > 1
    }
    assert found == OFFSETS


def test_every_codebook_is_used():
    assert {fmt.codebook for fmt in FORMATS.values()} - {None} == set(CODEBOOK_NAMES)


def test_fields_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="fields cover 17 bytes, block is 18"):
        BlockFormat("X", None, 32, 18, (Field("d", "f2"), Field("qs", "u1", 15)))
    with pytest.raises(ValueError, match="share a name"):
        BlockFormat("X", None, 32, 4, (Field("d", "f2"), Field("d", "f2")))


def test_offset_of_an_unknown_field_names_the_fields():
    with pytest.raises(KeyError, match="no field 'scale'; it has"):
        FORMATS["Q4_K"].offset("scale")


@every_format
@given(k=st.integers(-300, 20_000))
def test_row_bytes_is_whole_blocks_or_an_error(fmt, k):
    if k >= 0 and k % fmt.weights == 0:
        assert fmt.row_bytes(k) * fmt.weights == k * fmt.nbytes
    else:
        with pytest.raises(BadShape, match=f"a row of {k} weights cannot be stored as {fmt.name}"):
            fmt.row_bytes(k)


@given(number=st.one_of(st.integers(-5, 60), st.integers(-(2**70), 2**70)))
def test_any_number_is_a_format_or_one_sentence(number):
    if number in IN_USE:
        assert by_ggml_type(number).ggml_type == number
    else:
        with pytest.raises(UnknownFormat, match=f"^GGUF tensor type {number} "):
            by_ggml_type(number)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (9, "Q8_1.* for activations"),
        (31, "Q4_0_4_4.* dropped"),
        (43, "not known; the last one described here is 42"),
    ],
)
def test_refusal_says_why(number, words):
    with pytest.raises(UnknownFormat, match=words):
        by_ggml_type(number)


@pytest.mark.parametrize("name", ["q4_k", "", None, 12, ["Q4_K"], "Q4_K\x1b[31m"])
def test_unknown_name_lists_the_names(name):
    with pytest.raises(UnknownFormat, match=r"known are F32, F16, Q4_0") as caught:
        by_name(name)
    assert str(caught.value).isprintable()


@given(rows=st.integers(1, 4000), blocks=st.integers(1, 40), fork=st.booleans(), padding=st.booleans())
def test_both_blocks_of_number_42_are_told_apart_by_size(rows, blocks, fork, padding):
    rows += -(-2048 // (128 * blocks))  # below 2,048 weights the padding hides the difference
    wanted = FORMATS["Q2_0_128" if fork else "Q2_0"]
    k = 128 * blocks
    space = rows * wanted.row_bytes(k)
    if padding:
        space += -space % 32
    assert q2_0_variant(k, rows * k, space) is wanted


def test_number_42_with_rows_of_no_whole_128_or_no_fitting_size_is_ours():
    assert q2_0_variant(64, 64 * 999, 10).name == "Q2_0"
    assert q2_0_variant(128, 128 * 999, 10).name == "Q2_0"


def test_the_table_in_the_docs_is_generated_from_the_descriptors():
    assert format_table.current() == format_table.render(), "run python -m tests.helpers.format_table"
