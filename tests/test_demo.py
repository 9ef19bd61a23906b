"""The demo: text while it is generated, limits, the page in a browser."""

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
from chatting import ANSWER, QUESTION, STORY, chat_model

from shortllm.cli import main
from shortllm.demo import generate as generating
from shortllm.demo import models as demo_models
from shortllm.demo import named_models, page
from shortllm.demo.generate import Limits, Progress, Request, generate
from shortllm.demo.models import Models, embedded_models, open_models
from shortllm.errors import OutputError, ShortLLMError
from shortllm.model import Session

CHROMIUM = Path("/usr/bin/chromium")
TEXT = ".prose.text"
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
    return embedded_models(Session(device="cpu"))


@pytest.fixture(scope="module")
def models(places: dict[str, str]) -> Models:
    return open_models(places, Session(device="cpu"))


def whole(models: Models, name: str = "original", **options: Any) -> Progress:
    request = Request(**{"prompt": PROMPT, "new_tokens": 12, **options})
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
    assert found.tokens == 3 * 12 and len(set(found.texts)) > 1


def test_a_seed_gives_the_same_text_again_and_another_seed_another(models: Models) -> None:
    first, again, other = (whole(models, new_tokens=30, seed=seed) for seed in (5, 5, 6))
    assert first.texts == again.texts != other.texts


