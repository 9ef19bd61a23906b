"""`demo`: a page in the browser with several models side by side."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from typing import Annotated, Optional

import typer

from shortllm.cli.options import Device, Dtype, TrustRemoteCode
from shortllm.errors import ShortLLMError

Place = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="MODEL", help="Checkpoint directory, Hub id, or 'embedded'."),
]


def demo(
    original: Place = None,
    width: Place = None,
    depth: Place = None,
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME=MODEL", help="A panel of any name; may be repeated."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on."),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also through a public address, by gradio's servers.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Output tokens that may be asked for.")
    ] = 256,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Sequences that may be asked for at once.")
    ] = 8,
) -> None:
    """Several models side by side in the browser: text, time, throughput, memory.

    Without a model: the embedded one and its shortened versions, made on first use.
    """
    if find_spec("gradio") is None:
        raise ShortLLMError("the demo needs gradio. Install it with: pip install 'shortllm[demo]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from shortllm.demo.generate import Limits
    from shortllm.demo.models import embedded_models, named_models, open_models
    from shortllm.demo.page import serve
    from shortllm.session import Session

    session = Session(device=device, dtype=dtype)
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
