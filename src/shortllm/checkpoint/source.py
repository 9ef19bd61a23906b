"""Open a checkpoint (local directory, Hub id, embedded model) and check it before heavy work.

Block tensors are called `<prefix>.<number>.<rest>`, with one prefix for all blocks of the decoder
(`model.layers`, `transformer.h`, `gpt_neox.layers`, ...). The prefix is found by its numbers: they
are exactly 0 to L-1. Names in a checkpoint may differ from module names, so only the names in the
checkpoint are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from shortllm.calls import accepts
from shortllm.checkpoint.config import block_count, checked_config, text_config
from shortllm.checkpoint.fingerprint import content_fingerprint
from shortllm.checkpoint.gguf import origin_in
from shortllm.checkpoint.heads import head_count, head_fields, place_of, speaks_of_heads
from shortllm.checkpoint.hub import ModelSource, locate, named_revision
from shortllm.checkpoint.shorten_config import structurally_protected
from shortllm.checkpoint.structure import BlockStructure, block_structure
from shortllm.checkpoint.tensors import TensorEntry, read_tensor_table, unpacked_elements
from shortllm.errors import UnsupportedModelError
from shortllm.records import ModelInfo, PredictionHeads, SpecialToken

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class BlockNames:
    """Which tensor names of a checkpoint belong to which block of the decoder."""

    prefix: str
    count: int
    heads: int = 0
    """Prediction heads that are numbered like blocks after the last one."""

    def new_numbers(self, kept: Sequence[int], *, drop_heads: bool = False) -> dict[int, int]:
        """Old number -> new one, of the kept blocks and of the heads that stay behind them."""
        heads = [] if drop_heads else range(self.count, self.count + self.heads)
        return {old: new for new, old in enumerate([*kept, *heads])}

    def block_of(self, name: str) -> int | None:
        """Number of the block that tensor `name` belongs to; None outside the blocks."""
        number = self.number_of(name)
        return number if number is None or number < self.count else None

    def is_head(self, name: str) -> bool:
        """Whether tensor `name` belongs to a prediction head."""
        number = self.number_of(name)
        return speaks_of_heads(name) if number is None else number >= self.count

    def number_of(self, name: str) -> int | None:
        """The number in the name of a block, or of a head behind the last one; else None."""
        inside, _, rest = name.partition(self.prefix + ".")
        number = rest.partition(".")[0]
        return int(number) if not inside and number.isdigit() else None

    def renumbered(self, name: str, new: int) -> str:
        """`name` with its block number replaced by `new`."""
        rest = name.removeprefix(self.prefix + ".").partition(".")[2]
        return f"{self.prefix}.{new}.{rest}"


@dataclass(frozen=True)
class Checkpoint:
    """A directory that `from_pretrained` loads, seen without building the model."""

    id: str
    """Hub id or directory, as the user gave it, or the name of a loaded model."""
    directory: Path
    revision: str | None
    raw_config: dict[str, Any]
    """config.json as it is in the file, except for `special_tokens`."""
    config: Any
    """The Hugging Face config object, with every default filled in."""
    tensors: dict[str, TensorEntry]
    special_tokens: dict[SpecialToken, int] = field(default_factory=dict)
    """Token ids that replace those in the files, e.g. `{"bos": 1}`."""

    @property
    def model_type(self) -> str:
        """The type that config.json names."""
        return str(self.config.model_type)

    @property
    def block_count(self) -> int:
        """Blocks of the (text) decoder."""
        return block_count(self.config)

    @property
    def vocabulary(self) -> int:
        """Token ids that the model has embeddings for."""
        return int(text_config(self.config).vocab_size)

    @cached_property
    def structure(self) -> BlockStructure:
        """The blocks of the model that the config describes."""
        return block_structure(self.config)

    @cached_property
    def block_names(self) -> BlockNames:
        """Which tensor names belong to which block."""

        count = self.block_count

        def fits(prefix: str) -> bool:
            names = BlockNames(prefix, count)
            found = (
                t.elements for t in self.tensors.values() if names.block_of(t.name) is not None
            )
            return sum(found) == self.structure.elements

        return find_block_names(
            self.tensors, count, self.structure.name, is_head=self._is_head, fits=fits
        )

    def _is_head(self, prefix: str, number: int) -> bool:
        """Whether what is stored behind the last block is a prediction head.

        It is if config.json counts it. Otherwise by its structure: it projects the embedding of a
        token together with a hidden state, and no block has such a weight.
        """
        text = text_config(self.config)
        if number < self.block_count + head_count(text):
            return True
        names = BlockNames(prefix, self.block_count)
        inside = {
            names.renumbered(name, number) for name in self.tensors if names.block_of(name) == 0
        }
        return any(
            names.number_of(name) == number
            and name not in inside
            and len(entry.shape) == 2
            and entry.shape[1] == 2 * getattr(text, "hidden_size", 0)
            for name, entry in self.tensors.items()
        )

    @cached_property
    def prediction_heads(self) -> PredictionHeads | None:
        """The prediction heads among the stored tensors; None without any."""
        names = self.block_names
        found = [name for name in self.tensors if names.is_head(name)]
        if not found:
            return None
        numbers = {name: names.number_of(name) for name in found}
        return PredictionHeads(
            places=list(
                dict.fromkeys(
                    place_of(name) if number is None else f"{names.prefix}.{number}"
                    for name, number in numbers.items()
                )
            ),
            tensors=len(found),
            parameters=sum(self.elements[name] for name in found),
            fields=list(dict.fromkeys(head_fields(self.raw_config))),
            unexpected=any(not self.structure.ignores(name) for name in found),
        )

    @cached_property
    def unbuilt(self) -> dict[str, TensorEntry]:
        """The stored tensors outside the blocks that are not of the model: prediction heads, and
        what its class ignores."""
        names = self.block_names
        return {
            name: entry
            for name, entry in self.tensors.items()
            if names.block_of(name) is None
            and (names.is_head(name) or self.structure.ignores(name))
        }

    @cached_property
    def parameters_per_block(self) -> list[int]:
        """Parameters of each block."""
        return self._per_block(self.elements)

    @cached_property
    def bytes_per_block(self) -> list[int]:
        """Stored bytes of each block."""
        return self._per_block({name: entry.bytes for name, entry in self.tensors.items()})

    def _per_block(self, counts: Mapping[str, int]) -> list[int]:
        totals = [0] * self.block_count
        for name, count in counts.items():
            block = self.block_names.block_of(name)
            if block is not None:
                totals[block] += count
        return totals

    def block_weights(self, block: int) -> list[TensorEntry]:
        """The stored weights of a block: see `is_weight`."""
        return [
            entry
            for entry in self.tensors.values()
            if self.block_names.block_of(entry.name) == block
            and is_weight(entry.name, len(entry.shape))
        ]

    @property
    def parameters(self) -> int:
        """Stored elements, packed ones counted singly; tied tensors are stored once."""
        return sum(self.elements.values())

    @cached_property
    def elements(self) -> dict[str, int]:
        """How many parameters each stored tensor represents."""
        return unpacked_elements(self.tensors, self.raw_config)

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.bytes for entry in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """See `content_fingerprint`."""
        return content_fingerprint(self.directory, self.tensors.values())

    def info(self) -> ModelInfo:
        """Identity and size, as result files carry them."""
        return ModelInfo(
            id=self.id,
            revision=self.revision,
            gguf=origin_in(self.raw_config),
            model_type=self.model_type,
            blocks=self.block_count,
            parameters=self.parameters,
            parameters_per_block=self.parameters_per_block,
            bytes=self.bytes,
            period=self.structure.period,
            fixed=structurally_protected(self.config),
            fingerprint=self.fingerprint,
        )


@accepts()
def open_checkpoint(
    source: ModelSource,
    *,
    revision: str | None = None,
    special_tokens: Mapping[SpecialToken, int] | None = None,
) -> Checkpoint:
    """Open a local directory, a Hub id (downloaded, or taken from the local cache) or `embedded`.

    Reads only config and tensor headers. The text `embedded` always means the built-in model; a
    directory of that name is `./embedded`.

    Args:
        source: a directory, a Hub id, also as `MODEL@REVISION`, or a loaded model.
        revision: branch, tag or commit of a Hub id.
        special_tokens: correct ids of `bos`, `eos`, `unk`, `pad`, if the files name wrong ones.
    Returns:
        Its config and tensor table, by which all stages read it.
    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        UnsupportedModelError: not a decoder-only causal language model that transformers knows, or
            one with code of its own that is not allowed.
    """
    source, revision = named_revision(source, revision)
    directory, commit = locate(source, revision)
    raw_config, config = checked_config(source, directory)
    tensors = _without_tied(read_tensor_table(directory), config)
    special = dict(special_tokens or {})
    raw_config = raw_config | token_ids(special)
    for name, number in token_ids(special).items():
        setattr(config, name, number)
    return Checkpoint(source, directory, commit, raw_config, config, tensors, special)


def _without_tied(tensors: Mapping[str, TensorEntry], config: Any) -> dict[str, TensorEntry]:
    """The tensors without embeddings that share their memory with others and are tied to them.

    All else that shares memory (blocks and prediction heads may) is needed under each of its names.
    """
    text = text_config(config)
    tied = any(getattr(one, "tie_word_embeddings", False) for one in (config, text))

    def inside(name: str) -> bool:
        return speaks_of_heads(name) or NUMBER.search(name) is not None

    return {
        name: entry
        for name, entry in tensors.items()
        if not (tied and entry.same_as and entry.shape[:1] == (text.vocab_size,))
        or inside(name)
        or inside(entry.same_as)
    }


def token_ids(special_tokens: Mapping[SpecialToken, int]) -> dict[str, int]:
    """Special tokens under the names of config files, e.g. `{"bos_token_id": 1}`, without `unk`."""
    return {f"{kind}_token_id": number for kind, number in special_tokens.items() if kind != "unk"}


# ---- names of blocks


def find_block_names(
    names: Iterable[str],
    count: int,
    module_name: str,
    *,
    is_head: Callable[[str, int], bool] = lambda prefix, number: False,
    fits: Callable[[str], bool] = lambda prefix: False,
) -> BlockNames:
    """The prefix whose numbers are exactly 0 to `count - 1`, or continue with prediction heads.

    Args:
        module_name: dotted name of the block list in the built model; if several prefixes fit (a
            vision tower as deep as the decoder), the one with the longest common ending is taken.
        is_head: whether what is stored under a prefix with a number behind the last is a head.
        fits: whether the tensors under a prefix are as large as the model's blocks; used if
            transformers renames the blocks while loading, so that no ending is common.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in NUMBER.finditer(name):
            prefix = name[: match.start() - 1]
            if not speaks_of_heads(prefix):
                numbers.setdefault(prefix, set()).add(int(match.group()))
    fitting = [
        prefix
        for prefix, found in numbers.items()
        if found == set(range(max(count, len(found))))
        and all(is_head(prefix, number) for number in range(count, len(found)))
    ]
    # experts inside a block are numbered too: a prefix inside another one is not the block list
    outer = [p for p in fitting if not any(p.startswith(other + ".") for other in fitting)]
    if not outer:
        raise UnsupportedModelError(_explain_numbers(numbers, count, module_name, is_head))
    best = max(outer, key=lambda prefix: _common_ending(prefix, module_name))
    if not _common_ending(best, module_name) and not (len(outer) == 1 and fits(best)):
        raise UnsupportedModelError(
            f"tensors numbered 0 to {count - 1} are called '{best}', but the model's blocks are "
            f"called '{module_name}': which tensors belong to which block is not certain"
        )
    return BlockNames(best, count, len(numbers[best]) - count)


