"""What the fuzzer damages, and what must then be true.

A kind is a function that lays one damaged input into the bench and returns what is to be done with
it. That either raises a ShortLLMError, or ends after checking that its result is right: by another
reader of the same file, by what the undamaged input gives, or by the file's own sums.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fuzz_bench import Act, Bench
from fuzz_checkpoints import configs, headers, indexes, pickles
from fuzz_recipes import recipes
from fuzz_results import (
    calibrations,
    journals,
    plans,
    reports,
    result_files,
    surgeries,
    texts,
    tokenizers,
)

KINDS: dict[str, tuple[Callable[[Random, Bench], Act], float]] = {
    "headers": (headers, 4),
    "indexes": (indexes, 3),
    "pickles": (pickles, 1),
    "configs": (configs, 3),
    "recipes": (recipes, 4),
    "result files": (result_files, 5),
    "plans": (plans, 2),
    "surgeries": (surgeries, 1),
    "reports": (reports, 1),
    "calibrations": (calibrations, 1),
    "texts": (texts, 1),
    "journals": (journals, 0.5),
    "tokenizers": (tokenizers, 0.5),
}
"""Name -> the kind, and its share of the inputs."""
