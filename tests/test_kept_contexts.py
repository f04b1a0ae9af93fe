"""Prompts are read once: the next turn prefills what is new, and forgetting drops what was kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_memory import MemoryConfig, MemoryModel
from msa_memory.engine import serving
from msa_memory.engine.bank_view import Selection
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.kept_contexts import KeptContexts
from msa_memory.testing import open_memory, tiny_model

BRIEF = MemoryConfig(max_new_tokens=6)
SILENT = MemoryConfig(max_new_tokens=6, min_score=2.0)
"""Nothing is ever relevant: the model chats by itself."""
TURNS = ["Who lives in the city?", "And the lion?", "Tell me about the road of yellow brick."]


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prefill of an answer reads from here on."""
    counts: list[int] = []
    forward = serving.advance

    def spy(decoder: object, feeds: list[Feed]) -> object:
        counts.extend(len(feed.ids) for feed in feeds)
        return forward(decoder, feeds)

    monkeypatch.setattr(serving, "advance", spy)
    return counts


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(tiny_model(), device="cpu")


def contexts(memory: MemoryModel) -> KeptContexts:
    return memory._bank().contexts


def talk(memory: MemoryModel, name: str) -> list[dict]:
    session = memory.session(name)
    session.append("system", "Answer like the wizard.")
    return [session.chat(text).model_dump(exclude={"timings"}) for text in TURNS]


class TestAnswers:
    def test_a_turn_prefills_only_what_is_new(self, prefilled: list[int]) -> None:
        with open_memory(config=SILENT) as memory:
            engine, session, turns = memory._engine(), memory.session("s"), [("system", "Be brief.")]
            session.append(*turns[0])
            for number, text in enumerate(TURNS):
                turns.append(("user", text))
                answer = session.chat(text)
                ids = engine.chat_ids(turns)
                # The answer before was decoded, and is read as part of what is new.
                known = engine.chat_ids(turns[:-2]) if number else []
                assert ids[: len(known)] == known
                assert prefilled.pop() == len(ids) - len(known)
                assert answer.usage.prompt_tokens >= len(ids)
                turns.append(("assistant", answer.text))

    def test_a_conversation_is_the_same_with_and_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for config in (SILENT, BRIEF):
            with open_memory(config=config) as memory:
                memory.add("The lion wanted courage.", id="lion", timestamp="2026-01-31")
                seen = talk(memory, "kept")
            with open_memory(config=config) as memory:
                monkeypatch.setattr(KeptContexts, "take", lambda *_: None)
                memory.add("The lion wanted courage.", id="lion", timestamp="2026-01-31")
                expected = talk(memory, "kept")
                monkeypatch.undo()
            for one, other in zip(seen, expected, strict=True):
                for answer in (one, other):  # ids of messages are drawn
                    answer["sources"] = [source["text"] for source in answer["sources"]]
                    answer["rounds"] = len(answer["rounds"])
                assert one == other

    def test_evidence_that_was_just_read_is_not_read_again(self, prefilled: list[int]) -> None:
        with open_memory(config=BRIEF) as memory:
            memory.add("The lion wanted courage.")
            first = memory.query(TURNS[1])
            second = memory.query(TURNS[1])
            assert second.model_dump(exclude={"timings"}) == first.model_dump(exclude={"timings"})
            assert prefilled[0] > 20
            assert prefilled[1] == 1, "the last token, for its logits"

    def test_another_namespace_reads_for_itself(self, prefilled: list[int]) -> None:
        with open_memory(config=SILENT) as memory:
            memory.namespace("a").session("s").chat(TURNS[0])
            memory.namespace("b").session("s").chat(TURNS[0])
            assert prefilled[0] == prefilled[1] > 1

    def test_without_recall_nothing_is_kept(self, prefilled: list[int]) -> None:
        with open_memory(config=BRIEF) as memory:
            for _ in range(2):
                memory.chat([{"role": "user", "content": TURNS[0]}], recall=False)
            assert prefilled[0] == prefilled[1] > 1
            assert len(contexts(memory)) == 0


FORGETTING = """
import sys
from msa_memory.testing import open_memory
with open_memory(sys.argv[1]) as memory:
    memory.forget("lion") if sys.argv[2] == "forget" else memory.update("lion", "The lion slept.")
"""


