"""Greedy tokens are transformers' for each architecture, with heads that are tied and heads that are not."""

import pytest

from tests.helpers import greedy

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", list(greedy.KINDS))
def test_200_greedy_tokens_are_those_of_transformers(tmp_path, name):
    found = greedy.tiny(tmp_path, name)
    assert found.passes, found
