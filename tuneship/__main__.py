"""`python -m tuneship` is the command `tuneship`."""

from tuneship.cli import main

if __name__ == "__main__":
    main()
