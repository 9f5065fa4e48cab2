"""Multi-token patching (method.md sections 4 and 5)."""

from .graph import Graph, graph

__all__ = ["Graph", "graph"]
