"""Which names a table may have: its folder is called like it."""

from __future__ import annotations

import re

from engram_client.errors import BadRequest

TABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str) -> None:
    """Raises BadRequest for a table name that cannot be a file name."""
    if not TABLE_NAME.fullmatch(name):
        raise BadRequest(
            f"table name {name!r} cannot be a file name: use letters, digits, '.', '_' and '-', "
            "at most 128 of them, a letter or digit first"
        )
