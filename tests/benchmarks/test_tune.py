"""Tuning needs the GPU, takes the fastest of the right tiles, and keeps other architectures."""

from __future__ import annotations

import json
from math import inf

import pytest

from benchmarks import tune

pytest.importorskip("triton")

from zimage_core.kernels import tiles


def test_without_a_gpu_it_refuses_with_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = tiles.TABLE.read_bytes()
    with pytest.raises(SystemExit, match=r"^tiles are tuned on the GPU that runs them.*none here$"):
        tune.main(["--out", str(tmp_path / "tiles.json")])
    assert not list(tmp_path.iterdir())
    assert tiles.TABLE.read_bytes() == before


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128, 4128])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_candidates_begin_with_the_tile_in_use(rows, arch):
    found = tune.candidates(rows, arch)
    assert len(set(found)) == len(found)
    now = tiles.matmul_tile(rows, arch)
    assert found[0] == tune.Candidate(now.bm, now.bn, now.warps, now.stages)
    assert all(one.bm <= max(16, rows) for one in found[1:])
    assert arch == "sm_90" or {one.stages for one in found[1:]} == {2}


def test_the_fastest_of_the_right_ones_wins(monkeypatch):
    found = tune.candidates(32, "sm_90")
    wrong, fastest, lucky = found[5], found[9], found[7]
    quick = {fastest: 1.1e-5, lucky: 1e-5}

    def seconds(candidate, problems, budget, check):
        if candidate == wrong:
            return None
        if budget is tune.LONG:  # once measured well, the lucky one falls behind
            return 3e-5 if candidate == lucky else quick.get(candidate, 5e-5)
        return quick.get(candidate, 5e-5)

    monkeypatch.setattr(tune, "seconds", seconds)
    assert tune.best(32, "sm_90", [], inf) == (fastest, 1.1e-5)
    monkeypatch.setattr(tune, "seconds", lambda *_, **__: None)
    assert tune.best(32, "sm_90", [], inf) is None


def test_a_forced_tile_is_taken_and_given_back():
    one = tune.Candidate(16, 32, 4, 2)
    before = tiles.matmul_tile(7, "sm_90")
    with tune.forced(one):
        assert tiles.matmul_tile(7, "sm_90") == tiles.Tile(16, 32, 4, 2)
    assert tiles.matmul_tile(7, "sm_90") == before


def test_only_this_architecture_is_written_and_the_last_entry_serves_all(tmp_path):
    path = tmp_path / "tiles.json"
    before = json.loads(tiles.TABLE.read_text())
    path.write_text(tune.as_text(before))
    assert path.read_bytes() == tiles.TABLE.read_bytes()
    listed = tune.entries({16: tune.Candidate(16, 32, 4, 3), 32: tune.Candidate(32, 64, 8, 2)})
    tune.write(path, "sm_90", listed)
    after = json.loads(path.read_text())
    assert after.pop("sm_90") == [
        {"rows": 16, "bm": 16, "bn": 32, "warps": 4, "stages": 3},
        {"rows": tune.ANY, "bm": 32, "bn": 64, "warps": 8, "stages": 2},
    ]
    before.pop("sm_90")
    assert after == before
