"""The demo: text as it comes, limits, the page in a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

import httpx
import pytest
import torch

import shortllm
from shortllm.cli import main
from shortllm.demo import charts, embedded, generating, markup, page, serving
from shortllm.demo.generating import Limits, Progress, Request, generate
from shortllm.demo.models import Models, named_models, open_models
from shortllm.errors import OutputError, ShortLLMError
from shortllm.model.session import Session

CHROMIUM = Path("/usr/bin/chromium")
PROMPT = "There was a drum in the school."
LIMITS = Limits(new_tokens=400, batch=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def places(cache: Path) -> dict[str, str]:
    """The embedded model, narrower, and without a quarter of its blocks."""
    return embedded.embedded_models(Session(device="cpu"))


@pytest.fixture(scope="module")
def models(places: dict[str, str]) -> Models:
    return open_models(places, Session(device="cpu"))


def whole(models: Models, name: str = "original", **asked: Any) -> Progress:
    request = Request(**{"prompt": PROMPT, "new_tokens": 12, **asked})
    *_, last = generate(models, models.named(name), request, limits=LIMITS)
    assert last.state == "done"
    return last


# Generating.


def test_the_text_is_what_the_model_generates_for_the_seed(models: Models) -> None:
    model = models.named("depth")
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"].repeat(3, 1)
    torch.manual_seed(7)
    expected = model.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=20,
        top_p=0.8,
        temperature=0.9,
        min_new_tokens=12,
        max_new_tokens=12,
        pad_token_id=0,
    )
    before = torch.get_rng_state()
    found = whole(models, "depth", batch=3, seed=7, top_k=20, top_p=0.8, temperature=0.9)
    assert torch.equal(torch.get_rng_state(), before)
    decoded = model.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert [PROMPT + text for text in found.texts] == decoded
    assert found.tokens == 12 and len(set(found.texts)) > 1


def test_a_seed_gives_the_same_text_again_and_another_seed_another(models: Models) -> None:
    first, again, other = (whole(models, new_tokens=30, seed=seed) for seed in (5, 5, 6))
    assert first.texts == again.texts != other.texts


def test_temperature_0_takes_the_likeliest_token(models: Models) -> None:
    assert whole(models, temperature=0, seed=1).texts == whole(models, temperature=0, seed=2).texts
    model = models.named("original")
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likeliest = model.model(ids).logits[0, -1].argmax()
    [text] = whole(models, temperature=0, new_tokens=1).texts
    assert PROMPT + text == model.tokenizer.decode(
        [*ids[0].tolist(), int(likeliest)], skip_special_tokens=True
    )


def test_text_comes_as_it_is_made(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "UPDATE_S", 0.0)
    request = Request(prompt=PROMPT, new_tokens=40, batch=2)
    states = list(generate(models, models.named("original"), request, limits=LIMITS))
    assert [one.state for one in states[:-1]] == ["running"] * (len(states) - 1)
    tokens = [one.tokens for one in states]
    assert tokens == sorted(tokens) and tokens[0] == 0 and tokens[-1] == 40
    assert len(set(tokens)) > 5
    for state in states:
        for part, text in zip(state.texts, states[-1].texts, strict=True):
            assert text.startswith(part)
    last = states[-1]
    assert last.first_token_s is not None and 0 < last.first_token_s < last.seconds
    assert last.tokens_per_s == pytest.approx(2 * 40 / last.seconds)
    assert last.peak_bytes is not None and last.peak_bytes > models.named("original").info.bytes


def test_half_a_character_is_held_back(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating._Work, "_texts", lambda self, ids: ["a\ufffd"] * len(ids))
    request = Request(prompt=PROMPT, new_tokens=3)
    *running, last = generate(models, models.named("original"), request, limits=LIMITS)
    assert {one.texts[0] for one in running[1:]} <= {"a"} and last.texts == ["a\ufffd"]


def test_what_is_stopped_ends_at_the_next_token(models: Models) -> None:
    request = Request(prompt=PROMPT, new_tokens=400, batch=4)
    stop = threading.Event()
    for state in generate(models, models.named("original"), request, limits=LIMITS, stop=stop):
        if state.tokens:
            stop.set()
    assert state.state == "stopped" and 0 < state.tokens < 400
    part = whole(models, new_tokens=state.tokens, batch=4)
    assert part.texts == state.texts


def test_what_is_stopped_before_its_turn_makes_nothing(models: Models) -> None:
    stop = threading.Event()
    stop.set()
    request = Request(prompt=PROMPT)
    *_, last = generate(models, models.named("original"), request, limits=LIMITS, stop=stop)
    assert (last.state, last.tokens, last.texts, last.tokens_per_s) == ("stopped", 0, [""], None)


def test_nothing_goes_on_when_nobody_reads_on(models: Models) -> None:
    before = threading.active_count()
    request = Request(prompt=PROMPT, new_tokens=400, batch=8)
    states = generate(models, models.named("original"), request, limits=LIMITS)
    assert next(state for state in states if state.tokens)
    assert models.lock.locked() and threading.active_count() > before
    states.close()  # type: ignore[attr-defined]
    assert not models.lock.locked() and threading.active_count() == before


def test_texts_are_made_one_after_another(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    most = watch(models, monkeypatch)
    names = ["original", "width", "depth"] * 2
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: whole(models, name, new_tokens=20).texts, names))
    assert found[:3] == found[3:] and most == [1]


def watch(models: Models, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts have been in the making at once at most."""
    now, most, lock = [0], [0], threading.Lock()
    real = generating._Work._generate

    def watched(self: Any) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        real(self)
        with lock:
            now[0] -= 1

    monkeypatch.setattr(generating._Work, "_generate", watched)
    return most


