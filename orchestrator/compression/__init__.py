"""Visual-token compression inside unmodified Hugging Face models."""
