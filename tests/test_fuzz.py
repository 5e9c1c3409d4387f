"""Damaged files for every reader: each is read, or refused with the reader's own error, which names the place.

A hundred cases per test, with --all two thousand (conftest.py): intact files with a few odd things in them, so that
they pass the reader's first checks.
"""

import csv
import io
import json
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small import SCORES, tiny
from test_config import flat
from test_prompt import letters

from framseg import annotations, codalab, config, evaluate, prompt, train
from framseg.annotations import AnnotationError, LabelledRow
from framseg.backbones import CheckpointError, blip3
from framseg.checkpoint import load_base, load_trained, save_trained
from framseg.codalab import TEST_NAME, VAL_NAME, SubmissionError
from framseg.config import ProfileError
from framseg.predictions import PredictionError, read_predictions, read_released, write_predictions
from framseg.prompt import PromptError
from framseg.run import resume, stamps
from framseg.run.notebooks import NOTEBOOKS
from framseg.run.paths import Run
from framseg.train import TrainError
from framseg.viz import browser, figures

reused = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\0", "../x", "~x", "a/b", "x" * 5000, "\ud800", "ابحث عن كلب", "<image><|end|>", "1", "nan"]
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from(
        [2**31, 2**53, 2**64, -(10**400), 10**400, 1e300, -1e308, 5e-324, 1e15, float("nan"), float("inf")]
    ),
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    TEXTS,
    st.lists(NUMBERS | TEXTS | st.lists(NUMBERS, max_size=3), max_size=3),
    st.dictionaries(TEXTS, NUMBERS | TEXTS, max_size=2),
    st.integers(1, 1100).map(lambda depth: nested(depth)),
)
BYTES = st.sampled_from(
    [b"\xef\xbb\xbf", b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"\xe2\x80\xa8", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000]
    + [
        b"NaN",
        b"-Infinity",
        b"1e999",
        b'"\\ud800"',
        b"PK\3\4",
        b"\x80\x04.",
        b"&a [*a]",
        b"!!float x",
        b"2001-99-99",
        b"0b_",
    ]
)


def nested(depth: int) -> list:
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


