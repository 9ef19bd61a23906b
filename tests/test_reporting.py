"""The report: golden pages, data escaped, self-contained, equal bytes for equal inputs.

SHORTLLM_WRITE_GOLDEN=1 pytest tests/test_reporting.py -k golden    # after a wanted change
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shortllm import __version__, criteria
from shortllm.data.options import CalibrationInfo
from shortllm.errors import ResultFileError
from shortllm.evaluation.options import EvaluatedModel, Evaluation, Perplexity, Samples
from shortllm.format import (
    THIN,
    binary_bytes,
    change,
    duration,
    figure,
    listed,
    model_name,
    number,
    percent,
    plain,
    short_bytes,
    short_count,
)
from shortllm.pruning.records import BlockScores, PrunePlan, Size
from shortllm.records import Cost, ModelInfo
from shortllm.registry import cited
from shortllm.reporting import compare, write_comparison, write_report, write_units
from shortllm.reporting.charts import Band, BarPlot, Line, LinePlot
from shortllm.reporting.parts import Cell, Table, row
from shortllm.reporting.plots import PALETTE, line_style, standalone
from shortllm.reporting.run_page import LONG_TABLE

GOLDEN = Path(__file__).parent / "golden" / "report"
TOKENS = "ca11b" * 12
SCORES = "5c" * 32


def model(blocks: int, parameters: int, name: str = "acme/tiny") -> ModelInfo:
    return ModelInfo(
        id=name,
        revision="0123456789abcdef" if name == "acme/tiny" else None,
        model_type="llama",
        blocks=blocks,
        parameters=parameters,
        bytes=2 * parameters,
        fingerprint="ab" * 32,
    )


def perplexity(value: float, **changes: Any) -> Perplexity:
    fields: dict[str, Any] = {
        "source": "wikitext2", "length": 2048, "bos": "first", "segments": 166,
        "predictions": 339802, "tokens_fingerprint": "70" * 32,
    }  # fmt: skip
    return Perplexity(nll=math.log(value), perplexity=value, **fields | changes)


def evaluated(name: str, blocks: int, parameters: int, value: float, text: str) -> EvaluatedModel:
    return EvaluatedModel(
        name=name,
        model=model(blocks, parameters),
        perplexity=[perplexity(value)],
        samples=Samples(
            prompt="Once <upon>", texts=[text], new_tokens=32, top_k=50, top_p=0.95,
            temperature=1.0, seed=7,
        ),
    )  # fmt: skip


def make_run(
    directory: Path,
    *,
    blocks: int = 12,
    removed: tuple[int, ...] = (5, 7, 8),
    name: str = "acme/tiny",
    seconds: float = 1.0,
    scores: dict[str, Any] | None = None,
    order: tuple[int, ...] | None = None,
    by_hand: bool = False,
    evaluation: bool = True,
) -> Path:
    """A run directory as the stages leave it; `scores` changes fields of scores.json.

    A run whose blocks were given by hand has no plot and takes a tenth of the time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values = [12.5 + abs(block - 6) for block in range(blocks)]
    fields: dict[str, Any] = {
        "fingerprint": SCORES, "model": model(blocks, 1_200_000, name), "criterion": "ppl",
        "importance": values, "values": values, "intact": 11.25,
        "delta_nll": [math.log(value / 11.25) for value in values],
        "calibration": TOKENS, "dtype": "float32", "cost": Cost(seconds=seconds),
    }  # fmt: skip
    if not by_hand:
        BlockScores(**fields | (scores or {})).save(directory / "scores.json")
        CalibrationInfo(
            fingerprint="c0" * 32, source="/data/alice/books.txt", sampler="random", samples=10,
            length=128, seed=1234, bos="tokenizer", tokens_fingerprint=TOKENS,
        ).save(directory / "calibration.json")  # fmt: skip
    PrunePlan(
        fingerprint="91" * 32,
        model=model(blocks, 1_200_000, name),
        criterion=None if by_hand else (fields | (scores or {}))["criterion"],
        kept=[block for block in range(blocks) if block not in removed],
        removed=list(removed),
        protected=[block for block in (0, blocks - 1) if block not in removed],
        order=list(order or removed),
        asked={"remove": len(removed)},
        reached=Size(
            blocks=len(removed), block_ratio=0.25, parameters=300_000, parameter_ratio=0.25
        ),
        reason="lowest importance of /home/alice/models/tiny",
        scores=None if by_hand else SCORES,
    ).save(directory / "plan.json")
    if evaluation:
        short = blocks - len(removed)
        Evaluation(
            fingerprint="e0" * 32,
            dtype="float32",
            models=[
                evaluated("original", blocks, 1_200_000, 11.0, "a <script>alert(1)</script>\n  b"),
                evaluated("pruned", short, 900_000, 16.5, "c & d"),
            ],
        ).save(directory / "eval.json")
        write_config(directory / "pruned", PrunePlan.load(directory / "plan.json"))
    run = {
        "shortllm": "0.1.0",
        "recipe": {"model": name, "plan": {"remove": 3}, "out": "/home/alice/runs/x"},
        "versions": {"torch": "2.13.0"},
        "command": ["/opt/bin/shortllm", "run", name, "--out=/home/alice/runs/x"],
    }
    (directory / "run.json").write_text(json.dumps(run))
    return directory


