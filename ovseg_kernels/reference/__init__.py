"""Plain torch. Each file holds the definition of one operator, which every backend is held to."""