@st.composite
def changed(draw, value):
    """A copy of a JSON value in which one place, at any depth, is dropped, doubled or replaced."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(ODD)
    copy = value.copy()
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    how = draw(st.sampled_from(["deeper", "deeper", "deeper", "drop", "more"]))
    if how == "deeper":
        copy[key] = draw(changed(value[key]))
    elif how == "drop":
        del copy[key]
    elif isinstance(copy, list):
        copy.insert(key, draw(st.just(value[key]) | ODD))
    else:
        copy[draw(TEXTS)] = value[key]
    return copy


@st.composite
def damaged(draw, content: bytes):
    """Bytes with up to three things wrong: a bit, a cut, something put in, left out or doubled, another encoding."""
    for _ in range(draw(st.integers(1, 3))):
        at, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        how = draw(st.sampled_from(["bit", "cut", "in", "out", "twice", "utf-16"]))
        if how == "bit" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "in":
            content = content[:at] + draw(BYTES) + content[at:]
        elif how == "out":
            content = content[:at] + content[end:]
        elif how == "twice":
            content = content[:end] + content[at:]
        elif how == "utf-16" and draw(st.booleans()):
            content = content.decode(errors="replace").encode("utf-16")
    return content


def dumped(value) -> bytes:
    """JSON of a value, which may hold halves of characters."""
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def yamled(value) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")
    except RecursionError:  # of lists in lists; JSON is YAML, too
        return dumped(value)


@st.composite
def json_file(draw, records: list[dict]):
    """The bytes of a JSON lines file with something wrong in a record or in the bytes."""
    if draw(st.booleans()):
        return draw(damaged(b"\n".join(map(dumped, records)) + b"\n"))
    records = draw(changed(records))
    escaped = draw(st.booleans())
    lines = [
        json.dumps(record).encode() if escaped else dumped(record)
        for record in (records if isinstance(records, list) else [records])
    ]
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines) + b"\n"


def outcome(read, errors, *places):
    """What `read` gives, or None if it raises one of `errors`; its message must name one of the places."""
    try:
        return read()
    except errors as error:
        assert any(str(place) in str(error) for place in places), f"{str(error)[:300]!r} names none of {places}"
        return None


ROWS = [
    LabelledRow(1, "query 1", 10, "v1", ((2, 6),), (1, 2), ((4, 3, 2), (4, 4, 4))),
    LabelledRow(2, "en hund 🐕 und 'x'", 9.5, "v2", ((0, 2.5), (8, 9.5)), (0, 1, 4), ((4, 4, 4), (0, 0, 0), (1, 2, 3))),
]
RECORDS = [
    {name: getattr(row, name) for name in ("qid", "query", "duration", "vid", *annotations.LABELS)} for row in ROWS
]
RECORDS = json.loads(json.dumps(RECORDS))
PREDICTIONS = [
    {
        "qid": row.qid,
        "query": row.query,
        "vid": row.vid,
        "duration": row.duration,
        "pred_relevant_windows": [[2, 6, 0.9], [0, 9.5, 0.1]],
        "pred_saliency_scores": [0.1, 0.9, 0.8, 0.1, 0][: annotations.clips(row.duration)],
        "mask": "01100",
        "probability": [0.1, 0.9, 0.8, 0.2, 0.0],
        "valid": True,
    }
    for row in ROWS
]


@reused
@given(json_file(RECORDS))
def test_annotations(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    rows = outcome(lambda: annotations.read(path), AnnotationError, path)
    if rows is not None:
        annotations.write(tmp_path / "again.jsonl", rows)
        assert annotations.read(tmp_path / "again.jsonl") == rows
        for row in rows:
            if isinstance(row, annotations.LabelledRow):
                assert len(annotations.frame_labels(row, 5)) == len(annotations.soft_targets(row, 5)) == 5


@reused
@given(json_file(PREDICTIONS))
def test_predictions(tmp_path, content):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(content)
    records = outcome(lambda: read_predictions(path), PredictionError, path)
    if records is not None:
        scored = outcome(lambda: evaluate.evaluate(records, ROWS, intersection=True), PredictionError, "qid", "queries")
        assert scored is None or scored["brief"]
        outcome(lambda: write_predictions(tmp_path / "again.jsonl", records), PredictionError, "qid")


@st.composite
def released(draw):
    lines = [
        ["qid", "duration", "windows", "p0", "p1"],
        ["1", "10", "2/6/0.5|0/10/0.1", "0.5", "1"],
        ["2", "9.5", "0/3/1", "0", "0"],
    ]
    if draw(st.booleans()):
        lines = draw(changed(lines))
        lines = [line if isinstance(line, list) else [line] for line in (lines if isinstance(lines, list) else [lines])]
    out = io.StringIO()
    csv.writer(out).writerows(lines)
    content = out.getvalue().encode(errors="surrogatepass")
    return draw(damaged(content)) if draw(st.booleans()) else content


@reused
@given(released())
def test_released_predictions(tmp_path, content):
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    records = outcome(lambda: read_released(path), PredictionError, path)
    if records is not None:
        outcome(lambda: evaluate.evaluate(records, ROWS, intersection=True), PredictionError, "qid", "queries")


PUBLISHED = [
    {"qid": 1, "duration": 10, "score": [0.5, 1.0], "preds": "01", "pred_relevant_windows": [[5, 10, 1.0]]},
    {"qid": 2, "duration": 9.5, "score": [0, 0], "preds": "00", "pred_relevant_windows": [[0, 9, 0], [2, 3, 0.5]]},
]


@st.composite
def published(draw):
    return draw(damaged(dumped(PUBLISHED))) if draw(st.booleans()) else dumped(draw(changed(PUBLISHED)))


@reused
@given(published())
def test_the_authors_json(tmp_path, content):
    path = tmp_path / "hl_val_predictions.json"
    path.write_bytes(content)
    records = outcome(lambda: read_released(path), PredictionError, path)
    if records is not None:
        assert all(set(record["mask"]) <= {"0", "1"} for record in records)
        outcome(lambda: evaluate.evaluate(records, ROWS, intersection=True), PredictionError, "qid", "queries")


SHIPPED = {name: yaml.safe_load((config.PROFILES / f"{name}.yaml").read_text()) for name in config.names()}


@st.composite
def profile_file(draw):
    name = draw(st.sampled_from(config.names()))
    if draw(st.booleans()):
        return draw(damaged((config.PROFILES / f"{name}.yaml").read_bytes()))
    return yamled(draw(changed(SHIPPED[name])))


@reused
@given(profile_file())
def test_profiles(tmp_path, content):
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    profile = outcome(lambda: config.load(path), ProfileError, path.name, "no profile named")
    if profile is not None:
        config.save(profile, tmp_path / "again.yaml")
        assert config.load(tmp_path / "again.yaml") == profile
        assert Run(profile).root.parent == config.REPOSITORY / "runs"


KEYS = st.sampled_from(sorted(flat(config.load("demo").model_dump())))


@reused
@given(
    st.dictionaries(
        KEYS | KEYS.flatmap(lambda key: st.sampled_from([key[:-1], f"{key}.x", f".{key}"])) | TEXTS,
        ODD | TEXTS,
        max_size=3,
    )
)
def test_overrides(overrides):
    """As after --set: a key that is one or nearly, a value that is text and read as YAML."""
    profile = outcome(lambda: config.load("demo", overrides), ProfileError, "demo.yaml", *overrides)
    assert profile is None or config.Profile.model_validate(profile.model_dump()) == profile


@st.composite
def submission(draw):
    """An archive with something wrong in a record, in an entry or in its bytes."""
    files = {VAL_NAME: dumped(PREDICTIONS[0]) + b"\n" + dumped(PREDICTIONS[1]), TEST_NAME: dumped(PREDICTIONS[0])}
    how = draw(st.sampled_from(["file", "entry", "bytes"]))
    if how == "file":
        files[VAL_NAME] = draw(json_file(PREDICTIONS))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            if how == "entry":
                attribute = draw(
                    st.sampled_from(["filename", "external_attr", "extra", "comment", "create_system", "compress_type"])
                )
                odd = {
                    "filename": TEXTS.filter(lambda text: "\ud800" not in text),
                    "extra": st.binary(max_size=40),
                    "comment": st.binary(max_size=40),
                }
                odd |= {"external_attr": st.integers(0, 2**32 - 1), "create_system": st.integers(0, 255)}
                odd |= {"compress_type": st.sampled_from([0, 8, 12, 14])}
                setattr(entry, attribute, draw(odd[attribute]))
            archive.writestr(entry, content, entry.compress_type)
    return draw(damaged(out.getvalue())) if how == "bytes" else out.getvalue()


@pytest.fixture(scope="module")
def competition(tmp_path_factory):
    folder = tmp_path_factory.mktemp("competition")
    annotations.write(folder / codalab.VAL_ANNOTATIONS, ROWS)
    annotations.write(folder / codalab.TEST_ANNOTATIONS, ROWS[:1])
    return folder


@reused
@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(submission())
def test_submissions(competition, content):
    path = competition / "submission.zip"
    path.write_bytes(content)
    report = outcome(lambda: codalab.check(path, competition), SubmissionError, path, VAL_NAME, TEST_NAME)
    assert report is None or report["val"]["queries"] == 2
    assert {path.name for path in competition.iterdir()} == {
        path.name,
        codalab.VAL_ANNOTATIONS,
        codalab.TEST_ANNOTATIONS,
    }


@st.composite
def tensors_file(draw, content: bytes):
    """A safetensors file with something wrong in its header, or in its bytes."""
    if draw(st.booleans()):
        return draw(damaged(content))
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    name = draw(st.sampled_from(sorted(header)))
    odd = {
        "dtype": st.sampled_from("BOOL U8 I64 U16 F16 BF16 F64 C64 F8_E4M3 F8_E8M0 F4 F6_E2M3 X".split()),
        "shape": ODD,
    }
    key = draw(st.sampled_from(["dtype", "shape", "all"]))
    header = draw(changed(header)) if key == "all" else header | {name: header[name] | {key: draw(odd[key])}}
    header = dumped(header)
    return len(header).to_bytes(8, "little") + header + content[begin:]


@st.composite
def one_file(draw, content: bytes, suffix: str):
    """A right file's content, made wrong in the way of its kind."""
    if suffix == ".safetensors":
        return draw(tensors_file(content))
    if draw(st.booleans()):
        return draw(damaged(content))
    if suffix == ".yaml":
        return yamled(draw(changed(yaml.safe_load(content))))
    if suffix == ".jsonl":
        return draw(json_file([json.loads(line) for line in content.splitlines()]))
    return dumped(draw(changed(json.loads(content))))


