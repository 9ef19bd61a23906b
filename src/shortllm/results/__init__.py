"""What the stages hand to each other: one frozen, validated record per result file.

    scores.py      calibration.json  scores.json    plan.py      plan.json  target.json
    evaluation.py  eval.json                        benchmark.py bench.json
    comparison.py  comparison.json                  units.py     units.json
    record.py      what all of them are

What is written beside a checkpoint has its record in the package that makes it, as record.py.

Every record knows how to `save` itself (complete or not at all) and `load` itself (an unknown key
is refused with a suggestion). `fingerprint` is the sha256 of everything that made the record, so
that a stage can tell its own finished work from that of other inputs. Block numbers count from 0 in
the *original* model, in every file. A number that could not be measured is `null`, never 0.
"""
