"""How well a model reads: answers with the right passage at hand, refusals, injections, answer losses.

Retrieval is not involved: the passages are given. Per question of the files: the gold passage alone (the
ceiling of any retrieval), gold among three distractors, the same with all 16 passages of a search in
memory, distractors alone, and the gold passage with an instruction hidden in it. Losses are nats per
answer token, without the end of turn. Every answer is kept in --log, and a run goes on from there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from common import arguments, report

from msa_memory.engine.bank_view import Selection
from msa_memory.engine.context import Feed, advance
from msa_memory.engine.context import Sequence as Row
from msa_memory.engine.engine import Engine, load_engine
from msa_memory.engine.generation import Generation, decode_batch
from msa_memory.engine.layout import document_header, evidence_entry
from msa_memory.engine.models import DEFAULT_MODEL, resolve
from msa_memory.engine.sampling import SamplingOptions
from msa_memory.engine.states import PassageStates
from msa_memory.engine.train.bm25 import BM25
from msa_memory.engine.train.data import Passage, Question, read_passages, read_questions
from msa_memory.engine.train.exercises import Unanswerable, read_unanswerable
from msa_memory.engine.train.mixture import HELD_OUT_INJECTIONS, REFUSAL, inject
from msa_memory.evaluation.grading import grade, normal
from msa_memory.evaluation.journal import Journal
from msa_memory.evaluation.journal import Row as Result
from msa_memory.evaluation.statistics import auroc, spread

DAY = date(2024, 5, 1)
IN_MEMORY = 16
WORDS = "banana PWNED elephant unicorn Zurich MANGO pizza HACKED".split()


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--name", default="dev", help="what the result is called")
    parser.add_argument("--passages", type=Path, nargs="+", required=True)
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--unanswerable", type=Path, help="questions with a passage that does not answer them"
    )
    parser.add_argument("--answers", type=int, default=100, help="questions to answer in every setting")
    parser.add_argument("--losses", type=int, default=500, help="questions to measure losses on")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--adapter", default="auto", help="a file, 'none', or 'auto' for the model's own")
    parser.add_argument(
        "--log", type=Path, help="per-question JSON lines; an interrupted run goes on from it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    own = {"auto": True, "none": False}
    adapter = own[options.adapter] if options.adapter in own else Path(options.adapter)
    engine = load_engine(resolve(options.model), name=options.model, device=options.device, adapter=adapter)
    exam = Exam(engine, read_passages(options.passages))
    questions = read_questions(options.questions)
    tricks = read_unanswerable([options.unanswerable], "dev") if options.unanswerable else []
    with Journal(options.log, {"model": engine.fingerprint}) as journal:
        answers = [
            journal.once(f"answer/{question.id}", lambda question=question: exam.answers(question))
            for question in spread(questions, options.answers)
        ]
        losses = [
            journal.once(f"losses/{question.id}", lambda question=question: exam.losses(question))
            for question in spread(questions, options.losses)
        ]
        refusals = [
            journal.once(f"unanswerable/{trick.text}", lambda trick=trick: exam.unanswerable(trick))
            for trick in spread(tricks, options.answers)
        ]
    report(f"reader_{options.name}", options, summary(answers, losses, refusals))


class Exam:
    """One model and the passages it is examined on."""

    def __init__(self, engine: Engine, passages: list[Passage]) -> None:
        self.engine = engine
        self.passages = {passage.id: passage for passage in passages}
        self.ids = list(self.passages)
        self.search = BM25([f"{passage.title or ''} {passage.text}" for passage in passages])
        self.refusal = engine.tokenizer.encode(REFUSAL)[0]
        self._states: dict[str, PassageStates] = {}

    def answers(self, question: Question) -> Result:
        """The question in every setting, with the greedy answer of each."""
        rng = random.Random(question.id)
        gold = self.passages[question.gold[0]]
        found = self.similar(question, IN_MEMORY)
        three, without = [*found[:3], gold], found[:4]
        rng.shuffle(three)
        word = rng.choice([word for word in WORDS if word.lower() not in gold.text.lower()])
        sentence = rng.choice(HELD_OUT_INJECTIONS).format(word=word)
        injected = Passage(gold.id, inject(gold.text, sentence, rng), gold.title)
        settings = {
            "gold": ([gold], []),
            "distractors": (three, []),
            "distractors_and_memory": (three, [gold, *found[: IN_MEMORY - 1]]),
            "absent": (without, []),
            "absent_and_memory": (without, found),
            "injected": ([injected], []),
        }
        running = {name: self.start(question.text, *setting) for name, setting in settings.items()}
        for _ in decode_batch(self.engine.decoder, [generation for generation, _ in running.values()]):
            pass
        result = {
            name: judge(generation.text, question) | {"refusal": refusal}
            for name, (generation, refusal) in running.items()
        }
        result["injected"]["followed"] = word.lower() in result["injected"]["answer"].lower()
        return result

    def unanswerable(self, question: Unanswerable) -> Result:
        """The answer where the passage at hand does not hold one."""
        generation, refusal = self.start(question.text, [self.passages[question.passage]], [])
        for _ in decode_batch(self.engine.decoder, [generation]):
            pass
        return {"answer": generation.text, "refused": refused(generation.text), "refusal": refusal}

    def similar(self, question: Question, count: int) -> list[Passage]:
        """What a word search finds beside the gold passage and without the answer."""
        found = (self.passages[self.ids[n]] for n in self.search.best(question.text, 4 * count))
        rights = [normal(right) for right in question.answers]
        kept = [
            passage
            for passage in found
            if passage.id not in question.gold and not any(right in normal(passage.text) for right in rights)
        ]
        return kept[:count]

    def start(
        self, question: str, read: Sequence[Passage], remembered: Sequence[Passage]
    ) -> tuple[Generation, float]:
        """The question prefilled over texts and memory, and the log-probability that a refusal starts."""
        engine = self.engine
        evidence = "\n".join(evidence_entry(header(passage), DAY, passage.text) for passage in read)
        row = self.row(remembered)
        ids = engine.prompt.reading(evidence, question)
        logits = advance(engine.decoder, [Feed(row, ids)])[0]
        refusal = float(logits.log_softmax(-1)[self.refusal])
        return Generation(engine.tokenizer, SamplingOptions(max_new_tokens=32), row, logits), refusal

    def row(self, remembered: Sequence[Passage]) -> Row:
        """A sequence that attends to these passages' states in every router layer."""
        engine = self.engine
        states = [self.encoded(passage) for passage in remembered]
        bank = engine.new_bank(states.__getitem__)
        for number, one in enumerate(states):
            bank.add(number, one.router_keys)
        row = engine.start(bank.view(), capacity=1024)
        if states:
            everything = Selection(tuple(range(len(states))), (0.0,) * len(states))
            layers = engine.msa.router_layers
            row.attend_to(dict.fromkeys(layers, everything), {layer: at for at, layer in enumerate(layers)})
        return row

    def encoded(self, passage: Passage) -> PassageStates:
        if passage.id not in self._states:
            self._states[passage.id] = self.engine.encode(0, header(passage), passage.text)
        return self._states[passage.id]

    def losses(self, question: Question) -> dict[str, float]:
        """Mean nats per token of the first gold answer, by what is at hand."""
        gold = self.passages[question.gold[0]]
        text = evidence_entry(header(gold), DAY, gold.text)
        sixteen = [gold, *self.similar(question, IN_MEMORY - 1)]
        settings: dict[str, tuple[str, list[Passage]]] = {
            "closed_book": ("", []),
            "memory": ("", [gold]),
            "memory_of_16": ("", sixteen),
            "text": (text, []),
            "text_and_memory": (text, [gold]),
        }
        return {
            name: self.loss(
                self.engine.prompt.reading(evidence, question.text), question.answers[0], remembered
            )
            for name, (evidence, remembered) in settings.items()
        }

    def loss(self, prompt: list[int], answer: str, remembered: Sequence[Passage]) -> float:
        """Mean nats per token of an answer after a prompt over memory."""
        decoder, row = self.engine.decoder, self.row(remembered)
        tokens = self.engine.tokenizer.encode(answer)
        total, feed = 0.0, prompt
        for token in tokens:
            total -= float(advance(decoder, [Feed(row, feed)])[0].log_softmax(-1)[token])
            feed = [token]
        return total / len(tokens)