@contextmanager
def spoiled(file: Path, data: st.DataObject):
    """The file with something wrong, missing, or a folder in its place; afterwards as it was."""
    content = file.read_bytes()
    odd = data.draw(st.one_of(*[one_file(content, file.suffix)] * 9, st.sampled_from(["gone", "a folder"])))
    file.unlink()
    if odd == "a folder":
        file.mkdir()
    elif odd != "gone":
        file.write_bytes(odd)
    try:
        yield
    finally:
        if odd == "a folder":
            file.rmdir()
        file.write_bytes(content)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A trained checkpoint of a tiny model, its base next to it, and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    layers = {f"model__{part}__layers": 1 for part in ("vision", "resampler", "language")}
    profile = tiny(model__weights=str(folder / "base"), **layers)
    torch.manual_seed(0)
    blip3.Blip3(profile.model).save_published(folder / "base")
    model = load_base(profile)
    save_trained(folder / "trained", model, model.adapt(profile.adapter, 0), profile, letters()[0], SCORES)
    return folder


@reused
@given(st.data())
def test_checkpoints(checkpoint, monkeypatch, data):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a repository's name may come up
    files = sorted(path for path in checkpoint.rglob("*") if path.suffix in (".yaml", ".safetensors", ".json"))
    file = data.draw(st.sampled_from([path for path in files if path.name != prompt.FILE]))
    with spoiled(file, data):
        loaded = outcome(
            lambda: load_trained(checkpoint / "trained"),
            (CheckpointError, ProfileError),
            *(
                checkpoint / "trained",
                checkpoint / "base",
                "profile.yaml",
                "set model.weights",
                "safetensors file here",
            ),
        )
    if loaded is not None:
        model, profile = loaded
        assert not model.training and all(not value.is_meta for value in model.state_dict().values())
        assert config.Profile.model_validate(profile.model_dump()) == profile


