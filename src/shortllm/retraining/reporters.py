"""Where the Trainer reports, by transformers' names: tensorboard, wandb, ..."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from shortllm.errors import ShortLLMError, did_you_mean

PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}
"""Packages of reporters with another name."""

_CALLBACK = re.compile(r'^    "(\w+)": \w+Callback,$', re.MULTILINE)


def check_reporters(names: Sequence[str], known: Collection[str] | None = None) -> None:
    """Refuse names that transformers does not know.

    Args:
        known: the names that it knows; default: those written in its source, without loading it.
    Raises:
        ShortLLMError: an unknown name, or `none` or `all` next to others.
    """
    if known is None:
        known = _written() if names else ()
    for name in names:
        if name in ("none", "all"):
            if len(names) > 1:
                raise ShortLLMError(f"--report-to {name} stands alone. Leave the others out")
        elif known and name not in known:
            reporters = ["none", "all", *known]
            raise ShortLLMError(f"--report-to {name}: unknown.{did_you_mean(name, reporters)}")


def _written() -> list[str]:
    """The names in the source of transformers; empty where there are none to be found."""
    transformers = find_spec("transformers")
    if transformers is None or transformers.origin is None:
        return []
    source = Path(transformers.origin).parent / "integrations" / "integration_utils.py"
    return _CALLBACK.findall(source.read_text(encoding="utf-8")) if source.is_file() else []


def require_reporters(names: Sequence[str]) -> None:
    """Refuse reporters that are unknown or not installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    check_reporters(names, INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in ("none", "all", *get_available_reporting_integrations()):
            package = PACKAGES.get(name, name)
            raise ShortLLMError(
                f"--report-to {name} needs {package}. Install it with: pip install {package}"
            )