def test_temperature_0_takes_the_likeliest_token(models: Models) -> None:
    first, second = (whole(models, temperature=0, seed=seed).texts for seed in (1, 2))
    assert first == second == whole(models, top_p=0.0).texts == whole(models, top_k=1).texts
    model = models.named("original")
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likeliest = model.model(ids).logits[0, -1].argmax()
    [text] = whole(models, temperature=0, new_tokens=1).texts
    assert PROMPT + text == model.tokenizer.decode(
        [*ids[0].tolist(), int(likeliest)], skip_special_tokens=True
    )


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A model with a chat template, and one without."""
    chat = chat_model(tmp_path_factory.mktemp("chat") / "model")
    return open_models({"chat": chat, "plain": "embedded"}, Session(device="cpu"))


ASKED = f"{STORY}\nQuestion: {QUESTION}"


def test_an_answer_ends_where_the_model_ends_it(chatting: Models) -> None:
    asked: dict[str, Any] = {"prompt": ASKED, "chat": True, "temperature": 0.2, "new_tokens": 60}
    one = whole(chatting, "chat", **asked)
    assert one.texts == [f" {ANSWER}"]
    model = chatting.named("chat")
    written = model.tokenizer(one.texts[0], add_special_tokens=False)["input_ids"]
    assert one.tokens == len(written) + 1, "the end was generated too"
    several = whole(chatting, "chat", batch=3, **asked | {"temperature": 1.0, "seed": 3})
    assert 3 < several.tokens < 3 * 60 and all("\n" not in text for text in several.texts)
    assert several.tokens_per_s == pytest.approx(several.tokens / several.seconds)
    assert whole(chatting, "chat", **asked | {"chat": False}).tokens == 60
    with pytest.raises(ShortLLMError, match="plain has no chat template. Turn chat off"):
        whole(chatting, "plain", **asked)


def test_the_page_opens_with_a_question_if_all_models_chat(chatting: Models) -> None:
    both = page.defaults(chatting, LIMITS)
    assert (both.chat, both.temperature) == (False, 1.0)
    alone = page.defaults(replace(chatting, models=chatting.models[:1]), LIMITS)
    assert (alone.chat, alone.temperature, alone.prompt) == (True, 0.2, page.CHAT_EXAMPLES[0])


def test_text_comes_as_it_is_made(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "UPDATE_S", 0.001)
    request = Request(prompt=PROMPT, new_tokens=40, batch=2)
    states = list(generate(models, models.named("original"), request, limits=LIMITS))
    assert [one.state for one in states[:-1]] == ["running"] * (len(states) - 1)
    tokens = [one.tokens for one in states]
    assert tokens == sorted(tokens) and tokens[0] == 0 and tokens[-1] == 2 * 40
    assert len(set(tokens)) > 5
    for state in states:
        for part, text in zip(state.texts, states[-1].texts, strict=True):
            assert text.startswith(part)
    last = states[-1]
    assert last.first_token_s is not None and 0 < last.first_token_s < last.seconds
    assert last.tokens_per_s == pytest.approx(2 * 40 / last.seconds)
    assert last.peak_bytes is not None and last.peak_bytes > models.named("original").info.bytes


def test_half_a_character_is_held_back(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "decode", lambda tokenizer, prompt, ids: ["a\ufffd"] * len(ids))
    request = Request(prompt=PROMPT, new_tokens=3)
    *running, last = generate(models, models.named("original"), request, limits=LIMITS)
    assert {one.texts[0] for one in running[1:]} <= {"a"} and last.texts == ["a\ufffd"]


def test_texts_of_a_batch_that_do_not_follow_the_decoded_prompt_are_decoded_alone() -> None:
    class Joining:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "é" if ids == [1, 2] else "".join(map(str, ids))

    assert generating.decode(Joining(), [1], [[2], [3]]) == ["2", "3"]


def test_nothing_is_decoded_in_the_thread_that_generates(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[int]] = {"put": set(), "decode": set()}

    def noted(name: str, real: Any) -> Any:
        def call(*given: Any) -> Any:
            threads[name].add(threading.get_ident())
            return real(*given)

        return call

    monkeypatch.setattr(generating.Tokens, "put", noted("put", generating.Tokens.put))
    monkeypatch.setattr(generating, "decode", noted("decode", generating.decode))
    whole(models, new_tokens=40)
    assert threads["decode"] == {threading.get_ident()} and len(threads["put"]) == 1
    assert threads["put"] != threads["decode"]


def test_a_closed_iterator_stops_the_model_at_its_next_token(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    steps: list[torch.Tensor] = []
    real = generating.Tokens.put

    def counted(self: generating.Tokens, value: torch.Tensor) -> None:
        steps.append(value)
        real(self, value)

    monkeypatch.setattr(generating.Tokens, "put", counted)
    request = Request(PROMPT, 400, 8)
    states = generate(models, models.named("original"), request, limits=LIMITS)
    seen = next(state for state in states if state.tokens)
    assert models.lock.locked() and threading.active_count() > before
    states.close()
    assert not models.lock.locked() and threading.active_count() == before
    assert seen.tokens <= 8 * len(steps) < 8 * 400
    part = whole(models, new_tokens=seen.tokens // 8, batch=8)
    assert all(
        text.startswith(start.rstrip("\ufffd"))
        for text, start in zip(part.texts, seen.texts, strict=True)
    )


def test_texts_are_made_one_after_another(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    most = watch(models, monkeypatch)
    names = ["original", "width", "depth"] * 2
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: whole(models, name, new_tokens=20).texts, names))
    assert found[:3] == found[3:] and most == [1]


def watch(models: Models, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The highest number of texts in generation at the same time."""
    now, most, lock = [0], [0], threading.Lock()
    real = generating._run

    def watched(*given: Any) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        real(*given)
        with lock:
            now[0] -= 1

    monkeypatch.setattr(generating, "_run", watched)
    return most