@reused
@given(st.data())
def test_tokenizers(checkpoint, monkeypatch, data):
    monkeypatch.setattr(prompt, "RANDOM_MASKS", 10)  # for speed
    monkeypatch.setattr(prompt, "EXHAUSTIVE_LENGTH", 3)
    model = letters()[1]

    def checked():
        tokenizer = prompt.load(checkpoint / "trained")
        prompt.check(tokenizer, model, 3)
        return tokenizer

    with spoiled(checkpoint / "trained" / prompt.FILE, data):
        tokenizer = outcome(checked, PromptError, checkpoint, "the tokenizer", "becomes the")
    if tokenizer is not None:
        ids = prompt.prompt_ids(tokenizer, model.tokens, "a <image> dog", 3)
        assert ids.count(model.tokens.image) == 3


STEP = dict.fromkeys(("lm", "bce", "tversky", "dice", "loss", "learning_rate", "gradient_norm"), 0.25)
STEP |= dict.fromkeys(("samples_per_second", "memory_gib", "seconds"), 2.5)
LOG = [STEP | {"step": step, "epoch": step / 2, "weights": [1.0, 0.0, 0.0, 0.0]} for step in (1, 2)]
VALIDATIONS = [{"epoch": 0, "metrics": evaluate.evaluate(PREDICTIONS, ROWS), "invalid": 0.0, "seconds": 1.5}]


