"""``python -m ntkpipe``."""

from ntkpipe.cli import main

if __name__ == "__main__":
    main()
