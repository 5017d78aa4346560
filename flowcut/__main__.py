"""`python -m flowcut` is `flowcut`."""

from flowcut.cli import main

if __name__ == "__main__":
    main()
