"""`draft`: what a draft gains, what is accepted of it, and the command from model to page."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from test_cli import call

import shortllm
from shortllm.benchmark.assisted import generate_assisted, generate_plain
from shortllm.data.calibration import calibration_of
from shortllm.drafting.acceptance import accepted_from, accepted_without, summed_up
from shortllm.drafting.gain import expected_steps, ideal_tokens, speedup, through, tokens_per_step
from shortllm.drafting.options import Drafting, DraftOptions
from shortllm.drafting.prepare import prepare, spread
from shortllm.drafting.shared import draft_of
from shortllm.drafting.written import texts_of, write_training_texts
from shortllm.files import releasing
from shortllm.healing.options import HealOptions
from shortllm.model.decoder import Decoder
from shortllm.pruning.records import Pruning
from shortllm.runtime import Runtime

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2"]
UNLIMITED = ["llama", "mixtral", "gpt2", "gpt_neox"]
"""Without windows, whose caches transformers cannot crop once they are full."""
REMOVED = [2, 3]
SMALL = ["--texts", "4", "--new-tokens", "24", "--runs", "1", "--draft-tokens", "3",
         "--measured", "2"]  # fmt: skip


# ---- what a draft gains


def steps_by_hand(accepted: list[bool], length: int) -> int:
    """Steps of greedy drafts, token by token."""
    place = steps = 0
    while place < len(accepted):
        drafted = 0
        while drafted < length and place + 1 < len(accepted) and accepted[place]:
            place, drafted = place + 1, drafted + 1
        place, steps = place + 1, steps + 1
    return steps


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_steps_of_greedy_drafts_are_those_of_a_plain_loop(length: int) -> None:
    for bits in itertools.product([False, True], repeat=9):
        assert expected_steps(bits, length) == steps_by_hand(list(bits), length)


def test_expected_steps_are_the_mean_over_all_that_can_be_accepted() -> None:
    chances = [0.9, 0.2, 0.5, 1.0, 0.0, 0.7]
    mean = 0.0
    for bits in itertools.product([False, True], repeat=len(chances)):
        probability = math.prod(p if bit else 1 - p for p, bit in zip(chances, bits, strict=True))
        mean += probability * steps_by_hand(list(bits), 3)
    assert expected_steps(chances, 3) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
def test_tokens_per_step_of_a_long_text_are_those_of_the_formula(acceptance: float) -> None:
    for length in (1, 4):
        a, g = acceptance, length
        formula = g + 1 if a == 1 else (1 - a ** (g + 1)) / (1 - a)
        assert ideal_tokens(a, g) == pytest.approx(formula)
        assert tokens_per_step([[a] * 4000], g) == pytest.approx(formula, rel=2e-3)
        if a < 1:
            gain = (1 - a ** (g + 1)) / ((1 - a) * (g * 0.25 + 1))
            assert speedup(ideal_tokens(a, g), g, 0.25) == pytest.approx(gain)


def test_texts_count_by_their_steps() -> None:
    texts = [[True, True, False, True], [False]]
    assert tokens_per_step(texts, 2) == 5 / (2 + 1)


def test_times_lie_on_a_line_between_what_was_measured() -> None:
    line = through({2: [0.9, 0.7], 6: [0.4], 8: [0.4]})
    assert [line(n) for n in (0, 2, 4, 6, 7, 10)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.4, 0.4])
    assert through({3: [0.5]})(9) == 0.5


def test_measured_sizes_are_spread_and_contain_the_best() -> None:
    sizes = list(range(3, 19))
    assert spread(sizes, 4) == [3, 8, 13, 18]
    assert spread(sizes, 4, best=4) == [4, 8, 13, 18]
    assert spread(sizes, 1, best=7) == [7]
    assert spread([1, 2], 4, best=2) == [1, 2]


# ---- what is accepted


def text_of(model: Any, temperature: float = 0.0, new: int = 24) -> Any:
    """Two texts that the model wrote, of different lengths."""
    documents = []
    for number, prompt in enumerate(([5, 9, 11, 3], [7, 1, 20, 4, 8, 30, 2])):
        found = generate_plain(
            model, torch.tensor(prompt), new - 5 * number, temperature=temperature, seed=number
        )
        documents.append(([*prompt, *found.ids], (len(prompt), len(prompt) + len(found.ids))))
    return calibration_of(documents, fingerprint="", source="test")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_walk_accepts_what_a_loop_over_both_models_accepts(
    name: str, temperature: float
) -> None:
    model = build(name)
    text = text_of(model, temperature)
    [found] = accepted_without(Decoder(model), text, [REMOVED], temperature)
    draft = draft_of(model, REMOVED)
    by_hand = []
    for one in texts_of(text):
        ids = torch.cat([one.prompt_T, torch.tensor(one.ids)])[None]
        with torch.inference_mode():
            p, q = (m(input_ids=ids).logits[0, len(one.prompt_T) - 1 : -1] for m in (model, draft))
        if temperature:
            p, q = ((x.double() / temperature).softmax(-1) for x in (p, q))
            by_hand.append(torch.minimum(p, q).sum(-1).tolist())
        else:
            by_hand.append((p.argmax(-1) == q.argmax(-1)).double().tolist())
    assert [len(one) for one in found] == [24, 19]
    for one, expected in zip(found, by_hand, strict=True):
        assert one == pytest.approx(expected, abs=1e-5)
    again = accepted_from(model, draft, text, temperature)
    for one, other in zip(again, by_hand, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    sums = summed_up(found, 3)
    assert 0 <= sums.acceptance <= 1 and len(sums.tokens_per_step) == 3


@pytest.mark.parametrize("name", UNLIMITED)
def test_steps_of_greedy_text_are_those_that_transformers_takes(name: str) -> None:
    model = build(name)
    text = text_of(model, new=40)
    [accepted] = accepted_without(Decoder(model), text, [[3]], 0.0)
    draft = draft_of(model, [3])
    for one, chances in zip(texts_of(text), accepted, strict=True):
        for length in (1, 2, 5):
            assisted = generate_assisted(
                model, draft, one.prompt_T, len(one.ids), draft_tokens=length
            )
            assert assisted.ids == one.ids
            assert assisted.steps == expected_steps(chances, length)


def test_steps_of_sampled_text_are_expected_within_their_standard_error() -> None:
    model, temperature, length, runs = build("llama"), 0.5, 3, 48
    draft, decoder, prompt = draft_of(model, [3]), Decoder(model), [5, 9, 11, 3]
    expected, counted = [], []
    for seed in range(runs):
        plain = generate_plain(model, torch.tensor(prompt), 24, temperature=temperature, seed=seed)
        text = calibration_of([([*prompt, *plain.ids], (4, 28))], fingerprint="", source="test")
        [[chances]] = accepted_without(decoder, text, [[3]], temperature)
        expected.append(expected_steps(chances, length))
        assisted = generate_assisted(
            model, draft, torch.tensor(prompt), 24, draft_tokens=length,
            temperature=temperature, seed=1000 + seed,
        )  # fmt: skip
        counted.append(float(assisted.steps))
    one, other = torch.tensor(expected), torch.tensor(counted)
    error = math.sqrt(float(one.var() + other.var()) / runs)
    assert abs(float(one.mean() - other.mean())) < 3 * error


# ---- the command


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the command wrote for the embedded model."""
    directory = tmp_path_factory.mktemp("drafts") / "embedded"
    shortllm.draft("embedded", out=directory, texts=4, new_tokens=24, runs=1, draft_tokens=3,
                   measured=2)  # fmt: skip
    return directory


