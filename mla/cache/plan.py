"""What is done to a model's caches beside filling them: decided before they are made, and frozen."""

from __future__ import annotations

import dataclasses

from mla.cache import codecs
from mla.cache.evicted import Eviction
from mla.cache.merged import MiniCache
from mla.cache.pages import Quest
from mla.errors import UserError


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """How entries are stored, which ones leave, what of two layers is stored once, and what decoding reads. Static.

    `mla.evaluation.plan` makes one of a config, and refuses there what cannot be done to a model; what can be done to none
    is refused here.

    Attributes:
      codec: a specification of `mla.cache.codecs`.
      eviction: what is to be kept; None: everything.
      merge: which layers store directions once; None: none.
      read: which pages a decode step reads; None: what each layer chooses, by default all that is there.

    Raises:
      UserError: an unknown codec, or two of eviction, merging and reading.
    """

    codec: str = "none"
    eviction: Eviction | None = None
    merge: MiniCache | None = None
    read: Quest | None = None

    def __post_init__(self) -> None:
        codecs.check(self.codec)
        if self.eviction is not None and self.merge is not None:
            raise UserError("config.eval.cache.merge: layers of a pair cannot keep other tokens each; set evict to none")
        if self.read is not None and (self.eviction is not None or self.merge is not None):
            raise UserError("config.eval.cache.read: pages are of caches that keep every entry; set evict and merge to none")

    @property
    def alters(self) -> bool:
        """Whether caches hold anything but every entry as it is."""
        return self != WHOLE

    def exact(self, tokens: int) -> bool:
        """Whether a cache of so many tokens holds them all as they are: the loss through it is that of the parallel form."""
        evicts = self.eviction is not None and not (self.eviction.policy.fills and self.eviction.budget >= tokens)
        whole = self.read is None or self.read.exact(tokens)
        return self.codec == "none" and self.merge is None and not evicts and whole


WHOLE = CachePlan()  # every entry, as it is
