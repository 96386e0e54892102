"""Stage ppo: `loop` reads like the algorithm, `rollout` samples and scores, `update` optimises, `models` loads."""
