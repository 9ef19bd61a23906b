"""Which criterion to trust for this model: what each one removes, measured side by side.

    scores by each criterion ─► a plan per budget ─┐
    seeded random draws ───────────────────────────┴─► one walk over all removed sets ─► Comparison

Removed sets that begin alike share their block passes, and equal ones are measured once. The text
measured on is kept apart from the text scored on, as in a run.

    shortllm compare-criteria MODEL --data stories.jsonl --out runs/compare

    question.py  which criteria, at which budgets, on which text
    stage.py     scores, plans and draws measured together
    api.py       comparisons as functions: of criteria, of width against depth, of runs
"""
