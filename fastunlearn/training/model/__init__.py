"""A saved pipeline in memory, component by component, and sampling from it.

loading.py      loads transformers, scheduler and VAE; or reads a pipeline's configuration files alone
demo_model.py   the demo's little model in the place of a pipeline
text.py         encodes prompts with the pipeline's text encoders, and frees these again
video_model.py  `VideoModel`, the loaded model: latent sizes, noise schedule, decoding, encoding, its erasers
vae.py          turns latents into pixels and pixels into latents
sampling.py     denoises from noise to video step by step, with classifier-free guidance
erased.py       loads a model with saved erasers on it
memory.py       explains what helps when memory runs out
"""
