"""The teacher cache: the frozen model's velocities at points of its sampling trajectories, written once by `prepare`.

A trajectory is one run of sampling; a point is one of its steps: the latents x_t, the timestep, the velocities with and
without the prompt, and where the model sees the concept. Training reads points instead of running the frozen model.

    plan.py           which trajectories share a batch, which steps become points, which conditions are evaluated
    teacher.py        runs the frozen model through the plan
    user_videos.py    the user's own videos, as latents to take points from instead of sampling
    concept_masks.py  masks of the concept from the model's attention to its words
    writer.py         writes the cache; resumes one that was interrupted
    reader.py         reads a finished cache: `TeacherCache`, `PointSet`, `Points`
    validation.py     checks a finished cache before it is read
    index.py, shards.py  the two kinds of files that writer and reader share
    provenance.py     what a cache was made from, and whether it fits the model to be trained
    estimate.py       what `prepare` will cost
    changes.py        what differs between the facts of two runs, as text

To follow what happens, read `plan.py`, `teacher.py`, `writer.py`, `reader.py`. A cache is a folder of

    index.json               what determines the content, its fingerprint, every shard with its checksum, and a checksum
                             of all that; opening a cache checks these, and reading a shard first checks its own
    prompts.safetensors      the condition of each prompt, as "{index of the prompt}.{keyword of transformer.forward}"
    shard-00000.safetensors  the points of the first unit of work, and so on

A shard with K points holds `x_t`, `v_uncond` and `v_cond`, (K, *latent) in the model's dtype; `t`, (K,) float32;
`prompt`, (K,) int32, the index of the prompt that `v_cond` was computed with; and in groups with masks `mask`,
(K, F, h, w) bool.

A file is either complete or absent. The index exists from the start, marked as not finished, so that a resumed run can
compare its arguments. The folder holds nothing but JSON and safetensors: opening a cache cannot run code.
"""

from fastunlearn.training.cache.reader import Points, PointSet, TeacherCache

__all__ = ["PointSet", "Points", "TeacherCache"]
