"""Retraining against the plain way: packed against padded windows, a LoRA step against a script.

Packing: the same rows of text in the same order, packed end to end, or each alone in a window and
padded to the longest of its batch, by the same Trainer. Tokens are those of the text, not padding.
Step: LoRA on the same padded batches, by shortllm, and by a script that has nothing but peft's
adapters, transformers' Trainer and the model's own loss. Each run is a process of its own, and the
two sides alternate.

    python benchmarks/retraining.py
    python benchmarks/retraining.py --data alpaca.jsonl --rounds 5 --out retraining.json

The last line printed is JSON: tokens per second of both packings and their ratio; seconds per step
of both scripts and their ratio (median of the rounds).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH = 256, 8


class Clock:
    """Notes when each step ends; the first ones warm up."""

    def __init__(self, skip: int = 3) -> None:
        from transformers import TrainerCallback

        clock = self
        self.ends: list[float] = []
        self.skip = skip

        class Note(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.ends.append(time.perf_counter())

        self.callback = Note()

    @property
    def step_seconds(self) -> float:
        """Median seconds of a step."""
        ends = self.ends[self.skip :]
        return statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))

    @property
    def seconds(self) -> float:
        """All steps but the first ones."""
        return self.ends[-1] - self.ends[self.skip]


def windows(data: str, packing: str, place: Path) -> Any:
    """The data as windows."""
    from shortllm.checkpoint.source import open_checkpoint
    from shortllm.checkpoint.tokenizer import load_tokenizer
    from shortllm.data.sources import open_records
    from shortllm.retraining.corpus import documents, kind_of, open_corpus, write_corpus
    from shortllm.retraining.options import RetrainOptions
    from shortllm.retraining.windows import Windows

    records = open_records(data)
    found = documents(
        records, kind_of(records, "auto"), load_tokenizer(open_checkpoint("embedded")),
        RetrainOptions(rows=400),
    )  # fmt: skip
    longest = None if packing == "stream" else LENGTH
    write_corpus(
        found, place / packing, source=data, vocabulary=1024, held_out=1, longest=longest,
        enough=None,
    )  # fmt: skip
    store = open_corpus(place / packing).train
    return Windows(store, length=LENGTH, packing=packing, apart=packing != "alone")


def settings(place: Path, steps: int) -> Any:
    """Trainer's arguments, the same for all."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(place / "out"), per_device_train_batch_size=BATCH, max_steps=steps,
        learning_rate=1e-4, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
        remove_unused_columns=False, label_names=["labels"], logging_steps=1000,
        train_sampling_strategy="sequential", dataloader_pin_memory=False,
    )  # fmt: skip


def adapters(model: Any) -> Any:
    """peft's adapters on all projections, by their names in a Llama."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=names)
    )


def model_of(seed: int = 0) -> Any:
    """The embedded model."""
    import torch
    from transformers import AutoModelForCausalLM

    from shortllm.embedded import MODEL_DIR

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def ours(data: Any, model: Any, place: Path, steps: int) -> Clock:
    """Training by shortllm's Trainer and loss."""
    from torch.utils.data import Subset

    from shortllm.retraining.distillation import answer_loss
    from shortllm.retraining.trainer import HELD_OUT, ObjectiveTrainer
    from shortllm.retraining.windows import collate

    clock = Clock()
    trainer = ObjectiveTrainer(
        model=model, args=settings(place, steps), train_dataset=data, data_collator=collate,
        eval_dataset={HELD_OUT: Subset(data, [0])},  # measured after the last step
        objective=answer_loss, max_minutes=None, patience=None,
    )  # fmt: skip
    trainer.add_callback(clock.callback)
    trainer.train()
    return clock


def bare(data: Any, model: Any, place: Path, steps: int) -> Clock:
    """Training by peft and Trainer alone, the labels' loss being the model's own."""
    from transformers import PrinterCallback, Trainer

    from shortllm.retraining.windows import collate

    def plain(items: Any) -> Any:
        batch = collate(items)
        return {name: batch[name] for name in ("input_ids", "labels")}

    clock = Clock()
    trainer = Trainer(
        model=model, args=settings(place, steps), train_dataset=data, data_collator=plain,
        callbacks=[clock.callback],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock


def worker(side: str, data: str, steps: int) -> None:
    """One measurement; prints one line of JSON."""
    with tempfile.TemporaryDirectory(prefix="shortllm-retraining-") as name:
        place = Path(name)
        if side in ("stream", "alone"):
            found = windows(data, side, place)
            clock = ours(found, model_of(), place, steps)
            seen = sum(found.lengths[(clock.skip + 1) * BATCH : steps * BATCH])
            result = {"tokens_per_s": float(seen) / clock.seconds}
        else:
            found = windows(data, "alone", place)
            run = ours if side == "ours" else bare
            clock = run(found, adapters(model_of()), place, steps)
            result = {"step_s": clock.step_seconds}
    print(json.dumps(result))


def measure(side: str, arguments: argparse.Namespace) -> float:
    """Run one worker process."""
    command = [sys.executable, __file__, "--worker", side, "--data", arguments.data]
    command += ["--steps", str(arguments.steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    [value] = json.loads(done.stdout.splitlines()[-1]).values()
    return float(value)


def compare(one: str, other: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Both sides in turn; the medians, and the median of the rounds' ratios."""
    values: dict[str, list[float]] = {one: [], other: []}
    for number in range(arguments.rounds):
        for side in (one, other) if number % 2 == 0 else (other, one):
            values[side].append(measure(side, arguments))
    ratios = [a / b for a, b in zip(values[one], values[other], strict=True)]
    medians = {side: round(statistics.median(found), 4) for side, found in values.items()}
    return medians, round(statistics.median(ratios), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="embedded", help="a data source")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--worker", choices=["stream", "alone", "ours", "bare"],
                        help=argparse.SUPPRESS)  # fmt: skip
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.data, arguments.steps)
        return
    result: dict[str, Any] = {"data": arguments.data, "cores": len(os.sched_getaffinity(0))}
    rates, ratio = compare("stream", "alone", arguments)
    result["packing"] = {"tokens_per_s": rates, "ratio": ratio}
    print(f"packed {rates['stream']:.0f}, padded {rates['alone']:.0f} tokens/s, ratio {ratio}")
    steps, ratio = compare("ours", "bare", arguments)
    result["lora_step"] = {"seconds": steps, "ratio": ratio}
    print(f"LoRA step {steps['ours']:.3f} s, plain script {steps['bare']:.3f} s, ratio {ratio}")
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
