"""The opaque position between two pages of a listing.

A cursor holds the key of the last document shown and a digest of the listing it belongs to, so it cannot
be carried to another namespace or filter. Knows no table.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any

from msa_memory.errors import ConfigError

__all__ = ["read_cursor", "write_cursor"]


def write_cursor(key: int, namespace: str, where: Mapping[str, Any] | None) -> str:
    """A cursor that continues below document key ``key``."""
    body = f"1.{key}.{_listing(namespace, where)}"
    return base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")


def read_cursor(cursor: str, namespace: str, where: Mapping[str, Any] | None) -> int:
    """The key to continue below; ConfigError unless the cursor came from this very listing."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        version, key, listing = base64.b64decode(padded, altchars=b"-_", validate=True).decode().split(".")
        number = int(key)
        if not 0 <= number < 1 << 63:
            raise ValueError(key)
    except (binascii.Error, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"cursor {str(cursor)[:40]!r} is not one; pass the next_cursor of a page"
        ) from error
    if version != "1" or listing != _listing(namespace, where):
        raise ConfigError(
            f"cursor {cursor[:40]!r} belongs to another listing; use it with its namespace and where"
        )
    return number


def _listing(namespace: str, where: Mapping[str, Any] | None) -> str:
    described = repr((namespace, sorted(where.items(), key=repr) if where else None))
    return hashlib.sha256(described.encode(errors="surrogatepass")).hexdigest()[:12]
