"""One stage run on one worker."""

import orchestrator.models  # noqa: F401 (first: it names the accelerator before DeepSpeed is imported)
