"""S3-DiT with images among the text is diffusers' block by block; limits as in tests/helpers/parity.py."""

import pytest

from tests.helpers import omni_parity

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("case", omni_parity.CASES)
def test_every_block_is_diffusers(case):
    for difference in omni_parity.differences(case):
        assert difference.passes, difference
