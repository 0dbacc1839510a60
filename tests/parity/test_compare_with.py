"""`compare_with` passes where both programs agree, and names the first block where they do not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.helpers import tiny
from zimage_core.assets import embedded_files
from zimage_core.errors import BadArgument, BadFile, OverBudget, Unsupported
from zimage_core.parity import compare, compare_with, lending, peers
from zimage_core.parity.precision import in_float32, in_float64
from zimage_core.parity.report import Block, ParityReport

pytestmark = pytest.mark.parity
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("parity") / "tiny", 3.0)


def test_a_folder_of_diffusers_is_within_tolerance_in_both_precisions(folder):
    report = compare_with(folder, float64=True)
    assert report.passes, "\n".join(report.lines())
    assert [c.name for c in report.components] == ["transformer", "latents", "text_encoder", "vae"]
    blocks = [block for component in report.components for block in component.blocks]
    assert all(block.wide <= 1e-12 for block in blocks)
    assert max(block.error for block in blocks) > 0, "nothing was compared"


def test_packed_weights_are_decoded_for_the_peer_and_the_report_says_so():
    report = compare_with("default", parts=["transformer"])
    assert report.passes
    assert report.components[0].quantised
    assert any("decoded by the reference" in line for line in report.lines())


def broken(change):
    """A peer whose network is changed after it was built."""

    def patch(monkeypatch):
        made = peers.pair_of

        def pair_of(part, opened):
            pair = made(part, opened)
            whole = pair.mend

            def mend(network):
                whole(network)
                change(network)

            return replace(pair, mend=mend)

        monkeypatch.setattr(compare, "pair_of", pair_of)

    return patch


def first(folder, monkeypatch, patch, **options):
    patch(monkeypatch)
    report = compare_with(folder, parts=["transformer"], **options)
    assert not report.passes
    assert "outside tolerance, first: transformer" in report.lines()[-1]
    return report.first[1]


def another_weight(monkeypatch):
    whole = lending.Lender.numbers

    def numbers(self, name, dtype):
        found = whole(self, name, dtype)
        if name == "layers.1.feed_forward.w1.weight":
            found = found.clone()
            found[0] += 0.01
        return found

    monkeypatch.setattr(lending.Lender, "numbers", numbers)


def halves_rotated(monkeypatch):
    """Channels in halves instead of pairs, in one block."""

    def change(network):
        attention = network.layers[1].attention
        whole = attention.processor

        def processor(attn, hidden_states, **kwargs):
            order = torch.arange(attn.inner_dim // attn.heads).view(2, -1).t().flatten()
            norms = attn.norm_q, attn.norm_k
            for norm in norms:
                norm.register_forward_hook(lambda _m, _i, out: out[..., order])
            return whole(attn, hidden_states, **kwargs)

        attention.processor = processor

    broken(change)(monkeypatch)


def test_another_weight_is_found_at_its_block(folder, monkeypatch):
    assert first(folder, monkeypatch, another_weight) == "layers.1"


def test_another_order_of_rotation_is_found_at_its_block(folder, monkeypatch):
    assert first(folder, monkeypatch, halves_rotated) == "layers.1"


def test_another_order_of_axes_is_found_at_the_positions(folder, monkeypatch):
    def change(network):
        own = network.rope_embedder
        network.rope_embedder = lambda ids: own(ids[:, [0, 2, 1]])

    assert first(folder, monkeypatch, broken(change)) == "noise_refiner: rotary positions"


def test_another_eps_is_found_in_float64(folder, monkeypatch):
    def change(network):
        network.layers[0].ffn_norm2.eps = 1.1e-5

    assert first(folder, monkeypatch, broken(change), float64=True) == "layers.0"


def test_another_sign_is_found_at_the_end(folder, monkeypatch):
    def change(network):
        final = next(iter(network.all_final_layer.values()))
        final.register_forward_hook(lambda _m, _i, out: -out)

    assert first(folder, monkeypatch, broken(change)) == "final_layer"


def test_masked_pad_tokens_are_found_at_the_first_block_that_masks(folder, monkeypatch):
    def change(network):
        def mask(_, args):
            x, _, *rest = args
            keep = torch.ones(1, x.shape[1], dtype=torch.bool)
            keep[:, 90:] = False
            return (x, keep, *rest)

        network.noise_refiner[0].register_forward_pre_hook(mask)

    assert first(folder, monkeypatch, broken(change)) == "noise_refiner.0"


def test_a_missing_qk_norm_is_found_at_its_block(folder, monkeypatch):
    def change(network):
        network.layers[0].attention.norm_q.register_forward_hook(lambda _m, args, _o: args[0])

    assert first(folder, monkeypatch, broken(change)) == "layers.0"


def test_a_flipped_sign_of_the_pipeline_is_found_in_the_latents(folder, monkeypatch):
    step = diffusers.FlowMatchEulerDiscreteScheduler.step
    monkeypatch.setattr(
        diffusers.FlowMatchEulerDiscreteScheduler,
        "step",
        lambda self, v, t, x, **k: step(self, -v, t, x, **k),
    )
    report = compare_with(folder, parts=["latents"])
    assert report.first == ("latents", "after step 1")


def test_an_error_of_the_peer_is_reported_at_its_block(folder, monkeypatch):
    def change(network):
        def fail(*_):
            raise RuntimeError("out of luck")

        network.layers[1].attention.register_forward_pre_hook(fail)

    broken(change)(monkeypatch)
    report = compare_with(folder, parts=["transformer"])
    assert not report.passes
    assert report.components[0].problem == "at layers.1: RuntimeError: out of luck"


def test_other_shapes_of_the_peer_are_one_sentence(folder, monkeypatch):
    made = peers.of_sizes
    monkeypatch.setattr(peers, "_stated", lambda opened: {**made(opened.card.config), "cap_feat_dim": 20})
    with pytest.raises(Unsupported, match=r"builds cap_embedder.0.weight of shape \(20,\).*cannot run"):
        compare_with(folder, parts=["transformer"])


@pytest.mark.parametrize("name", ["diffusers", "transformers"])
def test_a_peer_that_is_missing_or_too_old_is_one_sentence(folder, monkeypatch, name):
    import types

    part = {"diffusers": "transformer", "transformers": "text_encoder"}[name]
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(Unsupported, match=f"{name} is not installed; pip install -U {name}"):
        compare_with(folder, parts=[part])
    old = types.ModuleType(name)
    old.__version__ = "0.1"
    monkeypatch.setitem(__import__("sys").modules, name, old)
    with pytest.raises(Unsupported, match=rf"{name} 0.1 has no \w+; pip install -U {name}"):
        compare_with(folder, parts=[part])


def test_the_peer_has_one_matrix_at_a_time(folder, monkeypatch):
    """A network of 6 billion weights needs no second copy."""
    held, most = [0], [0]
    numbers = lending.Lender.numbers

    def counted(self, name, dtype):
        found = numbers(self, name, dtype)
        if found.numel() > lending.KEPT:
            import weakref

            held[0] += 1
            most[0] = max(most[0], held[0])
            weakref.finalize(found, lambda: held.__setitem__(0, held[0] - 1))
        return found

    monkeypatch.setattr(lending, "KEPT", 256)
    monkeypatch.setattr(lending.Lender, "numbers", counted)
    assert compare_with(folder, parts=["transformer"], float64=True).passes
    assert most[0] == 1


def test_too_little_memory_is_said_before_anything_runs(folder, monkeypatch):
    monkeypatch.setattr(compare, "available", lambda: 10_000)
    monkeypatch.setattr(compare, "compare_network", None)
    with pytest.raises(OverBudget, match=r"comparing the transformer needs about .* 10 kB are free"):
        compare_with(folder)


def test_parts_that_a_folder_lacks_are_named(folder, tmp_path):
    (tmp_path / "vae").symlink_to(folder / "vae")
    report = compare_with(tmp_path)
    assert [c.name for c in report.components] == ["vae"]
    assert "has no file that is a Z-Image transformer" in report.left_out["transformer"]
    assert any(line.startswith("text_encoder: not compared: ") for line in report.lines())
    with pytest.raises(BadFile, match="has no file that is a Z-Image transformer"):
        compare_with(tmp_path, parts=["transformer", "vae"])


def test_a_broken_part_is_an_error_and_never_left_out(folder, tmp_path):
    """Else a cut download would pass."""
    (tmp_path / "vae").symlink_to(folder / "vae")
    (tmp_path / "transformer").mkdir()
    whole = next((folder / "transformer").glob("*.safetensors")).read_bytes()
    cut = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(whole[:-100])
    with pytest.raises(BadFile):
        compare_with(tmp_path)
    cut.rename(tmp_path / "loose.safetensors")
    (tmp_path / "transformer").rmdir()
    with pytest.raises(BadFile, match="unreadable"):
        compare_with(tmp_path)


def test_a_file_must_have_the_parts_that_are_named(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    with pytest.raises(Unsupported, match="wanted a file that has transformer, vae"):
        compare_with(file, parts=["transformer", "vae"])


def test_arguments_and_files_that_cannot_be_compared_are_refused(folder, tmp_path):
    for wrong in (
        {"against": "comfy"},
        {"parts": ["unet"]},
        {"steps": -1},
        {"steps": 0, "parts": ["latents"]},
    ):
        with pytest.raises(BadArgument, match=next(iter(wrong))):
            compare_with(folder, **wrong)
    with pytest.raises(BadFile):
        compare_with(tmp_path)


def test_nothing_of_float64_is_left_after_an_error():
    def fail():
        with in_float64():
            with in_float32():
                assert str(torch.ones(1).double().float().dtype) == "torch.float32"
            assert torch.float32 is torch.float64
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert str(torch.float32) == "torch.float32"
    assert torch.ones(1).double().float().dtype == torch.float32


def test_a_number_that_is_not_finite_is_outside_and_null():
    block = Block("layers.0", 1.0, float("nan"), 1e-6, float("inf"))
    assert not block.passes
    assert json.dumps(block.to_json(), allow_nan=False)


def test_a_report_of_nothing_does_not_pass():
    assert not ParityReport("a", "diffusers", {}, ()).passes


def test_two_files_of_one_network_are_an_error_and_never_left_out(tmp_path):
    for name in ("transformer", "text_encoder"):
        shutil.copy(embedded_files()[name], tmp_path / f"{name}.gguf")
    shutil.copy(embedded_files()["transformer"], tmp_path / "other.gguf")
    with pytest.raises(BadFile, match="has 2 files that are a Z-Image transformer"):
        compare_with(tmp_path)


def test_a_peer_that_cannot_be_imported_is_not_said_to_be_missing(monkeypatch):
    def fail(name):
        raise ImportError("cannot import name 'x' from 'huggingface_hub'", name="huggingface_hub")

    monkeypatch.setattr(peers, "import_module", fail)
    with pytest.raises(Unsupported, match=r"diffusers cannot be imported .*huggingface_hub"):
        peers.library("diffusers", "AutoencoderKL")
