"""Benchmarks of fastunlearn, imported as `fastunlearn.bench`. `bench/README.md` explains each and reads its results.

Commands: `kernels`, `traffic`, `algorithms`, `training`.
What they measure: `cases` (one operation), `whole_models` (a pass through a model), `published` and `steps` (a training
step), `cogvideox` (the model that the steps run).
How they measure: `agreement` (results first), `meters` (time and memory), `step_costs` (costs of training steps),
`command` (options and reports).
"""
