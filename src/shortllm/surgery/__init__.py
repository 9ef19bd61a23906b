"""A new checkpoint from an existing one.

apply.py        what a checkpoint without some blocks consists of; refuse blocks that would change
companions.py   the files next to the weights, and what they say of blocks
derived.py      check, write, verify, record     verify.py       reload and compare
origin.py       where a checkpoint comes from: steps.py reads what its config.json says of that
export_lint.py  how other programs will run it: export_tables.py has the rules, export_rules.py
                the checks they use
"""
