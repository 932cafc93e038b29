"""A model type without an adapter of its own proves itself, on a tiny copy of its config, before it is served.

The copy has random weights, few narrow layers and batches made here: text only, one and several images, padded left and
right. Compared are: attached without points and with all tokens kept against the plain model, with and without labels
and with the auxiliary loss of experts; where images end against which placeholders move when one image does; pooling
against the plain computation of the contract kit (rows alone); cached against recomputed generation.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from orchestrator.compression.attach import attach_family
from orchestrator.compression.families import Family, family_of
from orchestrator.compression.families.images import flat_features, pair
from orchestrator.compression.shrink_config import shrunk_config
from orchestrator.compression.testing.kit import differs, generate, gradient_errors, special_tokens
from orchestrator.compression.testing.reference import Reference, decoder_inputs, gradients
from orchestrator.compression.testing.tiny import Batch, enlarge, pad_rows
from orchestrator.errors import UsageError
from orchestrator.plan.identity import cache_folder, digest, file_sha256
from orchestrator.spec.components import Grid

PROVEN = "proven"
REQUIRED = ("identity", "boundaries", "reference", "generation")
"""Checks without which a model is not served."""
_LAYERS = 4
_VOCABULARY = 160
_MOST_PARAMETERS = 300e6
_MOST_TOKENS = 2500
_MOST_SECONDS = 180.0
_PATCHES = 16  # along a side of an image, where its config asks for more
_ROWS: tuple[tuple[int | str, ...], ...] = ((3, "image", 7), (9,), (2, "image", 1, "small", 2, "image", 6))
_VIDEO_ROWS: tuple[tuple[int | str, ...], ...] = ((1, "video", 5), (3, "image", 4))
_ANSWER, _FRAMES = 3, 3
_EXACT, _CLOSE = 2e-6, 2e-5


def check_family(family: Any) -> None:
    """Refuse a model whose tiny copy does not show what it must.

    Args:
        family: The generic adapter of the model; what is found of videos is noted on it.

    Raises:
        UsageError: the message names the check and what it found.
    """
    found = verdict(family.model)
    for name in REQUIRED:
        if found[name] != PROVEN:
            raise UsageError(
                f"attach: {type(family.model).__name__} (model type {family.model.config.model_type}) has no adapter "
                f"of its own, and the self-check of a tiny copy of its config failed at {name}: {found[name]}"
            )
    if wrong := next(against_processor(family), ""):
        raise UsageError(
            f"attach: {type(family.model).__name__} (model type {family.model.config.model_type}) has no adapter of "
            f"its own, and what its processor makes of images is not what the model is taken to see: {wrong}"
        )
    family.video_refused = "" if found["video"] == PROVEN else f"they are not proven for its type: {found['video']}"


def verdict(model: Any) -> dict[str, str]:
    """Return for each check `proven` or what it found, from the cache where this config was checked before."""
    file = cache_folder() / "self_checks" / f"{model.config.model_type}-{_key(model)}.json"
    try:
        known: dict[str, str] = json.loads(file.read_text())
        return known
    except (OSError, ValueError):
        pass
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _default_dtype():
        found = self_check(model)
    if not any(_LATE in reason for reason in found.values()):  # another time the machine may be less busy
        _store(file, found)
    return found


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _store(file: Path, found: Mapping[str, str]) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found))
        part.replace(file)
    except OSError:  # it costs only time to check again
        with contextlib.suppress(OSError):
            part.unlink()


_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def _key(model: Any) -> str:
    """Return the digest of what a check depends on: class, config, attention, versions, our own source."""
    values = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
    about = [type(model).__qualname__, model.config._attn_implementation, torch.__version__, transformers.__version__]
    return digest([json.dumps(values, sort_keys=True, default=str), *about, _our_source()])[:24]


@cache
def _our_source() -> str:
    folder = Path(__file__).parents[1]
    return digest([file_sha256(str(file)) for file in sorted(folder.rglob("*.py"))])


def self_check(model: Any) -> dict[str, str]:
    """Return for each check `proven` or what it found on a tiny copy of a model.

    Args:
        model: A model of any image-text-to-text type; only its class and config are looked at.
    """
    names = (*REQUIRED, "video", "selection")
    reasons = []
    for config in small_configs(model):
        try:
            probe = Probe(tiny_copy(model, config))
            break
        except Exception as error:
            reasons.append(_said(error))
    else:
        return dict.fromkeys(names, f"no batch can be made for it: {reasons[-1]}")
    checks: dict[str, Callable[[], Iterator[str]]] = {name: getattr(probe, name) for name in names}
    found: dict[str, str] = {}
    for name, check in checks.items():
        if name != "identity" and found["identity"] != PROVEN:
            found[name] = "not tried"
            continue
        try:
            found[name] = next(iter(check()), PROVEN)
        except Exception as error:
            found[name] = _said(error)
    return found


def _said(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said[:300] if isinstance(error, UsageError) else f"{type(error).__name__}: {said[:300]}"


def small_configs(model: Any) -> Iterator[Any]:
    """Yield smaller configs of a model: with images of few patches where its own have many, and with its own."""
    values = _renamed(shrunk_config(model.config, _LAYERS).to_dict(), {})
    vision = values.get("vision_config")
    if isinstance(vision, dict) and vision.get("image_size") and vision.get("patch_size"):
        given, patches = pair(vision["image_size"]), pair(vision["patch_size"])
        sides = [min(size, _PATCHES * patch) for size, patch in zip(given, patches, strict=True)]
        if sides != list(given):
            size = sides if isinstance(vision["image_size"], (list, tuple)) else sides[0]
            yield type(model.config).from_dict({**values, "vision_config": {**vision, "image_size": size}})
    yield type(model.config).from_dict(values)


def tiny_copy(model: Any, config: Any) -> Any:
    """Return a small random model of a model's class, in float32 on the CPU, that stops when the check takes too long.

    Args:
        model: The model that is asked about.
        config: A small config (`small_configs`).

    Raises:
        UsageError: it is not small.
    """
    with torch.device("meta"):
        parameters = sum(one.numel() for one in type(model)(config).parameters())
    if parameters > _MOST_PARAMETERS:
        raise UsageError(f"its config stays large when shrunk ({parameters / 1e6:.0f} million parameters)")
    torch.manual_seed(0)
    attention = model.config._attn_implementation
    config._attn_implementation = attention if attention in ("eager", "sdpa") else "eager"
    tiny = enlarge(type(model)._from_config(config, dtype=torch.float32).eval())
    with torch.no_grad():
        for parameter in tiny.parameters():
            if parameter.ndim > 1 and not bool(parameter.any()):  # a projection that starts at zero would hide all
                parameter.normal_(std=0.1)
    end = time.monotonic() + _MOST_SECONDS

    def stop(*_: Any) -> None:
        if time.monotonic() > end:
            raise UsageError(f"{_LATE} ({_MOST_SECONDS:.0f} s on a tiny copy); it needs an adapter of its own")

    for module in tiny.modules():
        module.register_forward_pre_hook(stop)
    return tiny


_LATE = "the check took too long"


def _renamed(values: dict[Any, Any], tokens: dict[int, int]) -> dict[Any, Any]:
    """Return config values with a small vocabulary: what its special tokens are called is of no importance here."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = _renamed(value, tokens)
        elif str(name).endswith(("token_id", "token_index", "token_ids")):
            several = value if isinstance(value, list) else [value]
            known = [one if not isinstance(one, int) else tokens.setdefault(one, len(tokens) + 1) for one in several]
            value = known if isinstance(value, list) else known[0]
        elif name == "vocab_size" and isinstance(value, int):
            value = min(value, _VOCABULARY)
        found[name] = value
    return found


