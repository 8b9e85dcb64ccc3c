"""A checkpoint behind an OpenAI-compatible API, started, checked and stopped as a child process."""

from vlmcore.serving.engines import pick_engine
from vlmcore.serving.server import Endpoint, serve

__all__ = ["Endpoint", "pick_engine", "serve"]