# Limits.


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty. Type some text"),
        ({"prompt": "a" * 200_001}, "the prompt has 200,001 characters. At most 200,000"),
        ({"new_tokens": 0}, "output tokens must be a whole number from 1 to 400, not 0"),
        ({"new_tokens": 401}, "output tokens must be a whole number from 1 to 400, not 401"),
        ({"new_tokens": 1.5}, "output tokens must be a whole number from 1 to 400, not 1.5"),
        ({"batch": 9}, "batch size must be a whole number from 1 to 8, not 9"),
        ({"batch": None}, "batch size must be a whole number from 1 to 8, not empty"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4,294,967,295, not -1"),
        ({"seed": float("inf")}, "seed must be a whole number from 0 to 4,294,967,295, not inf"),
        ({"top_k": "many"}, "top-k must be a whole number from 0 to 1,000,000, not many"),
        ({"top_p": 1.1}, "top-p must be a number from 0 to 1, not 1.1"),
        ({"temperature": -0.1}, "temperature must be a number from 0 to 5, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 5, not nan"),
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
    with pytest.raises(ShortLLMError, match=f"Shorten it to {prompt - 1} tokens, or request fewer"):
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
    assert whole(models, batch=4).tokens == 4 * 12
    with pytest.raises(ShortLLMError, match="a batch of 5 .* Request a smaller batch"):
        whole(models, batch=5)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory for a batch of 1"),
        (
            RuntimeError("/home/me/secret"),
            r"generation failed \(RuntimeError\). The terminal shows",
        ),
    ],
)
def test_a_failure_is_reported_without_paths(
    models: Models, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(**given: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(models.named("original").model, "generate", fail)
        with pytest.raises(ShortLLMError, match=message) as raised:
            whole(models)
        assert "secret" not in str(raised.value)
    assert whole(models).tokens == 12


# Models.


def test_embedded_models_are_shortened_once(places: dict[str, str]) -> None:
    home = Path(places["depth"]).parent
    files = [home / "scores" / "scores.json", *(home / name / "config.json" for name in
             ("depth", "width"))]  # fmt: skip
    before = [one.stat().st_mtime_ns for one in files]
    again = embedded_models(Session(device="cpu"))
    assert again == places and list(again) == ["original", "width", "depth"]
    assert [one.stat().st_mtime_ns for one in files] == before


@pytest.mark.parametrize(("name", "blocks", "method"), [("depth", 9, "ppl"), ("width", 12, "flap")])
def test_a_damaged_version_is_shortened_again(
    places: dict[str, str], name: str, blocks: int, method: str
) -> None:
    config = Path(places[name]) / "config.json"
    config.write_text("{}")
    assert embedded_models(Session(device="cpu")) == places
    found = json.loads(config.read_text())
    assert found["num_hidden_layers"] == blocks and method in str(found["shortllm"])


def test_another_version_has_its_own_directory(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_models, "__version__", "9.9")
    monkeypatch.setattr(demo_models, "_shorten_embedded", lambda home, session: (home, home))
    assert "/9.9-" in embedded_models(Session(device="cpu"))["depth"]


def test_a_cache_that_cannot_be_written_gives_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="Set XDG_CACHE_HOME to another one"):
        embedded_models(Session(device="cpu"))


def test_panels_know_which_blocks_are_left(models: Models) -> None:
    original, width, depth = models.models
    assert (original.kept, original.source_blocks) == (list(range(12)), 12)
    assert (width.kept, width.source_blocks) == (list(range(12)), 12)
    assert len(depth.kept) == 9 and depth.source_blocks == 12
    cells = re.findall(r'<i class="(\w+)"', page.head(depth, original, "red"))
    assert [cells[block] for block in depth.kept] == ["kept"] * 9 and cells.count("gone") == 3
    parts = [
        float(part) for part in re.findall(r"--part: ([.\d]+)", page.head(width, original, "red"))
    ]
    assert sum(parts) / 12 == pytest.approx(0.75, abs=0.02) and min(parts) < 0.5


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("short", "")], "--model 'short=' must have the form NAME=MODEL"),
        ([("", "runs/short")], "--model '=runs/short' must have the form NAME=MODEL"),
        ([("a", "x"), ("a", "y")], "two models are called 'a'"),
    ],
)
def test_names_of_models(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ShortLLMError, match=message):
        named_models(pairs)


# What is shown.


def test_names_and_errors_are_escaped(models: Models) -> None:
    model = replace(models.named("original"), name="<b>&")
    shown = page.head(model, model, "red")
    assert "<b>&" not in shown and "<h3>&lt;b&gt;&amp;</h3>" in shown
    assert '<p role="alert">A &lt;b&gt;.</p>' in page.failure(ShortLLMError("a <b>"))


