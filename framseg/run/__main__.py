"""`python -m framseg.run PROFILE [options]`: run the notebooks in their order for one profile."""

import sys

from framseg import command_line

if __name__ == "__main__":
    with command_line():  # Ctrl-C while the modules are loaded, too
        from framseg.run.notebooks import main

        sys.exit(main())
