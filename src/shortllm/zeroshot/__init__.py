"""Zero-shot tasks: what a model can still answer, measured by lm-evaluation-harness.

    boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa     --tasks paper
    shortllm_where shortllm_who shortllm_count shortllm_compare ...       --tasks embedded

and any other task, group or tag of the harness by its name. Prompts, metrics and standard errors
are the harness's own, and so is the code around our loaded model; of the seven the metric is
reported that Shortened LLaMA reports. Documents are looked up in the directory given, else in the
one named by SHORTLLM_DATA, else on the Hub: of each task the split that the harness measures, with
the columns of the Hub's data set, as `.jsonl` or `.json`, plain, `.gz` or `.xz`

    DIR/boolq/validation.jsonl   DIR/arc/ARC-Easy/test.jsonl.gz   DIR/<task>/<split>.jsonl

    shortllm eval MODEL --tasks paper --task-data DIR --limit 100

    tasks.py      tasks by name, with their documents
    measuring.py  the tasks put to a model
    scores.py     which scores have a mean, how they are written, and zeroshot.csv
"""
