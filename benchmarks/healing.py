"""What each way of retraining brings back: the embedded model with a quarter and a half removed.

Blocks go by `ppl`. Every method gets the same windows of the embedded training text, the same
number of steps and the learning rate that suits it; perplexity is that of the embedded test text,
accuracy the mean over the five task sets. Nothing here is tuned to the tasks.

    python benchmarks/healing.py                     # about five minutes on two cores
    python benchmarks/healing.py --steps 300 --questions 600 --out healing.json

The last line printed is JSON: for each removal and model perplexity, accuracy and seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

RATES = {"lora": 3e-3, "full": 1e-3, "distill": 1e-3}
"""Method -> learning rate: the best of 3e-4, 1e-3, 3e-3 by held-out loss."""


def measure(model: str, questions: int) -> dict[str, float]:
    """Perplexity of the test text, and mean accuracy over the task sets."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shortllm.checkpoint import open_checkpoint
    from shortllm.embedded import measure, tasks

    directory = open_checkpoint(model).directory
    tokenizer = AutoTokenizer.from_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = measure.token_rows(tokenizer, "test", count=128, length=512)
    right = [
        measure.task_accuracy(loaded, tokenizer, task.documents()[:questions])[0]
        for task in tasks()
    ]
    return {
        "perplexity": round(measure.perplexity(loaded, rows), 4),
        "accuracy": round(sum(right) / len(right), 4),
    }


def heal(model: Path, method: str, steps: int, out: Path) -> dict[str, Any]:
    """Retrain by one method and measure how long it took."""
    import shortllm

    record = shortllm.retrain(
        str(model),
        out,
        options=shortllm.RetrainOptions(
            method=method,
            data="embedded",
            length=256,
            batch=8,
            max_steps=steps,
            learning_rate=RATES[method],
            schedule="cosine",
            weight_decay=0.0,
            held_out=20,
            report_to=[],
        ),
    )
    assert record.cost is not None
    return {"seconds": round(record.cost.seconds, 1), "tokens": record.tokens_seen}


def study(scores: Any, removed: int, steps: int, questions: int, place: Path) -> dict[str, Any]:
    """One removal: the shortened model, and what each method makes of it."""
    import shortllm

    plan = shortllm.plan(scores, shortllm.Budget(remove=removed))
    short = shortllm.prune("embedded", plan, place / f"without-{removed}")
    found: dict[str, Any] = {"removed": plan.removed, "shortened": measure(str(short), questions)}
    show(f"{removed} removed", found["shortened"])
    for method in RATES:
        out = place / f"{removed}-{method}"
        found[method] = {**heal(short, method, steps, out), **measure(str(out), questions)}
        show(f"  {method}", found[method])
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """One line of the table."""
    line = f"{name:12} perplexity {found['perplexity']:8.4f}  accuracy {found['accuracy']:.1%}"
    print(line + (f"  {found['seconds']:6.1f} s" if "seconds" in found else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remove", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=120, help="of each task set")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()

    import shortllm

    result: dict[str, Any] = {"steps": arguments.steps, "rates": RATES}
    result["intact"] = measure("embedded", arguments.questions)
    show("intact", result["intact"])
    scores = shortllm.score("embedded")
    with tempfile.TemporaryDirectory(prefix="shortllm-healing-") as place:
        for removed in arguments.remove:
            result[f"without {removed}"] = study(
                scores, removed, arguments.steps, arguments.questions, Path(place)
            )
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
