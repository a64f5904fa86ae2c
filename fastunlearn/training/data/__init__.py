"""What goes in and comes out: prompts, video files, and requests for trajectories."""
