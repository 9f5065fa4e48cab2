"""Rendering chat templates exactly as transformers does: the same sandbox, the same whitespace
rules, the same helper functions.

Templates come with models and are untrusted code: they run in jinja2's
ImmutableSandboxedEnvironment and see nothing but plain data. The one difference is the date:
`strftime_now` returns a date that the caller fixes, so that the same prompt gives the same tokens
every day.
"""

from __future__ import annotations

import html
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser

DEFAULT_DATE = "26 Jul 2024"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    date: str = DEFAULT_DATE,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation.

    messages: [{"role": "user", "content": "..."}, ...]; variables: what else the template may read
    (bos_token, ...). Raises ValueError with the template's own reason where it refuses (Gemma: no
    system role), or where it is not valid jinja2.
    """
    import jinja2

    day = parse_date(date)
    try:
        return _compiled(template).render(
            messages=[dict(m) for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: day.strftime(str(form)),
            **{"date_string": date, **(variables or {})},
        )
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise ValueError(
            f"the model's chat template refused a conversation of roles {roles}:"
            f" {error or type(error).__name__}"
        ) from error


#: Variables of a template that calls set themselves.
_RESERVED = ("messages", "add_generation_prompt", "strftime_now", "raise_exception")


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables for a chat template as a dictionary that JSON can hold.

    Raises TypeError for anything but a mapping of names, ValueError for a variable that every call
    sets itself and for values that JSON cannot hold.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"template_options must be a dictionary of variables, not {options!r}")
    taken = next((name for name in _RESERVED if name in options), None)
    if taken is not None:
        raise ValueError(f"template_options: {taken!r} is set by every call; leave it out")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(options)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"template_options holds a value that JSON cannot: {error}") from None
    return plain


def warn_unread(template: str, options: Mapping[str, Any]) -> None:
    """Warns of options that the template does not read."""
    from jinja2 import TemplateError, meta

    try:
        environment = _environment()
        read = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:  # rendering says what is wrong with it
        return
    read -= set(environment.globals)
    unread = [name for name in options if name not in read and name != "chat_template"]
    if unread:
        warnings.warn(
            f"template_options: the chat template does not read {', '.join(map(repr, unread))}; it"
            f" reads {', '.join(map(repr, sorted(read)))}",
            stacklevel=2,
        )


def as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a list of parts, [{"type": "text", "text": ...}], as templates of
    models that also see images read it.
    """
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str)
        else dict(m)
        for m in messages
    ]


def holds(rendered: str, text: str) -> bool:
    """Whether a rendered prompt holds a text; white space, case and the escapes of JSON and HTML
    may differ, because templates trim and quote.
    """

    def plain(value: str) -> str:
        return re.sub(r"\s+", "", value).casefold()

    forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    wholes = plain(rendered), plain(html.unescape(rendered))
    return any(plain(form) in whole for form in forms for whole in wholes)


def parse_date(date: str) -> datetime:
    """The datetime of a text like "26 Jul 2024", in any locale. ValueError for another form."""
    try:
        day, month, year = date.split()
        return datetime(int(year), _MONTHS.index(month) + 1, int(day))
    except (ValueError, AttributeError) as error:
        raise ValueError(f'date {date!r} must look like "26 Jul 2024"') from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant wrote, for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML characters
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
