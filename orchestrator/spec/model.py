"""`model:`, which vision-language model is trained and where its weights come from."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from orchestrator.spec.base import Flag, Spec


class ModelSpec(Spec):
    """The model: config and processor from a folder or the hub, weights pretrained, random or by part."""

    aliases: ClassVar[dict[str, str]] = {
        "model_id": "model_name_or_path",
        "base_model": "model_name_or_path",
        "torch_dtype": "dtype",
        "pretrained_model_name_or_path": "model_name_or_path",
        "attn_impl": "attn_implementation",
    }
    not_identity: ClassVar[frozenset[str]] = frozenset({"attn_implementation", "trust_remote_code"})

    model_name_or_path: str = Field(examples=["llava-hf/llava-1.5-7b-hf", "models/tiny-llava"])
    """Folder or hub id of an image-text-to-text model of transformers: its config, tokenizer and processor."""
    revision: str | None = Field(default=None, examples=["main"])
    """Revision of the hub repository: a branch, tag or commit; it is resolved to a commit. null takes `main`."""
    weights: Literal["pretrained", "random"] | dict[Literal["vision_tower", "projector", "language_model"], str] = (
        Field(
            default="pretrained",
            examples=[
                "random",
                {
                    "vision_tower": "openai/clip-vit-large-patch14-336",
                    "language_model": "lmsys/vicuna-7b-v1.5",
                    "projector": "random",
                },
            ],
        )
    )
    """Where the weights come from: `pretrained` (beside the config), `random` (drawn from the seed), or a source for
    each part: a folder, a hub id, a file such as LLaVA's `mm_projector.bin`, or `random`.
    """
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type of forward and backward passes; master weights and Adam's states stay float32. `auto` takes the
    type in the model's config.
    """
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention kernel. It is recorded with a result, but another kernel does not retrain a cell."""
    trust_remote_code: Flag = False
    """Whether code in the model's repository may run on your machines."""
