"""The options of every command, one file each, and the paths that must be right; nothing here imports torch."""
