"""A decoder layer run for some of its tokens: keys and values for all; queries, attention output and MLP for those.

The layer's own forward runs on a shallow view of it, on the hidden states of the chosen tokens. What it calls with just
these (the norm before attention; attention where there is none) is called with all tokens instead. Attention's own
forward runs on a view as well, in which the projections of queries and of the output, and the attention function, take
the chosen tokens alone; query rows stand at their places among all, so that rotary embedding and gates need not know.
Every module is called once, with its hooks, in the order of the whole layer (ZeRO-3 gathers parameters by it).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.compression.attention.recorder import attention_config, attention_module, mask_rows
from orchestrator.compression.families.base import Family
from orchestrator.compression.shrink_config import shrunk_config
from orchestrator.errors import UsageError


@dataclass(frozen=True)
class Queries:
    """Some tokens of each row, as many of every row.

    Attributes:
        columns_BQ: Their columns, rising, no two alike.
        length: Columns of the rows.
    """

    columns_BQ: Tensor
    length: int

    @classmethod
    def of(cls, wanted_BN: Tensor) -> Queries | None:
        """Return the wanted tokens, where these are not all; a row with fewer than another is filled up with its last
        ones.

        Args:
            wanted_BN: True at them; on the host.
        """
        columns = wanted_BN.shape[1]
        most = max(1, int(wanted_BN.sum(1).max()))
        if most >= columns:
            return None
        rank_BN = wanted_BN * columns + torch.arange(columns)
        return cls(rank_BN.topk(most, dim=1).indices.sort(1).values, columns)

    def to(self, device: torch.device) -> Queries:
        """Move it to another device."""
        return replace(self, columns_BQ=self.columns_BQ.to(device, non_blocking=True))

    @functools.cached_property
    def places(self) -> Tensor:
        """Flat places of the tokens, row after row."""
        rows = torch.arange(len(self.columns_BQ), device=self.columns_BQ.device)
        return (self.columns_BQ + rows.unsqueeze(1) * self.length).flatten()

    def take(self, values_BN: Tensor) -> Tensor:
        """Return the values of the tokens, B x Q x ..."""
        return values_BN.flatten(0, 1).index_select(0, self.places).unflatten(0, self.columns_BQ.shape)

    def put(self, values_BQ: Tensor) -> Tensor:
        """Return the values at the tokens' places, zeros elsewhere: B x N x ..."""
        rows, rest = len(values_BQ), values_BQ.shape[2:]
        flat = values_BQ.new_zeros(rows * self.length, *rest)
        return flat.index_copy(0, self.places, values_BQ.flatten(0, 1)).unflatten(0, (rows, self.length))


