"""`miaotui serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from miaotui.cli.load import load_for_chat
from miaotui.cli.options import MODEL, TOOL_CALL_PARSER, Size, engine_options, take_engine
from miaotui.errors import UsageError

if TYPE_CHECKING:
    from miaotui.serve.auth import Keys


_BATCH_WIDTH = 64
_BATCH_SHARE = 4
"""Requests of /v1/batches that are in flight at once: so many, and at most a quarter of the queue."""


@click.command("serve")
@MODEL
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--served-model-name", multiple=True, help="What requests call the model. Can be given again.  [default: MODEL]"
)
@click.option("--chat-template", help="A Jinja file, or the template itself, instead of the model's own.")
@TOOL_CALL_PARSER
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
@click.option("--max-file-bytes", type=Size(), default="200M", show_default=True, help="The longest file of requests.")
@click.option(
    "--batch-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep /v1/files and /v1/batches here; unfinished batches go on at the next start.  [default: till the end]",
)
@click.option("--ssl-certfile", type=click.Path(exists=True, dir_okay=False), help="Serve HTTPS with this certificate.")
@click.option("--ssl-keyfile", type=click.Path(exists=True, dir_okay=False), help="The certificate's private key.")
@click.option(
    "--api-key",
    multiple=True,
    help="A key that requests must have. Can be given again. Others see it in the list of processes; not so the "
    "variable MIAOTUI_API_KEY.",
)
@click.option("--api-keys-file", type=click.Path(dir_okay=False, path_type=Path), help="Keys made by `miaotui keys`.")
@click.option("--metrics-without-key", is_flag=True, help="Let everybody read /metrics.")
@click.option(
    "--allowed-origins", multiple=True, help="A site whose pages may ask, such as https://example.org; * is all."
)
@click.option(
    "--access-log/--no-access-log", default=True, show_default=True, help="A JSON line on stderr per request."
)
@click.option("--log-prompts", is_flag=True, help="Have the access log hold what was asked.")
@engine_options
def command(
    model: str,
    host: str,
    port: int,
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
    api_key: tuple[str, ...],
    api_keys_file: Path | None,
    metrics_without_key: bool,
    allowed_origins: tuple[str, ...],
    access_log: bool,
    log_prompts: bool,
    batch_dir: Path | None,
    **options: Any,
) -> None:
    """Serve MODEL to OpenAI clients.

    The base URL is http://HOST:PORT/v1. /health answers at once, /ready when the model is loaded.
    With keys, only /health, /ready, /ping and the page's files are open without one; Prometheus sends its own as
    `authorization: {credentials_file: …}`, or /metrics is opened with --metrics-without-key.
    """
    if log_prompts and not access_log:
        raise UsageError("--log-prompts needs the access log.", "Leave --no-access-log out.")
    from miaotui.serve.run import check_certificate, in_background, open_socket, run

    if ssl_keyfile is not None and ssl_certfile is None:
        raise UsageError("--ssl-keyfile needs a certificate.", "Add --ssl-certfile FILE.")
    if ssl_certfile is not None:
        check_certificate(ssl_certfile, ssl_keyfile)
    given = [*api_key, *filter(None, [os.environ.get("MIAOTUI_API_KEY")])]
    keys = _keys(given, api_keys_file)
    if allowed_origins:
        from miaotui.serve.guard import check_origins

        check_origins(allowed_origins)
    if keys is None and metrics_without_key:
        raise UsageError("--metrics-without-key opens what is open.", "Leave it out, or give an API key.")
    if keys is None and not _is_loopback(host):
        click.echo(f"warning: {host} can be reached by others, and no API key is asked for. Give --api-key.", err=True)
    chat_template = options.pop("chat_template")
    engine = take_engine(options)
    listening = open_socket(host, port)
    loading = in_background(lambda: load_for_chat(model, engine, chat_template))

    from miaotui.offline.store import BatchStore
    from miaotui.serve.app import create_app
    from miaotui.serve.guard import guarded
    from miaotui.serve.metrics import Metrics
    from miaotui.serve.service import Service
    from miaotui.serve.settings import ServeSettings

    settings = ServeSettings(
        served_model_names=tuple(options.pop("served_model_name")) or (model,),
        request_timeout=options.pop("request_timeout") or None,
        **options,
    )
    metrics = Metrics(settings.served_model_names[0])
    service = Service(settings, observe=metrics.observe)
    url = f"{'https' if ssl_certfile else 'http'}://{_shown(host)}:{listening.getsockname()[1]}"
    click.echo(f"Listening on {url} (the model is loading)", err=True)
    with ExitStack() as stack:
        passing = stack.enter_context(TemporaryDirectory(prefix="miaotui-batches-"))
        width = max(1, min(_BATCH_WIDTH, settings.max_queue // _BATCH_SHARE))
        batches = stack.enter_context(closing(BatchStore(batch_dir or Path(passing), service.answer, width)))
        app = guarded(
            create_app(service, settings, metrics=metrics, batches=batches),
            keys=keys,
            metrics_without_key=metrics_without_key,
            allowed_origins=allowed_origins,
            access_log=access_log,
            log_prompts=log_prompts,
        )

        def on_ready() -> None:
            batches.resume()
            click.echo(f"Ready: {url}/v1 serves {' and '.join(settings.served_model_names)}", err=True)

        run(service, app, listening, loading, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile, on_ready=on_ready)


def _keys(given: list[str], file: Path | None) -> Keys | None:
    """None when no key was given in any way: then everybody may ask."""
    if not given and file is None:
        return None
    from miaotui.serve.auth import Keys

    return Keys(given, file)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
