"""The section that sets what was measured beside what was published."""

from __future__ import annotations

from typing import Any

from shortllm.published import beside, compared_blocks
from shortllm.reporting.loading import RunResults
from shortllm.reporting.wording import change, number


def published_section(results: RunResults) -> dict[str, Any] | None:
    """A row per number that was published and measured by one protocol.

    None where the recipe holds nothing published.
    """
    if not results.run.recipe.get("published"):
        return None
    from shortllm.recipe import Recipe

    recipe = Recipe.model_validate(results.run.recipe)
    assert recipe.published is not None
    published, rows = recipe.published, []
    if results.evaluation is not None:
        rows = beside(published, results.evaluation, recipe.evaluation)
    return {
        "source": published.source,
        "checkpoint": published.checkpoint,
        "blocks": compared_blocks(published, results.plan.removed) if published.removed else None,
        "rows": [
            {
                "model": row.model,
                "quantity": row.quantity,
                "ours": _shown(row.ours),
                "published": _shown(row.published),
                "change": change(row.published, row.ours),
            }
            for row in rows
        ],
    }


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e6 else number(value, 5)
