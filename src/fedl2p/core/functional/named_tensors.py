"""Algebra on named tensors of C clients: products, gradients, norms, a linear solver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Members = tuple[int, ...] | None
"""Positions of clients in their stack; None for all in order."""

NamedTensors = dict[str, Tensor]
"""Tensors by parameter name, each of shape (C, ...)."""


def gradient(total: Tensor, inputs: NamedTensors, *, create_graph: bool = False) -> NamedTensors:
    """Return the gradient of a number by every input; zero where it does not depend on it."""
    grads = torch.autograd.grad(
        total,
        list(inputs.values()),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


def vector_jacobian(
    outputs: NamedTensors, inputs: NamedTensors, vector: NamedTensors
) -> NamedTensors:
    """Return vector^T d outputs / d inputs; the graph is kept."""
    attached = [k for k, o in outputs.items() if o.requires_grad]
    if not attached:
        return {k: torch.zeros_like(v) for k, v in inputs.items()}
    grads = torch.autograd.grad(
        [outputs[k] for k in attached],
        list(inputs.values()),
        grad_outputs=[vector[k].detach().to(outputs[k].dtype) for k in attached],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


def accumulate(total: NamedTensors, members: Members, values: NamedTensors) -> None:
    """Add values of some clients (None: of all), of shape (c, ...), to the totals, in place."""
    for name, value in values.items():
        if members is None:
            total[name] += value
        else:
            rows = torch.tensor(members, device=value.device)
            total[name].index_add_(0, rows, value)


def gather_clients(pieces: Sequence[tuple[Members, NamedTensors]]) -> NamedTensors:
    """Concatenate tensors of disjoint subsets of the clients and restore the clients' order."""
    if pieces[0][0] is None:
        return pieces[0][1]
    order = torch.tensor([i for members, _ in pieces for i in members or ()])
    back = order.argsort()
    return {
        k: torch.cat([piece[k] for _, piece in pieces]).index_select(0, back.to(v.device))
        for k, v in pieces[0][1].items()
    }


def inner_products(a: NamedTensors, b: NamedTensors) -> Tensor:
    """Return the inner product of each client and parameter tensor, shape (C, P).

    In the widest dtype of the tensors, at least float32.
    """
    dtype = torch.float32
    for tensor in b.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    # a last dimension of 1 first: a scalar tensor of C clients has shape (C,)
    products = (a[k].to(dtype) * b[k].to(dtype) for k in b)
    return torch.stack([p.unsqueeze(-1).flatten(1).sum(1) for p in products], dim=1)


def inner_product(a: NamedTensors, b: NamedTensors) -> Tensor:
    """Return the inner product of each client over all tensors, shape (C,)."""
    return inner_products(a, b).sum(1)


def add_scaled(a: NamedTensors, scale: Tensor, b: NamedTensors) -> NamedTensors:
    """Return a + scale b with one scale per client, shape (C,); dtypes are those of a."""
    return {k: (a[k] + scale.view(-1, *(1,) * (a[k].dim() - 1)) * b[k]).to(a[k].dtype) for k in a}


def conjugate_gradients(
    matvec: Callable[[NamedTensors], NamedTensors],
    b: NamedTensors,
    iterations: int,
    tolerance: float = 1e-10,
) -> NamedTensors:
    """Solve matvec(q) = b for each client by itself; a client stops at negative curvature."""
    q = {k: torch.zeros_like(v) for k, v in b.items()}
    residual, direction = dict(b), dict(b)
    square = inner_product(residual, residual)
    first = square.clone()
    active = square > 0
    for _ in range(iterations):
        product = matvec(direction)
        curvature = inner_product(direction, product)
        active = active & (curvature > 0) & (square > tolerance**2 * first)
        if not bool(active.any()):
            break
        alpha = torch.where(active, square / curvature, torch.zeros_like(square))
        q = add_scaled(q, alpha, direction)
        residual = add_scaled(residual, -alpha, product)
        new = torch.where(active, inner_product(residual, residual), square)
        ratio = torch.where(active, new / square, torch.zeros_like(square))
        direction = add_scaled(residual, ratio, direction)
        square = new
    return q


def norms_within(tensors: Iterable[Tensor], limit: float) -> bool:
    """Tell in one pass and one read whether every tensor's Euclidean norm is at most ``limit``.

    Then no entry is NaN, infinite, or larger in size. If not, that may still be so: the square of
    a finite entry may overflow. (On a CPU, torch's kernel of this norm is far faster than that of
    the largest entry.)
    """
    some = [t for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for norm in torch._foreach_norm(some) if some else ():
        by_dtype.setdefault(norm.dtype, []).append(norm)
    largest = [torch.stack(norms).max() for norms in by_dtype.values()]  # of NaN it is NaN
    return all(float(norm) <= limit for norm in largest)