@dataclass(frozen=True)
class Pixels:
    """Visual input of a batch as a model takes it.

    Attributes:
        inputs: Keyword arguments of the forward.
        name: The argument that holds the pixels.
        entries: For each image (tile) or frame, in order, the index of its part of the pixels.
    """

    inputs: dict[str, Tensor]
    name: str
    entries: tuple[Any, ...]


class Probe:
    """A tiny model, its batches, and the checks on it; each check yields what does not hold."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family: Family = family_of(model)
        self.parameters = inspect.signature(type(model).forward).parameters
        self.tokens: dict[str, int] = {}
        self.frames_apart = False
        self.patch_shape = "flat"
        self.recipe = self._find_recipe()

    def _find_recipe(self) -> Callable[[Sequence[str]], Pixels]:
        """Return the first way of making images that the model takes.

        Raises:
            UsageError: none is.
        """
        reasons = []
        for recipe in (*_packed(self), _of_shapes, _plain, _tiled):
            try:
                make = recipe(self)
                for kind in ("image", "small"):
                    pixels = make([kind])
                    self.tokens[kind] = self._features(pixels)
                return make
            except Exception as error:
                reasons.append(_said(error))
        raise UsageError(f"its images are of no known form: {'; '.join(dict.fromkeys(reasons))[:400]}")

    def owner_of(self, method: str) -> Any:
        """Return the model or what is inside of it, whichever has a method.

        Raises:
            UsageError: neither has it.
        """
        for owner in (self.model, getattr(self.model, "model", None)):
            if hasattr(owner, method):
                return owner
        raise UsageError(f"it has no {method}")

    def _features(self, pixels: Pixels) -> int:
        """Return how many visual tokens the model makes of some pixels."""
        owner = self.owner_of("get_image_features")
        with torch.no_grad():
            output = owner.get_image_features(**pixels.inputs)
        tokens = len(flat_features(output))
        if not 1 < tokens <= _MOST_TOKENS:
            raise UsageError(f"an image becomes {tokens} visual tokens; 2 to {_MOST_TOKENS} can be checked")
        return tokens

    def batch(self, rows: Sequence[Sequence[int | str]], padding: str, answer: int = _ANSWER) -> tuple[Batch, Pixels]:
        """Return a batch of rows, with the images that each should have, and its pixels."""
        generator = torch.Generator().manual_seed(3)
        config = self.model.config
        image, video = self.family.token_ids
        assert image is not None
        special = {*special_tokens(config.to_dict()), image, video}
        usable = [token for token in range(1, config.get_text_config().vocab_size) if token not in special][:500]
        sequences, visual = [], []
        for row in rows:
            ids: list[int] = []
            for part in row:
                if part == "video":
                    frame = [int(video or 0)] * (self.tokens[part] // _FRAMES)
                    ids += (frame + usable[:1] * self.frames_apart) * _FRAMES
                elif isinstance(part, str):
                    ids += [image] * self.tokens[part]
                else:
                    drawn = torch.randint(len(usable), (part,), generator=generator).tolist()
                    ids += [usable[number] for number in drawn]
            sequences.append(ids)
            visual.append([token in (image, video) for token in ids])
        pad = next(token for token in usable[::-1])
        inputs = pad_rows(sequences, visual, padding, pad, answer)
        kinds = [part for row in rows for part in row if isinstance(part, str)]
        images = [kind for kind in kinds if kind != "video"]
        made = self.recipe(images) if images else _video(self)
        inputs |= made.inputs
        if "video" in kinds:
            inputs |= _video(self).inputs
        ids_BN = inputs["input_ids"]
        if "mm_token_type_ids" in self.parameters:
            inputs["mm_token_type_ids"] = (ids_BN == image).int() + 2 * (
                ids_BN == (-1 if video is None else video)
            ).int()
        if "token_type_ids" in self.parameters:
            inputs["token_type_ids"] = (ids_BN == image).long()
        if not answer:
            del inputs["labels"]
        return Batch(inputs, tuple(() for _ in rows)), made

    @contextlib.contextmanager
    def attached(self, points: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
        """Yield the attachment of the model with points, for the block."""
        attachment = attach_family(family_of(self.model), points)
        try:
            yield attachment
        finally:
            attachment.detach()

    def identity(self) -> Iterator[str]:
        """Compare attached without points, and with all tokens kept, to the plain model."""
        batch, _ = self.batch(_ROWS, "right")
        bare = {name: value for name, value in batch.inputs.items() if name != "labels"}
        routed = {"output_router_logits": True} if "output_router_logits" in self.parameters else {}
        with torch.no_grad():
            plain, logits = self.model(**batch.inputs, **routed).loss, self.model(**bare).logits
        if plain is None or not bool(plain.isfinite()):
            yield f"the plain model gives the loss {plain}"
            return
        kept = [{"kind": "average_pool", "layer": layer, "stride": 1} for layer in range(_LAYERS)]
        real_BN = batch.inputs["attention_mask"].bool()
        for points in ([], *([point] for point in kept)):
            how = f"all tokens kept from layer {points[0]['layer']}" if points else "no points"
            with self.attached(points), torch.no_grad():
                loss, found = self.model(**batch.inputs, **routed).loss, self.model(**bare).logits
            yield from differs(f"{how}: loss against the plain model", loss, plain, _CLOSE if points else _EXACT)
            yield from differs(f"{how}: logits against the plain model", found[real_BN], logits[real_BN], 1e-4)

    def boundaries(self) -> Iterator[str]:
        """Hold the adapter's units against the placeholders that move when one image does."""
        batch, pixels = self.batch(_ROWS, "right")
        yield from self._boundaries(batch, pixels)

    def _boundaries(self, batch: Batch, pixels: Pixels) -> Iterator[str]:
        ids_BN = batch.inputs["input_ids"]
        places = self.family.visual_BN(ids_BN).flatten().nonzero().squeeze(1)
        owner_P = self._owners(batch, pixels)[places]
        units, start = self._grids(batch), 0
        if sum(grid.tokens for grid in units) != len(places):
            yield f"{sum(grid.tokens for grid in units)} visual tokens in units, {len(places)} placeholders"
            return
        seen: list[int] = []
        for number, grid in enumerate(units):
            owners = sorted(set(owner_P[start : start + grid.tokens].tolist()))
            start += grid.tokens
            if len(owners) != 1 or owners[0] < 0:
                held = ", ".join("none" if one < 0 else str(one) for one in owners)
                yield f"unit {number} of {grid.tokens} tokens holds tokens of the images (tiles, frames) {held}"
                return
            seen += owners
        if len(set(seen)) != len(seen):
            yield f"{len(set(seen))} images (tiles, frames) stand in {len(seen)} units"

    def _grids(self, batch: Batch) -> list[Grid]:
        ids_BN = batch.inputs["input_ids"]
        return self.family.grids(batch.inputs, int(self.family.visual_BN(ids_BN).sum()))

    def _owners(self, batch: Batch, pixels: Pixels) -> Tensor:
        """Return for each place of the batch (flat) which entry of the pixels moves it; -1 none, -2 several."""

        def embeds() -> Tensor:
            with torch.no_grad():
                return decoder_inputs(self.model, self.family.language_model, batch.inputs)["inputs_embeds"].flatten(
                    0, 1
                )

        before = embeds()
        owner = torch.full((len(before),), -1)
        values = batch.inputs[pixels.name]
        for number, index in enumerate(pixels.entries):
            original = values[index].clone()
            values[index] = original.flip(-1) + 0.5 * torch.randn(original.shape)
            moved = (embeds() - before).abs().amax(-1) > 1e-6 * before.abs().amax()
            values[index] = original
            owner = torch.where(moved, torch.where(owner == -1, number, -2), owner)
        return owner

    def reference(self) -> Iterator[str]:
        """Compare pooling in a mixed batch with the plain computation, row by row."""
        for padding, layer in (("right", 2), ("left", 1)):
            batch, _ = self.batch(_ROWS, padding)
            point = {"kind": "average_pool", "layer": layer, "stride": 2}
            yield from self._against(batch, [point], f"pooling at layer {layer}, {padding} padding")

    def _against(self, batch: Batch, points: Sequence[Mapping[str, Any]], how: str) -> Iterator[str]:
        grids, units = self._grids(batch), []
        for visual_N in self.family.visual_BN(batch.inputs["input_ids"]):
            left, own = int(visual_N.sum()), []
            while left > 0:
                own.append(grids.pop(0))
                left -= own[-1].tokens
            units.append(own)
        with self.attached(points) as attachment:
            resolved = attachment.points
            attention = self.model.config._attn_implementation
            loss = self.model(**batch.inputs).loss
            found = gradients(self.model, loss)
        self.model.set_attn_implementation("eager")
        try:
            expected = Reference(self.family).loss(batch.inputs, units, resolved)
            wanted = gradients(self.model, expected)
        finally:
            self.model.set_attn_implementation(attention)
            self.model.zero_grad()
        yield from differs(f"{how}: loss against the plain computation", loss, expected, _CLOSE)
        yield from gradient_errors(how, found, wanted, 10 * _CLOSE)

    def generation(self) -> Iterator[str]:
        """Compare cached steps with recomputing everything."""
        batch, _ = self.batch(_ROWS, "left", 0)
        for layer in (1, 3):
            with self.attached([{"kind": "average_pool", "layer": layer, "stride": 2}]) as attachment, torch.no_grad():
                first_BV = self.model(**batch.inputs).logits[:, -1]
                one, other = (
                    generate(self.model, attachment, batch, self.family, use_cache=choice) for choice in (True, False)
                )
            how = f"generate, pooling at layer {layer}"
            yield from differs(f"{how}: first logits against forward", one.logits[0], first_BV, 1e-4)
            for step, (cached_BV, again_BV) in enumerate(zip(one.logits, other.logits, strict=True)):
                what = f"{how}: logits of step {step + 1} with a KV cache against recomputing everything"
                yield from differs(what, cached_BV, again_BV, 1e-4)
                if not torch.equal(one.sequences[:, : -3 + step], other.sequences[:, : -3 + step]):
                    break  # a tie of logits: from here on rows go their own ways

    def selection(self) -> Iterator[str]:
        """Compare a selection by attention with the plain computation."""
        batch, _ = self.batch(_ROWS, "right")
        yield from self._against(batch, [{"kind": "fastv", "layer": 2, "keep_ratio": "1/2"}], "fastv at layer 2")

    def video(self) -> Iterator[str]:
        """Do the same for the frames of a video as for images."""
        if self.family.token_ids[1] is None or "pixel_values_videos" not in self.parameters:
            yield "it takes no videos"
            return
        made = _video(self)
        owner = self.owner_of("get_video_features")
        with torch.no_grad():
            self.tokens["video"] = len(flat_features(owner.get_video_features(**made.inputs)))
        for self.frames_apart in (False, True):  # as one run, or each with a time stamp of its own
            found = self._video_faults()
            if not found:
                return
        yield found

    def _video_faults(self) -> str:
        points = [{"kind": "average_pool", "layer": 2, "stride": 2}]
        try:
            batch, _ = self.batch(_VIDEO_ROWS, "right")
            alone, made = self.batch(_VIDEO_ROWS[:1], "right")
            faults = [*self._boundaries(alone, made), *self._against(batch, points, "a video, pooling at layer 2")]
        except Exception as error:
            faults = [_said(error)]
        return next(iter(faults), "")


