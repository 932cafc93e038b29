"""Methods of one model instance replaced by ours, and put back: nothing is changed on a class."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn

from orchestrator.compression.decoder import Decoder
from orchestrator.compression.projector import expand_images
from orchestrator.compression.protocol import Point
from orchestrator.errors import UsageError

_GENERATION = ("generate", "_expand_inputs_for_generation")


def refuse_patched(module: nn.Module) -> None:
    """Refuses a model that something has replaced the forward of.

    Raises:
        UsageError: it is attached already, or was wrapped by something else.
    """
    patched = module.__dict__.get("forward")
    if patched is None:
        return
    if getattr(patched, "llavolta", False):
        raise UsageError("attach: this model is attached already; use switch() of its attachment, or detach() first")
    raise UsageError(
        f"attach: the forward of {type(module).__name__} was replaced by something else (accelerate's device map or "
        "mixed precision?); attach first, or load the model without it"
    )


def patch_forward(module: nn.Module, forward: Callable[[dict[str, Any]], Any], owner: Any) -> None:
    """Puts `forward`, which takes all arguments by name, in the place of a module's own.

    Args:
        module: The module.
        forward: What runs instead.
        owner: Whose it is, found again as `module.forward.llavolta`.
    """
    original = type(module).forward

    @functools.wraps(original)  # generate() reads the signature
    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(_named(original, self, args, kwargs))

    patched.__dict__["llavolta"] = owner
    # nn.Module.__setattr__ would put a bound method here too; the instance dict is what `restore` clears.
    module.__dict__["forward"] = MethodType(patched, module)


def patch_generate(model: nn.Module, decoder: Decoder) -> None:
    """Notes the prompt's length while `generate` runs: what asks stays the same while tokens are added."""
    original = getattr(type(model), "generate", None)
    if original is None:
        return

    @functools.wraps(original)
    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        named = _named(original, self, args, kwargs)
        prompts = [named[name] for name in ("input_ids", "inputs") if isinstance(named.get(name), Tensor)]
        before, decoder.prompt_columns = decoder.prompt_columns, prompts[0].shape[1] if prompts else None
        try:
            return original(self, *args, **kwargs)
        finally:
            decoder.prompt_columns = before

    model.__dict__["generate"] = MethodType(patched, model)
    if (expand := getattr(type(model), "_expand_inputs_for_generation", None)) is not None:
        _patch_expansion(model, decoder, expand)


def _patch_expansion(model: nn.Module, decoder: Decoder, expand: Callable[..., Any]) -> None:
    """Repeats the images of a row, not rows of pixels, where `generate` leaves encoding them to forward."""

    @functools.wraps(expand)
    def expanded(self: nn.Module, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if expand_size == 1 or ids is None or not _encodes_in_forward(decoder.points):
            return expand(self, expand_size, *args, **kwargs)
        images = expand_images(decoder.family, ids, expand_size, kwargs)
        ids, rest = expand(self, expand_size, *args, **{k: v for k, v in kwargs.items() if k not in images})
        return ids, {**rest, **images}

    model.__dict__["_expand_inputs_for_generation"] = MethodType(expanded, model)


def announce(model: nn.Module, points: Sequence[Point]) -> None:
    """While a point looks at how images are encoded, `generate` must leave that to forward, not do it before."""
    forward = model.__dict__["forward"].__func__
    forward.__dict__.pop("__signature__", None)
    if _encodes_in_forward(points):
        signature = inspect.signature(forward)
        kept = [one for name, one in signature.parameters.items() if name != "mm_encoder_outputs"]
        forward.__signature__ = signature.replace(parameters=kept)


def restore(modules: Sequence[nn.Module]) -> None:
    """Takes all replaced methods off again; safe to call twice.

    Raises:
        UsageError: something wrapped a forward since.
    """
    patched = [module for module in modules if "forward" in module.__dict__]
    for module in patched:
        if not getattr(module.__dict__["forward"], "llavolta", False):
            raise UsageError(f"detach: the forward of {type(module).__name__} was wrapped since; unwrap it first")
    for module in patched:
        del module.__dict__["forward"]
    for module in modules:
        for name in _GENERATION:
            module.__dict__.pop(name, None)


def _encodes_in_forward(points: Sequence[Point]) -> bool:
    return any(point.at_projector or "cls" in point.spec.needs for point in points)


def _named(function: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments by their names."""
    if not args:
        return kwargs
    names = list(inspect.signature(function).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
