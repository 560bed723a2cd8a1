"""``rkfast`` where torchvision may be one for another torch."""

import sys

from rkfast import cli
from tests import libraries

if __name__ == "__main__":
    libraries.prepare()
    sys.exit(cli.main())
