"""Gradients of the validation loss with respect to a client's hyperparameters.

L_val(theta_K(h); beta) with h = (beta, eta) = (mix, rate): how a client should change its mix and
its rates so that the model fine-tuned with them does better on its validation part. Six estimators,
from exact to cheap. Write v = dL_val/dtheta_K (evaluation mode), g_k for the k-th inner gradient,
"direct" for dL_val/dbeta with theta_K and the running statistics held.

=============  ==========================================  =========================================
mode           d/d eta_p                                   d/d beta
=============  ==========================================  =========================================
published      as the public reference code (below)        the same
last-step      -<v_p, g_{K-1,p}>                           direct
trajectory     -<v_p, sum_k g_{k,p}>                       direct - K d/dbeta <g(theta_K), eta v>
implicit       as trajectory                               direct - d/dbeta <g(theta_K), H^-1 v>
truncated      exact through the last T steps, the older   exact through the last T steps
               ones with identity Jacobian
unrolled       exact                                       exact, running statistics included
=============  ==========================================  =========================================

``published`` is Lee et al., "FedL2P", NeurIPS 2023, section 3.3 (implicit function theorem, Neumann
series of Lorraine et al., AISTATS 2020) as its public code computes it, for comparison only: the
series lacks its closing factor psi, the derivative by the rates has the opposite sign of the true
one where the series converges, and the Hessian is that of the evaluation-mode loss.

``last-step`` and ``trajectory`` leave out that the weights act on the running statistics of later
batches, and ``last-step``, ``trajectory`` and ``implicit`` that mix and rates act on the running
statistics: the price of one backward pass.

``truncated`` is the default: on the digits recipe with K = 15 no difference of T = 5 to the exact
mode was found at half its cost, and the cheaper modes did worse on average
(``benchmarks/hypergradients.py``, ``benchmarks/results/hypergradients.md``); T = 10 because T = 5
lost a little in a later comparison (``docs/choices.md``).

With momentum, weight decay or Adam in the inner loop the direction of a step stands for g_k, and
the optimizer's moments are carried through the differentiated steps: ``unrolled`` stays exact,
``truncated`` holds the older directions and the moments before the last T steps, ``last-step`` is
-<v_p, d_{K-1,p}> by a rate. ``trajectory``, ``implicit`` and ``published`` are refused: their
formulas hold for plain SGD only.

Shapes: C clients, B norms, P parameter tensors, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fedl2p.core import trees
from fedl2p.core.clientdata import Examples
from fedl2p.core.data_check import check_examples
from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.inner_loop import DivergedError
from fedl2p.core.finetuning.optimizers import optimizer_of
from fedl2p.core.functional.kernels import without_second_derivative
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hypergradients import at_end
from fedl2p.core.hypergradients.problem import Hypergradient, Problem
from fedl2p.core.hypergradients.unrolled import unrolled
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.objective import Loss, Pick, objective
from fedl2p.core.settings import (
    HypergradientConfig,
    InnerLoop,
    InnerOptimizer,
    Mode,
    Statistics,
    check_mode,
)
from fedl2p.core.trees import Tree
from fedl2p.core.user_data import read_examples

UNEQUAL_SIZES: tuple[Mode, ...] = ("last-step", "truncated", "unrolled")
"""Modes whose stacks may have clients with unequally many examples; the others take second
derivatives on one batch of all clients."""

_ESTIMATORS: dict[Mode, Callable[[Problem, HypergradientConfig], Hypergradient]] = {
    "published": at_end.published,
    "last-step": at_end.last_step,
    "trajectory": at_end.trajectory,
    "implicit": at_end.implicit,
    "truncated": unrolled,
    "unrolled": unrolled,
}


def hypergradient(
    model: nn.Module,
    hyperparams: Hyperparams,
    batches: Sequence[Any],
    validation: Any,
    *,
    mode: Mode | None = None,
    config: HypergradientConfig | None = None,
    following: Any = None,
    statistics: Statistics = "corrected",
    loss: Loss = "cross-entropy",
    ignore_index: int | None = None,
    outputs: Pick | None = None,
    optimizer: InnerOptimizer = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Return dL_val/dh of one client by name.

    Parameters
    ----------
    model
        The global model; only read.
    hyperparams
        The client's, mix of shape (B,) and rate of shape (P,).
    batches
        The K training batches of the inner steps, in order: pairs (inputs, targets), see
        :mod:`fedl2p.core.user_data`.
    validation
        The validation batch.
    mode
        The estimator, see the module's table; None for that of ``config``.
    config
        The estimator and its settings, instead of ``mode``; None for the defaults.
    following
        The training batch after the last inner step, at which ``published`` and ``implicit`` take
        their second derivatives; by default the last inner batch again.
    statistics
        How running statistics start, see :class:`fedl2p.core.settings.InnerLoop`.
    loss, ignore_index, outputs
        What is minimised, see :mod:`fedl2p.core.objective`.
    optimizer, momentum, weight_decay
        What takes the inner steps, see there.

    Returns
    -------
    dict
        ``{"mix": {norm: value}, "rate": {parameter: value}}``, in units of the loss per unit of the
        hyperparameter.

    Raises
    ------
    ValueError
        If both ``mode`` and ``config`` are given, the hyperparameters are another model's, the
        batches do not fit the model or the loss, the mode is for plain SGD only and the inner steps
        are not, or the model has no second derivative and the mode takes one.
    DivergedError
        If the hypergradient is not finite.
    """
    if mode is not None and config is not None:
        raise ValueError(
            f"mode {mode!r} and a config with mode {config.mode!r} are both given; give one of them"
        )
    if config is None:
        config = HypergradientConfig() if mode is None else HypergradientConfig(mode=mode)
    net = FunctionalModel(model, objective(loss, ignore_index=ignore_index, outputs=outputs))
    if hyperparams.sites != net.sites:
        raise ValueError(
            "the hyperparameters were made for another model: their names of norm layers or "
            "parameter tensors differ from this model's"
        )
    stacked = Hyperparams.stack([hyperparams]).to(net.device, net.dtype)
    problem = Problem(
        net=net,
        mix=stacked.mix.detach(),
        rate=stacked.rate.detach(),
        batches=[_one_client(net, b, f"batch {i}") for i, b in enumerate(batches)],
        validation=[StackBatch(*_one_client(net, validation, "validation"))],
        statistics=statistics,
        following=None if following is None else _one_client(net, following, "following"),
        optimizer=optimizer_of(
            InnerLoop(optimizer=optimizer, momentum=momentum, weight_decay=weight_decay)
        ),
    )
    result = stack_hypergradient(problem, config)
    for what, values in (("mix", result.mix), ("rate", result.rate), ("loss", result.loss)):
        if not bool(values.isfinite().all()):
            raise DivergedError(
                f"the hypergradient is not finite ({what}): fine-tuning diverged under rates up to "
                f"{float(hyperparams.rate.max()):.3g}; use smaller rates or fewer steps"
            )
    return {
        "mix": dict(zip(net.sites.norms, result.mix[0].tolist(), strict=True)),
        "rate": dict(zip(net.sites.params, result.rate[0].tolist(), strict=True)),
    }


def _one_client(net: FunctionalModel, batch: Any, what: str) -> tuple[Tree, Tree]:
    """Return a checked batch on the model's device, as that of a stack of one client."""
    examples = Examples(*read_examples(batch, what=what))
    check_examples(net, examples, what=what)
    x, y = examples.to(net.device)
    return trees.map_tree(lambda t: t[None], x), trees.map_tree(lambda t: t[None], y)


def stack_hypergradient(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Return dL_val/dh of a stack of clients.

    Clients may have unequally many examples under the modes of :data:`UNEQUAL_SIZES`.

    Raises
    ------
    ValueError
        If the model has no second derivative and the mode takes one.
    """
    check_mode(config.mode, plain_sgd=problem.optimizer is None)
    # before any state is made, or graph measured
    problem.net.examine(trees.rows(problem.validation[0].x, 0))
    try:
        return _ESTIMATORS[config.mode](problem, config)
    except (RuntimeError, NotImplementedError) as error:
        kernel = without_second_derivative(error)
        if kernel is None:
            raise
        raise ValueError(
            f"the model computes with {kernel}, which has no second derivative, but mode "
            f"{config.mode!r} takes one; use mode 'last-step', or another kernel in the model"
        ) from error