_SIZES_WH = ((128, 96), (70, 150), (128, 96))


def against_processor(family: Any) -> Iterator[str]:
    """Hold the units an adapter finds in what the model's own processor makes of pictures against the placeholders.

    Three pictures of two sizes, in two rows and each alone: an image must have as many placeholders as its units have
    tokens, and the same units whatever stands beside it. Nothing where no processor is at hand: it is looked for in
    the model's folder (or the hub's local cache), and may need a package that is not installed.

    Args:
        family: The generic adapter of the model.
    """
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(
            family.model.config._name_or_path,
            local_files_only=True,
            trust_remote_code=False,  # else it may ask, and wait for an answer
        )
        tokenizer = processor.tokenizer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        pictures = [_picture(size) for size in _SIZES_WH]
        batch = _processed(processor, [[pictures[0]], pictures[1:]])
        alone = [_processed(processor, [[picture]]) for picture in pictures]
    except Exception:  # no processor here, or one that wants other rows: it tells nothing, and the other checks stand
        return
    try:
        units = [family.grids(one, int(family.visual_BN(one["input_ids"]).sum())) for one in (batch, *alone)]
    except UsageError as error:
        yield _said(error)
        return
    for number, (one, grids) in enumerate(zip((batch, *alone), units, strict=True)):
        placeholders, tokens = int(family.visual_BN(one["input_ids"]).sum()), sum(grid.tokens for grid in grids)
        if tokens != placeholders:
            what = (
                "three pictures" if number == 0 else f"a picture of {'x'.join(map(str, _SIZES_WH[number - 1]))} pixels"
            )
            yield f"{what} have {placeholders} placeholders, and units of {tokens} tokens"
    if units[0] != [grid for grids in units[1:] for grid in grids]:
        yield f"three pictures have the units {units[0]} together, and {units[1:]} each alone"


