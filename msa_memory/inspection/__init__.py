"""A person's look into a memory: one self-contained HTML page of what it holds and how a question goes.

``look`` reads, ``render`` makes the page's text, ``write_page`` puts it on disk for its owner alone. The page
runs no script and loads nothing, whatever the documents say.
"""

from __future__ import annotations

from msa_memory.inspection.findings import Findings, look
from msa_memory.inspection.page import render, write_page

__all__ = ["Findings", "look", "render", "write_page"]
