"""Recipes are read as they are written, and the standard mixes are those of the files that people have."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_core.config import TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, BadFile
from zimage_core.export.checkpoint import Part, Target
from zimage_core.export.mixes import MIXES, standard_mix
from zimage_core.export.recipes import (
    TYPES,
    Recipe,
    Rule,
    choose_formats,
    fitting,
    parse_recipe,
    read_recipe,
    use_more_bits,
    write_recipe,
)
from zimage_core.formats import FORMATS
from zimage_core.weights import names


class Bf16Source:
    """A checkpoint whose tensors are all bfloat16."""

    def format_of(self, target):
        return FORMATS["BF16"]

    def is_scaled(self, target):
        return False


def full_size(component: str) -> list[Target]:
    if component == "transformer":
        shapes = names.checkpoint_shapes(names.transformer_table(TransformerConfig(), "fused"))
    else:
        config = TextEncoderConfig(num_layers=37)  # the table leaves the last layer out
        shapes = names.checkpoint_shapes(names.text_encoder_table(config, "gguf"))
        shapes["output_norm.weight"] = (2560,)
    return [Target(name, shape, (Part(name),)) for name, shape in shapes.items()]


def census(mix: str, component: str) -> tuple[Counter, float, dict]:
    """Tensors a type, gigabytes of all tensors, tensor -> type."""
    targets = full_size(component)
    recipe = standard_mix(mix, component, {t.name: t for t in targets})
    formats = choose_formats(Bf16Source(), targets, recipe)
    nbytes = sum(t.rows * formats[t.name].row_bytes(t.columns) for t in targets)
    return (
        Counter(f.name for f in formats.values()),
        nbytes / 1e9,
        {name: f.name for name, f in formats.items()},
    )


@pytest.mark.parametrize(
    ("mix", "gigabytes", "types"),
    [
        ("Q3_K_M", 4.12, {"Q3_K": 120, "Q4_K": 60}),
        ("Q4_K_M", 4.98, {"Q4_K": 120, "Q5_K": 30, "Q6_K": 30}),
        ("Q5_K_M", 5.52, {"Q5_K": 120, "Q6_K": 60}),
        ("Q8_0", 7.22, {"Q8_0": 180}),
        ("Q3_K_S", 3.79, {"Q3_K": 180}),
    ],
)
def test_a_transformer_has_the_size_of_the_published_file(mix, gigabytes, types):
    """Sizes are those listed for Z-Image-Turbo; 245 F32 and 28 BF16 are the census of every such file."""
    counts, size, _ = census(mix, "transformer")
    assert counts == Counter({"F32": 245, "BF16": 28, **types})
    assert abs(size - gigabytes) <= 0.006  # the list has two decimals


def test_a_qwen3_4b_has_the_size_and_choices_of_llama_quantize():
    """The published Q4_K_M: 2.50 GB, embedding Q6_K since it is tied, half of v and down Q6_K."""
    counts, size, types = census("Q4_K_M", "text_encoder")
    assert abs(size - 2.50) <= 0.01
    assert types["token_embd.weight"] == "Q6_K"
    assert types["blk.0.attn_v.weight"] == types["blk.35.ffn_down.weight"] == "Q6_K"
    assert types["blk.4.attn_v.weight"] == "Q4_K"
    assert counts == Counter({"F32": 145, "Q4_K": 216, "Q6_K": 37})


def test_an_output_matrix_of_its_own_takes_the_bits_from_the_embedding():
    recipe = standard_mix("IQ2_XXS", "text_encoder", {"output.weight": 0})
    assert recipe.type_of("output.weight", 36) == "Q5_K"
    assert recipe.type_of("token_embd.weight", 36) == "Q2_K"
    tied = standard_mix("IQ2_XXS", "text_encoder", {})
    assert tied.type_of("token_embd.weight", 36) == "Q5_K"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_every_mix_gives_every_tensor_a_type_near_its_name(mix, component):
    """Bits a quantised weight lie within two of the base type's, the bumps together."""
    targets = full_size(component)
    counts, _, types = census(mix, component)
    assert sum(counts.values()) == len(targets)
    inside = [t for t in targets if t.name.startswith(("layers.", "blk.")) and types[t.name] != "F32"]
    bits = sum(8 * t.rows * FORMATS[types[t.name]].row_bytes(t.columns) for t in inside)
    bits /= sum(math.prod(t.shape) for t in inside) or 1
    base = FORMATS[MIXES[mix].base].bits_per_weight
    if mix != "F32":
        assert base - 0.3 <= bits <= base + 1.0


def test_more_bits_go_to_both_ends_and_every_third_between():
    """llama.cpp's rule, worked out by hand for 30 blocks."""
    chosen = [i for i in range(30) if use_more_bits(i, 30)]
    assert chosen == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]


