"""Ray Tune over the same walk: schedules are proposed, run as cells, and the front is marked."""
