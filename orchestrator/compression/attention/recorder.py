"""Records what one attention module saw: a few query rows of its attention and its keys, never a full map.

transformers lets an attention module look up its function by `config._attn_implementation`. While a recording is on,
that one module sees its config through a proxy that names a function of ours; it calls the module's own function on
the same arguments and, beside it, computes softmax(q k) for the wanted rows only. No module is called in addition
(ZeRO-3 gathers parameters by the order of calls), no weight and no config is changed, results are the same bit for bit.
A checkpointed layer runs again in backward after the recording is off, as if nothing had been.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestrator.errors import UsageError

AROUND: Final = "llavolta_around"
_ATTENTION_NAMES: Final = ("self_attn", "attention", "attn", "self_attention")


@dataclass
class Recording:
    """What is to be recorded of one attention module, and after its calls what was.

    Attributes:
        queries_BQ: Columns of the query tokens of each row, among the queries of the call; None = no attention.
        weights_BQ: Their shares in the row's mean; None = all equal.
        wants_keys: Keys are wanted.
        attentions: For each call, what the queries paid to every key, mean over heads and queries: B x keys, float32.
        keys: For each call, the keys as the attention used them (rotated where it rotates): B x heads x keys x size.
    """

    queries_BQ: Tensor | None = None
    weights_BQ: Tensor | None = None
    wants_keys: bool = False
    attentions: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Return what the attention function gives, having looked at what goes in."""
        self.add(module, query, key, attention_mask, options)
        return function(module, query, key, value, attention_mask, *args, **options)

    def add(self, module: nn.Module, query_BHND: Tensor, key_BhKD: Tensor, mask: Any, options: dict[str, Any]) -> None:
        """Take one call of the attention function."""
        with torch.no_grad(), torch.autocast(query_BHND.device.type, enabled=False):
            if self.wants_keys:
                self.keys.append(key_BhKD.detach().float())
            if self.queries_BQ is None:
                return
            rows = len(query_BHND)
            queries_BQ = self.queries_BQ.to(query_BHND.device).expand(rows, -1)
            bias = _bias(mask_rows(mask, module, queries_BQ, query_BHND.shape[2], key_BhKD.shape[2], options))
            chosen_BHQD = _rows_of(query_BHND, queries_BQ)
            scaling = options.get("scaling")
            attention_BQK = attention_rows(
                chosen_BHQD, key_BhKD, bias, scaling if scaling is not None else query_BHND.shape[-1] ** -0.5,
                options.get("softcap"),
            )  # fmt: skip
            if self.weights_BQ is None:
                self.attentions.append(attention_BQK.mean(1))
            else:
                weights_BQ1 = self.weights_BQ.to(attention_BQK).unsqueeze(2)
                self.attentions.append((attention_BQK * weights_BQ1).sum(1))


def attention_rows(
    query_BHQD: Tensor, key_BhKD: Tensor, bias: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """softmax(q k * scaling + bias) of some query rows, mean over heads: B x Q x K in float32.

    Args:
        query_BHQD: Normed and rotated queries of H heads.
        key_BhKD: Keys of h heads; H / h query heads share one (grouped-query attention).
        bias: Added to the logits: B x 1 or H x Q x K, or None.
        scaling: Factor of the logits.
        softcap: Logits are bounded by softcap * tanh(logits / softcap).
    """
    rows, heads, queries, size = query_BHQD.shape
    key_heads, keys = key_BhKD.shape[1:3]
    grouped = query_BHQD.float().reshape(rows, key_heads, heads // key_heads * queries, size)
    logits_BHQK = (grouped @ key_BhKD.float().transpose(2, 3)).reshape(rows, heads, queries, keys) * scaling
    if softcap is not None:
        logits_BHQK = torch.tanh(logits_BHQK / softcap) * softcap
    if bias is not None:
        logits_BHQK = logits_BHQK + bias
    return logits_BHQK.softmax(3).mean(1)


def _rows_of(values_BHND: Tensor, rows_BQ: Tensor) -> Tensor:
    index = rows_BQ[:, None, :, None].expand(-1, values_BHND.shape[1], -1, values_BHND.shape[3])
    return values_BHND.gather(2, index)


def mask_rows(
    mask: Any, module: nn.Module, queries_BQ: Tensor, num_queries: int, num_keys: int, options: Mapping[str, Any]
) -> Tensor | None:
    """Return the rows of some queries of a mask of any form that attention implementations take.

    Args:
        mask: As the attention function gets it: 4-D, flex attention's, 2-D padding (flash attention), or None.
        module: The attention module, which says whether it is causal.
        queries_BQ: The queries, by their number in the call.
        num_queries: Queries of the call.
        num_keys: Keys of the call; the queries are their last ones.
        options: Further arguments of the attention function.

    Returns:
        B x 1 or H x Q x keys, True where a key is seen or what is added to its logit; None where all keys are seen.
    """
    rows = len(queries_BQ)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _rows_of(mask[..., :num_keys].expand(rows, -1, -1, -1), queries_BQ)
    device = queries_BQ.device
    key_K = torch.arange(num_keys, device=device)
    if hasattr(mask, "mask_mod"):  # flex attention
        row_B11 = torch.arange(rows, device=device)[:, None, None]
        visible_BQK = mask.mask_mod(row_B11, torch.zeros_like(row_B11), queries_BQ.unsqueeze(2), key_K[None, None])
        return visible_BQK.expand(rows, queries_BQ.shape[1], num_keys).unsqueeze(1)
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal) and mask is None:
        return None
    # No mask, or a padding mask alone (flash attention): the function itself is causal, over keys that end together.
    place_BQ1 = (queries_BQ + (num_keys - num_queries)).unsqueeze(2)
    visible_BQK = key_K <= place_BQ1
    if options.get("sliding_window"):
        visible_BQK = visible_BQK & (key_K > place_BQ1 - options["sliding_window"])
    if isinstance(mask, Tensor) and mask.ndim == 2:
        visible_BQK = visible_BQK & mask[:, None, -num_keys:].bool()
    return visible_BQK.unsqueeze(1)


def _bias(rows: Tensor | None) -> Tensor | None:
    """Return what a mask's rows add to the logits, in float32."""
    if rows is None or rows.dtype != torch.bool:
        return None if rows is None else rows.float()
    return torch.zeros_like(rows, dtype=torch.float32).masked_fill(~rows, torch.finfo(torch.float32).min)


class AroundAttention:
    """A config as one attention module sees it while something is put around its attention function; else the same.

    Args:
        config: The module's own config.
        around: Called instead of the function, with the function and then its arguments.
    """

    def __init__(self, config: Any, around: Callable[..., Any]) -> None:
        if AROUND not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(AROUND, _around_attention)
        self.__dict__.update(llavolta_config=config, llavolta_around=around, llavolta_on=True)

    @property
    def _attn_implementation(self) -> Any:
        config = self.__dict__["llavolta_config"]
        return AROUND if self.__dict__["llavolta_on"] else config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["llavolta_config"], name)


