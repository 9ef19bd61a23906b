"""Text, from a name or a file to token ids.

sources.py      one string names a local file, a Hub data set or a built-in text
rows.py         rows of text, and the kinds of files
texts.py        rows cut into windows of token ids, to calibrate and to evaluate
calibration.py  the token ids that blocks are scored on: their record and files
options.py      what a user can choose
"""
