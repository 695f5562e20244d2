"""`python -m rlsae`, which the rules of the workflow call."""

from rlsae.cli import main

main()