class _StandIn:
    """Something called in the place of a module, whose attributes are there to be read."""

    def __init__(self, module: Any, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def for_queries(layer: Any, queries: Queries) -> Any:
    """Return a stand-in for a decoder layer that is given all tokens and returns the chosen ones."""
    return _StandIn(layer, functools.partial(_run_layer, queries))


def holding(layer: Any, held_BN: Tensor, queries: Queries | None, exact: bool) -> Any:
    """Return a stand-in for a decoder layer that leaves some tokens as they are, and makes only keys and values of
    them.

    Args:
        layer: The layer.
        held_BN: True at these tokens.
        queries: The other tokens, with some of these where a row has fewer others than the next; None = all.
        exact: None of these is among `queries`.
    """
    return _StandIn(layer, functools.partial(_run_holding, held_BN.unsqueeze(2), queries, exact))


def _run_holding(held_BN1: Tensor, queries: Queries | None, exact: bool, layer: Any, *args: Any, **kwargs: Any) -> Any:
    before_BND = args[0] if args else kwargs["hidden_states"]
    if runs := queries is not None and runs_for_queries(layer):
        assert queries is not None
        output = _run_layer(queries, layer, *args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        first = before_BND.flatten(0, 1).index_copy(0, queries.places, first.flatten(0, 1)).view_as(before_BND)
    else:
        output = layer(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
    if not (exact and runs):
        first = torch.where(held_BN1, before_BND, first)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def _run_layer(queries: Queries, layer: Any, *args: Any, **kwargs: Any) -> Any:
    all_BND = args[0] if args else kwargs["hidden_states"]
    chosen_BQD = queries.take(all_BND)
    attention = attention_module(layer, "compression")

    def to_all(value: Any) -> Any:
        # The same memory, not the same object: hooks (ZeRO-3's) and checkpoints pass a layer's input on as another one.
        same = isinstance(value, Tensor) and value.shape == chosen_BQD.shape
        return all_BND if same and value.data_ptr() == chosen_BQD.data_ptr() else value

    def fitting(value: Any) -> Any:
        # What all tokens became by the first norm goes into attention, and on into an MLP beside it.
        whole = isinstance(value, Tensor) and value.shape[:2] == all_BND.shape[:2]
        return queries.take(value) if whole else to_all(value)

    def call(module: Any, *given: Any, **named: Any) -> Any:
        if module is not attention:
            return module(*map(fitting, given), **{name: fitting(one) for name, one in named.items()})
        view = _attention_view(module, queries)
        return _call_as(module, view, *map(to_all, given), **{name: to_all(one) for name, one in named.items()})

    view = view_of(layer, {name: _StandIn(child, call) for name, child in layer._modules.items() if child is not None})
    if args:
        return _call_as(layer, view, chosen_BQD, *args[1:], **kwargs)
    return _call_as(layer, view, **(kwargs | {"hidden_states": chosen_BQD}))


def view_of(module: nn.Module, parts: Mapping[str, Any]) -> Any:
    """Return a shallow view of a module (its own parameters, buffers and attributes) with other submodules."""
    view: Any = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = {**module._modules, **parts}
    return view


def _call_as(module: nn.Module, view: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module, with its hooks, on the forward of a view of it."""
    module.__dict__["forward"] = functools.partial(type(module).forward, view)
    try:
        return module(*args, **kwargs)
    finally:
        del module.__dict__["forward"]


def _attention_view(attention: Any, queries: Queries) -> Any:
    def project_queries(module: Any, hidden_BND: Tensor) -> Tensor:
        return queries.put(module(queries.take(hidden_BND)))

    def project_output(module: Any, values_BND: Tensor) -> Any:
        return module(queries.take(values_BND))

    calls = {"q_proj": project_queries, _output_name(attention): project_output}
    view = view_of(attention, {name: _StandIn(getattr(attention, name), call) for name, call in calls.items()})

    def around(
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        mask_BHQK = mask_rows(attention_mask, module, queries.columns_BQ, query.shape[2], key.shape[2], options)
        chosen_BHQD = queries.take(query.transpose(1, 2)).transpose(1, 2)
        output_BQHD = function(module, chosen_BHQD, key, value, mask_BHQK, *args, **options)[0]
        return queries.put(output_BQHD), None

    view.__dict__["config"] = attention_config(attention.config, around)
    return view


_OUTPUT_NAMES = ("o_proj", "out_proj", "dense")


def _output_name(attention: nn.Module) -> str:
    return next(name for name in _OUTPUT_NAMES if name in attention._modules)


def has_attention(layer: Any) -> bool:
    """Return whether a layer has an attention module whose function is looked up by its config."""
    try:
        attention_module(layer, "compression")
    except UsageError:
        return False
    return True


def runs_for_queries(layer: Any) -> bool:
    """Return whether a layer that has shown to be right (`shows_queries`) can be run for some tokens as it is set up
    now.
    """
    attention: Any = attention_module(layer, "compression")
    if attention.config._attn_implementation not in ("eager", "sdpa"):
        return False
    if layer.training and any(_drops(module) for module in layer.modules()):  # it draws by a token's place in its row
        return False
    if "forward" in layer.__dict__ or "forward" in attention.__dict__:  # replaced by something else
        return False
    return recomputes_views(layer)


def recomputes_views(layer: Any) -> bool:
    """Return whether activation checkpointing, where it is on, runs what stood for a layer's forward again."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return True
    # Before transformers 5.23 a checkpoint is around the call, not the forward, and would run the whole layer again; a
    # reentrant one gives no gradient to what is not an argument.
    keywords = getattr(layer._gradient_checkpointing_func, "keywords", {})
    return "__call__" not in vars(GradientCheckpointingLayer) and keywords.get("use_reentrant") is False


def _drops(module: nn.Module) -> bool:
    dropout = getattr(module, "p", 0) if "Dropout" in type(module).__name__ else 0
    return bool(dropout or getattr(module, "attention_dropout", 0))


_LAYERS, _COLUMNS = 4, 9
_CHOSEN = ((2, 5, 8), (4, 7, 8))
_PADDED = 3
_CLOSE = 1e-4
_shown: dict[str, bool] = {}
_asked: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()  # a config's text takes its time


def shows_queries(family: Family) -> bool:
    """Return whether the last decoder layer, run for some tokens, gives these what the whole layer gives them.

    Held on a tiny decoder of the model's class and config with random weights: its output at the tokens and the
    gradients of its input and of all parameters, on rows with and without padding. Known per process and config.
    """
    about = type(family.language_model.layers[-1]), family.language_model.config._attn_implementation
    known = _asked.get(family.language_model)
    if known is None or known[0] != about:
        known = _asked[family.language_model] = about, _shows(family)
    return known[1]


def _shows(family: Family) -> bool:
    layer = family.language_model.layers[-1]
    try:
        config = _tiny_config(family)
        classes = type(family.language_model), type(layer)
        key = f"{classes} {config._attn_implementation} {config.to_json_string(use_diff=False)}"
        if key not in _shown:
            _shown[key] = _agrees(*classes, config)
    except Exception:  # whatever it is that such a decoder cannot do: its layers run whole
        return False
    return _shown[key]


def _tiny_config(family: Family) -> Any:
    own = family.language_model.config
    config = shrunk_config(family.model.config, _LAYERS).get_text_config()
    if type(config) is not type(own):
        raise UsageError(f"{type(own).__name__} is not the text config of {type(family.model).__name__}")
    if kinds := getattr(own, "layer_types", None):
        config.layer_types = [*config.layer_types[:-1], kinds[-1]]
    config._attn_implementation = own._attn_implementation
    return config


def _agrees(decoder_class: Any, layer_class: type, config: Any) -> bool:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        decoder = decoder_class(config).to(torch.float32).eval()
        if type(decoder.layers[-1]) is not layer_class:
            return False
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        inputs_BND = torch.randn(len(_CHOSEN), _COLUMNS, config.hidden_size, dtype=torch.float32).requires_grad_()
        mask_BN = torch.ones(inputs_BND.shape[:2], dtype=torch.long)
        mask_BN[1, :_PADDED] = 0
        queries = Queries(torch.tensor(_CHOSEN), _COLUMNS)
        weights_BQD = torch.randn(*queries.columns_BQ.shape, config.hidden_size, dtype=torch.float32)
        values = []
        for layers in (decoder.layers, [*decoder.layers[:-1], for_queries(decoder.layers[-1], queries)]):
            view = view_of(decoder, {"layers": layers})
            output = decoder_class.forward(view, inputs_embeds=inputs_BND, attention_mask=mask_BN, use_cache=False)
            chosen_BQD = output.last_hidden_state
            if layers is decoder.layers:
                chosen_BQD = queries.take(chosen_BQD)
            leaves = [inputs_BND, *(one for one in decoder.parameters() if one.requires_grad)]
            found = torch.autograd.grad((chosen_BQD * weights_BQD).sum(), leaves, allow_unused=True)
            values.append([chosen_BQD, *(torch.zeros(()) if one is None else one for one in found)])
        return all(one.shape == other.shape and _close(one, other) for one, other in zip(*values, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    scale = max(1.0, float(other.detach().abs().max()))
    return float((one - other).detach().abs().max()) <= _CLOSE * scale
