"""`zimage imatrix` writes what was collected, whole or not at all."""

from __future__ import annotations

import json

import pytest

from zimage_core.quantize.imatrix import read_imatrix, write_imatrix

SMALL = ("-W", 32, "-H", 32, "--steps", 1)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue star\n", "utf-8")
    return path


def collect(zimage, prompts, out, *words):
    return zimage("imatrix", "--prompts", prompts, "-o", out, *SMALL, *words)


def test_it_writes_the_matrices_of_the_transformer(zimage, prompts, tmp_path):
    out = tmp_path / "a.gguf"
    outcome = collect(zimage, prompts, out)
    assert outcome.status == 0
    assert outcome.out == f"{out}\n"
    assert "Ctrl-C before writes nothing" in outcome.err
    assert "41 tensors, 2 images" in outcome.err
    imatrix = read_imatrix(out)
    assert (imatrix.datasets, imatrix.chunks) == (("prompts.txt",), 2)
    assert imatrix.importance("layers.3.feed_forward.w2.weight").shape == (682,)
    assert imatrix.importance("blk.0.attn_q.weight") is None


def test_the_text_encoder_on_request(zimage, prompts, tmp_path):
    outcome = collect(zimage, prompts, tmp_path / "a.dat", "--component", "text_encoder", "--json", "--quiet")
    assert outcome.err == ""
    record = json.loads(outcome.out)
    assert record["images"] == 2
    assert set(read_imatrix(tmp_path / "a.dat").entries) == set(record["tensors"])
    assert "blk.0.ffn_down.weight" in record["tensors"]


def test_collections_are_merged(zimage, prompts, tmp_path):
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    collect(zimage, prompts, first)
    collect(zimage, prompts, second, "--merge", first)
    name = "x_embedder.weight"
    one, two = read_imatrix(first).entries[name], read_imatrix(second).entries[name]
    assert two.count == 2 * one.count
    assert two.squares.tolist() == pytest.approx((2 * one.squares).tolist(), rel=1e-6)


def test_an_existing_file_is_kept_unless_forced(zimage, prompts, tmp_path, monkeypatch):
    out = tmp_path / "a.gguf"
    out.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr("zimage_core.cli.imatrix.load_pipeline", lambda _: pytest.fail("loaded"))
        outcome = collect(zimage, prompts, out)
    assert outcome.status == 1
    assert "exists already" in outcome.error
    assert out.read_bytes() == b"old"
    assert collect(zimage, prompts, out, "--force").status == 0
    assert read_imatrix(out).chunks == 2


@pytest.mark.parametrize("partial", [False, True])
def test_an_interruption_leaves_nothing_or_whole_prompts(zimage, prompts, tmp_path, monkeypatch, partial):
    from zimage_core.pipeline import ZImagePipeline

    call, calls = ZImagePipeline.__call__, []

    def interrupted(self, *words, **options):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(self, *words, **options)

    monkeypatch.setattr(ZImagePipeline, "__call__", interrupted)
    out = tmp_path / "a.gguf"
    outcome = collect(zimage, prompts, out, *(["--partial"] if partial else []))
    assert outcome.status == 130
    assert [p.name for p in tmp_path.iterdir() if p != prompts] == (["a.gguf"] if partial else [])
    if partial:
        assert read_imatrix(out).chunks == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", 0), "--steps: got 0"),
        (("--dtype", "float16"), "float16 scales parts of a block"),
        (("--seed", -1), "--seed: got -1"),
        (("--vae", "x"), "--vae alone cannot draw"),
    ],
)
def test_what_cannot_be_collected_is_said_in_one_line(zimage, prompts, tmp_path, words, message):
    outcome = zimage("imatrix", "--prompts", prompts, "-o", tmp_path / "a.gguf", "--quiet", *words)
    assert outcome.status in (1, 2)
    assert message in outcome.error
    assert not (tmp_path / "a.gguf").exists()


def test_an_imatrix_of_another_model_is_refused_before_anything_is_drawn(
    zimage, prompts, tmp_path, monkeypatch
):
    from zimage_core.pipeline import ZImagePipeline
    from zimage_core.quantize.imatrix import flat

    monkeypatch.setattr(ZImagePipeline, "__call__", lambda *words, **options: pytest.fail("drawn"))
    write_imatrix(tmp_path / "other.gguf", flat({"x_embedder.weight": 48}))
    outcome = collect(zimage, prompts, tmp_path / "a.gguf", "--merge", tmp_path / "other.gguf", "--quiet")
    assert outcome.status == 1
    assert "x_embedder.weight has" in outcome.error
    words = ("--merge", tmp_path / "other.gguf", "--component", "both", "--quiet")
    assert collect(zimage, prompts, tmp_path / "a.gguf", *words).status == 1
    write_imatrix(tmp_path / "third.gguf", flat({"x_embedder.weight": 64}))
    with monkeypatch.context() as patch:
        patch.setattr("zimage_core.cli.imatrix.load_pipeline", lambda _: pytest.fail("loaded"))
        two = ("--merge", tmp_path / "other.gguf", "--merge", tmp_path / "third.gguf")
        assert "x_embedder.weight has" in collect(zimage, prompts, tmp_path / "a.gguf", *two).error
        assert "width" in collect(zimage, prompts, tmp_path / "a.gguf", "-W", 50).error
