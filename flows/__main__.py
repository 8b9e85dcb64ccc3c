"""`python -m flows` is `vlmflow`, for a checkout that is not installed."""

from flows.cli import main

main()
