"""Defends: a GPU without tiles of its own takes those of its nearest kin."""

from __future__ import annotations

import pytest

from zimage_core.kernels import tiles


@pytest.mark.parametrize(
    ("arch", "kin"),
    [
        ("sm_121", "sm_120"), ("sm_87", "sm_86"), ("sm_88", "sm_86"), ("sm_90", "sm_90"),
        ("sm_75", "default"), ("sm_103", "sm_100"), ("sm_70", "default"), ("gfx90a", "gfx942"),
        ("gfx1151", "gfx1100"), ("gfx1030", "gfx1100"),
    ],
)  # fmt: skip
def test_tiles_of_the_nearest_kin(arch, kin, monkeypatch):
    table = {name: [{"rows": 1 << 30, "bm": i, "bn": 1, "warps": 4, "stages": 1}]
             for i, name in enumerate(tiles._table())}  # fmt: skip
    monkeypatch.setattr(tiles, "_table", lambda: table)
    assert tiles.matmul_tile(16, arch) == tiles.matmul_tile(16, kin)
    assert tiles.matmul_tile(16, kin).bm == list(table).index(kin)
