"""Grids of difficulties, as specifications: the published ones of MQAR, and a small one for CPUs."""

from __future__ import annotations

from typing import NamedTuple


class Grid(NamedTuple):
    """What is trained on and what is tested on.

    Attributes:
      train: specifications, each of one training.
      test: specifications, each tested after its own training, or one for all.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]


_ZOOLOGY = tuple(f"mqar:vocabulary=8192,mixture={level}" for level in ("64x4", "128x8", "256x16", "512x64"))
_BASED = "mqar:vocabulary=8192,filler=random,mixture="
_OVERWRITE = "64x4+128x9+256x16+256x25+256x36"

GRIDS = {
    # Zoology (2312.04927), figure 2: each level alone, 100,000 episodes and 64 epochs; tested on 3,000.
    "zoology": Grid(_ZOOLOGY, _ZOOLOGY),
    # Based (2402.18668), figure 2: 180,000 episodes and 32 epochs; tested on 1,000 of each level, up to 4 times as long.
    "based": Grid(
        (f"{_BASED}64x4*5+128x8+256x16+256x32+256x64",),
        (f"{_BASED}64x4+64x8+64x16+128x32+256x64+512x128+1024x256",),
    ),
    # Zoology's code of forgetting MQAR; no result is published.
    "overwrite": Grid(
        (f"overwrite:vocabulary=8192,mixture={_OVERWRITE}",), (f"overwrite:vocabulary=8192,mixture={_OVERWRITE}",)
    ),
    # For two CPU cores.
    "small": Grid(
        ("mqar:mixture=64x4+64x8+128x16+128x32",),
        ("mqar:mixture=64x4+64x8+128x16+128x32+256x64+512x128",),
    ),
}
