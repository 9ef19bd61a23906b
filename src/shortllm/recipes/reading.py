"""YAML as recipes use it: texts, numbers, lists and tables, of a size that a person can write.

YAML can do more, and all of it is refused: tags that build objects, dates and bytes, and references
to references, with which a file of a few lines stands for more values than memory holds.
"""

from __future__ import annotations

from typing import Any

import yaml

from shortllm.files import require_shallow, require_sound

MAX_VALUES = 100_000
"""Values of a recipe, those counted again that are referred to again."""

PLAIN = (str, int, float, bool, type(None))


class _Loader(yaml.SafeLoader):
    """The safe loader, which builds plain values only, with an end to merged tables too."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"merging gives more than {MAX_VALUES:,} values", node.start_mark
            )


def parsed_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ValueError: it is no YAML, in one line; or it holds what no recipe does.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
        require_shallow(content, most=MAX_VALUES)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # what PyYAML 6 raises of values that are not of the type their tag names
        raise ValueError(f"a value is not of the type it is marked as ({error})") from error
    _require_plain(content)
    return content


def _require_plain(content: Any) -> None:
    """Refuse values that no recipe holds.

    Raises:
        ValueError: naming one.
    """
    held = [content]
    while held:
        one = held.pop()
        if isinstance(one, dict):
            for key in one:
                if not isinstance(key, str):
                    raise ValueError(f"{key!r} is no name of a field. Put it in quotes")
                require_sound(key)
            held.extend(one.values())
        elif isinstance(one, list):
            held.extend(one)
        elif isinstance(one, PLAIN):
            require_sound(one)
        else:
            raise ValueError(f"{one} is a {type(one).__name__}. Put it in quotes")
