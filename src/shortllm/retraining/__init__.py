"""Retraining heals what removing blocks has cost: `retrain`, the stage after `prune`.

    options.py     every choice, and the defaults of each method
    record.py      retrain.json
    preparing.py   what can be got wrong is checked, the data tokenized     documents.py store.py
    training.py    model, windows and Trainer put together and run          windows.py trainer.py
                     which weights: trainable.py     which loss: objective.py distill.py cache.py
    writing.py     adapters merged, a plain checkpoint written and read back

    shortllm retrain pruned --method lora --data alpaca --out healed
    accelerate launch --config_file CONFIG -m shortllm retrain pruned --method full ...

Needs the `train` extra. Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
"""Configurations for `accelerate launch`: FSDP on 8 GPUs."""

RECORD = "retrain.json"
"""File in a retrained checkpoint that says how it was made."""
