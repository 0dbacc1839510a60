"""The text encoder is transformers' hidden_states[-2] to 1e-5 in float32, for each architecture it serves."""

import pytest

from tests.helpers import parity

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("length", [1, 8, 37, 130])
@pytest.mark.parametrize("arch", list(parity.ENCODERS))
def test_hidden_states_are_those_of_transformers(arch, length):
    # 1e-5: same float32 formula, other order of sums; values reach about 5
    difference = parity.text_encoder_difference(arch, length)
    assert difference.error <= 1e-5, difference
