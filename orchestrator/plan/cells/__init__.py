"""From a loaded experiment to its cells: names resolved, phases a table of steps, each cell an identity."""
