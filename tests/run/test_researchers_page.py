"""Every snippet of docs/guides/researchers.md runs, twice as in a notebook, and gives what the page says."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.tree import ROOT

FIRST, *SNIPPETS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/guides/researchers.md").read_text(), re.DOTALL
)


def run(*snippets):
    names = {}
    for snippet in (FIRST, *snippets):
        exec(snippet.replace("set_timesteps(8)", "set_timesteps(2)"), names)
    return names


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split("\n")[0][:40])
def test_a_snippet_runs_twice(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(snippet, "" if "scheduler.step" in snippet else snippet)
    if "seen = []" in snippet:
        assert names["seen"]
    if "num_parameters" in snippet:
        assert names["pipe"].transformer.num_parameters() > 1_000_000
    if "scheduler.step" in snippet:
        pipe = names["pipe"]
        wanted = pipe("a red circle", seed=1, num_inference_steps=2, output_type="pt").images
        pixels = (names["image"] / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-4)
    if "save_pretrained" in snippet:
        mine, again = names["pipe"].transformer, names["again"].transformer
        assert again.num_parameters() == mine.num_parameters()
        assert names["again"].sample_size == names["pipe"].sample_size
