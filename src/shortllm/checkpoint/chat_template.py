"""Whether a model has a chat template, by its files: loading its tokenizer takes seconds."""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.gguf import read_gguf
from shortllm.checkpoint.hub import directory_here, is_gguf
from shortllm.checkpoint.tensors import read_json
from shortllm.errors import CheckpointError


def has_chat_template(source: str) -> bool | None:
    """Whether a model has a chat template; None where only its tokenizer tells, and on the Hub."""
    directory = directory_here(source)
    if directory is not None:
        return _has_template(directory)
    file = Path(source).expanduser()
    if is_gguf(source) and file.exists():
        return read_gguf(file).value("tokenizer.chat_template") is not None
    return None


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
