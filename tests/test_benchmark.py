"""Speed and memory: turns, figures, memory that does not suffice, files, and what may go wrong."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from families import build, opened, saved, shortened
from test_cli import call

import shortllm
from shortllm.benchmark import bench as benchmark
from shortllm.benchmark import meters
from shortllm.benchmark.interleaved import (
    Candidate,
    InterleavedRuns,
    Runs,
    in_turn,
    measurement_of,
)
from shortllm.benchmark.meters import Sampler, is_out_of_memory, meter_of
from shortllm.benchmark.options import (
    BENCHMARK_PRESETS,
    COLUMNS,
    Benchmark,
    BenchmarkOptions,
    Measurement,
    PeakMemory,
)
from shortllm.errors import DataError, OutputError, ShortLLMError
from shortllm.model import Session
from shortllm.reporting import measurements as speed
from shortllm.reporting import render
from shortllm.reporting.charts import Line, LinePlot
from shortllm.reporting.parts import Page

CPU = torch.device("cpu")
QUICK = BenchmarkOptions(new_tokens=[4], warmup=1, runs=2)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama of six blocks without two of them."""
    target = tmp_path_factory.mktemp("bench") / "short"
    return shortened(opened("llama"), [2, 3], target)


@pytest.fixture(scope="module")
def measured(short: Path) -> Benchmark:
    """Both models at two batch sizes."""
    options = QUICK.model_copy(update={"batches": [1, 2]})
    return shortllm.bench([str(saved("llama")), str(short)], options=options, device="cpu")


def interleaved_runs(*candidates: Candidate, options: BenchmarkOptions = QUICK) -> InterleavedRuns:
    return InterleavedRuns(candidates, options, CPU)


def candidate(name: str, model: Any = None, **kwargs: Any) -> Candidate:
    prompt_T = torch.arange(1, 6)
    return Candidate(name=name, model=model or build("llama"), prompt_T=prompt_T, **kwargs)


def recorder(name: str, log: list[str]) -> Callable[[], Any]:
    """A context for the runs of a candidate that notes each of them."""

    @contextmanager
    def within() -> Iterator[None]:
        log.append(name)
        yield

    return within


def test_models_take_turns_and_each_turn_begins_with_another() -> None:
    log: list[str] = []
    candidates = [candidate(name, within=recorder(name, log)) for name in "ABC"]
    interleaved_runs(*candidates, options=BenchmarkOptions(warmup=2, runs=3)).measure(1, 2)
    warmup, runs = log[:6], log[6:]
    assert "".join(warmup) == "ABCBCA"
    # every measured run is followed by one of the same model for the time to the first token
    assert "".join(runs) == "CCAABB" + "AABBCC" + "BBCCAA"


def test_each_turn_holds_every_model_once() -> None:
    assert [in_turn(2, number) for number in range(3)] == [[0, 1], [1, 0], [0, 1]]
    assert all(sorted(in_turn(5, number)) == [0, 1, 2, 3, 4] for number in range(7))


def test_every_run_makes_the_asked_number_of_tokens_though_the_model_would_stop() -> None:
    model: Any = build("llama")
    with torch.no_grad():  # the end of text is by far the likeliest token
        model.lm_head.weight[2] = 100 * model.model.norm.weight.sign()
    lengths: list[int] = []
    model.register_forward_hook(lambda *call: lengths.append(call[2].logits.shape[1]))
    [found] = interleaved_runs(
        candidate("A", model), options=BenchmarkOptions(warmup=1, runs=1)
    ).measure(2, 6)
    assert len(lengths) == 6 + 6 + 1  # warm-up, measured, first token
    assert found.tokens_per_s == pytest.approx(2 * 6 / found.latencies_s[0])


def test_the_figures_of_a_cell() -> None:
    runs = Runs(
        latencies_s=[2.0, 3.0, 7.0],
        first_tokens_s=[0.5, 0.6, 1.0],
        utilisation=[0.5, 0.7],
        memory=PeakMemory(process_bytes=10),
    )
    found = measurement_of("A", 4, 25, runs, swapped=False)
    assert (found.latency_mean_s, found.latency_median_s) == (4.0, 3.0)
    assert found.latency_std_s == pytest.approx(7**0.5)
    assert found.tokens_per_s == 4 * 25 / 4.0
    assert found.first_token_s == 0.6
    assert found.per_token_s == pytest.approx((3.0 - 0.6) / 24)
    assert (found.utilisation_mean, found.utilisation_max) == (pytest.approx(0.6), 0.7)
    alone = Runs(latencies_s=[2.0], first_tokens_s=[2.0])
    one = measurement_of("A", 1, 1, alone, swapped=False)
    assert one.latency_std_s is None and one.per_token_s is None and one.utilisation_mean is None


