"""The other shell: the real controller and the real worker protocol under a virtual clock, with faults and checkers."""
