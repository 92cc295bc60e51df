"""The drawings and screenshots of the documents: `python -m scripts.drawings.NAME`."""
