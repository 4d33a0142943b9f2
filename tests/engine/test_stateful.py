"""Whatever is asked, in whatever order: blocks, sequences and requests always agree, and answers are right."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from miaotui.backends.ops import StepShape
from miaotui.engine.draft import DraftProposer
from miaotui.engine.params import BeamSearchParams, SamplingParams
from miaotui.engine.request import RequestOutput
from tests.engine.toys import EagerSpeculator, Scatterbrain, ToyExecutor, eager, naive_greedy, toy_engine

PREFIXES = [[], list(range(16)), list(range(40)), [5] * 33]


def speculator(guesses: str | None, blocks: int, seqs: int, budget: int) -> EagerSpeculator | None:
    if guesses is None:
        return None
    shape = StepShape(max_tokens=max(budget, 2), max_seqs=seqs, max_logits_rows=seqs, max_model_len=144)
    drafts = {"look-up": None, "twin": ToyExecutor(shape), "scatterbrain": Scatterbrain(shape)}
    return eager(3, drafts[guesses], blocks)


class EngineMachine(RuleBasedStateMachine):
    """Requests of every kind come and go while the engine is stepped; few blocks and seats, small budgets."""

    requests: Bundle[str] = Bundle("requests")

    @initialize(
        blocks=st.integers(9, 30), seqs=st.integers(1, 5), budget=st.integers(1, 50), prefix=st.booleans(),
        rows=st.integers(0, 3), slots=st.integers(0, 12),
        guesses=st.sampled_from([None, None, "look-up", "twin", "scatterbrain"]), runs_on=st.booleans(),
    )  # fmt: skip
    def begin(
        self, blocks: int, seqs: int, budget: int, prefix: bool, rows: int, slots: int, guesses: str | None,
        runs_on: bool,
    ) -> None:  # fmt: skip
        self.folder = TemporaryDirectory()
        file = Path(self.folder.name) / "prefixes" if slots and prefix else None
        self.make = lambda: toy_engine(
            blocks=blocks, seqs=seqs, budget=budget, prefix=prefix, rows=seqs + rows, max_model_len=144,
            file=file, slots=slots, speculator=speculator(guesses, blocks, seqs, budget), runs_on=runs_on,
        )  # fmt: skip
        self.engine = self.make()
        self.prompts: dict[str, list[int]] = {}
        self.greedy: dict[str, int] = {}
        self.streamed: dict[str, list[int]] = {}

    @rule(
        target=requests, prefix=st.sampled_from(PREFIXES), own=st.lists(st.integers(0, 3), min_size=1, max_size=40),
        count=st.integers(1, 50), priority=st.integers(-1, 1), stream=st.booleans(),
    )  # fmt: skip
    def ask(self, prefix: list[int], own: list[int], count: int, priority: int, stream: bool) -> str:
        params = SamplingParams(temperature=0.0, max_tokens=count)
        request = self.engine.add_request(prefix + own, params, priority=priority, stream=stream)
        self.prompts[request] = prefix + own
        self.greedy[request] = count
        return request

    @rule(target=requests, n=st.integers(1, 4), scored=st.booleans(), own=st.lists(st.integers(0, 3), min_size=1))
    def ask_for_several(self, n: int, scored: bool, own: list[int]) -> str:
        params = SamplingParams(n=n, seed=1, max_tokens=8, prompt_logprobs=1 if scored else None)
        return self.engine.add_request(own[:40], params)

    @rule(target=requests, width=st.integers(1, 3), own=st.lists(st.integers(0, 3), min_size=1, max_size=20))
    def search(self, width: int, own: list[int]) -> str:
        width = min(width, self.engine.config.max_num_seqs)
        return self.engine.add_request(own, BeamSearchParams(width, 10))

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.engine.step():
                self.check(output)
            self.engine.check_integrity()

    @rule(request=consumes(requests))
    def cancel(self, request: str) -> None:
        output = self.engine.cancel(request)
        assert output is None or output.finished
        self.greedy.pop(request, None)

    @precondition(lambda self: not self.engine.has_work)
    @rule()
    def restart(self) -> None:
        self.engine.close()
        self.engine = self.make()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            guessing = self.engine._speculator
            if guessing is not None and isinstance(guessing._proposer, DraftProposer):
                guessing._proposer.check_integrity()

    def check(self, output: RequestOutput) -> None:
        request = output.request_id
        if request in self.greedy:
            tokens = self.streamed.setdefault(request, [])
            tokens += output.outputs[0].token_ids
            if output.finished:
                assert tokens == naive_greedy(self.prompts[request], self.greedy[request])

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.has_work:
                break
            for output in self.engine.step():
                self.check(output)
        assert not self.engine.has_work, "the engine makes no progress"
        self.engine.check_integrity()
        assert self.engine.stats.blocks_in_use == 0
        self.engine.close()
        self.folder.cleanup()


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    derandomize=True, print_blob=False,
)  # fmt: skip
