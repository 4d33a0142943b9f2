"""Whatever is sent within, or a little outside of, our own OpenAPI document: never a 5xx, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error

from tests.serve.serving import Server, serving

EXAMPLES = 60
"""For each endpoint and way of generating."""

OURS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def fuzzed(demo_gguf: Path) -> Iterator[Server]:
    with serving(demo_gguf, max_num_seqs=8, max_model_len=64) as started:
        yield started
        started.quiet()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", OURS)
def test_no_request_is_a_failure_of_ours(fuzzed: Server, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    (operation,) = [found.ok() for found in schema.get_all_operations() if found.ok().path == path]
    statuses = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Case) -> None:
        response = case.call(timeout=60)
        statuses.add(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])

    ask()
    assert statuses
