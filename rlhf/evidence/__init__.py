"""Evidence: runs compared step by step, made again, and judged against recorded bands. Never imports torch."""
