"""Definitions of losses: their arguments, documentation and value."""
