"""python -m toyworld: write a dataset."""
import sys

from toyworld import main

sys.exit(main())
