"""Models in memory or streamed from files; nothing here depends on the name of a family.

loading.py        a checkpoint in memory         session.py    the one open model
decoder.py        embed, blocks, head            streamed.py   blocks read from files
walk.py           many removals in one pass      backward.py   gradients, block by block
hidden_states.py  where hidden states are kept   bypass.py     run without some blocks
metrics.py        NLL, KL, cosine
"""