def test_layers_pick_blocks():
    rule = Rule("layers.*", "Q6_K", "first 1/8")
    assert [i for i in range(30) if rule.applies(f"layers.{i}.feed_forward.w2.weight", 30)] == [0, 1, 2]
    assert [i for i in range(32) if Rule("*", "Q6_K", "last 1/8").applies(f"blk.{i}.x", 32)] == [
        28,
        29,
        30,
        31,
    ]
    assert [i for i in range(9) if Rule("*", "Q6_K", "0-2, 7").applies(f"blk.{i}.x", 9)] == [0, 1, 2, 7]
    assert not Rule("*", "Q6_K", "0").applies("x_embedder.weight", 9)


def test_a_recipe_file_reads_like_a_list(tmp_path):
    place = tmp_path / "mine.txt"
    place.write_text(
        "# fewer bits in the middle\n\n*.feed_forward.w2.weight [first 1/8] = q6_k  # the ends\n"
        "t_embedder.* = SOURCE\n* = Q4_K\n"
    )
    recipe = read_recipe(place)
    assert recipe.name == "mine"
    assert recipe.remarks == ("fewer bits in the middle",)
    assert recipe.type_of("layers.1.feed_forward.w2.weight", 30) == "Q6_K"
    assert recipe.type_of("layers.9.feed_forward.w2.weight", 30) == "Q4_K"
    assert recipe.type_of("t_embedder.mlp.0.weight", 30) == "source"
    write_recipe(recipe, tmp_path / "again.txt")
    again = read_recipe(tmp_path / "again.txt")
    assert (again.rules, again.remarks) == (recipe.rules, recipe.remarks)


rules = st.builds(
    Rule,
    st.text("abc.*_?0129", min_size=1, max_size=12),
    st.sampled_from([*TYPES, "source"]),
    st.sampled_from(["", "spread", "first 1/8", "last 1/16", "0-3,29"]),
)


@given(st.lists(rules, min_size=1, max_size=5), st.lists(st.text("abc xyz", max_size=20), max_size=2))
def test_what_is_written_is_read(written, remarks):
    recipe = Recipe("r", tuple(written), tuple(r.strip() for r in remarks))
    read = parse_recipe(recipe.text(), "r")
    assert read.rules == recipe.rules
    assert read.remarks == recipe.remarks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("* = Q4_K\nnonsense\n", "line 2: 'nonsense' is no rule"),
        ("\n* = Q9_K\n", "line 2: unknown type 'Q9_K'; known are F32, F16"),
        ("* [middle] = Q4_K\n", "line 1: layers \\[middle\\]"),
        ("# only remarks\n", "it has no rule"),
        ("* = F8_E4M3\n", "line 1: unknown type"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, text, message):
    place = tmp_path / "bad.txt"
    place.write_text(text)
    with pytest.raises(BadFile, match=message):
        read_recipe(place)


def test_files_that_are_no_recipes_are_refused(tmp_path):
    with pytest.raises(BadFile, match=r"cannot be opened: no such file.*check the path"):
        read_recipe(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00GGUF")
    with pytest.raises(BadFile, match="text in UTF-8"):
        read_recipe(tmp_path / "bytes")
    (tmp_path / "long").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(BadFile, match="longer than"):
        read_recipe(tmp_path / "long")


def test_a_tensor_without_rule_is_an_error_that_says_how_to_end_a_recipe():
    with pytest.raises(BadArgument, match=r"no rule for layers\.0\.x; end it with a line `\* = TYPE`"):
        Recipe("r", (Rule("t_*", "Q4_K"),)).type_of("layers.0.x", 1)


def test_an_unknown_mix_lists_those_there_are():
    with pytest.raises(BadArgument, match="known are F32, F16, BF16, Q8_0"):
        standard_mix("Q7_K", "transformer", {})
    assert standard_mix("q4_k", "transformer", {}).name == "Q4_K_M"


@pytest.mark.parametrize(
    ("wanted", "columns", "got"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 96, "Q5_0"),
        ("Q6_K", 96, "Q8_0"),
        ("IQ2_XS", 96, "IQ4_NL"),
        ("Q3_K", 90, "F16"),
        ("Q8_0", 90, "F16"),
        ("BF16", 90, "BF16"),
    ],
)
def test_rows_that_no_block_divides_take_the_next_type_that_fits(wanted, columns, got):
    assert fitting(wanted, columns).name == got


def test_exact_types_name_every_tensor_and_survive_brackets():
    recipe = Recipe.of_types("r", {"a[0].*": "Q4_K"})
    assert recipe.type_of("a[0].*", 1) == "Q4_K"
    assert recipe.type_of("a0.b", 1) == "source"
