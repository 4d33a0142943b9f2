"""Tasks through the engine: scored as by hand, compared example by example, and a needle that is where it is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from miaotui.errors import UsageError
from miaotui.measure import needle, tasks
from miaotui.measure.lm_eval import EngineLM
from miaotui.measure.quality_data import Window
from miaotui.measure.scoring import Opened, Rows, Settings
from miaotui.measure.tasks import Asked

CHOICES = """
task: opposites
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The opposite of {{{{thing}}}} is"
doc_to_choice: [cold, xylophone]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
"""
FREE = """
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "1, 2, 3, 4, 5,"
doc_to_target: "6"
generation_kwargs: {{until: [","], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - {{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}
"""
DOCS = [{"thing": "hot", "answer": 0}, {"thing": "warm", "answer": 0}, {"thing": "hot", "answer": 1}]
"""The last is wrong."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks of our own, whose data lies beside them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (tmp_path / "opposites.yaml").write_text(CHOICES.format(file=file))
    (tmp_path / "counting.yaml").write_text(FREE.format(file=file))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_choices_and_free_answers_of_the_demo(demo_gguf: Path, folder: Path) -> None:
    asked = Asked(("opposites", "counting"), folder=str(folder))
    report = tasks.evaluate(str(demo_gguf), asked, Settings(), (str(demo_gguf), Settings(kv_cache_dtype="int8")))
    found = {task["task"]: task for task in report["tasks"]}
    assert {name: task["metric"] for name, task in found.items()} == {"opposites": "acc", "counting": "exact_match"}
    assert all(task["examples"] == 3 for task in found.values())
    assert found["opposites"]["score"] == pytest.approx(2 / 3)
    assert found["counting"]["score"] == found["counting"]["reference_score"] == 1.0
    assert found["counting"]["difference"] == 0.0
    assert found["counting"]["p_value"] == 1.0
    json.dumps(report)


def test_scores_are_those_of_whole_windows(demo_gguf: Path) -> None:
    """Choices after the same beginning share what was read of it, and their scores do not change by that."""
    lm = EngineLM(str(demo_gguf), Settings())
    pairs = [
        ("The sky is very", " blue today"),
        ("The sky is very", " green"),
        ("The sky was", " blue"),
        ("The", " sky"),
    ]
    try:
        found = lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    finally:
        lm.close()
    opened = Opened.of(str(demo_gguf))
    scorer = opened.load(Settings(), 64)
    with Rows() as rows:
        for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
            before = opened.tokenizer.encode(context)
            ids = np.array(opened.tokenizer.encode(context + continuation), np.int32)
            nll = rows.nll(scorer, Window(ids, len(before)))
            assert score == pytest.approx(-nll.sum(), rel=1e-6)
            assert not greedy or nll.max() < 3
    scorer.close()


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_not_there_is_named(demo_gguf: Path) -> None:
    with pytest.raises(UsageError, match="There is no task nonsense_task"):
        tasks.evaluate(str(demo_gguf), Asked(("nonsense_task",)), Settings())


def test_a_needle_stands_where_it_is_said(demo_gguf: Path) -> None:
    opened = Opened.of(str(demo_gguf))
    for text in needle.texts(opened, [512]):
        assert 480 <= len(text.prompt) <= 512
        whole = opened.tokenizer.decode(text.prompt.tolist())
        number = opened.tokenizer.decode(text.number.tolist()).strip()
        assert whole.count(number) == 1
        at = whole.index(number) / len(whole)
        assert at == pytest.approx(text.depth, abs=0.12)
        assert whole.endswith("is")


def test_the_demo_finds_needles_nearby(demo_gguf: Path) -> None:
    results = needle.run(str(demo_gguf), Settings(), lambda done, total: None, lengths=[512])
    assert len(results) == len(needle.DEPTHS)
    assert needle.score(results).value >= 0.6
    assert all(one["nll"] < 3 for one in results if one["found"])