class TestForgetting:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "bank"

    @pytest.mark.parametrize("verb", ["forget", "update"])
    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_what_showed_a_forgotten_document_is_dropped(
        self, folder: Path, verb: str, elsewhere: bool, prefilled: list[int]
    ) -> None:
        with open_memory(folder, config=BRIEF) as memory:
            memory.add("The lion wanted courage.", id="lion")
            memory.add("Dorothy walked to the city.", id="dorothy")
            memory.query(TURNS[1])
            assert len(contexts(memory)) == 1
            if elsewhere:
                subprocess.run([sys.executable, "-c", FORGETTING, str(folder), verb], check=True)
            elif verb == "forget":
                memory.forget("lion")
            else:
                memory.update("lion", "The lion slept.")
            memory.search(TURNS[1])
            assert len(contexts(memory)) == 0
            answer = memory.query(TURNS[1])
            assert prefilled[1] > 1
            assert not any("courage" in source.text for source in answer.sources)

    def test_an_answer_that_was_running_leaves_nothing_behind(self, folder: Path) -> None:
        with open_memory(folder, config=BRIEF) as memory:
            memory.add("The lion wanted courage.", id="lion")
            stream = memory.stream(TURNS[1])
            next(stream)
            memory.forget("lion")
            memory.search(TURNS[1])  # looks at the bank, as any question does
            assert list(stream)[-1].answer is not None
            assert len(contexts(memory)) == 0

    def test_a_forgotten_instruction_is_dropped_even_when_something_is_added_at_once(
        self, folder: Path
    ) -> None:
        """System messages have no document, so forgetting one takes no passage away."""
        with open_memory(folder, config=BRIEF) as memory, open_memory(folder, config=BRIEF) as other:
            other.session("s").append("system", "Answer with courage.")
            memory.add("The lion wanted courage.", id="lion")
            memory.query(TURNS[1])
            assert len(contexts(memory)) == 1
            other.session("s").forget()
            other.add("Dorothy walked to the city.")
            memory.search(TURNS[1])
            assert len(contexts(memory)) == 0

    def test_adding_drops_nothing(self, folder: Path) -> None:
        with open_memory(folder, config=BRIEF) as memory:
            memory.add("The lion wanted courage.")
            memory.query(TURNS[1])
            memory.add("Dorothy walked to the city.")
            memory.search(TURNS[1])
            assert len(contexts(memory)) == 1


class TestKeptContexts:
    @settings(max_examples=25)
    @given(
        prompts=st.lists(
            st.tuples(st.sampled_from("ab"), st.lists(st.integers(10, 13), min_size=1, max_size=12)),
            max_size=8,
        )
    )
    def test_what_is_known_is_the_longest_common_beginning(
        self, engine: Engine, prompts: list[tuple[str, list[int]]]
    ) -> None:
        kept = KeptContexts(most=100)
        plain: list[tuple[str, list[int]]] = []
        for owner, ids in prompts:
            shared = [
                (next((n for n, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b),
                      min(len(known), len(ids))), place)
                for place, (whose, known) in enumerate(plain) if whose == owner
            ]  # fmt: skip
            longest = min(max((length for length, _ in shared), default=0), len(ids) - 1)
            row = kept.take(owner, 0, {}, ids)
            assert (row.fed_tokens if row else 0) == longest
            fresh = engine.start(None)
            fresh.position = 0
            expected = advance(engine.decoder, [Feed(fresh, ids)])[0]
            if row is None:
                row = engine.start(None)
                row.position = 0
            logits = advance(engine.decoder, [Feed(row, ids[row.fed_tokens :])])[0]
            torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
            kept.keep(owner, row, ids, kept.epoch)
            plain = [(entry.key[0], list(entry.ids)) for entry in kept._kept]
            assert plain[-1] == (owner, ids)

    def test_other_passages_or_positions_are_another_context(self, engine: Engine) -> None:
        kept, ids = KeptContexts(), [10, 11, 12]
        row = engine.start(None)
        row.selections = {1: Selection((4, 2), (0.5, 0.4))}
        advance(engine.decoder, [Feed(row, ids)])
        start = row.position - 3
        kept.keep("a", row, ids, kept.epoch)
        assert kept.take("a", start, {1: Selection((4, 3), (0.5, 0.4))}, ids) is None
        assert kept.take("a", start + 1, row.selections, ids) is None
        assert kept.take("b", start, row.selections, ids) is None
        assert kept.take("a", start, {1: Selection((2, 4), (0.9, 0.1))}, ids) is not None, "order and scores"
        assert len(kept) == 0, "who took it has it"

    def test_number_and_bytes_are_bounded(self, engine: Engine) -> None:
        def read(kept: KeptContexts, token: int) -> None:
            row = engine.start(None, capacity=8)
            advance(engine.decoder, [Feed(row, [token, token])])
            kept.keep("a", row, [token, token], kept.epoch)

        few = KeptContexts(most=3)
        for token in range(10, 20):
            read(few, token)
        assert [entry.ids[0] for entry in few._kept] == [17, 18, 19]
        one = few.nbytes // 3
        small = KeptContexts(most=100, most_bytes=2 * one)
        for token in range(10, 20):
            read(small, token)
            assert small.nbytes <= 2 * one
        assert len(small) == 2

    def test_what_was_read_before_a_clear_is_not_kept(self, engine: Engine) -> None:
        kept = KeptContexts()
        row, epoch = engine.start(None), kept.epoch
        advance(engine.decoder, [Feed(row, [10, 11])])
        kept.clear()
        kept.keep("a", row, [10, 11], epoch)
        assert len(kept) == 0
