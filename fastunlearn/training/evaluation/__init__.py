"""How well erasers work, measured on velocities and latents: no video is decoded.

metrics.py  the metrics: erasure coefficient, distance to the baseline, drift, localization
measure.py  runs a model with erasers at every point of a teacher cache, and collects the metrics
seen.py     samples videos with the erasers, and has the frozen model look for the concept in them
report.py   shows the result as a table and as a picture
"""
