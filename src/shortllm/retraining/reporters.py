"""Where the Trainer reports, by transformers' names: tensorboard, wandb, ..."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from shortllm.errors import ShortLLMError, did_you_mean

PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}
"""Packages of reporters with another name."""

_CALLBACK = re.compile(r'^    "(\w+)": \w+Callback,$', re.MULTILINE)


def check_reporters(names: Sequence[str]) -> None:
    """Refuse names that the installed transformers does not know; does not load it.

    Raises:
        ShortLLMError: an unknown name, or `none` or `all` next to others.
    """
    transformers = find_spec("transformers") if names else None
    if transformers is None or transformers.origin is None:
        return
    source = Path(transformers.origin).parent / "integrations" / "integration_utils.py"
    known = _CALLBACK.findall(source.read_text(encoding="utf-8")) if source.is_file() else []
    for name in names:
        if name in ("none", "all"):
            if len(names) > 1:
                raise ShortLLMError(f"--report-to {name} stands alone. Leave the others out")
        elif known and name not in known:
            reporters = ["none", "all", *known]
            raise ShortLLMError(f"--report-to {name}: unknown.{did_you_mean(name, reporters)}")


def require_reporters(names: Sequence[str]) -> None:
    """Refuse reporters that are unknown or not installed."""
    check_reporters(names)
    from transformers.integrations import get_available_reporting_integrations

    for name in names:
        if name not in ("none", "all", *get_available_reporting_integrations()):
            package = PACKAGES.get(name, name)
            raise ShortLLMError(
                f"--report-to {name} needs {package}. Install it with: pip install {package}"
            )
