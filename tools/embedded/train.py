"""Make the embedded model: build the tokenizer, train a small Llama from scratch, measure it.

    python tools/embedded/train.py --out src/shortllm/embedded/model

takes about half an hour on two CPU cores. Pages of the `train` split are packed end to end into
windows. Muon moves the matrices of the blocks, AdamW all else; the learning rate rises quickly,
then falls in a straight line to zero. In the last part of training the windows are twice as long,
so that the whole context is in use. It also writes `training.json`: settings,
versions, the loss curve, and what the saved weights reach on held-out splits.
"""

import argparse
import json
import logging
import platform
import re
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import transformers
from measure import (
    perplexity,
    removal_perplexities,
    task_accuracy,
    token_rows,
    without_blocks,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shortllm.embedded.questions import TASKS, Task
from shortllm.embedded.world import pages, rows

logger = logging.getLogger(__name__)

BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All choices of a training run."""

    seed: int = 7
    steps: int = 3000
    tokens_per_step: int = 2048
    window: int = 256
    """Tokens in one training sequence of packed pages."""
    story_window: int = 64
    """Tokens in one training sequence of the first stage, a single story each."""
    story_share: float = 0.6
    """Share of the steps that see single stories: what an answer rests on is close by there."""
    answer_weight: float = 5.0
    """Weight of the tokens of an answer in the loss: there it shows what was understood."""
    long_share: float = 0.1
    """Share of the steps, at the end, whose windows of packed pages are twice as long."""
    matrix_rate: float = 4e-3
    """Peak learning rate of Muon, for the matrices of the blocks."""
    embedding_rate: float = 1e-2
    norm_rate: float = 5e-4
    """Peak learning rates of AdamW."""
    weight_decay: float = 0.05
    warmup_steps: int = 100
    vocabulary: int = 1024
    width: int = 192
    mlp_width: int = 480
    blocks: int = 12
    heads: int = 6
    key_value_heads: int = 2
    context: int = 512
    log_every: int = 100


def build_tokenizer(vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, lossless on any text, learnt from pages; puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows("train", 4000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.mlp_width,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # faster than the fused kernel at this size on a CPU
    )
    model = LlamaForCausalLM(config)
    initialize(model)
    return model


@torch.no_grad()
def initialize(model: LlamaForCausalLM) -> None:
    """Start from blocks that add nothing to large embeddings, so that each word stays readable.

    With the library's small embeddings the first block drowns the words, and the model takes
    several times as long to find out that answers are copied from the story.
    """
    nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    model.model.norm.weight.fill_(0.02)  # the head is tied: keeps the first logits small
    for block in model.model.layers:
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)


def encode(
    tokenizer: PreTrainedTokenizerFast, text: str, answer_weight: float
) -> list[tuple[int, float]]:
    """BOS, the tokens of a text, EOS, each with its weight in the loss."""
    weights = [1.0] * len(text)
    for answer in re.finditer(r"(?<=\nAnswer:).*", text):
        weights[slice(*answer.span())] = [answer_weight] * len(answer.group())
    encoded = tokenizer(text, return_offsets_mapping=True)
    tokens = [
        (token, weights[end - 1] if end else 1.0)
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return [*tokens, (tokenizer.eos_token_id, 1.0)]


def story_windows(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], settings: Settings
) -> Iterator[list[tuple[int, float]]]:
    """Windows of the first stage: one story each, cut or filled up to `story_window` tokens."""
    length = settings.story_window
    for page in texts:
        for story in page.split("\n\n"):
            tokens = encode(tokenizer, story, settings.answer_weight)[:length]
            yield tokens + [(tokenizer.eos_token_id, 0.0)] * (length - len(tokens))


def page_windows(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], settings: Settings, length: int
) -> Iterator[list[tuple[int, float]]]:
    """Windows of the later stages: pages packed end to end, cut every `length` tokens."""
    stream = chain.from_iterable(encode(tokenizer, page, settings.answer_weight) for page in texts)
    while True:
        yield list(islice(stream, length))


def batches(
    tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> Iterator[tuple[Tensor, Tensor]]:
    """`ids_BT` and their `weights_BT` for each step: single stories, pages, then long windows."""
    texts = pages("train")
    single = story_windows(tokenizer, texts, settings)
    packed = page_windows(tokenizer, texts, settings, settings.window)
    long = page_windows(tokenizer, texts, settings, 2 * settings.window)
    for step in range(settings.steps):
        if step < settings.steps * settings.story_share:
            windows, length = single, settings.story_window
        elif step < settings.steps * (1 - settings.long_share):
            windows, length = packed, settings.window
        else:
            windows, length = long, 2 * settings.window
        batch = torch.tensor(list(islice(windows, settings.tokens_per_step // length)))
        yield batch[..., 0].long(), batch[..., 1]


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Share of the peak learning rate: up in `warmup_steps`, then straight down to zero."""
    rise = (step + 1) / settings.warmup_steps
    fall = (settings.steps - step) / (settings.steps - settings.warmup_steps)
    return min(rise, fall)


def build_optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    muon = torch.optim.Muon(
        matrices,
        lr=settings.matrix_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [model.model.embed_tokens.weight], "lr": settings.embedding_rate},
            {"params": norms, "lr": settings.norm_rate},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [muon, adamw]


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, out: Path
) -> list[dict[str, float]]:
    """Train in place; saves the model at every point of the loss curve, which is returned."""
    optimizers = build_optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, settings)
        )
        for optimizer in optimizers
    ]
    validation = token_rows(tokenizer, "validation", count=32, length=settings.window)
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    started = time.perf_counter()
    for step, (ids_BT, weights_BT) in enumerate(batches(tokenizer, settings), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        loss_N = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none"
        )
        weights_N = weights_BT[:, 1:].flatten()
        torch.autograd.backward((loss_N * weights_N).sum() / weights_N.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss_N[weights_N > 0].mean().item())
        if step % settings.log_every == 0 or step == settings.steps:
            point = {
                "step": step,
                "tokens": step * settings.tokens_per_step,
                "train_loss": sum(losses) / len(losses),
                "validation_perplexity": perplexity(model, validation),
                "seconds": time.perf_counter() - started,
            }
            losses.clear()
            curve.append(point)
            logger.info(" ".join(f"{name} {value:.4g}" for name, value in point.items()))
            save(model, tokenizer, out)
    return curve


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a bfloat16 copy of the model, and the tokenizer."""
    deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(out: Path) -> dict[str, Any]:
    """What the saved weights reach in float32: on calibration windows, test rows and the tasks."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    calibration = token_rows(tokenizer, "calibration", count=10, length=128)
    test = token_rows(tokenizer, "test", count=100, length=256)
    on_calibration = measure_removal(model, calibration)
    return {
        "calibration": on_calibration,
        "test": measure_removal(model, test),
        "quarter_removed": measure_quarter(model, on_calibration["perplexity_without_block"], test),
        "tasks": {task.name: measure_task(model, tokenizer, task) for task in TASKS},
    }


