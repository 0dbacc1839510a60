"""`zimage doctor` reports what is there and fails when something needed is not."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import torch

from zimage_core.cli import doctor


def test_it_names_versions_devices_and_where_things_run(zimage):
    facts = json.loads(zimage("doctor", "--json").out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["devices"][0]["name"] == "cpu"
    assert facts["devices"][0]["threads"] == torch.get_num_threads()
    assert facts["runs"][0].startswith("cpu")
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()


def test_a_missing_package_is_a_problem_and_status_1(zimage, monkeypatch):
    def version(name):
        if name == "sentencepiece":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    outcome = zimage("doctor")
    assert outcome.status == 1
    assert "sentencepiece is not installed" in outcome.out
