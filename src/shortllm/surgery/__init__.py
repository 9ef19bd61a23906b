"""A new checkpoint from an existing one.

apply.py        remove blocks from the files     guard.py        refuse blocks that would change
derived.py      check, write, verify, record     verify.py       reload and compare
export_lint.py  llama.cpp and vLLM
"""
