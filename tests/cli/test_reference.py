"""docs/cli.md says what the commands say, every option is explained, and every one arrives somewhere."""

from __future__ import annotations

import dataclasses
import inspect
import re

import click
import pytest

from miaotui.cli.main import COMMANDS
from miaotui.cli.options import ENGINE, SAMPLING
from tools import cli_reference

PAGE = cli_reference.PAGE.read_text(encoding="utf-8")
ALL = [(command, option) for command in cli_reference.commands() for option in cli_reference.options(command)]


def test_the_page_is_current() -> None:
    if cli_reference.page() != PAGE:
        pytest.fail("docs/cli.md is out of date: run python tools/cli_reference.py, or make fix")


@pytest.mark.parametrize(("command", "option"), ALL, ids=lambda it: it.name)
def test_every_option_is_explained(command: click.Command, option: click.Option) -> None:
    section = PAGE.split(f"## miaotui {command.name}\n")[1].split("\n## ")[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| `{option.opts[0]}`"))
    said = row.rstrip(" |").rsplit("|", 1)[-1].strip()
    assert len(said.split()) >= 2, f"{option.opts[0]} of {command.name} is not explained"
    assert said.endswith((".", ")")), said


def test_every_command_has_its_section_and_takes_help() -> None:
    assert re.findall(r"^## miaotui (.+)$", PAGE, flags=re.MULTILINE) == list(COMMANDS)


def option_of(decorator: object) -> click.Option:
    @decorator  # type: ignore[operator, untyped-decorator]
    def command() -> None: ...

    (option,) = command.__click_params__
    assert isinstance(option, click.Option)
    return option


def test_engine_options_are_arguments_of_llm() -> None:
    from miaotui.engine.llm import LLM
    from miaotui.engine.paging import PREFIX_CACHE_BYTES

    arguments = inspect.signature(LLM.__init__).parameters
    assert set(ENGINE) <= set(arguments)
    told = {"prefix_cache_bytes": "1G", "keep_packed": "keep", "greedy_screen": "keep"}
    assert PREFIX_CACHE_BYTES == 1 << 30
    assert arguments["keep_packed"].default is True
    for name, decorator in ENGINE.items():
        option = option_of(decorator)
        assert option.name == name
        default = arguments[name].default
        if isinstance(default, int):
            assert f"[default: {told.get(name, default)}]" in (option.help or "")
        elif option.show_default:
            assert option.default == default


def test_sampling_options_are_fields_of_sampling_params() -> None:
    from miaotui.engine.params import SamplingParams

    assert set(SAMPLING) <= {field.name for field in dataclasses.fields(SamplingParams)}
    assert all(option_of(decorator).name == name for name, decorator in SAMPLING.items())
