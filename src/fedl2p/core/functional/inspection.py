"""What a model does when it runs, seen on the first batch: randomness, state, norms, kernels.

Nothing of this can be read off the types of layers. A pass in evaluation mode and one in training
mode show it. What fine-tuning could not do right is refused here, in one line.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedl2p.core.functional.copies import Modes, eager_copy
from fedl2p.core.functional.kernels import nodes
from fedl2p.core.functional.randomness import watched
from fedl2p.core.functional.workspace import Findings, Workspace

ROWS = 32
"""Examples of the first batch that are looked at."""

_RECOMPUTED = (
    "the model recomputes activations in its backward pass (torch.utils.checkpoint), when its "
    "tensors are no longer in place; switch that off, hypergradients recompute by segments of steps"
)

_ATTENTION = (
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
)

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

Run = Callable[[bool, AbstractContextManager[object]], tuple[Any, dict[str, Tensor]]]
"""Runs the working copy on the first batch, in training mode or not, from global statistics, the
forward itself within a context; returns outputs and buffers afterwards."""


def examine(
    work: Workspace,
    run: Run,
    plain: nn.Module,
    reference: Callable[[nn.Module], Any],
    *,
    original: nn.Module | None,
    device: torch.device,
) -> Findings:
    """Run a model once in each mode and return what it does.

    Parameters
    ----------
    work, run
        The working copy.
    plain, reference
        A copy of the user's model, and what runs such a copy on the first batch.
    original
        The user's model, if it still exists.

    Raises
    ------
    ValueError
        If the working copy does not give the model's own outputs in evaluation mode, or the model
        uses its tensors in a way in which they cannot be replaced.
    """
    work.learn(Findings(carried=tuple(work.buffers)))
    own = eager_copy(plain)
    Modes(own).set(False)
    with torch.no_grad(), watched(device):
        wanted = reference(own)
    del own
    watch = _Watch(work, original)
    with (
        torch.no_grad(),
        watched(device) as in_evaluation,
        _calls(work) as evaluated,
        last_linear(work.module) as called,
    ):
        outputs, _ = run(False, watch)
    _check_parameters(work, plain)
    _check_equal(outputs, wanted)
    statistics = {k: (n.running_mean.clone(), n.running_var.clone()) for k, n in work.norms.items()}
    # With gradients on, as in training; nothing requires any, so that no graph is made.
    with (
        torch.enable_grad(),
        watched(device) as drawn,
        _calls(work) as trained,
        _without_recomputation(),
    ):
        _, after = run(True, watch)
    for name, (mean, var) in statistics.items():
        norm = work.norms[name]
        if not (_equal(norm.running_mean, mean) and _equal(norm.running_var, var)):
            raise ValueError(
                f"training writes the running statistics of norm layer {name!r} otherwise than by "
                "batch_norm, so they cannot be mixed; keep such statistics in a layer of your own"
            )
        if not evaluated[name] and not trained[name] and name in watch.read:
            raise ValueError(
                f"norm layer {name!r} is computed by {watch.read[name]}, not by "
                "torch.nn.functional.batch_norm, so its statistics cannot be mixed; call the layer "
                "or batch_norm, or keep the statistics in a layer of your own"
            )
    with torch.no_grad(), watched(device):
        _check_equal(run(False, nullcontext())[0], wanted)
    return Findings(
        draws=frozenset(drawn),
        draws_in_evaluation=frozenset(in_evaluation),
        carried=tuple(k for k, b in work.buffers.items() if not _equal(after[k], b)),
        frozen=frozenset(k for k, calls in trained.items() if calls and not any(calls)),
        attention=watch.attention,
        recurrent=watch.recurrent,
        head=called[-1] if called else None,
    )


@contextmanager
def last_linear(module: nn.Module) -> Iterator[list[str]]:
    """Yield a list that collects the names of the linear layers that a forward calls."""
    called: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    with ExitStack() as hooks:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear):
                hooks.callback(layer.register_forward_pre_hook(noting(name)).remove)
        yield called


@contextmanager
def _without_recomputation() -> Iterator[None]:
    """Refuse models that recompute activations."""
    try:
        with disable_saved_tensors_hooks(_RECOMPUTED):
            yield
    except RuntimeError as error:
        if _RECOMPUTED not in str(error):
            raise
        raise ValueError(_RECOMPUTED) from error


class _calls:
    """Collects, of every norm's calls meanwhile, whether they were for training."""

    def __init__(self, work: Workspace) -> None:
        self._work, self._open = work, ExitStack()

    def __enter__(self) -> dict[str, list[bool]]:
        return {k: self._open.enter_context(n.calls()) for k, n in self._work.norms.items()}

    def __exit__(self, *error: object) -> None:
        self._open.close()


