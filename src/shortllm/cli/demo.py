"""`demo`: several models side by side in the browser."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from typing import Annotated

import typer

from shortllm.cli.flags import flags
from shortllm.errors import ShortLLMError
from shortllm.runtime import DeviceOptions

Place = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Checkpoint directory, Hub id, or 'embedded'."),
]


@flags(runtime=DeviceOptions)
def demo(
    runtime: DeviceOptions,
    original: Place = None,
    width: Place = None,
    depth: Place = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="A panel with a name of yours; can be repeated."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Default: the first free one from 7860."),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also serve a public address through gradio's servers.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a user can generate.")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch a user can choose.")] = 8,
) -> None:
    """Show several models side by side in the browser: text, time, throughput, memory.

    Without a model: the embedded one and its shortened versions, which are made on first use.

    Example: shortllm demo --original Qwen/Qwen3-0.6B --depth qwen3-short
    """
    if find_spec("gradio") is None:
        raise ShortLLMError("the demo needs gradio. Install it with: pip install 'shortllm[demo]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from shortllm.demo.generate import Limits
    from shortllm.demo.models import embedded_models, named_models, open_models
    from shortllm.demo.page import serve
    from shortllm.model.session import Session

    session = Session(runtime)
    given = {"original": original, "width": width, "depth": depth}
    places = named_models(
        [
            *((name, place) for name, place in given.items() if place is not None),
            *((name, place) for name, _, place in (one.partition("=") for one in model or ())),
        ]
    )
    if not places:
        places = embedded_models(session)
        session.release()
    models = open_models(places, session)
    limits = Limits(new_tokens=max_tokens, batch=max_batch)
    _, address = serve(models, limits=limits, host=host, port=port, share=share)
    typer.echo(f"demo of {', '.join(places)}: {address}")
    typer.echo("Ctrl-C ends it", err=True)
    threading.Event().wait()
