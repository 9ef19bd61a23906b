"""`python -m shortllm`: the same as the `shortllm` command, for launchers that start modules."""

from shortllm.cli import main

if __name__ == "__main__":
    main()
