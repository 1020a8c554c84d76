"""`python -m qwen3_vlm` is the command `qwen3-vlm`."""

from qwen3_vlm.cli import main

if __name__ == "__main__":
    main()
