"""Generation: where it ends, what it never chooses, and text that comes in pieces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.language.scripted import TOKENIZER, Scripted
from tests.models.test_language_model import model
from zimage_core.errors import BadArgument
from zimage_core.language.generate import TextStream, generate, stop_ids
from zimage_core.language.sampling import Sampling
from zimage_core.text.byte_pairs import byte_alphabet

START = TOKENIZER.encode("go")


def test_a_stop_token_ends_the_text_and_is_not_in_it():
    found = generate(Scripted("abc"), START, 50, stop=stop_ids(TOKENIZER))
    assert TOKENIZER.decode(found.ids) == "abc"
    assert found.stopped


def test_text_without_an_end_is_bounded_by_the_limit():
    seen = []
    found = generate(Scripted("a" * 100), START, 7, on_token=seen.append)
    assert TOKENIZER.decode(found.ids) == "a" * 7 == TOKENIZER.decode(seen)
    assert not found.stopped


def test_text_is_bounded_by_the_positions_of_the_model():
    ours = Scripted("a" * 100, max_positions=len(START) + 5)
    assert len(generate(ours, START, 50).ids) == 5
    assert ours.read[len(START) :] == TOKENIZER.encode("aaaa")  # the last one need not be read


def test_each_token_is_read_once_and_in_order():
    ours = Scripted("abc")
    generate(ours, START, 3)
    assert ours.text == "goab"
    assert ours.calls == 3


def test_a_model_of_random_weights_repeats_itself_with_a_seed():
    ours, sampling = model(), Sampling(1.0, seed=4)
    one, again = (generate(ours, [1, 2, 3], 20, sampling) for _ in range(2))
    other = generate(ours, [1, 2, 3], 20, Sampling(1.0, seed=5))
    assert one == again != other


def test_rows_of_the_table_that_are_no_tokens_are_not_chosen():
    ours = model()
    with torch.no_grad():
        ours.ending.head.weight[60:] *= 100
    free, bounded = (generate(ours, [1], 30, vocabulary=n).ids for n in (None, 60))
    assert max(free) >= 60 > max(bounded)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, 10**9, 10**400])
def test_a_number_of_tokens_out_of_range_is_refused(count):
    with pytest.raises(BadArgument, match=r"^max_new_tokens: got .*, wanted an integer from 1 to 65536"):
        generate(Scripted("a"), START, count)


def test_nothing_cannot_be_continued_and_too_much_is_refused():
    with pytest.raises(BadArgument, match="nothing to continue"):
        generate(Scripted("a"), [], 3)
    with pytest.raises(BadArgument, match=r"2 tokens with its instructions, .* at most 1; shorten it"):
        generate(Scripted("a", max_positions=1), START, 3)


def test_the_end_of_a_text_that_the_file_states_counts_too():
    own = stop_ids(TOKENIZER)
    assert own == {256, 258}
    assert stop_ids(TOKENIZER, {"tokenizer.ggml.eos_token_id": 7}) == own | {7}


# pieces are whole: a text of one's own U+FFFD is held back until more follows, and is not lost
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_characters_cut_between_tokens_come_whole(text):
    stream = TextStream(TOKENIZER)  # each byte is a token
    text = TOKENIZER.decode(TOKENIZER.encode(text))  # in NFC
    pieces = [stream.add(token) for token in TOKENIZER.encode(text)]
    assert "".join([*pieces, stream.end()]) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text


@given(st.lists(st.sampled_from([65, 0x80, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0xFF, 32])))
def test_any_bytes_give_the_text_that_they_are_at_once(raw):
    ids = [list(byte_alphabet().values()).index(byte) for byte in raw]
    stream = TextStream(TOKENIZER)
    assert "".join([*map(stream.add, ids), stream.end()]) == bytes(raw).decode("utf-8", "replace")


def test_a_long_text_is_not_decoded_for_each_token():
    class Counting:
        most = 0

        def decode(self, ids):
            self.most = max(self.most, len(ids))
            return TOKENIZER.decode(ids)

    counting = Counting()
    stream = TextStream(counting)
    assert "".join(stream.add(token) for token in TOKENIZER.encode("a猫" * 50)) == "a猫" * 50
    assert counting.most <= 5


def test_a_character_that_never_ends_is_shown_as_such():
    stream = TextStream(TOKENIZER)
    assert [stream.add(token) for token in TOKENIZER.encode("é")[:1]] == [""]
    assert stream.end() == "\ufffd"