def test_figures_and_the_texts_of_a_batch() -> None:
    progress = Progress(
        state="done", texts=["<b>&", " two"], tokens=6, seconds=1.5, first_token_s=0.25
    )
    shown = page.figures(progress)
    for figure in ("1.50 s", "4.00 tokens/s", "250 ms", "<dd>6</dd>", "<dd>–</dd>"):
        assert figure in shown
    assert "8.33 tokens/s" in page.figures(replace(progress, seconds=0.72))
    assert page.figures(None).count("<dd>–</dd>") == 5
    asked = Request("so")
    assert page.written(asked, progress.texts) == "so\n\n1. <b>&\n\n2. two"
    assert page.written(asked, [" far"]) == "so far"
    asked = Request("so", chat=True)
    assert page.written(asked, progress.texts) == "1. <b>&\n\n2. two"
    assert page.written(asked, [" far"]) == " far"


# The server.


@pytest.fixture(scope="module")
def address(models: Models) -> Iterator[str]:
    blocks, url = page.serve(models, limits=LIMITS)
    assert url.startswith("http://127.0.0.1:")
    yield url
    blocks.close()


def ask(address: str, *given: Any) -> tuple[str, Any]:
    """Ask for a text as a program does: the event that ends it, and what it brings.

    Given are model and prompt, then output tokens, batch size and seed.
    """
    data = [*given, *(64, 1, 0, 50, 0.95, None, None)[len(given) - 2 :]]
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        joined = client.post("gradio_api/call/generate", json={"data": data}).json()
        answer = client.get(f"gradio_api/call/generate/{joined['event_id']}").text
    events = re.findall(r"event: (\w+)\ndata: (.*)", answer)
    event, content = next(one for one in events if one[0] in ("complete", "error"))
    return event, json.loads(content)


@pytest.mark.slow
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
    assert upload.status_code == 403 and upload.text == "uploads are not allowed"
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
    with pytest.raises(ShortLLMError, match=f"port {port} of 127.0.0.1 is in use"):
        page.serve(models, limits=LIMITS, port=port)


def test_serving_beyond_this_machine_is_a_warning(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    page.serve(models, limits=LIMITS)[0].close()
    assert "anyone" not in caplog.text
    page.serve(models, limits=LIMITS, host="0.0.0.0")[0].close()
    assert "anyone who can reach the page can use the models" in caplog.text


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
        (["--model", "short"], "'short=' must have the form NAME=MODEL"),
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
    assert process.returncode == 130
    assert errors.splitlines()[-2:] == ["Ctrl-C ends it", "Interrupted."]


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
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self.requested.append(request.url))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(address)
        self.tab.wait_for_selector("#all")

    def set(self, **settings: Any) -> None:
        for name, value in settings.items():
            self.tab.fill(f"#{name.replace('_', '-')} input", str(value))

    def type(self, prompt: str) -> None:
        self.tab.fill("#prompt textarea", prompt)

    def press(self, place: int | None = None) -> None:
        """Generate in one panel, or in all."""
        self.tab.evaluate("document.querySelectorAll('.figures').forEach(e => e.dataset.old = 1)")
        self.tab.click("#all" if place is None else f"{panel(place)} > button")

    def generate(self, place: int | None = None) -> None:
        """Generate, and wait for the end."""
        self.press(place)
        self.wait(place)

    def wait(self, place: int | None = None) -> None:
        for one in range(len(self.states())) if place is None else [place]:
            self.tab.wait_for_selector(
                f"{panel(one)} .figures:not([data-old]):is([data-state=done], [data-state=failed])"
            )

    def wait_for_text(self, length: int) -> None:
        """In the first panel."""
        shown = f"document.querySelector('{panel(0)} {TEXT}')"
        self.tab.wait_for_function(f"{shown}.innerText.length > {length}")

    def read(self, what: str) -> list[str]:
        return [str(text) for text in self.tab.locator(what).all_inner_texts()]

    def texts(self) -> list[str]:
        return self.read(f"#panels {TEXT}")

    def states(self) -> list[str]:
        found = self.tab.locator(".figures").all()
        return [str(one.get_attribute("data-state")) for one in found]

    def figures(self, place: int) -> dict[str, str]:
        """Sizes and measurements of a panel, by name."""
        found = self.tab.locator(panel(place))
        names, values = found.locator("dt").all_inner_texts(), found.locator("dd").all_inner_texts()
        values = [value.replace("\u202f", " ") for value in values]
        return dict(zip(names, values, strict=True))

    def runs(self) -> list[str]:
        """Titles of the charts."""
        return self.read("#runs [data-testid=block-info]:visible")

    def wait_for_bars(self, *counts: int) -> None:
        """As many charts, with as many bars that can be seen."""
        bars = "path[aria-roledescription=bar]"
        self.tab.wait_for_function(
            f"""wanted => JSON.stringify(wanted) === JSON.stringify(
                [...document.querySelectorAll('#runs .block')].filter(one => one.offsetHeight)
                .map(one => [...one.querySelectorAll('{bars}')]
                    .filter(bar => bar.getBoundingClientRect().height > 0).length))""",
            arg=list(counts),
        )


