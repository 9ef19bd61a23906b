"""The embedded model as a chat model: questions of its world, answered up to the end of a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from shortllm.embedded import MODEL_DIR

TEMPLATE = (
    "{{ bos_token }}{% for one in messages %}{% if one.role == 'user' %}Question: "
    "{{ one.content }}\nAnswer:{% elif one.role == 'assistant' %} {{ one.content }}\n"
    "{% else %}{{ one.content }}\n{% endif %}{% endfor %}"
)
STORY = "Mara put the lamp in the kitchen. Later Tom carried the lamp from the kitchen to the barn."
QUESTION, ANSWER = "Where is the lamp?", "the barn."


def chat_model(target: Path, template: str = TEMPLATE) -> str:
    """A copy of the embedded model with a chat template, whose answers end with their line."""
    shutil.copytree(MODEL_DIR, target)
    (target / "chat_template.jinja").write_text(template)
    [line_end] = AutoTokenizer.from_pretrained(target)("\n", add_special_tokens=False).input_ids
    path = target / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, line_end]}))
    return str(target)
