"""Text to token ids and back, safe for text that nobody vetted.

User text can never produce a control token: ``encode`` works on a copy of the tokenizer from which the
control tokens were removed, so ``<|im_end|>`` in a document is just those ten characters. Only
``encode_prompt`` and the template parts of ``encode_chat`` obey control tokens. Knows no model.
"""

from __future__ import annotations

import codecs
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
    The exceptions are the checkpoint's own: Qwen2 composes Unicode (NFC), SentencePiece models turn ``▁``
    into a space, and SmolLM2 lacks tokens for six control characters (U+0004, 06, 13, 14, 16, 1D), which
    vanish, and for the unassigned planes 4 to 11, which decode to U+FFFD.

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
        self._special_tokens = dict(special_tokens or {})
        spec = _parsed(spec, self._special_tokens.values())
        self._json = json.dumps(spec).encode()  # parsed again for digest() and files(): a tenth of the memory
        self._byte_level = _decodes_bytes(spec.get("decoder"))
        self._control = {t["content"]: int(t["id"]) for t in spec["added_tokens"] if _is_control(t)}
        self._special_ids = frozenset(int(t["id"]) for t in spec["added_tokens"] if t.get("special"))
        self._prompt = _load(self._json)
        _check_ids(self._prompt, spec["added_tokens"])
        self._plain = _load(json.dumps(_without_control(spec, self._control)).encode())
        self._plain.encode_special_tokens = True  # for models other than BPE, which keep their control tokens
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
                f"{path} has no tokenizer.json. Older formats (tokenizer.model, vocab.json) are not "
                "read: save the tokenizer again with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        settings = _read_json(path / "tokenizer_config.json")
        special = {**_special_texts(_read_json(path / "special_tokens_map.json")), **_special_texts(settings)}
        return cls(
            _with_declared_tokens(_read_json(path / "tokenizer.json"), settings),
            chat_template=_folder_template(path, settings),
            special_tokens=special,
            stop_ids=_eos_ids(path / "generation_config.json") | _eos_ids(path / "config.json"),
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
        return self._control.get(text)

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
                "this checkpoint has no chat template and there is no default one: add chat_template.jinja "
                "to its folder, or use an instruction-tuned checkpoint"
            )
        render = self._template.render
        return render(messages, add_generation_prompt=add_generation_prompt, variables=variables)

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
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "variables": variables}
        slots = [{**message, "content": f"\ue0f0{i}\ue0f1"} for i, message in enumerate(messages)]
        frame, rendered = self.render_chat(slots, **options), self.render_chat(messages, **options)
        contents = [message["content"] for message in messages]
        stripped = [content.strip() for content in contents]
        if _fill(frame, contents) != rendered and _fill(frame, stripped) == rendered:
            contents = stripped  # the template trims contents, as Llama 3's does
        return self._encode_frame(frame, contents)

    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides ids and prompts: the vocabulary and the template."""
        spec = json.loads(self._json)
        spec.pop("version", None)
        if "merges" in spec["model"]:
            spec["model"]["merges"] = [_merge_texts(merge)[:2] for merge in spec["model"]["merges"]]
        canonical = json.dumps([spec, self.chat_template, self._special_tokens], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """The Hugging Face files that hold this tokenizer, by name."""
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_tokens}
        settings["clean_up_tokenization_spaces"] = False
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        generation = {"eos_token_id": sorted(self.stop_ids)}
        return {
            "tokenizer.json": self._json,
            "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2).encode(),
            "generation_config.json": json.dumps(generation, indent=2).encode(),
        }

    def _encode_frame(self, frame: str, contents: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for piece in self._control_pattern.split(frame):
            if piece in self._control:
                ids.append(self._control[piece])
            elif piece:
                ids.extend(self.encode(_fill(piece, contents)))
        return ids

    def _declared_stop_ids(self) -> set[int]:
        eos = self._special_tokens.get("eos_token")
        found = {self._control.get(eos or ""), self._end_of_message()}
        return {i for i in found if i is not None}

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
        return self._control[match[0]] if match else None


class TextStream:
    """Turns ids into text one by one, returning only text that later ids cannot change.

    Args:
        tokenizer: the tokenizer that made the ids.
        skip_special: leave control tokens out, as ``decode(skip_special=True)`` does.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer._special_ids if skip_special else frozenset()
        self._byte_level = tokenizer._byte_level
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Add one id; the text that became final, often empty in the middle of a character."""
        token = self._tokenizer._prompt.id_to_token(token_id)
        if token is None or token_id in self._skip:
            return ""
        if self._byte_level:
            return self._utf8.decode(_bytes_of(token))
        self._held.append(token_id)
        # Decoders spoil a whole run of byte-fallback tokens over one bad byte: hold it until it ends.
        return "" if _BYTE_TOKEN.fullmatch(token) else self._release()

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        return self._utf8.decode(b"", final=True) + self._release()

    def _release(self) -> str:
        """Text of the held ids, decoded after one id of context: decoders treat the first id specially."""
        if not self._held:
            return ""
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._held)[len(before) :]
        self._context, self._held = self._held[-1:], []
        return text


def _load(spec: bytes) -> RustTokenizer:
    try:
        return RustTokenizer.from_buffer(spec)
    except Exception as error:  # the binding raises bare Exception
        raise CheckpointError(f"the tokenizer cannot be read: {error}") from error


def _check_ids(tokenizer: RustTokenizer, added: Iterable[Mapping[str, Any]]) -> None:
    """The library numbers added tokens anew, silently, where the file leaves a gap in the ids."""
    for token in added:
        loaded = tokenizer.token_to_id(token["content"])
        if loaded != token["id"]:
            raise CheckpointError(
                f"the tokenizer cannot be read: it declares {token['content']!r} as id {token['id']}, which "
                f"loads as {loaded}; save the tokenizer again with transformers"
            )


def _parsed(spec: Mapping[str, Any], special_texts: Iterable[str]) -> dict[str, Any]:
    try:
        return _normalised(spec, special_texts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer cannot be read: tokenizer.json is malformed ({error!r})"
        ) from error


def _normalised(spec: Mapping[str, Any], special_texts: Iterable[str]) -> dict[str, Any]:
    """The tokenizer without truncation, padding or added BOS, and with its special tokens declared."""
    if not isinstance(spec.get("model"), Mapping):
        raise CheckpointError("the tokenizer cannot be read: tokenizer.json has no 'model' object")
    added = [dict(token) for token in spec.get("added_tokens") or ()]
    vocab = spec["model"].get("vocab")
    known = {token["content"] for token in added}
    for text in sorted(set(special_texts) - known):
        if isinstance(vocab, dict) and text in vocab:
            added.append(_added_token(text, vocab[text]))
    return {**spec, "truncation": None, "padding": None, "post_processor": None, "added_tokens": added}


def _added_token(text: str, token_id: int, *, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, **flags, "special": special}


def _is_control(token: Mapping[str, Any]) -> bool:
    return bool(token.get("special")) or _LOOKS_LIKE_CONTROL.fullmatch(token["content"]) is not None


def _without_control(spec: Mapping[str, Any], control: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizer with no way to write a control token: not whole, not by merging its letters."""
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        marked = [{**token, "special": token["content"] in control} for token in spec["added_tokens"]]
        return {**spec, "added_tokens": marked}
    kept = [token for token in spec["added_tokens"] if token["content"] not in control]
    removed = set(control) - {model.get("unk_token")}
    vocab = {text: i for text, i in model["vocab"].items() if text not in removed}
    vocab.update({token["content"]: token["id"] for token in kept})  # else they would be numbered anew
    merges = [merge for merge in model["merges"] if removed.isdisjoint(_merge_texts(merge))]
    return {**spec, "added_tokens": kept, "model": {**model, "vocab": vocab, "merges": merges}}


