"""Remove the attention or the MLP of single blocks, as plain checkpoints.

    structure.py   which projections bring attention and MLP back into the stream; a live model
                   without some of them
    measuring.py   how much each sublayer matters: perplexity without it, or what it does to the
                   stream
    options.py     how much goes, and by which criterion
    record.py      sublayers.json, beside the checkpoint
    stage.py       from a checkpoint to one without sublayers
    writing.py     zeroed projections on disk
    api.py         the stage as a function of names

A sublayer whose output projection is zero adds nothing to the stream, so that a plain checkpoint
can carry its removal. It takes the same time and space as before; only where a block loses both is
the block itself removed.

    shortllm drop-sublayers MODEL --criterion sublayer-ppl --remove 4 --out DIR
"""
