"""The ledger: finished work by identity, in a folder or a bucket; its store, leases, states, checks for damage."""

from orchestrator.plan.ledger.ledger import Ledger

__all__ = ["Ledger"]
