"""``python -m timm_ghn`` is ``timm-ghn``, in the form that torchrun takes."""

from __future__ import annotations

import sys

from timm_ghn.cli import main

if __name__ == "__main__":
    sys.exit(main())
