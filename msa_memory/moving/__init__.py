"""Memories on the move: to a file and back, to a copy, to another model, and in from other systems."""

from msa_memory.moving.exporting import Export, aexport_to, export_to
from msa_memory.moving.importers import FORMATS, read_export
from msa_memory.moving.importing import Import, averify, open_bundle
from msa_memory.moving.reencode import reencode_steps

__all__ = [
    "Export",
    "FORMATS",
    "Import",
    "aexport_to",
    "averify",
    "export_to",
    "open_bundle",
    "read_export",
    "reencode_steps",
]
