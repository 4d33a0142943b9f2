"""docs/support.md says what the code's tables and the golden tests say."""

from __future__ import annotations

import pytest

from miaotui.model.families import FAMILIES
from tests.golden.models import CASES
from tools import support_matrix


def test_the_page_is_current() -> None:
    if support_matrix.PAGE.read_text(encoding="utf-8") != support_matrix.page():
        pytest.fail("docs/support.md is out of date: run python tools/support_matrix.py")


def test_every_family_has_golden_cases_from_each_of_its_formats() -> None:
    for family in FAMILIES:
        cases = [case for case in CASES if case.family == family.name]
        assert cases, family.name
        assert family.gguf is None or any(case.gguf for case in cases), family.name
