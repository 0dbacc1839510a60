"""Arguments of a wrong type are refused by name before anything is read or made."""

import pytest

from zimage_core import BadArgument
from zimage_core.batch import generate_dataset
from zimage_core.batch.model import Model


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": None}, {"rows": 5}, {"rows": {"prompt": "a"}}, {"rows": b"a"},
        {"out": None}, {"out": ""}, {"out": "a\0b"}, {"pipe": 5}, {"keep": "id,source"}, {"keep": None},
        {"defaults": ["steps"]}, {"on_progress": 5}, {"model": 5}, {"controlnets": [None]},
    ],
    ids=lambda wrong: "-".join(f"{name}={type(value).__name__}" for name, value in wrong.items()),
)  # fmt: skip
def test_a_wrong_type_is_named(wrong, tmp_path):
    given = {"rows": [{"prompt": "a", "id": 1}], "out": tmp_path / "out", **wrong}
    with pytest.raises(BadArgument, match=f"^{next(iter(wrong))}: got "):
        generate_dataset(**given)
    assert not (tmp_path / "out").exists()


def test_one_controlnet_needs_no_list():
    assert Model.of({"controlnets": "edges"}) == Model.of({"controlnets": ["edges"]})
