"""Retraining recovers quality that removing blocks has cost: `shortllm retrain`.

    methods.py    which weights are trained: lora, full, distill, last-blocks
    options.py    the options, and retrain.json
    retrain.py    the public function, and how the result is written
    setup.py      everything that is checked and tokenized before a model is loaded, with corpus.py
                  (rows to token ids on disk)
    training.py   the model and the Trainer put together and run, with windows.py (batches),
                  distillation.py (the losses, and a teacher's cached predictions) and trainer.py
                  (states on disk, stopping)

Needs the `train` extra. Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
"""Configurations for `accelerate launch`: DDP and FSDP on 8 GPUs."""
