"""Checkpoints on disk: read the tensor table, shorten without building the model, verify.

source.py      a local directory or Hub id -> directory with config and tensors
tensors.py     tensor name -> shard, dtype, shape, byte range; every damage found before use
names.py       the block number inside a tensor name
rules.py       what happens to each config field when blocks go (data, by field name)
shortening.py  the config of what is left, by these rules; what must not go
signature.py   the guard: kept blocks of the shortened model are built like their originals
surgery.py     plan -> shortened checkpoint, tensor by tensor
writer.py      tensors into safetensors shards, straight from the files that hold them
export_lint.py whether other programs will represent it rightly
verify.py      reload what was written and compare with the original, blocks bypassed
"""

from shortllm.checkpoint.source import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
