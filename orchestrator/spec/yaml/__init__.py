"""From the text of experiment files to one tree that knows where each value was written, and errors placed in it."""