@reused
@given(st.one_of(st.tuples(json_file(LOG), st.just(b"")), st.tuples(st.just(b""), json_file(VALIDATIONS))))
def test_logs_of_a_training(tmp_path, contents):
    read = []
    for name, content, right in zip(("steps", "validation"), contents, (LOG, VALIDATIONS), strict=True):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(content)
        read.append(outcome(lambda path=path: train.read_log(path), TrainError, f"{path}:") if content else right)
    if read[0] and read[1]:
        with np.errstate(all="ignore"):
            figures.progress(*read)
        assert all(train.step_line(step) for step in read[0])
        assert all(train.epoch_line(validation, LOG) for validation in read[1])


@pytest.mark.parametrize("place, log", [("epoch", VALIDATIONS), ("epoch", LOG), ("step", LOG)])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_place_in_a_training_is_finite(tmp_path, place, log, value):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record | {place: value}) + "\n" for record in log))
    with pytest.raises(TrainError, match=f"{path}:1: has '{str(value)}' where a number must stand"):
        train.read_log(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run that the browser opens and whose first chapter is finished."""
    folder = tmp_path_factory.mktemp("made")
    profile = config.load("demo", {"data.source": "folder", "data.folder": str(folder / "data")})
    (folder / "code").mkdir()
    run = Run(profile, folder / "run")
    run.notebooks.mkdir(parents=True)
    annotations.write(folder / "data" / profile.data.val, ROWS)
    write_predictions(run.predicted("val"), PREDICTIONS)
    config.save(profile, run.profile)
    return profile, run, folder


@reused
@given(st.data())
def test_the_browser_on_a_run(made, data):
    profile, run, folder = made
    file = data.draw(st.sampled_from([run.predicted("val"), run.profile, folder / "data" / profile.data.val]))
    with spoiled(file, data):
        opened = outcome(
            lambda: browser.Browser(run.root),
            (PredictionError, AnnotationError, ProfileError),
            *(file, "profile.yaml", "annotations", "annotated", "qid", "cannot be read"),
        )
    if opened is not None:
        for order in browser.SORTS:
            opened.sort.value = order
        for name in browser.FILTERS:
            opened.filter.value = name
        assert set(opened.entries.index) <= {1, 2}


@reused
@given(st.data())
def test_stamps_of_finished_chapters(made, monkeypatch, data):
    profile, run, folder = made
    monkeypatch.setattr(stamps, "CODE", folder / "code")
    step = stamps.Chapter(NOTEBOOKS / "01_data.ipynb", profile, run)
    step.copy.touch()
    step.stamp.write_text(
        json.dumps({"inputs": step.inputs(), "began": 1.5, "device": "a CPU", "wrote": ["profile.yaml"]})
    )
    assert step.changed() is None
    with spoiled(step.stamp, data):
        why = step.changed()
        assert why is None or "changed" in why or "is gone" in why or why == "not finished yet"
        assert isinstance(stamps.read(step.copy).get("device", ""), str)


@reused
@given(st.data())
def test_states_of_an_interrupted_training(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("resume") / "step_000003"
    folder.mkdir()
    for name in ("weights", "start", "process_0"):
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    sums = {path.name: resume.checksum(path) for path in folder.iterdir()}
    (folder / "state.json").write_text(json.dumps({"step": 3, "world": 1, "sha256": sums}))
    assert resume.damage(folder) is None
    with spoiled(data.draw(st.sampled_from(sorted(folder.iterdir()))), data):
        if resume.damage(folder) is None:  # then the damage means nothing
            about = json.loads((folder / "state.json").read_bytes())
            assert (about["step"], about["world"], about["sha256"]) == (3, 1, sums)
