"""The grammar of layer patterns: which mechanism a layer has, and which layers read what another one remembers.

A pattern has one entry a layer, `[label=]name[@layer]`, and is repeated until all layers have one; a variant writes it short
(`parse_pattern`). Layers that read others: CLA (2405.12981), Gemma 3n's last layers, YOCO (2405.05254). An entry `name@-1`
makes queries of its own and attends to the entries of the layer below; `name@3` to those of layer 3 (from 0). Any softmax
mechanism can: what is shared is whatever it would have cached (k and v, or MLA's latent, which each layer then reads with
its own W_UK and W_UV).

    CLA-s     `gqa/2` = gqa,gqa@-1; `mla/3` = mla,mla@-1,mla@-2. Stored once for s layers, read by each of them.
    Gemma 3n  the last layers read the last one of their own kind: sliding_window*3,gqa,sliding_window@2,gqa@3
    YOCO      `yoco`: a lower half of windowed (or recurrent) layers, whose output gives keys and values once, for all layers
              of the upper half. A prefill computes the upper half for the last token alone.

A layer that others read norms its input twice, once for queries and once for entries, as CLA and YOCO do. (Gemma 3n has one
norm; a second whose gains are equal is the same.)
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

from mla.errors import UserError

MOST_LAYERS = 1_000  # that are built and compiled one by one


def yoco(arguments: Sequence[str], num_layers: int) -> list[str]:
    """`yoco`, `yoco+LOWER` or `yoco+LOWER+UPPER`: mechanisms of the halves, by default sliding_window and gqa."""
    lower, upper = (*arguments, *("sliding_window", "gqa")[len(arguments) :])
    half = num_layers // 2
    return [lower] * half + [upper] + [f"{upper}@{half}"] * (num_layers - half - 1)


LAYOUTS = {"yoco": yoco}  # name of a pattern entry -> entries of all layers


def expand(pattern: Sequence[str], num_layers: int) -> list[str]:
    """One entry a layer, bottom first: layouts are spelt out, patterns repeated."""
    whole = f"config.model.pattern: {','.join(pattern)!r}"
    if not all(pattern):
        raise UserError(f"{whole}: an entry is empty; write mechanisms with commas between")
    named = [layout for entry in pattern for layout in LAYOUTS if layout in re.split(r"[+=@]", entry)]
    if not named:
        if len(pattern) < num_layers and any(re.search("@[0-9]", entry) for entry in pattern):
            raise UserError(
                f"{whole}: has {len(pattern)} entries for model.num_layers={num_layers}; repeated, @ and a number name the"
                " same layer again; write an entry for every layer, or @-1 for the one below"
            )
        return [pattern[layer % len(pattern)] for layer in range(num_layers)] if pattern else []
    layout, *arguments = pattern[0].split("+")
    if len(pattern) > 1 or layout not in LAYOUTS or len(arguments) > 2 or not all(arguments):
        raise UserError(
            f"{whole}: {named[0]} lays out all layers; write {named[0]}, {named[0]}+LOWER or {named[0]}+LOWER+UPPER and"
            " nothing else"
        )
    if num_layers < 2:
        raise UserError(f"config.model.num_layers: {num_layers}: {layout} needs at least 2, a lower and an upper half")
    return LAYOUTS[layout](arguments, num_layers)


def parse(entry: str) -> tuple[str, str, str]:
    """`[label=]name[@layer]` -> label, mechanism name, what follows the @."""
    body, _, source = entry.partition("@")
    label, _, name = body.partition("=")
    return label, name or label, source


def labels(pattern: Sequence[str]) -> dict[str, str]:
    """label -> mechanism name, in order of first use. An entry is `[label=]name[@layer]`, or a layout as `yoco`."""
    found: dict[str, str] = {}
    for entry in expand(pattern, max(2, len(pattern))):
        label, name, _ = parse(entry)
        usable = label.isidentifier() and not keyword.iskeyword(label)
        if not usable and label != name:
            raise UserError(f"config.model.pattern: label {label!r} cannot name a field; write letters, digits and _")
        if found.setdefault(label, name) != name:
            raise UserError(f"config.model.pattern: label {label!r} stands for both {found[label]!r} and {name!r}")
    return found


def parse_pattern(variant: str, field: str = "config variant") -> tuple[str, ...]:
    """`mla` -> ('mla',); `sliding_window*5,mha` -> five local layers and a global one; `mla/2` -> ('mla', 'mla@-1')."""

    def number(text: str, what: str) -> int:
        if not re.fullmatch("0*[1-9][0-9]{0,3}", text) or int(text) > MOST_LAYERS:
            raise UserError(
                f"{field} {variant!r}: {text!r} is no {what}; write name, name*count or name/sharing, comma-separated"
            )
        return int(text)

    pattern: list[str] = []
    for entry in variant.split(","):
        body, star, times = entry.strip().partition("*")
        name, slash, sharing = body.partition("/")
        readers = number(sharing, "sharing factor") - 1 if slash else 0
        group = [name, *(f"{name}@-{n}" for n in range(1, readers + 1))]
        pattern += group * (number(times, "repeat count") if star else 1)
    return tuple(pattern)


def sources(entries: Sequence[str]) -> list[int | None]:
    """The layer that each layer reads, None where it remembers for itself.

    Raises:
      UserError: the layer is not below, is of another kind, or remembers nothing itself.
    """
    found: list[int | None] = []
    for layer, entry in enumerate(entries):
        label, _, at = parse(entry)
        if "@" not in entry:
            found.append(None)
            continue
        here = f"config.model.pattern: {entry!r} in layer {layer}"
        if not re.fullmatch("-?[0-9]+", at):
            raise UserError(f"{here}: {at!r} is no layer; write @-1 for the one below, @3 for layer 3")
        source = layer + int(at) if at.startswith("-") else int(at)
        if not 0 <= source < layer:
            below = f"it can read layers 0 to {layer - 1}" if layer else "there is none below it"
            raise UserError(f"{here} reads layer {source}; {below}")
        if found[source] is not None:
            raise UserError(
                f"{here} reads layer {source}, which remembers nothing; read layer {found[source]}, as that one does"
            )
        if parse(entries[source])[0] != label:
            raise UserError(f"{here} reads layer {source}, which is {entries[source]!r}; it can read one of its own kind")
        found.append(source)
    return found
