"""`python -m siftline.cli`."""

from siftline.cli import main

main()
