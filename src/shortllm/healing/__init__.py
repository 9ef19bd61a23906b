"""Healing without training: what a removal took is put back into weights that are there already.

    options.py     every choice: linear, merge
    gaps.py        where blocks went, and the block before each gap
    projections.py the projection whose output is added to the stream, found by experiment
    solving.py     sums over tokens, the least-squares map, how strongly it is held back
    linear.py      the walk that gathers the sums, gap after gap
    folding.py     a map folded into a projection, in memory and for the file
    merging.py     blocks folded into one another (LaCo), from the top down
    writing.py     all other tensors copied, what is new beside them
    stage.py merge_stage.py   each of the two, checked by comparison before it gets its name
    running.py     healing as a stage of a run
    record.py      heal.json, merge.json

Both give plain checkpoints without a new parameter.
"""
