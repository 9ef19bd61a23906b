"""Measure a small causal model plainly: perplexity, perplexity without blocks, task accuracy.

Nothing is used but torch and the model's own forward, so that the numbers are a reference for
the package's own engine. B sequences, T tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from shortllm.embedded.questions import Document, prompt
from shortllm.embedded.world import Split, rows

BATCH = 32
"""Sequences per forward pass."""


def token_rows(
    tokenizer: PreTrainedTokenizerBase, split: Split, *, count: int, length: int
) -> list[list[int]]:
    """The first `count` rows of a split as token ids: BOS, then the text, cut to `length`."""
    return [tokenizer(text)["input_ids"][:length] for text in rows(split, count)]


@torch.no_grad()
def token_log_probs(
    model: LlamaForCausalLM, sequences: Sequence[Sequence[int]]
) -> Iterator[Tensor]:
    """For each sequence of T token ids: the log-probabilities `[T - 1]` of all but the first."""
    for start in range(0, len(sequences), BATCH):
        batch = [torch.tensor(ids) for ids in sequences[start : start + BATCH]]
        # Padding is on the right, where a causal model's earlier positions cannot see it.
        ids_BT = nn.utils.rnn.pad_sequence(batch, batch_first=True)
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits.float()
        log_probs_BTV = torch.log_softmax(logits_BTV, dim=-1)
        log_probs_BT = log_probs_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        for ids, log_probs_T in zip(batch, log_probs_BT, strict=True):
            yield log_probs_T[: len(ids) - 1]


def perplexity(model: LlamaForCausalLM, sequences: Sequence[Sequence[int]]) -> float:
    """exp of the mean loss over all tokens but the first of each sequence."""
    return float(torch.cat(list(token_log_probs(model, sequences))).mean().neg().exp())


@contextmanager
def without_blocks(model: LlamaForCausalLM, removed: Iterable[int]) -> Iterator[None]:
    """Leave out the blocks with these indices while the context lasts."""
    blocks = model.model.layers
    gone = set(removed)
    model.model.layers = nn.ModuleList(b for index, b in enumerate(blocks) if index not in gone)
    try:
        yield
    finally:
        model.model.layers = blocks


def removal_perplexities(
    model: LlamaForCausalLM, sequences: Sequence[Sequence[int]]
) -> list[float]:
    """The perplexity without each single block, in the order of the blocks."""
    values = []
    for index in range(len(model.model.layers)):
        with without_blocks(model, [index]):
            values.append(perplexity(model, sequences))
    return values


def task_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> tuple[float, float]:
    """Shares of questions whose right choice scores best: by log-likelihood, and per character.

    These are `acc` and `acc_norm` of lm-evaluation-harness.
    """
    prompts = [tokenizer(prompt(document))["input_ids"] for document in documents]
    full = [
        tokenizer(f"{prompt(document)} {choice}")["input_ids"]
        for document in documents
        for choice in document["choices"]
    ]
    log_probs = token_log_probs(model, full)
    right = right_normalised = 0
    for document, prompt_ids in zip(documents, prompts, strict=True):
        scores = [
            float(log_probs_T[len(prompt_ids) - 1 :].sum())
            for log_probs_T in islice(log_probs, len(document["choices"]))
        ]
        normalised = [
            score / len(choice) for score, choice in zip(scores, document["choices"], strict=True)
        ]
        right += scores.index(max(scores)) == document["answer"]
        right_normalised += normalised.index(max(normalised)) == document["answer"]
    return right / len(documents), right_normalised / len(documents)
