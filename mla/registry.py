"""Registries map names to where code stands, `module:Name[:Name ..]`, which is imported when a name is used."""

from __future__ import annotations

import importlib
from typing import Any


def load(place: str) -> tuple[Any, ...]:
    """The objects of a module that `module:Name[:Name ..]` names."""
    module, *names = place.split(":")
    imported = importlib.import_module(module)
    return tuple(getattr(imported, name) for name in names)
