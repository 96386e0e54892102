"""RLHF research framework: supervised warm start, preference collection, reward model, PPO, evaluation."""

__version__ = "0.1.0"
