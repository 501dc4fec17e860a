"""Assignment of the examples of one pool to clients: positions by client and part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fedl2p.data.pools.partition import class_distribution, deal
from fedl2p.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class ClientIndices:
    """The examples of one client: positions in the pool, by part.

    Parameters
    ----------
    train, validation, test
        Shape (n,), int64.
    about
        The client's description for reports.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    about: Mapping[str, str | float] = field(default_factory=dict)


def client_names(pool: str, count: int) -> tuple[str, ...]:
    """Return the names of numbered clients, e.g. ``seen-000`` to ``seen-999``."""
    width = max(2, len(str(count - 1)))
    return tuple(f"{pool}-{i:0{width}d}" for i in range(count))


def deal_clients(
    labels: Tensor,
    is_test: Tensor,
    names: Sequence[str],
    *,
    train: int,
    validation: int,
    test: int,
    classes: int,
    alpha: float,
    seed: tuple[int, str],
) -> dict[str, ClientIndices]:
    """Deal a data set's training and test examples out to clients, with label skew.

    A client's class distribution is one draw from Dirichlet(alpha), the same for its three parts;
    no two clients share an example.

    Parameters
    ----------
    labels, is_test
        Shape (n,): class labels, and whether an example is one of the data set's test part.
    names
        The clients.
    train, validation, test
        Examples of each client; the first two come from the data set's training part.
    classes
        Number of classes.
    alpha
        Concentration of the Dirichlet distribution.
    seed
        The study's seed and the source's name.

    Returns
    -------
    dict
        Indices by client.

    Raises
    ------
    ValueError
        If there are fewer examples than the clients are to get.
    """
    # The last clients get what is left; in random order these are not always the unseen ones.
    order = torch.randperm(len(names), generator=generator(*seed, "order")).tolist()
    shuffled = [names[i] for i in order]
    distributions = torch.stack(
        [
            class_distribution(classes, alpha=alpha, generator=generator(*seed, name, "labels"))
            for name in shuffled
        ]
    )
    dealt = []
    for part, chosen, count in (("train", ~is_test, train + validation), ("test", is_test, test)):
        positions = chosen.nonzero().flatten()
        pieces = deal(labels[positions], distributions, count, generator=generator(*seed, part))
        dealt.append([positions[piece] for piece in pieces])
    return {
        name: ClientIndices(train=first[:train], validation=first[train:], test=second)
        for name, first, second in zip(shuffled, *dealt, strict=True)
    }


def deal_groups(
    groups: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    labels: Tensor,
    *,
    seen: int,
    unseen: int,
    classes: int,
    alpha: float,
    seed: tuple[int, str],
    kind: str,
) -> tuple[dict[str, ClientIndices], dict[str, ClientIndices]]:
    """Deal each group's examples out to the clients of that group, with label skew.

    A client's class distribution is one draw from Dirichlet(alpha), the same for its three parts.
    Within a group all clients get equally many examples, and no two share one.

    Parameters
    ----------
    groups
        Positions of the training, validation and test examples of every group (e.g. a domain).
    labels
        Shape (n,), of the whole pool.
    seen, unseen
        Clients per group.
    classes
        Number of classes.
    alpha
        Concentration of the Dirichlet distribution.
    seed
        The study's seed and the source's name.
    kind
        Key of the group's name in a client's description, e.g. ``domain``.

    Returns
    -------
    seen, unseen
        Indices by client: ``GROUP-00``, ...; the unseen ones have the highest numbers.

    Raises
    ------
    ValueError
        If a part of a group has fewer examples than there are clients.
    """
    dealt: tuple[dict[str, ClientIndices], dict[str, ClientIndices]] = ({}, {})
    for group, parts in groups.items():
        names = client_names(group, seen + unseen)
        # The last clients get what is left; in random order these are not always the unseen ones.
        order = torch.randperm(len(names), generator=generator(*seed, group, "order")).tolist()
        shuffled = [names[i] for i in order]
        distributions = torch.stack(
            [
                class_distribution(classes, alpha=alpha, generator=generator(*seed, name, "labels"))
                for name in shuffled
            ]
        )
        by_part = []
        for part, positions in zip(PARTS, parts, strict=True):
            if len(positions) < len(names):
                raise ValueError(
                    f"{group} has {len(positions)} {part} examples for {len(names)} clients; each "
                    "needs at least one: use fewer clients"
                )
            pieces = deal(
                labels[positions],
                distributions,
                len(positions) // len(names),
                generator=generator(*seed, group, part),
            )
            by_part.append([positions[piece] for piece in pieces])
        indices = {
            name: ClientIndices(train=train, validation=validation, test=test, about={kind: group})
            for name, train, validation, test in zip(shuffled, *by_part, strict=True)
        }
        dealt[0].update({name: indices[name] for name in names[:seen]})
        dealt[1].update({name: indices[name] for name in names[seen:]})
    return dealt


def check_counts(source: Any, *, at_least_one: Sequence[str], or_none: str = "") -> None:
    """Check the numbers of clients and examples of a source, and its alpha if it has one.

    Raises
    ------
    ValueError
        If one is out of range; the message names the field.
    """
    for name in at_least_one:
        if getattr(source, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(source, name)}")
    if or_none and getattr(source, or_none) < 0:
        raise ValueError(f"{or_none} must be 0 or more, got {getattr(source, or_none)}")
    alpha = getattr(source, "alpha", 1.0)
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}; 1000 gives no label skew")
