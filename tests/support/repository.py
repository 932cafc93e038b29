"""Where things are in this checkout, for tests in any folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent
MODELS = ROOT / "experiments" / "models"
TINY_LLAVA = MODELS / "tiny-llava"
