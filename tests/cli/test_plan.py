"""`zimage plan` reads headers, loads no torch, and says what fits in words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.tree import ROOT
from tests.test_lean_import import HEAVY

NANO = ROOT / "zimage_core" / "assets" / "nano"
FILES = (
    "--transformer", NANO / "transformer.gguf", "--text-encoder", NANO / "text_encoder.gguf",
    "--vae", NANO / "vae.safetensors",
)  # fmt: skip


def test_one_budget_gives_a_table_bars_and_reasons(zimage):
    outcome = zimage("plan", "--vram", "90MB", "-W", 512, "-H", 512)
    assert outcome.status == 0
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[0].startswith("512 x 512 px, 1 image, caption of 128 tokens, 8 steps, bfloat16")
    assert "budget 90 MB" in lines[2]
    assert [line.split()[0] for line in lines[4:8]] == ["network", "text", "transformer", "vae"]
    assert any(line.startswith("denoise ") for line in lines)
    assert any(line.startswith("expected: encode ") for line in lines)
    assert lines[-1].startswith("- ")


def test_without_a_budget_each_common_card_has_a_line(zimage):
    out = zimage("plan").out
    assert [line.split()[0] for line in out.splitlines() if "GiB" in line] == [
        "4",
        "6",
        "8",
        "12",
        "16",
        "24",
    ]
    assert "no limit peak" in out


def test_controlnets_and_loras_are_counted_by_their_headers(zimage):
    plans = [
        json.loads(zimage("plan", "--json", "--vram", "1GiB", *more).out)
        for more in ((), ("--controlnet", "edges"), ("--controlnet", "edges", "--lora", "outline"))
    ]
    peaks = [max(phase["peak"] for phase in plan["phases"] if phase["name"] == "denoise") for plan in plans]
    assert peaks[0] + 1_000_000 < peaks[1] < peaks[2]
    assert "ControlNets take 1.06 MB" in plans[1]["reasons"][-1]
    assert plans[1]["vram"] == 1 << 30
    refused = zimage("plan", "--controlnet", "outline")
    assert refused.status != 0
    assert "this is a LoRA for Z-Image" in refused.err
    short = zimage("plan", "--controlnet", "edges", "--vram", "40MB").err
    assert "MB of the budget are for the ControlNets" in short


def test_ram_alone_points_to_the_cpu(zimage):
    hint = "--architecture cpu plans a run on a CPU"
    assert hint in zimage("plan", "--ram", "4GiB").out
    assert hint not in zimage("plan").out
    assert hint not in zimage("plan", "--ram", "4GiB", "--architecture", "cpu").out


def test_int8_is_a_word_and_changes_seconds_and_reasons(zimage):
    words = ("plan", "--architecture", "cpu", "--ram", "2GiB")
    exact, int8 = zimage(*words, "--compute", "exact").out, zimage(*words, "--compute", "int8").out
    assert zimage(*words).out == exact, "auto: the embedded model is too small to gain"
    assert int8.splitlines()[0].endswith("float32, int8")
    assert "int8 1.2 TOP/s" in int8.splitlines()[1]
    assert int8.splitlines()[-1].startswith("- int8 rows of 5 of 5 blocks are kept")
    expected = [next(line for line in out.splitlines() if "expected" in line) for out in (exact, int8)]
    assert expected[0] != expected[1]
    assert "(5 as int8 rows)" in zimage("plan", "--compute", "int8").out
    data = json.loads(zimage(*words, "--compute", "int8", "--json").out)
    assert data["compute"] == "int8"
    assert data["components"][1]["int8_blocks"] == [0, 1, 2, 3, 4]


def test_json_is_the_plan(zimage):
    data = json.loads(zimage("plan", "--vram", "100MB", "-W", 256, "-H", 128, "-n", 2, "--json").out)
    assert (data["width"], data["height"], data["images"], data["vram"]) == (256, 128, 2, 100_000_000)
    assert {phase["name"] for phase in data["phases"]} == {"encode", "denoise", "decode"}
    assert data["peak"] <= data["vram"]
    cards = json.loads(zimage("plan", "--json").out)
    assert list(cards) == ["4 GiB", "6 GiB", "8 GiB", "12 GiB", "16 GiB", "24 GiB", "no limit"]


def test_files_folder_and_default_are_the_same_model(zimage):
    words = ("plan", "--vram", "1GiB", "-W", 256, "-H", 256)
    default = zimage(*words).out
    assert zimage(*words, *FILES).out == default
    assert zimage(*words, "--model", NANO).out == default


def test_a_diffusers_folder_is_read(zimage, model):
    outcome = zimage("plan", "--model", model, "--vram", "1GiB", "-W", 64, "-H", 64, "--dtype", "float32")
    assert outcome.status == 0
    assert "everything stays on the device" in outcome.out


def test_a_budget_too_small_is_one_line(zimage):
    outcome = zimage("plan", "--vram", "10MB", "-W", 1024, "-H", 1024)
    assert outcome.status == 1
    assert "10 MB of GPU memory are given and 1024 x 1024 px need at least" in outcome.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vram", "lots"), "--vram: got lots, wanted bytes"),
        (("--ram", "-1"), "--ram: got -1"),
        (("-W", "100"), "--width: got 100, wanted a multiple of 16"),
        (("-n", "0"), "--count: got 0"),
        (("-H", "0"), "--height: got 0"),
        (("--architecture", "cpu", "--vram", "6GiB"), "on a CPU give --ram alone, such as --ram 4GiB"),
        (("--architecture", "cpu", "--link", "9"), "--link: on a CPU nothing is moved"),
        (("--link", "0"), "--link: got 0"),
        (("--architecture", "sm_1x"), "not known"),
        (("--transformer", "x"), "give --text-encoder and --vae too"),
    ],
)
def test_a_wrong_word_is_named(zimage, words, message):
    outcome = zimage("plan", *words)
    assert outcome.status == 2
    assert message in outcome.error


def test_the_size_is_the_models_own(zimage, model):
    assert zimage("plan", "--vram", "1GiB").out.startswith("80 x 80 px")
    assert zimage("plan", "--vram", "1GiB", "-W", 160).out.startswith("160 x 80 px")
    assert zimage("plan", "--model", model, "--vram", "4GiB").out.startswith("1024 x 1024 px")


def test_a_cpu_has_a_plan_that_its_run_would_follow(zimage, tmp_path):
    words = ("plan", "--architecture", "cpu")
    lines = zimage(*words, "--ram", "2GiB").out.splitlines()
    assert lines[0].endswith("float32")
    assert lines[2].startswith("host memory: peak ")
    assert "GPU" not in zimage(*words).out
    least = re.search("at least ([0-9]+) MB", zimage(*words).out)[1]
    assert zimage(*words, "--ram", f"{int(least) + 1}MB").status == 0
    short = ("--ram", "500MB")
    planned = zimage(*words, *short)
    run = zimage("generate", "red circle", "--device", "cpu", *short, "--seed", 1, "-o", tmp_path / "a.png")
    assert (planned.status, run.status) == (1, 1)
    for outcome in (planned, run):
        assert "of host memory are given and 80 x 80 px need at least" in outcome.err


@pytest.mark.parametrize("words", [(), ("--json",), ("--vram", "6GiB"), ("--architecture", "cpu")])
def test_too_little_host_memory_is_an_error_of_the_plan_too(zimage, words):
    outcome = zimage("plan", "--ram", "100MB", *words)
    assert (outcome.status, outcome.out) == (1, "")
    assert "100 MB of host memory are given and" in outcome.error


def test_a_wrong_file_is_named(zimage):
    outcome = zimage("plan", *FILES[:4], "--vae", FILES[1])
    assert outcome.status == 1
    assert "where FLUX.1's VAE is wanted" in outcome.error


def test_a_terminal_without_block_characters_gets_ascii():
    def shown(encoding):
        run = subprocess.run(
            [sys.executable, "-m", "zimage_core.cli.main", "plan", "--vram", "1GiB"],
            capture_output=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        return run.stdout.decode("utf-8")

    assert "█" in shown("utf-8")
    plain = shown("ascii")
    assert plain.isascii()
    assert "\\u" not in plain
    assert "# weights  = slots" in plain


def test_it_runs_without_torch_and_numpy():
    code = (
        "import sys\nfrom zimage_core.cli.main import main\nmain(['plan', '--vram', '1GiB'])\n"
        "print(' '.join(sys.modules), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not HEAVY & {name.partition(".")[0] for name in run.stderr.split()}
