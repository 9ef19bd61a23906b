"""The methods of quantization and their registry: one decorated function in one file each.

A method gets the options and the layers to quantize, and returns the modifier of llm-compressor
that does it. Method files load llm-compressor only when their function runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from shortllm.errors import ShortLLMError
from shortllm.papers import Paper
from shortllm.registry import RegisteredMethod, Registry, first_line, import_modules

if TYPE_CHECKING:
    from shortllm.quantizing.compressing import Layers
    from shortllm.quantizing.options import QuantizeOptions

    Modifier = Callable[[QuantizeOptions, Layers], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizingMethod(RegisteredMethod):
    """A registered method."""

    scheme: str
    """Bits of weights and activations, e.g. `W4A16`."""
    options: Mapping[str, Any]
    """Options that only this method has, with their defaults."""
    needs_text: bool
    """Whether it looks at calibration text."""
    details: Callable[[Mapping[str, Any]], str]
    """Its options in words, e.g. 'groups of 128'."""


METHODS = Registry[QuantizingMethod]("quantization method", ShortLLMError)

Function = TypeVar("Function", bound="Modifier")


def quantizing_method(
    name: str,
    *,
    label: str,
    scheme: str,
    details: Callable[[Mapping[str, Any]], str],
    paper: Paper | None = None,
    options: Mapping[str, Any] | None = None,
    needs_text: bool = False,
) -> Callable[[Function], Function]:
    """Register the decorated function as `name`; the first line of its docstring is the help.

    Args:
        label: what pages and tables call it.
        scheme: bits of weights and activations, e.g. `W4A16`.
        details: the recorded options in words.
        paper: the paper that defines it.
        options: names of `QuantizeOptions` that only this method has, with their defaults.
        needs_text: whether it looks at calibration text.
    """

    def register(function: Function) -> Function:
        METHODS.add(
            name,
            QuantizingMethod(
                name=name,
                label=label,
                scheme=scheme,
                details=details,
                paper=paper,
                help=first_line(function),
                function=function,
                options=options or {},
                needs_text=needs_text,
            ),
        )
        return function

    return register


import_modules(__name__, __path__)
