"""Text -> trained model directory. Read first: trainer/loop.py."""
