"""Data sources: kinds of file, built-in names, Hub errors, and rows that keep their numbers."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import fill_datasets_cache

from shortllm.data.rows import (
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    ArrowTexts,
    Rows,
    split_held_out,
)
from shortllm.data.sources import BUILT_INS, load_rows, open_records
from shortllm.errors import DataError

TEXTS = ["one two", "", "drei \u00fc\u2028vier", " five \U0001f40d "]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
}


def _bytes_of(kind: str, texts: list[str], column: str = "text") -> bytes:
    """A file of `kind` that holds `texts`."""
    records = [{"id": number, column: text} for number, text in enumerate(texts)]
    if kind == ".jsonl":
        return "\n\n".join(map(json.dumps, records)).encode()
    if kind == ".json":
        return json.dumps(records, indent=1).encode()
    if kind == ".csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, ["id", column])
        writer.writeheader()
        writer.writerows(records)
        return stream.getvalue().encode()
    if kind == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(records), sink)
        return sink.getvalue().to_pybytes()
    return "".join(text + "\n" for text in texts).encode()


# ---- local files


def test_every_kind_of_file(tmp_path: Path) -> None:
    for kind in (*TEXT_SUFFIXES, *RECORD_SUFFIXES):
        for packed, pack in PACKERS.items():
            file = tmp_path / f"data.v1{kind}{packed}"
            file.write_bytes(pack(_bytes_of(kind, TEXTS)))
            rows = load_rows(str(file))
            assert list(rows) == TEXTS, file.name
            assert (rows.source, rows.start, rows.stop) == (str(file), 0, 4)


def test_lines_are_those_of_the_datasets_text_loader(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("a\nb\x0bc\u2028d\r\n\n e \rf\x85g\n\nlast".encode())
    theirs = datasets.load_dataset(
        "text", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(load_rows(str(file))) == list(theirs["text"])


def test_json_list_of_strings_and_json_lines_named_json(tmp_path: Path) -> None:
    (tmp_path / "strings.json").write_text(' [ "a", "b" ]')
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert list(load_rows(str(tmp_path / "strings.json"))) == ["a", "b"]
    assert list(load_rows(str(tmp_path / "lines.json"))) == ["a", "b"]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"sentence": "no", "text": "yes"}, "yes"),
        ({"content": "no", "sentence": "no", "page": "yes"}, "yes"),
        ({"content": "yes", "title": "no"}, "yes"),
        ({"text": 3, "story": "yes", "tags": ["no"]}, "yes"),
    ],
)
def test_default_column(tmp_path: Path, kind: str, record: dict[str, Any], expected: str) -> None:
    file = tmp_path / f"data{kind}"
    if kind == ".jsonl":
        file.write_text(json.dumps(record))
    else:
        pq.write_table(pa.Table.from_pylist([record]), file)
    assert list(load_rows(str(file))) == [expected]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_named_column(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"da#ta{kind}"  # a '#' in a file's own name is no column
    file.write_bytes(_bytes_of(kind, TEXTS, column="odd"))
    assert list(load_rows(str(file))) == TEXTS
    assert list(load_rows(f"{file}#odd")) == TEXTS
    with pytest.raises(DataError, match=r"has no column 'old'\. Did you mean 'odd'\?"):
        load_rows(f"{file}#old")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.tsv",
            "text\na\n",
            r"what kind of data is in .*data\.tsv\. Supported: \.txt.*\.parquet",
        ),
        ("data", "a", r"Supported: "),
        ("empty.txt", "", r"has no rows"),
        ("latin.txt", b"caf\xe9", r"cannot read .*latin\.txt as txt: 'utf-8' codec"),
        (
            "cut.txt.gz",
            gzip.compress(b"abc" * 99, mtime=0)[:-9],
            r"cannot read .*cut\.txt\.gz as txt",
        ),
        ("plain.txt.gz", "abc", r"cannot read .* Not a gzipped file"),
        ("plain.txt.xz", "abc", r"cannot read .*plain\.txt\.xz as txt"),
        ("bad.jsonl", '{"text": "a"}\n{"text"', r"line 2 of .*bad\.jsonl is not JSON"),
        ("bad.json", '[{"text": "a"', r"cannot read .*bad\.json as json"),
        ("bad.parquet", "PAR1", r"cannot read .*bad\.parquet as parquet"),
        ("number.jsonl", "3", r"row 0 of .* is a int, not a record"),
        (
            "null.jsonl",
            '{"text": "a"}\n{"text": null}',
            r"row 1 of .* has no text in column 'text'",
        ),
        (
            "two.jsonl",
            '{"a": "x", "b": "y", "n": 1}',
            r"2 columns of text.*--columns text=COLUMN .*\. Columns: a, b, n",
        ),
        ("none.jsonl", '{"n": 1}', r"has no column of text\. Columns: n"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name))


def test_null_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="row 1 of .* has no text in column 'text'"):
        load_rows(str(tmp_path / "data.parquet"))


def test_column_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.json").write_text('["a"]')
    with pytest.raises(DataError, match="is a text file and has no column 'x'"):
        load_rows(f"{tmp_path}/a.txt#x")
    with pytest.raises(DataError, match="is a str, not a record with a column 'x'"):
        load_rows(f"{tmp_path}/a.json#x")
    with pytest.raises(DataError, match="names no column after '#'"):
        load_rows(f"{tmp_path}/a.txt#")


def test_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud83db"}\n{"text": "c"}\n')
    assert list(load_rows(str(tmp_path / "half.jsonl"))) == ["a?b", "c"]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_text_is_not_taken_for_a_date_or_a_number(tmp_path: Path, kind: str) -> None:
    texts = ["2020-01-01", "2021-01-01T10:00:00Z", "1.0", "NA", "null", "true", "007"]
    (tmp_path / f"odd{kind}").write_bytes(_bytes_of(kind, texts))
    assert list(load_rows(str(tmp_path / f"odd{kind}"))) == texts


def test_csv_with_quoted_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,n\r\n"one\ntwo, ""three""",1\r\n,2\r\n')
    assert list(load_rows(str(tmp_path / "a.csv"))) == ['one\ntwo, "three"', ""]
    (tmp_path / "long.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(load_rows(str(tmp_path / "long.csv"))[0]) == 200_000
    (tmp_path / "short.csv").write_text("n,text\n1,a\n2\n")
    with pytest.raises(DataError, match="row 1 of .* has no text in column 'text'"):
        load_rows(str(tmp_path / "short.csv"))
    (tmp_path / "open.csv").write_text('text\n"a')
    with pytest.raises(DataError, match="cannot read .*open.csv as csv"):
        load_rows(str(tmp_path / "open.csv"))


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a::b.jsonl", "\u00fc .jsonl"])
def test_a_file_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a"}')
    assert list(load_rows(str(tmp_path / name))) == ["a"]


def test_a_changed_file_is_read_anew_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    file = tmp_path / "a.jsonl"
    for text in ("one", "two"):
        file.write_text(json.dumps({"text": text}))
        os.utime(file, (0, 0))
        assert list(load_rows(str(file))) == [text]
    assert list(tmp_path.iterdir()) == [file]


def test_rows_in_several_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortllm.data.rows.CHUNK_CHARACTERS", 5)
    texts = [str(number) for number in range(10)]
    rows = Rows.of("x", ArrowTexts.of(iter(texts)))
    assert (list(rows), rows[7], rows[2:5]) == (texts, "7", ["2", "3", "4"])


# ---- names


@pytest.mark.parametrize(
    "name", ["wiki.tst", "./wiki", "../wiki:x", "/no/wiki", "~/wiki-none", "dir/wiki.jsonl.gz#page"]
)
def test_missing_file_is_told_from_an_unknown_name(name: str) -> None:
    with pytest.raises(DataError, match="no such file: .*wiki"):
        load_rows(name)


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory. Name one file in it"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("wikitxt2", "wikitext2"), ("bookcorpora", "bookcorpus"), ("embeded", "embedded")],
)
def test_unknown_name(name: str, meant: str) -> None:
    with pytest.raises(
        DataError,
        match=f"unknown data source '{name}'. Did you mean '{meant}'\\? Available: alpaca, ",
    ):
        load_rows(name)


