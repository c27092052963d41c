"""Causal layers over tokens that keep a state: attention with a cache, memories with fast weights."""
