"""Text to token ids and back, safe for text that nobody vetted.

User text can never produce a control token: ``encode`` works on a copy of the tokenizer from which the
control tokens were removed, so ``<|im_end|>`` in a document is just those ten characters. Only
``encode_prompt`` and the template parts of ``encode_chat`` obey control tokens. Knows no model.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from msa_memory.engine.chat_template import ChatTemplate
from msa_memory.errors import CheckpointError, ConfigError, InvalidDocumentError

__all__ = ["TextStream", "Tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Checkpoints declare many control tokens without the "special" flag (Qwen's <think>, <tool_call>).
_LOOKS_LIKE_CONTROL = re.compile(r"<[^\s<>]+>")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Placeholders for message contents while a template renders: private-use characters no template inspects.
_SLOT = re.compile("\ue0f0([0-9]+)\ue0f1")


class Tokenizer:
    """One checkpoint's tokenizer, its stop tokens and its chat template. Safe to share between threads.

    ``decode(encode(text)) == text`` for every text the checkpoint's vocabulary and normaliser can carry.
    Exceptions are the checkpoint's own: Qwen2 composes Unicode (NFC), SentencePiece models turn ``▁`` into
    a space, and SmolLM2 has no token for six control characters (U+0004, 06, 13, 14, 16, 1D) and for most
    unassigned planes, which vanish.

    Args:
        spec: the contents of a ``tokenizer.json``.
        special_tokens: texts of ``bos_token``, ``eos_token`` and so on, as the template may name them.
        stop_ids: ids that end an answer; the template's end-of-message token is added.

    Raises:
        CheckpointError: the tokenizer or its template cannot be read.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:
        self._spec = {**spec, "truncation": None, "padding": None, "post_processor": None}
        self._special_tokens = dict(special_tokens or {})
        self._added = _added_ids(self._spec)
        self._control = _control_tokens(self._spec, self._special_tokens.values())
        self._prompt = _load(self._spec)
        self._plain = _load(_without_control(self._spec, set(self._control)))
        self._plain.encode_special_tokens = True
        self._special_ids = {self._added[text] for text in self._control if text in self._added}
        self._template = ChatTemplate(chat_template, self._special_tokens) if chat_template else None
        self._control_pattern = _alternatives(self._control)
        self.vocab_size = 1 + max(self._prompt.get_vocab(with_added_tokens=True).values(), default=-1)
        self.stop_ids = frozenset(stop_ids) | self._declared_stop_ids()

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and its companions from a Hugging Face folder.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{path} has no tokenizer.json. Older formats (tokenizer.model, vocab.json) are not read: save the "
                "tokenizer again with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        settings = _read_json(path / "tokenizer_config.json")
        special = {**_special_texts(_read_json(path / "special_tokens_map.json")), **_special_texts(settings)}
        return cls(
            _with_declared_tokens(_read_json(path / "tokenizer.json"), settings),
            chat_template=_folder_template(path, settings),
            special_tokens=special,
            stop_ids=_eos_ids(_read_json(path / "generation_config.json")) | _eos_ids(_read_json(path / "config.json")),
        )

    @classmethod
    def from_gguf(cls, path: Path) -> Tokenizer:
        """Read the tokenizer inside a GGUF file.

        Raises:
            CheckpointError: the file is damaged or its tokenizer is of an unknown kind.
        """
        from msa_memory.engine.gguf_checkpoint import read_tokenizer

        return read_tokenizer(path)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the chat template; None when the checkpoint has none."""
        return self._template.source if self._template else None

    def encode(self, text: str) -> list[int]:
        """Ids of user text, taken literally: never a control token, no BOS or EOS.

        Raises:
            InvalidDocumentError: ``text`` holds half a surrogate pair and is not valid Unicode.
        """
        ids: list[int] = self._plain.encode(_valid(text), add_special_tokens=False).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """``encode(text)`` and, for every id, the half-open character range of ``text`` it came from.

        A character of several tokens gives each of them its range.
        """
        encoding = self._plain.encode(_valid(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of text the engine wrote itself: control tokens are obeyed, no BOS or EOS is added."""
        ids: list[int] = self._prompt.encode(_valid(text), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are not valid UTF-8 become U+FFFD, unknown ids vanish."""
        kept = [i for i in ids if i not in self._special_ids] if skip_special else list(ids)
        text: str = self._prompt.decode(kept, skip_special_tokens=False)
        return text

    def token_id(self, text: str) -> int | None:
        """Id of the control token ``text``; None when the vocabulary has no such control token."""
        return self._added.get(text)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages (``role``, ``content``) as the checkpoint's prompt text.

        Encode it with ``encode_prompt`` only if every content is trusted; ``encode_chat`` is the safe way.

        Raises:
            ConfigError: the checkpoint has no chat template, or it refused these messages.
            CheckpointError: the template is broken.
        """
        if self._template is None:
            raise ConfigError(
                "this checkpoint has no chat template and there is no default one: add chat_template.jinja to its "
                "folder, or use an instruction-tuned checkpoint"
            )
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a rendered conversation in which only the template's own control tokens are obeyed.

        Equal to ``encode_prompt(render_chat(...))`` when no content looks like a control token.
        """
        slots = [{**message, "content": f"\ue0f0{i}\ue0f1"} for i, message in enumerate(messages)]
        frame = self.render_chat(slots, add_generation_prompt=add_generation_prompt, variables=variables)
        rendered = self.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        contents = [message["content"] for message in messages]
        stripped = [content.strip() for content in contents]
        if _fill(frame, contents) != rendered and _fill(frame, stripped) == rendered:
            contents = stripped  # the template trims contents, as Llama 3's does
        return self._encode_frame(frame, contents)

    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides ids and prompts: the vocabulary and the template."""
        spec = {key: value for key, value in self._spec.items() if key != "version"}
        model = spec.get("model", {})
        if "merges" in model:
            merges = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
            spec["model"] = {**model, "merges": merges}
        canonical = json.dumps([spec, self.chat_template, sorted(self._special_tokens.items())], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """The Hugging Face files that hold this tokenizer, by name."""
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_tokens}
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        generation = {"eos_token_id": sorted(self.stop_ids)}
        return {
            "tokenizer.json": json.dumps(self._spec, ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2).encode(),
            "generation_config.json": json.dumps(generation, indent=2).encode(),
        }

    def _encode_frame(self, frame: str, contents: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for piece in self._control_pattern.split(frame):
            if piece in self._control and piece in self._added:
                ids.append(self._added[piece])
            elif piece:
                ids.extend(self.encode(_fill(piece, contents)))
        return ids

    def _declared_stop_ids(self) -> set[int]:
        eos = self._special_tokens.get("eos_token")
        stops = {self._added[eos]} if eos in self._added else set()
        end = self._end_of_message()
        return stops if end is None else stops | {end}

    def _end_of_message(self) -> int | None:
        """The control token the template writes right after an assistant's message, such as <|im_end|>."""
        if self._template is None:
            return None
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ue0f01\ue0f1"}]
        try:
            rendered = self.render_chat(messages, add_generation_prompt=False)
        except (CheckpointError, ConfigError):
            return None  # a template for other roles; the declared end tokens remain
        tail = rendered.rpartition("\ue0f01\ue0f1")[2].lstrip()
        match = self._control_pattern.match(tail)
        return self._added.get(match[0]) if match else None


class TextStream:
    """Turns ids into text one by one, returning only text that later ids cannot change.

    Args:
        tokenizer: the tokenizer that made the ids.
        skip_special: leave control tokens out, as ``decode(skip_special=True)`` does.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer._special_ids if skip_special else frozenset()
        self._bytes = _token_bytes(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Add one id; the text that became final, often empty in the middle of a character."""
        if token_id in self._skip:
            return ""
        if self._bytes is not None:
            return self._utf8.decode(self._bytes(token_id))
        self._held.append(token_id)
        return "" if self._is_byte(token_id) else self._release()

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        return self._utf8.decode(b"", final=True) if self._bytes is not None else self._release()

    def _is_byte(self, token_id: int) -> bool:
        """A byte-fallback token: one bad byte spoils the whole run, so a run is held until it ends."""
        token = self._tokenizer._prompt.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _release(self) -> str:
        """Text of the held ids, decoded after one id of context: decoders treat the first id specially."""
        if not self._held:
            return ""
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._held)[len(before) :]
        self._context, self._held = self._held[-1:], []
        return text
