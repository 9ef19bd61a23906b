"""Calibration ids and evaluation segments, against plain re-implementations and by hand."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from shortllm.data import calibration
from shortllm.data.calibration import (
    Calibration,
    check_ids,
    load_calibration,
    resolve_calibration,
    tokens_fingerprint,
    without_text_of,
)
from shortllm.data.options import CalibrationOptions
from shortllm.data.rows import Rows
from shortllm.data.sources import load_rows
from shortllm.errors import DataError, OutputError, ResultFileError, ShortLLMError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.texts import evaluation_segments

BOS = 0


def _tokenizer(*, bos: bool) -> PreTrainedTokenizerBase:
    """Words w1..w999 are tokens 1..999; with `bos`, token 0 stands before each text."""
    vocabulary = {"<s>": BOS, **{f"w{i}": i for i in range(1, 1000)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not bos:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8)


def sample_random(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> torch.Tensor:
    return calibration.sample_random(rows, tokenizer, CalibrationOptions(**options))


def sample_packed(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> torch.Tensor:
    return calibration.sample_packed(rows, tokenizer, CalibrationOptions(**options))


def build_calibration(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Calibration:
    return calibration.build_calibration(rows, tokenizer, CalibrationOptions(**options))


def _row(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


@pytest.fixture(scope="module")
def with_bos() -> PreTrainedTokenizerBase:
    return _tokenizer(bos=True)


@pytest.fixture(scope="module")
def without_bos() -> PreTrainedTokenizerBase:
    return _tokenizer(bos=False)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """60 rows of 0 to 39 words."""
    return Rows.of("words", [_row(1 + 13 * i, (i * 7) % 40) for i in range(60)])


# ---- random


def _published_rule(
    rows: list[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    bos_every_sample: bool,
) -> list[list[int]]:
    """METHODS section 1, as plainly as it can be written, on the global generator."""
    random.seed(seed)
    used: list[int] = []
    result = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(rows) - 1)
            tokens = tokenizer(rows[i], add_special_tokens=not bos_every_sample).input_ids
            if len(tokens) >= length and i not in used:
                used.append(i)
                break
        j = random.randint(0, len(tokens) - length)
        window = tokens[j : j + length]
        result.append([tokenizer.bos_token_id, *window[:-1]] if bos_every_sample else window)
    return result


@pytest.mark.parametrize("seed", [1234, 0, 7])
@pytest.mark.parametrize("bos_every_sample", [False, True])
@pytest.mark.parametrize("samples", [1, 10, 22])
def test_random_is_the_published_rule(
    rows: Rows,
    with_bos: PreTrainedTokenizerBase,
    seed: int,
    bos_every_sample: bool,
    samples: int,
) -> None:
    options: dict[str, Any] = {"samples": samples, "length": 24, "seed": seed}
    ids = sample_random(rows, with_bos, bos_every_sample=bos_every_sample, **options)
    expected = _published_rule(list(rows), with_bos, bos_every_sample=bos_every_sample, **options)
    assert ids.tolist() == expected
    assert ids.dtype == torch.int64 and ids.shape == (samples, 24)


def test_random_without_bos(rows: Rows, without_bos: PreTrainedTokenizerBase) -> None:
    ids = sample_random(rows, without_bos, samples=10, length=24, seed=5)
    assert ids.tolist() == _published_rule(list(rows), without_bos, 10, 24, 5, False)
    with pytest.raises(
        DataError, match="has no BOS to put before every sample. Leave out --bos-ev"
    ):
        sample_random(rows, without_bos, samples=10, length=24, bos_every_sample=True)


def test_bos_counts_for_the_length_only_where_it_is_tokenized(
    with_bos: PreTrainedTokenizerBase,
) -> None:
    nine = Rows.of("nine", [_row(1, 9)])
    assert sample_random(nine, with_bos, samples=1, length=10).tolist() == [[BOS, *range(1, 10)]]
    with pytest.raises(DataError, match="only 0 of 1 rows have at least 10 tokens"):
        sample_random(nine, with_bos, samples=1, length=10, bos_every_sample=True)
    every = sample_random(nine, with_bos, samples=1, length=9, bos_every_sample=True)
    assert every.tolist() == [[BOS, *range(1, 9)]]


@pytest.mark.parametrize(
    ("texts", "taken"),
    [
        (["w1"] * 50, 0),
        ([_row(1, 20)] * 3 + ["w1"] * 47, 3),
        ([_row(1, 20)] * 9, 9),
        ([""], 0),
        (["w1"] * 1500 + [_row(1, 20)], 1),
    ],
)
def test_random_ends_when_rows_run_out(
    with_bos: PreTrainedTokenizerBase, texts: list[str], taken: int
) -> None:
    message = (
        f"only {taken} of {len(texts)} rows have at least 16 tokens, 10 samples need 10.*packed"
    )
    with pytest.raises(DataError, match=message):
        sample_random(Rows.of("short", texts), with_bos, samples=10, length=16)


def test_random_reads_a_row_once(with_bos: PreTrainedTokenizerBase) -> None:
    """A row known to be short is not read again, so one long row among many short ones is found."""

    class Counted(list[str]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    texts = Counted(["w1"] * 300 + [_row(1, 30)])
    assert sample_random(texts, with_bos, samples=1, length=30).shape == (1, 30)
    assert texts.reads <= len(texts) + 1


def test_senseless_shapes() -> None:
    at_least = "must be greater than or equal to"
    for samples, length in [(0, 8), (1, 1), (-1, 8)]:
        with pytest.raises(ShortLLMError, match=at_least):
            CalibrationOptions(samples=samples, length=length)
    for shape in ({"length": 1}, {"max_segments": 0}):
        with pytest.raises(ShortLLMError, match=at_least):
            EvaluationOptions(**shape)


def test_long_rows_are_no_warning(
    rows: Rows, with_bos: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        sample_random(rows, with_bos, samples=2, length=24)
        sample_packed(rows, with_bos, samples=2, length=24)
        evaluation_segments(rows, with_bos, length=24)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


# ---- packed


def test_packed(with_bos: PreTrainedTokenizerBase, without_bos: PreTrainedTokenizerBase) -> None:
    rows = Rows.of("short", ["w1 w2", "", "w3", "w4 w5 w6 w7", "w8"])
    expected = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert sample_packed(rows, with_bos, samples=2, length=4).tolist() == expected
    assert sample_packed(rows, without_bos, samples=2, length=4).tolist() == expected
    every = sample_packed(rows, with_bos, samples=2, length=4, bos_every_sample=True)
    assert every.tolist() == [[BOS, 1, 2, 3], [BOS, 4, 5, 6]]
    with pytest.raises(DataError, match="all 5 rows give 8 tokens, 3 samples need 12"):
        sample_packed(rows, with_bos, samples=3, length=4)
    with pytest.raises(DataError, match="has no BOS"):
        sample_packed(rows, without_bos, samples=1, length=4, bos_every_sample=True)


def test_packed_stops_reading(with_bos: PreTrainedTokenizerBase) -> None:
    class Endless:
        read = 0

        def __len__(self) -> int:
            return 74_000_000

        def __getitem__(self, index: int, /) -> str:
            self.read += 1
            return "w1 w2"

    texts = Endless()
    sample_packed(Rows.of("endless", texts), with_bos, samples=3, length=100)
    evaluation_segments(Rows.of("endless", texts), with_bos, length=100, max_segments=2)
    assert texts.read < 2000


# ---- the record, saving and loading


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({}, {"sampler": "random", "seed": 1234, "bos": "tokenizer"}),
        ({"bos_every_sample": True}, {"sampler": "random", "bos": "every-sample"}),
        ({"sampler": "packed"}, {"sampler": "packed", "seed": None, "bos": "none"}),
        ({"sampler": "packed", "bos_every_sample": True}, {"bos": "every-sample"}),
    ],
)
def test_build_records_its_choices(
    rows: Rows,
    with_bos: PreTrainedTokenizerBase,
    options: dict[str, Any],
    recorded: dict[str, Any],
) -> None:
    made = build_calibration(rows.span(5, 55), with_bos, samples=4, length=16, **options)
    info = made.info.model_dump()
    assert recorded.items() <= info.items()
    assert (info["source"], info["rows"]) == ("words", (5, 55))
    assert (info["samples"], info["length"]) == tuple(made.ids.shape) == (4, 16)
    assert info["tokens_fingerprint"] == tokens_fingerprint(made.ids)
    again = build_calibration(rows.span(5, 55), with_bos, samples=4, length=16, **options)
    assert again.info == made.info and torch.equal(again.ids, made.ids)
    other = build_calibration(rows.span(0, 55), with_bos, samples=4, length=16, **options)
    assert other.info.fingerprint != made.info.fingerprint


def test_build_from_a_source(tmp_path: Path, without_bos: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\n".join(_row(i, 20) for i in range(1, 30)))
    made = build_calibration(load_rows(str(file)), without_bos, samples=3, length=16)
    assert (made.info.source, made.info.rows, made.info.bos) == (str(file), (0, 29), "none")
    assert str(made) == f"3 samples of 16 tokens from {file} (random)"


@pytest.fixture
def made(rows: Rows, with_bos: PreTrainedTokenizerBase) -> Calibration:
    return build_calibration(rows, with_bos, samples=4, length=16)


def test_fingerprint_is_stable() -> None:
    ids = torch.arange(6).view(2, 3)
    recorded = "f37c80c6d35cd489daf64e10b531b2475d5a506c08a2dd14194a4854ecd58cdc"
    assert tokens_fingerprint(ids) == recorded
    assert tokens_fingerprint(ids.t().contiguous().t()) == recorded
    assert tokens_fingerprint(ids.view(3, 2)) != recorded


@pytest.mark.parametrize("given", ["", "calibration.safetensors", "calibration.json"])
def test_round_trip(made: Calibration, tmp_path: Path, given: str) -> None:
    made.save(tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "calibration.json",
        "calibration.safetensors",
    ]
    back = load_calibration(tmp_path / "run" / given)
    assert torch.equal(back.ids, made.ids) and back.ids.dtype == torch.int64
    assert back.info == made.info


def test_pair_that_does_not_belong_together(made: Calibration, tmp_path: Path) -> None:
    made.save(tmp_path)
    save_file({"ids": made.ids + 1}, tmp_path / "calibration.safetensors")
    with pytest.raises(DataError, match="does not contain the ids that calibration.json describes"):
        load_calibration(tmp_path)
    (tmp_path / "calibration.json").unlink()
    with pytest.raises(DataError, match="no finished calibration: calibration.json is missing"):
        load_calibration(tmp_path)
    given = load_calibration(tmp_path / "calibration.safetensors")
    assert given.info.sampler == "given" and torch.equal(given.ids, made.ids + 1)


def test_save_where_a_file_is(made: Calibration, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="run is a file. Choose another --out"):
        made.save(tmp_path / "run")


def test_list_of_lists(tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[[1, 2, 3], [4, 5, 6]]")
    given = load_calibration(file)
    assert given.ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (given.info.sampler, given.info.seed, given.info.rows) == ("given", None, None)
    given.save(tmp_path / "run")
    assert load_calibration(tmp_path / "run").info == given.info


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2], [3]]", "same length, these have 1 to 2 tokens"),
        ("[]", "must be a list of lists"),
        ("[1, 2]", "must be a list of lists"),
        ("[[]]", r"at least 1 sample of 2 tokens, these are int64 \[1, 0\]"),
        ("[[1], [2]]", r"at least 1 sample of 2 tokens, these are int64 \[2, 1\]"),
        ("[[1, -2]]", "cannot be negative, the lowest is -2"),
        ("[[1, 2.5]]", "sample 0 contains 2.5, which is not a token id"),
        ("[[1, 2], [1, true]]", "sample 1 contains True"),
        ('[["a", "b"]]', "sample 0 contains 'a'"),
        (f"[[1, {10**30}]]", "which is not a token id"),
        ("[[1, 2]", "cannot read .* as JSON"),
    ],
)
def test_bad_lists(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_calibration(tmp_path / "ids.json")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such calibration file"):
        load_calibration(tmp_path / "none.json")
    (tmp_path / "ids.txt").write_text("")
    with pytest.raises(DataError, match="cannot tell what kind of calibration"):
        load_calibration(tmp_path / "ids.txt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(DataError, match="cannot read token ids from .*cut"):
        load_calibration(tmp_path / "cut.safetensors")
    save_file({"tokens": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="has no tensor 'ids'; it has tokens"):
        load_calibration(tmp_path / "other.safetensors")
    save_file({"ids": torch.ones(2, 2)}, tmp_path / "float.safetensors")
    with pytest.raises(DataError, match=r"must be int64 .* these are float32 \[2, 2\]"):
        load_calibration(tmp_path / "float.safetensors")
    (tmp_path / "calibration.json").write_text(json.dumps({"sampller": "random"}))
    with pytest.raises(ResultFileError, match="is not a valid calibration.json"):
        load_calibration(tmp_path)


def test_check_ids() -> None:
    ids = torch.tensor([[0, 9]])
    check_ids(ids)
    check_ids(ids, 10)
    with pytest.raises(DataError, match="token id 9 is outside the model's vocabulary of 9"):
        check_ids(ids, 9)


# ---- defaults that depend on the model


def test_defaults_that_depend_on_the_model() -> None:
    default = CalibrationOptions()
    plain = resolve_calibration(default, "llama")
    assert (plain.data, plain.bos_every_sample) == ("bookcorpus", False)
    gemma = resolve_calibration(default, "gemma2", embedded=True)
    assert (gemma.data, gemma.bos_every_sample) == ("embedded", True)
    given = CalibrationOptions(data="c4", bos_every_sample=False)
    assert resolve_calibration(given, "gemma2") == given
    ids = CalibrationOptions(file=Path("ids.json"))
    assert resolve_calibration(ids, "llama").data is None
    with pytest.raises(DataError, match="--calibration gives token ids.* Leave one of them out"):
        resolve_calibration(CalibrationOptions(data="c4", file=Path("ids.json")), "llama")


# ---- segments


@pytest.mark.parametrize(
    ("bos", "expected"),
    [
        ("first", [[BOS, 1, 2], [3, 4, 5]]),
        ("every", [[BOS, 1, 2, 3], [BOS, 4, 5, 6]]),
        ("none", [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_segments_by_hand(
    with_bos: PreTrainedTokenizerBase,
    without_bos: PreTrainedTokenizerBase,
    bos: Any,
    expected: list[list[int]],
) -> None:
    rows = Rows.of("short", ["w1 w2 w3", "", "w4", "w5 w6", ""])
    segments = evaluation_segments(rows, with_bos, length=3, bos=bos)
    assert (segments.ids.tolist(), segments.bos, segments.length) == (expected, bos, 3)
    assert len(evaluation_segments(rows, with_bos, length=3, bos=bos, max_segments=1)) == 1
    fallen_back = evaluation_segments(rows, without_bos, length=3, bos=bos)
    assert fallen_back.ids.tolist() == [[1, 2, 3], [4, 5, 6]] and fallen_back.bos == "none"


def test_rows_are_joined_by_a_blank_line() -> None:
    characters = Tokenizer(models.BPE({"\n": 0, "a": 1, "b": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    segments = evaluation_segments(["a\n", "", "b"], tokenizer, length=7)
    assert segments.ids.tolist() == [[1, 0, 0, 0, 0, 0, 2]]


def test_segments_that_cannot_be(with_bos: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        DataError, match="the text gives 4 tokens to measure on, less than one segment of 5"
    ):
        evaluation_segments(["w1 w2 w3"], with_bos, length=5)


# ---- real data and tokenizers


@pytest.mark.shared
@pytest.mark.parametrize("model", ["stories260K", "books5M"])
def test_real_tokenizers(shared: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("SHORTLLM_DATA", str(shared / "data"))
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    rows = load_rows("c4", role="calibration").span(0, 200)
    for every in (False, True):
        ids = sample_random(rows, tokenizer, bos_every_sample=every)
        assert ids.tolist() == _published_rule(list(rows), tokenizer, 10, 128, 1234, every)
        check_ids(ids, len(tokenizer))


@pytest.mark.shared
@pytest.mark.parametrize("model", ["stories260K", "books5M"])
def test_real_segments(shared: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("SHORTLLM_DATA", str(shared / "data"))
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    rows = load_rows("wikitext2").span(0, 600)
    everything = evaluation_segments(rows, tokenizer)
    tokens = tokenizer("\n\n".join(rows), add_special_tokens=False).input_ids
    assert everything.bos == "first" and everything.ids[0, 0] == tokenizer.bos_token_id
    assert everything.ids.flatten().tolist()[1:] == tokens[: everything.ids.numel() - 1]
    assert 0 <= len(tokens) + 1 - everything.ids.numel() < 128
    some = evaluation_segments(rows, tokenizer, max_segments=40)
    assert torch.equal(some.ids, everything.ids[:40])


def test_samples_that_share_text_are_left_out() -> None:
    ids = torch.arange(4 * 100).view(4, 100)
    window = ids[1:2, 30:80]  # of a sample, cut at another place
    assert torch.equal(without_text_of(ids, window), ids[[0, 2, 3]])
    assert torch.equal(without_text_of(ids, window[:, :31]), ids[[0, 2, 3]])  # all of it
    scattered = torch.cat([ids[2:3, :31], ids[3:4, 50:81]], dim=1)
    assert torch.equal(without_text_of(ids, scattered), ids)  # 31 in a row may be chance
    assert torch.equal(without_text_of(ids, ids), ids)  # there is no other text
