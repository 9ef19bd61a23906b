"""Width pruning, for comparison with depth pruning: heads and neurons go, all blocks stay.

    options.py     every choice: llm-pruner, wanda-sp, flap
    structure.py   heads and neurons found by experiment: which rows and columns belong together
    groups.py      what was found; a model with some of them silenced
    methods.py     what each method looks at       scores.py measuring.py choosing.py
    shaping.py     the config of the narrower checkpoint, plain or with a shape per block
    writing.py     kept rows and columns copied, tensor by tensor
    stage.py       all of it, checked by comparison before the checkpoint gets its name
    record.py      width.json

Checkpoints with a shape per block are opened by every command and by `shortllm.load`
(checkpoint/shapes.py, model/shapes.py).
"""