def test_empty_name() -> None:
    with pytest.raises(DataError, match="unknown data source ''"):
        load_rows("")


def test_unknown_split() -> None:
    with pytest.raises(DataError, match="'ptb' has no split 'tst'. Did you mean 'test'"):
        load_rows("ptb:tst")


def test_every_built_in_split_has_a_default_and_a_place() -> None:
    for name, built_in in BUILT_INS.items():
        assert {built_in.calibration, built_in.evaluation} <= set(built_in.local), name
        if name != "embedded":
            assert set(built_in.hub) == set(built_in.local), name
            assert all(place.split == split for split, place in built_in.hub.items()), name


def test_built_in_names_from_the_local_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTLLM_DATA", str(tmp_path))
    for folder in ("wikitext2", "ptb", "bookcorpus", "alpaca"):
        (tmp_path / folder).mkdir()
    (tmp_path / "wikitext2/wiki.test.raw").write_text(" \n = A = \n \n B <c> \n")
    (tmp_path / "wikitext2/wiki.train.raw.gz").write_bytes(gzip.compress(b" = T = \n", mtime=0))
    (tmp_path / "ptb/ptb.valid.txt").write_text(" a b \n c \n")
    (tmp_path / "bookcorpus/b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "second"}', mtime=0))
    (tmp_path / "bookcorpus/a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "first"}', mtime=0))
    record = {"instruction": "do", "input": "", "output": "done"}
    (tmp_path / "alpaca/train.jsonl").write_text(json.dumps(record))

    wikitext = load_rows("wikitext2")
    assert list(wikitext) == ["", " = A = \n", "", " B <c> \n"]
    assert wikitext.source == "wikitext2:test"
    assert list(load_rows("wikitext2", role="calibration")) == [" = T = \n"]
    assert list(load_rows("ptb")) == ["a b", "c"]
    assert list(load_rows("bookcorpus", role="calibration")) == ["first", "second"]
    [talk] = load_rows("alpaca")
    assert talk == [{"role": "user", "content": "do"}, {"role": "assistant", "content": "done"}]
    assert list(load_rows("alpaca#output")) == ["done"]
    assert load_rows("alpaca#instruction").source == "alpaca:train#instruction"
    with pytest.raises(DataError, match="has no ptb/ptb.test.txt .ptb:validation is there."):
        load_rows("ptb:test")


def test_local_directory_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTLLM_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match="SHORTLLM_DATA is '.*none', which is not a directory"):
        load_rows("ptb")


def test_embedded_splits_differ() -> None:
    test, calibration = load_rows("embedded"), load_rows("embedded", role="calibration")
    assert (test.source, calibration.source) == ("embedded:test", "embedded:calibration")
    assert not set(test) & set(calibration)
    with pytest.raises(DataError, match="embedded rows are plain text without columns"):
        load_rows("embedded:test#x")


# ---- the Hub


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "wikitext2",
            r"'Salesforce/wikitext:wikitext-2-raw-v1:test' .* set SHORTLLM_DATA .*wiki\.test\.raw",
        ),
        (
            "no/such:config:test",
            r"cannot load 'no/such:config:test'.*HF_HUB_OFFLINE is set.*local file",
        ),
        ("imdbx", r"cannot load 'imdbx:test'.*not a built-in name either\. Available: alpaca"),
    ],
)
def test_unreachable_hub(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(source)


def test_a_data_set_in_the_cache_is_read_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["one", "", "2020-01-01 and more"]
    fill_datasets_cache(tmp_path, "acme/rows", [{"n": 1, "body": t} for t in texts], monkeypatch)
    rows = load_rows("acme/rows")
    assert (list(rows), rows.source, rows[1:3]) == (texts, "acme/rows::test", texts[1:])
    assert list(load_rows("acme/rows:default:test[1:]#body")) == texts[1:]
    records = open_records("acme/rows::test")
    assert list(records.read()) == list(records.read()) == [{"n": 1, "body": t} for t in texts]
    assert list(records.rows()) == texts
    with pytest.raises(DataError, match="has no column 'boddy'. Did you mean 'body'"):
        load_rows("acme/rows#boddy")
    with pytest.raises(DataError, match="cannot load 'acme/rows:default:train'.*HF_HUB_OFFLINE"):
        load_rows("acme/rows:default:train")


class _Asked(dict[str, Any]):
    """A stand-in for `datasets.load_dataset` that notes what it was asked."""

    def __call__(self, name: str, config: str | None, **options: Any) -> datasets.Dataset:
        self.update(name=name, config=config, **options)
        return datasets.Dataset.from_dict({"n": [1, 2, 3], "sentence": ["a", "b", None]})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> _Asked:
    stand_in = _Asked()
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("source", "role", "expected"),
    [
        (
            "wikitext:wikitext-2-raw-v1:test",
            "evaluation",
            ("wikitext", "wikitext-2-raw-v1", "test"),
        ),
        ("allenai/c4:en:train[:10%]", "evaluation", ("allenai/c4", "en", "train[:10%]")),
        ("some/data", "calibration", ("some/data", None, "train")),
        ("some/data::dev", "evaluation", ("some/data", None, "dev")),
        ("ptb", "evaluation", ("ptb-text-only/ptb_text_only", None, "validation")),
        ("c4", "calibration", ("allenai/c4", None, "train")),
    ],
)
def test_what_the_hub_is_asked(
    asked: _Asked, source: str, role: Any, expected: tuple[str, ...]
) -> None:
    rows = load_rows(source, role=role)
    assert (asked["name"], asked["config"], asked["split"]) == expected
    assert rows[:2] == ["a", "b"]
    with pytest.raises(DataError, match="row 2 of .* is not text but NoneType"):
        rows[2]


