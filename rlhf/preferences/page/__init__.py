"""The labelling page: a web server through which people answer the tasks of a preference store."""
