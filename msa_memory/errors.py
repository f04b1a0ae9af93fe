"""Every error msa-memory raises on purpose.

MSAError
├── ConfigError            an option, environment variable or combination of them is not usable
├── ModelNotFoundError     a model name, folder or hub id leads to no checkpoint on this machine
├── ModelMismatchError     a bank was written with another model than the one asked to read it
├── CheckpointError        checkpoint files are missing, damaged or of an unsupported kind
├── InvalidDocumentError   a document's content, id, metadata or dates are not acceptable
├── InvalidFilterError     a ``where`` filter is malformed
├── NotFoundError          no such document, version, session or namespace
├── ConflictError          the id is taken, or the document changed underneath the caller
├── LimitError             an input is larger than a documented limit
├── LockedError            another writer holds the bank for longer than the timeout
├── ReadOnlyError          a write was asked of a memory opened read-only
├── StorageError           the disk, the folder or the database refused
│   ├── CatalogDamagedError    the SQL catalog does not hold what was acknowledged
│   └── StateDamagedError      a state block does not match its checksum or its document
├── ForkedMemoryError      a memory is used in a child process after ``os.fork``
├── EngineError            the engine could not compute (out of memory, closed, cancelled)
│   └── RankLostError          a process of Memory Parallel died, hangs or never came
└── MissingExtraError      an optional dependency is not installed

Messages give the value seen, the value expected and the fix. Exceptions of lower libraries never
leak: they are the ``__cause__``.
"""

__all__ = [
    "CatalogDamagedError",
    "CheckpointError",
    "ConfigError",
    "ConflictError",
    "EngineError",
    "ForkedMemoryError",
    "InvalidDocumentError",
    "InvalidFilterError",
    "LimitError",
    "LockedError",
    "MSAError",
    "MissingExtraError",
    "ModelMismatchError",
    "ModelNotFoundError",
    "NotFoundError",
    "RankLostError",
    "ReadOnlyError",
    "StateDamagedError",
    "StorageError",
]


class MSAError(Exception):
    """Base of every error raised by msa-memory."""


class ConfigError(MSAError):
    """An option, an environment variable or a combination of them is not usable."""


class ModelNotFoundError(MSAError):
    """A model name, folder or hub id leads to no checkpoint on this machine."""


class ModelMismatchError(MSAError):
    """A bank was written with another model than the one asked to read it."""


class CheckpointError(MSAError):
    """Checkpoint files are missing, damaged or of an unsupported kind."""


class InvalidDocumentError(MSAError):
    """A document's content, id, metadata or dates are not acceptable."""


class InvalidFilterError(MSAError):
    """A ``where`` filter is malformed."""


class NotFoundError(MSAError):
    """No such document, version, session or namespace."""


class ConflictError(MSAError):
    """The id is taken, or the document changed underneath the caller."""


class LimitError(MSAError):
    """An input is larger than a documented limit."""


class LockedError(MSAError):
    """Another writer held the bank for longer than the timeout."""


class ReadOnlyError(MSAError):
    """A write was asked of a memory opened read-only."""


class StorageError(MSAError):
    """The disk, the folder or the database refused an operation."""


class CatalogDamagedError(StorageError):
    """The SQL catalog does not hold what was acknowledged."""


class StateDamagedError(StorageError):
    """A state block does not match its checksum or its document."""


class ForkedMemoryError(MSAError):
    """A memory is used in a child process after ``os.fork``."""


class EngineError(MSAError):
    """The engine could not compute: out of memory, closed or cancelled."""


class RankLostError(EngineError):
    """A process of Memory Parallel died, hangs or never came."""


class MissingExtraError(MSAError):
    """An optional dependency is not installed; the message names the pip command."""
