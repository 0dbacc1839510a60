"""The VAE is diffusers' AutoencoderKL, both ways; the limits are derived in tests/helpers/parity.py."""

import pytest

from tests.helpers import parity

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 48), (8, 8)])
def test_encode_and_decode_are_diffusers(height, width):
    for difference in parity.autoencoder_differences(height, width):
        assert difference.passes, difference
