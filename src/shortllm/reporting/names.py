"""Models, files and choices as a reader may see them: without the directories of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shortllm.records import ModelInfo
from shortllm.reporting.wording import NONE


def model_name(model_id: str) -> str:
    """A Hub id as it is; of a directory the last name only, of a Hub cache directory the Hub id."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)", model_id)
    return f"{cached[1]}/{cached[2]}" if cached else without_directories(model_id)


def hub_id(model: ModelInfo) -> str | None:
    """The model's name on the Hub, None where it is (or may be) a directory."""
    name = model_name(model.id)
    from_hub = model.revision is not None or "models--" in model.id
    return name if from_hub and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def without_directories(text: str) -> str:
    """A path without the directories of the machine it lies on; any other text unchanged."""
    absolute = re.match(r"(~|\.{1,2}|[A-Za-z]:)?[/\\]", text)
    relative = text.count("/") > 1 and " " not in text and "://" not in text
    if not absolute and not relative:
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text


def prose_without_directories(text: str) -> str:
    """A sentence in which absolute paths are cut to their last name."""
    return re.sub(
        r"(?<![\w/.:~])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+(?=[^\s/\\])", "", text
    )


def command_line(arguments: Sequence[str]) -> list[str]:
    """The words of the command, quoted for a shell, files and directories by their last name."""
    words = list(arguments)
    if words and re.split(r"[/\\]", words[0])[-1] == "__main__.py":
        words[:1] = ["python", "-m", "shortllm"]
    shown = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(shlex.quote(option + equals + model_name(value)))
    return shown


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested choices as rows: ('plan.remove', '3')."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for place, one in enumerate(value, start=1):
                yield from flattened(one, f"{prefix}{key}.{place}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _shown(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return model_name(value) if isinstance(value, str) else str(value)
