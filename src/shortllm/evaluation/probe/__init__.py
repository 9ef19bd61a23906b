"""The probe: short exercises that show what a model can no longer do.

`items` draws the exercises, `measure` puts them to a model, `record` is what eval.json has of them,
and the YAML files in `tasks/` hand the same exercises to lm-evaluation-harness.
"""

from pathlib import Path

TASKS_DIR = Path(__file__).parent / "tasks"
"""The exercises as an include path for lm-evaluation-harness."""
