"""The inspection page: it shows what the engine computed, and nothing stored in a memory can act in it."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from msa_memory.cli import app
from msa_memory.errors import ConfigError, StorageError
from msa_memory.inspection import Findings, look, page, render, write_page
from msa_memory.inspection.findings import Excerpted, SeenDocument
from msa_memory.inspection.shown import as_html, as_text
from msa_memory.memory import MemoryModel
from msa_memory.testing import open_memory, tiny_model
from msa_memory.types import Document

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "img", "hr", "input", "link"}
ATTACKS = [
    "<script>document.title='pwned'</script>",
    "</script><script>document.title='pwned'</script>",
    "</style><script>document.title='pwned'</script>",
    "</title></pre></div></details><img src=x onerror=\"document.title='pwned'\">",
    '"><svg onload="document.title=\'pwned\'">',
    "' onmouseover='document.title=1' x='",
    "<!--<script>document.title='pwned'</script>",
    "<iframe srcdoc=\"<script>parent.document.title='pwned'</script>\"></iframe>",
    '<meta http-equiv=refresh content="0;url=data:text/html,pwned">',
    "<base href=//evil.example><link rel=stylesheet href=//evil.example/x.css>",
    "{{ 7*7 }}{% for x in range(9) %}{{ x }}{% endfor %}",
    "\x1b[31mred\x1b]0;title\x07 \x00 \u202egnp.exe\u2066 \u200b \ufeff \U000e0041",
]
HOSTILE = " ".join(ATTACKS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def people(model: Path) -> Iterator[MemoryModel]:
    with open_memory(model=model) as memory:
        for id, text in {
            "bob": "Bob lives in Oslo and repairs violins. He learned it from an old master in Cremona.",
            "ann": "Ann grows apples near Bergen and sells them on the market every Saturday morning.",
            "eve": "Eve paints lighthouses; the newest picture shows the one at Lindesnes in a storm.",
        }.items():
            memory.add(text, id=id, metadata={"title": id.title()})
        memory.update("bob", "Bob lives in Bergen now. He still repairs violins and teaches others.")
        session = memory.session("chat")
        session.append("system", "Answer briefly.")
        session.append("user", "My sister Ingrid is allergic to walnuts.")
        yield memory


@pytest.fixture(scope="module")
def asked(people: MemoryModel) -> Findings:
    return look(people, "Where does Bob repair violins?")


class Parsed(HTMLParser):
    """Tags in order, their attributes and the texts between; fails on what a template would not write."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r:.80}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data!r:.80}")

    @property
    def text(self) -> str:
        return "".join(self.texts)


def shape(html: str) -> list[tuple[str, tuple[str, ...]]]:
    """The page's elements and their attribute names, marks of invisible characters left out."""
    return [(tag, tuple(sorted(attributes))) for tag, attributes in Parsed(html).tags if tag != "i"]


def findings_of(texts: list[str]) -> Findings:
    """A page's findings, made up: one document per text, with the text in every place that takes one."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    with open_memory() as memory:
        stats = memory.stats
    documents = [
        SeenDocument(
            Document(
                id=text, namespace=text, text="", metadata={text: text}, timestamp=now, created_at=now,
                updated_at=now, source=text, trust=text, passages=1, tokens=1,
            ),
            Excerpted.of(text, 600),
        )
        for text in texts
    ]  # fmt: skip
    stats = stats.model_copy(update={"namespace": texts[0], "model": texts[0]})
    return Findings(now, stats, {"x": texts[0]}, tuple(documents), 0, (), 0, None)


# what is shown is what happened


def test_watching_changes_no_answer(people: MemoryModel, asked: Findings) -> None:
    assert asked.asked is not None
    plain = people.query("Where does Bob repair violins?")
    watched = asked.asked.answer
    assert watched.model_dump(exclude={"timings"}) == plain.model_dump(exclude={"timings"})


def test_chunk_scores_reduce_to_what_the_routers_said(people: MemoryModel, asked: Findings) -> None:
    """Against ``explain``, which takes its scores from the bank's own scoring of whole blocks."""
    assert asked.asked is not None
    picture = asked.asked.routings[0]
    explained = people.explain("Where does Bob repair violins?")
    assert [one.layer for one in explained.layers] == list(picture.layers)
    for row, layer in enumerate(explained.layers):
        said = dict(zip(layer.passages, layer.scores, strict=True))
        for candidate in picture.candidates:
            assert candidate.chunks[row].max() == pytest.approx(said[candidate.passage], abs=1e-5)
            assert candidate.layers[row] == pytest.approx(said[candidate.passage], abs=1e-6)
    assert len(picture.candidates[0].starts) == picture.candidates[0].chunks.shape[1] > 2


