"""The Ray shell: a controller actor, worker actors, a fleet of them, and the life of a run. See design, section 3."""
