"""`python -m fastunlearn`: the command line, also for launchers such as torchrun and accelerate."""

from fastunlearn.cli import main

main()
