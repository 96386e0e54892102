"""One module or folder for each stage. Stages never import each other: they meet on disk."""
