"""Engines: what each decides (policy), what it launches and how it is asked (recipe), and a registry of them."""
