"""How texts become the token runs a model was trained on: head, documents, question, evidence, answer.

A checkpoint of ``model_type: msa`` gets the reference's literal strings (msa-spec sections 3 and 9); any
other declares its own under ``msa_config["layout"]``. Control tokens come only from the strings here,
never from user text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from typing import Any, Literal

from msa_memory.engine.config import MSAConfig
from msa_memory.engine.tokenizer import Tokenizer
from msa_memory.errors import CheckpointError

__all__ = ["Layout", "PromptLayout", "document_header", "evidence_entry", "read_layout"]

REFERENCE_POSITION = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Literal strings around texts; see ``PromptLayout`` for how they are used.

    ``documents`` is ``"numbered"`` for the reference's ``[i]. text[i]`` with its control tokens, ``"bare"``
    for the header and text alone.
    """

    documents: Literal["numbered", "bare"] = "bare"
    head: str = "<|im_start|>user\n"
    tail: str = "<|im_end|>\n"
    response: str = "<|im_start|>assistant\n"
    document_start: str = "<|im_start|>"
    document_end: str = "<|im_end|>"
    question_before: str = ""
    question_after: str = ""
    delimiter: str = "<|object_ref_end|>"
    reinjection_start: str = "<|im_start|>"
    evidence_before: str = "Memories, oldest first:\n\n"
    evidence_after: str = (
        "\nAnswer the question in a few words, from the memories only. "
        "If they disagree, the newest is right.\nQuestion: "
    )

    refusal: str = "I don't know."
    """What a model says that was trained to tell when the evidence lacks the answer."""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


REFERENCE_LAYOUT = Layout(
    documents="numbered",
    response="<|im_start|>",
    question_before="\nPlease answer the question based on the above historical document information\n\n",
    question_after="\nPlease return all documents related to the question\n",
)


def read_layout(config: Mapping[str, Any]) -> Layout:
    """The layout a checkpoint declares, or its family's default. Raises CheckpointError for unknown keys."""
    base = REFERENCE_LAYOUT if config.get("model_type") == "msa" else Layout()
    declared = (config.get("msa_config") or {}).get("layout") or {}
    known = {field.name for field in fields(Layout)}
    unknown = sorted(set(declared) - known)
    if unknown:
        raise CheckpointError(
            f"msa_config.layout has unknown keys {unknown}; expected some of {sorted(known)}"
        )
    return Layout(**{**base.as_dict(), **declared})


def document_header(*, title: str | None, when: date | None, speaker: str | None) -> str:
    """The line a bare document starts with: its title, date and speaker, as far as it has them."""
    parts = [part for part in (title, when.isoformat() if when else None, speaker) if part]
    return " | ".join(parts) + "\n" if parts else ""


def evidence_entry(header: str, day: date, text: str) -> str:
    """One passage as the model reads it among evidence, headed by its date, title and speaker."""
    head, when = header.strip(), day.isoformat()
    label = head if when in head else f"{when} | {head}" if head else when
    return f"[{label}] {text.strip()}\n"