def _merge_texts(merge: str | Sequence[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "((?!))")


def _fill(frame: str, contents: Sequence[str]) -> str:
    return _SLOT.sub(lambda match: contents[int(match[1])], frame)


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidDocumentError(
            f"the text holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, "
            "which is not valid Unicode; decode the source with errors='replace' first"
        ) from error
    return text


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _special_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _with_declared_tokens(spec: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Adds tokens that only ``tokenizer_config.json`` declares, as transformers does."""
    added = list(spec.get("added_tokens") or ())
    known = {token["content"] for token in added}
    declared = settings.get("added_tokens_decoder") or {}
    extra = [{**token, "id": int(i)} for i, token in declared.items() if token["content"] not in known]
    return {**spec, "added_tokens": sorted(added + extra, key=lambda token: int(token["id"]))}


def _folder_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    declared = settings.get("chat_template")
    if isinstance(declared, list):
        named = {entry["name"]: entry["template"] for entry in declared}
        declared = named.get("default")
    return declared if isinstance(declared, str) else None


def _eos_ids(file: Path) -> set[int]:
    declared = _read_json(file).get("eos_token_id")
    return {int(i) for i in (declared if isinstance(declared, list) else [declared]) if i is not None}


def _decodes_bytes(decoder: Mapping[str, Any] | None) -> bool:
    if decoder is None:
        return False
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [step["type"] for step in steps] == ["ByteLevel"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte: itself where printable, else U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """Bytes of a byte-level token; a token with a foreign character stands for its own UTF-8."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()
