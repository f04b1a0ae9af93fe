"""A memory that is open keeps in step with one that forgets and compacts beside it."""

from pathlib import Path

from msa_memory.testing import open_memory

FACTS = {f"d{i}": f"Keeper {i} feeds the {animal}." for i, animal in enumerate("lion bear wolf seal".split())}


def test_removals_without_tombstones_are_seen_too(tmp_path: Path) -> None:
    """``compact`` drops the tombstones an open reader has not read yet: it then compares all there is."""
    with open_memory(tmp_path / "bank") as writer, open_memory(tmp_path / "bank") as reader:
        writer.add_many([{"id": id, "content": text} for id, text in FACTS.items()])
        assert {hit.id for hit in reader.search("Keeper feeds", k=9)} == FACTS.keys()
        writer.forget("d1")
        writer.update("d2", "Keeper 2 feeds the wolf twice.")
        writer.compact()
        writer.add("Keeper 9 feeds the owl.", id="d9")
        hits = {hit.id: hit.text for hit in reader.search("Keeper feeds", k=9)}
        assert hits.keys() == {"d0", "d2", "d3", "d9"}
        assert hits["d2"] == "Keeper 2 feeds the wolf twice."
        bank = reader._shared.bank
        assert bank is not None
        assert sorted(bank.records) == sorted(bank.bank.view().numbers.tolist())
        writer.forget("d0")
        writer.compact()
        assert {hit.id for hit in reader.search("Keeper feeds", k=9)} == {"d2", "d3", "d9"}