def panel(place: int) -> str:
    return f"#panels > .column:nth-child({place + 1})"


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address, viewport={"width": 1400, "height": 1000})
    yield visitor
    visitor.context.close()


def test_three_models_side_by_side(visitor: Visitor, address: str, models: Models) -> None:
    assert visitor.read("h1") == ["One prompt, 3 models side by side"]
    assert visitor.read(".head h3") == ["original", "width", "depth"]
    prompt = "Gwen had two coins."
    visitor.type(prompt)
    visitor.set(output_tokens=30, seed=4)
    visitor.generate()
    assert visitor.states() == ["done"] * 3
    texts = visitor.texts()
    expected = [whole(models, name, prompt=prompt, new_tokens=30, seed=4).texts[0]
                for name in ("original", "width", "depth")]  # fmt: skip
    assert texts == [prompt + text for text in expected] and len(set(texts)) == 3
    for place, (count, blocks, size) in enumerate(
        [
            ("4.67 M", "12", "9.34 MB"),
            ("3.55 M −24.0 %", "12", "7.09 MB"),
            ("3.54 M −24.1 %", "9", "7.09 MB"),
        ]
    ):
        found = visitor.figures(place)
        assert (found["parameters"], found["blocks"], found["size"]) == (count, blocks, size)
        assert re.fullmatch(r"\d+\.\d\d s", found["time"]) and found["tokens"] == "30"
        assert re.fullmatch(r"[\d,.]+ tokens/s", found["throughput"])
        assert sum(map(str.isdecimal, found["throughput"])) >= 3
        assert re.fullmatch(r"[\d,]+ ms", found["first token"])
        assert re.fullmatch(r"[\d.]+ [MG]B", found["memory"])
    visitor.wait_for_bars(3)
    assert visitor.runs() == ["Run 1: 30 tokens"]

    visitor.generate()  # the same seed
    assert visitor.texts() == texts
    visitor.set(seed=5)
    visitor.generate()
    assert all(new != old for new, old in zip(visitor.texts(), texts, strict=True))
    visitor.wait_for_bars(3, 3, 3)
    assert visitor.runs() == [f"Run {number}: 30 tokens" for number in (3, 2, 1)]
    assert visitor.complaints == []
    elsewhere = [
        url for url in visitor.requested if not url.startswith((address, "data:", "blob:"))
    ]
    assert elsewhere == []


def test_the_chat_switch(browser: Any, address: str, chatting: Models) -> None:
    blocks, url = page.serve(chatting, limits=LIMITS)
    assert ask(url, "chat", ASKED, 60)[1][0]["texts"] == [f" {ANSWER}"]
    assert ask(url, "plain", ASKED, 60)[1][0]["tokens"] == 60
    visitor = Visitor(browser, url)
    switch = visitor.tab.locator("#chat input")
    assert not switch.is_checked(), "one model has no template"
    visitor.set(output_tokens=60, temperature=0.7)
    switch.check()
    visitor.tab.wait_for_function("document.querySelector('#temperature input').value == '0.2'")
    visitor.type(ASKED)
    visitor.generate()
    assert visitor.states() == ["done", "failed"] and visitor.texts()[0].strip() == ANSWER
    assert visitor.read("[role=alert]") == ["Plain has no chat template. Turn chat off."]
    visitor.wait_for_bars(1)
    assert visitor.runs() == ["Run 1: up to 60 tokens"]
    switch.uncheck()
    visitor.tab.wait_for_function("document.querySelector('#temperature input').value == '1'")
    visitor.generate()
    assert visitor.states() == ["done"] * 2
    assert all(text.startswith(ASKED) for text in visitor.texts())
    visitor.context.close()
    blocks.close()
    visitor = Visitor(browser, address)
    assert visitor.tab.locator("#chat").count() == 0, "no model has a template"
    visitor.context.close()


