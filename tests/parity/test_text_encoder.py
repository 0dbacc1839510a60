"""The text encoder is transformers' hidden_states[-2] for each architecture it serves.

The limits are derived in tests/helpers/parity.py.
"""

import pytest

from tests.helpers import parity

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("length", [1, 8, 37, 130])
@pytest.mark.parametrize("arch", list(parity.ENCODERS))
def test_hidden_states_are_those_of_transformers(arch, length):
    difference = parity.text_encoder_difference(arch, length)
    assert difference.passes, difference
