"""Defends: what pays follows the measured rates, and measuring disturbs nothing and never takes long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from zimage_core.cpu import capability


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(capability, "_rates", None)
    for cached in (capability.features, capability._flags):
        cached.cache_clear()
    yield
    for cached in (capability.features, capability._flags):
        cached.cache_clear()


def _cpu(monkeypatch, tmp_path, line):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(capability, "_CPUINFO", file)


@pytest.mark.parametrize(
    ("line", "names", "vnni", "bfloat16"),
    [
        ("flags\t\t: fpu avx2 fma", "AVX2", False, False),
        ("flags\t\t: avx2 avx_vnni", "AVX2, VNNI", True, False),
        ("flags\t\t: avx2 avx512f avx512_vnni avx512_bf16", "AVX512, VNNI, BF16", True, True),
        ("flags\t\t: avx2 avx512f amx_tile amx_bf16 avx512_vnni", "AVX512, AMX, VNNI, BF16", True, True),
        ("Features\t: fp asimd i8mm bf16", "NEON, I8MM, BF16", True, True),
    ],
)
def test_instructions_are_named(monkeypatch, tmp_path, line, names, vnni, bfloat16):
    _cpu(monkeypatch, tmp_path, line)
    assert capability.features() == names
    assert (capability.has_vnni(), capability.has_bfloat16()) == (vnni, bfloat16)


def test_a_system_without_cpuinfo_gets_an_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(capability, "_CPUINFO", tmp_path / "absent")
    assert capability.features()


@pytest.mark.parametrize(("rate", "pays"), [(149.0, False), (151.0, True)])
def test_int8_pays_from_one_and_a_half_times_float32_on(monkeypatch, rate, pays):
    monkeypatch.setattr(capability, "_rates", capability.Rates(100.0, 0.0, rate))
    assert capability.int8_pays() is pays


def test_bfloat16_pays_only_where_the_cpu_multiplies_it(monkeypatch, tmp_path):
    monkeypatch.setattr(capability, "_rates", capability.Rates(100.0, 200.0, 0.0))
    _cpu(monkeypatch, tmp_path, "flags : avx2 avx512f avx512_bf16")
    assert capability.bfloat16_pays()
    for cached in (capability.features, capability._flags):
        cached.cache_clear()
    _cpu(monkeypatch, tmp_path, "flags : avx2 avx512f")
    assert not capability.bfloat16_pays()


def test_rates_are_measured_once_and_threads_stay(monkeypatch):
    before, calls = torch.get_num_threads(), []
    monkeypatch.setattr(capability, "_rate", lambda *_: calls.append(torch.get_num_threads()) or 50.0)
    assert capability.rates() is capability.rates()
    assert calls == [1, 1, 1]
    assert torch.get_num_threads() == before


def test_a_slow_product_is_not_tried_at_full_size(monkeypatch):
    rows = []
    monkeypatch.setattr(capability, "_seconds", lambda _, x, weight: rows.append(len(x)) or 1.0)
    assert 0 < capability._rate(torch.mm, torch.float32) < capability.TOO_SLOW
    assert set(rows) == {capability.TINY[0]}


def test_a_type_without_a_product_has_rate_zero():
    def refuse(x, weight):
        raise RuntimeError("not implemented for 'Char'")

    assert capability._rate(refuse, torch.int8) == 0.0


def test_wrong_sums_have_rate_zero():
    def saturating(x, weight):
        return (x.int() @ weight.int()).clamp(max=2**15 - 1)

    assert capability._rate(saturating, torch.int8) == 0.0


def test_float32_has_a_rate():
    assert capability.rates().float32 > 0


def test_measuring_in_a_worker_leaves_the_number_of_threads_of_new_threads(monkeypatch):
    monkeypatch.setattr(capability, "_rates", None)
    monkeypatch.setattr(capability, "_rate", lambda *_: 50.0)
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as worker:
            worker.submit(lambda: (torch.get_num_threads(), torch.set_num_threads(1))).result()
            torch.set_num_threads(3)  # the process's number; the worker keeps its own, as those of a pool do
            worker.submit(capability.rates).result()
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