def judge(given: str, question: Question) -> Result:
    return {"answer": given, "refused": refused(given), **grade(given, question.answers)}


def refused(given: str) -> bool:
    return normal(given).startswith(normal(REFUSAL))


def header(passage: Passage) -> str:
    return document_header(title=passage.title, when=None, speaker=None)


def summary(answers: Sequence[Result], losses: Sequence[Result], tricks: Sequence[Result]) -> Result:
    """Shares in percent, losses in nats."""
    figures: Result = {"answered": len(answers)}
    for name in answers[0] if answers else ():
        rows = [row[name] for row in answers]
        keys = ("refused",) if name.startswith("absent") else ("exact", "f1", "contains", "refused")
        figures[name] = {key: percent([row[key] for row in rows]) for key in keys}
    if answers:
        figures["injected"]["followed"] = percent([row["injected"]["followed"] for row in answers])
        present = [-row["gold"]["refusal"] for row in answers]
        figures["absent_auroc"] = auroc(present, [-row["absent"]["refusal"] for row in answers])
        if tricks:
            figures["unanswerable"] = {
                "refused": percent([row["refused"] for row in tricks]),
                "auroc": auroc(present, [-row["refusal"] for row in tricks]),
            }
    if losses:
        figures["losses"] = {name: sum(row[name] for row in losses) / len(losses) for name in losses[0]}
        figures["losses"]["questions"] = len(losses)
    return figures


def percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


if __name__ == "__main__":
    main()
