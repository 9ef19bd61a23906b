"""Text, from a name or a file to token ids.

sources.py      one string names a local file, a Hub data set or a built-in text
rows.py         rows of text or conversations, and the kinds of files
shapes.py       a record of any shape (messages, question and answer, text ...) as one or the other
chat.py         conversations as text and token ids, and which of them the assistant wrote
calibration.py  the token ids that blocks are scored on: sampled, recorded, in files
options.py      what a user can choose
"""
