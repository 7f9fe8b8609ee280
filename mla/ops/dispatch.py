"""Which implementation of an op runs: the first one named that can serve the call on the platform it is lowered for.

A program may be traced on one machine and run on another (`jax.export`, a compilation for a TPU ahead of time), so nothing
here asks what devices this process has. Whoever knows the devices, by a mesh, says their platform; where nobody does,
implementations that any platform can trace are chosen in lowering, by `lax.platform_dependent`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from jax import lax

from mla.errors import UserError

Call = TypeVar("Call")


@dataclasses.dataclass(frozen=True)
class Backend(Generic[Call]):
    """One implementation of an op. Platforms are named as programs are lowered for them: cpu, cuda, rocm, tpu.

    Attributes:
      run: the implementation; all of an op take the same arguments and return the same.
      unmet: call -> what this implementation needs and the call does not give, such as "no sink"; "": it can serve it.
      best: call -> whether `auto` takes it, given that it can serve the call.
      best_on: platforms on which `auto` takes it; (): all.
      only_on: platforms whose devices it needs, even to be traced; (): none in particular.
      whole: whether it is a kernel that XLA cannot split over devices: `run` also takes `spread`, and does so itself.
    """

    run: Callable[..., Any]
    unmet: Callable[[Call], str] = lambda call: ""
    best: Callable[[Call], bool] = lambda call: True
    best_on: tuple[str, ...] = ()
    only_on: tuple[str, ...] = ()
    whole: bool = False

    def refusal(self, call: Call, platform: str | None) -> str:
        """Why it cannot serve the call on a platform (None: not known); "": it can."""
        device = f"a {' or '.join(self.only_on)} device" if self.only_on and platform not in self.only_on else ""
        return ", ".join(filter(None, (device, self.unmet(call))))


def dispatch(
    op: str,
    backends: Mapping[str, Backend[Call]],
    names: str,
    call: Call,
    platform: str | None,
    spread: Callable[..., Any] | None = None,
    **static: Any,
) -> Callable[..., Any]:
    """The function to run for one call of an op.

    Args:
      op: its name in messages, such as "attention".
      backends: name -> implementation, in the order in which `auto` tries them.
      names: one name, "auto", or several in order of preference: "cudnn,auto" is cudnn wherever it can serve the call,
        and elsewhere whatever can.
      call: what the op was given, for `Backend.unmet`.
      platform: of the devices it will run on; None: not known.
      spread: has a function run on each of several devices, `mla.sharding.Spread`; None: there is one, or none is known.
      static: keyword arguments of `Backend.run` that are no arrays.

    Returns:
      A function of the other arguments of `Backend.run`.

    Raises:
      UserError: a name is unknown, or no implementation among those named can serve the call; says why for each.
    """
    able: list[tuple[str, tuple[str, ...]]] = []  # those that may run, with the platforms to take them on; (): all
    refusals = []
    for name in names.split(","):
        if name != "auto" and name not in backends:
            raise UserError(f"{op} backend {name!r} is unknown: choose one of auto, {', '.join(backends)}")
        for candidate in backends if name == "auto" else (name,):
            backend = backends[candidate]
            if refusal := backend.refusal(call, platform):
                refusals.append(f"{op} backend {candidate!r} cannot serve this call, it needs {refusal}")
            elif name != "auto" or backend.best(call):
                able.append((candidate, backend.best_on if name == "auto" else ()))
    if not able:
        raise UserError(f"{'; '.join(refusals)}: choose 'auto'")

    def on(platform: str | None) -> str:
        return next(name for name, best_on in able if not best_on or platform in best_on)

    def run(name: str) -> Callable[..., Any]:
        return functools.partial(backends[name].run, **static, **({"spread": spread} if backends[name].whole else {}))

    for watcher in _watchers:
        watcher.setdefault(op, set()).add(on(platform))
    elsewhere = {p: run(on(p)) for _, best_on in able for p in best_on if on(p) != on(None)} if platform is None else {}
    if elsewhere:
        return functools.partial(lax.platform_dependent, default=run(on(None)), **elsewhere)
    return run(on(platform))


_watchers: list[dict[str, set[str]]] = []


@contextlib.contextmanager
def watched() -> Iterator[dict[str, set[str]]]:
    """op -> backends of the calls that are traced meanwhile, on their platform or, where it is not known, on most."""
    chosen: dict[str, set[str]] = {}
    _watchers.append(chosen)
    try:
        yield chosen
    finally:
        _watchers.remove(chosen)
