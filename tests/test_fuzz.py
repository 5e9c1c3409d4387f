"""Damaged files for every reader: each is read, or refused with the reader's own error, which names the place.

A hundred cases a test, with --all two thousand (conftest.py). They are right files with a few odd things in them, so that
they come past the first look at them.
"""

import csv
import io
import json
import shutil
import zipfile

import nbformat
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import tiny
from test_config import flat

from framseg import annotations, blip3, browser, codalab, config, evaluate, figures, prompt, steps, train
from framseg.annotations import AnnotationError, Row
from framseg.blip3 import CheckpointError
from framseg.codalab import TEST_NAME, VAL_NAME, SubmissionError
from framseg.config import ProfileError
from framseg.evaluate import PredictionError
from framseg.prompt import PromptError
from framseg.train import TrainError

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


@st.composite
def json_file(draw, records: list[dict]):
    """The bytes of a JSON lines file with something wrong in a record or in the bytes."""
    if draw(st.booleans()):
        return draw(damaged(b"\n".join(map(dumped, records)) + b"\n"))
    records = draw(changed(records))
    escaped = draw(st.booleans())
    lines = [
        json.dumps(one).encode() if escaped else dumped(one)
        for one in (records if isinstance(records, list) else [records])
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
    Row(1, "query 1", 10, "v1", ((2, 6),), (1, 2), ((4, 3, 2), (4, 4, 4))),
    Row(2, "en hund 🐕 und 'x'", 9.5, "v2", ((0, 2.5), (8, 9.5)), (0, 1, 4), ((4, 4, 4), (0, 0, 0), (1, 2, 3))),
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
            if row.labelled:
                assert len(annotations.frame_labels(row, 5)) == len(annotations.soft_targets(row, 5)) == 5


@reused
@given(json_file(PREDICTIONS))
def test_predictions(tmp_path, content):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(content)
    found = outcome(lambda: evaluate.read_predictions(path), PredictionError, path)
    if found is not None:
        scored = outcome(lambda: evaluate.evaluate(found, ROWS, intersection=True), PredictionError, "qid", "queries")
        assert scored is None or scored["brief"]
        outcome(lambda: evaluate.write_predictions(tmp_path / "again.jsonl", found), PredictionError, "qid")


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
    found = outcome(lambda: evaluate.read_released(path), PredictionError, path)
    if found is not None:
        outcome(lambda: evaluate.evaluate(found, ROWS, intersection=True), PredictionError, "qid", "queries")


SHIPPED = {name: yaml.safe_load((config.PROFILES / f"{name}.yaml").read_text()) for name in config.names()}


@st.composite
def profile_file(draw):
    name = draw(st.sampled_from(config.names()))
    if draw(st.booleans()):
        return draw(damaged((config.PROFILES / f"{name}.yaml").read_bytes()))
    return yaml.safe_dump(draw(changed(SHIPPED[name])), allow_unicode=True).encode(errors="surrogatepass")


@reused
@given(profile_file())
def test_profiles(tmp_path, content):
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    profile = outcome(lambda: config.load(path), ProfileError, path.name, "no profile named")
    if profile is not None:
        config.save(profile, tmp_path / "again.yaml")
        assert config.load(tmp_path / "again.yaml") == profile
        assert config.Run(profile).root.parent == config.REPOSITORY / "runs"


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