# Limits.


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty. Type some text"),
        ({"prompt": "a" * 200_001}, "the prompt has 200,001 characters. At most 200,000"),
        ({"new_tokens": 0}, "output tokens: 0 is no whole number from 1 to 400"),
        ({"new_tokens": 401}, "output tokens: 401 is no whole number from 1 to 400"),
        ({"new_tokens": 1.5}, "output tokens: 1.5 is no whole number"),
        ({"batch": 9}, "batch: 9 is no whole number from 1 to 8"),
        ({"batch": None}, "batch: nothing is no whole number from 1 to 8"),
        ({"seed": -1}, "seed: -1 is no whole number from 0 to 4,294,967,295"),
        ({"seed": float("inf")}, "seed: inf is no whole number"),
        ({"top_k": "many"}, "top-k: many is no whole number"),
        ({"top_p": 0.0}, "top-p: 0.0 is not above 0 and at most 1"),
        ({"temperature": -0.1}, "temperature: -0.1 is not between 0 and 5"),
        ({"temperature": float("nan")}, "temperature: nan is not between 0 and 5"),
    ],
)
def test_what_is_out_of_bounds_is_refused(
    models: Models, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ShortLLMError, match=re.escape(message)):
        whole(models, **asked)


def test_prompt_and_text_fit_into_the_positions(models: Models) -> None:
    model = models.named("original")
    count = len(model.tokenizer(PROMPT)["input_ids"])
    assert model.positions == 512
    fitting = " ".join([PROMPT] * (512 // count - 1))
    prompt = len(model.tokenizer(fitting)["input_ids"])
    assert whole(models, prompt=fitting, new_tokens=512 - prompt).tokens == 512 - prompt
    with pytest.raises(ShortLLMError, match=f"Shorten it to {prompt - 1} tokens, or ask for fewer"):
        whole(models, prompt=fitting, new_tokens=513 - prompt)
    longer = " ".join([PROMPT] * 100)
    with pytest.raises(ShortLLMError, match="more than the 512 positions of original"):
        whole(models, prompt=longer, new_tokens=1)


def test_a_cache_larger_than_memory_is_refused(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.named("original")
    assert model.cache_bytes == 12 * 2 * 2 * 32 * 4  # blocks, keys and values, heads, width, bytes
    tokens = len(model.tokenizer(PROMPT)["input_ids"]) + 12
    monkeypatch.setattr(
        generating, "available_memory", lambda device: 4 * tokens * model.cache_bytes
    )
    assert whole(models, batch=4).tokens == 12
    with pytest.raises(ShortLLMError, match="a batch of 5 .* Ask for a smaller batch"):
        whole(models, batch=5)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory did not suffice for a batch of 1"),
        (RuntimeError("/home/me/secret"), r"generation failed \(RuntimeError\). The terminal"),
    ],
)
def test_what_fails_says_so_without_the_machines_paths(
    models: Models, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(self: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(generating._Work, "_generate", fail)
        with pytest.raises(ShortLLMError, match=message) as raised:
            whole(models)
        assert "secret" not in str(raised.value)
    assert whole(models).tokens == 12


# Models.


def test_embedded_models_are_made_once(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = embedded.embedded_models(Session(device="cpu"))
    assert list(made) == ["original", "width", "depth"]
    depth = Path(places["depth"])
    held = (depth / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(embedded, "score_in", None)  # what is there is not scored again
    assert embedded.embedded_models(Session(device="cpu"))["depth"] == str(depth)
    assert (depth / "config.json").stat().st_mtime_ns == held


def test_what_is_damaged_or_of_another_version_is_made_again(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(device="cpu")
    checkpoint = shortllm.open_checkpoint("embedded")
    depth = Path(places["depth"])
    (depth / "config.json").write_text("{}")
    assert embedded.depth_version(depth, checkpoint, session) == depth
    config = json.loads((depth / "config.json").read_text())
    assert config["num_hidden_layers"] == 9 and config["shortllm"]["criterion"] == "ppl"
    monkeypatch.setattr(embedded, "__version__", "9.9")
    monkeypatch.setattr(embedded, "depth_version", lambda target, *_: target)
    monkeypatch.setattr(embedded, "width_version", lambda target, *_: target)
    assert "/9.9-" in embedded.embedded_models(session)["depth"]


def test_a_cache_that_cannot_be_written_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="Set XDG_CACHE_HOME to another one"):
        embedded.embedded_models(Session(device="cpu"))


def test_panels_know_which_blocks_are_left(models: Models) -> None:
    original, width, depth = models.models
    assert (original.kept, original.source_blocks) == (list(range(12)), 12)
    assert (width.kept, width.source_blocks) == (list(range(12)), 12)
    assert len(depth.kept) == 9 and depth.source_blocks == 12
    cells = re.findall(r'<i class="(\w+)"', markup.strip(depth, original))
    assert [cells[block] for block in depth.kept] == ["kept"] * 9 and cells.count("gone") == 3
    parts = [float(part) for part in re.findall(r"--part: ([.\d]+)", markup.strip(width, original))]
    assert sum(parts) / 12 == pytest.approx(0.75, abs=0.02) and min(parts) < 0.5


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("short", "")], "--model 'short=' is not of the form NAME=MODEL"),
        ([("", "runs/short")], "--model '=runs/short' is not of the form NAME=MODEL"),
        ([("a", "x"), ("a", "y")], "two models are called 'a'"),
        ([("n" * 41, "x")], "longer than 40 characters"),
    ],
)
def test_names_of_models(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ShortLLMError, match=message):
        named_models(pairs)


# What is shown.


def test_text_is_shown_as_text() -> None:
    progress = Progress(
        state="done", texts=["<b>&", "two"], tokens=3, seconds=1.5, first_token_s=0.25
    )
    shown = markup.written("<script>alert(1)</script>", progress)
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert "<li>&lt;b&gt;&amp;</li><li>two</li>" in shown
    assert "1.50 s" in shown and "4 tokens/s" in shown and "250 ms" in shown
    assert "<b>" not in markup.failed("<b>")


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (4_668_672, "4.67 M"),
        (999_600, "1.00 M"),
        (13_476_839_424, "13.5 B"),
    ],
)
def test_counts_have_three_digits(number: int, shown: str) -> None:
    assert markup.count(number) == shown


