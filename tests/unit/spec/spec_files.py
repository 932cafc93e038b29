"""The config of a small LLaVA, as the tests of the experiment file write it."""

TINY = {
    "model_type": "llava",
    "text_config": {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 201,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    },
}
