"""python -m data.toyworld: write a dataset."""
import sys

from data.toyworld import main

sys.exit(main())
