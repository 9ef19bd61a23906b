"""Text by name: a *data source* is one string, and `load_rows` turns it into rows of text.

    stories.jsonl.gz                  a local file; `stories.jsonl.gz#summary` picks a column
    wikitext:wikitext-2-raw-v1:test   a Hub data set: name[:config[:split]], also with `#column`
    wikitext2   ptb:test   embedded   a built-in name, with a split where the default is not meant

Local files are `.txt`, `.text`, `.raw`, `.tokens` (a row is a line without its line end), `.jsonl`,
`.json` and `.parquet` (a row is one record's text), each plain or packed as `.gz` or `.xz`. A
built-in name is looked up first below the directory named by SHORTLLM_DATA, then on the Hub; the
default split depends on what the rows are for:

    name        to calibrate  to evaluate  other splits       below SHORTLLM_DATA
    wikitext2   train         test         validation         wikitext2/wiki.{train,valid,test}.raw
    ptb         train         validation   test               ptb/ptb.{train,valid,test}.txt
    bookcorpus  train         train                           bookcorpus.txt, bookcorpus/*
    c4          train         validation                      c4/train*, c4/{validation,heldout}*
    alpaca      train         train        (the answers)      alpaca/train.jsonl, alpaca/*.json
    embedded    calibration   test         train, validation  (made by this package)

WikiText-2, PTB and BookCorpus give the same rows from either place; of C4 and Alpaca a local copy
may hold other documents. Rows stay packed or on disk until they are read, so the 74 million rows of
BookCorpus never become a Python list.

    sources.py    the string taken apart       built_ins.py  the table of names
    rows.py       what rows are                local.py      files and their kinds
    records.py    whole records, for training  hub.py        data sets through `datasets`
"""
