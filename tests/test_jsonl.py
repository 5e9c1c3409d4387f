import gzip
import io
import json
import zipfile

import pytest

from framseg import FramsegError, jsonl
from framseg.jsonl import LinesError


@pytest.mark.parametrize(
    "value, integer, number",
    [(3, True, True), (True, False, False), (0.5, False, True), (float("nan"), False, False), ("3", False, False)]
    + [(2**53, True, False), (float("inf"), False, False), (None, False, False)],
)
def test_what_is_an_integer_and_a_number(value, integer, number):
    assert (jsonl.is_integer(value), jsonl.is_number(value)) == (integer, number)


def test_long_lists_are_cut_and_counted():
    assert jsonl.shortlist([1, 2, 3]) == "1, 2, 3" == jsonl.shortlist([1, 2, 3], most=3)
    assert jsonl.shortlist("abcde", most=2) == "a, b, and 3 more"
    assert jsonl.shortlist(["x: 1", "y: 2", "z: 3"], "\n", 2) == "x: 1\ny: 2\nand 1 more"
    assert jsonl.shortlist([]) == ""


def test_lines_are_numbered_and_blank_ones_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("é\n\n  \r\nb".encode())
    assert list(jsonl.numbered_lines(path)) == [(1, "é\n"), (4, "b")]
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(LinesError, match=r"a.jsonl:2: is not UTF-8 text \(invalid start byte at byte 0\)"):
        list(jsonl.numbered_lines(path))
    with pytest.raises(LinesError, match="absent: cannot be read: No such file"):
        list(jsonl.numbered_lines(tmp_path / "absent"))
    assert issubclass(LinesError, FramsegError) and issubclass(LinesError, ValueError)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf{}\n[]",
        b"{}\n\xef\xbb\xbf[]",
        b"\xef\xbb\xbf\n{}\n[]\n\xef\xbb\xbf",
        b"\xef\xbb\xbf{}\r\n\r\n[]\r\n",
    ],
)
def test_byte_order_marks_are_left_out(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert [text.strip() for _, text in jsonl.numbered_lines(path)] == ["{}", "[]"]


def _zipped(text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", text)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, reason",
    [(text.encode(f"{name}-{order}"), f"{name}: convert it, `iconv -f {name} -t UTF-8 OLD > NEW`")
     for name in ("UTF-16", "UTF-32") for order in ("LE", "BE") for text in ['\ufeff{"qid": 1}\n']]
    + [('{"qid": 1}\n'.encode(f"{name}-LE"), f"{name}: convert it") for name in ("UTF-16", "UTF-32")]
    + [(gzip.compress(b"{}"), "compressed by gzip: unpack it, `gunzip -c OLD > NEW`")]
    + [(_zipped("{}"), "a zip archive: unpack it, `unzip OLD`")],
)  # fmt: skip
def test_what_is_no_utf8_text_is_named_with_the_way_out(tmp_path, content, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(LinesError) as error:
        list(jsonl.numbered_lines(path))
    assert str(error.value).startswith(f"{path}: is not UTF-8 text but {reason}")


@pytest.mark.parametrize("content", ['[{"qid": 1}, {"qid": 2}]', '[\n{"qid": 1}\n]', '\n {\n"qid": 1\n}\n', "[]"])
def test_json_that_is_not_by_lines_is_told_once(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    _, [told] = jsonl.checked_records(jsonl.parsed(jsonl.numbered_lines(path)), f"{path}:", lambda record: [])
    reason = "expected one JSON object per line; `jq -c 'arrays[], objects' OLD > NEW` writes that"
    assert told.startswith(f"{path}:") and told.endswith(reason)


def test_every_bad_record_is_told_with_place_qid_and_reasons(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"qid": 1}\n{"qid": 2, "bad": "x"}\n{"qid": 1, "bad": "y"}\n[]\n{"\n{"qid": true}\n')

    def check(record):
        return [f"{key} is odd" for key in record if key != "qid"]

    records, bad = jsonl.checked_records(jsonl.parsed(jsonl.numbered_lines(path)), f"{path}:", check)
    assert records == [{"qid": 1}, {"qid": True}]
    assert bad[:3] == [
        f"{path}:2: qid 2: bad is odd",
        f"{path}:3: qid 1: bad is odd; the query is at {path}:1 already; keep one of them",
        f"{path}:4: qid unknown: expected a JSON object, found list",
    ]
    assert len(bad) == 4 and bad[3].startswith(f"{path}:5: qid unknown: not JSON")
    path.write_bytes(b'{"qid": 1, "bad": "x"}\n\xff')
    records, bad = jsonl.checked_records(jsonl.parsed(jsonl.numbered_lines(path)), f"{path}:", check)
    assert not records and bad[0] == f"{path}:1: qid 1: bad is odd" and bad[1].startswith(f"{path}:2: is not UTF-8")
    assert jsonl.checked_records([], "rows.jsonl:", check) == ([], ["rows.jsonl: holds no records"])


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "a.jsonl"
    jsonl.write_lines(path, [{"qid": 1}, {"query": "é"}])
    assert path.read_text(encoding="utf-8") == '{"qid": 1}\n{"query": "é"}\n'
    for odd in (float("nan"), {1}):
        with pytest.raises(LinesError, match=r"a.jsonl: qid 3: cannot be written"):
            jsonl.write_lines(path, [{"qid": 2}, {"qid": 3, "odd": odd}])
    with pytest.raises(KeyboardInterrupt), jsonl.whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text().splitlines()[0]) == {"qid": 1} and list(path.parent.iterdir()) == [path]
