"""Quantization after shortening: `quantize`, the last stage before a model is measured.

    options.py      every choice: gptq (4-bit weights), int8 (8-bit weights, 8-bit activations)
    packages.py     is llm-compressor there, and does it admit what is installed?
    layers.py       which linear layers are quantized, and which group sizes fit them
    compressing.py  llm-compressor's part: a model in memory is quantized
    writing.py      the result as a checkpoint that plain transformers loads
    stage.py        all of it, tried out before the checkpoint gets its name
    running.py      the same as a stage of `run`: which model, which text
    record.py       quantize.json

    shortllm quantize CHECKPOINT --method gptq --data c4 --out DIR

Needs the `quantize` extra. Importing this package loads neither torch nor llm-compressor.
"""
