"""What a run makes of its time on a cluster that fails: the real controller, driven over days of virtual time."""
