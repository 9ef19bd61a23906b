"""A checkpoint's tokenizer, with the special tokens that a recipe corrects.

Some conversions name other special tokens than the model was trained with (LLaMA-1 of decapoda:
BOS 0 and EOS 1, where 1 and 2 are right). They are corrected where text is tokenized and in every
file of a shortened checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortllm.checkpoint.config import FLAG
from shortllm.checkpoint.loaded import is_name
from shortllm.checkpoint.source import Checkpoint, token_ids
from shortllm.checkpoint.tensors import read_json, write_json
from shortllm.errors import CheckpointError, first_line_of
from shortllm.runtime import is_trusted, quiet_transformers

GENERATION_CONFIG = "generation_config.json"


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer, with the special tokens of `special_tokens`."""
    if not checkpoint.special_tokens:
        return _load(checkpoint)
    # transformers 5.17 cannot load some of the wrong ones (empty ones recurse)
    tokenizer = _load(checkpoint, **{f"{kind}_token": None for kind in checkpoint.special_tokens})
    named: dict[str, Any] = {}
    for kind, number in checkpoint.special_tokens.items():
        token = tokenizer.convert_ids_to_tokens(number) if 0 <= number < len(tokenizer) else None
        if token is None:
            raise CheckpointError(
                f"the tokenizer of {checkpoint.id} has no token {number} to use as "
                f"{kind.upper()}. Its ids are 0 to {len(tokenizer) - 1}"
            )
        named[f"{kind}_token"] = token
    if "bos" in checkpoint.special_tokens:
        named["add_bos_token"] = True  # also rebuilds the template with the right token
    return _load(checkpoint, **named)


def chat_template_of(checkpoint: Checkpoint) -> str | None:
    """The chat template of the checkpoint's tokenizer."""
    tokenizer = load_tokenizer(checkpoint)
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else None


def _load(checkpoint: Checkpoint, **named: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.directory,
                config=checkpoint.config,
                local_files_only=True,
                trust_remote_code=is_trusted(),
                **named,
            )
            tokenizer("a")  # some damage shows only at the first use
    except Exception as error:  # tokenizers raise whatever the values in their files lead to
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"the tokenizer of {checkpoint.id} comes with Python code of its own, which was "
                f"not run. Read it, and if you trust it run the same command with {FLAG}"
            ) from error
        raise CheckpointError(
            f"{checkpoint.id} has no tokenizer that transformers can load "
            f"({first_line_of(error)}). {_how_to_give(checkpoint)}"
        ) from error
    return tokenizer


def _how_to_give(checkpoint: Checkpoint) -> str:
    if is_name(checkpoint.id):
        return "Give it as tokenizer=AutoTokenizer.from_pretrained(...)"
    return "Copy the tokenizer files into the directory"


def write_special_tokens(checkpoint: Checkpoint, directory: Path) -> None:
    """Correct the special tokens of a new checkpoint; its config.json has them already."""
    if not checkpoint.special_tokens:
        return
    tokenizer = load_tokenizer(checkpoint)
    for how in ("is_local", "local_files_only"):  # how it was read, which is saved otherwise
        tokenizer.init_kwargs.pop(how, None)
    tokenizer.save_pretrained(directory)
    path = directory / GENERATION_CONFIG
    if path.is_file():
        write_json(path, read_json(path) | token_ids(checkpoint.special_tokens))
