"""Situations from public bug reports, each with the values or the refusal that is right for it."""
