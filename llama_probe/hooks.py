"""Naming, reading and editing the quantities of a model: the one seam to TransformerLens.

A hook is a function `fn(tensor, hook)` at a named `HookPoint`; what it returns replaces the tensor,
and returning None leaves it as it is. What this module adds to TransformerLens' classes:

1. Names may be globs (`"blocks.*.hook_resid_post"`), and a name that matches nothing is an error
   that gives the near ones.
2. A hook works on its own copy of the tensor, so one that edits in place changes neither what was
   cached nor what the caller passed in.
3. What a hook returns must have the shape of what it was given.
4. `run_with_cache` returns an `ActivationCache`, and `pos_slice` cuts the position axis whatever
   the hook. Without a filter it leaves out the hooks that multiply memory (`OPT_IN`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import wraps
from threading import RLock
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache as _ActivationCache
from transformer_lens.hook_points import HookPoint as _HookPoint
from transformer_lens.hook_points import LensHandle
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities.components_utils import get_act_name
from transformer_lens.utilities.slice import Slice

from llama_probe.errors import HookNameError, InputError, near

Hook = Callable[..., Any]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

# The ends of the names of hooks that multiply memory: computed when listened to, and cached only
# when asked for.
OPT_IN = (
    "attn.hook_q_input",
    "attn.hook_k_input",
    "attn.hook_v_input",
    "attn.hook_result",
    "mlp.hook_expert_pre",
    "mlp.hook_expert_pre_linear",
    "mlp.hook_expert_post",
    "mlp.hook_expert_out",
)
_MLP_WORDS = ("pre", "pre_linear", "post", "router_logits", "expert_", "shared_")
_ATTENTION_WORDS = ("q_input", "k_input", "v_input")


def act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full name of a hook from its short one, as TransformerLens' `get_act_name`.

    Args:
        name: The word after `hook_`; a full name comes back unchanged.
        layer: The block, or "*" for all of them.
        layer_type: "ln1", "ln2", "attn" or "mlp", where the word alone does not say it.

    >>> act_name("resid_post", 3), act_name("pattern", 0), act_name("expert_out", "*")
    ('blocks.3.hook_resid_post', 'blocks.0.attn.hook_pattern', 'blocks.*.mlp.hook_expert_out')
    """
    if layer is not None and layer_type is None:
        if name.startswith(_MLP_WORDS):
            layer_type = "mlp"
        elif name in _ATTENTION_WORDS:
            layer_type = "attn"
    return get_act_name(name, layer, layer_type)


