"""``python -m timm_ghn.training`` is ``timm-ghn train``, in the form that torchrun takes."""

from __future__ import annotations

import sys

from timm_ghn.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
