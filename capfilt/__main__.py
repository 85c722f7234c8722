"""`python -m capfilt`, which is how torchrun starts a training: `torchrun --nproc-per-node 8 -m capfilt train …`."""

from capfilt.cli.main import main

if __name__ == "__main__":
    main()
