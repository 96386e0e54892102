"""Rewards: what turns a prompt and a response into a score."""