def test_a_sweep_measures_every_model_in_every_cell(measured: Benchmark) -> None:
    cells = [(one.batch, one.model) for one in measured.measurements]
    assert cells == [(1, "llama"), (1, "short"), (2, "llama"), (2, "short")]
    assert [one.model.blocks for one in measured.models] == [6, 4]
    for one in measured.measurements:
        assert one.status == "ok" and len(one.latencies_s) == QUICK.runs
        assert one.first_token_s is not None and one.latency_median_s is not None
        assert one.first_token_s > 0
        assert one.memory is not None and one.memory.process_bytes is not None
        assert one.memory.process_bytes > build("llama").get_memory_footprint()
        assert one.memory.device_bytes is None
        assert one.utilisation_mean is not None and 0 < one.utilisation_mean < 1.5
    assert measured.device == "cpu" and measured.device_name and measured.threads == 1


def test_speedups_are_medians_over_neighbouring_runs(measured: Benchmark) -> None:
    first, other = (
        one.model_copy(update={"latencies_s": latencies})
        for one, latencies in zip(
            measured.measurements, ([2.0, 4.0, 40.0], [1.0, 4.0, 10.0]), strict=False
        )
    )
    found = measured.model_copy(update={"measurements": [first, other]})
    assert found.speedup(other) == 2.0  # of 2, 1 and 4
    assert found.speedup(first) == 1.0
    lost = other.model_copy(update={"latencies_s": [], "status": "out of memory"})
    assert found.speedup(lost) is None


