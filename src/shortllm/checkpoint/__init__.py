"""Checkpoints on disk: files, config and structure, without loading weights.

source.py          a local directory or Hub id -> its config and tensor table
hub.py             Hub ids, revisions, the local cache
loaded.py          models in memory, saved when they are opened
config.py          config.json: a decoder's, trusted, and what it says of the blocks
tensors.py         tensor name -> file, dtype, shape, byte range; damage is found before use
structure.py       the model of a config on the meta device, its blocks and what they consist of
rules.py           what happens to each config field when blocks go (tables by field name)
names.py           names of blocks in text: of modules, in lists, in patterns
references.py      what JSON files say of single blocks, found by shape
options.py         what a user allows surgery to do
shorten_config.py  the config of a shorter model, by these rules; blocks that must not go
tokenizer.py       the tokenizer, with corrected special tokens
writer.py          tensors into safetensors shards, straight from the files that hold them
"""
