"""``python -m ntkpipe``."""

from ntkpipe.app.cli import main

if __name__ == "__main__":
    main()
