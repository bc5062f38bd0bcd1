"""The tiers composed into one object, shared by everybody in the process who opens a directory."""

from tierstore.store.registry import open_store
from tierstore.store.store import Store

__all__ = ["Store", "open_store"]