def test_the_command_chooses_writes_and_measures_a_draft(drafted: Path) -> None:
    found = Drafting.load(drafted / "draft.json")
    assert [one.remove for one in found.sizes] == [1, 2, 3, 4, 5, 6, 7]
    assert found.texts == 4 and found.prompts == ["4 prompts (text) from embedded:calibration"]
    for one in found.sizes:
        assert 0 < one.chosen_on.acceptance <= 1
        assert len(one.chosen_on.tokens_per_step) == len(one.held_out.tokens_per_step) == 3
        assert one.cost and one.predicted and one.draft_tokens in (1, 2, 3)
    assert len(found.measured) == 2 and found.costs is not None
    assert list(found.costs.drafting) == [1, 7] and list(found.costs.verifying) == [1, 2, 3]
    best = found.best
    assert best.speedup == max(one.speedup for one in found.measured) > 0
    by_size = {one.remove: one for one in found.sizes}
    for one in found.measured:  # the counts are known exactly; times vary
        tokens = by_size[one.remove].held_out.tokens_per_step[one.draft_tokens - 1]
        assert one.tokens_per_step == pytest.approx(tokens, rel=1e-9) or one.near_ties
    assert Pruning.load(drafted / "draft" / "prune.json").removed == best.removed
    assert shortllm.load(drafted / "draft").config.num_hidden_layers == 12 - best.remove
    page = (drafted / "draft.html").read_text()
    assert "blocks removed" in page and "assistant_model" in page
    assert ("no draft is worth it here" in found.verdict) == (best.speedup <= 1)
    rows = [json.loads(line) for line in (drafted / "written.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["prompt"] and row["completion"] for row in rows)


def test_what_is_up_to_date_is_skipped_and_stages_can_be_added(
    drafted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = Drafting.load(drafted / "draft.json")
    written = (drafted / "draft" / "model.safetensors").stat().st_mtime_ns
    code, out, _ = call(capfd, "draft", "embedded", "--out", drafted, *SMALL, "--json")
    assert code == 0 and Drafting.model_validate_json(out) == before
    found = shortllm.draft(
        "embedded", out=drafted, texts=4, new_tokens=24, runs=1, draft_tokens=3, measured=2,
        heal="linear", write=24,
    )  # fmt: skip
    assert (drafted / "draft" / "model.safetensors").stat().st_mtime_ns == written
    assert found.measured[:2] == before.measured
    assert [one.name for one in found.measured[2:]] == ["healed"]
    [healed] = found.recovered
    assert healed.before == found.sizes[found.best_plain.remove - 1].held_out
    assert 0 < healed.after.acceptance <= 1
    assert len((drafted / "training.jsonl").read_text().splitlines()) == 24
    assert "healed" in (drafted / "draft.html").read_text()
    without = shortllm.draft(
        "embedded", out=drafted, texts=4, new_tokens=24, runs=1, draft_tokens=3, measured=2
    )
    assert without == found
    recipe = json.loads((drafted / "run.json").read_text())["recipe"]
    assert recipe["healing"]["method"] == "linear" and recipe["write"] == 24
    with pytest.raises(shortllm.ShortLLMError, match=r"healing\.method: \"linear\""):
        shortllm.draft(
            "embedded", out=drafted, texts=4, new_tokens=24, runs=1, draft_tokens=3, measured=2,
            heal="gain", write=24,
        )  # fmt: skip


def test_an_interrupted_draft_continues_with_the_next_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shortllm.drafting import draft as module

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"texts": 2, "new_tokens": 8, "runs": 1, "draft_tokens": 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_measured", interrupted)
        shortllm.draft("embedded", out=tmp_path, remove=2, **options)
    kept = Drafting.load(tmp_path / "draft.json")
    assert kept.costs is not None and kept.measured == []
    assert "not finished" in str(kept) and "not finished" in repr(kept)
    assert "not finished" in kept._repr_html_()
    for ask in (
        lambda: kept.best, lambda: kept.verdict, lambda: shortllm.report(tmp_path)
    ):  # fmt: skip
        with pytest.raises(shortllm.ShortLLMError, match="not finished: .* the same command again"):
            ask()
    assert not (tmp_path / "draft.html").exists()
    monkeypatch.setattr(module, "_costs", interrupted)  # not again
    monkeypatch.setattr(module, "_accepted", interrupted)
    found = shortllm.draft("embedded", out=tmp_path, remove=2, **options)
    assert found.costs == kept.costs and [one.remove for one in found.measured] == [2]


def test_mistakes_are_named_before_the_model_writes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in [
        (["--remove", "8"], "cannot remove 8 of 12 blocks"),
        (["--least", "0.7", "--most", "0.5"], "--least 0.7 is more than --most 0.5"),
        (["--least", "0.8", "--most", "0.9"], "no draft has 10 to 11 of 12 blocks removed"),
        (["--write", "4"], "--write has no effect without --heal or --retrain"),
        (
            ["--write", "4", "--retrain", "lora", "--set", "retraining.data=embedded:train"],
            "--write has no effect as they read text of their own",
        ),
        (["--remove", "2", "--least", "0.2"], "--least has no effect with --remove 2"),
        (["--remove", "2", "--most", "0.6"], "--most has no effect with --remove 2"),
        (["--texts", "1"], "--texts"),
        (
            ["--heal", "linear", "--write", "2", "--new-tokens", "8"],
            "80 tokens with their prompts, and 128 or more are needed to heal with. Give a higher "
            "--write or --new-tokens",
        ),
        (["--new-tokens", "9999"], "Give --new-tokens"),
        (["--criterion", "acceptanc"], "Did you mean 'acceptance'"),
        (["--option", "ppl.x=1"], "--option names criterion 'ppl', but --criterion is acceptance"),
        (["--set", "budget.remove=3"], "a draft has only healing.NAME and retraining.NAME"),
        (["--retrain", "lora,distill"], "a draft is trained in one way"),
        (["--prompts", "no-such.jsonl"], "no such file"),
        (["--retrain", "lora", "--set", "retraining.data=no-such.jsonl"], "no such file"),
        (["--retrain", "distill", "--set", "retraining.length=99999"], "99999 tokens exceed"),
        (["--no-stream", "--stream"], "does not fit into memory"),
    ]:
        code, _, err = call(capfd, "draft", "embedded", "--out", tmp_path / "new", *arguments)
        assert code == 2 and said in err, (arguments, err)
        assert not (tmp_path / "new" / "written.jsonl").exists()


def test_other_choices_do_not_replace_a_draft(
    drafted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (drafted / "draft.json").read_bytes()
    for arguments, said in [
        (["--texts", "6"], "texts: 4, now 6"),
        (["--remove", "2"], "remove: null, now 2"),
        (["--protect-first", "2"], "protect_first: null, now 2"),
        (["--criterion", "magnitude"], 'criterion: "acceptance", now "magnitude"'),
    ]:
        code, _, err = call(
            capfd, "draft", "embedded", "--out", drafted, *SMALL, *arguments
        )  # the last one counts
        assert code == 2 and said in err and "--overwrite" in err, (arguments, err)
    assert (drafted / "draft.json").read_bytes() == before


def test_a_draft_by_a_search_is_not_replaced_either(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = {"texts": 2, "new_tokens": 8, "runs": 1, "draft_tokens": 2, "measured": 1}
    searched = {"criterion": "span"}
    shortllm.draft("embedded", out=tmp_path, remove=2, **searched, **tiny)
    assert not (tmp_path / "scores.json").exists()
    with pytest.raises(shortllm.ShortLLMError, match="new_tokens: 8, now 9"):
        shortllm.draft("embedded", out=tmp_path, remove=2, **searched, **{**tiny, "new_tokens": 9})
    other = tmp_path / "other"
    shortllm.prune("embedded", blocks=[3], out=other)
    with pytest.raises(shortllm.ShortLLMError, match="is a run of another model"):
        shortllm.draft(other, out=tmp_path, remove=2, **searched, **tiny)


def test_searches_make_a_plan_for_each_size(tmp_path: Path) -> None:
    found = shortllm.draft(
        "embedded", out=tmp_path, criterion="local",
        options={"fitness": "acceptance", "evaluations": 12}, texts=2, new_tokens=12, runs=1,
        draft_tokens=2, measured=2,
    )  # fmt: skip
    assert [one.remove for one in found.sizes] == [1, 7]
    assert [path.name for path in sorted((tmp_path / "scores").iterdir())] == ["1", "7"]


def test_texts_stay_where_a_criterion_reads_none_and_no_model_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"texts": 2, "new_tokens": 8, "runs": 1, "draft_tokens": 2, "remove": 2}
    found = shortllm.draft("embedded", out=tmp_path, criterion="magnitude", **tiny)
    assert (tmp_path / "calibration.json").exists()

    def loaded(*given: Any, **named: Any) -> None:
        raise AssertionError("the model is not needed")

    monkeypatch.setattr("shortllm.model.loading.load_model", loaded)
    assert shortllm.draft("embedded", out=tmp_path, criterion="magnitude", **tiny) == found
    with pytest.raises(AssertionError):
        shortllm.draft("embedded", out=tmp_path / "new", criterion="magnitude", **tiny)


def prepared(tmp_path: Path, criterion: str = "acceptance", **options: Any) -> Any:
    """A draft of the embedded model before its first stage."""
    given = {name: options.pop(name) for name in ["of_criterion"] if name in options}
    drafting = DraftOptions(**{"remove": 2, "new_tokens": 8, **options})
    with releasing():
        return prepare("embedded", drafting, Runtime(), criterion, given.get("of_criterion", {}),
                       tmp_path, None, [])  # fmt: skip


@pytest.mark.parametrize(
    ("criterion", "given", "temperature", "used"),
    [
        ("acceptance", {}, 0.0, 1.0),
        ("acceptance", {}, 0.7, 0.7),
        ("acceptance", {"temperature": 0.0}, 0.7, 0.0),
        ("greedy", {"inner": "acceptance"}, 0.7, 0.7),
        ("greedy", {"inner": "kl"}, 0.7, None),
        ("local", {"fitness": "acceptance"}, 0.7, 0.7),
        ("magnitude", {}, 0.7, None),
    ],
)
def test_the_criterion_measures_at_the_temperature_of_the_draft(
    tmp_path: Path, criterion: str, given: dict[str, Any], temperature: float, used: float | None
) -> None:
    run = prepared(tmp_path, criterion, of_criterion=given, temperature=temperature)
    assert run.criterion.options.get("temperature") == used


@pytest.fixture
def two_kinds(tmp_path: Path) -> list[str]:
    """Five texts and three conversations of different lengths."""
    texts, talks = tmp_path / "texts.jsonl", tmp_path / "talks.jsonl"
    words = "In the town of Nord lives a baker who sells bread and milk to the people. " * 9
    rows = [{"text": f"{number} {words}"} for number in range(5)]
    texts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rows = [
        {"messages": [{"role": "user", "content": "Who sells bread? " * (number + 1)},
                      {"role": "assistant", "content": "The baker."}]}
        for number in range(3)
    ]  # fmt: skip
    talks.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [str(texts), str(talks)]


def test_every_other_text_of_each_kind_is_to_measure_on(
    tmp_path: Path, two_kinds: list[str]
) -> None:
    run = prepared(tmp_path / "a", prompts=two_kinds, texts=3, healing="linear", write=9)
    asked = run.prompts
    assert [bool(one.ends) for one in asked.choosing] == [False, False, True, True]
    assert [bool(one.ends) for one in asked.held_out] == [False, True]
    assert not any(one in asked.held_out for one in asked.further)
    assert [bool(one.ends) for one in asked.further] == [False, True, False, True, False, False] + [
        False, True, False,
    ]  # fmt: skip
    assert run.stages == 9
    one = tmp_path / "one.jsonl"
    one.write_text(Path(two_kinds[0]).read_text().splitlines()[0])
    with pytest.raises(shortllm.ShortLLMError, match="has one prompt"):
        prepared(tmp_path / "b", prompts=[two_kinds[1], str(one)])


def test_further_texts_have_as_many_new_tokens_as_requested(
    tmp_path: Path, two_kinds: list[str]
) -> None:
    run = prepared(tmp_path / "a", prompts=two_kinds, texts=3, healing="linear", write=9)
    text = write_training_texts(
        run.checkpoint, run.prompts.further, run.options, run.session, run.tokenizer, tmp_path
    )
    for prompt, one in zip(run.prompts.further, texts_of(text), strict=True):
        assert one.prompt_T.tolist() == prompt.ids
        assert len(one.ids) <= 8 and (prompt.ends or len(one.ids) == 8)


def test_little_text_to_heal_with_makes_short_samples(tmp_path: Path) -> None:
    tiny = {"texts": 2, "new_tokens": 8, "runs": 1, "draft_tokens": 2, "measured": 1}
    found = shortllm.draft("embedded", out=tmp_path, remove=2, heal="linear", write=4, **tiny)
    assert [one.name for one in found.recovered] == ["healed"]
    healing = json.loads((tmp_path / "healed" / "heal.json").read_text())
    assert healing["samples"] == 4 and healing["length"] == 40


def test_texts_that_nothing_reads_are_not_written(tmp_path: Path) -> None:
    tiny = {"texts": 2, "new_tokens": 8, "runs": 1, "draft_tokens": 2, "measured": 1}
    text = {"data": "embedded:train", "samples": 4, "length": 32}
    options = HealOptions(method="linear", calibration=text)
    found = shortllm.draft("embedded", out=tmp_path, remove=2, healing=options, **tiny)
    assert [one.name for one in found.recovered] == ["healed"]
    assert not (tmp_path / "training.jsonl").exists()


def test_other_options_of_a_criterion_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shortllm.drafting import draft as module

    found = []
    monkeypatch.setattr(module, "_accepted", lambda run, written: found.append(run) or 1 / 0)
    for temperature in (0.5, 0.9):
        with pytest.raises(ZeroDivisionError):
            shortllm.draft("embedded", out=tmp_path / str(temperature), remove=7, texts=2,
                           new_tokens=8, options={"temperature": temperature})  # fmt: skip
    one, other = found
    for run in found:
        run.plans = one.plans
    texts = module.write_texts(one.checkpoint, one.prompts, one.options, one.session, one.tokenizer,
                               one.directory)  # fmt: skip
    assert module._known(one, texts).fingerprint != module._known(other, texts).fingerprint
    again = module._known(one, texts).fingerprint
    one.prompts = replace(one.prompts, words=["2 prompts (text) from elsewhere"])
    assert module._known(one, texts).fingerprint != again


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.real
def test_a_draft_of_a_real_model_in_a_gguf_file(smollm_gguf: Path, tmp_path: Path) -> None:
    from shortllm.checkpoint.gguf import read_gguf

    found = shortllm.draft(
        smollm_gguf, out=tmp_path, remove=6, texts=2, new_tokens=24, draft_tokens=3, measured=1,
        runs=1, temperature=0.0, write=8,
        retraining=shortllm.RetrainOptions(method="distill", max_steps=2, batch=2, length=64),
    )  # fmt: skip
    [size], [plain, trained] = found.sizes, found.measured
    assert found.prompts == [
        "2 prompts (text) from built-in", "2 prompts (chat) from built-in"
    ]  # fmt: skip
    assert 0.1 < size.held_out.acceptance < 1 and 0.5 < (size.cost or 0) < 1.2
    tokens = size.held_out.tokens_per_step[plain.draft_tokens - 1]
    assert plain.tokens_per_step == pytest.approx(tokens, rel=1e-9) or plain.near_ties
    assert trained.name == "retrained" and found.recovered[0].before == size.held_out
    assert read_gguf(tmp_path / "draft.gguf").blocks == 24
    written = (tmp_path / "draft.gguf").stat().st_mtime_ns
    again = shortllm.draft(
        smollm_gguf, out=tmp_path, remove=6, texts=2, new_tokens=24, draft_tokens=3, measured=1,
        runs=1, temperature=0.0, write=8,
        retraining=shortllm.RetrainOptions(method="distill", max_steps=2, batch=2, length=64),
    )  # fmt: skip
    assert again == found
    assert (tmp_path / "draft.gguf").stat().st_mtime_ns == written
