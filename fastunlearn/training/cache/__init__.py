"""The teacher cache: the frozen model's velocities and masks at points of its trajectories, written once."""
