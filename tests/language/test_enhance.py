"""A prompt written anew: thought and answer apart, limits, JSON, and what is refused."""

import pytest

from tests.language.scripted import TOKENIZER, Scripted
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.language import instructions
from zimage_core.language.enhance import CLOSED, RESERVE, Wish, enhance, revised
from zimage_core.language.generate import stop_ids

STOP = stop_ids(TOKENIZER)
THOUGHT = "<think>\nA cat. 猫\n</think>\n\nA red cat on a chair."


def written(text, on_text=None, **options):
    """The prompt that a model writes with this text, and the model."""
    ours = Scripted(text)
    wish = Wish.of("a cat", temperature=0, **options)
    return enhance(ours, TOKENIZER, wish, STOP, on_text), ours


def test_thought_and_answer_are_told_apart():
    found, ours = written(THOUGHT)
    assert (found, found.thought, found.original) == ("A red cat on a chair.", "A cat. 猫", "a cat")
    assert found.tokens == len(TOKENIZER.encode(THOUGHT)) + 1
    assert ours.text.endswith("<|im_start|>assistant\n" + THOUGHT)


def test_the_thought_may_be_kept_before_the_prompt():
    found, _ = written(THOUGHT, keep_thought=True)
    assert found == "<think>\nA cat. 猫\n</think>\n\nA red cat on a chair."
    assert found.settings["enhanced"]["keep_thought"] is True
    ids = TOKENIZER.encode(found)  # which are control tokens to the encoder of the caption
    assert [ids.count(TOKENIZER.added_tokens[token]) for token in ("<think>", "</think>")] == [1, 1]


def test_without_thinking_the_block_is_empty_and_all_is_answer():
    found, ours = written("A red cat.", think=False)
    assert (found, found.thought) == ("A red cat.", "")
    assert ours.text.endswith("assistant\n<think>\n\n</think>\n\nA red cat.")


def test_a_model_that_does_not_think_answers_at_once():
    found, _ = written("A red cat.")
    assert (found, found.thought) == ("A red cat.", "")


def test_a_thought_whose_beginning_is_not_written_ends_at_its_end():
    found, _ = written("A cat.</think>A red cat.")
    assert (found, found.thought) == ("A red cat.", "A cat.")


@pytest.mark.parametrize(("limit", "thought"), [(40, 20), (RESERVE * 4, RESERVE * 3)])
def test_a_thought_without_end_is_closed_in_time_for_the_answer(limit, thought):
    # the script goes on where the closed block was read, with what it has left
    with pytest.warns(UserWarning, match=f"the thought was ended after {thought} tokens"):
        found, ours = written("<think>" + "a" * (thought - 1) + "done", max_new_tokens=limit)
    assert found == "done"
    assert found.thought == "a" * (thought - 1)
    assert ours.text.endswith("a\n</think>\n\ndone")


@pytest.mark.parametrize("room", [8, 40, 700])
def test_a_thought_is_closed_before_the_positions_of_the_model_are_used_up(room):
    wish = Wish.of("a cat", temperature=0, max_new_tokens=1000)
    ours = Scripted("<think>" + "a" * 1000, len(wish.ids(TOKENIZER)) + room)
    with pytest.warns(UserWarning, match="shorten prompt and instructions"):
        found = enhance(ours, TOKENIZER, wish, STOP)
    assert found.tokens == room - len(TOKENIZER.encode(CLOSED))
    assert len(ours.read) < ours.max_positions


@pytest.mark.parametrize("room", [0, 2])
def test_no_room_for_an_answer_is_said(room):
    wish = Wish.of("a cat")
    ours = Scripted("", len(wish.ids(TOKENIZER)) + room)
    with pytest.raises(BadArgument, match=r"leave no room for an answer .* shorten them"):
        enhance(ours, TOKENIZER, wish, STOP)


def test_a_thought_that_stops_is_followed_by_an_answer():
    found, ours = written("<think>hm<|im_end|>A cat.")
    assert (found, found.thought) == ("A cat.", "hm")
    assert "hm\n</think>\n\nA cat." in ours.text


def test_an_answer_without_end_is_cut_and_that_is_said():
    with pytest.warns(UserWarning, match="cut after 10 tokens; give more than max_new_tokens=10"):
        found, _ = written("a" * 1000, think=False, max_new_tokens=10)
    assert found == "a" * 10
    assert found.tokens == 10


def test_control_tokens_of_an_answer_are_no_part_of_the_prompt():
    found, _ = written("A <|im_start|>red<think> cat.", think=False)
    assert found == "A red cat."


@pytest.mark.parametrize("text", ["", "<think>hm</think>", " \n"])
def test_no_prompt_at_all_is_an_error(text):
    with pytest.raises(Unsupported, match="wrote no prompt; take another seed"):
        written(text)


def test_text_is_given_as_it_is_written():
    pieces = []
    written("<think>猫</think>A cat.", lambda text, thought: pieces.append((text, thought)))
    assert pieces == [("猫", True), *((c, False) for c in "A cat."), ("\n", False)]


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ('Here:\n```json\n{"revised_prompt": "a \\"red\\" cat", "n": 1}\n```\nDone', 'a "red" cat'),
        ('{"other": 1} {"revised_prompt": "two"}', "two"),
        ('{"revised_prompt": 3}', '{"revised_prompt": 3}'),
        ('{"revised_prompt": "cut', '{"revised_prompt": "cut'),
        ("{" * 3000, "{" * 3000),
        ("[" * 100_000, "[" * 100_000),
        ("plain\0 text", "plain text"),
    ],
)
def test_json_counts_where_the_instructions_ask_for_it(answer, want):
    assert revised(answer, "Answer with revised_prompt in JSON.") == want
    assert revised(answer, "Answer.") == answer.replace("\0", "")


@pytest.mark.parametrize(
    ("prompt", "chinese"),
    [
        ("a cat", False),
        ("一只猫", True),
        ("a sign that says 猫", False),
        ("写着 OPEN 的红色招牌", True),
        ("42", False),
    ],
)
def test_instructions_are_in_the_language_of_the_prompt(prompt, chinese):
    assert instructions.own(prompt) is (instructions.CHINESE if chinese else instructions.ENGLISH)


def test_settings_tell_what_made_it():
    own = written("A cat.", think=False, seed=9)[0].settings
    assert own["original_prompt"] == "a cat"
    assert own["enhanced"] == {
        "seed": 9, "temperature": 0, "top_p": 0.8, "top_k": 20, "think": False, "max_new_tokens": 1024,
        "instructions": "own, English",
    }  # fmt: skip
    assert written("A cat.", instructions="Do it.")[0].settings["enhanced"]["instructions"] == "Do it."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " \n"}, "prompt: it is empty"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": "a" * 20_000}, "shorten it"),
        ({"instructions": ""}, "instructions: they are empty"),
        ({"instructions": 3}, "text of the instructions is a int, a string was expected"),
        ({"max_new_tokens": 1}, "from 2 to 65536"),
        ({"think": False, "keep_thought": True}, "no thought to keep"),
    ],
)
def test_bad_wishes_are_refused(options, message):
    with pytest.raises(BadArgument, match=message):
        Wish.of(**{"prompt": "a cat", **options})