def measure_removal(model: LlamaForCausalLM, sequences: list[list[int]]) -> dict[str, Any]:
    """Perplexity on these sequences, intact and without each single block."""
    intact = perplexity(model, sequences)
    removed = removal_perplexities(model, sequences)
    return {
        "sequences": len(sequences),
        "tokens": sum(len(ids) - 1 for ids in sequences),
        "perplexity": intact,
        "perplexity_without_block": removed,
        "relative_increase_without_block": [value / intact - 1 for value in removed],
    }


def measure_quarter(
    model: LlamaForCausalLM, importance: list[float], sequences: list[list[int]]
) -> dict[str, Any]:
    """Perplexity without a quarter of the blocks: the least and most important ones, and at random.

    The first quarter and the last two blocks stay; the random choices are 20 seeded ones.
    """
    count = len(importance) // 4
    free = sorted(range(count, len(importance) - 2), key=lambda block: importance[block])
    random = Random(0)
    at_random = [sorted(random.sample(free, count)) for _ in range(20)]

    def without(removed: list[int]) -> float:
        with without_blocks(model, removed):
            return perplexity(model, sequences)

    values = [without(removed) for removed in at_random]
    return {
        "least_important": sorted(free[:count]),
        "perplexity_without_least_important": without(free[:count]),
        "perplexity_without_most_important": without(free[-count:]),
        "random": at_random,
        "perplexity_without_random": values,
        "mean_perplexity_without_random": sum(values) / len(values),
    }


def measure_task(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task
) -> dict[str, float]:
    """Accuracy on all questions of a task set, with its chance level."""
    acc, acc_norm = task_accuracy(model, tokenizer, task.documents())
    return {
        "questions": len(task.documents()),
        "chance": task.chance,
        "acc": acc,
        "acc_norm": acc_norm,
    }


def main() -> None:
    """Train the embedded model, or measure it again."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new model")
    parser.add_argument("--steps", type=int, default=Settings().steps, help="training steps")
    parser.add_argument(
        "--measure", action="store_true", help="do not train: measure the model in --out again"
    )
    parser.add_argument("--seed", type=int, default=Settings().seed, help="seed of the weights")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    record_file = arguments.out / "training.json"
    if arguments.measure:
        record = json.loads(record_file.read_text())
        record.update(measure(arguments.out))
        record["curve"] = record.pop("curve")  # stays last
        record_file.write_text(json.dumps(record, indent=1) + "\n")
        return
    settings = Settings(steps=arguments.steps, seed=arguments.seed)
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer(settings.vocabulary, settings.context)
    model = build_model(settings, tokenizer)
    curve = train(model, tokenizer, settings, arguments.out)
    record = {
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        "tokens": settings.steps * settings.tokens_per_step,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        **measure(arguments.out),
        "curve": curve,
    }
    record_file.write_text(json.dumps(record, indent=1) + "\n")
    logger.info(json.dumps({"perplexity": record["test"]["perplexity"], **record["tasks"]}))


if __name__ == "__main__":
    main()
