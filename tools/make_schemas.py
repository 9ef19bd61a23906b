"""The JSON schemas of docs/schemas/, from the records:  python docs/make_schemas.py"""

from __future__ import annotations

import json
from pathlib import Path

from shortllm.files import write_text
from shortllm.schemas import NAMES, schema

SCHEMAS = Path(__file__).parent / "schemas"

if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for name in NAMES:
        path = SCHEMAS / f"{name}.schema.json"
        write_text(path, json.dumps(schema(name), indent=1) + "\n")
        print(path)
