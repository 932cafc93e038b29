"""Read data files into rows: records, images, and an index of both that is kept."""
