"""Configs: one base with every field, one short file per system. They are Python; run only those you trust."""
