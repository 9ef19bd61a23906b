"""A checkpoint's tokenizer, with the special tokens that a recipe corrects.

Some conversions name other special tokens than the model was trained with (LLaMA-1 of decapoda:
BOS 0 and EOS 1, where 1 and 2 are right). What is then wrong is put right where text is tokenized,
and in every file of a shortened checkpoint, so that whoever loads it is not misled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shortllm.checkpoint.config import FLAG
from shortllm.checkpoint.source import Checkpoint, token_ids
from shortllm.checkpoint.tensors import read_json
from shortllm.errors import CheckpointError
from shortllm.runtime import is_trusted

GENERATION_CONFIG = "generation_config.json"


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer, its special tokens those that `special_tokens` names.

    Raises:
        CheckpointError: it has none that transformers can load, or no token of such an id.
    """
    if not checkpoint.special_tokens:
        return _load(checkpoint)
    # the wrong ones may be such that transformers 5.17 cannot load them (empty ones recurse)
    tokenizer = _load(checkpoint, **{f"{kind}_token": None for kind in checkpoint.special_tokens})
    named: dict[str, Any] = {}
    for kind, number in checkpoint.special_tokens.items():
        token = tokenizer.convert_ids_to_tokens(number) if 0 <= number < len(tokenizer) else None
        if token is None:
            raise CheckpointError(
                f"the tokenizer of {checkpoint.id} has no token {number}, which is to be its "
                f"{kind.upper()}. Its ids are 0 to {len(tokenizer) - 1}"
            )
        named[f"{kind}_token"] = token
    if "bos" in checkpoint.special_tokens:
        named["add_bos_token"] = True  # also has the template of the right token made anew
    return _load(checkpoint, **named)


def _load(checkpoint: Checkpoint, **named: Any) -> Any:
    from transformers import AutoTokenizer

    from shortllm.model.loading import quiet_transformers

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.directory,
                config=checkpoint.config,
                local_files_only=True,
                trust_remote_code=is_trusted(),
                **named,
            )
            tokenizer("a")  # some damage shows at the first use only
    except Exception as error:  # whatever the values in its files lead to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"the tokenizer of {checkpoint.id} comes with Python code of its own, which was "
                f"not run. Read it, and if you trust it give the same command with {FLAG}"
            ) from error
        raise CheckpointError(
            f"{checkpoint.id} has no tokenizer that transformers can load ({reason}). "
            "Copy the tokenizer files into the directory"
        ) from error
    return tokenizer


def write_special_tokens(checkpoint: Checkpoint, directory: Path) -> None:
    """Put the special tokens right in the tokenizer and the generation config of a new checkpoint;
    in its config.json they are.

    Raises:
        CheckpointError: there is no such tokenizer, or the generation config is damaged.
    """
    if not checkpoint.special_tokens:
        return
    tokenizer = load_tokenizer(checkpoint)
    for how in ("is_local", "local_files_only"):  # how it was read, which is saved otherwise
        tokenizer.init_kwargs.pop(how, None)
    tokenizer.save_pretrained(directory)
    path = directory / GENERATION_CONFIG
    if path.is_file():
        content = read_json(path)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no fields. Download it again")
        content |= token_ids(checkpoint.special_tokens)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