def test_the_chart_shows_the_last_four_rounds_to_one_scale() -> None:
    rounds = [
        charts.Round(
            number=number,
            batch=2,
            new_tokens=64,
            bars=(charts.Bar(model="<m>", place=0, tokens_per_s=10.0 * number, seconds=1.0),),
        )
        for number in range(1, 7)
    ]
    shown = charts.chart(rounds)
    assert re.findall(r"Run (\d)", shown) == ["6", "5", "4", "3"]
    assert re.findall(r"--part: ([\d.]+)", shown) == ["1.0000", "0.8333", "0.6667", "0.5000"]
    assert "64 tokens × 2" in shown and "<m>" not in shown
    assert charts.chart([]) == ""


# The server.


@pytest.fixture(scope="module")
def address(models: Models) -> Iterator[str]:
    blocks, url = serving.serve(models, limits=LIMITS)
    assert url.startswith("http://127.0.0.1:")
    yield url
    blocks.close()


def ask(address: str, *given: Any) -> tuple[str, Any]:
    """Ask for a text as a program does: the event that ends it, and what it brings.

    Given are model and prompt, then output tokens, batch size and seed.
    """
    data = [*given, *(64, 1, 0, 50, 0.95, 1.0)[len(given) - 2 :]]
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        joined = client.post("gradio_api/call/generate", json={"data": data}).json()
        answer = client.get(f"gradio_api/call/generate/{joined['event_id']}").text
    events = re.findall(r"event: (\w+)\ndata: (.*)", answer)
    event, content = next(one for one in events if one[0] in ("complete", "error"))
    return event, json.loads(content)


