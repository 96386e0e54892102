"""Rewards over HTTP: `rlhf serve`. The client is the reward type `remote` (`rlhf.rewards.remote`)."""
