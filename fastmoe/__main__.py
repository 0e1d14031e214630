import sys

from fastmoe.cli import main

sys.exit(main())
