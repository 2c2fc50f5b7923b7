"""`python -m wnsurgery` is the command `wnsurgery`."""

from wnsurgery.cli import main

if __name__ == "__main__":
    main()