def _picture(size: tuple[int, int]) -> Any:
    from PIL import Image

    return Image.frombytes(
        "RGB", size, bytes(_draw(size[1], size[0], 3).mul(40).add(128).clamp(0, 255).byte().flatten())
    )


def _processed(processor: Any, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return a processor's output for rows of pictures, with some text."""
    told = {"type": "text", "text": "What is it?"}
    contents = [[*({"type": "image"} for _ in pictures), told] for pictures in rows]
    if getattr(processor, "chat_template", None):
        text = [processor.apply_chat_template([{"role": "user", "content": content}]) for content in contents]
    else:
        text = [processor.image_token * len(pictures) + told["text"] for pictures in rows]
    return dict(processor(text=text, images=[list(row) for row in rows], padding=True, return_tensors="pt"))


def _vision(probe: Probe) -> Any:
    vision = getattr(probe.model.config, "vision_config", None)
    if vision is None:
        raise UsageError("its config has no vision_config")
    return vision


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _packed(probe: Probe) -> Iterator[Callable[[Probe], Callable[[Sequence[str]], Pixels]]]:
    """Return recipes of packed patches with a grid of each image, for the shapes that a patch may have."""

    def recipe(shape: str) -> Callable[[Probe], Callable[[Sequence[str]], Pixels]]:
        return lambda probe: lambda kinds: _patches(probe, kinds, shape, "image")

    yield from map(recipe, ("flat", "flat of one frame", "square"))


def _patches(probe: Probe, kinds: Sequence[str], shape: str, what: str) -> Pixels:
    if f"{what}_grid_thw" not in probe.parameters:
        raise UsageError(f"it takes no {what}_grid_thw")
    family: Any = probe.family  # the generic adapter, which alone has patches
    vision, side = _vision(probe), family.patches_per_side
    sizes = {"image": (1, 2 * side, 3 * side), "small": (1, 2 * side, 2 * side), "video": (_FRAMES, 2 * side, 2 * side)}
    thw = torch.tensor([sizes[kind] for kind in kinds]).reshape(-1, 3)
    channels = next(
        getattr(vision, name) for name in ("in_channels", "num_channels", "in_chans") if hasattr(vision, name)
    )
    patch, frames = pair(vision.patch_size)[0], pair(getattr(vision, "temporal_patch_size", 1))[0]
    one = {"flat": (channels * frames * patch**2,), "flat of one frame": (channels * patch**2,)}
    patches = _draw(int(thw.prod(1).sum()), *one.get(shape, (channels, patch, patch)))
    lengths = [h * w for t, h, w in thw.tolist() for _ in range(t)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    entries = tuple(slice(end - length, end) for end, length in zip(ends, lengths, strict=True))
    name = "pixel_values" if what == "image" else "pixel_values_videos"
    probe.patch_shape = shape
    return Pixels({name: patches, f"{what}_grid_thw": thw}, name, entries)


def _of_shapes(probe: Probe) -> Callable[[Sequence[str]], Pixels]:
    """Return images as patches padded to one number, with the rows and columns of each."""
    if "spatial_shapes" not in probe.parameters:
        raise UsageError("it takes no spatial_shapes")
    vision = _vision(probe)

    def make(kinds: Sequence[str]) -> Pixels:
        shapes = torch.tensor([(4, 6) if kind == "image" else (4, 4) for kind in kinds])
        mask = torch.arange(24) < shapes.prod(1, keepdim=True)
        pixels = _draw(len(kinds), 24, vision.num_channels * vision.patch_size**2)
        inputs = {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask.long()}
        return Pixels(inputs, "pixel_values", tuple(range(len(kinds))))

    return make


def _size(probe: Probe) -> tuple[int, int]:
    vision = _vision(probe)
    size = getattr(vision, "image_size", None)
    return pair(size) if size is not None else pair(4 * pair(vision.patch_size)[0])


def _plain(probe: Probe) -> Callable[[Sequence[str]], Pixels]:
    """Return an entry of `pixel_values` for each image, with the sizes where the model takes them."""

    def make(kinds: Sequence[str]) -> Pixels:
        height, width = _size(probe)
        sized = "image_sizes" in inspect.signature(probe.owner_of("get_image_features").get_image_features).parameters
        if sized:  # images of any size, then; a few tokens are enough
            side = getattr(probe.model.config, "spatial_merge_size", 1) * pair(_vision(probe).patch_size)[0]
            height, width = 2 * side, 3 * side
        inputs = {"pixel_values": _draw(len(kinds), getattr(_vision(probe), "num_channels", 3), height, width)}
        if sized:
            inputs["image_sizes"] = torch.tensor([[height, width]] * len(kinds))
        return Pixels(inputs, "pixel_values", tuple(range(len(kinds))))

    return make


def _tiled(probe: Probe) -> Callable[[Sequence[str]], Pixels]:
    """Return an image as a row of tiles: one each, or as many as the pinpoints of the config ask for."""

    def make(kinds: Sequence[str]) -> Pixels:
        height, width = _size(probe)
        tiles, inputs = 1, {}
        if getattr(probe.model.config, "image_grid_pinpoints", None):
            from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

            tiles = image_size_to_num_patches((height, width), probe.model.config.image_grid_pinpoints, height)
            inputs["image_sizes"] = torch.tensor([[height, width]] * len(kinds))
        inputs["pixel_values"] = _draw(len(kinds), tiles, getattr(_vision(probe), "num_channels", 3), height, width)
        entries = tuple((image, tile) for image in range(len(kinds)) for tile in range(tiles))
        return Pixels(inputs, "pixel_values", entries)

    return make


def _video(probe: Probe) -> Pixels:
    """Return one video of three frames."""
    if "video_grid_thw" in probe.parameters:
        return _patches(probe, ["video"], probe.patch_shape, "video")
    height, width = _size(probe)
    pixels = _draw(1, _FRAMES, getattr(_vision(probe), "num_channels", 3), height, width)
    return Pixels({"pixel_values_videos": pixels}, "pixel_values_videos", tuple((0, frame) for frame in range(_FRAMES)))
