"""A small OpenAI-compatible server with known answers and delays, in a thread: what a load generator is tested on."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

FIRST, BETWEEN = 0.02, 0.004
"""Seconds before the first token, and between two."""


@dataclass
class Fake:
    """Answers `w0 w1 …`, as many tokens as asked for; one token is one word, and each prompt has one more (BOS).

    `faults` are taken one for each request, "" for none; when they are used up there are no more.
    """

    faults: list[str] = field(default_factory=list)
    tokenizer: str = "vllm"
    """The shape of /tokenize: vllm, llama.cpp, or none."""
    usage: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    under_way: int = 0
    peak: int = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._answer)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "org/fake"}, {"id": "another"}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.tokenizer == "none":
            raise web.HTTPNotFound
        text = body.get("prompt" if self.tokenizer == "vllm" else "content", "")
        return web.json_response({"tokens": [0] * (len(text.split()) + 1) if text else []})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        fault = self.faults.pop(0) if self.faults else ""
        if fault.isdigit():
            return web.json_response({"error": {"message": f"fault {len(self.asked)}"}}, status=int(fault))
        if fault == "whole":
            return web.json_response({"choices": [{"text": "w0"}]})
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            return await self._stream(request, body, fault)
        finally:
            self.under_way -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        chat = "messages" in body
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def write(data: dict[str, Any] | str) -> None:
            await response.write(f"data: {data if isinstance(data, str) else json.dumps(data)}\r\n\r\n".encode())

        await response.write(b": a comment\n\n")
        if chat:
            await write({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
        if fault == "broken":
            await write("{ no JSON")
        last = body["max_tokens"] - 1
        for i in range(0 if fault == "empty" else last + 1):
            await asyncio.sleep(BETWEEN if i else FIRST)
            reason = "length" if i == last else None
            part = {"delta": {"content": f"w{i} "}} if chat else {"text": f"w{i} "}
            await write({"choices": [{"index": 0, **part, "finish_reason": reason}]})
            if fault == "cut" and i == 1:
                return response
            if fault == "drop" and i == 1:
                assert request.transport is not None
                request.transport.abort()
                return response
            if fault == "error" and i == 1:
                await write({"error": {"message": "out of luck", "code": 500}})
        if self.usage and body["stream_options"]["include_usage"]:
            text = body["messages"][0]["content"] if chat else body["prompt"]
            counts = {"prompt_tokens": len(text.split()) + 1, "completion_tokens": body["max_tokens"]}
            await write({"choices": [], "usage": counts})
        await write("[DONE]")
        return response


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """Have it listen at `fake.url`."""
    loop, up = asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(fake.app(), shutdown_timeout=1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        up.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert up.wait(10)
        yield fake
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
