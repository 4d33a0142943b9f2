"""Chat messages to a prompt, by the model's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaotui.checkpoint.base import Checkpoint
from miaotui.errors import CheckpointError, RequestError, UsageError
from miaotui.model.special_text import SpecialText, map_strings
from miaotui.model.tokenizer import Tokenizer, read_json_asset

if TYPE_CHECKING:
    import jinja2

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's chat template(s): `render` gives the prompt's text, `encode` its ids.

    A user cannot forge a turn: in `encode`, the text of a special token inside messages, tools, documents or
    keyword arguments stays plain text. Method: when (and only when) such text occurs, the template is rendered with
    it put between marks that no user can write, so that in the output the template's own special tokens can be told
    from the user's (see SpecialText). Otherwise the output is encoded at once; either way the ids of everything
    else are those of transformers' `apply_chat_template`. Added tokens that are not special (`<think>`) are tokens
    wherever they occur, as in transformers.
    """

    def __init__(self, templates: str | Mapping[str, str], tokenizer: Tokenizer) -> None:
        """`templates`: one template, or several by name of which `default` and `tool_use` are known.

        Raises UsageError when the default template has a syntax error.
        """
        self._sources = {"default": templates} if isinstance(templates, str) else dict(templates)
        self._tokenizer = tokenizer
        self._compiled: dict[str, jinja2.Template] = {}
        if "default" in self._sources:
            self._template("default")

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, tokenizer: Tokenizer, override: str | Path | None = None
    ) -> ChatTemplate:
        """The checkpoint's template, or the user's: `override` is a file, or the template's text itself.

        Raises RequestError when the model has none, UsageError when `override` cannot be read or has a fault.
        """
        templates = find_chat_templates(checkpoint) if override is None else read_template(override)
        if not templates:
            raise RequestError(
                f"{checkpoint.path.name} has no chat template.",
                "Give one with --chat-template FILE, or send a plain prompt instead of messages.",
                param="messages",
            )
        return cls(templates, tokenizer)

    @cached_property
    def _special(self) -> SpecialText:
        return SpecialText(self._tokenizer)

    def source(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text of the template that a request with these tools uses."""
        return self._sources[self._choose(tools)]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt's text, as transformers' `apply_chat_template(tokenize=False)` gives it.

        `chat_template_kwargs` of a request (such as `enable_thinking`) and `kwargs` become template variables.
        Raises RequestError where the messages do not fit the template or are not text.
        """
        variables = self._variables(messages, tools, documents, {**kwargs, **(chat_template_kwargs or {})})
        return self._render(variables, add_generation_prompt)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt's ids; special-token text in what users supply stays text. Arguments as for `render`."""
        variables = self._variables(messages, tools, documents, {**kwargs, **(chat_template_kwargs or {})})
        if not self._special.occurs_in(variables):
            text = self._render(variables, add_generation_prompt)
            return self._tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        return self._special.encode(self._render(self._special.mark(variables), add_generation_prompt))

    def _variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What the caller supplied, as fresh plain data."""
        taken = _OWN_VARIABLES.intersection(kwargs)
        if taken:
            raise RequestError(
                f"chat_template_kwargs may not set {sorted(taken)[0]!r}.",
                "Use the request's own field for it.",
                param="chat_template_kwargs",
            )
        plain: dict[str, Any] = map_strings(
            {
                **kwargs,
                "messages": normalise_messages(messages),
                "tools": None if tools is None else [dict(tool) for tool in tools],
                "documents": None if documents is None else [dict(document) for document in documents],
            },
            str,
        )
        return plain

    def _render(self, variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        import jinja2

        from miaotui.model.chat_sandbox import LimitError, render_bounded

        template = self._template(self._choose(variables["tools"]))
        specials = self._tokenizer.special_tokens
        try:
            return render_bounded(template, {**specials, **variables, "add_generation_prompt": add_generation_prompt})
        except LimitError as error:
            raise RequestError(
                f"The chat template was stopped: {error}.", "Use another one with --chat-template.", param="messages"
            ) from error
        except jinja2.TemplateError as error:
            raise RequestError(
                f"The chat template refuses these messages: {str(error).rstrip('.')}.",
                "Change the roles, their order or the fields of the messages.",
                param="messages",
            ) from error
        except Exception as error:  # a template is code of a stranger and may fail in any way
            raise RequestError(
                f"The chat template fails on these messages: {type(error).__name__}: {str(error).rstrip('.')}.",
                "Check that each message has the fields the template reads.",
                param="messages",
            ) from error

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise RequestError(
                f"The model has only the named chat templates {', '.join(sorted(self._sources))}.",
                "Save one of them to a file and give it with --chat-template.",
                param="messages",
            )
        return name

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            import jinja2

            from miaotui.model.chat_sandbox import compile_template

            try:
                self._compiled[name] = compile_template(self._sources[name])
            except jinja2.TemplateSyntaxError as error:
                raise UsageError(
                    f"The chat template has a fault in line {error.lineno}: {error.message}.",
                    "Mend it, or give another one with --chat-template.",
                ) from error
        return self._compiled[name]


def find_chat_templates(checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's templates by name, empty when it has none.

    GGUF: `tokenizer.chat_template` and `tokenizer.chat_template.<name>`. Folder: `chat_template` of
    tokenizer_config.json (a string, or a list of named ones), then `chat_template.jinja` and
    `additional_chat_templates/*.jinja`, which win, as in transformers.
    """
    prefix = "tokenizer.chat_template"
    if checkpoint.format == "gguf":
        names = [key for key in checkpoint.config if key == prefix or key.startswith(prefix + ".")]
        return {key[len(prefix) + 1 :] or "default": str(checkpoint.config[key]) for key in names}
    stated = read_json_asset(checkpoint, "tokenizer_config.json").get("chat_template")
    if isinstance(stated, list):
        templates = {str(entry["name"]): str(entry["template"]) for entry in stated}
    else:
        templates = {} if stated is None else {"default": str(stated)}
    file = checkpoint.asset("chat_template.jinja")
    if file is not None:
        templates["default"] = _read_text(file)
    folder = checkpoint.path / "additional_chat_templates"
    templates.update({extra.stem: _read_text(extra) for extra in sorted(folder.glob("*.jinja"))})
    return templates


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", "Download the model again.") from error


def read_template(override: str | Path) -> dict[str, str]:
    """A user's template: a file's content, or the text itself when it holds Jinja marks. Raises UsageError."""
    if isinstance(override, str) and ("{{" in override or "{%" in override):
        return {"default": override}
    try:
        return {"default": Path(override).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The chat template {override} cannot be read: {error}.", "Give the path of a Jinja template file."
        ) from error


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Fields that are None are left out (many templates would print "None"), lists of text parts become one string,
    and reasoning is found under each of the names that templates read. Raises RequestError for an empty
    conversation, a message without a role, or content that is not text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("There are no messages.", "Send a list of at least one message.", param="messages")
    return [_normalise_message(i, message) for i, message in enumerate(messages)]


def _normalise_message(position: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{position}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} has no role.", "Send objects with role and content.", param=where)
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content")
    if isinstance(content, list | tuple):
        kept["content"] = "\n".join(_part_text(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise RequestError(
            f"The content is a {type(content).__name__}, not text.", "Send a string.", param=f"{where}.content"
        )
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    return kept


def _part_text(where: str, part: Any) -> str:
    """The text of one content part; only text can be served."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RequestError(
            f"Content of type {kind!r} is not supported.", 'Send parts like {"type": "text", "text": "…"}.', param=where
        )
    text: str = part["text"]
    return text
