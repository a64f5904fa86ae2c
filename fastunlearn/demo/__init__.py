"""A tiny text-to-video model of coloured shapes, and the erasing of one of them from beginning to end."""
