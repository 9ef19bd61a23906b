"""Which tokens count: in every criterion, in files, and of answers, written text, mixtures."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import chatting
import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import shortllm
from shortllm import criteria
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.cli import main
from shortllm.criteria import Scores, resolve
from shortllm.data.calibration import Calibration, calibrate, load_calibration
from shortllm.data.options import CalibrationOptions, SampledText
from shortllm.data.samplers import pack
from shortllm.errors import DataError
from shortllm.model import Session
from shortllm.model.backward import block_weights
from shortllm.model.decoder import Decoder
from shortllm.model.metrics import angular_distance, cosine
from shortllm.pruning.scoring import Scorer, weighted
from shortllm.pruning.search_space import score_all
from shortllm.runtime import Runtime

ONE_PASS = ["ppl", "kl", "acceptance", "taylor", "influence", "relative", "angular", "lorp"]
IDS_BT = families.token_ids(4, 12)


def found_by(
    names: list[str], counted_BT: Tensor | None, variant: str = "llama"
) -> dict[str, Scores]:
    """Scores of a tiny model, of the tokens that count."""
    scorer = Scorer(
        checkpoint=families.opened(variant),
        open_decoder=lambda: Decoder(families.loaded(variant)),
        ids_BT=IDS_BT,
        counted_BT=counted_BT,
    )
    return score_all(scorer, [resolve(name) for name in names])


def late(ids_BT: Tensor, first: int) -> Tensor:
    """A mask of the tokens from `first` on."""
    return (torch.arange(ids_BT.shape[1]) >= first).expand(ids_BT.shape).clone()


@pytest.mark.parametrize("name", [*ONE_PASS, "greedy", "local", "dp", "span"])
def test_a_mask_of_all_tokens_changes_no_number(name: str) -> None:
    [plain], [masked] = (
        found_by([name], counted).values()
        for counted in (None, torch.ones_like(IDS_BT, dtype=torch.bool))
    )
    assert masked == plain


def test_only_what_counts_is_measured() -> None:
    """Against a plain forward of the model without each block, whose second half is looked at."""
    model = families.loaded("llama")
    found = found_by(ONE_PASS, late(IDS_BT, 6))
    plain = found_by(ONE_PASS, None)
    decoder, nll, divergence, overlap = Decoder(model), [], [], []
    with torch.no_grad():
        intact = model(input_ids=IDS_BT).logits[:, 5:-1].log_softmax(-1)
        for b in range(decoder.block_count):
            with decoder.without([b]):
                own = model(input_ids=IDS_BT).logits[:, 5:-1].log_softmax(-1)
            nll.append(-own.gather(-1, IDS_BT[:, 6:, None]).mean().item())
            divergence.append((intact.exp() * (intact - own)).sum(-1).mean().item())
            overlap.append(torch.minimum(intact, own).exp().sum(-1).mean().item())
        streams = model(input_ids=IDS_BT, output_hidden_states=True).hidden_states
    assert found["ppl"].importance == pytest.approx(np.exp(nll).tolist(), rel=1e-5)
    assert found["kl"].importance == pytest.approx(divergence, rel=1e-4)
    assert found["acceptance"].importance == pytest.approx([1 - one for one in overlap], abs=1e-5)
    before = [1 - cosine(a[:, 6:], b[:, 6:]).mean().item() for a, b in pairwise(streams[:-1])]
    assert found["influence"].importance[:-1] == pytest.approx(before, rel=1e-4)
    for name in ONE_PASS:
        assert name in ("lorp", "angular") or found[name].importance != plain[name].importance, name
    assert found["angular"] == plain["angular"]  # the last token counts in both


def test_the_gradient_is_that_of_the_loss_on_what_counts() -> None:
    model = families.loaded("llama")
    found = found_by(["taylor"], late(IDS_BT, 6))["taylor"].importance
    labels = IDS_BT.masked_fill(~late(IDS_BT, 6), -100)
    blocks = Decoder(model).blocks
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(input_ids=IDS_BT, labels=labels).loss.backward()
    for b, block in enumerate(blocks):
        weights = block_weights(block).values()
        sums = [(p * p.grad).abs().sum().item() for p in weights if p.grad is not None]
        assert len(sums) == len(weights) and found[b] == pytest.approx(sum(sums), rel=1e-4)
    model.zero_grad()
    model.requires_grad_(False)


def test_the_last_token_that_counts_decides() -> None:
    early = ~late(IDS_BT, 7)
    found = found_by(["angular"], early)["angular"]
    with torch.no_grad():
        streams = families.loaded("llama")(
            input_ids=IDS_BT, output_hidden_states=True
        ).hidden_states
    spans = [angular_distance(a[:, 6], b[:, 6]).mean().item() for a, b in pairwise(streams[:-1])]
    assert found.importance[:-1] == pytest.approx(spans, rel=1e-4)


def test_samples_weigh_by_how_much_of_them_counts() -> None:
    counted = late(IDS_BT, 6)
    counted[0, :] = False
    counted[0, -1] = True  # one prediction of the first sample
    found = found_by(["ppl"], counted)["ppl"]
    with torch.no_grad():
        decoder = Decoder(families.loaded("llama"))
        with decoder.without([2]):
            logits = decoder.model(input_ids=IDS_BT).logits[:, :-1].log_softmax(-1)
    nll = -logits.gather(-1, IDS_BT[:, 1:, None])[..., 0]
    assert np.log(found.importance[2]) == pytest.approx(nll[counted[:, 1:]].mean().item(), rel=1e-5)
    assert found.samples is not None and found.stderr is not None
    assert np.mean(found.samples[2]) == pytest.approx(np.log(found.importance[2]), abs=1e-6)


def test_the_standard_error_is_that_of_a_weighted_mean() -> None:
    """Against the spread of the weighted mean over many draws of the samples."""
    random = np.random.default_rng(0)
    weight = random.integers(1, 20, 30_000).astype(float)
    value = random.normal(2.0 + 1.0 / weight, 1.0)
    pieces = np.arange(30_000).reshape(-1, 30)
    means = [(value[one] * weight[one]).sum() / weight[one].sum() for one in pieces]
    errors = []
    for one in pieces:
        own = weighted(torch.tensor(value[one])[None], torch.tensor(weight[one]))[0]
        assert own.mean().item() == pytest.approx(
            (value[one] * weight[one]).sum() / weight[one].sum()
        )
        errors.append(own.std().item() / 30**0.5)
    assert np.mean(np.square(errors)) ** 0.5 == pytest.approx(np.std(means), rel=0.1)


# ---- files


def test_what_counts_is_kept_with_the_ids(tmp_path: Path) -> None:
    ids = torch.randint(0, 60, (3, 8))
    save_file({"ids": ids, "counted": late(ids, 4)}, tmp_path / "given.safetensors")
    given = load_calibration(tmp_path / "given.safetensors")
    assert given.info.counted == 12
    given.save(tmp_path)
    again = load_calibration(tmp_path)
    assert again.counted is not None and again.counted.equal(late(ids, 4))
    whole = dict(load_file(tmp_path / "calibration.safetensors"))
    save_file({**whole, "counted": late(ids, 5)}, tmp_path / "calibration.safetensors")
    with pytest.raises(DataError, match="does not contain the ids"):
        load_calibration(tmp_path)
    save_file({"ids": ids, "counted": late(ids, 8)}, tmp_path / "nothing.safetensors")
    with pytest.raises(DataError, match="the prediction of a token must count"):
        load_calibration(tmp_path / "nothing.safetensors")
    save_file({"ids": ids, "counted": late(ids, 4)[:2]}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="must be bool"):
        load_calibration(tmp_path / "other.safetensors")


# ---- answers, written text, mixtures


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chatting.chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [
        {"prompt": f"{chatting.STORY} {chatting.QUESTION}", "completion": f"the barn number {n}."}
        for n in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def sampled(
    model: str, data: object, session: Session | None = None, **options: object
) -> Calibration:
    given = {"samples": 4, "length": 64, "answers_only": True, "data": str(data), **options}
    return calibrate(open_checkpoint(model), CalibrationOptions(**given), session=session)


def test_of_conversations_only_answers_count(chat: str, talks: Path) -> None:
    made = sampled(chat, talks)
    tokenizer = load_tokenizer(open_checkpoint(chat))
    assert made.counted is not None and made.info.counted == int(made.counted.sum())
    for ids, counted in zip(made.ids, made.counted, strict=True):
        said = tokenizer.decode(ids[counted])
        assert "the barn number" in said and "Question" not in said and "lamp" not in said
        assert "Question" in tokenizer.decode(ids)
    everything = sampled(chat, talks, answers_only=False, sampler="packed")
    assert everything.counted is None
    assert sampled(chat, talks).info == made.info != sampled(chat, talks, seed=1).info
    in_order = sampled(chat, talks, sampler="packed")
    assert "number 0." in tokenizer.decode(in_order.ids[0]).replace(" .", ".")


def test_samples_begin_with_an_answer_that_lies_within_them() -> None:
    options = SampledText(samples=2, length=6)
    long, short = ([1] * 9, [(7, 9)]), ([2, 3, 4, 5], [(2, 4)])
    none, one, yes = [False] * 2, [True] * 2, [False, False, True, True]
    assert (
        pack([long, short, short, long, short], options, None)
        == [([2, 3, 4, 5, 2, 3], [*yes, *none])]
        and one
    )
    assert pack([short, long], options, 9) == [([9, 2, 3, 4, 5, 1], [False, *yes, False])]


def test_plain_text_has_no_answers(chat: str, tmp_path: Path, talks: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(f"{chatting.STORY} {chatting.STORY}\n" * 20)
    with pytest.raises(DataError, match="is text, in which nobody answers"):
        sampled(chat, file, length=8)
    with pytest.raises(DataError, match="fill 30 samples"):
        sampled(chat, talks, samples=60)


def test_a_mixture_has_its_share_of_samples(chat: str, tmp_path: Path, talks: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text((f"{chatting.STORY} " * 4 + "\n") * 20)
    made = sampled(chat, f"{file}:0.25,{talks}:0.75", samples=8)
    assert made.counted is not None and made.info.parts is not None
    assert [one.samples for one in made.info.parts] == [2, 6]
    assert int(made.counted.all(dim=1).sum()) == 2  # text counts as a whole
    plain = sampled(
        chat, f"{file}:0.25,{talks}:0.75", samples=8, answers_only=False, sampler="packed"
    )
    assert plain.counted is None
    text = sampled(chat, file, samples=2, answers_only=False)
    whole = made.ids[made.counted.all(dim=1)]
    assert whole.tolist() == text.ids.tolist()
    with pytest.raises(DataError, match="with --samples 1 none is left"):
        sampled(chat, f"{file}:0.1,{talks}:0.9", samples=1)


def test_a_model_writes_its_own_text(chat: str, tmp_path: Path, talks: Path) -> None:
    session = Session(Runtime(dtype="float32"))
    made = sampled(chat, f"generated:{talks}", session)
    assert made.info.source == f"generated:{talks}" and made.info.temperature == 1.0
    tokenizer = load_tokenizer(open_checkpoint(chat))
    assert made.counted is not None
    assert all("Question" in tokenizer.decode(ids) for ids in made.ids)
    assert not any(
        "Question" in tokenizer.decode(ids[own])
        for ids, own in zip(made.ids, made.counted, strict=True)
    )
    again = sampled(chat, f"generated:{talks}", session)
    assert again.info == made.info and again.ids.equal(made.ids)
    cold = sampled(chat, f"generated:{talks}", session, generated_temperature=0.5)
    assert cold.info.fingerprint != made.info.fingerprint
    with pytest.raises(DataError, match="text that the model writes itself"):
        sampled(chat, f"generated:{talks}")
    with pytest.raises(DataError, match="is not in memory"):
        sampled(chat, f"generated:{talks}", Session(Runtime(dtype="float32", stream=True)))


def test_rules_of_generation_config_do_not_bend_what_is_written() -> None:
    from shortllm.data.generated import sampled as written

    model = families.loaded("llama")
    how = {"starts": [[1, 2, 3], [4, 5]], "length": 16, "seed": 0, "ends": {7}}
    plain, own = written(model, **how), model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_p = 9.0, 1, 0.5
    try:
        assert written(model, **how) == plain and model.generation_config is own
    finally:
        own.repetition_penalty = own.no_repeat_ngram_size = own.min_p = None


def test_mistakes_are_found_before_the_model_is_loaded(
    chat: str, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(Runtime(dtype="float32"))
    monkeypatch.setattr(Session, "decoder", None)
    file = tmp_path / "short.txt"
    file.write_text("short\n" * 20)
    with pytest.raises(DataError, match="with --samples 1 none is left"):
        sampled(chat, f"{file}:0.1,generated:{talks}:0.9", session, samples=1)
    with pytest.raises(DataError, match="only 0 of 20 rows"):
        sampled(chat, f"{file}:0.5,generated:{talks}:0.5", session)


def test_the_worst_tenth_of_written_text_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from shortllm.data import generated
    from shortllm.data.sources import load_rows

    session, checkpoint = Session(Runtime(dtype="float32")), open_checkpoint("embedded")
    worst: list[float] = []
    plain = generated._own_nll

    def watched(*arguments: object) -> float:
        worst.append(plain(*arguments))  # type: ignore[arg-type]
        return worst[-1]

    monkeypatch.setattr(generated, "_own_nll", watched)
    rows = load_rows("embedded", role="calibration")
    documents = next(
        generated.written_documents(
            session.decoder(checkpoint), load_tokenizer(checkpoint), rows, iter(range(40)),
            length=24, seed=0, temperature=1.0,
        )
    )  # fmt: skip
    assert len(worst) == 32 and len(documents) == 32 - 4
    assert all(len(ids) == 24 and spans == [(3, 24)] for ids, spans in documents)


def test_written_text_is_kept_in_the_run_directory(
    chat: str, tmp_path: Path, talks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"data": f"generated:{talks}", "samples": 3, "length": 64, "out": tmp_path / "run"}
    first = shortllm.score(chat, criterion="influence", **how)
    monkeypatch.setattr("shortllm.data.generated.sampled", None)
    again = shortllm.score(chat, criterion="kl", overwrite=True, **how)
    assert again.calibration == first.calibration
    rows = talks.read_text().splitlines()
    other = tmp_path / "other.jsonl"  # of which a row in the middle changes
    other.write_text("\n".join([*rows[:30], rows[0], *rows[31:]]))
    original = talks.read_text()
    try:
        talks.write_text(other.read_text())
        with pytest.raises(TypeError):  # it is written again
            shortllm.score(chat, criterion="kl", overwrite=True, **how)
    finally:
        talks.write_text(original)


def test_written_text_outlives_an_interruption(
    chat: str, tmp_path: Path, talks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"data": f"generated:{talks}", "samples": 3, "length": 64, "out": tmp_path / "run"}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shortllm.pruning.score.write_run_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shortllm.score(chat, criterion="influence", **how)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["calibration.partial"]
    monkeypatch.setattr("shortllm.data.generated.sampled", None)
    found = shortllm.score(chat, criterion="influence", **how)
    assert found.calibration and not (tmp_path / "run" / "calibration.partial").exists()


def test_a_model_writes_no_text_to_heal_with(chat: str, talks: Path, tmp_path: Path) -> None:
    from shortllm.evaluation.options import EvaluationOptions
    from shortllm.evaluation.texts import prepare_texts

    with pytest.raises(DataError, match="text that the model writes itself"):
        prepare_texts(
            open_checkpoint(chat),
            CalibrationOptions(data="embedded", samples=2, length=8),
            EvaluationOptions(data=["embedded"], length=16, max_segments=1),
            healing=SampledText(data=f"generated:{talks}", samples=2, length=32),
            session=Session(Runtime(dtype="float32")),
            directory=tmp_path,
        )


def test_a_run_by_answers_is_reported(chat: str, tmp_path: Path, talks: Path) -> None:
    out = tmp_path / "run"
    arguments = ["run", chat, "--data", str(talks), "--answers-only", "--samples", "4", "--length",
                 "64", "--remove", "2", "--eval-data", "embedded", "--max-segments", "4",
                 "--continuations", "0", "--out", str(out)]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    record = json.loads((out / "calibration.json").read_text())
    assert record["counted"] and load_calibration(out).counted is not None
    scores = json.loads((out / "scores.json").read_text())
    assert len(scores["stderr"]) == 12


def test_every_criterion_that_reads_text_is_here() -> None:
    known = {*ONE_PASS, "greedy", "local", "dp", "span", "evolve", "auto"}
    assert {one.name for one in criteria.listed() if one.needs_text} == known
    assert replace(resolve("ppl"), name="other").name == "other"
