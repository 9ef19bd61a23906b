"""Where the page is served, and what its server refuses."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.demo.generating import Limits
from shortllm.demo.models import Models
from shortllm.demo.page import Page
from shortllm.errors import ShortLLMError

if TYPE_CHECKING:
    import gradio as gr

log = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"

OWN_CONTENT = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""The browser loads nothing from elsewhere, whatever gradio's page asks for."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


def serve(
    models: Models,
    *,
    limits: Limits,
    host: str = LOCALHOST,
    port: int | None = None,
    share: bool = False,
) -> tuple[gr.Blocks, str]:
    """Serve the page from threads of its own, until `close()` or the end of the process.

    Args:
        port: default: the first free one from 7860 on.
        share: also through a public address that gradio gives out for a week.
    Returns:
        The page, and its address.
    Raises:
        ShortLLMError: the address cannot be taken.
    """
    from starlette.middleware import Middleware

    if share or host not in (LOCALHOST, "localhost", "::1"):
        log.warning("whoever can reach the page can use the models, and there are no accounts")
    page = Page(models, limits).blocks()
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            allowed_paths=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme(),
            css_paths=Path(__file__).with_name("page.css"),
            app_kwargs={"middleware": [Middleware(Guard)]},
        )
    except OSError as error:
        where = host if port is None else f"port {port} of {host}"
        raise ShortLLMError(
            f"{where} is taken, or not this machine's. Give another --port or --host"
        ) from error
    return page, public or local


def theme() -> gr.themes.Base:
    """Fonts of the system alone: nothing is loaded from elsewhere."""
    import gradio as gr

    sans = ("Inter", "Helvetica Neue", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
    mono = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace")
    return gr.themes.Base(
        font=[gr.themes.Font(name) for name in sans],
        font_mono=[gr.themes.Font(name) for name in mono],
    )


class Guard:
    """Refuses uploads, for which the page has no use, and content from elsewhere."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] == "http" and "/upload" in scope["path"]:
            await PlainTextResponse("nothing can be uploaded here", 403)(scope, receive, send)
            return

        async def guarded(message: Scope) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", OWN_CONTENT.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, guarded)