def is_weight(name: str, dimensions: int) -> bool:
    """Whether a tensor of a block counts as a weight: matrices, and vectors called `weight`."""
    return name.endswith("weight") or (dimensions > 1 and not name.endswith("bias"))


def _common_ending(one: str, other: str) -> int:
    """How many trailing parts two dotted names share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _explain_numbers(
    numbers: dict[str, set[int]], count: int, module_name: str, is_head: Callable[[str, int], bool]
) -> str:
    """Why no prefix fits: the nearest one and how its numbers differ."""
    near = [prefix for prefix in numbers if _common_ending(prefix, module_name)]
    if not near:
        return f"no tensor is named like a block of '{module_name}' (config says {count} blocks)"
    prefix = max(near, key=lambda p: _common_ending(p, module_name))
    found = numbers[prefix]
    missing, extra = set(range(count)) - found, found - set(range(count))
    if missing:
        return (
            f"the config says {count} blocks, but no tensor of block {min(missing)} "
            f"('{prefix}.{min(missing)}') is stored"
        )
    if is_head(prefix, min(extra)):
        return (
            f"the prediction head '{prefix}.{min(extra)}' does not follow the last of {count} "
            f"blocks: its tensors must be called '{prefix}.{count}'. Rename them, or leave them out"
        )
    return (
        f"'{prefix}.{min(extra)}' lies behind the last of {count} blocks, and it is not a "
        "prediction head; is the block count in config.json correct?"
    )
