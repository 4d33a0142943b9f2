"""The engine: requests in, outputs out, one step at a time. Single-threaded: whoever drives it drives it alone."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.ops import Executor
from miaotui.engine.admit import EngineConfig, check_prompt, tokens_allowed
from miaotui.engine.batch import Batch, rows_wanted
from miaotui.engine.beam import BeamSearch
from miaotui.engine.blocks import BlockManager
from miaotui.engine.branch import Branches
from miaotui.engine.draws import best_draws
from miaotui.engine.grammar import GrammarMask, Grammars
from miaotui.engine.paging import FilePager
from miaotui.engine.params import BeamSearchParams, SamplingParams
from miaotui.engine.processors import build_processors, check_token_ids
from miaotui.engine.publish import Publisher
from miaotui.engine.request import FinishReason, Request, RequestOutput, Sequence
from miaotui.engine.sampler import Choice, Sampler
from miaotui.engine.scheduler import Limits, Schedule, Scheduler
from miaotui.engine.speculate import Speculator
from miaotui.engine.stats import EngineStats
from miaotui.model.tokenizer import Tokenizer

Logits = NDArray[np.float32]

_AT_ONCE, MOST_STEPS = 0.01, 16
"""Seconds of steps that run at once, and the most of these steps."""


class Engine:
    """Owns the executor's cache and every request in flight."""

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        config: EngineConfig,
        pager: FilePager | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """`pager` keeps idle prefixes that memory has no room for, `speculator` guesses. The engine closes them."""
        shape = executor.shape
        config = replace(
            config,
            max_num_seqs=min(config.max_num_seqs, shape.max_seqs, shape.max_logits_rows),
            max_num_batched_tokens=min(config.max_num_batched_tokens, shape.max_tokens),
        )
        self.config = config
        self.tokenizer = tokenizer
        self.executor = executor
        executor.allocate_cache(config.blocks)
        self._pager = pager
        self._blocks = BlockManager(config.blocks, config.enable_prefix_caching, pager)
        limits = Limits(
            max_tokens=config.max_num_batched_tokens,
            max_seqs=config.max_num_seqs,
            max_rows=shape.max_logits_rows,
        )
        self._scheduler = Scheduler(self._blocks, limits)
        self._batch = Batch(shape)
        self._sampler = Sampler(best_draws(executor), self._name)
        self._publisher = Publisher(tokenizer)
        self._grammars = Grammars(tokenizer, executor.vocab_size, config.eos_token_ids)
        self._branches = Branches(self._scheduler, executor, self._prepare)
        self._speculator = speculator
        self._requests: dict[str, Request] = {}
        self._arrivals = self._steps = self._step_tokens = self._prompt_tokens = self._generated_tokens = 0
        self._finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0}
        self._pace = 0.0
        """Seconds of the last step."""

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    # -- requests ----------------------------------------------------------------------------------------
    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> GrammarMask | None:
        """Refuse now what `add_request` would refuse; returns the language asked for, compiled, to give to it.

        Safe from any thread, also while another one is in a step: what is slow about a request need not delay one.
        """
        tokens_allowed(len(prompt_token_ids), params, self.config)
        check_prompt(prompt_token_ids, self.executor.vocab_size)
        check_token_ids(params, self.executor.vocab_size)
        return None if params.structured_outputs is None else self._grammars.compile(params.structured_outputs)

    def add_request(
        self,
        prompt: str | list[int],
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        stream: bool = False,
        grammar: GrammarMask | None = None,
        arrival_time: float | None = None,
    ) -> str:
        """Take a request; returns its id. A smaller `priority` is more urgent.

        A text is the model's own input: the text of a special token in it is that token, as in transformers.
        With `stream`, each step's outputs hold what it added; without, there is one output, at the end.
        `grammar` is what `check` made of the same parameters, for this request alone.
        `arrival_time` (of `time.monotonic`) is for a caller that had the request before now.
        Raises RequestError for what can never be served.
        """
        ids = self.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else list(prompt)
        check_prompt(ids, self.executor.vocab_size)
        request = Request(
            request_id if request_id is not None else f"request-{self._arrivals}",
            prompt if isinstance(prompt, str) else None,
            ids,
            params,
            max_tokens=tokens_allowed(len(ids), params, self.config),
            seed=_seed(params),
            stop_tokens=_stop_tokens(params, self.config.eos_token_ids),
            priority=priority,
            arrival=self._arrivals,
            stream=stream and isinstance(params, SamplingParams),
            now=arrival_time if arrival_time is not None else time.monotonic(),
        )
        assert request.id not in self._requests, f"request id {request.id} is in use"
        if isinstance(params, BeamSearchParams):
            request.beam = BeamSearch(request, params)
        else:
            check_token_ids(params, self.executor.vocab_size)
            if grammar is None and params.structured_outputs is not None:
                grammar = self._grammars.compile(params.structured_outputs)
            self._prepare(request.sequences[0], grammar)
        self._scheduler.add(request.sequences[0])
        self._requests[request.id] = request
        self._arrivals += 1
        return request.id

    def cancel(self, request_id: str) -> RequestOutput | None:
        """Stop a request; returns what it has so far, None when it is not (any longer) known."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        going = [sequence for sequence in request.sequences if sequence.finish_reason is None]
        for sequence in going:
            self._publisher.finish(sequence, "abort")
            self._retire(sequence, "abort")
        return self._output(request, going)

    def cancel_all(self) -> list[RequestOutput]:
        """Stop every request; returns what they have so far."""
        ended = [self.cancel(request_id) for request_id in list(self._requests)]
        return [output for output in ended if output is not None]

    # -- the step ----------------------------------------------------------------------------------------
    def step(self) -> list[RequestOutput]:
        """Run one step; returns what streams and finished requests got from it."""
        plan = self._schedule()
        if plan.steps > 1:
            grown = self._run_on(plan)
        else:
            logits = self._run(plan)
            grown = self._sample(plan, logits)
        return self._publish(plan, grown)

    def _schedule(self) -> Schedule:
        plan = self._scheduler.schedule()
        for sequence in plan.admitted:
            request = sequence.request
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = time.monotonic()
                request.num_cached_tokens = sequence.computed
                self._prompt_tokens += len(request.prompt_token_ids)
        if self._speculator is not None:
            self._speculator.draft(plan, self._scheduler)
        elif self.executor.runs_on:
            self._look_ahead(plan)
        return plan

    def _look_ahead(self, plan: Schedule) -> None:
        """Plan several steps at once, so that Python need not be heard between them, where nothing but the greatest
        logit is wanted. They are few enough that whoever comes meanwhile waits no longer than for a long prompt."""
        steps = min(MOST_STEPS, int(_AT_ONCE / self._pace)) if self._pace else 1
        for sequence in plan.counts if steps > 1 else ():
            if not (sequence.plain and sequence.remaining == 1 and sequence.output_len):
                return
            steps = min(steps, sequence.request.max_tokens - sequence.output_len)
        if steps > 1 and plan.counts:
            self._scheduler.run_on(plan, steps)

    def _run(self, plan: Schedule) -> Logits:
        if not plan.counts:
            return np.empty((0, self.executor.vocab_size), np.float32)
        self._steps += 1
        self._step_tokens += sum(plan.counts.values())
        started = time.perf_counter()
        logits = self.executor.run(self._batch.fill(plan))
        seconds = time.perf_counter() - started
        if self._speculator is not None:
            self._speculator.ran(plan, seconds)
        self._pace = seconds
        self._scheduler.complete(plan)
        return logits

    def _run_on(self, plan: Schedule) -> list[Sequence]:
        """Run the steps of a plan of several, the sampling included; returns the sequences that grew: all."""
        ends = sorted({token for sequence in plan.counts for token in sequence.request.stop_tokens})
        started = time.perf_counter()
        chosen = self.executor.run_on(self._batch.fill(plan), plan.steps, ends)
        self._pace = (time.perf_counter() - started) / len(chosen)
        self._steps += len(chosen)
        self._step_tokens += chosen.size
        for tokens in chosen.tolist():
            for sequence, token in zip(plan.counts, tokens, strict=True):
                if sequence.finish_reason is None:  # a stop string may have ended it before
                    self._scheduler.advance(sequence, 1)
                    self._append(sequence, Choice(token))
        for sequence in plan.counts:
            if sequence.finish_reason is None:
                self._scheduler.rewind(sequence, sequence.computed)
        return list(plan.counts)

    def _sample(self, plan: Schedule, logits: Logits) -> list[Sequence]:
        """Choose a token for every sequence that has run all of its own, and one more for each draft that came true.

        Returns the sequences that grew. Beams note their offers instead.
        """
        drawing = self._drawing(plan, logits)
        grown = list(drawing)
        accepted = dict.fromkeys(plan.drafts, 0)
        while drawing:
            chosen = self._sampler.sample(logits, list(drawing.values()), list(drawing))
            following: dict[Sequence, int] = {}
            for (sequence, row), choice in zip(drawing.items(), chosen, strict=True):
                self._append(sequence, choice)
                done, draft = accepted.get(sequence, 0), plan.drafts.get(sequence, ())
                if done < len(draft) and draft[done] == choice.token:
                    accepted[sequence] += 1
                    if sequence.finish_reason is None:
                        self._scheduler.advance(sequence, 1)
                        following[sequence] = row + 1
            drawing = following
        self._settle(plan, accepted)
        return grown

    def _drawing(self, plan: Schedule, logits: Logits) -> dict[Sequence, int]:
        """The row that each sequence's next token is drawn from; on the way, scores of prompts and offers of beams."""
        drawing: dict[Sequence, int] = {}
        end = 0
        for sequence, count in plan.counts.items():
            drafted = len(plan.drafts.get(sequence, ()))
            ready = sequence.remaining == 0
            end += rows_wanted(plan, sequence, ready)
            last = end - 1 - drafted
            if sequence.all_rows:
                self._score_prompt(sequence, logits[end - count : last + 1])
            if ready and sequence.request.beam is not None:
                sequence.request.beam.offer(sequence, logits[last])
            elif ready:
                for branch in self._branches.fan_out(sequence):
                    drawing[branch] = last
        return drawing

    def _settle(self, plan: Schedule, accepted: dict[Sequence, int]) -> None:
        """Forget what wrong drafts left behind, and learn from them."""
        for sequence, count in accepted.items():
            assert self._speculator is not None
            self._speculator.judge(sequence, len(plan.drafts[sequence]), count)
            if sequence.finish_reason is None:
                self._scheduler.rewind(sequence, sequence.computed)

    def _publish(self, plan: Schedule, grown: list[Sequence]) -> list[RequestOutput]:
        """Tell whoever waits for what has grown or ended."""
        told: dict[Request, list[Sequence]] = {}
        for sequence in grown:
            request = sequence.request
            if request.stream or (sequence.finish_reason is not None and request.finished):
                told.setdefault(request, []).append(sequence)
        for request in {sequence.request for sequence in plan.counts if sequence.request.beam is not None}:
            if not self._branches.advance(request):
                self._finished[cast(FinishReason, request.sequences[0].finish_reason)] += 1
                told[request] = request.sequences
        return [self._output(request, grown) for request, grown in told.items()]

    def _append(self, sequence: Sequence, choice: Choice) -> None:
        self._publisher.accept(sequence, choice)
        self._generated_tokens += 1
        if sequence.output_len == 1 and sequence.request.metrics.first_token_time is None:
            sequence.request.metrics.first_token_time = time.monotonic()
        if sequence.finish_reason is not None:
            self._retire(sequence, sequence.finish_reason)
        elif sequence.grammar is not None:
            sequence.grammar.advance(choice.token)

    # -- the life of a sequence --------------------------------------------------------------------------
    def _prepare(self, sequence: Sequence, grammar: GrammarMask | None) -> None:
        """Give a new sequence what its sampling needs of its own."""
        params = cast(SamplingParams, sequence.request.params)
        sequence.grammar = grammar
        if not sequence.plain:
            sequence.processors = build_processors(
                params,
                ends=sequence.request.stop_tokens,
                prompt_len=sequence.prompt_len,
                vocab_size=self.executor.vocab_size,
                encode=self._encode_plain,
                grammar=grammar,
            )
        self._publisher.start(sequence)

    def _retire(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.remove(sequence)
        self._finished[reason] += 1
        if self._speculator is not None:
            self._speculator.forget(sequence)

    def _score_prompt(self, sequence: Sequence, logits: Logits) -> None:
        """Log-probabilities of the prompt tokens that follow the rows just run; a recomputed row tells nothing new."""
        request = sequence.request
        top = cast(int, cast(SamplingParams, request.params).prompt_logprobs)
        scored = request.prompt_logprobs
        if scored is None:
            scored = request.prompt_logprobs = [None]
        first = sequence.computed - len(logits) + 1
        positions = range(max(first, len(scored)), min(first + len(logits), sequence.prompt_len))
        tokens = [sequence.tokens[position] for position in positions]
        scored += self._sampler.score(logits, [position - first for position in positions], tokens, top)

    def _output(self, request: Request, grown: list[Sequence]) -> RequestOutput:
        """What the request is told now; a finished one is forgotten."""
        if request.finished:
            del self._requests[request.id]
        if isinstance(request.params, BeamSearchParams):
            outputs = self._publisher.beams(request, request.params.n or request.params.beam_width)
        elif request.stream:
            outputs = [self._publisher.delta(sequence) for sequence in grown]
        else:
            outputs = [self._publisher.whole(sequence) for sequence in request.sequences]
        return self._publisher.request(request, outputs)

    def _name(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def _encode_plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    # -- looking in --------------------------------------------------------------------------------------
    @property
    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            blocks=self._blocks.total,
            blocks_in_use=self._blocks.total - self._blocks.available,
            prefix_queries=self._scheduler.prefix_queries,
            prefix_hits=self._scheduler.prefix_hits,
            preemptions=self._scheduler.preemptions,
            blocks_paged_out=self._pager.file.saved if self._pager is not None else 0,
            blocks_paged_in=self._pager.file.found if self._pager is not None else 0,
            drafts=self._speculator.drafts if self._speculator is not None else 0,
            tokens_drafted=self._speculator.proposed if self._speculator is not None else 0,
            drafts_accepted=self._speculator.accepted if self._speculator is not None else 0,
            accepted_by_position=tuple(self._speculator.accepted_at) if self._speculator is not None else (),
            steps=self._steps,
            step_tokens=self._step_tokens,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished=dict(self._finished),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, sequences and requests agree."""
        self._scheduler.check_integrity()
        if self._pager is not None:
            self._pager.file.check_integrity()
        live = {id(s) for request in self._requests.values() for s in request.sequences if s.finish_reason is None}
        scheduled = self._scheduler.running + [sequence for _, sequence in self._scheduler.waiting]
        assert live == set(map(id, scheduled)), "a sequence is lost, or outlives its request"
        assert not any(request.finished for request in self._requests.values())

    def close(self) -> None:
        """Free the executor and the worker threads; known prefixes go to the pager's file."""
        if self._pager is not None:
            self._blocks.save_all()
            self._pager.file.close()
        if self._speculator is not None:
            self._speculator.close()
        self._grammars.close()
        self.executor.close()


def _seed(params: SamplingParams | BeamSearchParams) -> int:
    """The caller's seed, or 64 random bits."""
    seed = params.seed if isinstance(params, SamplingParams) else 0
    return secrets.randbits(64) if seed is None else seed


def _stop_tokens(params: SamplingParams | BeamSearchParams, eos: tuple[int, ...]) -> frozenset[int]:
    own = () if params.ignore_eos else eos
    return frozenset((*own, *((params.stop_token_ids or ()) if isinstance(params, SamplingParams) else ())))
