"""Damaged files of our own: results, run directories, token ids, journals; and tokenizers."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_bench import Act, Bench, check_plan, check_shortened
from healthy import (
    BLOCKS,
    plan_of,
    records,
    scores_of,
    spans_of,
    write_checkpoint,
    write_comparison,
    write_run,
    write_units,
)
from mutations import damaged, damaged_bytes

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.data.calibration import Calibration, check_ids, load_calibration, tokens_fingerprint
from shortllm.data.chat import row_texts
from shortllm.data.options import CalibrationInfo
from shortllm.data.sources import load_rows, open_records
from shortllm.embedded import MODEL_DIR
from shortllm.errors import ShortLLMError
from shortllm.journal import Journal
from shortllm.pruning.budget import Budget
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.reporting import plots


def result_files(random: Random, bench: Bench) -> Act:
    """A damaged record of any kind."""
    kinds = records()
    kind = random.choice(list(kinds))
    tree = random.choice(kinds[kind]).model_dump(mode="json")
    file = bench.source / "record.json"
    if random.random() < 0.2:
        file.write_bytes(damaged_bytes(random, json.dumps(tree).encode()))
    else:
        file.write_text(damaged(random, tree))

    def act() -> None:
        found = kind.load(file)
        found.save(bench.out / "again.json")
        again = kind.load(bench.out / "again.json")
        assert again == found, "another record after saving and loading"
        str(found)
        for name, value in vars(kind).items():
            if isinstance(value, property):
                getattr(found, name)

    return act


BUDGETS = [
    {"remove": 1}, {"remove": 2}, {"ratio": 0.25}, {"ratio": 0.5}, {"param_ratio": 0.2},
    {"remove": 1, "protect_first": 0, "protect_last": 0}, {"remove": 2, "contiguous": True},
    {"param_ratio": 0.3, "contiguous": True}, {"remove": 2, "period_aligned": True},
    {"blocks": [1, 2]}, {"remove": 1, "contiguous": False},
]  # fmt: skip


def plans(random: Random, bench: Bench) -> Act:
    """Damaged scores, and a plan by them."""
    healthy = [
        scores_of(bench.model), spans_of(bench.model),
        scores_of(bench.model, criterion="greedy", order=[2, 1]),
        scores_of(bench.model, criterion="local", removed=[1, 2], order=[2, 1]),
    ]  # fmt: skip
    scores = random.choice(healthy)
    (bench.source / "scores.json").write_text(damaged(random, scores.model_dump(mode="json")))
    budget = Budget.model_validate(random.choice(BUDGETS))

    def act() -> None:
        found = BlockScores.load(bench.source / "scores.json")
        plan = shortllm.plan(
            bench.source / "scores.json", budget=budget, out=bench.out / "plan.json"
        )
        assert PrunePlan.load(bench.out / "plan.json") == plan
        assert plan.model == found.model
        check_plan(plan, budget, found.model)

    return act


def surgeries(random: Random, bench: Bench) -> Act:
    """A damaged plan, carried out on a healthy checkpoint."""
    plan = plan_of(bench.model)
    file = bench.source / "plan.json"
    if random.random() < 0.1:
        file.write_bytes(damaged_bytes(random, json.dumps(plan.model_dump(mode="json")).encode()))
    else:
        tree = plan.model_dump(mode="json")
        if random.random() < 0.4:
            removed = sorted(random.sample(range(BLOCKS), random.randint(0, BLOCKS)))
            kept = [block for block in range(BLOCKS) if block not in removed]
            tree |= {"removed": removed, "kept": kept, "order": removed}
            file.write_text(json.dumps(tree))
        else:
            file.write_text(damaged(random, tree))

    def act() -> None:
        target = bench.out / "short"
        shortllm.prune(str(bench.opened.directory), file, target, verify=False)
        check_shortened(bench.opened, PrunePlan.load(file), target)

    return act


def reports(random: Random, bench: Bench) -> Act:
    """A run directory with one damaged file, and its page."""
    name = random.choice(["run", "run", "run", "comparison", "units"])
    make: dict[str, Callable[[Path], Any]] = {
        "run": write_run, "comparison": write_comparison, "units": write_units,
    }  # fmt: skip
    base = bench.kept(f"reported-{name}", make[name])
    run = bench.out / "run"
    shutil.copytree(base, run)
    file = random.choice(sorted(run.rglob("*.json")))
    if random.random() < 0.1:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    elif random.random() < 0.05:
        file.unlink()
    else:
        file.write_text(damaged(random, json.loads(file.read_text())))
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def act() -> None:
        with nullcontext() if random.random() < 0.15 else _undrawn():
            report()

    def report() -> None:
        try:
            if name == "units":
                from shortllm.reporting import write_units as write

                page = write(run)
            elif random.random() < 0.2 and name == "run":
                page = bench.out / "compare.html"
                shortllm.compare([run], out=page)
            else:
                page = shortllm.report(run)
        except ShortLLMError:
            after = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
            assert after == before, "a refused report has changed the run"
            shutil.rmtree(run)
            raise
        text = page.read_text(encoding="utf-8")
        assert text.rstrip().endswith("</html>")
        assert "<script>alert" not in text
        assert not list(bench.out.rglob("*.partial"))

    return act


@contextmanager
def _undrawn() -> Iterator[None]:
    """Plots are made, but not drawn, which would take most of the time."""
    drawn = plots._svg
    plots._svg = lambda figure, name: "<svg></svg>"
    try:
        yield
    finally:
        plots._svg = drawn


def calibrations(random: Random, bench: Bench) -> Act:
    """Damaged token ids, in each form that they are given in."""
    ids = torch.arange(24).reshape(3, 8) % 11
    info = CalibrationInfo(
        source="x", sampler="packed", samples=3, length=8, bos="none", fingerprint="f",
        tokens_fingerprint=tokens_fingerprint(ids),
    )  # fmt: skip
    Calibration(ids=ids, info=info).save(bench.source)
    given = bench.source / "ids.json"
    given.write_text(json.dumps(ids.tolist()))
    file = random.choice([given, *sorted(bench.source.glob("calibration.*"))])
    if file.suffix == ".json" and random.random() < 0.8:
        file.write_text(
            damaged(random, json.loads(file.read_text()), values=[0, 1, 10, 11, [1, 2]])
        )
    else:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    asked = given if file == given else random.choice([bench.source, *bench.source.glob("calib*")])

    def act() -> None:
        found = load_calibration(asked)
        check_ids(found.ids, 11)
        assert found.ids.dtype == torch.int64 and found.ids.ndim == 2
        assert found.info.tokens_fingerprint == tokens_fingerprint(found.ids)
        assert int(found.ids.min()) >= 0 and int(found.ids.max()) < 11

    return act


def texts(random: Random, bench: Bench) -> Act:
    """Damaged text to calibrate, measure or train on: refused, or rows that can be tokenized."""
    bench.lay(bench.kept("texts", _write_texts))
    file = random.choice(sorted(bench.source.iterdir()))
    if file.suffix == ".jsonl" and random.random() < 0.6:
        lines = file.read_text().splitlines()
        place = random.randrange(len(lines))
        lines[place] = damaged(random, json.loads(lines[place])).replace("\n", " ")
        file.write_text("\n".join(lines))
    elif file.name == "rows.json" and random.random() < 0.6:
        file.write_text(damaged(random, json.loads(file.read_text())))
    else:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))

    def act() -> None:
        rows = load_rows(str(file), role="calibration")
        assert len(rows) > 0
        tokenizer = _tokenizer()
        for row in row_texts(rows[: min(len(rows), 20)], tokenizer):
            assert all(isinstance(token, int) for token in tokenizer(row)["input_ids"])
        read = list(open_records(str(file)).rows())
        assert [row for row in read if row] == [row for row in rows if row]

    return act


def _write_texts(directory: Path) -> None:
    """A few rows in every form that is read."""
    directory.mkdir()
    rows = [f"There was a drum in room {number}.\nIt was loud." for number in range(6)]
    records = [{"text": row, "number": number} for number, row in enumerate(rows)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "rows.jsonl").write_text(lines)
    (directory / "rows.json").write_text(json.dumps(rows))
    (directory / "rows.txt").write_text("\n".join(rows))
    (directory / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (directory / "packed.txt.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    if find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), directory / "rows.parquet")


@cache
def _tokenizer() -> Any:
    from shortllm.checkpoint.tokenizer import load_tokenizer

    return load_tokenizer(open_checkpoint("embedded"))


def journals(random: Random, bench: Bench) -> Act:
    """A journal with a cut or blank file, as a crash leaves it: what was committed, or nothing."""
    position, tensor = {"done": 3, "sums": [1.5, 2.5]}, torch.arange(6.0)
    place = bench.out / "journal"
    Journal(place, "f" * 64).commit(position, {"sums": tensor, "more": tensor + 1})
    file = random.choice(sorted(path for path in place.iterdir() if path.is_file()))
    data = file.read_bytes()
    cut = data[: random.randint(0, len(data))]
    file.write_bytes(random.choice([cut, cut, b"\0" * len(data)]))

    def act() -> None:
        journal = Journal(place, "f" * 64)
        found = journal.position()
        if found is not None:
            assert found == position
            assert torch.equal(journal.tensor("sums"), tensor)
            assert torch.equal(journal.tensor("more"), tensor + 1)

    return act


def _with_tokenizer(directory: Path) -> None:
    """A small checkpoint with the embedded model's tokenizer."""
    write_checkpoint("llama", directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, directory / name)


def tokenizers(random: Random, bench: Bench) -> Act:
    """A damaged tokenizer: refused, or one that gives token ids."""
    from shortllm.checkpoint.tokenizer import load_tokenizer

    bench.lay(bench.kept("with-tokenizer", _with_tokenizer))
    file = bench.source / random.choice(["tokenizer_config.json", "tokenizer.json"])
    if random.random() < 0.3:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    else:
        file.write_text(damaged(random, json.loads(file.read_text())))

    def act() -> None:
        tokenizer = load_tokenizer(open_checkpoint(bench.source))
        ids = tokenizer("There was a drum in the school.")["input_ids"]
        assert all(isinstance(token, int) for token in ids)

    return act
