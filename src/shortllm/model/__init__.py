"""Models in memory or streamed from files; nothing here depends on the name of a family.

blocks.py         find the list of blocks        structure.py  the model of a config, empty
loading.py        a checkpoint in memory         shapes.py     blocks that differ in width
session.py        the one open model             decoder.py    embed, blocks, head
streamed.py       blocks read from files         hidden_states.py  where hidden states are kept
walk.py           many removals in one pass      backward.py   gradients, block by block
bypass.py         run without some blocks        metrics.py    NLL, KL, cosine
"""
