"""`miaotui serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from miaotui.cli.load import load
from miaotui.cli.options import MODEL, Size, engine_options, take_engine
from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.engine.llm import LLM


@click.command("serve")
@MODEL
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--served-model-name", multiple=True, help="What requests call the model. Can be given again.  [default: MODEL]"
)
@click.option("--chat-template", help="A Jinja file, or the template itself, instead of the model's own.")
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Sequences that may wait; requests past that get 429.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    help="Seconds a request may take in all; 0: no limit.",
)
@click.option("--max-body-bytes", type=Size(), default="4M", show_default=True, help="The longest request body.")
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that running requests get after SIGTERM.",
)
@click.option("--ssl-certfile", type=click.Path(exists=True, dir_okay=False), help="Serve HTTPS with this certificate.")
@click.option("--ssl-keyfile", type=click.Path(exists=True, dir_okay=False), help="The certificate's private key.")
@engine_options
def command(
    model: str, host: str, port: int, ssl_certfile: str | None, ssl_keyfile: str | None, **options: Any
) -> None:  # fmt: skip
    """Serve MODEL to OpenAI clients.

    The base URL is http://HOST:PORT/v1. /health answers at once, /ready when the model is loaded.
    """
    from miaotui.serve.run import check_certificate, in_background, open_socket, run

    if ssl_keyfile is not None and ssl_certfile is None:
        raise UsageError("--ssl-keyfile needs a certificate.", "Add --ssl-certfile FILE.")
    if ssl_certfile is not None:
        check_certificate(ssl_certfile, ssl_keyfile)
    chat_template = options.pop("chat_template")
    engine = take_engine(options)
    listening = open_socket(host, port)
    loading = in_background(lambda: _load(model, engine, chat_template))

    from miaotui.serve.app import create_app
    from miaotui.serve.service import Service
    from miaotui.serve.settings import ServeSettings

    settings = ServeSettings(
        served_model_names=tuple(options.pop("served_model_name")) or (model,),
        request_timeout=options.pop("request_timeout") or None,
        **options,
    )
    service = Service(settings)
    app = create_app(service, settings)
    url = f"{'https' if ssl_certfile else 'http'}://{_shown(host)}:{listening.getsockname()[1]}"
    click.echo(f"Listening on {url} (the model is loading)", err=True)
    run(
        service,
        app,
        listening,
        loading,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        on_ready=lambda: click.echo(f"Ready: {url}/v1 serves {' and '.join(settings.served_model_names)}", err=True),
    )


def _load(model: str, engine: dict[str, Any], chat_template: str | None) -> LLM:
    """The model, with the chat template that was asked for."""
    llm = load(model, engine)
    if chat_template is not None:
        from miaotui.model.chat import ChatTemplate, read_template

        llm.chat_template = ChatTemplate(read_template(chat_template), llm.tokenizer)
    return llm


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
