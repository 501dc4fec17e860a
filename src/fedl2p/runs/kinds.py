"""What each method is worth to each kind of client, and the strategy that they were given."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fedl2p.runs.client_files import ClientHyperparams
from fedl2p.runs.columns import names_of
from fedl2p.runs.results import KindSummary, Row, Summary, summarise

About = Mapping[str, Mapping[str, str | int | float]]
"""What is known of each client, by name."""

MOST_KINDS = 16
"""More groups than this cannot be told apart in a figure; the rarest are put together."""
OTHERS = "other kinds"


def kind_key(about: About) -> str | None:
    """Return the first key that holds text, if its values can group the clients."""
    for known in about.values():
        for key, value in known.items():
            if isinstance(value, str):
                kinds = {other.get(key) for other in about.values()}
                names_everyone = len(kinds) > max(MOST_KINDS, len(about) / 2)
                return None if names_everyone else key
    return None


def kinds_of(about: About, clients: Iterable[str]) -> dict[str, str] | None:
    """Return the kinds of some clients by name; None if nothing groups them."""
    key = kind_key(about)
    if key is None:
        return None
    kinds = {client: str(about[client].get(key, "unknown")) for client in clients}
    counts = Counter(kinds.values())
    if len(counts) <= MOST_KINDS:
        return kinds
    kept = {kind for kind, _ in counts.most_common(MOST_KINDS - 1)}
    return {client: kind if kind in kept else OTHERS for client, kind in kinds.items()}


def summarise_kinds(
    rows: Sequence[Row],
    about: About,
    strategies: Mapping[str, Mapping[str, ClientHyperparams]],
) -> tuple[KindSummary, ...]:
    """Sum up rows per kind, method and pool; nothing if the clients have no kinds.

    Parameters
    ----------
    rows
        Of all methods.
    about
        What is known of each client.
    strategies
        Method to client to its hyperparameters, as far as they are known.
    """
    kinds = kinds_of(about, dict.fromkeys(row.client for row in rows)) or {}
    out = []
    for kind in sorted(set(kinds.values())):
        members = [row for row in rows if kinds[row.client] == kind]
        for one in summarise(members):
            known = strategies.get(one.method, {})
            own = [
                known[row.client]
                for row in members
                if (row.method, row.pool) == (one.method, one.pool) and row.client in known
            ]
            mixes = [mix for mix in (mean_of(each.mix.values()) for each in own) if mix is not None]
            rates = [r for r in (geometric_mean(each.rate.values()) for each in own) if r]
            out.append(
                KindSummary(
                    **{name: getattr(one, name) for name in names_of(Summary)},
                    kind=kind,
                    mix=or_nan(mean_of(mixes)),
                    rate=or_nan(geometric_mean(rates)),
                )
            )
    return tuple(out)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the finite values; None if there are none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the positive finite values; None if there are none."""
    logs = mean_of([math.log(v) for v in values if v is not None and 0 < v < math.inf])
    return None if logs is None else math.exp(logs)


def or_nan(value: float | None) -> float:
    """Return a value, NaN in place of None."""
    return math.nan if value is None else value
