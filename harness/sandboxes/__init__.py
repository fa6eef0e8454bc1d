"""Where a clean engine runs: a process or a container, with one reaper that ends it whatever happens to us."""
