#!/bin/sh
# One NVIDIA GPU: scoring (benchmarks/gpu.py), or with `speed` first generating text
# (benchmarks/gpu_speed.py); each takes the same arguments.
#
#   sh benchmarks/gpu.sh                               the shape of LLaMA-7B, bfloat16, 20 GB or more
#   sh benchmarks/gpu.sh --shape tiny --device cpu     the same steps on a machine without a GPU
#   sh benchmarks/gpu.sh speed                         32, 26 and 21 blocks, 80 GB
#   sh benchmarks/gpu.sh speed --tiny                  the same steps on a machine without a GPU
#
# Needs Python with torch (built for the GPU), transformers, numpy, pydantic and psutil, and for
# speed nvidia-ml-py, matplotlib and jinja2; no network, no data sets, and no installation of this
# package: the checkout is what is measured. Another
# interpreter than .venv/bin/python or python3: PYTHON=... sh benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
if [ "${1:-}" = speed ]; then
    shift
    exec "$PYTHON" benchmarks/gpu_speed.py "$@"
fi
exec "$PYTHON" benchmarks/gpu.py "$@"
