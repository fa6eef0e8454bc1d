"""The only place where engines, sandboxes, meters and the store meet."""
