"""`python -m miaotui`, the same as `miaotui`."""

from miaotui.cli.main import main

if __name__ == "__main__":
    main()
