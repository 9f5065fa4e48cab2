"""Rendering chat templates exactly as transformers does: the same sandbox, the same whitespace
rules, the same helper functions.

Templates come with models and are untrusted code: they run in jinja2's
ImmutableSandboxedEnvironment and see nothing but plain data. The one difference is the date:
`strftime_now` returns a date that the caller fixes, so that the same prompt gives the same tokens
every day.
"""

from __future__ import annotations

import json
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


def parse_date(date: str) -> datetime:
    """The datetime of a text like "26 Jul 2024", in any locale. ValueError for another form."""
    try:
        day, month, year = date.split()
        return datetime(int(year), _MONTHS.index(month) + 1, int(day))
    except (ValueError, AttributeError) as error:
        raise ValueError(f'date {date!r} must look like "26 Jul 2024"') from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
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
    return environment.from_string(template)
