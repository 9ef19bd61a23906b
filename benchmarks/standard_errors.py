"""The standard errors of scores against their spread over calibrations with other seeds.

    python benchmarks/standard_errors.py MODEL --data c4 --samples 32 --seeds 10

For each block: the root mean square of its standard error over the seeds, and the standard
deviation of its score over them. The last line is JSON, with the median ratio of the two.
"""

from __future__ import annotations

import argparse
import json
import platform
from statistics import fmean, median, stdev

import shortllm


def main() -> None:
    """Score with each seed and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--criterion", default="ppl,kl,influence,angular")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--dtype", default="auto")
    asked = parser.parse_args()
    names = asked.criterion.split(",")
    runs = [
        shortllm.score(
            asked.model, criterion=names, data=asked.data, samples=asked.samples,
            length=asked.length, seed=seed, dtype=asked.dtype,
        )
        for seed in range(asked.seeds)
    ]  # fmt: skip
    ratios = {}
    for name in names:
        found = [run[name] for run in runs]
        ratios[name] = []
        print(f"{name}: block, mean score, spread over seeds, standard error")
        for b in range(found[0].model.blocks):
            spread = stdev(one.importance[b] for one in found)
            error = fmean(one.stderr[b] ** 2 for one in found) ** 0.5
            ratios[name].append(error / spread)
            mean = fmean(one.importance[b] for one in found)
            print(f"{b:3} {mean:12.5g} {spread:10.3g} {error:10.3g}")
    print(
        json.dumps(
            {
                "model": found[0].model.id,
                "data": asked.data,
                "samples": asked.samples,
                "seeds": asked.seeds,
                "machine": platform.processor() or platform.machine(),
                "ratio": {
                    name: {"median": median(own), "lowest": min(own), "highest": max(own)}
                    for name, own in ratios.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
