#!/bin/sh
# Scoring on one NVIDIA GPU: see benchmarks/gpu.py, which takes the same arguments.
#
#   sh benchmarks/gpu.sh                               the shape of LLaMA-7B, bfloat16, 20 GB or more
#   sh benchmarks/gpu.sh --shape tiny --device cpu     the same steps on a machine without a GPU
#
# Needs Python with torch (built for the GPU), transformers, numpy, pydantic and psutil; no network,
# no data sets, and no installation of this package: the checkout is what is measured. Another
# interpreter than .venv/bin/python or python3: PYTHON=... sh benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
exec "$PYTHON" benchmarks/gpu.py "$@"
