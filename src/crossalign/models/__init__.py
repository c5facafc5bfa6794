"""Modules built from pretrained parts: backbones, embedders, heads, and the plan of what trains."""
