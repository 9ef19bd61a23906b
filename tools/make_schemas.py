"""Write the JSON schemas of docs/schemas/ from the records:

python tools/make_schemas.py [DIRECTORY]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shortllm.files import write_text
from shortllm.schemas import NAMES, schema

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"

if __name__ == "__main__":
    directory = Path(sys.argv[1]) if sys.argv[1:] else SCHEMAS
    directory.mkdir(exist_ok=True)
    for name in NAMES:
        path = directory / f"{name}.schema.json"
        write_text(path, json.dumps(schema(name), indent=1) + "\n")
        print(path)