def test_candidates_are_ranked_as_search_ranks(people: MemoryModel, asked: Findings) -> None:
    assert asked.asked is not None
    found = people.search("Where does Bob repair violins?", k=5)
    ranked = list(dict.fromkeys(one.document_id for one in asked.asked.routings[0].candidates))
    assert ranked == [source.id for source in found]
    best = asked.asked.routings[0].candidates[0]
    assert best.relevance == pytest.approx(found[0].score)
    assert best.mean == pytest.approx(np.mean(best.layers))


def test_a_passage_is_cut_at_its_chunks_without_loss(asked: Findings) -> None:
    assert asked.asked is not None
    for candidate in asked.asked.routings[0].candidates:
        pieces = page._pieces(candidate, [0] * len(candidate.starts))
        assert "".join(text for _, _, text in pieces) == candidate.text


def test_chosen_is_what_the_layers_attend_to(people: MemoryModel) -> None:
    """The tiny model attends to 4 passages; a memory of 4 (3 documents, 1 message) shows all of them."""
    watched = look(people, "Where does Bob repair violins?").asked
    assert watched is not None
    [picture] = watched.routings
    for row in range(len(picture.layers)):
        assert sum(one.chosen[row] for one in picture.candidates) + picture.unseen[row] == 4


def test_every_round_has_its_routing(people: MemoryModel, model: Path) -> None:
    from msa_memory.answering import AnswerOptions
    from msa_memory.inspection.watching import Watching

    options = AnswerOptions("Where does Bob repair violins?", k=2, max_rounds=2)
    shared = people._shared
    asking = Watching(people._engine, people._bank, shared.store, "default", shared.config, options)
    watched = people._run(asking.watched())
    assert len(watched.answer.rounds) == len(watched.routings) == 2
    first, second = watched.routings
    assert first.candidates[0].relevance != second.candidates[0].relevance


def test_generative_evidence_is_watched_too(people: MemoryModel) -> None:
    from msa_memory.answering import AnswerOptions
    from msa_memory.inspection.watching import Watching

    options = AnswerOptions("Where does Bob repair violins?", evidence="generative", max_rounds=2)
    shared = people._shared
    asking = Watching(people._engine, people._bank, shared.store, "default", shared.config, options)
    watched = people._run(asking.watched())
    assert watched.evidence == "generative"
    assert watched.routings
    assert all(picture.candidates for picture in watched.routings)
    assert len(watched.routings) <= 1 + len(watched.answer.rounds)
    assert watched.routings[0].candidates[0].words is None


def test_the_page_says_what_was_found(people: MemoryModel, asked: Findings) -> None:
    assert asked.asked is not None
    parsed = Parsed(render(asked, name="agent-memory"))
    for said in (
        "agent-memory", "Where does Bob repair violins?", asked.asked.answer.text, "Bob lives in Bergen now.",
        "Bob lives in Oslo", "My sister Ingrid is allergic to walnuts.", "Answer briefly.",
        f"{asked.asked.routings[0].candidates[0].relevance:.3f}", "readable by whoever can open it",
    ):  # fmt: skip
        assert said in parsed.text
    assert people.stats.documents == 4
    assert asked.resident_bytes == people._bank().bank.nbytes() > 0


def test_every_link_leads_somewhere_on_the_page(asked: Findings) -> None:
    parsed = Parsed(render(asked, name="m"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] for tag, attributes in parsed.tags if tag == "a"]
    assert {"#source1", "#s1"} <= set(links) or not any(s.cited for s in asked.asked.answer.sources)
    assert [link for link in links if not link.startswith("#") or link[1:] not in ids] == []


