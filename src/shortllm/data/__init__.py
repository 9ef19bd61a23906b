"""Text, from a name or a file to token ids.

sources.py      one string names a local file, a Hub data set or a built-in text
rows.py         rows of text, and the kinds of files
calibration.py  the token ids that blocks are scored on: sampled, recorded, in files
options.py      what a user can choose
"""
