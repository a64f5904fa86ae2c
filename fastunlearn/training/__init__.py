"""From prompts to an erased model: the teacher cache, the training of erasers, their evaluation, and sampling."""