def test_a_citation_leads_to_its_very_words(people: MemoryModel, asked: Findings) -> None:
    html = render(asked, name="m")
    assert asked.asked is not None
    for number, source in enumerate(asked.asked.answer.sources, 1):
        marked = re.search(rf'<mark id="s{number}">(.*?)</mark>', html, re.DOTALL)
        assert marked is not None
        assert Parsed(marked[1]).text == source.text


def test_an_empty_memory_and_an_unanswerable_question_have_a_page(model: Path) -> None:
    with open_memory(model=model) as memory:
        assert "None." in Parsed(render(look(memory), name="m")).text
        asked = look(memory, "Who?")
        assert "There was nothing to choose from." in Parsed(render(asked, name="m")).text


# how much of it


def test_what_is_left_out_is_said_and_what_the_question_needs_stays(people: MemoryModel) -> None:
    small = look(people, limit=1)
    assert (len(small.documents), small.documents_left_out) == (1, 3)
    assert "3 older documents are left out" in Parsed(render(small, name="m")).text
    asked = look(people, "Where does Bob repair violins?", limit=1)
    assert asked.asked is not None
    assert set(asked.asked.document_ids) <= {seen.document.id for seen in asked.documents}
    assert asked.documents_left_out == 4 - len(asked.documents)
    with pytest.raises(ConfigError, match="limit is 0"):
        look(people, limit=0)


def test_long_texts_are_cut_and_say_so(model: Path) -> None:
    with open_memory(model=model) as memory:
        stored = memory.add("long story " * 500, id="long")
        [seen] = look(memory).documents
        assert seen.excerpt.left_out == len(stored.text) - len(seen.excerpt.text) > 0
        html = render(look(memory), name="m")
    assert f"{seen.excerpt.left_out:,} more characters are not on this page." in Parsed(html).text


def test_ten_thousand_documents_fit_a_page() -> None:
    findings = findings_of([f"document {number} says something plain" for number in range(10_000)])
    html = render(findings, name="m")
    assert len(html) < 15_000_000
    parsed = Parsed(html)
    folded = [attributes for tag, attributes in parsed.tags if tag == "details"]
    assert sum(attributes.get("class") == "document" for attributes in folded) == 10_000
    assert not any("open" in attributes for attributes in folded)
    assert "9,901 to 10,000" in parsed.text


# nothing acts


@given(st.text())
def test_shown_text_is_text(text: str) -> None:
    parsed = Parsed(str(as_html(text)))
    assert {tag for tag, _ in parsed.tags} <= {"i"}
    assert parsed.text == as_text(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", parsed.text)


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Co", "Cs"])))
def test_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert Parsed(str(as_html(text))).text == as_text(text) == text


def test_hostile_texts_leave_the_page_its_shape() -> None:
    """Element for element the page of harmless texts, wherever a text may stand."""
    harmless = [re.sub(r"[^ ]", "x", attack) + str(place) for place, attack in enumerate(ATTACKS)]
    hostile = [attack + str(place) for place, attack in enumerate(ATTACKS)]
    assert shape(render(findings_of(hostile), name=HOSTILE)) == shape(render(findings_of(harmless), name="m"))


def hostile_page(model: Path) -> str:
    with open_memory(model=model, namespace=HOSTILE[:60]) as memory:
        for place, attack in enumerate(attack.replace("\0", "") for attack in ATTACKS):  # NUL is refused
            memory.add(
                f"{attack} violins", id=f"{attack[:150]} {place}", source=attack, trust=attack,
                metadata={"title": attack, attack: [attack]},
            )  # fmt: skip
        everything = HOSTILE.replace("\0", "")
        memory.update(f"{ATTACKS[0]} 0", f"{everything} violins again")
        memory.session(ATTACKS[0]).append("user", everything, name=ATTACKS[3])
        return render(look(memory, f"{ATTACKS[0]} violins {ATTACKS[4]}?"), name=ATTACKS[1])


@pytest.fixture(scope="module")
def attacked(model: Path) -> str:
    return hostile_page(model)


def test_a_page_of_attacks_has_no_way_to_act(attacked: str) -> None:
    parsed = Parsed(attacked)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "img", "svg", "iframe", "object", "embed", "form", "base", "link", "video"}
    for _tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")]
        assert attributes.get("href", "#").startswith("#")
    assert "document.title='pwned'" in parsed.text
    assert "{{ 7*7 }}" in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", attacked)


