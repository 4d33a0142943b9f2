"""The public API: a model to ask, in one process."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from miaotui.engine.assemble import Settings, assemble
from miaotui.engine.engine import Engine
from miaotui.engine.paging import PREFIX_CACHE_BYTES
from miaotui.engine.params import BeamSearchParams, SamplingParams
from miaotui.engine.request import RequestOutput
from miaotui.errors import RequestError, UsageError

Prompt = str | Many[int] | Mapping[str, Any]
"""A text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}."""
Params = SamplingParams | BeamSearchParams
Messages = Many[Mapping[str, Any]]

MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 512


class LLM:
    """A loaded model with its engine. Close it, or use it in a `with`, to give its memory and threads back at once;
    otherwise that happens when it is dropped, or when the process ends.

    Not thread-safe: one thread asks. Several streams may be read in turn.
    """

    def __init__(
        self,
        model: str,
        *,
        compute: Literal["auto", "fp32", "int8-batch"] = "auto",
        kv_cache_dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto",
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        enable_prefix_caching: bool = True,
        prefix_cache_file: str | Path | None = None,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        speculative: str | Mapping[str, Any] | None = None,
        threads: int | None = None,
        device: Literal["auto", "cpu", "cuda", "reference"] = "auto",
        keep_packed: bool = True,
        greedy_screen: bool = True,
    ) -> None:
        """Load `model`: a folder, a `.gguf` file, a hub name or `demo`.

        `max_model_len` tokens of prompt and answer; None means what the model and the memory allow.
        `kv_cache_memory_bytes` is the KV cache's size; None takes what the context can use, of what is free.
        `prefix_cache_file` keeps prefixes that memory has no room for, in `prefix_cache_bytes` at most, also for the
        next process that opens the same model with it.
        `compute` "auto" multiplies integer weights with activations in int8, "fp32" exactly; "int8-batch" multiplies
        weights recoded to int8 in steps of 16 rows and more: faster, in the memory of both, at some cost of quality,
        and a stream's answer may depend on how many others run with it.
        `speculative` guesses tokens and checks them together, which changes no answer: "ngram" repeats what stood there
        before, {"model": …, "num_speculative_tokens": 4} asks a small model of the same tokenizer.
        `device` reference is PyTorch on the CPU: slow, exact, and there to compare with.
        `keep_packed` keeps the packed weights of a large model on disk, so that its next start only maps them.
        `greedy_screen` keeps the head once more in 4 bits, where greedy decoding of one or two streams then finds the
        likeliest token, the very same, while it reads less.
        `max_num_seqs` sequences and `max_num_batched_tokens` tokens in one step at most.
        """
        settings = Settings(
            compute=compute,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            prefix_cache_file=prefix_cache_file,
            prefix_cache_bytes=prefix_cache_bytes,
            speculative=speculative,
            threads=threads,
            device=device,
            keep_packed=keep_packed,
            greedy_screen=greedy_screen,
        )
        loaded, self.engine = assemble(model, settings)
        self.model = model
        self.path = loaded.checkpoint.path
        """The folder or file that `model` is."""
        self.spec = loaded.spec
        self.tokenizer = loaded.tokenizer
        self.chat_template = loaded.chat_template
        self._inbox: dict[str, deque[RequestOutput]] = {}
        self._dropped: list[str] = []
        """Requests whose streams nobody holds any more; cancelled before the next step."""
        self._stepping = threading.RLock()
        self._closed = False
        self._end = weakref.finalize(self, _end, self.engine, self._stepping, os.getpid())

    # -- asking ------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: Params | Many[Params] | None = None,
        *,
        priority: int | Many[int] = 0,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue each prompt; the outputs in the prompts' order.

        `params` and `priority` (smaller goes first) are for all, or one for each. `use_tqdm` shows a progress bar.
        Raises RequestError for a prompt that can never be served; nothing is left running then.
        """
        asked = _listed(prompts)
        wanted = _for_each("params", SamplingParams() if params is None else params, len(asked))
        urgency = _for_each("priority", priority, len(asked))
        order = sorted(range(len(asked)), key=lambda i: urgency[i])
        with _progress(len(asked), use_tqdm) as advance:
            results: dict[int, RequestOutput] = {}
            for i, output in self._run_all(iter([(i, asked[i], wanted[i], urgency[i]) for i in order])):
                results[i] = output
                advance()
        return [results[i] for i in range(len(asked))]

    def beam_search(self, prompts: Prompt | Iterable[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """The best beams of each prompt, best first; an output's `cumulative_logprob` is its summed log-probability."""
        return self.generate(prompts, params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Stream:
        """Continue one prompt; the stream yields what each step adds.

        The request is checked at once, so that a RequestError comes from here and not from the stream.
        """
        return Stream(self, self._add(prompt, params or SamplingParams(), priority, stream=True))

    def chat(
        self,
        messages: Messages | Many[Messages],
        params: Params | Many[Params] | None = None,
        *,
        tools: Many[Mapping[str, Any]] | None = None,
        priority: int | Many[int] = 0,
        use_tqdm: bool = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several. `template` goes to the chat template (`enable_thinking=…`)."""
        several: Any = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        prompts = [self._chat_prompt(conversation, tools, template) for conversation in several]
        return self.generate(prompts, params, priority=priority, use_tqdm=use_tqdm)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Many[Mapping[str, Any]] | None = None,
        priority: int = 0,
        **template: Any,
    ) -> Stream:
        """Answer a conversation, as `stream` does."""
        return self.stream(self._chat_prompt(messages, tools, template), params, priority=priority)

    # -- its end -----------------------------------------------------------------------------------------
    def close(self) -> None:
        """Free the model. The LLM cannot be used afterwards; closing twice is harmless."""
        with self._stepping:
            self._closed = True
            if self._end.detach() is not None:
                self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------
    def _chat_prompt(
        self, messages: Messages, tools: Many[Mapping[str, Any]] | None, template: Mapping[str, Any]
    ) -> list[int]:
        if self.chat_template is None:
            raise RequestError(
                f"{self.model} has no chat template.", "Use generate with a plain prompt.", param="messages"
            )
        ids: list[int] = self.chat_template.encode(messages, tools, **template)
        return ids

    def _add(self, prompt: Prompt, params: Params, priority: int, *, stream: bool) -> str:
        self._check_open()
        request_id = self.engine.add_request(_text_or_ids(prompt), params, priority=priority, stream=stream)
        self._inbox[request_id] = deque()
        return request_id

    def _step(self) -> None:
        """One step; every output goes to whoever asked."""
        with self._stepping:
            self._check_open()
            while self._dropped:
                self._forget(self._dropped.pop())
            for output in self.engine.step():
                self._inbox[output.request_id].append(output)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"This LLM of {self.model} is closed.", "Make a new one, or close it later.")

    def _next_output(self, request_id: str) -> RequestOutput:
        while not self._inbox[request_id]:
            self._step()
        return self._inbox[request_id].popleft()

    def _forget(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        self._inbox.pop(request_id, None)

    def _run_all(self, asked: Iterator[tuple[int, Prompt, Params, int]]) -> Iterator[tuple[int, RequestOutput]]:
        """Finished outputs as they come. Requests enter as there is work for them, so that few wait in memory."""
        window = 2 * self.engine.config.max_num_seqs
        places: dict[str, int] = {}
        try:
            more = True
            while more or places:
                while more and len(places) < window:
                    following = next(asked, None)
                    if following is None:
                        more = False
                    else:
                        place, prompt, params, priority = following
                        places[self._add(prompt, params, priority, stream=False)] = place
                if places:
                    self._step()
                for request_id in [request_id for request_id in places if self._inbox[request_id]]:
                    yield places.pop(request_id), self._inbox.pop(request_id).popleft()
        finally:
            for request_id in places:
                self._forget(request_id)


class Stream(Iterator[RequestOutput]):
    """What one request gets, step by step. `close` it, or drop it, to cancel what is left of the request."""

    def __init__(self, llm: LLM, request_id: str) -> None:
        self._llm = llm
        self._request_id = request_id
        self._open = True

    def __next__(self) -> RequestOutput:
        if not self._open:
            raise StopIteration
        output = self._llm._next_output(self._request_id)
        if output.finished:
            self.close()
        return output

    def close(self) -> None:
        """Cancel the request if it is not finished. Closing twice is harmless."""
        if self._open:
            self._open = False
            self._llm._forget(self._request_id)

    def __del__(self) -> None:
        if self._open:  # this may be in the middle of a step, wherever the collector comes by
            self._llm._dropped.append(self._request_id)


def _end(engine: Engine, stepping: threading.RLock, owner: int) -> None:
    """Close an engine that nobody closed: its LLM was dropped, or Python is about to exit.

    Native objects that outlive Python's own end would be reported as leaks, and a thread that comes back from native
    code after it would take the process down. So a step that another thread is in is waited for, and as the lock is
    kept, there is no other one. A forked child (`owner` is the process that made the engine) has none of its threads.
    """
    if os.getpid() != owner:
        return
    stepping.acquire()
    engine.close()


def _listed(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list; a list that begins with an integer is one."""
    is_ids = isinstance(prompts, list | tuple) and bool(prompts) and isinstance(prompts[0], int)
    return [prompts] if isinstance(prompts, str | Mapping) or is_ids else list(prompts)


def _text_or_ids(prompt: Prompt) -> str | list[int]:
    found: Any = prompt
    if isinstance(prompt, Mapping):
        found = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(found, str):
        return found
    ids: list[Any] = list(found) if isinstance(found, Iterable) else [None]
    if all(isinstance(i, int) for i in ids):
        return ids
    raise RequestError(
        f"A prompt is a {type(prompt).__name__} that holds neither text nor token ids.",
        'Give a string, a list of token ids, or {"prompt_token_ids": [...]}.',
        param="prompt",
    )


def _for_each(name: str, given: Any, count: int) -> list[Any]:
    """One value for each of `count` prompts."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise RequestError(f"There are {len(given)} {name} for {count} prompts.", "Give one, or one each.", param=name)
    return list(given)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Any]:
    """A function to call after each finished prompt; it moves a bar on stderr when `shown`."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda: bar.advance(task)
