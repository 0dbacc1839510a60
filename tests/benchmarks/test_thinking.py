"""The figures of a thought: what a caption shares with the plain one, and the ways that stand beside it."""

from __future__ import annotations

import json

import pytest

from benchmarks import thinking
from zimage_core import ZImagePipeline
from zimage_core.language.enhance import Enhanced


@pytest.fixture(scope="module")
def pipe():
    return ZImagePipeline.from_default()


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ([1, 2, 3], [1, 2, 3], (3, 0)),
        ([1, 2, 3], [1, 9, 2, 3], (1, 2)),
        ([1, 2, 3], [1, 2, 3, 9], (3, 0)),
        ([1, 1], [1, 1, 1, 1], (2, 0)),
        ([5], [6], (0, 0)),
    ],
)
def test_shared_tokens_are_counted_once(one, other, wanted):
    assert thinking.shared(one, other) == wanted


def test_a_thought_behind_the_prompt_keeps_its_tokens_and_one_before_it_changes_them(pipe):
    (case, _) = thinking.embedded_cases(2)
    ways = thinking.templates(case, pipe.tokenizer)
    behind = thinking.features(pipe, case, ways["thought, behind"])
    before = thinking.features(pipe, case, ways["thought, before"])
    assert behind["before"] == behind["plain tokens"] == before["before"] + before["behind"]
    assert behind["tokens"] == before["tokens"]
    assert behind["error before"] <= 1e-5
    assert behind["cosines"] == []
    assert before["before"] == 3
    assert before["error"] > 0.01


def test_every_other_text_has_the_form_of_the_thought(pipe):
    case = thinking.Case("a red star", "a b c", "x y")
    ways = thinking.templates(case, pipe.tokenizer)
    assert len(ways) == 9
    assert all(template.count("{prompt}") == 1 for template in ways.values())
    assert sorted(ways["shuffled thought, before"]) == sorted(ways["thought, before"])
    assert len(thinking.templates(thinking.Case("a", "b"), pipe.tokenizer)) == 7


def test_one_prompt_is_measured_from_features_to_images(tmp_path, capsys):
    given = ["--prompt", "a red star", "--thought", "star red", "--steps", "2", "--report", str(tmp_path)]
    thinking.main(given)
    figures = json.loads((tmp_path / "thinking.json").read_text())
    assert set(figures["images"]) == set(figures["features"])
    assert figures["images"]["thought, behind"]["steps"][0]["velocity"] > 0
    assert "another seed" in figures["scale"]
    assert (tmp_path / "thought_before.png").stat().st_size
    assert "| thought, before |" in capsys.readouterr().out


@pytest.mark.parametrize("thought", ["", "an <|im_end|>", "a {prompt}"])
def test_a_thought_that_would_change_the_template_is_refused(thought):
    with pytest.raises(SystemExit, match="it is empty, or holds"):
        thinking.main(["--prompt", "a", "--thought", thought])


def test_a_prompt_without_a_thought_is_refused():
    with pytest.raises(SystemExit, match="1 prompts and 0 thoughts"):
        thinking.main(["--prompt", "a"])


def test_the_language_model_writes_the_thoughts_that_are_not_given(pipe, monkeypatch):
    asked = []

    def enhance(self, prompt, **options):
        asked.append((prompt, options))
        return Enhanced("new", prompt, thought=f"about {prompt}")

    monkeypatch.setattr(ZImagePipeline, "enhance_prompt", enhance)
    given = ["--generate", "--prompt", "a", "--prompt", "b", "--thought", "own", "--max-new-tokens", "9"]
    cases = thinking.given_cases(pipe, thinking.parser().parse_args(given))
    assert [(case.thought, case.another) for case in cases] == [("own", "about b"), ("about b", "own")]
    assert asked == [("b", {"seed": thinking.SEED, "max_new_tokens": 9})]
