"""Speculative decoding: trees, rules of acceptance, drafters, and the one compiled loop around them."""
