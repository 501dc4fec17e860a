"""Clipped and noised: the mean of a round (central privacy), or one client's update (local).

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR
2018, arXiv 1710.06963, algorithm 1 with flat clipping and the fixed denominator. Andrew, Thakkar,
McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, arXiv
1905.03871, algorithm 1.

Clipping, standard deviations and the split of the noise are Flower's functions. Its strategies and
mods around them are not used; ``docs/privacy.md`` says why, point by point.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from flwr.supercore.differential_privacy import compute_adaptive_noise_params, compute_stdv

from fedl2p.federation.privacy.randomness import Gaussian
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.server.clipping import clip, difference, moved
from fedl2p.federation.server.replies import Reply
from fedl2p.method import State, Update


class PrivateMean:
    """The noised mean of clipped updates, and the bound where it adapts.

    Parameters
    ----------
    privacy
        Central or adaptive.
    cohort
        Clients expected in a round, m: the denominator, however many really answer. A client that
        is missing, or whose answer was rejected, so counts as one that wants no change.
    gaussian
        Returns a round's source of noise, from its number.
    """

    def __init__(
        self, privacy: Privacy, *, cohort: int, gaussian: Callable[[int], Gaussian]
    ) -> None:
        privacy.check(cohort)
        self._privacy, self._cohort, self._gaussian = privacy, cohort, gaussian
        self._multiplier, self._count_noise = privacy.noise, 0.0
        if privacy.mechanism == "adaptive":
            # Both releases of a round together cost what one with privacy.noise would.
            self._count_noise, self._multiplier = compute_adaptive_noise_params(
                privacy.noise, cohort, privacy.count_noise_of(cohort)
            )
        self.bound = privacy.clip

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in every entry of the mean, in the present round."""
        return compute_stdv(self._multiplier, self.bound, self._cohort)

    def combine(self, state: State, replies: Sequence[Reply], *, step: int) -> State:
        """Return the state moved by the noised mean; also without any reply.

        Parameters
        ----------
        state
            The state that was sent.
        replies
            Checked answers, sorted by client; their weights do not count.
        step
            Number of this release, from 0; each has noise of its own.
        """
        draw = self._gaussian(step)
        total = {name: np.zeros(tuple(tensor.shape)) for name, tensor in state.items()}
        within = 0
        for reply in replies:
            change = difference(state, reply.shared)
            within += not clip(change, self.bound)
            for name, array in change.items():
                total[name] += array
        mean = {
            name: array / self._cohort + self.deviation * draw(array.shape)
            for name, array in total.items()
        }
        if self._privacy.mechanism == "adaptive":
            self._adapt(within, len(replies), draw)
        return moved(state, mean)

    def _adapt(self, within: int, count: int, draw: Gaussian) -> None:
        """Move the bound towards the quantile, for the next round only.

        A client adds its bit minus one half, so that it changes the sum by one half, present or
        not; that is what the published split of the noise is for.
        """
        noise = self._count_noise * float(draw(()))
        fraction = 0.5 + (within - count / 2 + noise) / self._cohort
        self.bound *= math.exp(-self._privacy.clip_rate * (fraction - self._privacy.quantile))


def local_deviation(privacy: Privacy) -> float:
    """Return the standard deviation of the noise in every entry of a client's update.

    Whatever the client's data are, its clipped update lies within the bound, so two of them differ
    by twice the bound at most.
    """
    return compute_stdv(privacy.noise, 2 * privacy.clip, 1)


def privatised(update: Update, state: State, privacy: Privacy, draw: Gaussian) -> Update:
    """Return what may leave a client under local privacy.

    The update clipped and noised, the weight 1, no metrics. What stays on the client stays as it
    is. A client that failed sends noise around the state it received, since that it failed would
    tell something of its data.

    Parameters
    ----------
    update
        What the method has made.
    state
        The state that was received.
    privacy
        The node's own settings.
    draw
        Source of noise, for this update only.
    """
    failed = update.failure is not None
    change = difference(state, state if failed else update.shared)
    clip(change, privacy.clip)
    deviation = local_deviation(privacy)
    noised = {name: array + deviation * draw(array.shape) for name, array in change.items()}
    return dataclasses.replace(
        update, shared=moved(state, noised), weight=1.0, metrics={}, failure=None
    )