class _Watch(TorchFunctionMode):
    """Looks at every function of torch that the model calls.

    Parameters
    ----------
    work
        The working copy, whose own tensors are replaced while it runs.
    original
        The user's model: its tensors must not be reached from the copy.
    """

    def __init__(self, work: Workspace, original: nn.Module | None) -> None:
        super().__init__()
        self.attention = self.recurrent = False
        self.read: dict[str, str] = {}
        """The functions that read the statistics of norms otherwise than by batch_norm."""
        self._beside = dict(work.replaced)
        if original is not None:
            for name, tensor in (*original.named_parameters(), *original.named_buffers()):
                self._beside[id(tensor)] = name
        self._statistics = {
            id(t): name
            for name, norm in work.norms.items()
            for t in (norm.norm._buffers["running_mean"], norm.norm._buffers["running_var"])
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func in _ATTENTION:
            self.attention = True
        if func in _RECURRENT:
            self.recurrent = True
        result = func(*args, **kwargs)
        asks = name == "__get__" and not isinstance(result, Tensor)  # for a shape or a dtype
        if not asks and func is not F.batch_norm and func is not torch.batch_norm:
            for tensor in _tensors((*args, *kwargs.values())):
                self._see(tensor, name)
        return result

    def _see(self, tensor: Tensor, name: str) -> None:
        if id(tensor) in self._beside:
            raise ValueError(
                f"the model reaches its tensor {self._beside[id(tensor)]!r} ({name}) through a "
                "list, a closure or a global, where no other can be put in its place; reach it "
                "through its module, self.layer.weight"
            )
        if id(tensor) in self._statistics:
            self.read.setdefault(self._statistics[id(tensor)], name)


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(tuple(value))


def check_settled(written: dict[str, Tensor], again: Callable[[], Any]) -> None:
    """Refuse a model that changes its parameters in place anew whenever it runs.

    Parameters
    ----------
    written
        The parameters that a pass has changed in place.
    again
        Runs the model once more on these.
    """
    before = {name: p.clone() for name, p in written.items()}
    if before:
        again()
    for name, p in written.items():
        if not _equal(p, before[name]):
            raise ValueError(
                f"every forward pass changes the model's parameter {name!r} in place (a decay?), "
                "which is no step of an optimizer; keep what a forward changes in a buffer"
            )


def check_graph(outputs: Any) -> None:
    """Refuse outputs that parameters cannot be trained by."""
    for t in tree_leaves(outputs):
        if isinstance(t, Tensor) and t.is_complex():
            raise ValueError(
                f"the outputs are of {t.dtype}, but losses take real numbers; return their "
                "absolute value or real part"
            )
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise ValueError(
            "the outputs have no gradient by any trainable parameter (torch.no_grad or detach in "
            "the model's forward?), so there is nothing to fine-tune; let gradients through"
        )
    for node in nodes(t.grad_fn for t in tensors):
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(_RECOMPUTED)


def _check_parameters(work: Workspace, plain: nn.Module) -> None:
    for (name, mine), p in zip(work.module.named_parameters(), plain.parameters(), strict=True):
        if not _equal(mine, p):
            raise ValueError(
                f"model.eval() changes the model's parameter {name!r} (merged adapters?), so that "
                "training and evaluation are of different tensors; switch the merging off"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _check_equal(outputs: Any, wanted: Any) -> None:
    """Compare the outputs of the working copy with the model's own, in evaluation mode."""
    mine = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    own = [t for t in tree_leaves(wanted) if isinstance(t, Tensor)]
    worst = 0.0 if len(mine) == len(own) else float("inf")
    for a, b in zip(mine, own, strict=False):
        if a.shape != b.shape:
            worst = float("inf")
        elif b.is_floating_point() and b.numel():
            allowed = torch.finfo(b.dtype).eps ** 0.5
            size = b.double().nan_to_num(0, 0, 0).abs().max().clamp_min(1e-30)
            off = (a.double() - b.double()).nan_to_num(0, 0, 0).abs().max()
            worst = max(worst, float(off / size) / allowed)
    if worst > 10:
        raise ValueError(
            "the model does not compute the same when it runs again: a copy with the same weights "
            "gives other outputs in evaluation mode; see that its forward depends on nothing but "
            "its inputs, parameters and buffers"
        )


_known: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, Findings]] = (
    weakref.WeakKeyDictionary()
)


def known(model: nn.Module) -> Findings | None:
    """Return what was found about a model before, if it is still built the same."""
    built, findings = _known.get(model, (None, None))
    return findings if findings is not None and built == structure(model) else None


def remember(model: nn.Module, findings: Findings) -> None:
    """Keep what was found about a model."""
    _known[model] = structure(model), findings


def inherit(copied: nn.Module, model: nn.Module) -> None:
    """Let a copy with other weights be known for what its original is known for."""
    findings = known(model)
    if findings is not None:
        remember(copied, findings)


def structure(model: nn.Module) -> Hashable:
    """Return what says how a model is built: its modules, their modes, settings and hooks."""
    return tuple(
        (
            type(module),
            *((k, v) for k, v in module.__dict__.items() if isinstance(v, _PLAIN)),
            # ids, since a bound method would keep the model alive
            id(module.__dict__.get("forward")),
            *(
                (key, id(hook))
                for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
                for key, hook in module.__dict__[kind].items()
            ),
            *(
                (name, p.shape, p.dtype, p.device, p.requires_grad)
                for name, p in (*module._parameters.items(), *module._buffers.items())
                if p is not None
            ),
        )
        for module in model.modules()
    )


_PLAIN = (bool, int, float, str, type(None))
