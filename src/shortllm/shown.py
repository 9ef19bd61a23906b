"""How results show themselves to Python: one line, a table and a plot in notebooks, a data frame.

    class BlockScores(Shown, ResultFile):
        def __str__(self): ...              'embedded: 12 blocks by ppl, ...', also in the repr
        def to_dataframe(self): ...         data_frame([...])

Tables and plots are those of the reports; `reporting.views` says which ones a kind of result has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from shortllm.errors import ShortLLMError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


class Shown:
    """A result that is one line as text, and a table with plots in a notebook."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def _repr_html_(self) -> str:
        return str(_views().html(self))

    def plot(self, name: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw the result with matplotlib, as reports do.

        Args:
            name: which plot, where there are several. Default: the first one.
            ax: axes to draw into. Default: those of a new figure.
        Returns:
            The axes; `.figure.savefig("plot.svg")` writes a file.
        Raises:
            ShortLLMError: no such plot, or nothing to plot.
        """
        axes: Axes = _views().plotted(self, name, ax)
        return axes


def _views() -> Any:
    # by name: results are below what users see, and import nothing of it
    return import_module("shortllm.reporting.views")


def data_frame(rows: Iterable[Mapping[str, Any]], whole: Iterable[str] = ()) -> DataFrame:
    """Rows as a pandas data frame; the columns `whole` have whole numbers or nothing."""
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise ShortLLMError("to_dataframe needs pandas. Install it with: pip install pandas") from (
            error
        )
    return DataFrame(rows).astype(dict.fromkeys(whole, "Int64"))
