"""`python -m tcmu_rs` is the command `tcmu-rs`."""

from ._cli import main

if __name__ == "__main__":
    main()
