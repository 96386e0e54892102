"""Several runs beside one another: methods with seeds, compared on the same prompts, as one page."""
