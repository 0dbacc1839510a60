"""Each example runs without arguments, is short, and finds what it is meant to show."""

import importlib.util
import math

import pytest
from PIL import Image

from tests.helpers.tree import ROOT
from zimage_core import FORMATS
from zimage_core.cpu.dequantize import DECODERS
from zimage_core.quantize.encode import ENCODERS
from zimage_core.reference.dequantize import DEQUANTIZERS

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the main function of an example, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def main(name, *args):
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main(*args)

    return main


def test_all_examples_are_short_and_listed_in_the_readme():
    readme = (ROOT / "examples" / "README.md").read_text("utf-8")
    assert len(SCRIPTS) == 6
    for script in SCRIPTS:
        assert f"[{script.name}]({script.name})" in readme
        assert len(script.read_text("utf-8").splitlines()) <= 60, script.name


def test_hooks_see_every_block_of_every_step(run, capsys):
    found = run("hooks", [])
    assert list(found) == ["noise_refiner.0", *(f"layers.{i}" for i in range(4))]
    assert all(len(steps) == 4 and 0 < rms < largest for steps in found.values() for rms, largest in steps)
    assert "layers.3" in capsys.readouterr().out


def test_attention_maps_are_drawn_beside_the_image_and_differ_between_words(run, tmp_path):
    maps = run("attention_maps", ["--prompt", "a red circle on the left"])
    assert list(maps) == ["a", "red", "circle", "on", "the", "left"]
    strip = Image.open(tmp_path / "attention_maps.png")
    assert strip.size == (80 * 7, 80)
    assert all(0 < float(each.min()) <= float(each.max()) < 1 for each in maps.values())
    assert not maps["red"].allclose(maps["left"], rtol=0.05)


def test_the_sampler_of_order_2_is_nearer_to_many_steps_than_euler(run):
    errors = run("own_sampler", ["--steps", "5"])
    assert errors["adams_bashforth"] < errors["euler"] < 0.3


def test_fewer_bits_make_smaller_files_and_change_images_more(run, tmp_path):
    found = run("quantize_and_compare", ["--types", "Q8_0", "Q4_0"])
    sizes, decibels = zip(*found.values(), strict=True)
    assert math.isinf(decibels[0])
    assert decibels[1] > decibels[2] > 25
    assert sizes[1] > sizes[2]
    assert Image.open(tmp_path / "quantize_and_compare.png").size == (240, 240)


def test_a_lora_at_weight_0_changes_nothing_and_at_1_the_image(run, tmp_path):
    strip = run("lora_sweep", ["--weights", "0", "1"])
    assert strip.size == (160, 80)
    middle = [strip.getpixel((x, 40)) for x in (40, 120)]
    assert middle[0][1] < 100 < middle[1][1], "red inside of the disc, white inside of the outline"
    assert (tmp_path / "lora_sweep.png").is_file()


@pytest.fixture
def own_tables(monkeypatch):
    """The tables of formats as they were, after the test."""
    for table in (FORMATS, DEQUANTIZERS, DECODERS, ENCODERS):
        monkeypatch.setitem(table, "Q3_32", None)
        del table["Q3_32"]


@pytest.mark.usefixtures("own_tables")
def test_a_format_of_ones_own_is_exact_and_between_its_neighbours(run, capsys):
    found = run("bench_format", 64)
    assert found["Q3_K"] < found["Q3_32"] < 0.25
    out = capsys.readouterr().out
    assert out.count("exact: True") == 3
