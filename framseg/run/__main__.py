"""`python -m framseg.run PROFILE [options]`: run the notebooks in their order for one profile."""

import sys

from framseg.run.notebooks import main

if __name__ == "__main__":
    sys.exit(main())
