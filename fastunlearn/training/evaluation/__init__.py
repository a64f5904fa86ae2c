"""Metrics of an erased model in velocity space, and their report."""
