"""`model:`, which vision-language model is trained and where its weights come from."""

from __future__ import annotations

from typing import ClassVar, Literal

from orchestrator.spec.base import Flag, Spec


class ModelSpec(Spec):
    """The model: config and processor from a folder or the hub, weights whole, random or by part.

    Attributes:
        model_name_or_path: Folder or hub id of an image-text-to-text model (config, tokenizer, processor).
        revision: Hub revision; resolved to a commit.
        weights: `pretrained`, `random`, or a mapping of part to source: `vision_tower`, `projector`,
            `language_model` -> a folder, a hub id, a file such as LLaVA's `mm_projector.bin`, or `random`.
        dtype: Compute type; master weights and Adam states are float32.
        attn_implementation: Attention kernel; part of the fingerprint, not of a cell's identity.
        trust_remote_code: Opens the door to code in the model's repository.
    """

    aliases: ClassVar[dict[str, str]] = {
        "model_id": "model_name_or_path",
        "base_model": "model_name_or_path",
        "torch_dtype": "dtype",
        "pretrained_model_name_or_path": "model_name_or_path",
        "attn_impl": "attn_implementation",
    }
    not_identity: ClassVar[frozenset[str]] = frozenset({"attn_implementation", "trust_remote_code"})

    model_name_or_path: str
    revision: str | None = None
    weights: Literal["pretrained", "random"] | dict[Literal["vision_tower", "projector", "language_model"], str] = (
        "pretrained"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "sdpa"
    trust_remote_code: Flag = False
