"""`python -m modelspec` is the command line."""

from modelspec.cli import main

main()
