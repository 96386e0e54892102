"""Models that are asked in words: a local one or one behind an address, with a cache of replies and a limit of cost."""