def test_the_ideal_is_blocks_and_head(measured: Benchmark) -> None:
    model = build("llama")
    block = sum(one.numel() for one in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel()
    ideal = (6 * block + head) / (4 * block + head)
    assert measured.ideal_speedup("short") == pytest.approx(ideal)
    assert measured.ideal_speedup("llama") == 1


def test_memory_that_does_not_suffice_is_recorded_and_the_others_go_on() -> None:
    model = build("llama")

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    interleaved = interleaved_runs(candidate("small"), candidate("large", model))
    small, large = interleaved.measure(2, 3)
    assert small.status == "ok" and len(small.latencies_s) == QUICK.runs
    assert large == Measurement(model="large", batch=2, new_tokens=3, status="out of memory")
    assert [one.status for one in interleaved.measure(1, 3)] == ["ok", "ok"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux grants more memory than there is")
def test_a_cpu_refuses_what_is_more_than_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(meters, "available_memory", lambda device: 20 * 2**20)
    options = BenchmarkOptions(batches=[2**15, 1], new_tokens=[2], warmup=1, runs=1)
    found = shortllm.bench([str(saved("llama"))], options=options, device="cpu", out=tmp_path)
    assert [(one.batch, one.status) for one in found.measurements] == [
        (2**15, "out of memory"),
        (1, "ok"),
    ]
    lost = found.measurements[0]
    assert lost.latency_mean_s is None and lost.memory is None and lost.tokens_per_s is None
    assert Benchmark.load(tmp_path / "bench.json") == found
    torch.ones(2**25)  # the bound is gone


def test_models_that_do_not_fit_side_by_side_are_swapped() -> None:
    """As on a GPU: one of two finds no room, and finds some once the other has gone."""
    model = build("llama")
    calls: list[int] = []

    def refuse_once(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(refuse_once)
    interleaved = interleaved_runs(candidate("A"), candidate("B", model))
    interleaved._movable = True
    found = interleaved.measure(1, 2)
    assert [(one.status, one.swapped) for one in found] == [("ok", True), ("ok", True)]
    assert [len(one.latencies_s) for one in found] == [QUICK.runs, QUICK.runs]


def test_other_errors_are_not_taken_for_memory() -> None:
    model = build("llama")

    def fail(*args: Any) -> None:
        raise RuntimeError("probability tensor contains nan")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="probability tensor"):
        interleaved_runs(candidate("A", model)).measure(1, 2)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_speak_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_weights_of_other_models_do_not_count_as_memory() -> None:
    small, large = build("llama"), build("llama")
    large.register_buffer("ballast", torch.ones(2**24))
    found = interleaved_runs(candidate("small", small), candidate("large", large)).measure(1, 2)
    peaks = [one.memory.process_bytes for one in found if one.memory]
    assert 2**25 < peaks[1] - peaks[0] < 2**27  # the ballast is 2**26 bytes


def test_compiling_uses_a_static_cache_and_begins_anew_in_each_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[Any] = []

    def compile_nothing(function: Any, **kwargs: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model: Any = build("llama")
    options = BenchmarkOptions(warmup=2, runs=1, compile=True)
    interleaved = interleaved_runs(candidate("A", model), options=options)
    for new_tokens, cache in ((5, 5 + 5 - 1), (3, 5 + 3 - 1)):
        interleaved.measure(1, new_tokens)
        assert cache <= model._previous_max_cache_length <= cache + 1
    assert len(compiled) == 2


def test_a_model_that_is_not_compiled_after_all_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = build("llama")
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args: False)
    options = BenchmarkOptions(warmup=2, runs=1, compile=True)
    with pytest.raises(ShortLLMError, match="'llama' is not generated with a static cache"):
        interleaved_runs(candidate("A", model), options=options).measure(1, 2)


def test_an_attention_implementation_is_taken_by_the_model(short: Path) -> None:
    options = QUICK.model_copy(update={"attention": "eager", "runs": 1})
    found = shortllm.bench([str(short)], options=options, device="cpu")
    assert found.attention == "eager"
    loaded = benchmark.load_on_cpu(shortllm.open_checkpoint(short), "eager", Session(device="cpu"))
    assert loaded.config._attn_implementation == "eager"


def test_files_and_skipping_what_is_up_to_date(
    short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = QUICK.model_copy(update={"batches": [1, 2], "runs": 1})
    models = [str(saved("llama")), str(short)]
    found = shortllm.bench(models, options=options, device="cpu", out=tmp_path)
    names = {path.name for path in tmp_path.glob("[!.]*")}
    assert names == {
        "bench.json",
        "bench.csv",
        "bench-latency-4.svg",
        "bench-throughput-4.svg",
        "bench-speedup.svg",
    }
    with caplog.at_level("INFO"):
        again = shortllm.bench(models, options=options, device="cpu", out=tmp_path)
    assert again == found and "is up to date, skipped" in caplog.text
    other = options.model_copy(update={"batches": [1]})
    shortllm.bench(models, options=other, device="cpu", out=tmp_path, overwrite=True)
    left = {path.name for path in tmp_path.glob("[!.]*")}
    assert left == {"bench.json", "bench.csv", "bench-speedup.svg"}


def test_an_interrupted_sweep_goes_on_where_it_was(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = QUICK.model_copy(update={"batches": [1, 2, 3], "runs": 1})
    cells: list[int] = []
    measure = InterleavedRuns.measure

    def interrupted(self: InterleavedRuns, batch: int, *args: Any) -> list[Measurement]:
        if batch == 2 and not cells.count(2):
            cells.append(batch)
            raise KeyboardInterrupt
        cells.append(batch)
        return measure(self, batch, *args)

    monkeypatch.setattr(InterleavedRuns, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shortllm.bench([str(short)], options=options, device="cpu", out=tmp_path)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"bench.partial"}
    kept = Benchmark.load(tmp_path / "bench.partial").measurements
    with caplog.at_level("INFO"):
        found = shortllm.bench([str(short)], options=options, device="cpu", out=tmp_path)
    assert "has 1 measurements" in caplog.text
    assert cells == [1, 2, 2, 3]
    assert found.measurements[0] == kept[0]
    assert [one.batch for one in found.measurements] == [1, 2, 3]
    assert not (tmp_path / "bench.partial").exists()


def test_the_csv_has_a_row_for_each_measurement(measured: Benchmark) -> None:
    lost = Measurement(model="short", batch=64, new_tokens=4, status="out of memory")
    found = measured.model_copy(update={"measurements": [*measured.measurements, lost]})
    rows = list(csv.DictReader(io.StringIO(speed.benchmark_csv(found))))
    assert len(rows) == 5 and list(rows[0]) == list(COLUMNS)
    assert [row["blocks"] for row in rows] == ["6", "4", "6", "4", "4"]
    for row, one in zip(rows, found.measurements, strict=True):
        assert (row["model"], row["batch"]) == (one.model, str(one.batch))
        assert row["latency_mean_s"] == (
            "" if one.latency_mean_s is None else str(one.latency_mean_s)
        )
    assert rows[1]["speedup"] == str(measured.speedup(measured.measurements[1]))
    assert rows[4]["status"] == "out of memory"
    assert rows[4]["tokens_per_s"] == rows[4]["process_bytes"] == rows[4]["speedup"] == ""


def test_plots_are_drawn_where_there_is_something_to_compare(measured: Benchmark) -> None:
    plots = speed.all_plots(measured)
    assert list(plots) == ["latency-4", "throughput-4", "speedup"]
    for plot in plots.values():
        ElementTree.fromstring(plot.figure().svg)
    flat, steep = ([(1.0, 1.0), (2.0, height)] for height in (9.0, 11.0))
    for points, is_log in ((flat, False), (steep, True)):
        line = Line(name="A", points=points)
        plot = LinePlot(lines=[line], x_label="x", y_label="y", doubling=True, log_spread=10)
        assert plot.is_log is is_log and "<svg" in plot.figure().svg
    speedups = plots["speedup"]
    assert [line.name for line in speedups.lines] == [
        "batch 1",
        "batch 2",
        "ideal (blocks and head)",
    ]
    assert speedups.lines[-1].points == [(0.0, 1.0), (2.0, measured.ideal_speedup("short"))]
    alone = measured.model_copy(update={"models": measured.models[:1]})
    assert speed.speedup_plot(alone) is None
    one_batch = [one for one in measured.measurements if one.batch == 1]
    assert not speed.batch_plots(measured.model_copy(update={"measurements": one_batch}), 4)


def test_equal_figures_give_equal_plots_that_stand_alone(
    measured: Benchmark, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        speed.write_benchmark(tmp_path / name, measured)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    text = (tmp_path / "one" / "bench-speedup.svg").read_text()
    assert "var(--" not in text and "background: #fff" in text
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_section_of_a_report(measured: Benchmark) -> None:
    lost = Measurement(model="short", batch=64, new_tokens=4, status="out of memory")
    named = [
        measured.models[0].model_copy(update={"name": "<b>"}),
        *measured.models[1:],
    ]
    rows = [
        one.model_copy(update={"model": "<b>"}) if one.model == "llama" else one
        for one in (*measured.measurements, lost)
    ]
    found = measured.model_copy(update={"models": named, "measurements": rows})
    sections = [speed.speed_section(found)]
    page = render(Page(name="model", title="title", verdict="", version="", sections=sections))
    assert "out of memory" in page and "&lt;b&gt;" in page and "<b>" not in page
    assert "alternating between the models" in page
    assert f"{found.ideal_speedup('short'):.2f}" in page


def test_at_most_four_batch_sizes_share_a_plot() -> None:
    assert speed.evenly([1, 2, 4], 4) == [1, 2, 4]
    assert speed.evenly([2**power for power in range(9)], 4) == [1, 8, 32, 256]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "runs 0: must be greater than or equal to 1"),
        ({"warmup": 0}, "warmup 0: must be greater than or equal to 1"),
        ({"batches": [4, 0]}, "batches 0: must be greater than or equal to 1"),
        ({"new_tokens": []}, "new_tokens.*at least 1 item"),
        ({"compile": True, "warmup": 1}, "with --compile, of which the first compiles. Give 2"),
        ({"attention": "flash_attention_2"}, "works on CUDA devices, not on cpu. Use --attn sdpa"),
        (
            {"new_tokens": [64]},
            "12 tokens of the prompt and 64 new ones exceed the 64 positions of .* 52 or less",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_loading(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(benchmark, "load_model")
    with pytest.raises(ShortLLMError, match=message):
        shortllm.bench([str(saved("llama"))], **options, device="cpu")


def test_no_model_and_a_file_for_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ShortLLMError, match="no model to measure"):
        shortllm.bench([])
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="is a file. Choose another --out"):
        shortllm.bench([str(saved("llama"))], out=tmp_path / "x", device="cpu")


def test_a_prompt_of_no_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = shortllm.open_checkpoint("embedded")
    assert len(benchmark.prompt_ids(embedded, "There was a drum.")) > 3
    monkeypatch.setattr(benchmark, "load_tokenizer", lambda one: lambda text: {"input_ids": []})
    with pytest.raises(DataError, match="has no tokens for embedded"):
        benchmark.prompt_ids(embedded, "")


def test_presets_are_sweeps() -> None:
    paper = BenchmarkOptions(**BENCHMARK_PRESETS["paper"])
    assert paper.batches == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert (paper.new_tokens, paper.warmup, paper.runs) == ([128, 512], 10, 20)


def test_the_sampler_ends_with_its_block_and_always_has_a_sample() -> None:
    with pytest.raises(KeyError), Sampler(meter_of(CPU), interval_s=0.001) as sampler:
        raise KeyError
    assert not sampler._thread.is_alive()
    assert sampler.utilisation
    assert sampler.peak("process_bytes", meters.Sample(process_bytes=2**50)) == 2**50
    assert sampler.peak("device_bytes", meters.Sample()) is None


def test_a_busy_process_shows_on_the_cpu_meter() -> None:
    meter = meter_of(CPU)
    meter.sample()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    busy = meter.sample().utilisation
    meter.sample()
    time.sleep(0.05)
    idle = meter.sample().utilisation
    assert busy is not None and idle is not None and busy > idle


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_the_peak_of_a_process_is_that_since_the_reset() -> None:
    meter = meter_of(CPU)
    torch.ones(2**25)
    meter.reset()
    before = meter.peaks().process_bytes
    torch.ones(2**24)
    after = meter.peaks().process_bytes
    assert before is not None and after is not None
    assert 2**25 < after - before < 2**27


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ShortLLMError, match="'meta' cannot be measured. Available: cpu, cuda, mps"):
        meter_of(torch.device("meta"))


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library in place of NVML's bindings that knows one device."""

    def handle(identity: str) -> str:
        if identity != "GPU-1234":
            raise NVMLError("Not Found")
        return "the device"

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=37),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=5 * 2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return library


def test_nvml_is_asked_for_the_device_that_torch_uses(nvml: SimpleNamespace) -> None:
    handle = meters.nvml_handle(torch.device("cuda", 1))
    assert handle == "the device"
    assert meters.nvml_reading(handle) == (0.37, 5 * 2**30)


def test_a_part_of_a_device_that_does_not_tell_has_no_figures(nvml: SimpleNamespace) -> None:
    def refuse(handle: Any) -> None:
        raise NVMLError("Not Supported")

    nvml.nvmlDeviceGetUtilizationRates = refuse
    assert meters.nvml_reading("the device") == (None, 5 * 2**30)


def test_a_device_nvml_does_not_know(nvml: SimpleNamespace, monkeypatch: Any) -> None:
    properties = SimpleNamespace(uuid="99")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.raises(ShortLLMError, match="does not know the device cuda:0 .*nvidia-smi"):
        meters.nvml_handle(torch.device("cuda", 0))


def test_without_the_bindings_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ShortLLMError, match=r"pip install 'shortllm\[gpu\]'"):
        meters.nvml_handle(torch.device("cuda", 0))


def test_the_command_prints_a_table_or_json(
    short: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ["--new-tokens", "3", "--runs", "1", "--warmup", "1", "--device", "cpu"]
    models = [saved("llama"), short]
    code, out, _ = call(capfd, "bench", *models, *small, "--batch", "1,2", "--out", tmp_path)
    assert code == 0 and "speed-up" in out and str(tmp_path / "bench.json") in out
    assert len([line for line in out.splitlines() if line.startswith("short ")]) == 2
    code, out, _ = call(capfd, "bench", short, *small, "--json")
    assert code == 0 and out.count("\n") == 1
    assert json.loads(out)["measurements"][0]["new_tokens"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "missing argument"),
        (["bench", "nope"], "no such directory: nope"),
        (["bench", "embedded", "--batch", "1,x"], "--batch x: must be a valid integer"),
        (["bench", "embedded", "--preset", "none"], "invalid value for '--preset'"),
        (["bench", "embedded", "--new-tokens", "9999"], "exceed the 512 positions of embedded"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capfd, *arguments)
    assert code == 2 and message in err and not out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_memory_and_utilisation(tmp_path: Path) -> None:
    options = BenchmarkOptions(new_tokens=[16], warmup=2, runs=2)
    found = shortllm.bench(["embedded"], options=options, device="cuda", out=tmp_path)
    [one] = found.measurements
    assert one.memory is not None and one.memory.allocated_bytes and one.memory.reserved_bytes
    assert one.memory.device_bytes and one.memory.device_bytes > one.memory.allocated_bytes
    assert one.utilisation_max is not None and 0 <= one.utilisation_max <= 1