def test_hub_script_data_set_comes_from_its_conversion(asked: _Asked) -> None:
    load_rows("bookcorpus")
    assert asked["revision"] == "refs/convert/parquet"
    assert asked["data_files"] == {"train": "plain_text/train/*.parquet"}


def test_hub_column(asked: _Asked) -> None:
    assert load_rows("some/data#sentence").source == "some/data::test#sentence"
    with pytest.raises(DataError, match="has no column 'sentences'. Did you mean 'sentence'"):
        load_rows("some/data#sentences")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system", "/home/x/.cache")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(DataError, match="cannot keep 'some/data:test' .*Read-only.* Set HF_HOME"):
        load_rows("some/data")


def test_import_is_light() -> None:
    code = (
        "import sys, shortllm.data.sources; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'pyarrow')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- rows


def test_span_keeps_original_numbers() -> None:
    rows = Rows.of("x", list("abcdefgh")).span(2, 7)
    inner = rows.span(1, 3)
    assert list(inner) == ["d", "e"] and (inner.start, inner.stop) == (3, 5)
    assert (rows[0], rows[-1], rows[1:3], len(rows)) == ("c", "g", ["d", "e"], 5)
    for outside in (5, -6):
        with pytest.raises(IndexError):
            rows[outside]


def test_split_held_out() -> None:
    first, second = split_held_out(Rows.of("x", list("abcde")))
    assert (list(first), list(second)) == (["a", "b"], ["c", "d", "e"])
    assert (second.start, second.stop) == (2, 5)
    with pytest.raises(DataError, match="'x' has 1 row"):
        split_held_out(Rows.of("x", ["a"]))


# ---- real data


@pytest.mark.shared
def test_real_wikitext2_and_ptb(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTLLM_DATA", str(shared / "data"))
    wikitext = load_rows("wikitext2")
    assert len(wikitext) == 4358
    assert wikitext[:3] == ["", " = Robert Boulter = \n", ""]
    assert sum(row == "" for row in wikitext) == 1467
    assert sum(len(row.split()) for row in wikitext) == 241_211
    assert all(row == "" or row.endswith(" \n") for row in wikitext)
    ptb = load_rows("ptb")
    assert (len(ptb), len(load_rows("ptb:test"))) == (3370, 3761)
    assert ptb[0].startswith("consumers may want") and ptb[0].endswith("the tv set")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "role", "count"),
    [("c4", "calibration", 2000), ("c4", "evaluation", 300), ("alpaca", "calibration", 3035)],
)
def test_real_local_copies(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str, role: Any, count: int
) -> None:
    monkeypatch.setenv("SHORTLLM_DATA", str(shared / "data"))
    assert len(load_rows(name, role=role)) == count


