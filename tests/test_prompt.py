import json
import re
import socket
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from framseg import config, prompt

PAPER = config.load("paper")
CONTROL = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", *prompt.ADDED)


@pytest.fixture(scope="module")
def published(shared):
    return prompt.load(shared / "tokenizer")


@pytest.fixture(scope="module")
def golden(shared):
    """The real query of val qid 2579, and its prompt's ids."""
    rows = (json.loads(line) for line in (shared / "qvhighlights/highlight_val_release.jsonl").open())
    query = next(row["query"] for row in rows if row["qid"] == 2579)
    return query, json.loads((shared / "golden/prompt_token_ids_qid2579.json").read_text())


def letters(merges=(), special=True, prefix="never"):
    """A character tokenizer with BLIP-3's control tokens, and the model section that fits its ids."""
    vocab = {character: i for i, character in enumerate(["<unk>", "▁", *map(chr, range(33, 127)), "\n"])}
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Metaspace()
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(token, rstrip=token.startswith("<|"), normalized=False) for token in CONTROL])
    ids = {name: tokenizer.token_to_id(spelling) for name, spelling in prompt.SPELLING.items()}
    tokens = config.Tokens(zero=tokenizer.token_to_id("0"), one=tokenizer.token_to_id("1"), **ids)
    return tokenizer, PAPER.model.model_copy(update={"tokens": tokens})