def test_the_policy_forbids_everything_but_the_one_style_sheet(attacked: str) -> None:
    parsed = Parsed(attacked)
    heads = [(tag, attributes) for tag, attributes in parsed.tags if tag in ("meta", "style", "title")]
    policies = [a["content"] for _, a in heads if a.get("http-equiv") == "Content-Security-Policy"]
    [style] = re.findall("<style>(.*?)</style>", attacked, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policies == [
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    ]
    assert [tag for tag, _ in heads].index("style") > 1  # the policy stands before what it governs


def browser(path: Path, *options: str) -> str:
    """What a headless Chromium makes of a file, scripts run."""
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: nothing checks here that Chromium runs no script of the page; "
                    "install one (Debian: apt-get install chromium)")  # fmt: skip
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={path.parent / 'profile'}", *options, path.as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def title(dom: str) -> str:
    found = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert found is not None
    return found[1]


def test_chromium_runs_nothing_that_documents_say(attacked: str, tmp_path: Path) -> None:
    """Three times: the page; unescaped, where the policy alone holds; and with neither, where it is pwned."""
    (tmp_path / "page.html").write_text(attacked, encoding="utf-8")
    dom = browser(tmp_path / "page.html", "--dump-dom")
    assert "memory inspection" in title(dom)
    assert "pwned" not in title(dom).replace("document.title='pwned'", "")
    assert not re.search("<(script|img|svg|iframe)", dom)

    injected = attacked.replace("<body>", "<body>" + ATTACKS[0] + ATTACKS[3], 1)
    (tmp_path / "injected.html").write_text(injected, encoding="utf-8")
    assert "memory inspection" in title(browser(tmp_path / "injected.html", "--dump-dom"))

    bare = re.sub("<meta http-equiv[^>]*>", "", injected)
    (tmp_path / "bare.html").write_text(bare, encoding="utf-8")
    assert title(browser(tmp_path / "bare.html", "--dump-dom")) == "pwned"


# the file


def test_the_file_is_its_owners_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0)
    try:
        assert write_page(tmp_path / "page.html", "é") == 2
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600
    with pytest.raises(StorageError, match="exists already"):
        write_page(tmp_path / "page.html", "other")
    assert (tmp_path / "page.html").read_text() == "é"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(page, "sync", full)
        with pytest.raises(StorageError, match="No space left"):
            write_page(tmp_path / "page.html", "other", overwrite=True)
    assert (tmp_path / "page.html").read_text() == "é"
    write_page(tmp_path / "page.html", "other", overwrite=True)
    assert (tmp_path / "page.html").read_text() == "other"
    assert os.listdir(tmp_path) == ["page.html"]
    with pytest.raises(ConfigError, match="does not exist"):
        write_page(tmp_path / "missing" / "page.html", "x")


def test_the_command_writes_the_page(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSA_MEMORY_MODEL", str(model))

    def run(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, list(arguments), prog_name="msa-memory")
        assert result.exit_code == code, (arguments, result.output, result.exception)
        return result

    run("--memory", "notes", "add", "Bob lives in Oslo and repairs violins.", "--id", "bob")
    assert "1 documents, readable by you only" in run("inspect", "notes").stdout
    assert stat.S_IMODE((tmp_path / "memory.html").stat().st_mode) == 0o600
    assert "not loaded" in (tmp_path / "memory.html").read_text()
    assert "exists already" in run("inspect", "notes", code=1).stderr
    printed = run("inspect", "-m", "notes", "--question", "Who repairs violins?", "-o", "b.html", "--json")
    told = json.loads(printed.stdout)
    assert (told["path"], told["documents"], told["left_out"]) == ("b.html", 1, 0)
    assert told["size_bytes"] == (tmp_path / "b.html").stat().st_size
    assert "Who repairs violins?" in (tmp_path / "b.html").read_text()
    assert "no memory at" in run("inspect", "elsewhere", code=1).stderr