@pytest.mark.shared
def test_real_files(shared: Path) -> None:
    assert len(load_rows(f"{shared}/data/books/valid.jsonl.xz")) == 330
    assert len(load_rows(f"{shared}/data/wikitext2/test.jsonl.gz")) == 62
    assert len(load_rows(f"{shared}/data/wikitext2/wiki.valid.tokens")) == 3760


# ---- records as a stream


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_records_keep_their_columns_and_can_be_read_again(
    tmp_path: Path, kind: str, packed: str
) -> None:
    file = tmp_path / f"data{kind}{packed}"
    file.write_bytes(PACKERS[packed](_bytes_of(kind, TEXTS)))
    records = open_records(str(file))
    name: Callable[[int], Any] = str if kind == ".csv" else int
    whole = [{"id": name(number), "text": text} for number, text in enumerate(TEXTS)]
    expected: list[Any] = TEXTS if kind == ".txt" else whole
    assert list(records.read()) == list(records.read()) == expected
    assert list(records.rows()) == TEXTS
    assert (records.lines, records.files) == (kind == ".txt", (file,))


def test_records_of_built_in_names_are_those_to_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTLLM_DATA", str(tmp_path))
    (tmp_path / "alpaca").mkdir()
    record = {"instruction": "do", "input": "", "output": "done"}
    (tmp_path / "alpaca/train.jsonl").write_text(json.dumps(record))
    assert list(open_records("alpaca").read()) == [record]
    embedded = open_records("embedded")
    assert embedded.source == "embedded:train"
    assert next(embedded.rows()) == load_rows("embedded:train")[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wiki.tst", "no such file"),
        ("", "unknown data source ''"),
        ("wikitxt2", "Did you mean 'wikitext2'"),
        ("ptb:tst", "'ptb' has no split 'tst'. Did you mean 'test'"),
        ("no/such", "cannot load 'no/such:train'"),
    ],
)
def test_records_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_records(source)


def test_records_of_the_hub_are_streamed(asked: _Asked) -> None:
    records = open_records("some/data:config")
    assert (asked["config"], asked["split"], asked["streaming"]) == ("config", "train", True)
    assert next(records.read()) == {"n": 1, "sentence": "a"}
    assert records.source == "some/data:config:train"
