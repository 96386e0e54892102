"""Preferences: who compares two responses, and how."""