def test_20_requests_at_once_are_all_answered_one_after_another(
    address: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = watch(models, monkeypatch)
    names = [models.models[number % 3].name for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda name: ask(address, name, PROMPT, 8, 2, 3), names))
    assert [event for event, _ in answers] == ["complete"] * 20 and most == [1]
    for name, (_, [answer]) in zip(names, answers, strict=True):
        assert answer["texts"] == whole(models, name, new_tokens=8, batch=2, seed=3).texts


def test_nothing_tells_where_the_models_lie(
    address: str, places: dict[str, str], cache: Path
) -> None:
    hidden = [str(cache), str(Path.home()), str(Path.cwd()), "site-packages", "shortllm/demo/"]
    with httpx.Client(base_url=address, trust_env=False) as client:
        told = [client.get(path).text for path in ("", "config", "gradio_api/info", "theme.css")]
        upload = client.post("gradio_api/upload", files={"files": ("a.txt", b"a")})
        reading = [client.get(f"gradio_api/file={place}/config.json") for place in places.values()]
        wrong = client.post("gradio_api/queue/join", json={"data": [], "fn_index": 99})
    assert upload.status_code == 403 and upload.text == "nothing can be uploaded here"
    assert {one.status_code for one in reading} <= {403, 404}
    answers = [
        ask(address, "nobody", PROMPT),
        ask(address, "depth", PROMPT, 10**9),
        ask(address, "depth", "drum " * 900),
        ask(address, "depth", ["no", "text"]),
        ask(address, {"no": "name"}, None, [], {}),
    ]
    assert {event for event, _ in answers} == {"error"}
    assert "Available: original, width, depth" in str(answers[0])
    assert "from 1 to 400" in str(answers[1]) and "512 positions" in str(answers[2])
    for text in (*told, upload.text, wrong.text, *map(str, answers)):
        assert not [part for part in hidden if part in text]
    assert ask(address, "depth", PROMPT, 4)[0] == "complete"


def test_a_port_that_is_taken_is_said(address: str, models: Models) -> None:
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(ShortLLMError, match=f"port {port} of 127.0.0.1 is taken"):
        serving.serve(models, limits=LIMITS, port=port)