class PromptLayout:
    """Token runs of one model: the layout's strings through its tokenizer."""

    def __init__(self, layout: Layout, tokenizer: Tokenizer, msa: MSAConfig) -> None:
        self.layout = layout
        self.tokenizer = tokenizer
        self.head = tokenizer.encode_prompt(layout.head)
        self.tail = tokenizer.encode_prompt(layout.tail)
        self.response = tokenizer.encode_prompt(layout.response)
        self.refusal = tokenizer.encode(layout.refusal)
        numbered = layout.documents == "numbered"
        self.document_start = tokenizer.encode_prompt(layout.document_start) if numbered else []
        self.document_end = tokenizer.encode_prompt(layout.document_end) if numbered else []
        start = REFERENCE_POSITION if msa.positions == "reference" else len(self.head)
        self.question_position = start + msa.top_k

    def document(self, number: int, header: str, text: str) -> list[int]:
        """Ids of one passage as the model reads it into memory."""
        if self.layout.documents == "bare":
            return self.tokenizer.encode(header + text)
        return [
            *self.document_start,
            *self.tokenizer.encode(f"[{number}]. {header}{text}[{number}]"),
            *self.document_end,
        ]

    def question(self, question: str, turns_before: str = "") -> tuple[list[int], list[bool]]:
        """Ids of the question as it routes, and which of them route (tail and response head do not).

        ``turns_before`` is what was said just before: it is read, and does not route.
        """
        layout = self.layout
        asked = self.tokenizer.encode(layout.question_before + question + layout.question_after)
        if layout.documents == "bare":
            said = self.tokenizer.encode(turns_before + "\n") if turns_before else []
            return said + asked, [False] * len(said) + [True] * len(asked)
        rest = [*self.tail, *self.response]
        return asked + rest, [True] * len(asked) + [False] * len(rest)

    def later_question_routes(self, question: str) -> list[bool]:
        """Which of ``question``'s ids route in later rounds: all routing ones but a closing newline."""
        ids, routes = self.question(question)
        last = max(index for index, routing in enumerate(routes) if routing)
        if self.tokenizer.decode([ids[last]]) == "\n":
            routes[last] = False
        return routes

    def injection(self, passages: Sequence[tuple[int, str]]) -> list[int]:
        """Ids of original texts under their numbers, without the delimiters around them."""
        return self.tokenizer.encode("".join(f"[{number}]. {text}\n" for number, text in passages))

    def reinjection(self, question: str) -> list[int]:
        """Ids of the question as it is asked again before the answer, without the closing delimiter."""
        asked = self.tokenizer.encode(f"The user's question is: {question}\n")
        return [*self.tokenizer.encode_prompt(self.layout.reinjection_start), *asked]

    def conversation(
        self, turns: Sequence[tuple[str, str]], evidence: str, asked: int, system: str = ""
    ) -> list[int]:
        """Ids of a conversation read with evidence, up to where the answer starts (the head is not included).

        ``turns`` are (role, content). The system's words and the evidence stand in the user turn ``asked``;
        a lone user turn is read as ``reading`` reads it.
        """
        ids: list[int] = []
        for number, (role, content) in enumerate(turns):
            if number == asked:
                said = f"{system}\n\n" if system else ""
                layout = self.layout
                content = said + layout.evidence_before + evidence + layout.evidence_after + content
            if number == 0:
                opening = [*self.tail, *self.response] if role == "assistant" else []
            else:
                opening = self.response if role == "assistant" else self.head
            ids += [*opening, *self.tokenizer.encode(content), *self.tail]
        return [*ids, *self.response]

    def next_turn(self, answer: str, evidence: str, question: str) -> list[int]:
        """Ids that follow on a conversation's last user turn: the answer to it and the next user turn.

        ``evidence`` is what is new of it; it may be empty: what the turn is about stands further up then.
        """
        layout = self.layout
        before = layout.evidence_before + evidence if evidence else ""
        content = (before + layout.evidence_after + question).lstrip()
        return [
            *self.tokenizer.encode(answer),
            *self.tail,
            *self.head,
            *self.tokenizer.encode(content),
            *self.tail,
            *self.response,
        ]

    def follow_up(self, evidence: str, question: str) -> tuple[list[int], list[bool]]:
        """Ids that route a later round of router evidence: the newest evidence, then the question."""
        ids = self.tokenizer.encode(evidence + "\n") + self.tokenizer.encode(question)
        return ids, [True] * len(ids)

    def reading(self, evidence: str, question: str) -> list[int]:
        """Ids of evidence and question up to where the answer starts (the head is not included)."""
        layout = self.layout
        body = layout.evidence_before + evidence + layout.evidence_after + question
        return [*self.tokenizer.encode(body), *self.tail, *self.response]