def write_config(checkpoint: Path, plan: PrunePlan, **done: Any) -> None:
    """A config.json that says where a checkpoint comes from; there are no weights next to it."""
    entry = {
        "version": "0.1.0", "source": model_name(plan.model.id), "revision": plan.model.revision,
        "source_blocks": plan.model.blocks, "removed_blocks": plan.removed,
        "criterion": plan.criterion, "paper": cited(criteria.find(plan.criterion)), **done,
    }  # fmt: skip
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps({"shortllm": entry}))


def page_and_card(directory: Path) -> tuple[str, str]:
    page = write_report(directory)
    assert page == directory / "report.html"
    return page.read_text(), (directory / "README.md").read_text()


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Page and card of one run, for the tests that only read them."""
    return page_and_card(make_run(tmp_path_factory.mktemp("run")))


def words(text: str) -> str:
    """Text with its no-break spaces made plain."""
    return text.replace(THIN, " ")


# ---- golden pages


def normalised(page: str) -> str:
    """A page without version, style and drawings; of a drawing only its texts stay."""

    def labels(svg: re.Match[str]) -> str:
        return "\n".join(["<svg>", *re.findall(r"<text[^>]*>([^<]*)</text>", svg[0]), "</svg>"])

    page = page.replace(__version__, "VERSION")
    page = re.sub(r"<style>.*?</style>", "<style></style>", page, count=1, flags=re.DOTALL)
    return re.sub(r"<svg.*?</svg>", labels, page, flags=re.DOTALL)


def assert_golden(name: str, text: str) -> None:
    """Compare with the stored text, or store it where SHORTLLM_WRITE_GOLDEN is set."""
    path = GOLDEN / name
    if os.environ.get("SHORTLLM_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(normalised(text), encoding="utf-8")
    assert normalised(text) == path.read_text(encoding="utf-8")


def test_golden_run(tmp_path: Path) -> None:
    from healthy import write_run

    page, card = page_and_card(write_run(tmp_path))
    assert_golden("run.html", page)
    assert_golden("card.md", card)


def test_golden_short_run(report: tuple[str, str]) -> None:
    page, card = report
    assert_golden("short.html", page)
    assert_golden("short.md", card)


def test_golden_comparisons(tmp_path: Path) -> None:
    from healthy import write_comparison as comparison_files
    from healthy import write_run
    from healthy import write_units as units_files

    page = write_comparison(comparison_files(tmp_path / "criteria"))
    assert_golden("criteria.html", page.read_text())
    assert_golden("units.html", write_units(units_files(tmp_path / "units")).read_text())
    runs = [write_run(tmp_path / "one"), make_run(tmp_path / "two", removed=(3,), by_hand=True)]
    compare(runs, out=tmp_path / "runs.html")
    assert_golden("runs.html", (tmp_path / "runs.html").read_text())


# ---- the model card


def test_model_card_travels_with_the_checkpoint(tmp_path: Path) -> None:
    _, card = page_and_card(make_run(tmp_path, by_hand=True))
    assert (tmp_path / "pruned" / "README.md").read_text() == card
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == {"README.md", "config.json"}


@pytest.mark.parametrize(
    "original",
    [
        "# Tiny\n",
        "---\ntags:\n- other\n---\n# Made with\n- shortllm\n---\n",
        "---\nlicense: mit\n---\n\xff",
    ],
)
def test_the_original_readme_is_kept_next_to_the_card(tmp_path: Path, original: str) -> None:
    pruned = make_run(tmp_path, by_hand=True) / "pruned"
    (pruned / "README.md").write_text(original, encoding="latin-1")
    for _ in range(2):
        _, card = page_and_card(tmp_path)
        assert (pruned / "README.md").read_text() == card
        assert (pruned / "README.original.md").read_text(encoding="latin-1") == original


def test_data_is_escaped(tmp_path: Path) -> None:
    scores = {"criterion": "<b>$x$&", "intact": None}
    page, card = page_and_card(make_run(tmp_path, name="evil<img>|`x`", scores=scores))
    assert "<script" not in page and "<img" not in page and "<b>$x" not in page
    assert "a &lt;script&gt;alert(1)&lt;/script&gt;\n  b</div>" in page
    assert "c &amp; d" in page and "Once &lt;upon&gt;" in page
    assert "importance (&lt;b&gt;$x$&amp;)" in page
    assert r"# evil\<img\>\|\`x\`" in card


def test_the_page_is_one_file_and_shows_no_directories(tmp_path: Path) -> None:
    run = make_run(tmp_path, name="/home/alice/models/tiny")
    page, card = page_and_card(run)
    assert re.findall(r"\bsrc=|@import|<link|<script|url\((?!#)", page) == []
    links = re.findall(r'href="([^"#][^"]*)"', page)
    assert links == ["https://arxiv.org/abs/2402.02834"]
    assert re.findall(r"https?://(?!www.w3.org)", page.replace(links[0], "")) == []
    for text in (page, card):
        assert "/home" not in text and "/data" not in text and "alice" not in text
        assert str(tmp_path) not in text
    assert '<h1><span class="part">tiny</span></h1>' in page
    assert "base_model" not in card


def test_ids_inside_the_page_are_unique_and_found(report: tuple[str, str]) -> None:
    page, _ = report
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)


def test_the_page_replaces_the_colours_of_plots_in_the_dark(report: tuple[str, str]) -> None:
    page, _ = report
    dark = page[page.index("prefers-color-scheme: dark") : page.index("</style>")]
    light = [light for light, _ in PALETTE.values()]
    assert len(set(light)) == len(light)
    drawn = set(re.findall(r"#[0-9a-f]{6}\b", page[page.index("<svg") : page.rindex("</svg>")]))
    assert drawn and all(f'[style*="fill: {colour}"]' in dark for colour in drawn)


def test_equal_inputs_give_equal_bytes(tmp_path: Path, report: tuple[str, str]) -> None:
    assert page_and_card(make_run(tmp_path / "slower", seconds=99.0)) == report


def test_without_scores(tmp_path: Path) -> None:
    page, card = page_and_card(make_run(tmp_path, by_hand=True))
    assert "<svg" not in page and 'id="blocks"' not in page and 'id="strip"' in page
    assert "given by hand" in page and "chosen by hand" in card and "arxiv" not in page + card


def test_every_criterion_has_its_paper_and_its_axis() -> None:
    for name in criteria.names():
        one = criteria.get(name)
        assert one.label and not one.label.startswith("importance (")
        assert one.source.endswith(one.paper.arxiv) if one.paper else ":" not in one.source


def test_an_order_of_removal_is_shown_as_one(tmp_path: Path) -> None:
    order = (7, 5, 8)
    rest = [b for b in range(1, 11) if b not in order]
    places = [[*order, *rest, 11, 0].index(b) for b in range(12)]
    scores = {
        "criterion": "greedy", "options": {"inner": "kl", "rounds": 3}, "importance": places,
        "order": list(order), "intact": None, "delta_nll": None,
    }  # fmt: skip
    page, card = page_and_card(make_run(tmp_path, order=order, scores=scores))
    assert "the least important by kl in the remaining model: 7, then 5, then 8." in page
    assert "removed in this order: 7, 5, 8" in page and criteria.get("greedy").label in page
    assert "kl when last scored</th>" in page and ">importance</th>" not in page
    assert rows_of_blocks(page)["7"][:2] == ["13.500", "1"]
    assert rows_of_blocks(page)["0"][:2] == ["–", "12"]  # never scored
    assert "arxiv.org/abs/2402.09025" in page and "Song et al. 2024" in card


def rows_of_blocks(page: str) -> dict[str, list[str]]:
    """The cells of the table of blocks by block."""
    table = page[page.index('<section id="blocks">') :].split("</section>")[0]
    lines = re.findall(r"<tr class=.*?</tr>", table, flags=re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]
    return {first: others for first, *others in cells}


@pytest.mark.parametrize("distance", [0.125, 0.5])
def test_a_span_is_shown_as_one(tmp_path: Path, distance: float) -> None:
    spans = [[0.3] * (13 - n) for n in range(1, 13)]
    spans[2][6] = distance  # blocks 6, 7, 8
    scores = {
        "criterion": "angular", "importance": spans[0], "values": spans[0], "spans": spans,
        "intact": None, "delta_nll": None,
    }  # fmt: skip
    page, card = page_and_card(make_run(tmp_path, removed=(6, 7, 8), scores=scores))
    assert "blocks 6 to 8 were removed as one span" in page
    assert f"between its input and its output is {number(distance)}" in page
    assert ("the smallest of the 8 spans of 3 blocks" in page) == (distance < 0.3)
    assert "removed as one span: 6 to 8" in page and page.count("removed as one span</text>") == 1
    assert "angular distance [fraction of π]" in page
    assert "arxiv.org/abs/2403.17887" in page and "Gromov et al. 2024" in card
    scattered, _ = page_and_card(make_run(tmp_path / "scattered", removed=(5, 7), scores=scores))
    assert "as one span" not in scattered


def test_without_evaluation(tmp_path: Path) -> None:
    page = words(write_report(make_run(tmp_path, by_hand=True, evaluation=False)).read_text())
    assert "saves 25.0 % of the parameters; the perplexity was not measured." in page
    assert 'id="samples"' not in page


def test_only_perplexities_of_the_same_tokens_are_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path, by_hand=True)
    evaluation = Evaluation.load(run / "eval.json")
    original, pruned = evaluation.models
    other = pruned.model_copy(update={"perplexity": [perplexity(16.5, tokens_fingerprint="71")]})
    evaluation.model_copy(update={"models": [original, other]}).save(run / "eval.json")
    page, card = page_and_card(run)
    assert "the perplexity was not measured" in page
    assert "(166 segments of 2,048 tokens) | 11.00 | – |" in card
    assert "(166 segments of 2,048 tokens) | – | 16.50 |" in card


@pytest.mark.parametrize("blocks", [5, 17, 80])
def test_strip_and_table_show_every_block(tmp_path: Path, blocks: int) -> None:
    page, _ = page_and_card(make_run(tmp_path, blocks=blocks, removed=(1, 3)))
    assert page.count('<li class="removed"') == 2
    assert page.count('<li class="protected"') == 2
    assert page.count('<li class="kept"') == blocks - 4
    assert len(rows_of_blocks(page)) == blocks
    assert (f"<summary>All {blocks} blocks" in page) == (blocks > LONG_TABLE)


def test_a_small_model_with_tiny_increases(tmp_path: Path) -> None:
    values = [11.25 * (1 + part) for part in (9e-3, 4e-3, 2e-3, 5e-4, 6e-3)]
    scores = {"importance": values, "values": values, "delta_nll": None}
    page, _ = map(words, page_and_card(make_run(tmp_path, blocks=5, removed=(3,), scores=scores)))
    assert "Removing 1 of 5 blocks" in page and "5 → 4 blocks" in page
    assert "<td>11.351</td>" in page and "<td>11.256</td>" in page
    assert ">0.02</text>" in page and "The axis" not in page


def test_a_missing_or_damaged_file_says_what_writes_it(tmp_path: Path) -> None:
    make_run(tmp_path)
    for name in ("run.json", "calibration.json", "scores.json", "plan.json", "eval.json"):
        path = tmp_path / name
        content = path.read_text()
        command = "plan" if name == "plan.json" else "run"
        for text in ("{", "[]", '{"recipe": 3, "extra": 1}'):
            path.write_text(text)
            with pytest.raises(ResultFileError, match=rf"{name}.*again with: shortllm {command}"):
                write_report(tmp_path)
        if name not in ("scores.json", "eval.json"):
            path.unlink()
            with pytest.raises(ResultFileError, match=rf"{name} is missing.* shortllm {command}"):
                write_report(tmp_path)
        path.write_text(content)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("scores.json", {"importance": [1.0]}, "importance has 1 entries, and the model 12 blocks"),
        ("scores.json", {"fingerprint": "other"}, "computed from other scores.*shortllm plan"),
        (
            "scores.json",
            {"calibration": "other"},
            "scores.json and .* have different tokens",
        ),
        ("scores.json", {"values": [math.inf] * 12}, "values.0 inf: must be a finite number"),
        ("plan.json", {"kept": [1]}, "kept and removed must share out the 12 blocks"),
        ("eval.json", "pruned", "the pruned model in eval.json has 11 blocks.*leads to 9"),
        ("eval.json", "original", "eval.json and plan.json are about different models"),
    ],
)
def test_files_of_different_runs_are_refused(
    tmp_path: Path, name: str, changes: Any, message: str
) -> None:
    path = make_run(tmp_path) / name
    if name == "eval.json":
        models = json.loads(path.read_text())["models"]
        models[1]["model"]["blocks"] = 11 if changes == "pruned" else 9
        models[0]["model"]["fingerprint"] = "ab" * 32 if changes == "pruned" else "other"
        changes = {"models": models}
    change_json(path, **changes)
    with pytest.raises(ResultFileError, match=message):
        write_report(tmp_path)


def test_an_evaluation_of_another_plan_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path, by_hand=True) / "eval.json"
    models = json.loads(path.read_text())["models"]
    models[1]["model"]["parameters"] = 800_000
    change_json(path, models=models)
    with pytest.raises(ResultFileError, match="has 9 blocks and 800,000 parameters"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"removed_blocks": [1, 2, 3]},
            r"12 blocks without \[1, 2, 3\].*removes \[5, 7, 8\] of 12",
        ),
        ({"source_blocks": 9}, "pruned/ is a model of 9 blocks.* of 12"),
        (None, "does not say which blocks"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    pruned = make_run(tmp_path, by_hand=True) / "pruned"
    fitting = {"removed_blocks": [5, 7, 8], "source_blocks": 12}
    config = pruned / "config.json"
    config.write_text(json.dumps({"shortllm": entry and fitting | entry}))
    command = f"shortllm run, or shortllm prune acme/tiny --plan {tmp_path} --out {pruned}"
    with pytest.raises(ResultFileError, match=f"{message}.*{re.escape(command)}"):
        write_report(tmp_path)
    config.write_text(json.dumps({"shortllm": fitting}))
    write_report(tmp_path)


def test_one_of_a_thing_and_no_change(tmp_path: Path) -> None:
    run = make_run(tmp_path, blocks=2, removed=(1,), by_hand=True)
    evaluation = Evaluation.load(run / "eval.json")
    models = [
        entry.model_copy(
            update={"perplexity": [perplexity(11.0, source=s, rows=(5, 6)) for s in ("a", "b")]}
        )
        for entry in evaluation.models
    ]
    evaluation.model_copy(update={"models": models}).save(run / "eval.json")
    change_json(run / "plan.json", protected=[0])
    page, card = map(words, page_and_card(run))
    assert "perplexity stays at 11.00 on a, and stays at 11.00 on b." in page
    assert ": row 5, 166" in card and "<dd>row 5, 166" in page
    assert "2 → 1 block\n" in card
    assert "\n- block 1 of the original" in card and "\n- protected blocks: 0\n" in card


def test_plot_axis_follows_the_spread() -> None:
    def plot(*heights: float) -> BarPlot:
        return BarPlot(heights=heights, statuses=["kept"] * len(heights), y_label="y")

    assert plot(1, 2, 29).log_floor is None
    assert plot(1, 2, 29).linear_floor == 0
    floor = plot(-1, 0, 1, 40).log_floor
    assert floor is not None and 0 < floor < 1
    assert plot(1e-12, 10).log_floor == pytest.approx(1e-5)
    assert 900 < plot(1000, 1010).linear_floor < 1000
    svg = BarPlot(
        heights=[-1, 1, 40], statuses=["removed", "kept", "protected"], y_label="y",
        below_label="no increase",
    ).figure().svg  # fmt: skip
    assert "no increase" in svg and ">×<" in svg


def test_ticks_of_very_small_and_large_values_are_not_rounded() -> None:
    small, large = (
        re.findall(
            r"<text[^>]*>([^<]*)</text>",
            BarPlot(heights=heights, statuses=["kept"] * 2, y_label="y").figure().svg,
        )
        for heights in ([1e-6, 1.25e-5], [1e6, 1.25e7])
    )
    assert {"2.5e−6", "1.25e−5"} <= set(small) and {"2.5e6", "1.25e7"} <= set(large)


def test_plot_of_odd_values() -> None:
    for heights in ([0.0, 0.0], [3.0, 3.0], [-1.0, -2.0], [5.0], [1e-9, 1e9]):
        plot = BarPlot(heights=heights, statuses=["removed"] * len(heights), y_label="y")
        svg = plot.figure().svg
        assert svg.startswith("<svg ") and "nan" not in svg


def criteria_lines(high: float, count: int = 2) -> LinePlot:
    heights = {f"c{n}": [2, 3, 3 + n / 10] for n in range(count)}
    lines = [
        Line(name=name, points=list(enumerate(values)), style=line_style(place))
        for place, (name, values) in enumerate(heights.items())
    ]
    band = Band(name="random, range", places=[0, 1, 2], low=[2, 2.5, 3], high=[2, 4, high])
    return LinePlot(
        lines=lines, band=band, x_label="x", y_label="y", log_spread=4, listed_by_end=True
    )


def test_lines_are_told_apart_and_listed_as_they_end() -> None:
    plot = criteria_lines(5, count=20)
    assert not plot.is_log and criteria_lines(50).is_log
    assert criteria_lines(math.inf).figure().svg.startswith("<svg ")
    svg = plot.figure().svg
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    names = [text for text in texts if text.startswith(("c", "random"))]
    assert names == [*(f"c{n}" for n in reversed(range(20))), "random, range"]
    styles = re.findall(r'clip-path[^>]*style="(fill: none;[^"]*stroke: #[^"]*)"', svg)
    lines = [style for style in styles if PALETTE["rule"][0] not in style]
    assert len(lines) == len(set(lines)) == 20
    assert standalone(plot.figure().svg).count("background: #fff") == 1


# ---- format and tables


def test_a_table_in_a_terminal() -> None:
    table = Table(row("a", Cell("b", "c")), [row(Cell("x", lead="1 "), Cell("2", "±0", "3 → "))])
    assert table.plain() == (("a", "b (c)"), [("1 x", "3 → 2 (±0)")])


def test_numbers_as_text() -> None:
    shown = {
        percent(0.2414): "24.1 %", percent(None): "-", percent(-0.5, 0): "-50 %",
        short_count(125_000_000): "125 M", short_count(999): "999", short_count(None): "-",
        short_bytes(13_480_000_000): "13.5 GB", short_bytes(12): "12 bytes",
        binary_bytes(3 * 2**29): "1.50 GiB", binary_bytes(1023): "1,023 bytes",
        duration(0.35): "350 ms", duration(12.34): "12.3 s", duration(312): "5.2 min",
        duration(11160): "3.1 h", duration(None): "-", listed([1, 2, 3]): "1, 2 and 3",
        listed([]): "", figure(1.25e6): "1,250,000", figure(12.5): "12.500",
        number(5.4734): "5.473", number(51.234): "51.23", number(5123.4): "5,123",
        number(-0.04): "-0.04000", number(0): "0", number(1.5e9): "1.500 x 10⁹",
        number(None): "-", number(math.inf): "-", number(9.99996): "10.000",
        change(4, 3): "-25.0 %", change(10, 15): "+50.0 %", change(10, 123): "x 12.3",
        change(10, 10): "+-0 %", change(10000, 10001): "+<0.1 %", change(None, 1): "-",
        change(1, None): "-",
    }  # fmt: skip
    for found, text in shown.items():
        assert plain(found) == text


def test_a_model_is_named_without_directories() -> None:
    for given, shown in {
        "acme/tiny": "acme/tiny", "/home/a/tiny/": "tiny", "../models/tiny": "tiny",
        "~/tiny": "tiny", r"C:\models\tiny": "tiny", "a/b/tiny": "tiny",
        "/c/hub/models--acme--tiny/snapshots/0123": "acme/tiny", "embedded": "embedded",
        "wikitext:wikitext-2-raw-v1:test": "wikitext:wikitext-2-raw-v1:test",
    }.items():  # fmt: skip
        assert model_name(given) == shown


def test_import_is_light() -> None:
    code = (
        "import sys, shortllm.reporting; "
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
