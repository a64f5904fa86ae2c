"""How well erasers work, measured on velocities alone.

metrics.py  the metrics: erasure coefficient, drift, localization
measure.py  runs a model with erasers at every point of a teacher cache, and collects the metrics
report.py   shows the result as a table and as a picture
"""
