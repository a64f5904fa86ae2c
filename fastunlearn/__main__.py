"""`python -m fastunlearn`, which launchers such as torchrun and accelerate can start."""

from fastunlearn.cli import main

main()
