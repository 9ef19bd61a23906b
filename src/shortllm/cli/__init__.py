"""The command line: each command parses, calls the function of the same name and prints the result.

    run.py score.py derive.py draft.py measure.py comparison.py gguf.py push.py   the commands
    flags.py    flags from option records, and parameters that several commands share
    output.py   tables and JSON

Answers go to standard output (`--json`: exactly one line of JSON), progress and notes to standard
error. Exit codes: 0 done, 2 a mistake in the command or its input, 3 measured and found wanting
(`check`, `export-lint`, a target of quality that nothing meets), 130 interrupted.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Annotated, Any

import typer

from shortllm import __version__
from shortllm.cli.comparison import compare, compare_criteria, compare_units
from shortllm.cli.derive import drop_sublayers, heal, merge, quantize, retrain, width
from shortllm.cli.draft import draft
from shortllm.cli.flags import with_notes
from shortllm.cli.gguf import cache, export
from shortllm.cli.measure import bench, check, demo, evaluate, export_lint, report
from shortllm.cli.output import show_notes
from shortllm.cli.push import push
from shortllm.cli.run import recipes, run
from shortllm.cli.score import info, plan, prune, score
from shortllm.errors import ShortLLMError
from shortllm.files import can_resume

HELP = {"help_option_names": ["-h", "--help"]}
"""For the groups within too: settings of the outer one apply to them."""

app = typer.Typer(
    name="shortllm",
    help="Make large language models shorter: remove Transformer blocks, recover quality, and "
    "report what it cost.",
    no_args_is_help=True,
    context_settings=HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

UsageError: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""Wrong flags and arguments; typer brings its own copy of click or uses the installed one."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Shorten": {
        "run": run,
        "info": info,
        "score": score,
        "plan": plan,
        "prune": prune,
    },
    "Other ways to make a model smaller": {
        "drop-sublayers": drop_sublayers,
        "merge": merge,
        "width": width,
        "quantize": quantize,
    },
    "Recover quality": {"heal": heal, "retrain": retrain},
    "Write faster": {"draft": draft},
    "Measure": {"eval": evaluate, "bench": bench, "check": check},
    "Compare": {
        "compare": compare,
        "compare-criteria": compare_criteria,
        "compare-units": compare_units,
    },
    "Tools": {
        "report": report,
        "demo": demo,
        "push": push,
        "export": export,
        "export-lint": export_lint,
    },
}
"""The commands by group, in the order of `--help`."""


def _paragraphs(command: Callable[..., None]) -> str:
    """A command's docstring with each paragraph on one line, which the terminal wraps again."""
    text = inspect.cleandoc(command.__doc__ or "")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


for _group, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(name=_name, rich_help_panel=_group, help=_paragraphs(_command))(_command)
app.add_typer(recipes, name="recipes", rich_help_panel="Tools")
app.add_typer(cache, name="cache", rich_help_panel="Tools")
for _typer in (app, recipes, cache):
    for _registered in _typer.registered_commands:
        if _registered.callback is not None:
            _registered.callback = with_notes(_registered.callback)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """What `shortllm` without a command does."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `shortllm` command; never returns."""
    show_notes()
    _insist_on_interrupts()
    # torch takes memory in pages of 2 MB: with small ones, a tenth of a walk goes to the kernel
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        # in a context of its own: what one command is trusted with, the next one is not
        code = copy_context().run(app, args=arguments, standalone_mode=False)
    except ShortLLMError as error:
        if os.environ.get("SHORTLLM_DEBUG"):
            raise
        typer.echo(f"error: {error}", err=True)
        code = error.exit_code
    except UsageError as error:
        _explain(error, sys.argv[1:] if arguments is None else arguments)
        code = 2
    except (KeyboardInterrupt, typer.Abort):  # newer versions of typer return 130 instead
        code = INTERRUPTED
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _repeat_interrupt(after_s=0)
        hint = " Run the same command again to resume." if can_resume() else ""
        typer.echo(f"Interrupted.{hint}", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Any, typed: Sequence[str]) -> None:
    """Print a mistake that typer found in the style of all others."""
    said = str(error.format_message()).strip().rstrip(".")
    if not said or "Commands" in said:  # no command was given: the help is printed instead
        error.show()
        return
    context = getattr(error, "ctx", None)
    called = " ".join(["shortllm", *typed[:1]]) if context is None else context.command_path
    said = said.replace("Value error, ", "").replace("Input should be ", "must be ")
    said = said.partition(", unable to parse")[0]
    stop = "" if said.endswith("?") else "."
    typer.echo(f"error: {said[:1].lower()}{said[1:]}{stop} See: {called} --help", err=True)


def _insist_on_interrupts() -> None:
    """Repeat a Ctrl-C until it gets through.

    Python drops the KeyboardInterrupt that happens to be raised inside a destructor, and the run
    would go on as if nothing had been typed.
    """

    def interrupt(signum: int, frame: object) -> None:
        _repeat_interrupt(after_s=0.5)
        raise KeyboardInterrupt

    def report(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report
    signal.signal(signal.SIGINT, interrupt)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, interrupt)


def _repeat_interrupt(*, after_s: float) -> None:
    """Have the interrupt raised again after a while; 0 calls that off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, after_s)
