"""Self-contained HTML pages with pictures in them, and the documents they show."""
