import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LogitsProcessor, Phi3ForCausalLM
from transformers.generation import LogitsProcessorList

from framseg import config, dataset, decode, frames, moments, prompt
from framseg.annotations import Row
from framseg.backbones import blip3
from framseg.predictions import matched

FRAMES = 5
TINY = {
    "frames.count": FRAMES,
    "model.dtype": "float32",
    "model.attention": "sdpa",
    "model.vision": dict(hidden_size=24, intermediate_size=32, layers=1, heads=2, image_size=28, patch_size=14),
    "model.resampler": {"latents": 3, "layers": 1, "heads": 2, "head_dim": 8},
    "model.language": dict(
        hidden_size=32, intermediate_size=48, layers=2, heads=4, context=512, vocab_size=320, used_vocab=300
    ),
    "model.language.initializer_range": 0.3,  # at the usual 0.02 a random model prefers nothing
    "model.tokens": {"zero": 50, "one": 49, "assistant": 291, "end": 292, "pad": 299, "image": 300},
}
PUBLISHED = {  # of the golden model
    "model.vision": dict(hidden_size=72, intermediate_size=144, layers=3, heads=4, image_size=56, patch_size=14),
    "model.resampler": {"latents": 8, "layers": 6, "heads": 16, "head_dim": 96},
    "model.language": TINY["model.language"] | dict(hidden_size=96, intermediate_size=192, layers=3),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(seed=0, window=None, attention="sdpa", **more):
    profile = config.load(
        "paper", TINY | {"model.language.sliding_window": window, "model.attention": attention} | more
    )
    torch.manual_seed(seed)
    return blip3.Blip3(profile.model).eval(), profile


def samples(model, seed=0, extra=(0, 4, 1)):
    """Vision tokens and prompts of different lengths, padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for more in extra:
        text = torch.randint(60, 280, (FRAMES + 3 + more,), generator=draw).tolist()
        ids = [i for word in text[:FRAMES] for i in (word, model.section.tokens.image)]
        rows.append([*ids, *text[FRAMES:], model.section.tokens.assistant])
    ids, mask = map(torch.from_numpy, prompt.pad_left(rows, model.section.tokens.pad))
    width = model.section.language.hidden_size
    vision = torch.randn(len(rows), FRAMES, model.section.resampler.latents, width, generator=draw) * 0.3
    return vision, ids, mask


@torch.inference_mode()
def log_softmax(model, vision, ids, answers):
    """[answers, 2], of the digit after each: the whole prompt anew, without padding or cache."""
    tokens = model.section.tokens
    ids = torch.tensor([ids.tolist() + [(tokens.zero, tokens.one)[digit] for digit in answer] for answer in answers])
    last = torch.full((len(ids), 1), ids.shape[1] - 1)
    vision = vision.expand(len(ids), -1, -1, -1)
    logits = model(None, ids, torch.ones_like(ids), positions=last, vision_tokens=vision)
    return model.digit_logits(logits)[:, 0].float().log_softmax(-1).numpy()


def plain_search(model, vision, ids, steps, beams):
    """[(mask, score, probabilities of '1'), ...], best first."""
    best = [((), np.float32(0), [])]
    for _ in range(steps):
        after = log_softmax(model, vision, ids, [answer for answer, *_ in best])
        longer = [
            ((*answer, digit), score + log_p[digit], [*ones, np.exp(log_p[1])])
            for (answer, score, ones), log_p in zip(best, after, strict=True)
            for digit in (0, 1)
        ]
        best = sorted(longer, key=lambda beam: -beam[1])[:beams]
    return best


def assert_same(decoded, row, expected):
    assert [tuple(mask) for mask in decoded.masks[row].tolist()] == [answer for answer, *_ in expected]
    np.testing.assert_allclose(decoded.scores[row], [score for _, score, _ in expected], atol=2e-5)
    np.testing.assert_allclose(decoded.probabilities[row], [ones for *_, ones in expected], atol=2e-5)


# A window of 1 makes ties of rounding's grace with many beams: all answers with the same pairs of digits are equal.
@pytest.mark.parametrize("beams, window", [(2, 1), *itertools.product([1, 2, 3, 4, 8], [None, 3, 16])])
def test_beam_search_is_that_of_the_plain_reference(beams, window):
    model, _ = tiny(seed=beams, window=window)
    vision, ids, mask = samples(model, seed=beams)
    decoded = decode.beam_search(model, vision, ids, mask, FRAMES, beams)
    assert decoded.masks.dtype == torch.int8 and decoded.masks.shape == (3, beams, FRAMES)
    for row in range(len(ids)):
        assert_same(decoded, row, plain_search(model, vision[row], ids[row, mask[row] == 1], FRAMES, beams))


def test_random_models_make_the_search_turn_to_other_beams():
    """Otherwise the comparison above would not show whether beams keep their own past."""
    turned = 0
    for seed in range(4):
        model, _ = tiny(seed=seed)
        batch = samples(model, seed=seed)
        greedy, wide = (decode.beam_search(model, *batch, FRAMES, beams) for beams in (1, 4))
        assert (wide.scores[:, 0] >= greedy.scores[:, 0] - 1e-5).all()
        turned += int((wide.masks[:, 0] != greedy.masks[:, 0]).any(dim=1).sum())
    assert turned > 0


@pytest.mark.parametrize("steps", [1, 3])
def test_enough_beams_give_every_mask_in_the_order_of_its_probability(steps):
    model, _ = tiny(seed=3, window=8)
    vision, ids, mask = samples(model)
    decoded = decode.beam_search(model, vision, ids, mask, steps, 2**steps + 5)  # more than there are masks
    assert decoded.masks.shape == (3, 2**steps, steps)
    np.testing.assert_allclose(decoded.scores.exp().sum(1), np.ones(3), atol=1e-5)
    for row in range(3):
        prefix = ids[row, mask[row] == 1]
        score = {
            answer: sum(log_softmax(model, vision[row], prefix, [answer[:i]])[0, d] for i, d in enumerate(answer))
            for answer in itertools.product((0, 1), repeat=steps)
        }
        expected = sorted(score, key=score.get, reverse=True)
        assert [tuple(answer) for answer in decoded.masks[row].tolist()] == expected


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_ties_keep_the_order_of_the_parents_and_zero_first(bias):
    model, _ = tiny()
    tokens, head = model.section.tokens, model.lang_model.lm_head
    with torch.no_grad():
        head.weight.zero_()
        head.bias[tokens.one] = bias
    vision, ids, mask = samples(model)
    for beams in (1, 3, 8):
        decoded = decode.beam_search(model, vision, ids, mask, FRAMES, beams)
        expected = plain_search(model, vision[0], ids[0, mask[0] == 1], FRAMES, beams)
        for row in range(3):
            assert_same(decoded, row, expected)
        if not bias:
            masks = ["".join(map(str, answer)) for answer in decoded.masks[0].tolist()]
            assert masks == [f"{n:05b}" for n in range(beams)]


def test_the_librarys_generate_finds_the_same():
    model, _ = tiny(seed=1, window=12)
    vision, ids, mask = samples(model, seed=1)
    library = Phi3ForCausalLM(model.lang_model.model.config).eval()
    library.model, library.lm_head = model.lang_model.model, model.lang_model.lm_head
    tokens = model.section.tokens
    digits = torch.tensor([tokens.zero, tokens.one])

    class OnlyDigits(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_copy(1, digits, scores[:, digits])

    embeds, long_mask, _ = model.expand(ids, mask, vision)
    for beams in (2, 4):
        with torch.inference_mode():
            out = library.generate(
                inputs_embeds=embeds,
                attention_mask=long_mask,
                max_new_tokens=FRAMES,
                num_beams=beams,
                num_return_sequences=beams,
                do_sample=False,
                length_penalty=0.0,
                logits_processor=LogitsProcessorList([OnlyDigits()]),
                renormalize_logits=True,  # the library masks log-probabilities over all ids, not logits
                return_dict_in_generate=True,
                output_scores=True,
                pad_token_id=tokens.pad,
            )
        decoded = decode.beam_search(model, vision, ids, mask, FRAMES, beams)
        assert torch.equal(decoded.masks.flatten(0, 1), (out.sequences == tokens.one).to(torch.int8))
        torch.testing.assert_close(decoded.scores.flatten(), out.sequences_scores, atol=2e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_gives_the_same_and_stays_chosen(attention):
    model, _ = tiny(window=6, attention=attention)
    vision, ids, mask = samples(model)
    decoded = decode.beam_search(model, vision, ids, mask, FRAMES, 2)
    assert model.lang_model.model.config._attn_implementation == attention
    assert_same(decoded, 0, plain_search(model, vision[0], ids[0, mask[0] == 1], FRAMES, 2))


def test_prompt_is_read_once_and_the_head_never_over_the_vocabulary(monkeypatch):
    model, _ = tiny()
    lengths = []
    model.lang_model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape))
    monkeypatch.setattr(blip3.SplitHead, "forward", None)
    vision, ids, mask = samples(model)
    decode.beam_search(model, vision, ids, mask, FRAMES, 4)
    longest = ids.shape[1] + FRAMES * 2
    assert [tuple(shape[:2]) for shape in lengths] == [(3, longest), (3, 2), (3, 4), (3, 4), (3, 4)]


@pytest.mark.parametrize("name, window", [("full_attention", None), ("sliding_window_16", 16)])
def test_probabilities_along_the_golden_answer(shared, name, window):
    """Among all 32 masks is the golden one, and its probabilities are those of the original's logits."""
    io = load_file(shared / f"golden/blip3_tiny_io_{name}.safetensors")
    profile = config.load("paper", TINY | PUBLISHED | {"model.language.sliding_window": window})
    model = blip3.Blip3(profile.model).eval()
    model.load_state_dict(load_file(shared / "golden/blip3_tiny_weights.safetensors"))
    ids, tokens = io["input_ids"], profile.model.tokens
    begin = ids[0].tolist().index(tokens.assistant) + 1
    prompts = ids[:, :begin], io["attention_mask"][:, :begin]
    decoded = decode.beam_search(model, model.vision_tokens(io["pixel_values"]), *prompts, FRAMES, 32)
    after = io["logits"].shape[1] - 1 - FRAMES  # the last position is that of <|end|>
    expected = model.digit_logits(io["logits"])[:, after - 1 : after - 1 + FRAMES].log_softmax(-1)
    answers = (ids[:, begin : begin + FRAMES] == tokens.one).to(torch.int8)
    for row, answer in enumerate(answers):
        (at,) = (decoded.masks[row] == answer).all(dim=1).nonzero()
        torch.testing.assert_close(decoded.probabilities[row, at[0]], expected[row, :, 1].exp(), atol=5e-6, rtol=0)
        score = expected[row].gather(1, answer[:, None].long()).sum()
        torch.testing.assert_close(decoded.scores[row, at[0]], score, atol=2e-5, rtol=0)


def test_unusable_prompts_are_refused():
    model, _ = tiny()
    vision, ids, mask = samples(model)
    with pytest.raises(ValueError, match="padded on the left"):
        decode.beam_search(model, vision, ids.flip(1), mask.flip(1), FRAMES, 2)
    with pytest.raises(ValueError, match="at least 1"):
        decode.beam_search(model, vision, ids, mask, FRAMES, 0)
    model, _ = tiny(**{"model.language.context": 32})
    with pytest.raises(ValueError, match="33 of 32 positions"):
        decode.beam_search(model, vision, ids, mask, FRAMES, 2)


# ---- whole splits ----------------------------------------------------------------------------------------------------

ROWS = [
    Row(qid, query, duration, vid)
    for qid, query, duration, vid in [
        (7, "a dog runs", 150, "b"),
        (3, "two people talk in a kitchen", 126, "a"),
        (1, "someone swims", 20, "c"),
        (2, "a boat", 20, "c"),
        (9, "a red car — drives away", 150, "b"),
        (5, "the same dog", 150.0, "b"),
    ]
]


def prepared(tmp_path) -> SimpleNamespace:
    """A tiny model that reads real prompts, and a frame store with the videos a, b and c."""
    published = config.load("paper").model
    sizes = published.language.model_dump(include={"context", "vocab_size", "used_vocab"})
    profile = config.load(
        "paper",
        TINY
        | {"model.language": TINY["model.language"] | sizes, "model.tokens": published.tokens.model_dump()}
        | {"model.tokenizer": "framseg/demo/base", "model.language.sliding_window": None}
        | {"data.folder": str(tmp_path / "data"), "inference.batch": 2},
    )
    torch.manual_seed(0)
    store = dataset.store(profile)
    store.folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for vid in "abc":
        store.write(vid, draw.integers(256, size=(FRAMES, 3, 28, 28, 3), dtype=np.uint8), {})
    return SimpleNamespace(
        model=blip3.Blip3(profile.model).eval(),
        tokenizer=prompt.load(profile.model.tokenizer),
        profile=profile,
        store=store,
        path=tmp_path / "out" / "val.jsonl",
    )


@pytest.fixture
def setup(tmp_path):
    return prepared(tmp_path)


def run(setup, rows=ROWS, **changes):
    made = SimpleNamespace(**vars(setup) | changes)
    return decode.split(made.model, made.tokenizer, made.profile, rows, made.path)


def alone(setup, row):
    """What beam search gives for one query, from its video's middle frames."""
    ids = torch.tensor([prompt.prompt_ids(setup.tokenizer, setup.profile.model.tokens, row.query, FRAMES)])
    images = torch.from_numpy(setup.store.read(row.vid)).permute(0, 3, 1, 2)[None]
    with torch.inference_mode():
        return decode.beam_search(setup.model, setup.model.vision_tokens(images), ids, torch.ones_like(ids), FRAMES, 2)


def test_split_answers_every_row_in_order_and_encodes_a_video_once(setup):
    encoded = []
    setup.model.vision_tokenizer.register_forward_hook(lambda _, args, out: encoded.append(len(out) // FRAMES))
    setup.model.train()
    records = run(setup)
    assert not setup.model.training
    assert sum(encoded) == 3  # six queries about three videos, of which none stands with all of its own
    assert [record["qid"] for record in records] == [row.qid for row in ROWS]
    assert records == [json.loads(line) for line in setup.path.read_text().splitlines()]
    assert list(setup.path.parent.iterdir()) == [setup.path]
    inference = setup.profile.inference
    for row, record in zip(ROWS, records, strict=True):
        expected = alone(setup, row)
        mask, t = record["mask"], row.duration
        assert {name: record[name] for name in ("query", "vid", "duration")} == {
            "query": row.query,
            "vid": row.vid,
            "duration": t,
        }
        digits = "".join(map(str, expected.masks[0, 0].tolist()))
        assert record["valid"] == ("1" in digits) and mask == (digits if record["valid"] else "1" * FRAMES)
        np.testing.assert_allclose(record["probability"], expected.probabilities[0, 0], atol=1e-5)
        assert record["pred_relevant_windows"] == moments.windows(mask, record["probability"], t, inference.windows)
        chosen = moments.saliency(record["probability"], t, inference.saliency).tolist()
        assert record["pred_saliency_scores"] == chosen
    assert len({record["mask"] for record in records}) > 1
    matched(records, ROWS)


def test_profile_chooses_windows_and_saliency(setup):
    inference = setup.profile.inference.model_copy(update={"windows": "thresholds", "saliency": "interpolation"})
    profile = setup.profile.model_copy(update={"inference": inference})
    (record,) = run(setup, ROWS[:1], profile=profile)
    assert len(record["pred_relevant_windows"]) == 10
    chosen = moments.saliency(record["probability"], 150, "interpolation").tolist()
    assert record["pred_saliency_scores"] == chosen


def test_a_mask_without_ones_is_invalid_and_becomes_all_ones(setup):
    with torch.no_grad():
        setup.model.lang_model.lm_head.bias[setup.profile.model.tokens.zero] = 1000
    (record,) = run(setup, ROWS[:1])
    assert record["valid"] is False and record["mask"] == "1" * FRAMES and max(record["probability"]) < 0.5
    assert [window[:2] for window in record["pred_relevant_windows"]] == [[0, 150]]
    assert "error" not in record


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, calls):
    """`beam_search` gives up after so many batches; returns the list of batch sizes it is asked for."""
    sizes, search = [], decode.beam_search

    def counted(model, vision_tokens, *rest):
        if len(sizes) == calls:
            raise Interrupted
        sizes.append(len(vision_tokens))
        return search(model, vision_tokens, *rest)

    monkeypatch.setattr(decode, "beam_search", counted)
    return sizes


def test_interrupted_split_goes_on_where_it_was(setup, monkeypatch):
    whole = run(setup)
    setup.path.unlink()
    with monkeypatch.context() as patch:
        interrupt(patch, calls=1)
        with pytest.raises(Interrupted):
            run(setup)
    part = setup.path.with_name("val.jsonl.part0")
    assert not setup.path.exists()
    with part.open("a") as file:
        file.write(part.read_text().splitlines()[-1][:50])  # killed in the middle of a line
    sizes = interrupt(monkeypatch, calls=100)
    records = run(setup)
    assert sum(sizes) == 4 and not part.exists()
    assert [record["mask"] for record in records] == [record["mask"] for record in whole]
    for one, other in zip(records, whole, strict=True):
        np.testing.assert_allclose(one["probability"], other["probability"], atol=1e-5)


@pytest.mark.parametrize("change", ["weights", "beams", "query"])
def test_what_other_settings_left_is_not_used(setup, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupt(patch, calls=1)
        with pytest.raises(Interrupted):
            run(setup)
    sizes = interrupt(monkeypatch, calls=100)
    if change == "weights":
        with torch.no_grad():
            setup.model.vision_tokenizer.projection.weight *= 1.01
        run(setup)
    elif change == "beams":
        inference = setup.profile.inference.model_copy(update={"beams": 3})
        run(setup, profile=setup.profile.model_copy(update={"inference": inference}))
    else:  # of the two rows that were done, one asks something else now
        other = Row(3, "a cat sleeps", 126, "a")
        records = run(setup, [other if row.qid == 3 else row for row in ROWS])
        assert records[1]["query"] == "a cat sleeps"
    assert sum(sizes) == {"weights": 6, "beams": 6, "query": 5}[change]


def test_unreadable_video_fails_its_queries_alone(setup, capsys):
    setup.store.path("b").write_bytes(b"no zip file")
    setup.store.path("c").unlink()
    (setup.store.folder / frames.FAILURES).write_text(json.dumps({"vid": "c", "reason": "c.mp4: is cut off"}) + "\n")
    records = run(setup)
    for record in (records[0], *records[2:]):
        assert record["valid"] is False and record["mask"] == "1" * FRAMES and record["probability"] == [1.0] * FRAMES
        assert record["pred_relevant_windows"] == [[0, record["duration"], 1.0]]
        assert set(record["pred_saliency_scores"]) == {1.0}
    assert "damaged" in records[0]["error"] and records[2]["error"] == "c.mp4: is cut off"
    assert "error" not in records[1]
    printed = capsys.readouterr()
    warnings = [line for line in (printed.out + printed.err).splitlines() if "warning" in line]
    assert len(warnings) == 2 and "c.mp4: is cut off" in warnings[1]
    matched(records, ROWS)


def test_failed_videos_are_tried_again(setup, monkeypatch):
    content = setup.store.path("a").read_bytes()
    setup.store.path("a").unlink()
    with monkeypatch.context() as patch:
        interrupt(patch, calls=1)
        with pytest.raises(Interrupted):
            run(setup)
    setup.store.path("a").write_bytes(content)
    assert all("error" not in record for record in run(setup))


def test_frames_of_other_settings_are_an_error_not_a_failed_video(setup):
    section = setup.profile.frames.model_copy(update={"neighbour_distance": 0.5})
    with pytest.raises(frames.StoreError, match="neighbour_distance"):
        run(setup, profile=setup.profile.model_copy(update={"frames": section}))
