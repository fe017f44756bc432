"""The toolkit against emulated aarch64 boards; run by scripts/test_device and not by scripts/test.

conftest.py      boards, and bundles for them
board.py         a board as tests use it: the command line from here, Python and a shell there
record.py        what was seen, for the page in the docs
"""
