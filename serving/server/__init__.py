"""The HTTP server: OpenAI-compatible endpoints over one engine. Read app.py first."""

from serving.server.app import build_app
from serving.server.run import serve

__all__ = ["build_app", "serve"]
