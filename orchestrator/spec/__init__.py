"""What an experiment is: the models of an experiment file and the loader. Imports no torch."""
