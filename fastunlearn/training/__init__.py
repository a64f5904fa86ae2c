"""From prompts to an erased model: the teacher cache, the training of erasers, their evaluation, and sampling.

`prepare`, `train`, `evaluate` and `sample` are modules here with a `run` that takes the options of the same name in
`fastunlearn.training.options`; the command line adds nothing to them. `example.py` is the shortest whole program.

What it costs, on paper, at batch size 1 with the weights in bfloat16. A forward pass of S tokens through P parameters
in L blocks of D features is 2 P S + 4 L D S^2 operations. With gradient checkpointing a student's pass costs about 3
of them (forward, again, and backward to the activations: the frozen weights want no gradient), and keeps the input of
every block, S D L numbers. Low-rank localization keeps N r L numbers of N video tokens at rank r = 128, where the
erasers' outputs would be N D L, with as many for their gradients. Erasers, their gradients and Adam's two moments are
float32: 16 bytes a parameter.

    model, size                    weights  a forward  block    hidden  outputs  erasers  a cached  gradients
                                            pass       inputs   states  instead           point     summed
    CogVideoX-2B, 480x720x49        3.4 GB    133 TF    2.0 GB  0.13 GB   2.0 GB  0.24 GB   6.7 MB    59 MB
    CogVideoX-5B, 480x720x49       11.1 GB    361 TF    4.6 GB  0.19 GB   4.5 GB  0.53 GB   6.7 MB   133 MB
    HunyuanVideo, 720x1280x129     25.6 GB  13503 TF   43.9 GB  1.82 GB  43.8 GB  0.76 GB  45.6 MB   190 MB
    Wan2.1-1.3B, 480x832x81         2.8 GB    291 TF    3.0 GB  0.25 GB   3.0 GB  0.19 GB  12.6 MB    47 MB
    Wan2.1-14B, 480x832x81         28.6 GB   1815 TF   13.4 GB  0.34 GB  13.4 GB  0.84 GB  12.6 MB   211 MB

Forward passes. The cache: trajectories x sampling steps x 2, once; 6400 for the default 2 x 32 trajectories of 50 steps
(about half where sampling wants no guidance). A training step: 2 student passes, about 6 forward passes' work. The loop
that T2VUnlearning describes samples to a random timestep for every step: about 50 passes to get there, 2 to capture, 3
of the teacher, 2 of the student. Over the default 500 steps the cache adds 13 passes a step: 19 against 61.

Memory. One GPU holds the weights (once: the teacher is the student without erasers), the erasers, the block inputs and
hidden states of both student passes, or of one at a time with sequential terms, and what one block needs at work.

64 GPUs. `prepare` divides into independent trajectories, with nothing to tell each other. `train` sums the erasers'
gradients once a step, the last column: 133 MB for CogVideoX-5B, milliseconds against the seconds of two student passes.
FSDP2 keeps 1/64 of the weights on each and gathers a block at a time, erasers excepted: all weights once a forward
pass, and once a backward one. It does not divide activations: HunyuanVideo's at full size want sequential terms, or
tokens divided over a process group, for which the losses take `group`.
"""
