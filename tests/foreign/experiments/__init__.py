"""A user's own package, which no launcher may import in place of the checkout's."""