def test_text_that_grows_stays_where_it_was_scrolled_to(visitor: Visitor, models: Models) -> None:
    visitor.set(output_tokens=400, batch_size=8)
    visitor.press()
    shown = f"document.querySelector('{panel(0)} {TEXT}')"
    visitor.tab.wait_for_function(f"{shown}.scrollHeight > {shown}.clientHeight + 200")
    visitor.tab.evaluate(
        f"""() => {{
            window.places = new Set()
            const note = () => {{ places.add({shown}.scrollTop); requestAnimationFrame(note) }}
            {shown}.scrollTop = 120
            note()
        }}"""
    )
    before = visitor.tab.evaluate(f"{shown}.scrollHeight")
    visitor.tab.wait_for_function(f"{shown}.scrollHeight > {before} + 300")
    assert visitor.tab.evaluate("[...places]") == [120]
    visitor.tab.dispatch_event("#stop", "click")
    wait_until_free(models)


def test_one_panel_alone_and_a_batch_in_numbers(visitor: Visitor) -> None:
    visitor.set(output_tokens=8, batch_size=3)
    visitor.generate(1)
    assert visitor.states() == ["idle", "done", "idle"]
    text = visitor.texts()[1]
    assert text.startswith(PROMPT) and re.findall(r"^(\d)\. ", text, re.MULTILINE) == [*"123"]
    visitor.wait_for_bars(1)
    assert visitor.runs() == ["Run 1: 8 tokens × 3"]


def test_the_charts_show_the_last_four_runs_to_one_scale(visitor: Visitor) -> None:
    visitor.set(output_tokens=1)
    visitor.generate(0)
    for batch in (2, 3, 4, 5):
        visitor.set(batch_size=batch)
        visitor.generate(batch % 3)
    visitor.tab.wait_for_function("document.querySelector('#runs').innerText.includes('Run 5')")
    assert visitor.runs() == [f"Run {batch}: 1 token × {batch}" for batch in (5, 4, 3, 2)]
    visitor.wait_for_bars(1, 1, 1, 1)
    axes = [
        visitor.tab.locator("#runs .block:visible").nth(run).locator("g.role-axis-label").nth(1)
        for run in range(4)
    ]
    assert len({tuple(axis.all_text_contents()) for axis in axes}) == 1


