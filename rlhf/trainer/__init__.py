"""PPO from Python: `ppo` has the trainer, the other modules turn its arguments into the job that stage ppo runs."""