def attention_config(config: Any, around: Callable[..., Any]) -> AroundAttention:
    """Return a config with something put right around the attention function, inside of what is around it already."""
    if not isinstance(config, AroundAttention):
        return AroundAttention(config, around)
    outer = config.__dict__
    return AroundAttention(attention_config(outer["llavolta_config"], around), outer["llavolta_around"])


def _around_attention(module: nn.Module, *args: Any, **options: Any) -> Any:
    """Return the attention function of a module, with what was put around it."""
    state = module.config.__dict__
    while not state["llavolta_on"]:  # that one is under way: what is inside of it comes next
        state = state["llavolta_config"].__dict__
    state["llavolta_on"] = False  # flash attention's function asks the config for its own name
    try:
        return state["llavolta_around"](_own_function(module), module, *args, **options)
    finally:
        state["llavolta_on"] = True


def _own_function(module: nn.Module) -> Callable[..., Any]:
    """Return the function the module would have found: by name, `eager` in the file that defines its class."""
    files = [sys.modules.get(cls.__module__) for cls in type(module).__mro__]
    defaults = [getattr(file, "eager_attention_forward", None) for file in files]
    eager = next((default for default in defaults if default is not None), None)
    config: Any = module.config
    name = config._attn_implementation
    functions = getattr(files[0], "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    found: Callable[..., Any] | None = functions.get_interface(name, eager)
    if found is None:
        raise UsageError(
            f"compression: {type(module).__name__} has no eager_attention_forward beside its class, so its attention "
            "cannot be recorded; load the model with attn_implementation sdpa, or use a method without this need"
        )
    return found


def attention_module(layer: nn.Module, what: str) -> nn.Module:
    """Return the attention module of a decoder layer.

    Args:
        layer: The layer.
        what: Who asks, for the message.

    Raises:
        UsageError: it has none that can be recorded; the message says what is missing.
    """
    for name in _ATTENTION_NAMES:
        child = getattr(layer, name, None)
        if isinstance(child, nn.Module) and hasattr(child, "config"):
            return child
    raise UsageError(
        f"{what}: {type(layer).__name__} has no attention module with a config (looked for "
        f"{', '.join(_ATTENTION_NAMES)}), so what its attention sees cannot be recorded; choose a layer after a "
        "softmax attention, or a method that needs no attention"
    )


@contextmanager
def recording_of(attention: Any, recording: Recording, what: str) -> Iterator[Recording]:
    """Record the calls of one attention module within the block; it is as it was after it, even after an error.

    Args:
        attention: The module.
        recording: What is wanted; filled by the calls.
        what: Who asks, for the message.

    Raises:
        UsageError: the module has no config to be looked up by.
    """
    config = attention.__dict__.get("config")
    if config is None or not hasattr(config, "_attn_implementation"):
        raise not_recorded(attention, what)
    attention.__dict__["config"] = AroundAttention(config, recording)
    try:
        yield recording
    finally:
        attention.__dict__["config"] = config


def not_recorded(attention: nn.Module, what: str) -> UsageError:
    """Return the error for attention that went past the recorder."""
    return UsageError(
        f"{what}: {type(attention).__name__} does not look up its function in transformers' ALL_ATTENTION_FUNCTIONS by "
        "config._attn_implementation, so what it sees cannot be recorded; use a method that needs no attention"
    )
