"""The remaining families' rules; see `families` for what a rule is."""

from __future__ import annotations

from collections.abc import Callable

from .families import Fields, Target

FAMILIES: dict[str, Callable[[Fields], Target]] = {}