def test_text_streams_and_stops(
    visitor: Visitor, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generating.Tokens.put

    def slow(self: generating.Tokens, value: torch.Tensor) -> None:
        time.sleep(0.1)  # so that the page of a busy browser sees it running
        real(self, value)

    monkeypatch.setattr(generating.Tokens, "put", slow)
    visitor.set(output_tokens=400, batch_size=8)
    visitor.press()
    visitor.wait_for_text(400)
    assert visitor.states() == ["running", "idle", "idle"]
    visitor.tab.dispatch_event("#stop", "click")  # a click waits until text has stopped moving it
    wait_until_free(models)
    visitor.tab.wait_for_timeout(500)
    found = visitor.figures(0)
    assert 0 < int(found["tokens"]) < 400 and found["memory"] == "–"
    assert visitor.states() == ["running", "idle", "idle"] and visitor.runs() == []
    assert visitor.texts()[1:] == ["", ""]
    visitor.set(output_tokens=5, batch_size=1)
    visitor.generate()
    assert visitor.states() == ["done"] * 3


def wait_until_free(models: Models) -> None:
    deadline = time.monotonic() + 20
    while models.lock.locked() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not models.lock.locked()


def test_errors_are_said_in_the_panel_and_the_page_lives_on(visitor: Visitor) -> None:
    visitor.type("drum " * 600)
    visitor.set(output_tokens=5)
    visitor.generate()
    assert visitor.states() == ["failed"] * 3
    errors = visitor.read("[role=alert]")
    assert all("more than the 512 positions of" in one for one in errors)
    assert errors[0].startswith("The prompt has ") and errors[0].endswith(".")
    visitor.type(PROMPT)
    for size, given in ((9, "9"), ("", "empty")):
        visitor.set(batch_size=size)
        visitor.generate(0)
        [error, *_] = visitor.read("[role=alert]")
        assert error == f"Batch size must be a whole number from 1 to 8, not {given}."
    visitor.set(batch_size=1)
    visitor.generate()
    assert visitor.states() == ["done"] * 3 and visitor.complaints == []


def test_text_is_shown_as_text(visitor: Visitor) -> None:
    prompt = "<img src=x onerror='document.title = 1'> ${1 + 1} {{prompt}}"
    visitor.type(prompt)
    visitor.set(output_tokens=3)
    visitor.generate(0)
    assert visitor.texts()[0].startswith(prompt)
    assert visitor.tab.title() == "shortllm demo" and visitor.complaints == []
    assert visitor.tab.locator("img[src=x]").count() == 0


def test_examples_and_reset(visitor: Visitor) -> None:
    examples = visitor.tab.locator("#examples button")
    assert examples.count() == len(page.EMBEDDED_EXAMPLES)
    examples.nth(1).click()
    prompt = visitor.tab.locator("#prompt textarea")
    visitor.tab.wait_for_function("document.querySelector('#prompt textarea').value.length > 60")
    assert prompt.input_value() == page.EMBEDDED_EXAMPLES[1]
    visitor.set(output_tokens=5, temperature=0.5)
    visitor.generate()
    visitor.wait_for_bars(3)
    assert visitor.runs() == ["Run 1: 5 tokens"]
    visitor.tab.click("#reset")
    visitor.tab.wait_for_function("!document.querySelector('[data-state=done]')")
    visitor.wait_for_bars()
    assert visitor.states() == ["idle"] * 3 and visitor.texts() == [""] * 3
    assert prompt.input_value() == page.EMBEDDED_EXAMPLES[0]
    values = [
        visitor.tab.input_value(f"#{name} input") for name in ("output-tokens", "temperature")
    ]
    assert values == ["64", "1"]


def test_a_visitor_who_leaves_frees_the_models(browser: Any, address: str, models: Models) -> None:
    leaving = Visitor(browser, address)
    leaving.set(output_tokens=400, batch_size=8)
    leaving.press()
    leaving.wait_for_text(400)
    assert models.lock.locked()
    leaving.context.close()
    wait_until_free(models)


@pytest.mark.slow
def test_visitors_wait_in_a_queue_up_to_a_limit(
    browser: Any, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "QUEUE_SIZE", 1)
    blocks, url = page.serve(models, limits=LIMITS)
    first, second, third = visitors = [Visitor(browser, url) for _ in range(3)]
    waiting = "document.body.innerText.includes('queue: 1/1')"
    for visitor in visitors:
        visitor.set(output_tokens=3)
    try:
        with models.lock:  # the first one waits for the models, the second one for the first
            first.press(0)
            first.tab.wait_for_timeout(1000)
            second.press(0)
            second.tab.wait_for_function(waiting)
            third.tab.click("#all")
            third.tab.wait_for_selector(".toast-body")
            assert "currently busy" in third.read(".toast-body")[0]
            assert third.states() == ["idle"] * 3
            second.tab.click("#stop")  # which frees the place in the queue
            second.tab.wait_for_function(f"!{waiting}")
            second.set(seed=8)
            second.press(2)
            second.tab.wait_for_function(waiting)
        first.wait(0)
        second.wait(2)
        assert first.states() == ["done", "idle", "idle"]
        assert second.states() == ["idle", "idle", "done"]
        assert second.texts()[2] == PROMPT + whole(models, "depth", new_tokens=3, seed=8).texts[0]
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
    blocks, url = page.serve(replace(models, models=named), limits=LIMITS)
    visitor = Visitor(browser, url)
    visitor.set(output_tokens=4)
    visitor.generate()
    assert visitor.read(".head h3") == [model.name for model in named]
    assert visitor.states() == ["done"] * count
    visitor.wait_for_bars(count)
    visitor.context.close()
    blocks.close()
