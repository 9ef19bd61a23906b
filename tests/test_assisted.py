"""Text with a draft: counts, equality and near ties, `bench --draft`, lines for other programs."""

from __future__ import annotations

import csv
import json
import shlex
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from families import build, saved, shortened
from test_cli import call
from torch import Tensor
from transformers import MambaConfig

import shortllm
from shortllm.benchmark import drafted as drafted_runs
from shortllm.benchmark.assisted import (
    AssistedText,
    Difference,
    check_assisted,
    first_difference,
    generate_assisted,
    generate_plain,
)
from shortllm.benchmark.draft_lines import draft_lines
from shortllm.benchmark.options import Benchmark
from shortllm.benchmark.prompts import REQUESTS, load_prompts
from shortllm.checkpoint.source import open_checkpoint
from shortllm.errors import CheckpointError, DataError, OutputError, ShortLLMError
from shortllm.reporting import render
from shortllm.reporting.measurements import drafted_section
from shortllm.reporting.parts import Page

PROMPT = torch.arange(1, 8)
NEW = 24


def pair(name: str, noise: float = 0.1) -> tuple[Any, Any]:
    """A model and a draft that often agrees with it: the same with noise on its weights."""
    model, draft = build(name), build(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.ndim > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return model.eval(), draft.eval()


def best(model: Any, ids: list[int]) -> int:
    """The likeliest next token, by a forward of the whole text."""
    with torch.inference_mode():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def plain_loop(
    model: Any, draft: Any, prompt_T: Tensor, new_tokens: int, draft_tokens: int
) -> tuple[list[int], list[int], int]:
    """Speculative decoding without a cache: the new tokens, those of each step, those drafted."""
    ids, start = prompt_T.tolist(), len(prompt_T)
    kept, drafted = [], 0
    while (left := start + new_tokens - len(ids)) > 0:
        proposed: list[int] = []
        while len(proposed) < min(draft_tokens, left - 1):
            proposed.append(best(draft, ids + proposed))
        drafted += len(proposed)
        added: list[int] = []
        while True:
            added.append(best(model, ids + added))
            if proposed[len(added) - 1 : len(added)] != added[-1:]:
                break
        ids += added
        kept.append(len(added))
    return ids[start:], kept, drafted


@pytest.mark.parametrize("draft_tokens", [1, 3, 6])
@pytest.mark.parametrize("name", ["llama", "granite", "gpt2", "gemma", "falcon-new"])
def test_counts_are_those_of_a_plain_loop(name: str, draft_tokens: int) -> None:
    model, draft = pair(name)
    ids, kept, drafted = plain_loop(model, draft, PROMPT, NEW, draft_tokens)
    found = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=draft_tokens)
    assert (found.ids, found.kept, found.drafted) == (ids, kept, drafted)
    assert found.steps == len(kept) and found.accepted == NEW - len(kept)
    assert 0 < found.accepted <= drafted
    alone = generate_plain(model, PROMPT, NEW)
    assert alone.ids == ids and (alone.steps, alone.accepted, alone.drafted) == (NEW, 0, 0)
    assert first_difference(model, PROMPT, alone.ids, found.ids) is None


def test_a_draft_that_is_the_model_itself_is_accepted_as_a_whole() -> None:
    model, draft = pair("llama", noise=0)
    found = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=5)
    assert found.kept == [6, 6, 6, 6] and found.drafted == 20


def test_rules_of_generation_config_have_no_effect_and_stay() -> None:
    model, draft = pair("llama")
    expected = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=4)
    for one, penalty in ((model, 3.0), (draft, 5.0)):
        one.generation_config.repetition_penalty = penalty
        one.generation_config.eos_token_id = expected.ids[0]
    draft.generation_config.assistant_confidence_threshold = 0.999
    found = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=4)
    assert (found.ids, found.kept) == (expected.ids, expected.kept)
    assert draft.generation_config.repetition_penalty == 5.0
    assert not model._forward_hooks


