"""The VAE is diffusers' AutoencoderKL to 1e-5 in float32, both ways."""

import pytest

from tests.helpers import parity

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 48), (8, 8)])
def test_encode_and_decode_are_diffusers(height, width):
    # 1e-5: same float32 formula, other order of sums; values stay under 2
    for difference in parity.autoencoder_differences(height, width):
        assert difference.error <= 1e-5, difference
