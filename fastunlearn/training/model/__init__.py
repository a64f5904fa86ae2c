"""A saved pipeline in parts: text encoders, transformers, VAE; and sampling with them."""