def test_serving_beyond_this_machine_is_a_warning(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    serving.serve(models, limits=LIMITS)[0].close()
    assert "whoever" not in caplog.text
    serving.serve(models, limits=LIMITS, host="0.0.0.0")[0].close()
    assert "whoever can reach the page can use the models" in caplog.text


# The command.


def test_without_gradio_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stopped:
        main(["demo"])
    assert stopped.value.code == 2
    assert "pip install 'shortllm[demo]'" in capsys.readouterr().err


def test_the_command_refuses_what_is_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--model", "short"], "'short=' is not of the form NAME=MODEL"),
        (["--depth", str(tmp_path / "none")], "no such directory"),
        (["--original", "embedded", "--model", "original=embedded"], "two models are called"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["demo", *arguments])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(places: dict[str, str]) -> None:
    command = [sys.executable, "-m", "shortllm", "demo", "--original", "embedded"]
    process = subprocess.Popen(
        [*command, "--depth", places["depth"], "--device", "cpu", "--max-batch", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"demo of original, depth: (http://127\.0\.0\.1:\d+/)\n", line)
        assert found, process.communicate()
        assert ask(found[1], "depth", PROMPT, 4, 2)[0] == "complete"
        assert "from 1 to 2" in str(ask(found[1], "depth", PROMPT, 4, 3))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors


# The page in a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}: install Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visitor:
    """A tab with the page."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(30_000)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(address)
        self.ready()

    def ready(self) -> None:
        self.tab.wait_for_selector("#all:not([disabled])")

    def set(self, **settings: Any) -> None:
        for name, value in settings.items():
            self.tab.fill(f"#{name.replace('_', '-')} input", str(value))

    def type(self, prompt: str) -> None:
        self.tab.fill("#prompt textarea", prompt)

    def press(self, place: int | None = None) -> None:
        """Generate in one panel, or in all."""
        panel = self._panel(place or 0)
        self.tab.evaluate(f"document.querySelector('{panel} .output').dataset.old = 'yes'")
        self.tab.click("#all" if place is None else f"{panel} > button")
        self.tab.wait_for_selector(f"{panel} .output:not([data-old])")

    def generate(self, place: int | None = None) -> None:
        self.press(place)
        self.ready()

    def _panel(self, place: int) -> str:
        return f".panels > .column:nth-child({place + 1})"

    def read(self, what: str) -> list[str]:
        return [str(text) for text in self.tab.locator(what).all_inner_texts()]

    def states(self) -> list[str]:
        found = self.tab.locator(".output").all()
        return [str(one.get_attribute("data-state")) for one in found]

    def figures(self, place: int) -> dict[str, str]:
        """Sizes and measurements of a panel, by name."""
        panel = self.tab.locator(self._panel(place))
        names, values = panel.locator("dt").all_inner_texts(), panel.locator("dd").all_inner_texts()
        return dict(zip(names, values, strict=True))


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address, viewport={"width": 1400, "height": 1000})
    yield visitor
    visitor.context.close()


def test_three_models_side_by_side(visitor: Visitor, address: str, models: Models) -> None:
    assert visitor.read("h1") == ["One prompt, three models side by side"]
    assert visitor.read(".head h2") == ["original", "width", "depth"]
    prompt = "Gwen had two coins."
    visitor.type(prompt)
    visitor.set(output_tokens=30, seed=4)
    visitor.generate()
    assert visitor.states() == ["done"] * 3
    texts = visitor.read(".written")
    expected = [whole(models, name, prompt=prompt, new_tokens=30, seed=4).texts[0]
                for name in ("original", "width", "depth")]  # fmt: skip
    assert texts == [(prompt + text).rstrip() for text in expected] and len(set(texts)) == 3
    for place, (count, blocks, size) in enumerate(
        [
            ("4.67 M", "12", "9.34 MB"),
            ("3.55 M−24 %", "12", "7.09 MB"),
            ("3.54 M−24 %", "9", "7.09 MB"),
        ]
    ):
        found = visitor.figures(place)
        assert (found["parameters"], found["blocks"], found["size"]) == (count, blocks, size)
        assert re.fullmatch(r"\d+\.\d\d s", found["time"])
        assert re.fullmatch(r"[\d,]+ tokens/s", found["throughput"])
        assert re.fullmatch(r"[\d,]+ ms", found["first token"])
        assert re.fullmatch(r"[\d.]+ [MG]B", found["memory"])
    assert visitor.read(".rounds figcaption span") == ["30 tokens"]
    assert len(visitor.read(".rounds li")) == 3

    visitor.generate()  # the same seed
    assert visitor.read(".written") == texts
    visitor.set(seed=5)
    visitor.generate()
    assert all(new != old for new, old in zip(visitor.read(".written"), texts, strict=True))
    runs = [one.removesuffix("30 tokens") for one in visitor.read(".rounds figcaption")]
    assert runs == ["Run 3", "Run 2", "Run 1"]
    assert visitor.complaints == []
    elsewhere = [url for url in visitor.asked if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == []


def test_one_panel_alone_and_a_batch_in_numbers(visitor: Visitor) -> None:
    visitor.set(output_tokens=8, batch_size=3)
    visitor.generate(1)
    assert visitor.states() == ["idle", "done", "idle"]
    assert len(visitor.read(".written li")) == 3
    assert visitor.read(".rounds figcaption span") == ["8 tokens × 3"]


def test_text_streams_and_stops(visitor: Visitor) -> None:
    visitor.set(output_tokens=400, batch_size=8)
    visitor.press()
    seen = "document.querySelector('.written li')?.innerText.length > 40"
    visitor.tab.wait_for_function(seen)
    assert visitor.states() == ["running", "waiting", "waiting"]
    assert visitor.tab.is_disabled("#all") and visitor.tab.is_disabled("#reset")
    visitor.tab.dispatch_event("#stop", "click")  # a click waits until text has stopped moving it
    visitor.ready()
    assert visitor.states() == ["stopped"] * 3
    [after] = visitor.read(".output .note")
    assert 0 < int(after.split()[2]) < 400
    assert visitor.read(".quiet") == ["Stopped before it began"] * 2
    assert visitor.read(".runs") == []
    visitor.set(output_tokens=5, batch_size=1)
    visitor.generate()
    assert visitor.states() == ["done"] * 3


def test_errors_are_said_in_the_panel_and_the_page_lives_on(visitor: Visitor) -> None:
    visitor.type("drum " * 600)
    visitor.set(output_tokens=5)
    visitor.generate()
    assert visitor.states() == ["failed"] * 3
    errors = visitor.read(".error")
    assert all("more than the 512 positions of" in one for one in errors)
    assert errors[0].startswith("The prompt has ") and errors[0].endswith(".")
    visitor.type(PROMPT)
    visitor.set(batch_size=9)
    visitor.generate(0)
    assert visitor.read(".error")[0] == "Batch: 9 is no whole number from 1 to 8."
    visitor.set(batch_size="")
    visitor.generate(0)
    assert visitor.read(".error")[0].startswith("Batch: ")
    visitor.set(batch_size=1)
    visitor.generate()
    assert visitor.states() == ["done"] * 3 and visitor.complaints == []


def test_examples_and_reset(visitor: Visitor) -> None:
    examples = visitor.tab.locator(".examples button")
    assert examples.count() == len(page.EMBEDDED_EXAMPLES)
    examples.nth(1).click()
    asked = visitor.tab.locator("#prompt textarea")
    visitor.tab.wait_for_function("document.querySelector('#prompt textarea').value.length > 60")
    assert asked.input_value() == page.EMBEDDED_EXAMPLES[1]
    visitor.set(output_tokens=5, temperature=0.5)
    visitor.generate()
    visitor.tab.click("#reset")
    visitor.tab.wait_for_function("!document.querySelector('.written')")
    assert visitor.states() == ["idle"] * 3 and visitor.read(".runs") == []
    assert asked.input_value() == page.EMBEDDED_EXAMPLES[0]
    values = [
        visitor.tab.input_value(f"#{name} input") for name in ("output-tokens", "temperature")
    ]
    assert values == ["64", "1"]


def test_who_leaves_is_not_waited_for(browser: Any, address: str, models: Models) -> None:
    leaving = Visitor(browser, address)
    leaving.set(output_tokens=400, batch_size=8)
    leaving.press()
    leaving.tab.wait_for_selector(".written")
    assert models.lock.locked()
    leaving.context.close()
    deadline = time.monotonic() + 10
    while models.lock.locked() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not models.lock.locked()


def test_visitors_wait_for_their_turn_up_to_a_limit(
    browser: Any, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_VISITORS", 2)
    blocks, url = serving.serve(models, limits=LIMITS)
    first, second, third = visitors = [Visitor(browser, url) for _ in range(3)]
    for visitor in visitors:
        visitor.set(output_tokens=3)
    try:
        with models.lock:  # the first one waits for the models, the second one for the first
            first.press(0)
            first.tab.wait_for_selector(".output[data-state=running]")
            second.press(0)
            assert second.states() == ["waiting", "idle", "idle"]
            third.tab.click("#all")
            third.tab.wait_for_selector(".error")
            assert third.states() == ["failed"] * 3
            assert third.read(".error")[0].startswith("Too many requests are waiting")
            second.tab.click("#stop")  # which makes room, at once
            second.ready()
            assert second.states() == ["stopped", "idle", "idle"]
            second.set(seed=8)
            second.press(2)
        for visitor in (first, second):
            visitor.ready()
        assert first.states() == ["done", "idle", "idle"]
        assert second.states() == ["stopped", "idle", "done"]
        [text] = second.read(".written")
        assert text == PROMPT + whole(models, "depth", new_tokens=3, seed=8).texts[0]
        third.generate()
        assert third.states() == ["done"] * 3
    finally:
        for visitor in visitors:
            visitor.context.close()
        blocks.close()


@pytest.mark.parametrize("width", [1400, 800, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_screen(browser: Any, address: str, width: int, scheme: str) -> None:
    visitor = Visitor(
        browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    visitor.type("drum" * 200)
    visitor.set(output_tokens=3, batch_size=2)
    visitor.generate(0)
    assert visitor.tab.evaluate("document.documentElement.scrollWidth") == width
    red = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
    assert (int(visitor.tab.evaluate(red)) < 128) == (scheme == "dark")
    visitor.context.close()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_as_many_panels_as_models(browser: Any, models: Models, count: int) -> None:
    named = [
        replace(model, name=f"model {number}")
        for number, model in enumerate([*models.models, models.models[0]][:count])
    ]
    blocks, url = serving.serve(replace(models, models=named), limits=LIMITS)
    visitor = Visitor(browser, url)
    visitor.set(output_tokens=4)
    visitor.generate()
    assert visitor.read(".head h2") == [model.name for model in named]
    assert visitor.states() == ["done"] * count and len(visitor.read(".rounds li")) == count
    visitor.context.close()
    blocks.close()