def saved(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    return prompt.load(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    tokenizer, model = letters()
    return saved(tokenizer, tmp_path_factory.mktemp("tokenizer")), model.tokens


def test_golden_ids(golden, published):
    query, expected = golden
    assert prompt.prompt_ids(published, PAPER.model.tokens, query, 25) == expected


def test_golden_ids_from_a_phi3_file_without_blip3s_tokens(shared, golden, tmp_path):
    """Phi-3's own file prepends a space to every part and ends before <pad>."""
    spec = json.loads((shared / "tokenizer/tokenizer.json").read_text())
    spec["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in prompt.ADDED]
    spec["truncation"] = {"direction": "Right", "max_length": 50, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = prompt.load(tmp_path / "tokenizer.json")
    query, expected = golden
    assert prompt.prompt_ids(tokenizer, PAPER.model.tokens, query, 25) == expected


def test_structural_ids_equal_the_chat_text(shared, published):
    """The ids are those of the chat form written as one text, its newlines swallowed by the control tokens."""
    whole = Tokenizer.from_file(str(shared / "tokenizer/tokenizer.json"))
    query, mask = "a dog, 2 cats & 한국어 🎈", "0110"
    text = (
        f"<|system|>\n{prompt.SYSTEM}<|end|>\n<|user|>\n{prompt.user_text(query, 4)}<|end|>\n<|assistant|>\n"
        f"{mask}<|end|>"
    )
    ids = prompt.prompt_ids(published, PAPER.model.tokens, query, 4)
    assert ids + prompt.answer_ids(PAPER.model.tokens, mask) == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("frames", [1, 4, 25, 100])
def test_frame_count_is_free(small, frames):
    tokenizer, tokens = small
    text = prompt.user_text("a dog", frames)
    assert f"You are given {frames} frames" in text
    assert f"from 0 to {frames - 1}:" in text
    assert f"provide a {frames} character" in text
    assert f"exactly {frames} characters" in text
    assert text.count("Frame ") == frames and f"Frame {frames - 1}: <image>\n\n**Your task**" in text
    ids = prompt.prompt_ids(tokenizer, tokens, "a dog", frames)
    assert ids.count(tokens.image) == frames
    assert ids[-2:] == [tokens.end, tokens.assistant]


QUERIES = st.lists(
    st.sampled_from([*CONTROL, "ابحث عن كلب", "שלום", "\u202e", "\u2028", "\0", "🎈", "dog " * 2000])
    | st.text(st.characters(exclude_categories=["Cs"])),
    min_size=1,
).map(lambda parts: "a dog" + " ".join(parts))


@given(query=QUERIES, frames=st.integers(1, 30))
def test_no_query_can_put_in_a_control_token(small, query, frames):
    tokenizer, tokens = small
    ids = prompt.prompt_ids(tokenizer, tokens, query, frames)
    plain = prompt.prompt_ids(tokenizer, tokens, "a dog", frames)
    control = {tokenizer.token_to_id(token) for token in CONTROL}
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    assert ids.count(tokens.image) == frames


@given(query=QUERIES)
def test_no_query_changes_the_prompt_around_it(published, query):
    """With the published vocabulary: what stands before and after the query's own ids is the same for all."""
    added = published.get_added_tokens_decoder()
    ids, plain = (prompt.prompt_ids(published, PAPER.model.tokens, text, 25) for text in (query, "a dog"))
    assert [i for i in ids if i in added] == [i for i in plain if i in added]
    first = plain.index(PAPER.model.tokens.image)
    last = len(plain) - plain[::-1].index(PAPER.model.tokens.image)
    assert ids[:last] == plain[:last] and ids[first] == PAPER.model.tokens.image and ids[-10:] == plain[-10:]


def test_no_query_can_put_in_a_control_token_of_the_published_vocabulary(published):
    added = set(published.get_added_tokens_decoder())
    query = "dog " + "\n".join(token.content for token in published.get_added_tokens_decoder().values())
    ids = prompt.prompt_ids(published, PAPER.model.tokens, query, 25)
    plain = prompt.prompt_ids(published, PAPER.model.tokens, "dog", 25)
    assert [i for i in ids if i in added] == [i for i in plain if i in added]


def test_query_is_one_line():
    assert "**Activity**: a dog runs  fast\n\n" in prompt.user_text("  a dog\r\n\n  runs  fast\u2028", 2)


@pytest.mark.parametrize("query", ["", "  ", "\n\t\n"])
def test_empty_query_is_refused(small, query):
    with pytest.raises(prompt.PromptError, match="query is empty"):
        prompt.prompt_ids(*small, query, 2)


def test_query_that_is_no_unicode_text_is_refused(small):
    with pytest.raises(prompt.PromptError, match="not valid Unicode"):
        prompt.prompt_ids(*small, "a \ud800 dog", 2)


def test_answer_ids():
    assert prompt.answer_ids(PAPER.model.tokens, "0110") == [29900, 29896, 29896, 29900, 32007]
    with pytest.raises(prompt.PromptError, match="other characters"):
        prompt.answer_ids(PAPER.model.tokens, "01 10")


def test_pad_left():
    ids, mask = prompt.pad_left([[1, 2, 3], [4]], pad=9)
    np.testing.assert_array_equal(ids, [[1, 2, 3], [9, 9, 4]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1]])
    assert ids.dtype == mask.dtype == np.int64


def test_pieces(small):
    tokenizer, tokens = small
    shown = prompt.pieces(tokenizer, [tokens.assistant, tokens.one, tokens.end, 10**6])
    assert [text for _, text in shown] == ["<|assistant|>", "1", "<|end|>", "not in the vocabulary"]


def test_check_measures_the_papers_sample(published, golden):
    report = prompt.check(published, PAPER.model, 25, golden[0])
    assert (report.zero, report.one) == (29900, 29896)
    assert report.masks_tried == 2046 + 4 + 10_000
    assert (report.prompt_ids, report.prompt_positions, report.sample_positions) == (420, 3595, 3621)
    assert report.digit_positions == tuple(range(3594, 3594 + 25))
    assert report.frames_outside == tuple(range(10))  # as the paper's window of 2047 has it
    assert report.frames_partly == (10,)
    off = PAPER.model.model_copy(update={"language": PAPER.model.language.model_copy(update={"sliding_window": None})})
    assert prompt.check(published, off, 25).frames_outside == ()


def test_check_refuses_what_does_not_fit_the_context(published):
    with pytest.raises(prompt.PromptError, match="context is 4096"):
        prompt.check(published, PAPER.model, 30)
    with pytest.raises(prompt.PromptError, match="shorter query"):
        prompt.check(published, PAPER.model, 25, query="dog " * 500)


def test_queries_that_leave_the_answer_no_room_are_named(tmp_path):
    tokenizer, model = letters()
    tokenizer = saved(tokenizer, tmp_path)
    spare = model.language.context - prompt.check(tokenizer, model, 4, query="a").sample_positions
    prompt.refuse_long(tokenizer, model, 4, {7: "a" * (1 + spare)})
    with pytest.raises(prompt.PromptError, match=r"\(qid 8: 1 tokens too many; qid 9: 3 tokens too many\): shorten"):
        prompt.refuse_long(tokenizer, model, 4, {7: "a", 8: "a" * (2 + spare), 9: "a" * (4 + spare)})


def test_check_accepts_a_small_tokenizer(tmp_path):
    tokenizer, model = letters()
    assert prompt.check(saved(tokenizer, tmp_path), model, 4).frames == 4


def test_check_refuses_merged_digits(tmp_path):
    tokenizer, model = letters(merges=[("0", "1")])
    with pytest.raises(prompt.PromptError, match="the mask '01' of 2 frames becomes the 1 tokens"):
        prompt.check(saved(tokenizer, tmp_path), model, 4)


def test_check_refuses_a_space_before_the_digits():
    tokenizer, model = letters(prefix="always")
    tokenizer.encode_special_tokens = True  # not through `load`, which would mend it
    with pytest.raises(prompt.PromptError, match="'▁', '0'.* instead of one digit token per frame"):
        prompt.check(tokenizer, model, 4)


def test_check_refuses_control_tokens_that_text_can_spell(tmp_path):
    tokenizer, model = letters(special=False)
    with pytest.raises(prompt.PromptError, match="in a query for the control token itself"):
        prompt.check(saved(tokenizer, tmp_path), model, 4)


def test_check_refuses_other_ids(tmp_path):
    tokenizer, _ = letters()
    with pytest.raises(prompt.PromptError, match=re.escape("'<|assistant|>' the id 97, the profile's is 32001")):
        prompt.check(saved(tokenizer, tmp_path), PAPER.model, 4)


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(prompt.PromptError, match="no such tokenizer file"):
        prompt.load(tmp_path / "absent" / "tokenizer.json")
    with pytest.raises(prompt.PromptError, match="no tokenizer.json in this folder"):
        prompt.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(prompt.PromptError, match="not a tokenizer that can be read"):
        prompt.load(tmp_path)


def test_load_without_a_network_fails_soon_and_clearly(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(prompt.PromptError, match="set model.tokenizer to the path"):
        prompt.load("nobody/nothing")
    assert time.monotonic() - start < 10


def test_of_several_tokenizers_the_first_that_fits_is_taken(tmp_path):
    tokenizer, _ = letters()
    saved(tokenizer, tmp_path)
    demo = config.load("demo").model.tokenizer
    names = [str(tmp_path / "absent" / "tokenizer.json"), str(tmp_path), demo]
    profile = config.load("demo", {"model.tokenizer": names})
    assert (
        prompt.fitting(profile).to_str() == prompt.fitting(config.load("demo")).to_str() == prompt.load(demo).to_str()
    )
    for few, words in ((names[:2], f"no tokenizer fits: {names[0]}: no such .*; {names[1]}: the tokenizer gives"),
                       (names[1], f"no tokenizer fits: {names[1]}: the tokenizer gives")):  # fmt: skip
        with pytest.raises(prompt.PromptError, match=words):
            prompt.fitting(config.load("demo", {"model.tokenizer": few}))
    with pytest.raises(config.ProfileError, match="model.tokenizer"):
        config.load("demo", {"model.tokenizer": "[]"})
