"""The methods of quantization and their registry: one decorated function in one file each.

A method gets the options and the layers to quantize, and returns the modifier of llm-compressor
that does it. Method files load llm-compressor only when their function runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shortllm.errors import ShortLLMError
from shortllm.registry import MethodRegistry, RegisteredMethod, import_modules


@dataclass(frozen=True, kw_only=True)
class QuantizingMethod(RegisteredMethod):
    """A registered method."""

    scheme: str
    """Bits of weights and activations, e.g. `W4A16`."""
    needs_text: bool = False
    """Whether it looks at calibration text."""
    details: Callable[[Mapping[str, Any]], str]
    """Its options in words, e.g. 'groups of 128'."""


METHODS = MethodRegistry[QuantizingMethod]("quantization method", ShortLLMError)

import_modules(__name__, __path__)
