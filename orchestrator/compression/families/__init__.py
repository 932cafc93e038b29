"""One adapter per model family: where its images are and how its decoder is reached."""
