"""Does it fit? Memory and time of the training stages, from a model's config.json, before anything is loaded."""
