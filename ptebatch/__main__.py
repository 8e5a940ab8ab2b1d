"""``python -m ptebatch`` is ``ptebatch``."""

from ptebatch.cli import main

if __name__ == "__main__":
    main()
