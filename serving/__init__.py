"""Model directory -> verified ONNX directory -> answers. Read first: serving/engine.py."""
