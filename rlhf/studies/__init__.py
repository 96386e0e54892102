"""Studies: experiments of many trainings that run as one stage."""
