"""Retraining recovers quality that removing blocks has cost: `shortllm retrain`.

    methods.py    what can be trained: lora, full, distill, last-blocks
    options.py    the options, and retrain.json
    retrain.py    the public function, and how the result is written
    setup.py      everything that is checked and tokenized before a model is loaded:
                  documents.py (rows to token ids), store.py (the ids on disk)
    training.py   the model and the Trainer put together and run:
                  trainable.py (which weights), windows.py (batches, and a teacher's cached
                  predictions), distillation.py (the losses), trainer.py (states on disk, stopping)

Needs the `train` extra. Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
"""Configurations for `accelerate launch`: DDP and FSDP on 8 GPUs."""
