"""A new checkpoint from an existing one.

apply.py        what a checkpoint without some blocks consists of; refuse blocks that would change
derived.py      check, write, verify, record     verify.py       reload and compare
export_lint.py  llama.cpp and vLLM
"""