def match_names(wanted: NamesFilter, names: Iterable[str]) -> list[str]:
    """The hook names that a filter means, in the model's order.

    Args:
        wanted: A name, a glob, a sequence of these, a function of a name, or None for all names
            but those that multiply memory.
        names: The names that there are.

    Raises:
        HookNameError: A name, a glob or the function matches nothing.

    >>> match_names("blocks.*.hook_z", ["blocks.0.hook_z", "blocks.1.hook_z", "hook_embed"])
    ['blocks.0.hook_z', 'blocks.1.hook_z']
    """
    if isinstance(wanted, str) and isinstance(names, Mapping) and wanted in names:
        return [wanted]
    names = list(names)
    if wanted is None:
        return [name for name in names if not name.endswith(OPT_IN)]
    if callable(wanted):
        if found := [name for name in names if wanted(name)]:
            return found
        raise HookNameError(f"the names filter accepts none of the model's {len(names)} hooks")
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    if not patterns:
        raise HookNameError("the names filter is an empty list, which would match no hook")
    matched: set[str] = set()
    known = set(names)
    for pattern in patterns:
        found = {pattern} & known or {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise HookNameError(
                f"no hook is named or matches {pattern!r}{near(pattern, names)}; "
                "model.hook_dict has all the names"
            )
        matched |= found
    return [name for name in names if name in matched]


def reads_only(hook: Hook) -> Hook:
    """Mark a hook that neither returns anything nor edits in place: it needs no copy to work on."""
    hook.reads_only = True  # type: ignore[attr-defined]
    return hook


class HookPoint(_HookPoint):
    """The identity, at a place where tensors are read and edited."""

    def __call__(self, x: Tensor) -> Tensor:
        """Pass a tensor through the hooks here; costs next to nothing where there are none."""
        if not self.listening:
            return x
        starts = self._backward_hooks and x.is_floating_point() and not x.requires_grad
        if starts and torch.is_grad_enabled():
            # With frozen weights nothing before this point has a gradient: let it start here.
            x = x.detach().requires_grad_()
        return super().__call__(x)

    @property
    def listening(self) -> bool:
        """Whether any hook is here, forward or backward."""
        return bool(self._forward_hooks or self._backward_hooks)

    @property
    def editing(self) -> bool:
        """Whether any forward hook here may change the tensor."""
        readers = sum(hasattr(handle.user_hook, "reads_only") for handle in self.fwd_hooks)
        return len(self._forward_hooks) > readers

    def add_hook(
        self, hook: Hook, dir: Literal["fwd", "bwd"] = "fwd", *args: Any, **options: Any
    ) -> LensHandle:
        """Add a hook; a forward hook is given a copy of its own unless it is `reads_only`."""
        own = _on_a_copy(hook) if dir == "fwd" and not hasattr(hook, "reads_only") else hook
        handle = super().add_hook(own, dir, *args, **options)
        handle.user_hook = hook
        return handle


def _on_a_copy(hook: Hook) -> Hook:
    """Let a hook see a copy, and check what it returns; an edit in place counts as returned."""

    @wraps(hook, updated=())
    def on_a_copy(tensor: Tensor, hook: HookPoint) -> Tensor:
        copy = tensor.clone()
        result = wrapped(copy, hook=hook)
        return copy if result is None else _checked(result, tensor, hook)

    wrapped = hook
    return on_a_copy


def _checked(result: Any, tensor: Tensor, hook: HookPoint) -> Tensor:
    if not isinstance(result, Tensor):
        raise InputError(
            f"the hook at {hook.name} returned {type(result).__name__}, "
            "but should return a tensor or None"
        )
    if result.shape != tensor.shape:
        raise InputError(
            f"the hook at {hook.name} returned shape {tuple(result.shape)}, "
            f"but should keep the shape {tuple(tensor.shape)}"
        )
    if result.is_floating_point() != tensor.is_floating_point():
        raise InputError(
            f"the hook at {hook.name} returned {result.dtype}, but the values are {tensor.dtype}"
        )
    return result.to(tensor)


class ActivationCache(_ActivationCache):
    """TransformerLens' cache, with `cache["expert_out", 3]` for the mixture of experts as well."""

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        """A cached tensor, by its full name or by the arguments of `act_name`.

        A negative layer counts from the end.

        Raises:
            HookNameError: It was not cached.
        """
        parts: tuple[Any, ...] = (key,) if isinstance(key, str) else key
        if len(parts) > 1 and isinstance(parts[1], int) and parts[1] < 0:
            parts = (parts[0], self.model.cfg.n_layers + parts[1], *parts[2:])
        name = act_name(*parts)
        if name not in self.cache_dict:
            raise HookNameError(
                f"the cache has no {name!r}{near(name, self.cache_dict)}; names_filter chooses "
                "what run_with_cache keeps"
            )
        return self.cache_dict[name]

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "ActivationCache":
        """The cache of some of the batch: an index, or a slice's arguments as a tuple."""
        cut = super().apply_slice_to_batch_dim(batch_slice)
        return ActivationCache(cut.cache_dict, self.model, cut.has_batch_dim)


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def lock_of(model: nn.Module) -> RLock:
    """What a thread holds while it runs a model, or has hooks in it.

    Hooks belong to the model, not to a run of it: without this, those of a sweep would edit what a
    widget's callback computes in another thread meanwhile. The thread that holds it may take it
    again.
    """
    return _LOCKS.setdefault(model, RLock())


class HookedModel(HookedRootModule):
    """A module whose named quantities can be read and edited, by one thread at a time."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; see `forward`."""
        with lock_of(self):
            return super().__call__(*args, **kwargs)

    def hook_names(self, wanted: NamesFilter = "*") -> list[str]:
        """The names of the hooks that a name, a glob, a sequence or a function means.

        Raises:
            HookNameError: Nothing matches.
        """
        return match_names(wanted, self.hook_dict)

    def add_hook(self, name: Any, hook: Hook, *args: Any, **options: Any) -> None:
        """Add a hook that stays until `reset_hooks`; prefer `with model.hooks(...)`.

        Raises:
            HookNameError: No hook has that name.
        """
        for found in match_names(name, self.hook_dict):
            super().add_hook(found, hook, *args, **options)

    def remove_all_hook_fns(self, *args: Any, **options: Any) -> None:
        """As TransformerLens', without the work at the many points that have no hook."""
        for point in self.hook_points():
            if point.fwd_hooks or point.bwd_hooks:
                point.remove_hooks(*args, **options)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[Any] = (),
        bwd_hooks: Iterable[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedModel"]:
        """Put hooks in place for the length of a `with` block, whatever happens in it.

        Args:
            fwd_hooks: Pairs of a name (a glob, a list of names, a function of a name) and a
                function `fn(tensor, hook)`.
            bwd_hooks: The same, for the gradients of a backward pass inside the block.
            reset_hooks_end: Take the hooks away at the end.
            clear_contexts: Empty each `hook.ctx` at the end as well.

        Raises:
            HookNameError: A name matches nothing; no hook is in place then.
        """
        forward, backward = self._resolved(fwd_hooks), self._resolved(bwd_hooks)
        with lock_of(self), super().hooks(forward, backward, reset_hooks_end, clear_contexts):
            yield self

    def _resolved(self, pairs: Iterable[Any]) -> list[tuple[Any, Callable[..., Any]]]:
        pairs = list(pairs)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise InputError("hooks are a list of pairs of a name and a function: [(name, fn), …]")
        return [(name, fn) for wanted, fn in pairs for name in match_names(wanted, self.hook_dict)]

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Iterable[Any] = (),
        bwd_hooks: Iterable[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model once with hooks in place; see `hooks` for them.

        Raises:
            HookNameError: A name matches nothing.
            InputError: A hook returned something that cannot take the tensor's place, or
                `bwd_hooks` are given, which only act while a backward pass runs (use `hooks`).
        """
        bwd_hooks = list(bwd_hooks)
        if bwd_hooks and reset_hooks_end:
            raise InputError(
                "run_with_hooks takes its hooks away before any backward pass can run; "
                "use `with model.hooks(bwd_hooks=...)` around forward and backward"
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*args, **kwargs)

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run the model once and keep what its hooks pass on.

        Args:
            *args: What the model is run on.
            names_filter: Which hooks: a name, a glob, a sequence of these or a function; None for
                all but those that multiply memory (`OPT_IN`).
            device: Where to keep the tensors; None: where they are.
            remove_batch_dim: Drop the batch axis; the batch must be 1.
            incl_bwd: Run backward from the result, a scalar, and keep gradients as "<name>_grad".
            reset_hooks_end: Take the caching hooks away at the end.
            clear_contexts: Empty each `hook.ctx` at the end as well.
            pos_slice: What to keep of the position axis (of the query axis of scores and
                patterns): one position, or a slice's arguments as a tuple. The axis stays.
            **kwargs: The model's own keyword arguments.

        Returns:
            The model's result and the cache of detached tensors.

        Raises:
            HookNameError: The filter matches nothing.
            InputError: `remove_batch_dim` with a batch of more than one, or there is no such
                position.
        """
        names = match_names(names_filter, self.hook_dict)
        keep = Slice.unwrap(pos_slice)
        kept: dict[str, Tensor] = {}

        def store(tensor: Tensor, name: str) -> None:
            axis = 2 if name.endswith(("hook_attn_scores", "hook_pattern")) else 1
            whole = tensor.detach()
            try:
                tensor = keep.apply(whole, dim=axis)
            except IndexError:
                raise InputError(
                    f"pos_slice is {pos_slice}, but {name} has {whole.shape[axis]} positions here "
                    "(logits_at leaves some of them out after the last layer)"
                ) from None
            # A view would keep the whole tensor in memory.
            tensor = tensor.clone() if tensor.numel() < whole.numel() else tensor
            tensor = tensor if device is None else tensor.to(device)
            if remove_batch_dim and tensor.shape[0] != 1:
                raise InputError(f"remove_batch_dim needs a batch of 1, not {tensor.shape[0]}")
            kept[name] = tensor[0] if remove_batch_dim else tensor

        @reads_only
        def forward(tensor: Tensor, hook: HookPoint) -> None:
            store(tensor, str(hook.name))

        @reads_only
        def backward(tensor: Tensor, hook: HookPoint) -> None:
            store(tensor, f"{hook.name}_grad")

        with self.hooks(
            [(names, forward)],
            [(names, backward)] if incl_bwd else [],
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
        ):
            result = self(*args, **kwargs)
            if incl_bwd:
                result.backward()
        return result, ActivationCache(kept, self, has_batch_dim=not remove_batch_dim)
