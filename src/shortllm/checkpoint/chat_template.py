"""Whether a model has a chat template, by its files: loading its tokenizer takes seconds."""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.gguf import cached_directory, read_gguf
from shortllm.checkpoint.hub import EMBEDDED, EMBEDDED_MODEL, is_gguf, local_directory
from shortllm.checkpoint.tensors import read_json
from shortllm.errors import CheckpointError


def has_chat_template(source: str) -> bool | None:
    """Whether a model has a chat template; None where only its tokenizer tells, and on the Hub."""
    if source == EMBEDDED:
        return _has_template(EMBEDDED_MODEL)
    if is_gguf(source):
        file = Path(source).expanduser()
        if not file.exists():
            return None
        copy = cached_directory(file)
        if (copy / "config.json").is_file():
            return _has_template(copy)
        return read_gguf(file).value("tokenizer.chat_template") is not None
    directory = local_directory(source)
    return None if directory is None else _has_template(directory)


def _has_template(directory: Path) -> bool | None:
    if any(directory.glob("chat_template.jinja")) or any(
        directory.glob("additional_chat_templates/*.jinja")
    ):
        return True
    try:
        said = read_json(directory / "tokenizer_config.json")
    except CheckpointError:
        return None
    return bool(said.get("chat_template")) or (None if "auto_map" in said else False)
