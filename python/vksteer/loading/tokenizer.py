"""Text to tokens and back, and the model's chat template. Only this module adds the
beginning-of-sequence token (BOS), and it refuses two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.types import PathLike
from .added_tokens import add_declared_tokens, declared_add_bos, optional_json
from .byte_level_files import load_byte_level
from .chat_template import DEFAULT_DATE, as_parts, check_options, holds, render, warn_unread
from .library_errors import adds_first, library_errors
from .prompt_rows import prompt_list, refuse_surrogates
from .tokenizer_files import folder_templates, load_backend

if TYPE_CHECKING:
    import tokenizers

    from .gguf_file import GGUFFile

#: Instructions and answers that end in different kinds of characters: what follows all of them
#: belongs to the template.
_PROBES = ("Tell me about rivers", "Name 7", "Is it raining?", "Stop. Go (now)")


class Tokenizer:
    """A model's tokenizer.

    Attributes: backend (tokenizers.Tokenizer), special {name: text} ("bos_token", ...), bos_id (int
    or None), add_bos (whether plain texts begin with BOS), chat_template (jinja2 text or None),
    named_templates {name: jinja2 text}, template_options (variables that every rendering of a
    prompt passes to the template).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        eos_ids: Iterable[int] = (),
        named_templates: Mapping[str, str] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """add_bos None: as the post-processor of `backend` does. template_options: as in
        `Model.from_pretrained`; ValueError where there is no chat template to read them.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = dict(special or {})
        self.named_templates = dict(named_templates or {})
        self.template_options = check_options(template_options)
        self.chat_template = self._chosen_template(chat_template)
        self.bos_id = self._id_of("bos_token")
        if add_bos is None:
            add_bos = self.bos_id is not None and adds_first(backend) == [self.bos_id]
        self.add_bos = bool(add_bos) and self.bos_id is not None
        self._eos_ids = tuple(eos_ids)

    # ---- where tokenizers come from ----

    @classmethod
    def from_folder(
        cls,
        folder: PathLike,
        *,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Tokenizer | None:
        """From tokenizer.json (or the vocab.json and merges.txt of GPT-2's and Qwen 2's
        tokenizers), tokenizer_config.json, special_tokens_map.json, added_tokens.json and
        chat_template.jinja of a folder; None without the first.

        eos_ids, bos_id: what config.json and generation_config.json say; bos_id is used where no
        file names the BOS token. template_options: as in `Model.from_pretrained`. Raises ModelError
        for files that cannot be read.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        settings = optional_json(folder / "tokenizer_config.json")
        if path.exists():
            backend = load_backend(path)
        else:
            found = load_byte_level(folder, settings)
            if found is None:
                return None
            backend, settings = found
        special = add_declared_tokens(backend, folder, settings).texts
        listed = optional_json(folder / "special_tokens_map.json")
        if "bos_token" not in settings and "bos_token" not in listed and bos_id is not None:
            text = backend.id_to_token(bos_id)
            if text is not None:
                special["bos_token"] = text
        templates = folder_templates(folder, settings)
        return cls(
            backend,
            special=special,
            chat_template=templates.get("default"),
            add_bos=declared_add_bos(backend, folder, settings, special.get("bos_token")),
            eos_ids=eos_ids,
            named_templates=templates,
            template_options=template_options,
        )

    @classmethod
    def from_gguf(
        cls,
        file: GGUFFile,
        *,
        d_vocab: int | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Tokenizer | None:
        """From the metadata of an open GGUFFile. d_vocab: the embedding's rows, to check against.
        template_options: as in `Model.from_pretrained`.

        None where the file carries no vocabulary, and with a warning where it names a kind of
        tokenizer or a pre-tokenizer that is not known.
        Raises ModelError for a vocabulary that is damaged or does not fit the embedding.
        """
        from . import gguf_tokenizer

        arguments = gguf_tokenizer.arguments(file, d_vocab)
        return None if arguments is None else cls(**arguments, template_options=template_options)

    @cached_property
    def fingerprint(self) -> str:
        """A hash over vocabulary, rules, template and its options: tells whether two models read
        the same text as the same tokens.
        """
        options = repr(sorted(self.template_options.items())) if self.template_options else ""
        return hashlib.sha256(
            (self.backend.to_str() + repr(self.chat_template) + options).encode()
        ).hexdigest()[:16]

    # ---- plain text ----

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The tokens of a text. add_bos: None = as the model's own tokenizer does. Special tokens
        written in the text are recognised.

        Raises ValueError where BOS would stand twice, TypeError for anything but a str, ModelError
        where the tokenizer's file is damaged in a way that only shows now.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, got {type(text).__name__}")
        ids = self._ids(text)
        if add_bos is None:
            add_bos = self.add_bos
        if add_bos:
            if self.bos_id is None:
                raise ValueError("this tokenizer has no beginning-of-sequence token")
            if ids[:1] == [self.bos_id]:
                raise ValueError(
                    f"the text already begins with {self.special['bos_token']!r}, which is added by"
                    " encode: remove it, or pass add_bos=False"
                )
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids (any sequence or array of ints). skip_special leaves out special
        tokens.
        """
        with library_errors("the tokenizer cannot decode tokens"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> StreamingDecoder:
        """A decoder for text that appears token by token: `push(id)` returns the text that has
        become certain, "" while a character is incomplete, and `flush()` the rest; together they
        are `decode` of all tokens.

        skip_special: leave out special tokens (default True). Every call returns a new decoder.
        """
        return StreamingDecoder(self, skip_special)

    def token(self, index: int) -> str:
        """One token as readable text.

        index: its id. A token that is no whole character gives U+FFFD, an id above the vocabulary
        "".
        Raises ValueError for what is no number and OverflowError for a negative id.
        """
        return self.decode([index])

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Each token by itself as readable text, one str for each id.

        ids: any iterable of ints, an array included; otherwise as `token`. The texts joined need
        not be `decode(ids)`, which may merge tokens into characters. Raises as `token`.
        """
        return self.backend.decode_batch([[int(i)] for i in ids], skip_special_tokens=False)

    def id(self, token: str) -> int:
        """The id of a token as the vocabulary spells it; KeyError if there is none."""
        index = self.backend.token_to_id(token)
        if index is None:
            raise KeyError(f"there is no token {token!r}")
        return index

    # ---- chats ----

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        date: str = DEFAULT_DATE,
        **variables: Any,
    ) -> str:
        """The conversation as the template's text. messages: [{"role": ..., "content": ...}], given
        to the template as lists of content parts where it leaves texts out; variables: anything
        else the template reads, in place of those of template_options.

        ValueError for a model without a template.
        """
        if self._content_parts:
            messages = as_parts(messages)
        return self._rendered(messages, add_generation_prompt, date, variables)

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        date: str,
        variables: Mapping[str, Any],
    ) -> str:
        template = self.chat_template
        if template is None:
            raise ValueError(self._no_template())
        options = {k: v for k, v in self.template_options.items() if k != "chat_template"}
        return render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            date=date,
            variables={**self.special, **options, **variables},
        )

    def _no_template(self) -> str:
        if self.named_templates:
            names = list(self.named_templates)
            return (
                "this model has several chat templates and none is named 'default':"
                f" {', '.join(map(repr, names))}; choose one with"
                f" template_options={{'chat_template': {names[0]!r}}}"
            )
        return (
            "this model has no chat template (a base model, or files without one), so a str"
            " cannot be taken as an instruction: pass token lists, for example"
            " model.tokenizer.encode(text)"
        )

    def _chosen_template(self, default: str | None) -> str | None:
        """The template that template_options names, or the default one."""
        name = self.template_options.get("chat_template")
        if name is not None:
            if name not in self.named_templates:
                raise ValueError(
                    f"template_options: there is no chat template {name!r}; there are"
                    f" {', '.join(map(repr, self.named_templates)) or 'none'}"
                )
            default = self.named_templates[name]
        if self.template_options:
            if default is None:
                self.chat_template = None
                raise ValueError(f"template_options has no effect: {self._no_template()}")
            warn_unread(default, self.template_options)
        return default

    @cached_property
    def _content_parts(self) -> bool:
        """Whether the template reads messages as lists of parts: with a text it leaves the
        instruction out, with parts it does not.
        """
        if self.chat_template is None:
            return False
        messages = [{"role": "user", "content": _PROBES[0]}]
        for parts in (False, True):
            try:
                given = as_parts(messages) if parts else messages
                if holds(self._rendered(given, True, DEFAULT_DATE, {}), _PROBES[0]):
                    return parts
            except ValueError:  # the template's own refusal
                continue
        return False

    def chat_tokens(
        self,
        prompts: Any,
        system: str | None = None,
        response: Any = None,
        date: str = DEFAULT_DATE,
        **variables: Any,
    ) -> list[list[int]]:
        """Prompts as token lists, ready to run.

        prompts: one prompt or a list. A str is an instruction: it goes through the template, with
        the generation prompt after it. A list or array of ints is tokens and stays as it is.
        system: a system message for the instructions. response: a str or tokens to append, one for
        all or one per prompt. BOS is there exactly as often as the template writes it; twice is
        refused (ValueError).
        """
        rows = prompt_list(prompts)
        responses = [None] * len(rows) if response is None else prompt_list(response)
        if len(responses) == 1 and len(rows) > 1:
            responses = responses * len(rows)
        if len(responses) != len(rows):
            raise ValueError(
                f"{len(responses)} responses for {len(rows)} prompts: pass one for all, or one per"
                " prompt"
            )
        result = []
        for i, (row, answer) in enumerate(zip(rows, responses)):
            ids = (
                self._instruction(row, system, date, variables)
                if isinstance(row, str)
                else list(row)
            )
            if answer is not None:
                ids += self._ids(answer) if isinstance(answer, str) else answer
            self.refuse_double_bos(ids, f"prompt {i}")
            result.append(ids)
        return result

    def refuse_double_bos(self, ids: Sequence[int], what: str = "the prompt") -> None:
        """ValueError if the tokens begin with BOS twice."""
        if self.bos_id is not None and len(ids) >= 2 and ids[0] == ids[1] == self.bos_id:
            raise ValueError(
                f"{what} begins with {self.special['bos_token']!r} twice, which shifts everything:"
                " the template or encode adds it already, so leave it out of the text"
            )

    @cached_property
    def post_instruction_tokens(self) -> tuple[int, ...]:
        """What the template puts after an instruction, the generation prompt included.
        ValueError without a template.
        """
        return self._common_suffix(
            [self._instruction(probe, None, DEFAULT_DATE, {}) for probe in _PROBES]
        )

    @cached_property
    def end_of_turn(self) -> tuple[int, ...]:
        """The token that ends an answer: the first special token that the template puts after one;
        () where it puts none, or is none.
        """
        if self.chat_template is None:
            return ()
        try:
            texts = [
                self.render(
                    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": probe}],
                    add_generation_prompt=False,
                )
                for probe in _PROBES
            ]
        except ValueError:  # a template that takes no answers
            return ()
        special = self.special_ids
        return next(
            ((i,) for i in self._common_suffix([self._ids(t) for t in texts]) if i in special), ()
        )

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends a generation: of config.json, generation_config.json or GGUF
        metadata, the tokenizer's own eos_token, and the template's end of turn.
        """
        own = self._id_of("eos_token")
        return tuple(
            dict.fromkeys([*self._eos_ids, *([] if own is None else [own]), *self.end_of_turn])
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens: those that `skip_special` leaves out."""
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    # ---- inside ----

    def _ids(self, text: str) -> list[int]:
        refuse_surrogates(text)
        with library_errors("the tokenizer cannot encode a text"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def _id_of(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special[name]) if name in self.special else None

    def _instruction(
        self, text: str, system: str | None, date: str, variables: Mapping[str, Any]
    ) -> list[int]:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        for message in messages:
            refuse_surrogates(message["content"])
        rendered = self.render(messages, date=date, **variables)
        for message in messages:
            if not holds(rendered, message["content"]):
                what = "instruction" if message["role"] == "user" else "system message"
                raise ValueError(
                    f"the model's chat template leaves the {what} out: of"
                    f" {_short(message['content'])} it makes {_short(rendered)}. Render the prompt"
                    " yourself and pass token lists: model.tokenizer.encode(text)"
                )
        return self._ids(rendered)

    @staticmethod
    def _common_suffix(lists: list[list[int]]) -> tuple[int, ...]:
        count = 0
        while count < min(map(len, lists)) and len({ids[-1 - count] for ids in lists}) == 1:
            count += 1
        return tuple(lists[0][len(lists[0]) - count :])


class StreamingDecoder:
    """Text as it appears: `push` returns what has become certain, `flush` the rest. Together they
    are `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        # decoding starts here, one push before what is new: a token's text depends on the token
        # before it
        self._window = 0
        self._done = 0  # tokens whose text has been returned
        self._text: list[str] = []

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        self._ids.append(int(token))
        before = self._decode(self._ids[self._window : self._done])
        now = self._decode(self._ids[self._window :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        piece = now[len(before) :]
        self._window, self._done = self._done, len(self._ids)
        self._text.append(piece)
        return piece

    def flush(self) -> str:
        """What is left, incomplete characters as U+FFFD."""
        said, everything = "".join(self._text), self._decode(self._ids)
        rest = everything[len(said) :] if everything.startswith(said) else ""
        self._text.append(rest)
        self._window = self._done = len(self._ids)
        return rest


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 160 else shown[:157] + "..."
