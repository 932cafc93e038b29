"""What attention modules of tower and decoder saw: recorded for a few queries, as tables that methods read."""
