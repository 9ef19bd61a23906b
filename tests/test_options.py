"""Options are declared once: a field is a flag, a keyword, a recipe key and a row in docs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

import shortllm
from shortllm.calls import accepts
from shortllm.cli.flags import flags
from shortllm.errors import ShortLLMError
from shortllm.options import (
    Flag,
    Nested,
    Options,
    option_fields,
    options_from,
    overlaid,
    table_rows,
)
from shortllm.runtime import Runtime, is_trusted


class Inner(Options):
    panel: ClassVar[str] = "Text"
    data: str | None = Field(default=None, description="Which text.")
    samples: int = Field(default=3, ge=1, description="How many samples.")


class Outer(Options):
    panel: ClassVar[str] = "Fitting"
    ridge: float = Field(default=0.5, gt=0, description="Ridge strength.")
    layers: Annotated[list[int], Flag(metavar="1,2")] = Field(
        default_factory=list, description="Which layers."
    )
    fast: bool = Field(default=False, description="Be quick.")
    inner: Inner = Inner()
    other: Annotated[Inner, Nested(rename={"data": "other_data", "samples": "other_samples"})] = (
        Inner()
    )


@accepts(options=Outer, runtime=Runtime)
def fit(model: str, *, options: Outer, runtime: Runtime) -> tuple[str, Outer, Runtime, bool]:
    return model, options, runtime, is_trusted()


def application(record: type[Options], seen: list[Any]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @flags(options=record)
    def command(options: Any) -> None:
        seen.append(options)

    return app


def run(record: type[Options], *arguments: str) -> Any:
    seen: list[Any] = []
    result = CliRunner().invoke(application(record, seen), list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0] if seen else result.output


def test_one_change_of_a_field_is_seen_in_flag_keyword_recipe_schema_and_docs() -> None:
    def with_default(value: float, text: str) -> type[Options]:
        class Changed(Options):
            """Options with one field."""

            strength: float = Field(default=value, ge=0, le=9, description=text)

        return Changed

    for value, text in ((0.25, "Pull towards zero."), (4.5, "Push away.")):
        kind = with_default(value, text)
        help_text = run(kind, "--help")
        assert "--strength" in help_text and text in help_text and f"default: {value}" in help_text
        assert run(kind).strength == value

        @accepts(options=kind)
        def function(*, options: Any) -> Any:
            return options.strength

        assert function() == value and function(strength=1) == 1
        assert inspect.signature(function).parameters["strength"].default == value
        assert options_from(kind, {}).model_dump()["strength"] == value  # as run.json saves it
        schema = kind.model_json_schema()["properties"]["strength"]
        assert "At most 9." in help_text  # the bound that is not trivial
        assert (schema["default"], schema["description"], schema["maximum"]) == (value, text, 9)
        assert list(table_rows(kind)) == [("--strength", "strength", str(value), text)]


def test_nested_records_are_flat_for_the_user() -> None:
    assert list(option_fields(Outer)) == [
        "ridge", "layers", "fast", "data", "samples", "other_data", "other_samples",
    ]  # fmt: skip
    model, options, runtime, _ = fit("m", samples=7, other_data="c4", ridge=2, device="cpu")
    assert (model, options.inner.samples, options.other.data, options.ridge) == ("m", 7, "c4", 2)
    assert runtime.device == "cpu" and options.other.samples == 3
    typed = run(Outer, "--samples", "7", "--other-data", "c4", "--layers", "3, 4", "--fast")
    assert typed == Outer(inner=Inner(samples=7), other=Inner(data="c4"), layers=[3, 4], fast=True)
    assert typed.model_fields_set == {"inner", "other", "layers", "fast"}


def test_keywords_win_over_a_record_and_unknown_ones_are_refused() -> None:
    _, options, _, _ = fit("m", options=Outer(ridge=3, layers=[1]), ridge=4)
    assert (options.ridge, options.layers) == (4, [1])
    _, options, _, _ = fit("m", inner=Inner(samples=8, data="a"), data="b")
    assert options.inner == Inner(samples=8, data="b")
    with pytest.raises(TypeError, match=r"fit\(\) has no argument 'rige'. Did you mean 'ridge'"):
        fit("m", rige=1)


def test_remote_code_is_trusted_only_within_the_call() -> None:
    assert fit("m", trust_remote_code=True)[3] and not fit("m")[3] and not is_trusted()


def test_a_wrong_value_names_the_flag_or_the_keyword() -> None:
    with pytest.raises(ShortLLMError, match="^--ridge -1.0: must be greater than 0$"):
        run(Outer, "--ridge", "-1")
    with pytest.raises(ShortLLMError, match="^--layers a: must be a valid integer"):
        run(Outer, "--layers", "a,2")
    with pytest.raises(ShortLLMError, match="^other_samples 0: must be greater than or equal to 1"):
        fit("m", other_samples=0)


def test_only_what_was_given_is_laid_over() -> None:
    base = Outer(ridge=2, inner=Inner(samples=9, data="a"))
    over = Outer(inner=Inner(data="b"))
    assert overlaid(base, over) == Outer(ridge=2, inner=Inner(samples=9, data="b"))


def test_every_option_of_the_package_has_a_description() -> None:
    for name in shortllm.__all__:
        kind = getattr(shortllm, name)
        if isinstance(kind, type) and issubclass(kind, Options):
            missing = [one.name for one in option_fields(kind).values() if not one.info.description]
            assert not missing, f"{name}: {missing}"


def test_recipe_keys_flags_and_schema_agree(tmp_path: Path) -> None:
    from shortllm.recipe import Recipe
    from shortllm.schemas import schema

    fields = option_fields(Recipe)
    typed = run(Recipe, "--eval-length", "64", "--remove", "2", "--samples", "5")
    assert typed.model_dump(exclude_unset=True) == {
        "evaluation": {"length": 64}, "budget": {"remove": 2}, "calibration": {"samples": 5},
    }  # fmt: skip
    definitions = json.dumps(schema("recipe"))
    for one in fields.values():
        assert f'"{one.path[-1]}"' in definitions, one.name
