"""Live models: their blocks found by structure, and walks over them.

    loading.py    a checkpoint in memory          blocks.py    its blocks, by structure
    calls.py      how a block is called           decoder.py   entry, blocks, tail
    streamed.py   blocks read from files          streams.py   where hidden streams are kept
    walk.py       many shortened models at once   backward.py  gradients, block by block
    bypass.py     a model without some blocks     shapes.py    blocks that differ in width

Nothing here goes by the name of a family. Importing this package alone loads neither torch nor
transformers.
"""
