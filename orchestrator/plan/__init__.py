"""What a grid costs and which work is left: cells, identity, stage tree, cost, ledger. Imports no torch."""
