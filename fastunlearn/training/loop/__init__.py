"""The training loop.

trainer.py       the loop itself: draws points, takes optimizer steps, writes checkpoints, resumes from them
batches.py       which points of the cache each step trains on, and which are held out
terms.py         the three losses of a step
optimizer.py     gradients, averaged over the processes, and the update of the erasers
validation.py    erasure and drift at the held-out points, while training goes on
measurements.py  what it measured: smoothed, and as a file
checkpoints.py   the files of a checkpoint
record.py        what is written beside trained erasers: what they were trained from
run_settings.py  the settings that a resumed run must share with the interrupted one
processes.py     Accelerate and FSDP2: one process or several
"""