def test_text_may_end_before() -> None:
    model, draft = pair("llama")
    whole = generate_plain(model, PROMPT, NEW).ids
    end = next(n for n in range(5, NEW) if whole[n] not in whole[:n])
    alone = generate_plain(model, PROMPT, NEW, ends=[whole[end]])
    found = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=4, ends=[whole[end]])
    assert alone.ids == found.ids == whole[: end + 1]
    assert sum(found.kept) == len(found.ids) and found.steps < alone.steps


def test_sampled_text_has_the_acceptance_of_the_two_distributions() -> None:
    """The chance that a drafted token is accepted is the overlap of the two distributions."""
    model, draft = pair("llama", noise=0.3)
    start = PROMPT.tolist()
    with torch.inference_mode():
        p_V, q_V = (
            (one(torch.tensor([start])).logits[0, -1] / 2.0).softmax(-1) for one in (model, draft)
        )
    overlap = float(torch.minimum(p_V, q_V).sum())
    texts = [
        generate_assisted(model, draft, PROMPT, 2, draft_tokens=1, temperature=2.0, seed=seed)
        for seed in range(150)
    ]
    rate = sum(one.kept[0] == 2 for one in texts) / len(texts)
    assert abs(rate - overlap) < 4 * (overlap * (1 - overlap) / len(texts)) ** 0.5
    again = generate_assisted(model, draft, PROMPT, 2, draft_tokens=1, temperature=2.0, seed=7)
    assert again.ids == texts[7].ids
    assert (
        generate_plain(model, PROMPT, 9, temperature=2.0, seed=1).ids
        != generate_plain(model, PROMPT, 9, temperature=2.0, seed=2).ids
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_is_a_near_tie_only_within_rounding(dtype: torch.dtype) -> None:
    model: Any = build("llama").to(dtype)
    ids = generate_plain(model, PROMPT, 6).ids
    with torch.inference_mode():
        logits_V = model(torch.tensor([[*PROMPT.tolist(), *ids[:3]]])).logits[0, -1].float()
    second, worst = logits_V.topk(2).indices[1].item(), logits_V.argmin().item()
    found = first_difference(model, PROMPT, ids, [*ids[:3], worst, *ids[4:]])
    assert isinstance(found, Difference) and not found.is_near_tie
    assert (found.place, found.plain, found.assisted) == (3, ids[3], worst)
    assert found.gap == pytest.approx(float(logits_V.max() - logits_V.min()))
    with torch.no_grad():  # the two likeliest tokens get the same logit
        model.lm_head.weight[second] = model.lm_head.weight[ids[3]]
    tied = first_difference(model, PROMPT, ids, [*ids[:3], int(second), *ids[4:]])
    assert tied is not None and tied.gap == 0 and tied.is_near_tie
    scale = float(logits_V.abs().max()) * torch.finfo(dtype).eps
    assert tied.rounding == pytest.approx(scale * (32 if dtype == torch.float32 else 4), rel=0.05)


def test_what_the_library_cannot_do_is_refused() -> None:
    windowed, draft = pair("gemma2", noise=0)
    with pytest.raises(ShortLLMError, match="sliding window of 5 tokens of the draft"):
        generate_assisted(windowed, draft, PROMPT, 4, draft_tokens=2)
    assert generate_assisted(windowed, draft, PROMPT[:2], 3, draft_tokens=2).kept == [3]
    with pytest.raises(ShortLLMError, match="cannot help MambaForCausalLM: its cache is a state"):
        check_assisted(MambaConfig(), MambaConfig(), 4)
    check_assisted(build("llama").config, draft.config, 5)


def test_what_the_library_cannot_do_is_refused_before_speed_is_measured(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise ShortLLMError("a window is too small")

    monkeypatch.setattr(drafted_runs, "check_assisted", refuse)
    monkeypatch.setattr("shortllm.measure.measure_speed", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ShortLLMError, match="a window is too small"):
        shortllm.bench("embedded", draft=str(short), **QUICK)


# ---- bench --draft

QUICK: dict[str, Any] = {"new_tokens": 12, "warmup": 1, "runs": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without one of its blocks."""
    return shortened(open_checkpoint("embedded"), [6], tmp_path_factory.mktemp("draft") / "short")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def measured(short: Path, directory: Path) -> Benchmark:
    """The embedded model with a draft that proposes two tokens, or four."""
    return shortllm.bench("embedded", draft=short, draft_tokens=[2, 4], out=directory, **QUICK)


def test_each_draft_length_has_its_figures(measured: Benchmark) -> None:
    assert measured.drafted is not None
    assert [one.model.blocks for one in measured.drafted.drafts] == [11]
    assert [one.draft_tokens for one in measured.drafted.measurements] == [2, 4]
    for one in measured.drafted.measurements:
        assert (one.draft, one.prompts, one.texts, one.near_ties) == ("short", "text", 3, 0)
        assert one.steps + one.accepted == 3 * 12 and 0 < one.accepted <= one.drafted
        assert 1 < one.tokens_per_step <= one.draft_tokens + 1
        assert one.tokens_per_step_stderr is not None
        ratios = [a / d for a, d in zip(one.alone_s, one.drafted_s, strict=True)]
        assert len(ratios) == 3 and one.speedup == statistics.median(ratios)
        assert one.drafted_tokens_per_s == pytest.approx(1 / statistics.fmean(one.drafted_s))
    two, four = measured.drafted.measurements
    assert two.alone_s == four.alone_s  # the same runs
    assert "with draft short, " in str(measured)


def test_files_and_the_section_of_a_report(measured: Benchmark, directory: Path) -> None:
    assert Benchmark.load(directory / "bench.json") == measured
    assert measured.drafted is not None
    with (directory / "bench-drafts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["draft_tokens"] for row in rows] == ["2", "4"]
    assert float(rows[0]["speedup"]) == measured.drafted.measurements[0].speedup
    section = drafted_section(measured)
    assert section is not None and drafted_section(None) is None
    slow = measured.drafted.measurements[0].model_copy(update={"speedup": 0.5, "near_ties": 2})
    found = measured.drafted.model_copy(update={"measurements": [slow]})
    assert str(found).endswith("0.500 times as fast: slower")
    section = drafted_section(measured.model_copy(update={"drafted": found}))
    assert section is not None
    page = render(Page(name="a", title="b", verdict="", version="", sections=[section]))
    assert "slower" in page and "2 near ties" in page and "No draft makes it faster" in page


def test_what_is_up_to_date_is_kept(
    measured: Benchmark, short: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("measured again")

    for name in ("measure_speed", "measure_drafts"):
        monkeypatch.setattr(f"shortllm.measure.{name}", never)
    more: dict[str, Any] = {"out": directory, **QUICK}
    assert shortllm.bench("embedded", draft=short, draft_tokens=[2, 4], **more) == measured
    assert shortllm.bench("embedded", **more) == measured  # the sweep alone
    with pytest.raises(OutputError, match="made with other choices"):
        shortllm.bench("embedded", draft=short, draft_tokens=3, **more)
    other = measured.drafted and measured.drafted.model_copy(update={"fingerprint": "other"})
    monkeypatch.setattr("shortllm.measure.measure_drafts", lambda *arguments: other)
    again = shortllm.bench("embedded", draft=short, draft_tokens=3, overwrite=True, **more)
    assert again.drafted == other and again.measurements == measured.measurements
    measured.save(directory / "bench.json")


def test_a_stale_draft_is_left_out_of_a_report(measured: Benchmark) -> None:
    assert measured.drafted is not None
    [draft] = measured.drafted.drafts
    intact = measured.models[0].model.fingerprint
    assert measured.is_about({"original": intact, "short": draft.model.fingerprint})
    assert not measured.is_about({"original": intact, "short": "another"})


@pytest.mark.parametrize("near", [True, False])
def test_other_text_with_a_draft_is_an_error_but_for_near_ties(
    near: bool, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*arguments: Any, **more: Any) -> AssistedText:
        text = generate_assisted(*arguments, **more)
        return replace(text, ids=[*text.ids[:5], text.ids[5] + 1, *text.ids[6:]])

    def rounded(*arguments: Any) -> Difference | None:
        found = first_difference(*arguments)
        return found and replace(found, gap=found.rounding)

    monkeypatch.setattr(drafted_runs, "generate_assisted", changed)
    if near:
        monkeypatch.setattr("shortllm.benchmark.assisted.first_difference", rounded)
        found = shortllm.bench("embedded", draft=short, **QUICK).drafted
        assert found is not None and found.measurements[0].near_ties == 3
    else:
        with pytest.raises(ShortLLMError, match=r"prompt \d of embedded.*new token 5 is"):
            shortllm.bench("embedded", draft=short, **QUICK)


def test_bfloat16_and_sampling(short: Path) -> None:
    more = {**QUICK, "runs": 2}
    found = shortllm.bench("embedded", draft=short, dtype="bfloat16", **more).drafted
    assert found is not None and found.measurements[0].accepted > 0
    sampled = shortllm.bench("embedded", draft=short, temperature=0.8, **more).drafted
    assert sampled is not None and sampled.temperature == 0.8
    assert sampled.measurements[0].near_ties == 0


def test_prompts_are_texts_and_requests(tmp_path: Path, short: Path) -> None:
    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": f"Where is the {thing}?", "completion": "a"} for thing in ("hat", "bell")]
    path.write_text("\n".join(map(json.dumps, rows)))
    checkpoint = open_checkpoint("embedded")
    text, chat = load_prompts(checkpoint, ["embedded", str(path)], 4)
    assert (text.kind, text.template, len(text.prompts)) == ("text", None, 4)
    assert {len(one.ids) for one in text.prompts} == {32} and not text.prompts[0].ends
    assert (chat.kind, chat.template, len(chat.prompts)) == ("chat", "alpaca", 2)
    assert chat.prompts[0].ends
    with pytest.raises(DataError, match="has no prompt"):
        (tmp_path / "few.txt").write_text("too short")
        load_prompts(checkpoint, [str(tmp_path / "few.txt")])


@pytest.mark.shared
def test_built_in_prompts_fit_a_real_model(smollm_gguf: Path) -> None:
    text, chat = load_prompts(open_checkpoint(smollm_gguf), [], 16)
    assert (text.source, chat.source, chat.template) == ("built-in", "built-in", "chat")
    assert len(text.prompts) == 8 and len(chat.prompts) == len(REQUESTS)
    assert {len(one.ids) for one in text.prompts} == {32}


def test_what_cannot_draft_is_refused_before_loading(
    short: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shortllm.measure.measure_speed", lambda *arguments: pytest.fail("loaded"))
    other = shortened(open_checkpoint("embedded"), [5], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="the tokenizers of embedded and of the draft other"):
        shortllm.bench("embedded", draft=other, **QUICK)
    with pytest.raises(CheckpointError, match="has a vocabulary of 97 and embedded one of"):
        shortllm.bench("embedded", draft=saved("llama"), **QUICK)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        shortllm.bench(saved("llama"), draft=saved("llama"), **QUICK)
    with pytest.raises(ShortLLMError, match="Leave out --compile, or --draft"):
        shortllm.bench("embedded", draft=short, compile=True, **{**QUICK, "warmup": 2})
    with pytest.raises(ShortLLMError, match="--draft-tokens has no effect without --draft"):
        shortllm.bench("embedded", draft_tokens=3, **QUICK)
    with pytest.raises(DataError, match="32 tokens of the prompt and 500 new ones exceed"):
        shortllm.bench("embedded", draft=short, **{**QUICK, "new_tokens": 500, "prompt": "a"})


def test_the_command_prints_a_table_or_json(short: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["--new-tokens", "6", "--runs", "1", "--warmup", "1", "--device", "cpu"]
    code, out, _ = call(capfd, "bench", "embedded", "--draft", short, *small)
    assert code == 0 and "tokens per step" in out
    assert "The text is the same as without the draft, token by token." in out
    code, out, _ = call(capfd, "bench", "embedded", "--draft", short, *small, "--json")
    assert code == 0 and out.count("\n") == 1
    assert json.loads(out)["drafted"]["measurements"][0]["draft_tokens"] == 4


@pytest.mark.shared
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_writes_the_same_with_a_draft(
    dtype: str, smollm_gguf: Path, tmp_path: Path
) -> None:
    shortllm.prune(str(smollm_gguf), [20, 21], tmp_path / "short")
    more: dict[str, Any] = {"new_tokens": 24, "warmup": 1, "runs": 3, "device": "cpu"}
    measured = shortllm.bench(
        str(smollm_gguf), draft=tmp_path / "short", draft_tokens=3, dtype=dtype, **more
    )
    assert measured.drafted is not None
    text, chat = measured.drafted.measurements
    assert (text.prompts, chat.prompts, chat.template) == ("text", "chat", "chat")
    for one in (text, chat):
        assert one.tokens_per_step > 1.5 and one.near_ties <= (0 if dtype == "float32" else 2)


# ---- lines for other programs


def test_the_transformers_lines_run(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = draft_lines(str(open_checkpoint("embedded").directory), str(short), 4)["transformers"]
    exec(lines, {})
    assert "Once upon a time" in capsys.readouterr().out


def test_lines_name_files_of_llama_cpp_and_a_config_of_vllm() -> None:
    lines = draft_lines("owner/big", "runs/my draft", 5)
    words = shlex.split(lines["vLLM"])
    assert words[:4] == ["vllm", "serve", "owner/big", "--speculative-config"]
    assert json.loads(words[4]) == {
        "model": "runs/my draft", "num_speculative_tokens": 5, "method": "draft_model"
    }  # fmt: skip
    load, convert, again, serve = map(shlex.split, lines["llama.cpp"].splitlines())
    assert load == ["hf", "download", "owner/big", "--local-dir", "big"]
    assert convert == ["python", "convert_hf_to_gguf.py", "big", "--outfile", "big.gguf"]
    assert again[-1] == "my draft.gguf"
    assert serve[:5] == ["llama-server", "--model", "big.gguf", "--model-draft", "my draft.gguf"]
    lines = draft_lines("a/b.gguf", "c", 2)
    assert "from_pretrained('a', gguf_file='b.gguf')" in lines["transformers"]
    assert "do_sample=False" in lines["transformers"]
    alike = draft_lines("owner/draft", "draft", 2)["llama.cpp"].splitlines()[-1]
    assert "--model draft.gguf --model-draft short-draft.gguf" in alike


def test_the_sampling_lines_run(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = draft_lines("embedded", str(short), 4, temperature=0.7)["transformers"]
    exec(lines, {})
    assert "Once upon a time" in capsys.readouterr().out


@pytest.mark.shared
@pytest.mark.slow
def test_llama_cpp_writes_the_same_with_a_draft(smollm_gguf: Path, tmp_path: Path) -> None:
    import xllamacpp

    draft = tmp_path / "short.gguf"
    shortllm.prune(str(smollm_gguf), [20, 21], draft)
    line = draft_lines(str(smollm_gguf), str(draft), 3)["llama.cpp"]
    program, *flags = shlex.split(line)
    assert program == "llama-server"
    binary = Path(xllamacpp.xllamacpp.__file__).read_bytes()
    assert all(flag.encode() + b"\0" in binary for flag in flags[::2])
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given["--spec-type"] == "draft-simple"
    prompts = ["The Leaning Tower of Pisa is known for", "def fibonacci(n):"]
    alone = llama_cpp.generate(Path(given["--model"]), prompts, 32)
    found = llama_cpp.drafted(
        Path(given["--model"]), Path(given["--model-draft"]), prompts, 32,
        int(given["--spec-draft-n-max"]),
    )  # fmt: skip
    assert [text for text, _ in found] == alone
    for _, timings in found:
        assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
